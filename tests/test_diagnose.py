"""`diagnose`: what healthy and sick posteriors are told, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from small_programs import guide_of_mean, model_of_mean, nothing, process_left_alone
from small_programs import mixture as mixture_of_two
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.criticism.components import distinctness
from pyro_lvm.criticism.runs import rotation_to
from pyro_lvm.to_arviz import convergence


def factors(n=300, columns=4, latent=2, seed=0):
    draw = np.random.default_rng(seed)
    loadings = draw.normal(size=(columns, latent)) * np.array([2.0, 1.0])
    return torch.as_tensor(draw.normal(size=(n, latent)) @ loadings.T + 0.7 * draw.normal(size=(n, columns)))


def quick(fit, x, **options):
    return lvm.diagnose(fit, x, **{"num_samples": 200, "num_simulations": 0, "seed": 0, **options})


class Linear(nn.Module):
    """x_i ~ N(W z_i, I), z_i ~ N(0, S), q(z_i | x_i) = N(A x_i, diag(s^2)) with everything given."""

    def __init__(self, loadings, weight, scale, covariance=None):
        super().__init__()
        self.loadings, self.weight, self.scale = loadings, weight, scale
        self.covariance = torch.eye(len(scale)).to(scale) if covariance is None else covariance

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.MultivariateNormal(x.new_zeros(len(self.scale)), self.covariance))
            pyro.sample("x", dist.Normal(z @ self.loadings.mT, 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(x @ self.weight.mT, self.scale).to_event(1))


def collapsed(weight=0.0, scale=1.0, n=300):
    """A decoder that ignores z."""
    loadings = torch.zeros(3, 2, dtype=torch.float64)
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Linear(loadings, weight * torch.ones(2, 3).double(), torch.full((2,), scale).double()), x


# --- a guide that is the posterior -----------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["diag", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_exact_guide_is_fine_everywhere(covariance, dtype):
    x = factors().to(dtype)
    report = lvm.diagnose(lvm.PPCA.closed_form(x, 2, covariance), x, num_samples=200, num_simulations=300, seed=0)
    assert report.verdict == "fine", report
    assert report["k_hat"]["by_row"].shape == (300,)
    assert report["k_hat"]["by_row"].eq(0.0).all()  # constant weights: neither NaN nor infinite
    assert report["k_hat"]["least_ess"] == pytest.approx(200, rel=1e-5)
    assert report["gap"]["nats_per_datum"] == pytest.approx(0.0, abs=1e-5)


def test_units_of_ppca_have_the_closed_form_s_activity_kl_and_information():
    x = factors(1500)
    program = lvm.PPCA.closed_form(x, 2)
    variance = program.posterior(x[:1]).covariance_matrix[0].diagonal().detach().numpy()
    report = quick(program, x, num_rows=None, num_samples=25)
    n = len(x)
    activity = report["active_units"]["z.activity"].numpy()
    np.testing.assert_allclose(activity, (1 - variance) * n / (n - 1), rtol=1e-6)
    assert (report["active_units"]["active"], report["active_units"]["units"]) == (2, 2)
    kl = oracles.ppca_unit_kl(variance)
    np.testing.assert_allclose(report["information"]["z.kl"].numpy(), kl, rtol=1e-6)
    assert report["information"]["kl"] == pytest.approx(kl.sum())
    # the aggregate posterior is the prior, but for the rows being so many: all of the KL is information
    np.testing.assert_allclose(report["information"]["z.mutual_information"].numpy(), kl, atol=0.05)
    assert report["information"]["mutual_information"] == pytest.approx(kl.sum(), abs=0.1)
    np.testing.assert_allclose(report["aggregate"]["z.aggregate_kl"].numpy(), 0.0, atol=0.05)
    np.testing.assert_allclose(report["aggregate"]["z.aggregate_mean"].numpy(), 0.0, atol=0.06)
    np.testing.assert_allclose(report["aggregate"]["z.aggregate_sd"].numpy(), 1.0, atol=0.05)


def test_the_kl_is_information_plus_the_aggregate_s_distance_to_the_prior():
    """Every datum has the posterior N(3, 1/2): no information, and all of the KL is the aggregate's."""
    program, x = collapsed(weight=0.0, scale=0.5)
    program.guide = lambda x, size=None: _same_for_all(x, size)
    report = quick(program, x)
    kl = oracles.normal_kl(np.array(3.0), np.array(0.5), np.array(0.0), np.array(1.0))
    np.testing.assert_allclose(report["information"]["z.kl"].numpy(), kl)
    np.testing.assert_allclose(report["information"]["z.mutual_information"].numpy(), 0.0, atol=1e-9)
    np.testing.assert_allclose(report["aggregate"]["z.aggregate_kl"].numpy(), kl)
    np.testing.assert_allclose(report["aggregate"]["z.aggregate_mean"].numpy(), 3.0, atol=0.1)
    assert report["aggregate"].verdict == report["information"].verdict == report["active_units"].verdict == "wrong"


def _same_for_all(x, size):
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(x.new_full((len(x), 2), 3.0), 0.5).to_event(1))


# --- sick ones -------------------------------------------------------------------------------------------------------


def test_a_decoder_that_ignores_z_is_collapsed_at_its_optimum():
    report = quick(*collapsed())
    assert report["active_units"]["active"] == 0
    assert report["use_of_latents"]["nats_per_datum"] == 0.0
    for name in ("active_units", "information", "use_of_latents"):
        assert report[name].verdict == "wrong"
        assert "free bits" in report[name].advice
    assert report["gap"].verdict == report["k_hat"].verdict == "fine"  # the posterior is the prior, and q is too
    assert report.verdict == "wrong"


def test_a_decoder_that_ignores_z_is_told_so_though_the_guide_encodes():
    report = quick(*collapsed(weight=0.5, scale=0.5))
    assert report["active_units"]["active"] == 2
    assert report["use_of_latents"]["nats_per_datum"] == 0.0
    assert report["use_of_latents"].verdict == "wrong"


def test_latents_that_explain_others_better_than_their_own_are_no_collapse():
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    found = quick(Linear(eye, -eye, torch.full((2,), 0.5).double()), x)["use_of_latents"]
    assert found["nats_per_datum"] < -0.1
    assert found.verdict == "wrong"
    assert "not found each other" in found.advice


def test_a_trained_program_whose_decoder_ignores_z_is_diagnosed_and_one_that_uses_it_is_not():
    class Small(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.gain, self.encoder, self.decoder = gain, nn.Linear(3, 4), nn.Linear(2, 3)

        def model(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(self.gain * z), 1.0).to_event(1), obs=x)

        def guide(self, x, size=None):
            loc, raw = self.encoder(x).chunk(2, -1)
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))

    x = 2 * factors(200, 3)
    torch.manual_seed(0)
    ignores, uses = (
        quick(lvm.fit(Small(gain), x, epochs=300, lr=0.03, seed=0), x, num_samples=50) for gain in (0.0, 1.0)
    )
    assert ignores["active_units"]["active"] == 0
    assert ignores["use_of_latents"].verdict == ignores["information"].verdict == "wrong"
    assert uses["active_units"].verdict == uses["use_of_latents"].verdict == uses["information"].verdict == "fine"


def test_a_sleeping_unit_is_counted():
    x = factors()
    program = lvm.PPCA.closed_form(x, 2)
    loadings, noise = program.loadings.detach(), program.noise_scale.detach()
    wider = lvm.PPCA(4, 3).double()
    wider.set_parameters(loadings=torch.cat([loadings, torch.zeros(4, 1)], 1), mean=program.mean, noise_scale=noise)
    report = quick(wider, x)
    assert (report["active_units"]["active"], report["active_units"]["units"]) == (2, 3)
    assert report["active_units"].verdict == "look"
    assert "1 of 3 units are asleep" in report["active_units"].advice
    assert report["information"].verdict == "fine"


RHO = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)


def test_mean_field_on_a_correlation_of_99_percent_has_a_k_above_07():
    """The data say nothing, so that the posterior is the prior; the best mean field guide has its precisions."""
    scale = RHO.inverse().diagonal().rsqrt()
    program = Linear(torch.zeros(3, 2).double(), torch.zeros(2, 3).double(), scale, RHO)
    report = quick(program, torch.zeros(40, 3).double() + 0.1, num_samples=1000)
    k = report["k_hat"]["by_row"]
    assert report["k_hat"]["median"] > 0.7
    assert (k > 0.7).double().mean() > 0.8
    assert report["k_hat"].verdict == "wrong"
    assert "too narrow" in report["k_hat"].advice
    exact = Linear(torch.zeros(3, 2).double(), torch.zeros(2, 3).double(), scale, torch.diag(scale.square()))
    assert quick(exact, torch.zeros(40, 3).double())["k_hat"]["max"] == 0.0


def test_the_gap_is_the_divergence_from_the_posterior():
    x = factors()
    program = lvm.PPCA.closed_form(x, 2, "full")
    loc, covariance = (part.detach().numpy() for part in (program.encode(x).mean, program.encode(x).covariance_matrix))
    posterior = program.posterior(x)
    with torch.no_grad():
        program._unconstrained_guide_scale.diagonal().copy_(
            (0.6 * nn.functional.softplus(program._unconstrained_guide_scale.diagonal())).expm1().log()
        )
    wide = 0.36 * covariance[0]  # every standard deviation times 0.6, and the factors are uncorrelated
    expected = oracles.gaussian_kl(
        loc, wide, posterior.mean.detach().numpy(), posterior.covariance_matrix[0].detach().numpy()
    )
    report = quick(program, x, num_samples=1000)
    gap = report["gap"]["by_row"]
    assert report["gap"]["log_evidence"] == pytest.approx(program.log_prob(x).mean().item())  # the exact one
    assert gap.mean().item() == pytest.approx(expected.mean(), abs=5 * gap.std().item() / math.sqrt(len(gap)))
    assert report["gap"].verdict == "look"
    assert report["k_hat"]["median"] == pytest.approx(oracles.normal_tail_index(0.6, 1.0), abs=0.15)


# --- mixtures --------------------------------------------------------------------------------------------------------


def mixture(locs, weights=None):
    locs = torch.as_tensor(locs, dtype=torch.float64)
    program = lvm.GaussianMixture(len(locs), 2).double()
    weights = torch.full((len(locs),), 1 / len(locs)) if weights is None else torch.as_tensor(weights)
    program.set_parameters(
        weights=weights.double(), locs=locs, covariances=torch.eye(2).double().expand(len(locs), 2, 2)
    )
    program.is_initialized.fill_(True)
    return program


def as_it_is(program, x):
    """A `Fit` with the program's parameters."""
    return lvm.fit(program, x, steps=1, lr=1e-9, seed=0, capture=False)


@pytest.fixture(scope="module")
def clusters():
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise + torch.tensor([[-4.0, 0.0], [4.0, 0.0]]).double().repeat(200, 1)


def test_a_mixture_that_fits_is_fine(clusters):
    report = quick(mixture([[-4.0, 0.0], [4.0, 0.0]]), clusters)
    assert report["components"].verdict == "fine"
    assert report["components"]["counts"].tolist() == pytest.approx([200, 200], abs=0.5)
    assert "k_hat" not in report
    with pytest.raises(KeyError, match="was not looked at: no latent of a datum is drawn"):
        report["k_hat"]


def test_doubles_and_empty_components_are_found(clusters):
    report = quick(mixture([[-4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [50.0, 50.0]]), clusters)
    found = report["components"]
    assert (found["duplicate_pairs"], found["empty"], found.verdict) == (1, 1, "wrong")
    assert "components 1 and 2" in found.advice
    assert "[3]" in found.advice
    assert found["distinctness"][1, 2].item() == pytest.approx(0.0, abs=1e-9)
    assert found["distinctness"][0, 1].item() == pytest.approx(1.0, abs=1e-3)
    near = quick(mixture([[-4.0, 0.0], [4.0, 0.0], [4.8, 0.0]]), clusters)["components"]
    assert near.verdict == "look"


@pytest.mark.parametrize("distance", [0.5, 1.0, 2.0])
def test_distinctness_is_the_jensen_shannon_divergence(distance):
    grid = torch.linspace(-8.0, 8.0 + distance, 4001, dtype=torch.float64)
    densities = torch.stack([dist.Normal(0.0, 1.0).log_prob(grid), dist.Normal(distance, 1.0).log_prob(grid)], -1).exp()
    # rows in the number that the mixture has them: each grid point counts by its density
    draws = torch.distributions.Categorical(densities.sum(-1)).sample((200_000,))
    r = (densities / densities.sum(-1, keepdim=True))[draws]
    assert distinctness(r)[0, 1].item() == pytest.approx(oracles.normal_pair_distinctness(distance), abs=0.01)


# --- latents that all data share -------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 0.4])
def test_a_shared_latent_is_judged_jointly(factor):
    x = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 2.0
    loc, scale = oracles.conjugate_normal_posterior(x.numpy(), 0.0, 10.0, 1.5)

    def guide(x, size=None):
        pyro.sample("loc", dist.Normal(x.new_tensor(loc), factor * scale))

    report = quick((model_of_mean, guide), x, num_samples=1000)
    assert (report["k_hat_joint"].verdict == "fine") == (factor == 1.0)
    expected = oracles.normal_kl(np.array(loc), np.array(factor * scale), np.array(loc), np.array(scale))
    gap = report["gap_joint"]
    assert gap["nats"] == pytest.approx(float(expected), abs=4 * gap["standard_error"] + 0.08 * expected + 1e-9)
    assert gap["nats_per_datum"] == pytest.approx(gap["nats"] / 30)
    if factor == 1.0:
        assert report["k_hat_joint"]["k"] == 0.0
    else:
        assert report["k_hat_joint"]["k"] == pytest.approx(oracles.normal_tail_index(factor, 1.0), abs=0.25)
    assert "calibration" not in report


def test_latents_of_a_datum_are_judged_given_one_draw_of_what_is_shared():
    """The guide of z given m is exact, that of m is not: by datum all is well."""

    def model(x, size=None):
        m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, size=None):
        m = pyro.sample("m", dist.Normal(x.new_tensor(5.0), 0.01))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal((m + x) / 2, math.sqrt(0.5)))

    report = quick((model, guide), torch.randn(30, generator=torch.Generator().manual_seed(0)).double())
    assert report["k_hat"]["max"] == 0.0
    assert report["gap"]["nats_per_datum"] == pytest.approx(0.0, abs=1e-9)
    assert report["k_hat_joint"].verdict == "look"  # with latents of every datum among them


# --- autoguides, runs, amortization ----------------------------------------------------------------------------------


def test_units_behind_an_autoguide_are_those_of_its_transformed_normal():
    """z_i > 0: the KL is that of the normals before the exponential."""

    def model(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2).to(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.log(), 1.0).to_event(1), obs=x)

    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fit = lvm.fit(model, x, steps=5, seed=0)
    guide = fit.posterior(x, num_draws=500, seed=0)["z"].log()
    report = quick(fit, x, num_samples=25, num_simulations=20)
    kl = oracles.normal_kl(guide.mean(0).numpy(), guide.std(0).numpy(), np.array(0.0), np.array(1.0)).mean(0)
    np.testing.assert_allclose(report["information"]["z.kl"].numpy(), kl, rtol=0.1)
    assert "autoguide" in report.skipped["calibration"]


def test_what_cannot_be_taken_apart_is_said():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("b", dist.Normal(x / 2, 0.7))

    report = quick((model, guide), torch.randn(30, generator=torch.Generator().manual_seed(0)).double())
    assert "depends on a" in report.skipped["units of b"]
    assert report["active_units"].verdict == "look"  # a says nothing, but b is not known to say nothing


def test_runs_agree_once_their_components_are_numbered_alike(clusters):
    one, other = mixture([[-4.0, 0.0], [4.0, 0.0]]), mixture([[4.0, 0.0], [-4.0, 0.0]])
    fits = [as_it_is(program, clusters) for program in (one, other)]
    found = lvm.diagnose_runs(fits, clusters, num_draws=100, seed=0)
    assert found["r_hat_unaligned"] > 2
    assert found.verdict == "fine"
    assert found["elbo_spread"] == pytest.approx(0.0, abs=1e-4)


def turned(program, angle):
    """The same density, with the factors turned."""
    other = lvm.PPCA(4, 2, "full").double()
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    other.set_parameters(loadings=program.loadings, mean=program.mean, noise_scale=program.noise_scale)
    with torch.no_grad():
        other._standard_loadings.copy_(program.loadings @ turn)
        other.solve_guide()
        other.is_initialized.fill_(True)
    return other


def test_runs_agree_once_their_factors_are_turned_alike():
    x = factors(10)
    program = lvm.PPCA.closed_form(x, 2, "full")
    programs = [program, turned(program, 0.7)]
    fits = [as_it_is(p, x) for p in programs]
    found = lvm.diagnose_runs(fits, x, num_draws=300, seed=0)
    assert found["r_hat_unaligned"] > 1.3
    assert found.verdict == "fine", found
    draws = found["draws of z"]
    assert draws.shape == (2, 300, 10, 2)
    assert found["r_hat"] == convergence({"z": draws})["z"][0]


def test_runs_that_differ_are_told_so():
    def at(loc):
        return model_of_mean, lambda x, size=None: pyro.sample("loc", dist.Normal(x.new_tensor(loc), 0.1))

    x = torch.zeros(5, dtype=torch.float64) + 1.0
    found = quick(at(0.9), x, others=[at(1.1)], num_samples=25)["runs"]
    assert found.verdict == "wrong"
    assert "different posteriors, most in 'loc'" in found.advice
    assert "elbo_spread" not in found.numbers
    # two runs, each one standard deviation from their common mean
    assert found["r_hat"] == pytest.approx(math.sqrt(2), rel=0.1)
    assert lvm.diagnose_runs([at(1.0), at(1.0)], x, seed=0).verdict == "fine"


def test_runs_that_stand_still_in_different_places_have_an_infinite_r_hat(clusters):
    fits = [as_it_is(mixture(locs), clusters) for locs in ([[-9.0, 0.0], [90.0, 0.0]], [[-9.0, 0.0], [9.0, 0.0]])]
    found = lvm.diagnose_runs(fits, clusters, num_draws=50, seed=0)
    assert found["r_hat"] == math.inf
    assert found.verdict == "wrong"


def test_rotations_are_undone():
    draw = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    torch.testing.assert_close(draw @ turn @ rotation_to(draw @ turn, draw), draw)


def test_the_amortization_gap_is_asked_for():
    x = factors(30)
    report = quick(lvm.PPCA.closed_form(x, 2), x, num_samples=25, amortization=True)
    assert report["amortization"]["nats_per_datum"] == pytest.approx(0.0, abs=0.01)
    assert report["amortization"].verdict == "fine"


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_is_a_mapping_that_prints_and_can_be_drawn():
    x = factors(60)
    report = lvm.diagnose(lvm.PPCA.closed_form(x, 2), x, num_samples=50, num_simulations=60, seed=0)
    assert list(report)[:2] == ["k_hat", "gap"]
    assert len(report) == len(list(report)) == 7
    text = str(report)
    assert text.splitlines()[0] == "Diagnosis: fine (7 fine, 0 look, 0 wrong)"
    assert "fine     k_hat: median 0  max 0" in text
    assert "skipped  runs: there is one run" in text
    assert max(len(line) for line in text.splitlines()) <= 120
    with pytest.raises(KeyError, match=r"no finding 'k'; there are k_hat, gap"):
        report["k"]
    with pytest.raises(KeyError, match="finding 'gap' has no 'nats'; it has nats_per_datum"):
        report["gap"]["nats"]
    figure = lvm.plots.diagnosis(report)
    assert isinstance(figure, Figure)
    assert [axes.get_title() for axes in figure.axes][:2] == ["k_hat: fine", "gap: fine"]


def test_a_mixture_s_report_can_be_drawn(clusters):
    program = mixture([[-4.0, 0.0], [4.0, 0.0]])
    report = quick(program, clusters)
    runs = lvm.diagnose_runs([as_it_is(program, clusters)] * 2, clusters, num_draws=50, seed=0)
    report = lvm.Diagnosis({**report, "runs": runs})
    titles = [axes.get_title() for axes in lvm.plots.diagnosis(report).axes]
    assert titles == [f"runs: {runs.verdict}", "components: fine"]
    with pytest.raises(ValueError, match=r"none of the findings .* can be drawn"):
        lvm.plots.diagnosis(lvm.Diagnosis({}))


def test_a_seed_fixes_every_number_and_nothing_moves():
    x = factors(60)
    program = lvm.PPCA.closed_form(x, 2)
    with torch.no_grad():
        program._unconstrained_guide_scale.add_(0.3)
    with process_left_alone():
        reports = [
            lvm.diagnose(program, x, num_samples=50, num_rows=20, num_simulations=60, seed=seed) for seed in (3, 3, 4)
        ]
    first, second, third = ({name: dict(finding.numbers) for name, finding in report.items()} for report in reports)
    assert first == second
    assert first["gap"] != third["gap"]
    assert len(reports[0]["k_hat"]["by_row"]) == 20


def test_what_cannot_be_diagnosed_is_refused():
    x = factors(30)
    program = lvm.PPCA.closed_form(x, 2)
    with pytest.raises(ValueError, match="num_samples is 10: it must be at least 25"):
        lvm.diagnose(program, x, num_samples=10)
    with pytest.raises(ValueError, match="num_rows is 1"):
        lvm.diagnose(program, x, num_rows=1)
    with pytest.raises(ValueError, match="num_simulations is 5"):
        lvm.diagnose(program, x, num_simulations=5)
    with pytest.raises(ValueError, match="1 fit has nothing to be compared with"):
        lvm.diagnose_runs([program], x)
    one = torch.zeros(5) + 1.0
    with pytest.raises(lvm.ProgramError, match="loc is a point"):
        lvm.diagnose(lvm.fit(model_of_mean, one, guide="map", steps=2, seed=0), one)
    with pytest.raises(lvm.ProgramError, match="no latent site in common"):
        lvm.diagnose_runs([(model_of_mean, guide_of_mean), (mixture_of_two, nothing)], one, num_draws=4)

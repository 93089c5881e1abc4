"""`log_evidence`: exact where it can be, else unbiased importance weights; enumerated sites always summed exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from small_programs import ppca_with_an_inexact_guide
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm

N = 7
X = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
WEIGHTS, LOCS, SCALES = np.array([0.2, 0.5, 0.3]), np.array([-1.0, 0.0, 2.0]), np.array([0.5, 1.0, 0.7])


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mixture(x: torch.Tensor, size: int | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=x):
        k = pyro.sample("k", dist.Categorical(tensor(WEIGHTS)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(tensor(LOCS)[k], tensor(SCALES)[k]), obs=x)


def no_guide(*args: Any, size: int | None = None) -> None:
    pass


def mixture_evidence(x: torch.Tensor) -> np.ndarray:
    return scipy.special.logsumexp(oracles.mixture_log_joint(x.numpy(), WEIGHTS, LOCS, SCALES), -1)


@pytest.mark.parametrize("method", ["auto", "exact", "importance"])
@pytest.mark.parametrize("batch_size", [512, 3, 1])
def test_an_enumerated_program_is_exact_whatever_the_chunks(method, batch_size):
    evidence = lvm.log_evidence(
        (mixture, no_guide), X, 2, method=method, batch_size=batch_size, return_diagnostics=True
    )
    assert evidence.log_evidence.numpy() == pytest.approx(mixture_evidence(X), rel=1e-10)
    assert evidence.log_evidence.dtype == torch.float64
    assert evidence.standard_error.abs().max() < 1e-6
    assert bool((evidence.effective_sample_size == (2.0 if method == "importance" else torch.inf)).all()) or (
        evidence.effective_sample_size.numpy() == pytest.approx(2.0)
    )


def test_one_row_and_one_component():
    assert lvm.log_evidence((mixture, no_guide), X[:1]).numpy() == pytest.approx(mixture_evidence(X[:1]), rel=1e-10)

    def single(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(x.new_ones(1)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(tensor(LOCS)[k], 1.0), obs=x)

    expected = oracles.normal_logpdf(X.numpy(), LOCS[0], 1.0)
    assert lvm.log_evidence((single, no_guide), X).numpy() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_the_built_in_mixture_is_its_closed_form(covariance):
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gmm = lvm.GaussianMixture(num_components=3, num_features=2, covariance=covariance)
    gmm.double().initialize(x, seed=0)
    assert lvm.log_evidence(gmm, x).numpy() == pytest.approx(gmm.log_prob(x).detach().numpy(), rel=1e-10)


def test_scales_do_not_enter_and_masks_do():
    seen = torch.arange(N) != 2

    def tempered(x, size=None):
        with poutine.scale(scale=0.3), poutine.mask(mask=seen):
            mixture(x, size)

    expected = np.where(seen.numpy(), mixture_evidence(X), 0.0)
    assert lvm.log_evidence((tempered, no_guide), X).numpy() == pytest.approx(expected, rel=1e-10)


def test_a_plate_within_the_data_plate_with_labels_at_both_levels():
    """Each datum has a label; each of its four measurements has a label of its own that depends on it."""
    views, table = 4, np.array([[0.9, 0.1], [0.3, 0.7]])
    x = torch.randn(views, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x, dim=-1):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)), infer={"enumerate": "parallel"}).long()
            with pyro.plate("views", views, dim=-2):
                j = pyro.sample("j", dist.Categorical(Vindex(tensor(table))[k]), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal((2 * j - k).to(x), 0.8), obs=x.T)

    values = x.numpy().T
    inner = np.empty((N, 2))
    for k in range(2):
        by_label = np.stack([np.log(table[k, j]) + oracles.normal_logpdf(values, 2.0 * j - k, 0.8) for j in range(2)])
        inner[:, k] = scipy.special.logsumexp(by_label, 0).sum(-1) + np.log([0.6, 0.4][k])
    expected = scipy.special.logsumexp(inner, -1)
    for batch_size in (512, 3):
        found = lvm.log_evidence((model, no_guide), x.T.contiguous(), batch_size=batch_size)
        assert found.numpy() == pytest.approx(expected, rel=1e-10)


@pytest.fixture(scope="module")
def ppca() -> tuple[lvm.PPCA, torch.Tensor]:
    return ppca_with_an_inexact_guide()


def test_ppca_is_exact_and_by_importance_within_its_standard_errors(ppca):
    model, x = ppca
    exact = lvm.log_evidence(model, x)
    expected = oracles.linear_gaussian_log_density(
        x.numpy(), model.loadings.detach().numpy(), model.mean.detach().numpy(), model.noise_scale.item() ** 2
    )
    assert exact.numpy() == pytest.approx(expected, rel=1e-10)
    estimate = lvm.log_evidence(model, x, 400, seed=0, method="importance", return_diagnostics=True)
    assert bool((estimate.standard_error > 0).all())
    assert bool(((estimate.log_evidence - exact).abs() < 4.5 * estimate.standard_error).all())
    assert bool((estimate.effective_sample_size < 400).all())


def test_the_estimate_is_unbiased_for_the_density_and_rises_with_the_number_of_samples(ppca):
    model, x = ppca
    x = x[:3]
    truth = model.log_prob(x).detach().numpy()
    repeats = 1000  # copies of a row are estimated independently
    copies = x.repeat(repeats, 1)
    few, many = (
        lvm.log_evidence(model, copies, k, seed=0, method="importance", batch_size=4000).numpy().reshape(repeats, 3)
        for k in (2, 20)
    )
    ratio = np.exp(few - truth)
    assert np.all(np.abs(ratio.mean(0) - 1) < 4 * ratio.std(0) / math.sqrt(repeats))
    rise, error = many.mean(0) - few.mean(0), np.hypot(few.std(0), many.std(0)) / math.sqrt(repeats)
    assert np.all(rise > 0)
    assert rise.mean() > 4 * math.hypot(*error) / len(error)
    assert np.all(many.mean(0) < truth + 4 * error)


def test_the_diagnostics_are_those_of_the_weights():
    drawn: list[torch.Tensor] = []

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            drawn.append(pyro.sample("z", dist.Normal(0.3 * x, 1.0)))

    count = 30
    found = lvm.log_evidence((model, guide), X, count, seed=0, return_diagnostics=True)
    z = next(draws for draws in drawn if draws.shape == (count, N)).numpy()
    log_weight = oracles.normal_logpdf(z, 0, 1) + oracles.normal_logpdf(X.numpy(), z, 1)
    weight = np.exp(log_weight - oracles.normal_logpdf(z, 0.3 * X.numpy(), 1))
    assert found.log_evidence.numpy() == pytest.approx(np.log(weight.mean(0)), rel=1e-10)
    assert found.effective_sample_size.numpy() == pytest.approx(weight.sum(0) ** 2 / (weight**2).sum(0), rel=1e-8)
    assert found.standard_error.numpy() == pytest.approx(weight.std(0) / weight.mean(0) / math.sqrt(count), rel=1e-6)


def test_draws_without_any_weight_have_no_effective_sample():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Uniform(z.abs() + 10.0, z.abs() + 11.0, validate_args=False), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))

    found = lvm.log_evidence((model, guide), X, 3, seed=0, return_diagnostics=True)
    assert bool((found.log_evidence == -torch.inf).all())
    assert bool((found.effective_sample_size == 0).all())
    assert bool((found.standard_error == torch.inf).all())


@pytest.mark.parametrize("encoder_sees_label", [True, False])
def test_labelled_and_unlabelled_rows_of_a_semi_supervised_vae(encoder_sees_label):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ssvae = lvm.SemiSupervisedVAE(
            3, num_classes=3, latent_dim=1, hidden=(4,), encoder_sees_label=encoder_sees_label
        ).double()
    with torch.no_grad():
        list(ssvae.encoder.parameters())[-1][1] += 1.0  # a scale above the prior's: weights with a finite variance
    x = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    y = torch.tensor([-1, 2, -1, 0])
    grid = torch.linspace(-9, 9, 601, dtype=torch.float64)
    by_label = np.empty((len(x), 3))
    for label in range(3):
        likelihood = ssvae.decode(grid.unsqueeze(-1), torch.full((len(grid),), label)).log_prob(x.unsqueeze(1))
        log_values = likelihood.numpy() + oracles.normal_logpdf(grid.numpy(), 0, 1)
        by_label[:, label] = oracles.log_integral(log_values, grid.numpy()) - np.log(3)
    expected = np.where(
        y.numpy() < 0, scipy.special.logsumexp(by_label, -1), by_label[np.arange(len(x)), y.numpy().clip(0)]
    )
    found = lvm.log_evidence(ssvae, (x, y), 300, seed=0, return_diagnostics=True)
    assert bool((found.standard_error < 0.25).all())
    assert np.all(np.abs(found.log_evidence.numpy() - expected) < 4.5 * found.standard_error.numpy())


def conjugate(x: torch.Tensor, size: int | None = None) -> None:
    m = pyro.sample("m", dist.Normal(x.new_tensor(0.5), 2.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(m, 0.8), obs=x)


def test_what_all_data_share_makes_it_the_joint_divided_by_n():
    joint = oracles.conjugate_normal_evidence(X.numpy(), 0.5, 2.0, 0.8)
    loc, scale = oracles.conjugate_normal_posterior(X.numpy(), 0.5, 2.0, 0.8)

    def guide(stretch):
        return lambda x, size=None: pyro.sample("m", dist.Normal(x.new_tensor(loc), stretch * scale))

    at_posterior = lvm.log_evidence((conjugate, guide(1.0)), X, 3, seed=0, return_diagnostics=True)
    assert at_posterior.log_evidence.numpy() == pytest.approx(np.full(N, joint / N), rel=1e-10)
    assert at_posterior.standard_error.abs().max() < 1e-6
    wider = lvm.log_evidence((conjugate, guide(1.5)), X, 300, seed=0, return_diagnostics=True)
    assert abs(wider.log_evidence[0].item() - joint / N) < 4 * wider.standard_error[0].item()
    assert wider.log_evidence.shape == wider.standard_error.shape == wider.effective_sample_size.shape == (N,)


def test_a_shared_label_is_summed_out_of_the_joint():
    def model(x, size=None):
        k = pyro.sample("k", dist.Categorical(tensor(WEIGHTS)), infer={"enumerate": "parallel"})
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(tensor(LOCS)[k], 1.0), obs=x)

    density = oracles.normal_logpdf(X.numpy()[:, None], LOCS, 1.0).sum(0)
    expected = scipy.special.logsumexp(np.log(WEIGHTS) + density) / N
    assert lvm.log_evidence((model, no_guide), X).numpy() == pytest.approx(np.full(N, expected), rel=1e-10)


def hierarchy(x: torch.Tensor, size: int | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_guides_made_from_the_model():
    """Mean field has a weight for each row; full rank couples the rows, so that only the joint can be weighed."""
    truth = oracles.normal_logpdf(X.numpy(), 0.0, math.sqrt(1.25))
    fit = lvm.fit(hierarchy, X, steps=80, lr=0.1, seed=0)
    found = lvm.log_evidence(fit, X, 200, seed=0, batch_size=3, return_diagnostics=True)  # no `index`: never in parts
    assert np.all(np.abs(found.log_evidence.numpy() - truth) < 4.5 * found.standard_error.numpy() + 1e-3)
    assert found.log_evidence.std() > 0.1
    joint_fit = lvm.fit(hierarchy, X, guide="full_rank", steps=80, lr=0.1, seed=0)
    joint = lvm.log_evidence(joint_fit, X, 200, seed=0, return_diagnostics=True)
    assert joint.log_evidence.std() < 1e-9
    assert abs(joint.log_evidence[0].item() - truth.mean()) < 4.5 * joint.standard_error[0].item() + 1e-3


def test_a_site_that_a_step_draws_several_times():
    """`num_samples` is an option of a step; a weight needs one draw, and a discrete site is listed in full."""

    def repeated(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            how = {"enumerate": "parallel", "num_samples": 5}
            pyro.sample("z", dist.Normal(0.8 * x, 0.6), infer=how)

    found = lvm.log_evidence((hierarchy, repeated), X, 200, seed=0, return_diagnostics=True)
    truth = oracles.normal_logpdf(X.numpy(), 0.0, math.sqrt(1.25))
    assert np.all(np.abs(found.log_evidence.numpy() - truth) < 4.5 * found.standard_error.numpy())

    def listed(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = dist.Categorical(tensor(WEIGHTS))
            pyro.sample("k", k, infer={"enumerate": "parallel", "num_samples": 2})

    assert lvm.log_evidence((mixture, listed), X).numpy() == pytest.approx(mixture_evidence(X), rel=1e-10)


def test_a_discrete_site_that_the_guide_samples():
    def sampling(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("k", dist.Categorical(tensor(WEIGHTS).expand(len(x), 3)))

    found = lvm.log_evidence((mixture, sampling), X, 500, seed=0, return_diagnostics=True)
    assert np.all(np.abs(found.log_evidence.numpy() - mixture_evidence(X)) < 4.5 * found.standard_error.numpy())


def test_a_loader_and_a_callers_random_state():
    loader = DataLoader(TensorDataset(X), batch_size=3)
    state = torch.get_rng_state()
    assert lvm.log_evidence((mixture, no_guide), loader).numpy() == pytest.approx(mixture_evidence(X), rel=1e-10)
    first = lvm.log_evidence((hierarchy, exact_guide), X, 2, seed=4)
    assert torch.equal(first, lvm.log_evidence((hierarchy, exact_guide), X, 2, seed=4))
    assert torch.equal(torch.get_rng_state(), state)


def exact_guide(x: torch.Tensor, size: int | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(0.8 * x, math.sqrt(0.2)))


def test_single_precision_stays_single():
    x = X.float()
    found = lvm.log_evidence((hierarchy, exact_guide), x, 3, seed=0)
    assert found.dtype == torch.float32
    assert found.numpy() == pytest.approx(oracles.normal_logpdf(x.numpy(), 0.0, math.sqrt(1.25)), rel=1e-5)


def without_plate(x: torch.Tensor, size: int | None = None) -> None:
    pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0).expand([len(x)]).to_event(1), obs=x)


def sequential_guide(x: torch.Tensor, size: int | None = None) -> None:
    for i in pyro.plate("rows", len(x)):
        pyro.sample(f"k{i}", dist.Categorical(tensor(WEIGHTS)), infer={"enumerate": "sequential"})


def sequential_model(x: torch.Tensor, size: int | None = None) -> None:
    for i in pyro.plate("rows", len(x)):
        pyro.sample(f"k{i}", dist.Categorical(tensor(WEIGHTS)))


@pytest.mark.parametrize(
    ("program", "options", "error", "message"),
    [
        ((mixture, no_guide), {"num_samples": 0}, ValueError, "num_samples is 0"),
        ((mixture, no_guide), {"method": "quadrature"}, ValueError, "'quadrature' is not known"),
        ((hierarchy, exact_guide), {"method": "exact"}, ValueError, "no closed-form evidence"),
        ((without_plate, no_guide), {}, lvm.ProgramError, "no plate over its rows"),
        ((sequential_model, sequential_guide), {}, lvm.ProgramError, "'k0' is enumerated sequentially"),
        (mixture, {}, lvm.ProgramError, "no guide"),
    ],
)
def test_what_has_no_evidence_says_why(program, options, error, message):
    with pytest.raises(error, match=message):
        lvm.log_evidence(program, X[:3], **options)


def test_a_point_has_no_density_to_weigh_by():
    fit = lvm.fit(conjugate, X, guide="map", steps=3, seed=0)
    with pytest.raises(lvm.ProgramError, match="m is a point"):
        lvm.log_evidence(fit, X)


def test_an_autoguide_with_a_positive_latent_accounts_for_its_transform():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            s = pyro.sample("s", dist.Gamma(x.new_tensor(3.0), 2.0))
            pyro.sample("x", dist.Normal(0.0, s**-0.5), obs=x)

    truth = scipy_student(X.numpy())
    guide = AutoNormal(model, init_scale=0.6)
    found = lvm.log_evidence((model, guide), X, 400, seed=0, return_diagnostics=True)
    assert np.all(np.abs(found.log_evidence.numpy() - truth) < 4.5 * found.standard_error.numpy())


def scipy_student(x: np.ndarray) -> np.ndarray:
    """x ~ N(0, 1/s), s ~ Gamma(3, rate 2): Student's t with 6 degrees of freedom and scale sqrt(2/3)."""
    from scipy.stats import t

    return t.logpdf(x, df=6, scale=math.sqrt(2 / 3))

"""Coordinate ascent of mixtures against scikit-learn, Bishop's equations, exact evidences, and its own program."""

from __future__ import annotations

import math
import pathlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm
from pyro_lvm import priors
from pyro_lvm.data import as_rows
from pyro_lvm.elbo.estimator import plain_estimator
from pyro_lvm.errors import NonFiniteError, ProgramError
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.models import mixture_updates
from pyro_lvm.models.conjugate_mixture import weighted_moments
from pyro_lvm.prior_distributions import InverseWishartCholesky

KINDS = ("full", "tied", "diag", "spherical")


@pytest.fixture
def faithful(data_root: pathlib.Path) -> torch.Tensor:
    return torch.tensor(np.loadtxt(data_root / "faithful.csv", delimiter=",", skiprows=1))


def clusters(n: int = 60, d: int = 2, seed: int = 0) -> torch.Tensor:
    """Three clusters that overlap a little, away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.tensor([[-2.0, 0.0, 1.0], [2.0, 0.5, -1.0], [0.0, 3.0, 0.0]], dtype=torch.float64)[:, :d]
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return 20 + centers[torch.arange(n) % 3] + noise * torch.tensor([0.5, 1.0, 0.8], dtype=torch.float64)[:d]


def table(n: int = 60, k: int = 3, seed: int = 1) -> torch.Tensor:
    """Responsibilities of no particular merit."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n, k, generator=generator, dtype=torch.float64)).softmax(-1)


def belief(d: int = 2, concentration: float = 0.7) -> priors.NormalInverseWishart:
    """A prior with no number at a special place."""
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean = 20 + torch.linspace(-0.5, 0.5, d, dtype=torch.float64)
    return priors.NormalInverseWishart(mean, root @ root.mT + torch.eye(d), d + 3.3, 0.4, concentration)


def ascend(kind: str, x: Any, k: int = 3, prior: Any = None, **options: Any) -> lvm.Fit:
    prior = belief(x.shape[1]) if prior is None else prior
    options.setdefault("seed", 0)
    return lvm.coordinate_ascent(lvm.GaussianMixture(k, x.shape[1], kind, prior=prior), x, **options)


def numbers(fit: lvm.Fit) -> tuple[np.ndarray, ...]:
    names = ("concentration", "mean", "mean_precision", "degrees_of_freedom", "scale_matrix")
    return tuple(fit.params[f"guide.{name}"].numpy() for name in names)


def close(actual: Any, expected: Any, tolerance: float = 1e-8) -> None:
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------- against scikit-learn


@pytest.mark.parametrize("rounds", [1, 7])
@pytest.mark.parametrize(("kind", "k", "d"), [("full", 3, 2), ("diag", 3, 1), ("spherical", 3, 1), ("tied", 1, 2)])
def test_scikit_learn_takes_the_same_steps_where_its_model_is_the_same(kind, k, d, rounds):
    # one feature has one variance, whatever it is called; one component has nobody to be tied to
    x, responsibilities, prior = clusters(d=d), table(k=k), belief(d)
    scale = {"full": prior.scale_matrix, "tied": prior.scale_matrix, "diag": prior.scale_matrix.diagonal()}
    theirs, _ = oracles.variational_mixture_scikit_learn(
        x.numpy(),
        responsibilities.numpy(),
        rounds,
        kind,
        (0.7, prior.mean.numpy(), 0.4, d + 3.3, scale[kind].numpy() if kind in scale else prior.scale_matrix.item()),
    )
    fit = ascend(kind, x, k, init=responsibilities, max_iter=rounds, tol=0.0)
    assert fit.info["iterations"] == rounds
    concentration, mean, mean_precision, degrees, psi = numbers(fit)
    close(concentration, theirs.weight_concentration_)
    close(mean, theirs.means_)
    close(mean_precision, theirs.mean_precision_)
    close(degrees, theirs.degrees_of_freedom_)
    normalised = psi / degrees.reshape(degrees.shape + (1,) * (psi.ndim - degrees.ndim))
    close(normalised, theirs.covariances_)


def test_where_scikit_learn_has_another_model():
    """It uses the Wishart's expected log determinant and its counts also where there are only variances.

    "diag" with D features: E[log |precision|] has a digamma for every number of degrees of freedom nu, nu - 1, ...,
    nu - D + 1, which is the Wishart's and not that of D independent Gammas. The parameters' step is ours, the labels'
    is not. "spherical": nu grows by N_k and not by the D N_k numbers that a common variance is seen in. "tied": nu and
    the scatter grow by the mean over the components, n / K, and not by all n rows.
    """
    x, responsibilities, prior = clusters(), table(), belief()
    arrays = (x.numpy(), responsibilities.numpy())
    common = (0.7, prior.mean.numpy(), 0.4)
    mixture = lvm.GaussianMixture(3, 2, "diag", prior=prior)
    rows = as_rows(x)
    start = mixture.double().coordinate_updates().start(rows, 0, responsibilities, False)
    diag, their_labels = oracles.variational_mixture_scikit_learn(
        *arrays, 0, "diag", (*common, prior.variance_degrees_of_freedom, prior.scale_matrix.diagonal().numpy())
    )
    close(start.factors.degrees_of_freedom, diag.degrees_of_freedom_)
    close(start.factors.scale.square(), diag.covariances_)
    ours = start.moments.counts
    assert (ours - torch.tensor(np.exp(their_labels).sum(0))).abs().max() > 0.01
    psi = prior.scale_matrix
    for kind, scale, gained in (("spherical", psi.diagonal().mean().item(), 2.0), ("tied", psi.numpy(), 3.0)):
        theirs, _ = oracles.variational_mixture_scikit_learn(*arrays, 0, kind, (*common, 5.3, scale))
        mixture = lvm.GaussianMixture(3, 2, kind, prior=prior).double()
        factors = mixture.coordinate_updates().start(rows, 0, responsibilities, False).factors
        before = 5.3 if kind == "tied" else 4.3
        close(factors.degrees_of_freedom - before, gained * (theirs.degrees_of_freedom_ - 5.3))
        close(factors.mean, theirs.means_)


# ------------------------------------------------------------------------------------------------------ the bound


@pytest.mark.parametrize("rounds", [1, 4])
def test_the_bound_is_that_of_bishops_equations(rounds):
    x, prior = clusters(), belief()
    fit = ascend("full", x, init=table(), max_iter=rounds, tol=0.0)
    alpha, m, kappa, nu, psi = numbers(fit)
    with Evaluation.of(fit, x).running(0):
        labels = fit._bound.program.guide
        responsibilities = mixture_updates.expected_log_joint(x, labels.factors).softmax(-1).detach().numpy()
    numpy_prior = (np.full(3, 0.7), prior.mean.numpy(), 0.4, prior.degrees_of_freedom, prior.scale_matrix.numpy())
    expected = oracles.variational_mixture_bound(x.numpy(), responsibilities, (alpha, m, kappa, nu, psi), numpy_prior)
    assert fit.elbo * len(x) == pytest.approx(expected, abs=1e-8 * abs(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_the_programs_own_by_brute_force(kind):
    # far from the end, where the integrand varies; the program knows nothing of digammas
    x = clusters(45)
    fit = ascend(kind, x, init=table(45), max_iter=1)
    evaluation = Evaluation.of(fit, x)
    estimator, batch = plain_estimator(evaluation.structure), evaluation.rows.whole()
    with evaluation.running(0):
        draws = [estimator.evaluate(evaluation.bound, batch)[1] for _ in range(100)]

    def agree(expected: float, values: list[torch.Tensor]) -> None:
        brute = torch.stack(values) / 45
        error = brute.std().item() / 10
        assert error < 0.04
        assert abs(brute.mean().item() - expected) < 4 * error + 1e-10

    agree(fit.elbo, [terms.elbo for terms in draws])
    agree(fit.history["reconstruction"]["x"][-1], [terms.reconstruction["x"] for terms in draws])
    for site, values in fit.history["kl"].items():
        agree(values[-1], [terms.kl[site] for terms in draws])
    sites = {"weights", "locs", "component", "scale_tril" if kind in ("full", "tied") else "scales"}
    assert set(fit.history["kl"]) == sites
    total = fit.history["reconstruction"]["x"][-1] - sum(values[-1] for values in fit.history["kl"].values())
    assert total == pytest.approx(fit.history["elbo"][-1], abs=1e-12)
    assert fit.elbo == fit.history["elbo"][-1] == pytest.approx(-fit.history["loss"][-1] / 45)


@pytest.mark.parametrize("d", [1, 3])
def test_one_component_has_the_exact_evidence(d):
    x, prior = clusters(d=d), belief(d)
    arguments = (prior.mean.numpy(), 0.4, prior.degrees_of_freedom, prior.scale_matrix.numpy())
    expected = oracles.normal_inverse_wishart_evidence(x.numpy(), *arguments)
    for kind in KINDS if d == 1 else ("full", "tied"):
        assert ascend(kind, x, 1).elbo * len(x) == pytest.approx(expected, abs=1e-8 * abs(expected)), kind


def test_independent_features_have_the_evidence_of_each_and_a_common_variance_that_of_all():
    x, prior = clusters(d=3), belief(3)
    degrees, psi = prior.variance_degrees_of_freedom, prior.scale_matrix.diagonal().numpy()
    each = [
        oracles.normal_inverse_gamma_evidence(x[:, j].numpy(), prior.mean[j].item(), 0.4, degrees, psi[j])
        for j in range(3)
    ]
    assert ascend("diag", x, 1).elbo * len(x) == pytest.approx(sum(each), abs=1e-7)
    # log p(x) = log p(x, theta) - log p(theta | x) at any theta
    factors = numbers(ascend("spherical", x, 1))
    _, m, kappa, nu, sum_of_squares = (torch.tensor(part) for part in factors)
    variance, loc = torch.tensor(1.3).double(), torch.tensor([19.0, 20.0, 21.0]).double()

    def log_density(mean: Any, precision: Any, half: Any, sum_: Any) -> torch.Tensor:
        of_variance = dist.InverseGamma(torch.as_tensor(half), torch.as_tensor(sum_) / 2).log_prob(variance)
        return of_variance + dist.Normal(mean, (variance / precision).sqrt()).log_prob(loc).sum()

    joint = dist.Normal(loc, variance.sqrt()).log_prob(x).sum() + log_density(
        prior.mean, torch.tensor(0.4).double(), torch.tensor(degrees / 2).double(), psi.mean()
    )
    evidence = joint - log_density(m[0], kappa[0], nu[0] / 2, sum_of_squares[0])
    assert ascend("spherical", x, 1).elbo * len(x) == pytest.approx(evidence.item(), abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_never_falls_and_ends_where_no_factor_can_be_bettered(kind):
    x = clusters(90, 3)
    fit = ascend(kind, x, init=table(90), max_iter=3000, tol=1e-12)
    assert (np.diff(fit.history["elbo"]) > -1e-12).all()
    assert fit.info["stopped"].startswith("converged")
    # moving any parameter of the guide a little only loses: the gradient of the exact bound is zero there
    guide = fit._bound.program.guide
    updates = lvm.GaussianMixture(3, 3, kind, prior=belief(3)).double().coordinate_updates()
    rows = as_rows(x)
    for parameter in guide.parameters():
        for direction in (1e-2, -1e-2):
            kept = parameter.data.clone()
            parameter.data += direction * torch.randn_like(kept)
            with torch.no_grad():
                moved = updates._labelled(guide.factors, rows, x.mean(0))
            reconstruction, kl = updates.bound(moved, rows)
            parameter.data = kept
            assert sum(reconstruction.values()) - sum(kl.values()) <= fit.elbo * 90 + 1e-8


# -------------------------------------------------------------------------------------------------- the same family


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_the_same_family_climb_to_the_same_bound(kind, faithful):
    x = faithful[::2]
    prior = priors.weakly_informative(x, 2)
    init = (torch.tensor([[0.0, 1.0]]) + torch.tensor([[1.0, -1.0]]) * (x[:, :1] > 4.5)).double() * 0.8 + 0.1
    ascent = lvm.coordinate_ascent(lvm.GaussianMixture(2, 2, kind, prior=prior), x, init=init, tol=1e-9)
    gmm = lvm.GaussianMixture(2, 2, kind, prior=prior).double()
    guide = gmm.conjugate_guide()
    start = gmm.coordinate_updates().start(as_rows(x), 0, init, False)
    guide.set_factors(start.factors)
    gmm.initialize(x, seed=0)
    fit = lvm.fit(gmm, x, guide=guide, steps=350, seed=1, progress=False)
    assert ascent.history["elbo"][0] > sum(fit.history["elbo"][:5]) / 5 - 1e-3  # the ascent's first round is behind it
    assert abs(fit.elbo - ascent.elbo) < 0.01 + 4 * fit.info["elbo_se"]
    assert fit.elbo < ascent.elbo + 4 * fit.info["elbo_se"]


@pytest.mark.parametrize("kind", KINDS)
def test_model_and_conjugate_guide_obey_the_laws_of_programs(kind):
    x = clusters(30)
    gmm = lvm.GaussianMixture(3, 2, kind, prior=belief()).double()
    lvm.testing.check_program(gmm, x, guide=gmm.conjugate_guide())


def test_the_guide_starts_where_the_mixture_starts(faithful):
    gmm = lvm.GaussianMixture(2, 2, prior=priors.weakly_informative(faithful))
    fit = lvm.fit(gmm, faithful, guide=gmm.conjugate_guide(), steps=1, lr=1e-6, seed=0, progress=False)
    ascent = lvm.coordinate_ascent(gmm, faithful, max_iter=1)
    assert fit.elbo == pytest.approx(ascent.elbo, abs=0.01)
    assert fit.info["guide"] == "given"
    guide = gmm.conjugate_guide()
    guide.initialize(faithful, seed=3)
    before = guide.constrained()
    guide.initialize(faithful[:5], seed=4)  # has factors: nothing happens
    for name, value in guide.constrained().items():
        torch.testing.assert_close(value, before[name])
    guide.reset_parameters()
    assert not guide.is_initialized
    close(guide.constrained()["mean"].detach(), gmm.prior.mean.expand(2, 2))
    with pytest.raises(ValueError, match="the guide conditions on data"):
        guide(None, size=3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_of_the_fit_works(kind, faithful):
    fit = lvm.coordinate_ascent(lvm.GaussianMixture(2, 2, kind, prior=priors.weakly_informative(faithful)), faithful)
    few = faithful[:30]
    draws = fit.posterior(few, num_draws=400, seed=0)
    expected_weights = fit.params["guide.concentration"] / fit.params["guide.concentration"].sum()
    error = draws["weights"].std(0) / 20
    assert ((draws["weights"].mean(0) - expected_weights).abs() < 4.5 * error).all()
    assert draws["component"].shape == (400, 30)
    responsibilities = fit.responsibilities(few, 100, seed=0)
    assert responsibilities.shape == (30, 2)
    close(responsibilities.sum(-1), 1.0)
    frequencies = torch.stack([(draws["component"] == k).double().mean(0) for k in range(2)], -1)
    assert (frequencies - responsibilities).abs().max() < 0.15  # mean field beside the average of Bayes' rule
    assert fit.log_prob(faithful, 50, seed=0).mean() > fit.elbo
    exported = fit.to_arviz(few, 20, seed=0)
    assert exported.posterior["locs"].shape == (1, 20, 2, 2)
    assert exported.log_likelihood["x"].shape == (1, 20, 30)
    assert "coordinate ascent" in repr(fit)
    assert fit.info["elbo_se"] == 0.0


# ------------------------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("kind", KINDS)
def test_labels_rows_blocks_and_precision_do_not_matter(kind, monkeypatch):
    x, init = clusters(), table()
    fit = ascend(kind, x, init=init, max_iter=20)
    turned = ascend(kind, x, init=init[:, [2, 0, 1]], max_iter=20)
    assert turned.elbo == pytest.approx(fit.elbo, abs=1e-10)
    close(numbers(turned)[1], numbers(fit)[1][[2, 0, 1]])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert ascend(kind, x[order], init=init[order], max_iter=20).elbo == pytest.approx(fit.elbo, abs=1e-10)
    single = ascend(kind, x.float(), init=init, max_iter=20)
    assert single.params["guide.mean"].dtype == torch.float32
    assert single.elbo == pytest.approx(fit.elbo, abs=1e-4)
    double = ascend(kind, x.float().double(), prior=belief_of_single(), init=init, max_iter=20)
    again = ascend(kind, x.float(), prior=belief_of_single(), init=init, max_iter=20)
    assert again.elbo == pytest.approx(double.elbo, abs=1e-10), "float32 data are summed in double precision"
    monkeypatch.setattr(mixture_updates, "BLOCK", 7)
    in_blocks = ascend(kind, x, init=init, max_iter=20)
    assert in_blocks.elbo == pytest.approx(fit.elbo, abs=1e-10)
    for one, other in zip(numbers(in_blocks), numbers(fit), strict=True):
        close(one, other, 1e-10)


def belief_of_single() -> priors.NormalInverseWishart:
    """A prior whose numbers single precision holds."""
    return priors.NormalInverseWishart(torch.tensor([20.0, 20.0]), torch.eye(2), 5.5, 0.5, 0.75)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_far_from_the_origin(kind):
    x, r = clusters() - 20, table()
    near, far = (weighted_moments([(rows, r)], rows.mean(0), kind) for rows in (x, x + 2.0**20))
    close(far.scatter, near.scatter, 1e-9)
    close(far.means - 2.0**20, near.means, 1e-9)


def test_arrays_memmaps_and_datasets_are_the_same_data(tmp_path):
    x = clusters()
    np.save(tmp_path / "x.npy", x.numpy())
    on_disk = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = ascend("full", x, init=table()).elbo
    for data in (x.numpy(), on_disk, TensorDataset(x), {"x": x}):
        fit = lvm.coordinate_ascent(lvm.GaussianMixture(3, 2, prior=belief()), data, init=table())
        assert fit.elbo == pytest.approx(expected, abs=1e-12)


def test_the_process_stays_as_it_is(global_generators_stay):
    x = clusters()
    one, other = (ascend("full", x, seed=5, n_init=2) for _ in range(2))
    assert one.elbo == other.elbo
    assert one.info["seed"] == 5
    assert len(one.info["elbos"]) == 2
    assert one.elbo == max(one.info["elbos"])
    assert isinstance(ascend("full", x, seed=None).info["seed"], int)


def test_starts(faithful):
    prior = priors.weakly_informative(faithful, 2)
    gmm = lvm.GaussianMixture(2, 2, prior=prior).double()
    own = lvm.coordinate_ascent(gmm, faithful, seed=0, tol=1e-9)
    assert not gmm.is_initialized, "a fit by coordinate ascent is its guide; the mixture's start stays free"
    from_means = lvm.coordinate_ascent(gmm, faithful, init=[[2.0, 55.0], [4.0, 80.0]], tol=1e-9)
    assert from_means.elbo == pytest.approx(own.elbo, abs=1e-6)
    assert from_means.params["guide.mean"][0, 0] < 3 < from_means.params["guide.mean"][1, 0]
    eye = torch.eye(2).double()
    gmm.set_parameters(
        torch.tensor([0.5, 0.5]).double(), torch.tensor([[4.0, 80.0], [2.0, 55.0]]).double(), torch.stack([eye, eye])
    )
    given = lvm.coordinate_ascent(gmm, faithful, seed=0, tol=1e-9)
    assert given.params["guide.mean"][1, 0] < 3 < given.params["guide.mean"][0, 0]


# ------------------------------------------------------------------------------------------------- difficult data


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_component_keeps_its_prior(kind):
    x, prior = clusters(), belief()
    init = torch.cat([table(k=2), torch.zeros(60, 1)], -1).double()
    updates = lvm.GaussianMixture(3, 2, kind, prior=prior).double().coordinate_updates()
    start = updates.start(as_rows(x), 0, init, False)
    assert start.factors.concentration[2] == pytest.approx(0.7)
    assert start.factors.mean_precision[2] == pytest.approx(0.4)
    close(start.factors.mean[2], prior.mean)
    if kind != "tied":
        close(start.factors.root[2], updates.prior.root[2])
    assert math.isfinite(ascend(kind, x, init=init).elbo)


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_rows_and_collinear_features_are_no_trouble(kind):
    repeated = clusters(12)[torch.arange(60) % 4]
    prior = priors.weakly_informative(repeated, 3)
    assert math.isfinite(ascend(kind, repeated, prior=prior).elbo)
    x = clusters()
    collinear = torch.stack([x[:, 0], 3 * x[:, 0], x[:, 1]], -1)
    fit = ascend(kind, collinear, prior=priors.weakly_informative(collinear, 3))
    assert math.isfinite(fit.elbo)
    assert (np.diff(fit.history["elbo"]) > -1e-9).all()
    constant = torch.cat([x, torch.ones(60, 1).double()], -1)
    assert math.isfinite(ascend(kind, constant, prior=priors.weakly_informative(constant)).elbo)


def test_superfluous_components_are_emptied(faithful):
    prior = priors.weakly_informative(faithful, 2, concentration=1e-3 / 6)
    fit = ascend("full", faithful, 6, prior=prior, max_iter=5000, tol=1e-8)
    counts = fit.params["guide.concentration"] - 1e-3 / 6
    assert fit.info["stopped"].startswith("converged")
    assert (counts < 1e-6).sum() == 3
    assert counts.sum() == pytest.approx(272)
    # what is left: the two eruptions, and a third component of a few rows between them, where this ascent ends
    assert sorted(round(count) for count in counts.topk(3).values.tolist()) == [8, 93, 171]
    two = ascend("full", faithful, 2, prior=prior)
    assert two.elbo > fit.elbo, "the bound would rather have two"


# ---------------------------------------------------------------------------------------------- programs of others


class Coin:
    """A user's program: one probability and its conjugate updates, exact after one round."""

    def __init__(self, wrong: float = 0.0) -> None:
        self.wrong = wrong

    def model(self, x: torch.Tensor, size: int | None = None) -> None:
        p = pyro.sample("p", dist.Beta(torch.tensor(2.0).double(), 2.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    def coordinate_updates(self) -> Any:
        def bound(state: tuple[float, float], x: Any) -> Any:
            heads = float(x.whole().args[0].sum())
            q, prior = dist.Beta(*map(torch.tensor, state)), dist.Beta(torch.tensor(2.0), torch.tensor(2.0))
            both = torch.tensor(state, dtype=torch.float64)
            logs = both.digamma() - both.sum().digamma()
            reconstruction = heads * logs[0] + (len(x) - heads) * logs[1]
            kl = torch.distributions.kl_divergence(q, prior)
            return {"x": float(reconstruction)}, {"p": float(kl) + self.wrong * (state[0] > 2)}

        def update(state: tuple[float, float], x: Any) -> tuple[float, float]:
            heads = float(x.whole().args[0].sum())
            return 2 + heads, 2 + len(x) - heads

        def guide(state: tuple[float, float]) -> Any:
            def drawn(x: torch.Tensor, size: int | None = None) -> None:
                pyro.sample("p", dist.Beta(*(torch.tensor(part, dtype=torch.float64) for part in state)))

            return drawn

        return SimpleNamespace(start=lambda x, seed, init, fresh: (2.0, 2.0), update=update, bound=bound, guide=guide)


def test_a_program_of_ones_own_takes_part():
    x = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    fit = lvm.coordinate_ascent(Coin(), x, seed=0)
    assert fit.elbo * 5 == pytest.approx(
        math.log(math.gamma(6) * math.gamma(3) / math.gamma(9) * math.gamma(4)), abs=1e-5
    )
    draws = fit.posterior(x, 500, seed=0)["p"]
    assert draws.mean() == pytest.approx(6 / 9, abs=4.5 * draws.std().item() / 500**0.5)


def test_a_bound_that_falls_or_is_no_number_is_refused():
    x = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    with pytest.raises(ProgramError, match=r"round 1: the bound fell from -\d+\.\d+ to -\d+\.\d+ nats of the data set"):
        lvm.coordinate_ascent(Coin(wrong=50.0), x)
    with pytest.raises(NonFiniteError, match="round 0: kl of 'p' became NaN or infinite"):
        lvm.coordinate_ascent(Coin(wrong=math.nan), x)


# ---------------------------------------------------------------------------------------------------------- errors


def test_errors_say_what_came_and_what_was_expected():
    x, gmm = clusters(), lvm.GaussianMixture(3, 2, prior=belief())
    with pytest.raises(ProgramError, match=r"coordinate_ascent needs a prior .*priors\.weakly_informative\(x\)"):
        lvm.coordinate_ascent(lvm.GaussianMixture(3, 2), x)
    with pytest.raises(ProgramError, match="conjugate_guide needs a prior"):
        lvm.GaussianMixture(3, 2).conjugate_guide()
    with pytest.raises(ProgramError, match=r"PPCA has no updates in closed form: give it a method coordinate_updates"):
        lvm.coordinate_ascent(lvm.PPCA(3, 1), x)
    with pytest.raises(ValueError, match=r"shape \(60, 3\), but the mixture was built with num_features=2"):
        lvm.coordinate_ascent(gmm, clusters(d=3))
    holed = x.clone()
    holed[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"x holds NaN values .* the first in row 3"):
        lvm.coordinate_ascent(gmm, holed)
    with pytest.raises(ValueError, match=r"init has shape \(4, 4\): pass responsibilities of shape \(60, 3\)"):
        lvm.coordinate_ascent(gmm, x, init=torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"its rows sum to 3 to 3: every row must be probabilities"):
        lvm.coordinate_ascent(gmm, x, init=torch.ones(60, 3))
    with pytest.raises(ValueError, match="init holds 1 values that are not finite"):
        lvm.coordinate_ascent(gmm, x, init=torch.tensor([[0.0, math.inf], [0.0, 1.0], [0.0, 2.0]]))
    with pytest.raises(ValueError, match="n_init=3 starts from one init would all be the same"):
        lvm.coordinate_ascent(gmm, x, init=table(), n_init=3)
    with pytest.raises(ValueError, match="max_iter is 0: it must be at least 1"):
        lvm.coordinate_ascent(gmm, x, max_iter=0)
    with pytest.raises(TypeError, match=r"n_init is 1\.5: it must be a whole number"):
        lvm.coordinate_ascent(gmm, x, n_init=1.5)
    with pytest.raises(ValueError, match="tol is nan: it must be a gain in nats per datum"):
        lvm.coordinate_ascent(gmm, x, tol=math.nan)
    with pytest.raises(TypeError, match="x is a DataLoader, whose rows come in an order of their own"):
        lvm.coordinate_ascent(gmm, DataLoader(TensorDataset(x)))
    with pytest.raises(ValueError, match=r"more components than rows: num_components=3, x has 2 rows"):
        lvm.coordinate_ascent(gmm, x[:2])
    narrow = priors.NormalInverseWishart(torch.zeros(2).double(), 1e-14 * torch.eye(2).double(), 4.0)
    line = torch.linspace(-1e3, 1e3, 60).double().unsqueeze(-1) * torch.tensor([[1.0, 3.0]]).double()
    with pytest.raises(ValueError, match="a component's scale matrix is not positive definite"):
        lvm.coordinate_ascent(lvm.GaussianMixture(1, 2, prior=narrow), line)
    assert next(gmm.coordinates.parameters()).dtype == torch.float32, "what was refused is as it was"


# --------------------------------------------------------------------------------- inverse Wisharts, many at a time


def test_inverse_wisharts_in_a_batch_are_each_their_own():
    roots = torch.linalg.cholesky(torch.stack([belief(3).scale_matrix, 4 * torch.eye(3).double()]))
    degrees = torch.tensor([5.0, 9.5]).double()
    batch = InverseWishartCholesky(degrees, roots)
    assert batch.batch_shape == (2,)
    draws = batch.sample((20_000,))
    for j in range(2):
        alone = InverseWishartCholesky(degrees[j], roots[j])
        close(batch.log_prob(draws[:5])[:, j], alone.log_prob(draws[:5, j]), 1e-12)
        precision = torch.cholesky_inverse(draws[:, j])
        error = precision.std(0) / math.sqrt(len(draws))
        assert ((precision.mean(0) - degrees[j] * torch.cholesky_inverse(roots[j])).abs() < 5 * error).all()
    to_factor = torch.distributions.biject_to(batch.support)
    vector = to_factor.inv(draws[0])
    assert vector.shape == (2, 6)
    close(to_factor(vector), draws[0], 1e-12)
    log_det = to_factor.log_abs_det_jacobian(vector, draws[0])
    for j in range(2):
        alone = torch.distributions.biject_to(InverseWishartCholesky(degrees[j], roots[j]).support)
        close(log_det[j], alone.log_abs_det_jacobian(vector[j], draws[0, j]), 1e-12)
    assert batch.expand([7, 2]).sample((3,)).shape == (3, 7, 2, 3, 3)
    assert InverseWishartCholesky(degrees, roots[0]).log_prob(draws[0, 0]).shape == (2,)

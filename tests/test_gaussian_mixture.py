"""The mixture against scipy, scikit-learn, its own laws, and its conjugate prior's closed forms."""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Iterator

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from sklearn.datasets import load_iris
from torch.distributions import biject_to

import pyro_lvm as lvm
from pyro_lvm import priors
from pyro_lvm.errors import ProgramError
from pyro_lvm.label_switching import align_components, match_components
from pyro_lvm.models import mixture_initialization
from pyro_lvm.models.gaussian_mixture import GaussianMixture
from pyro_lvm.models.mixture_densities import mixture_log_joint
from pyro_lvm.prior_distributions import InUnits, InverseWishartCholesky

KINDS = ("full", "tied", "diag", "spherical")
FAITHFUL = {"full": -1130.2640, "tied": -1140.1868, "diag": -1147.8064, "spherical": -1709.5293}  # K = 2, all rows
IRIS = {"full": -180.1855, "tied": -256.3540, "spherical": -384.3141}  # K = 3


@pytest.fixture
def own_store() -> Iterator[None]:
    """Pyro's autoguides keep their parameters in the global store."""
    with pyro.get_param_store().scope():
        yield


@pytest.fixture
def faithful(data_root: pathlib.Path) -> torch.Tensor:
    return torch.tensor(np.loadtxt(data_root / "faithful.csv", delimiter=",", skiprows=1))


def parameters(kind: str, num_components: int = 3, d: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Weights, locs and covariances, none of them at a special place."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrices = normal(num_components, d, d)
    matrices = matrices @ matrices.mT + 0.3 * torch.eye(d)
    covariances = {
        "full": matrices,
        "tied": matrices[0],
        "diag": matrices.diagonal(dim1=-2, dim2=-1),
        "spherical": matrices[:, 0, 0],
    }[kind]
    return normal(num_components).softmax(-1), 2 * normal(num_components, d), covariances


def mixture(kind: str, num_components: int = 3, d: int = 2, seed: int = 0) -> GaussianMixture:
    gmm = GaussianMixture(num_components, d, kind).double()
    gmm.set_parameters(*parameters(kind, num_components, d, seed))
    return gmm


def rows(n: int = 40, d: int = 2, seed: int = 1) -> torch.Tensor:
    return 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adam(gmm: GaussianMixture, x: torch.Tensor, steps: int) -> float:
    """Full-batch one-cycle Adam on the enumerated ELBO; the last loss, nats per datum."""
    optimiser = torch.optim.Adam(gmm.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = elbo.differentiable_loss(gmm.model, gmm.guide, x) / len(x)
        loss.backward()
        optimiser.step()
        schedule.step()
    return loss.item()


# --------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_and_responsibilities_are_those_of_scipy(kind):
    gmm, x = mixture(kind), rows()
    log_joint = oracles.gaussian_mixture_log_joint(x.numpy(), *(p.numpy() for p in parameters(kind)), kind)
    evidence = scipy.special.logsumexp(log_joint, -1)
    np.testing.assert_allclose(gmm.log_prob(x).detach(), evidence, rtol=0, atol=1e-10)
    np.testing.assert_allclose(
        gmm.responsibilities(x).detach(), np.exp(log_joint - evidence[:, None]), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("kind", KINDS)
def test_scikit_learn_agrees_at_equal_parameters(kind):
    gmm, x = mixture(kind), rows()
    theirs = oracles.gaussian_mixture_scikit_learn(*(p.numpy() for p in parameters(kind)), kind)
    np.testing.assert_allclose(gmm.log_prob(x).detach(), theirs.score_samples(x.numpy()), rtol=0, atol=1e-8)
    np.testing.assert_allclose(gmm.responsibilities(x).detach(), theirs.predict_proba(x.numpy()), rtol=0, atol=1e-8)
    assert gmm.num_parameters == theirs._n_parameters()
    assert gmm.bic(x) == pytest.approx(theirs.bic(x.numpy()), abs=1e-8)
    assert gmm.aic(x) == pytest.approx(theirs.aic(x.numpy()), abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_keep_gradients(kind):
    gmm, x = mixture(kind), rows(5).requires_grad_()
    assert torch.autograd.gradcheck(gmm.log_prob, (x,))
    assert torch.autograd.gradcheck(gmm.responsibilities, (x,))

    def evidence(*values: torch.Tensor) -> torch.Tensor:
        named = dict(zip((n for n, _ in gmm.named_parameters()), values, strict=True))
        return torch.func.functional_call(Evidence(gmm), {f"gmm.{n}": v for n, v in named.items()}, (x.detach(),))

    assert torch.autograd.gradcheck(evidence, tuple(p.detach().clone().requires_grad_() for p in gmm.parameters()))


class Evidence(torch.nn.Module):
    def __init__(self, gmm):
        super().__init__()
        self.gmm = gmm

    def forward(self, x):
        return self.gmm.log_prob(x).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_pure_functions_broadcast_over_draws(kind):
    x, draws = rows(), [mixture(kind, seed=s) for s in range(6)]
    weights, locs, scale = (
        torch.stack(v) for v in zip(*((g.weights, g.locs, g.coordinates.scale) for g in draws), strict=True)
    )
    for shape in ((6,), (2, 3)):
        split = [v.unflatten(0, shape) for v in (weights, locs, scale)]
        together = mixture_log_joint(x, *split, kind).logsumexp(-1)
        assert together.shape == (*shape, len(x))
        torch.testing.assert_close(together.flatten(0, -2), torch.stack([g.log_prob(x) for g in draws]))
        responsibilities = mixture_log_joint(x, *split, kind).softmax(-1)
        torch.testing.assert_close(responsibilities.flatten(0, -3), torch.stack([g.responsibilities(x) for g in draws]))
    sites = {"weights": weights, "locs": locs, draws[0]._scale_site: scale}
    torch.testing.assert_close(draws[0].log_joint_given(x, sites), mixture_log_joint(x, weights, locs, scale, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_relabelling_changes_nothing(kind):
    weights, locs, covariances = parameters(kind)
    x, order = rows(), [2, 0, 1]
    gmm, renamed = mixture(kind), GaussianMixture(3, 2, kind).double()
    renamed.set_parameters(weights[order], locs[order], covariances if kind == "tied" else covariances[order])
    torch.testing.assert_close(renamed.log_prob(x), gmm.log_prob(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(renamed.responsibilities(x), gmm.responsibilities(x)[:, order], rtol=0, atol=1e-12)


def test_in_one_dimension_and_one_component_all_covariances_are_one():
    x, variance = rows(d=1), torch.tensor(1.7, dtype=torch.float64)
    evidence = []
    for kind, shape in zip(KINDS, ((1, 1, 1), (1, 1), (1, 1), (1,)), strict=True):
        gmm = GaussianMixture(1, 1, kind).double()
        gmm.set_parameters(torch.ones(1).double(), torch.zeros(1, 1).double(), variance.expand(shape))
        evidence.append(gmm.log_prob(x))
        assert gmm.num_parameters == 2
        assert gmm.scale_tril.flatten()[0].item() == pytest.approx(math.sqrt(1.7))
    for other in evidence[1:]:
        torch.testing.assert_close(other, evidence[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_tril_is_the_cholesky_factor_of_the_covariances(kind):
    gmm = mixture(kind, d=3)
    matrices = oracles.gaussian_mixture_matrices(gmm.covariances.detach().numpy(), kind, 3, 3)
    expected = np.linalg.cholesky(matrices[0] if kind == "tied" else matrices)
    np.testing.assert_allclose(gmm.scale_tril.detach(), expected, atol=1e-12)
    assert set(gmm.constrained()) == {"weights", "locs", "scale_tril" if kind in ("full", "tied") else "scales"}


@pytest.mark.parametrize("kind", KINDS)
def test_sample_has_the_moments_of_the_mixture(kind):
    gmm, n = mixture(kind), 20_000
    x, component = gmm.sample(n, seed=0)
    assert torch.equal(gmm.sample(n, seed=0)[0], x)
    assert not torch.equal(gmm.sample(n, seed=1)[0], x)
    weights, locs, covariances = (p.numpy() for p in parameters(kind))
    matrices = oracles.gaussian_mixture_matrices(covariances, kind, 3, 2)
    for k in range(3):
        mine = x[component == k].numpy()
        assert abs(len(mine) / n - weights[k]) < 5 * math.sqrt(weights[k] * (1 - weights[k]) / n)
        assert (abs(mine.mean(0) - locs[k]) < 5 * np.sqrt(np.diag(matrices[k]) / len(mine))).all()
        width = np.sqrt(np.outer(np.diag(matrices[k]), np.diag(matrices[k])) * 2 / len(mine))
        assert (abs(np.cov(mine.T) - matrices[k]) < 5 * width).all()


# ---------------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize("kind", KINDS)
def test_the_enumerated_elbo_is_the_evidence_and_the_hand_summed_program(kind):
    #  data plate:  component -> x ;  by hand: x alone, a mixture distribution
    gmm, x = mixture(kind), rows()

    def by_hand(x):
        factor = gmm.scale_tril if kind != "tied" else gmm.scale_tril.expand(3, 2, 2)
        with pyro.plate("data", len(x), subsample=x):
            components = dist.MultivariateNormal(gmm.locs, scale_tril=factor)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(gmm.weights), components), obs=x)

    gradients = []
    for elbo, model, guide in ((TraceEnum_ELBO, gmm.model, gmm.guide), (Trace_ELBO, by_hand, lambda x: None)):
        loss = elbo(max_plate_nesting=1).differentiable_loss(model, guide, x)
        assert -loss.item() == pytest.approx(gmm.log_prob(x).sum().item(), abs=1e-8)
        gradients.append(torch.autograd.grad(loss, list(gmm.parameters())))
    for auto, hand in zip(*gradients, strict=True):
        torch.testing.assert_close(auto, hand, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_minibatch_losses_average_to_the_full_loss(kind):
    gmm, x = mixture(kind), rows()
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    full = elbo.loss(gmm.model, gmm.guide, x)
    batches = (x[:16], x[16:32], x[32:])  # the last is short
    assert full == pytest.approx(
        sum(len(b) / len(x) * elbo.loss(gmm.model, gmm.guide, b, size=len(x)) for b in batches), abs=1e-8
    )


@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize("kind", KINDS)
def test_particles_and_enumeration_vectorise(kind):
    x = rows()
    plain = mixture(kind)
    for gmm in (plain, GaussianMixture(3, 2, kind, prior=priors.weakly_informative(x)).double()):
        elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=5, vectorize_particles=True)
        guide = gmm.guide or AutoNormal(poutine.block(gmm.model, hide=["component"]))
        loss = elbo.loss(gmm.model, guide, x)
        assert math.isfinite(loss)
        if gmm is plain:
            assert loss == pytest.approx(-gmm.log_prob(x).sum().item(), abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_without_data_the_model_draws_rows(kind):
    gmm, n = mixture(kind), 4000
    trace = poutine.trace(gmm.model).get_trace(x=None, size=n)
    x, component = trace.nodes["x"]["value"], trace.nodes["component"]["value"]
    assert x.shape == (n, 2)
    _, locs, covariances = (p.numpy() for p in parameters(kind))
    matrices = oracles.gaussian_mixture_matrices(covariances, kind, 3, 2)
    for k in range(3):
        mine = x[component == k].detach().numpy()
        assert (abs(mine.mean(0) - locs[k]) < 5 * np.sqrt(np.diag(matrices[k]) / len(mine))).all()
    assert trace.nodes["x"]["infer"]["event_dims"] == ("feature",)


# -------------------------------------------------------------------------------------- parameters and their start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_set_parameters_are_given_back(kind, scale):
    weights, locs, covariances = parameters(kind)
    gmm = GaussianMixture(3, 2, kind).double()
    gmm.set_parameters(weights, scale * locs, scale**2 * covariances)
    assert gmm.is_initialized
    torch.testing.assert_close(gmm.weights, weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(gmm.locs, scale * locs, rtol=1e-12, atol=0)
    torch.testing.assert_close(gmm.covariances, scale**2 * covariances, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_variance_at_the_floor_is_taken_and_can_grow(kind):
    gmm = GaussianMixture(3, 2, kind, reg_covar=0.1).double()
    weights, locs, covariances = parameters(kind)
    at_floor = torch.eye(2).double() if kind in ("full", "tied") else torch.ones(2 if kind == "diag" else ()).double()
    gmm.set_parameters(weights, locs, (0.1 * at_floor).expand(covariances.shape))
    torch.testing.assert_close(gmm.covariances, (0.1 * at_floor).expand(covariances.shape), rtol=1e-8, atol=1e-9)
    gmm.log_prob(rows()).sum().backward()
    assert all(p.grad.isfinite().all() for p in gmm.parameters())
    assert gmm.coordinates.spread.grad.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_floor_is_in_every_variance(kind):
    gmm = GaussianMixture(3, 2, kind, reg_covar=0.5).double()
    with torch.no_grad():
        gmm.coordinates.spread.fill_(-50.0)  # no width of its own
    covariances = gmm.covariances.detach().numpy()
    smallest = np.linalg.eigvalsh(oracles.gaussian_mixture_matrices(covariances, kind, 3, 2)).min()
    assert smallest == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_units_of_the_data_do_not_change_the_steps(kind, faithful):
    evidence = []
    for unit in (1.0, 1e6):
        gmm = GaussianMixture(2, 2, kind, reg_covar=1e-6 * unit**2).double()
        gmm.set_parameters(*(p * s for p, s in zip(parameters(kind, 2), (1, 10 * unit, 100 * unit**2), strict=True)))
        evidence.append(adam(gmm, faithful * unit, 30) - 2 * math.log(unit))
    assert evidence[1] == pytest.approx(evidence[0], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_component_is_best_at_the_sample_moments(kind):
    x = rows()
    covariance = x.T.cov(correction=0)
    best = {
        "full": covariance[None],
        "tied": covariance,
        "diag": covariance.diagonal()[None],
        "spherical": covariance.diagonal().mean()[None],
    }[kind]
    gmm = GaussianMixture(1, 2, kind).double()
    gmm.set_parameters(torch.ones(1).double(), x.mean(0)[None], best)
    gmm.log_prob(x).mean().backward()
    for parameter in gmm.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), rtol=0, atol=1e-8)
    started = GaussianMixture(1, 2, kind).double()
    started.initialize(x, seed=0)
    torch.testing.assert_close(started.covariances, best, rtol=0, atol=1e-5)


def test_initialize_once_with_a_seed_and_without_the_global_state(faithful):
    def started(seed: int) -> GaussianMixture:
        gmm = GaussianMixture(6, 2).double()
        gmm.initialize(faithful, seed=seed)
        return gmm

    before = (torch.get_rng_state(), np.random.get_state()[1].copy())  # noqa: NPY002
    gmm, again = started(0), started(0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(gmm.locs, again.locs)
    assert gmm.is_initialized
    gmm.initialize(faithful[:7], seed=3)  # has parameters: nothing happens, whatever comes
    assert torch.equal(gmm.locs, again.locs)
    gmm.reset_parameters()
    assert not gmm.is_initialized
    assert not torch.equal(gmm.locs, again.locs)
    assert len(gmm.locs.unique(dim=0)) == 6  # components that start equal would stay equal
    gmm.initialize(faithful, seed=0)
    assert torch.equal(gmm.locs, again.locs)


def test_the_state_travels_in_the_state_dict(faithful):
    gmm, other = GaussianMixture(2, 2, "tied").double(), GaussianMixture(2, 2, "tied").double()
    gmm.initialize(faithful, seed=0)
    other.load_state_dict(gmm.state_dict())
    assert other.is_initialized
    torch.testing.assert_close(other.log_prob(faithful), gmm.log_prob(faithful))


def test_many_rows_are_thinned_for_the_start_only(monkeypatch, faithful):
    monkeypatch.setattr(mixture_initialization, "_MAX_ROWS", 100)
    gmm = GaussianMixture(2, 2).double()
    gmm.initialize(faithful, seed=0)
    assert gmm.log_prob(faithful).sum().item() > FAITHFUL["full"] - 30


def test_features_beyond_the_short_runs_are_still_in_the_start():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 40, generator=generator).double()
    x[:60] += 3
    for kind in KINDS:
        gmm = GaussianMixture(2, 40, kind).double()
        gmm.initialize(x, seed=0)
        labels = gmm.responsibilities(x).argmax(-1)
        assert len(labels[:60].unique()) == len(labels[60:].unique()) == 1
        assert labels[0] != labels[-1]


# ------------------------------------------------------------------------------------------ the published optima


@pytest.mark.parametrize("kind", KINDS)
def test_old_faithful_reaches_the_best_of_ten_of_scikit_learn(kind, faithful):
    gmm = GaussianMixture(2, 2, kind).double()
    gmm.initialize(faithful, seed=0)
    adam(gmm, faithful, 100)
    assert gmm.log_prob(faithful).sum().item() == pytest.approx(FAITHFUL[kind], abs=0.01)


def test_old_faithful_waiting_alone(faithful):
    gmm = GaussianMixture(2, 1, "tied").double()
    gmm.initialize(faithful[:, 1:], seed=0)
    assert gmm.log_prob(faithful[:, 1:]).sum().item() == pytest.approx(-1034.002, abs=0.01)


@pytest.mark.parametrize("kind", IRIS)
def test_iris_reaches_the_best_of_ten_of_scikit_learn(kind):
    x = torch.tensor(load_iris().data)
    gmm = GaussianMixture(3, 4, kind).double()
    gmm.initialize(x, seed=1)
    assert gmm.log_prob(x).sum().item() == pytest.approx(IRIS[kind], abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_steps_alone_climb_from_the_seeds_to_the_optimum(kind, faithful):
    # no soft assignment: k-means++ seeds, one round of moments, then Adam
    gmm = GaussianMixture(2, 2, kind).double()
    centered = faithful - faithful.mean(0)
    standardised = mixture_initialization._standardise(centered)
    assignment = mixture_initialization._seed(standardised, 2, np.random.default_rng(4))
    gmm.set_parameters(*mixture_initialization._moments(faithful, assignment, kind, 1e-6))
    assert gmm.log_prob(faithful).sum().item() < FAITHFUL[kind] - 1
    adam(gmm, faithful, 500)
    assert gmm.log_prob(faithful).sum().item() == pytest.approx(FAITHFUL[kind], abs=0.05)


# ---------------------------------------------------------------------------------------------- awkward data


def awkward(name: str) -> torch.Tensor:
    x = rows(60, 3)
    if name == "constant column":
        x[:, 1] = 7.0
    elif name == "collinear":
        x[:, 2] = x[:, 0] + x[:, 1]
    elif name == "duplicates":
        x[:] = x[torch.arange(60) % 3]  # as many places as components
    elif name == "one place":
        x[:] = 3.0
    elif name == "large units":
        x = 1e4 * x + 1e5
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["constant column", "collinear", "duplicates", "one place", "large units"])
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_data_give_finite_losses_and_gradients(kind, name, dtype):
    x = awkward(name).to(dtype)
    gmm = GaussianMixture(3, 3, kind).to(dtype)
    gmm.initialize(x, seed=0)
    assert math.isfinite(adam(gmm, x, 25))
    for parameter in gmm.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.isfinite().all()
    assert gmm.log_prob(x).dtype == dtype
    torch.testing.assert_close(gmm.responsibilities(x).sum(-1), torch.ones(60, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_agrees_with_float64(kind):
    x, gmm = rows(), mixture(kind)
    exact = gmm.log_prob(x).detach()
    single = gmm.float().log_prob(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_a_start_on_repeated_rows_is_passed_over(kind):
    x = rows(100)
    x[:50] += 6
    x[:4] = torch.tensor([12.0, -12.0])  # a component there has no width but the floor, and the highest likelihood
    gmm = GaussianMixture(3, 2, kind).double()
    gmm.initialize(x, seed=0)
    assert (
        np.linalg.eigvalsh(oracles.gaussian_mixture_matrices(gmm.covariances.detach().numpy(), kind, 3, 2)).min() > 1e-3
    )


def test_where_every_start_has_collapsed_one_is_taken():
    x = torch.zeros(30, 1).double()
    x[0] = 1.0
    gmm = GaussianMixture(2, 1).double()
    gmm.initialize(x, seed=0)
    assert gmm.log_prob(x).isfinite().all()


# -------------------------------------------------------------------------------------------------------- errors


def test_errors_say_what_came_and_what_was_expected(faithful):
    with pytest.raises(ValueError, match=r"num_components=0 and num_features=2 must both be at least 1"):
        GaussianMixture(0, 2)
    with pytest.raises(ValueError, match=r"covariance='round' is unknown; choose one of 'full', 'tied'"):
        GaussianMixture(2, 2, "round")
    with pytest.raises(ValueError, match=r"reg_covar=-1 must be a variance"):
        GaussianMixture(2, 2, reg_covar=-1)
    gmm = GaussianMixture(2, 2).double()
    for call in (gmm.model, gmm.log_prob, gmm.responsibilities, lambda x: gmm.initialize(x, seed=0)):
        with pytest.raises(ValueError, match=r"x has shape \(272, 1\), .*num_features=2: expected shape \(n, 2\)"):
            call(faithful[:, :1])
    with pytest.raises(ValueError, match=r"or x=None with size=n"):
        gmm.model()
    with pytest.raises(
        TypeError, match=r"x has dtype torch.float32, the mixture torch.float64: call mixture.to\(x.dtype\)"
    ):
        gmm.log_prob(faithful.float())
    with pytest.raises(ValueError, match=r"more components than rows: num_components=2, x has 1 rows"):
        gmm.initialize(faithful[:1], seed=0)
    with pytest.raises(ValueError, match=r"x has no rows"):
        gmm.initialize(faithful[:0], seed=0)
    with pytest.raises(ValueError, match=r"x holds 272 values that are not finite"):
        gmm.initialize(faithful * torch.tensor([1.0, torch.nan]), seed=0)
    with pytest.raises(ValueError, match=r"n is 0"):
        gmm.sample(0, seed=0)
    assert not gmm.is_initialized


@pytest.mark.parametrize("kind", KINDS)
def test_set_parameters_refuses_what_is_no_mixture(kind):
    weights, locs, covariances = parameters(kind)
    gmm = GaussianMixture(3, 2, kind, reg_covar=0.01).double()
    with pytest.raises(ValueError, match=r"locs has shape \(2, 2\); .* needs \(3, 2\)"):
        gmm.set_parameters(weights, locs[:2], covariances)
    with pytest.raises(ValueError, match=rf"covariances has shape .* this '{kind}' mixture"):
        gmm.set_parameters(weights, locs, covariances[..., None, None])
    with pytest.raises(ValueError, match=r"must sum to one; they are"):
        gmm.set_parameters(2 * weights, locs, covariances)
    with pytest.raises(ValueError, match=r"below reg_covar=0.01, which every variance of this mixture includes"):
        gmm.set_parameters(weights, locs, 1e-3 * covariances)
    assert not gmm.is_initialized


# ------------------------------------------------------------------------------------------------------ with a prior


def random_prior(d: int = 2) -> priors.NormalInverseWishart:
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return priors.NormalInverseWishart(
        mean=torch.arange(d).double(),
        scale_matrix=root @ root.T + torch.eye(d),
        degrees_of_freedom=d + 2.5,
        mean_precision=0.3,
        concentration=torch.tensor([0.7, 1.5, 3.0], dtype=torch.float64),
    )


def prior_draw(kind: str, prior: priors.NormalInverseWishart, num_components: int = 3) -> dict[str, torch.Tensor]:
    gmm = GaussianMixture(num_components, prior.num_features, kind, prior=prior).double()
    trace = poutine.trace(gmm.model).get_trace(size=1)
    return {name: trace.nodes[name]["value"] for name in ("weights", gmm._scale_site, "locs")}


def prior_log_density(kind: str, prior: priors.NormalInverseWishart, sites: dict[str, np.ndarray]) -> float:
    """By scipy, site by site."""
    psi, d = prior.scale_matrix.numpy(), prior.num_features
    total = scipy.stats.dirichlet(prior.concentration.numpy()).logpdf(sites["weights"])
    if kind in ("full", "tied"):
        factors = sites["scale_tril"] if kind == "full" else sites["scale_tril"][None]
        total += sum(oracles.inverse_wishart_cholesky_log_density(f, prior.degrees_of_freedom, psi) for f in factors)
        matrices = np.broadcast_to(factors @ factors.mT if hasattr(factors, "mT") else factors, (3, d, d))
    else:
        scales = sites["scales"]
        diagonal = np.diag(psi) if kind == "diag" else np.diag(psi).mean()
        total += oracles.deviation_log_density(scales, prior.degrees_of_freedom - d + 1, diagonal).sum()
        matrices = oracles.gaussian_mixture_matrices(scales**2, kind, 3, d)
    for loc, matrix in zip(sites["locs"], matrices, strict=True):
        total += scipy.stats.multivariate_normal(prior.mean.numpy(), matrix / prior.mean_precision).logpdf(loc)
    return float(total)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prior_of_all_sites_is_the_one_that_is_declared(kind):
    prior = random_prior()
    gmm = GaussianMixture(3, 2, kind, prior=prior).double()
    for _ in range(3):
        sites = prior_draw(kind, prior)
        conditioned = poutine.condition(poutine.block(gmm.model, expose=list(sites)), data=sites)
        log_density = poutine.trace(conditioned).get_trace(size=1).log_prob_sum().item()
        arrays = {name: value.numpy() for name, value in sites.items()}
        assert log_density == pytest.approx(
            prior_log_density(kind, prior, arrays), abs=1e-5
        )  # a Jacobian by differences


def test_the_evidence_of_one_conjugate_gaussian_is_exact_at_any_parameters():
    # log p(x, theta) - log p(theta | x) is the same number for every theta, and has a closed form
    x, prior = rows(30, 3), random_prior(3)
    arguments = (prior.mean.numpy(), prior.mean_precision, prior.degrees_of_freedom, prior.scale_matrix.numpy())
    mean_n, kappa_n, degrees_n, psi_n = oracles.normal_inverse_wishart_update(x.numpy(), *arguments)
    prior = priors.NormalInverseWishart(prior.mean, prior.scale_matrix, prior.degrees_of_freedom, prior.mean_precision)
    expected = oracles.normal_inverse_wishart_evidence(x.numpy(), *arguments)
    gmm = GaussianMixture(1, 3, "full", prior=prior).double()
    posterior = InverseWishartCholesky(torch.tensor(degrees_n).double(), torch.linalg.cholesky(torch.tensor(psi_n)))
    for _ in range(5):
        sites = prior_draw("full", prior, 1)
        observed = poutine.condition(gmm.model, data={**sites, "component": torch.zeros(30).long()})
        joint = poutine.trace(observed).get_trace(x).log_prob_sum().item()
        factor, loc = sites["scale_tril"][0], sites["locs"][0]
        normal = scipy.stats.multivariate_normal(mean_n, (factor @ factor.T).numpy() / kappa_n)
        assert joint - posterior.log_prob(factor).item() - normal.logpdf(loc.numpy()) == pytest.approx(
            expected, abs=1e-8
        )


@pytest.mark.parametrize("d", [1, 2, 4])
def test_inverse_wishart_cholesky_density_and_draws(d):
    prior = random_prior(d)
    degrees = d + 6.0
    distribution = InverseWishartCholesky(torch.tensor(degrees).double(), torch.linalg.cholesky(prior.scale_matrix))
    draws = distribution.sample((20_000,))
    assert distribution.support.check(draws).all()
    for factor in draws[:3]:
        expected = oracles.inverse_wishart_cholesky_log_density(factor.numpy(), degrees, prior.scale_matrix.numpy())
        assert distribution.log_prob(factor).item() == pytest.approx(expected, abs=1e-5)
    covariances = draws @ draws.mT
    standard_error = covariances.std(0) / math.sqrt(len(draws))
    assert ((covariances.mean(0) - prior.scale_matrix / (degrees - d - 1)).abs() < 5 * standard_error).all()
    # the mean of the precision is sharper, and tells nu from nu + 1
    precisions = torch.linalg.inv(covariances)
    standard_error = precisions.std(0) / math.sqrt(len(draws))
    assert ((precisions.mean(0) - degrees * torch.linalg.inv(prior.scale_matrix)).abs() < 5 * standard_error).all()
    assert distribution.expand([4]).sample((2,)).shape == (2, 4, d, d)
    assert distribution.expand([4]).log_prob(draws[:4]).shape == (4,)


def test_unconstrained_coordinates_are_bijective_and_without_units():
    d, unit = 3, torch.tensor([1e-3, 1.0, 1e4], dtype=torch.float64)
    psi = torch.diag(unit**2)
    distribution = InverseWishartCholesky(torch.tensor(1.0 + d).double(), torch.linalg.cholesky(psi))
    transform = biject_to(distribution.support)
    vector = torch.randn(d * (d + 1) // 2, dtype=torch.float64)
    factor = transform(vector)
    assert distribution.support.check(factor)
    torch.testing.assert_close(transform.inv(factor), vector)
    assert transform.forward_shape((5, 6)) == (5, 3, 3)
    assert transform.inverse_shape((5, 3, 3)) == (5, 6)
    below = torch.tril_indices(d, d)
    jacobian = torch.autograd.functional.jacobian(lambda v: transform(v)[below[0], below[1]], vector)
    assert transform.log_abs_det_jacobian(vector, factor).item() == pytest.approx(
        torch.linalg.slogdet(jacobian)[1].item()
    )
    located = InUnits(dist.Normal(torch.zeros(d), unit).to_event(1), unit)
    to_data = biject_to(located.support)
    torch.testing.assert_close(to_data(torch.ones(2, d).double()), unit.expand(2, d))
    log_det = to_data.log_abs_det_jacobian(torch.ones(2, d).double(), unit.expand(2, d))
    torch.testing.assert_close(log_det, unit.log().sum().expand(2))
    assert located.log_prob(unit).item() == pytest.approx(dist.Normal(torch.zeros(d), unit).log_prob(unit).sum().item())


@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize("unit", [1.0, 1e5])
@pytest.mark.parametrize("kind", KINDS)
def test_mean_field_trains_close_to_the_evidence_whatever_the_units(kind, unit, faithful):
    x = faithful * unit
    gmm = GaussianMixture(1, 2, kind, prior=priors.weakly_informative(x)).double()
    gmm.initialize(x, seed=0)
    start = init_to_value(values=gmm.initial_values())
    guide = AutoNormal(poutine.block(gmm.model, hide=["component"]), init_loc_fn=start, init_scale=0.03)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=8, vectorize_particles=True)
    guide(x)
    optimiser = torch.optim.Adam(guide.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=300)
    for _ in range(300):
        optimiser.zero_grad()
        elbo.differentiable_loss(gmm.model, guide, x).backward()
        optimiser.step()
        schedule.step()
    bound = -TraceEnum_ELBO(max_plate_nesting=1, num_particles=500, vectorize_particles=True).loss(gmm.model, guide, x)
    if kind in ("full", "tied"):  # one component: the two are the same model, and its evidence is known
        p = gmm.prior
        arguments = (p.mean.numpy(), p.mean_precision, p.degrees_of_freedom, p.scale_matrix.numpy())
        evidence = oracles.normal_inverse_wishart_evidence(x.numpy(), *arguments)
        # mean field misses the correlation rho of the two features' means, and nothing else to speak of
        rho = np.corrcoef(x.numpy().T)[0, 1]
        missed = -0.5 * math.log(1 - rho**2)
        assert evidence - missed - 0.3 < bound < evidence - missed + 0.3
    elif kind == "diag":  # two independent columns, and each is a model of its own
        p = gmm.prior
        evidence = sum(
            oracles.normal_inverse_wishart_evidence(
                x.numpy()[:, [j]],
                p.mean.numpy()[[j]],
                p.mean_precision,
                p.variance_degrees_of_freedom,
                p.scale_matrix.numpy()[[j]][:, [j]],
            )
            for j in range(2)
        )
        assert evidence - 0.3 < bound < evidence + 0.2
    assert math.isfinite(bound)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values_fit_the_sites(kind, faithful):
    gmm = GaussianMixture(2, 2, kind, prior=priors.weakly_informative(faithful)).double()
    gmm.initialize(faithful, seed=0)
    trace = poutine.trace(gmm.model).get_trace(faithful)
    values = gmm.initial_values()
    assert set(values) == {n for n in trace.stochastic_nodes if n not in ("component", "data")}
    for name, value in values.items():
        assert value.shape == trace.nodes[name]["value"].shape
        assert trace.nodes[name]["fn"].support.check(value).all()
        assert len(trace.nodes[name]["infer"]["event_dims"]) == value.dim()
    assert (values["locs"][0] - values["locs"][1]).abs().min() > 1
    assert gmm.guide is None
    assert gmm.constrained() == {}
    assert mixture(kind).initial_values() == {}


def test_with_a_prior_one_value_is_refused_and_fit_is_named(faithful):
    gmm = GaussianMixture(2, 2, prior=priors.weakly_informative(faithful)).double()
    for call in (gmm.log_prob, gmm.responsibilities, gmm.bic, gmm.aic, lambda x: gmm.sample(3, seed=0)):
        with pytest.raises(ProgramError, match=r"fit.log_prob\(x\) or fit.responsibilities\(x\)"):
            call(faithful)


def test_priors_are_checked(faithful):
    mean, psi = torch.zeros(2), torch.eye(2)
    with pytest.raises(ValueError, match=r"scale_matrix has shape \(3, 3\), but mean has 2 features"):
        priors.NormalInverseWishart(mean, torch.eye(3), 4.0)
    with pytest.raises(ValueError, match=r"mean has shape \(2, 2\)"):
        priors.NormalInverseWishart(psi, psi, 4.0)
    with pytest.raises(ValueError, match=r"not symmetric and positive definite"):
        priors.NormalInverseWishart(mean, torch.ones(2, 2), 4.0)
    with pytest.raises(ValueError, match=r"degrees_of_freedom is 1.0; with 2 features it must exceed 1"):
        priors.NormalInverseWishart(mean, psi, 1.0)
    with pytest.raises(ValueError, match=r"mean_precision is 0"):
        priors.NormalInverseWishart(mean, psi, 4.0, mean_precision=0.0)
    with pytest.raises(ValueError, match=r"concentration is -1"):
        priors.NormalInverseWishart(mean, psi, 4.0, concentration=-1.0)
    with pytest.raises(ValueError, match=r"at least 2 rows, to have a covariance; it has 1 of torch.float"):
        priors.weakly_informative(faithful[:1])
    with pytest.raises(TypeError, match=r"x is a list: pass a tensor or an array"):
        priors.weakly_informative([[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"x holds infinite values \(1 in rows 0 to 1"):
        priors.weakly_informative(torch.tensor([[1.0], [torch.inf]]))
    with pytest.raises(ValueError, match=r"num_components is 0"):
        priors.weakly_informative(faithful, num_components=0)
    with pytest.raises(ValueError, match=r"prior is for 2 features, the mixture has num_features=3"):
        GaussianMixture(2, 3, prior=priors.weakly_informative(faithful))
    three = priors.weakly_informative(faithful, concentration=torch.ones(3))
    with pytest.raises(ValueError, match=r"prior.concentration has 3 entries, the mixture has num_components=2"):
        GaussianMixture(2, 2, prior=three)


def test_weakly_informative_has_the_moments_of_the_data(faithful):
    prior = priors.weakly_informative(faithful)
    covariance = np.cov(faithful.numpy().T)
    np.testing.assert_allclose(prior.mean, faithful.numpy().mean(0))
    np.testing.assert_allclose(prior.scale_matrix, covariance, rtol=1e-4)
    assert prior.degrees_of_freedom - 2 - 1 == 1  # so that the mean covariance is that of the data
    np.testing.assert_allclose(
        priors.weakly_informative(faithful, num_components=4).scale_matrix, covariance / 4, rtol=1e-4
    )
    for name in ("constant column", "collinear", "one place"):
        x = awkward(name)
        priors.weakly_informative(x)
        priors.weakly_informative(x.float())


# ------------------------------------------------------------------------------------------------- label switching


def shuffled_draws(kind: str, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """Draws around one mixture, (chain 2, draw 25), the same with components renumbered, and by what."""
    generator = torch.Generator().manual_seed(seed)
    batch = (2, 25)
    gmm = mixture(kind, 3, 2)
    order = gmm.weights.argsort(descending=True)
    scale = gmm.coordinates.scale.detach()
    jitter = lambda v: v + 0.01 * torch.randn(*batch, *v.shape, generator=generator, dtype=v.dtype)  # noqa: E731
    draws = {
        "weights": jitter(gmm.weights.detach()[order]),
        "locs": jitter(gmm.locs.detach()[order]),
        gmm._scale_site: jitter(scale if kind == "tied" else scale[order]),
        "component": torch.randint(3, (*batch, 7), generator=generator),
        "elsewhere": jitter(torch.zeros(4).double()),
    }
    permutation = torch.stack([torch.randperm(3, generator=generator) for _ in range(50)]).unflatten(0, batch)
    renumbered = dict(draws)
    for c, s in itertools.product(range(2), range(25)):
        p = permutation[c, s]
        for name in ("weights", "locs", gmm._scale_site):
            if kind != "tied" or name != "scale_tril":
                renumbered[name] = renumbered[name].clone()
                renumbered[name][c, s] = draws[name][c, s][p]
        renumbered["component"] = renumbered["component"].clone()
        for i, label in enumerate(draws["component"][c, s]):  # the component called `label` is now at p.index(label)
            renumbered["component"][c, s, i] = p.tolist().index(int(label))
    return draws, renumbered, permutation


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_renumbered_at_random_come_back(kind, given):
    draws, renumbered, permutation = shuffled_draws(kind)
    assert not torch.equal(renumbered["locs"], draws["locs"])
    aligned, found = align_components(renumbered, draws["locs"].mean((0, 1)) if given else None)
    for name, value in draws.items():
        assert torch.equal(aligned[name], value), name
    assert torch.equal(permutation.gather(-1, found), torch.arange(3).expand(2, 25, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_does_not_change_the_density(kind):
    _, renumbered, _ = shuffled_draws(kind)
    x, gmm = rows(), mixture(kind)
    aligned, _ = align_components(renumbered)
    torch.testing.assert_close(
        gmm.log_joint_given(x, aligned).logsumexp(-1), gmm.log_joint_given(x, renumbered).logsumexp(-1)
    )


def test_distances_are_in_units_of_each_feature():
    reference = torch.tensor([[0.0, 1000.0], [1.0, 1010.0]])
    locs = torch.tensor([[1.0, 1004.0], [0.0, 1006.0]])  # the first feature is clear, the second is wide and undecided
    unit = torch.tensor([0.1, 50.0])
    assert match_components(locs, reference, unit).tolist() == [1, 0]
    assert match_components(locs, reference, torch.ones(2)).tolist() == [0, 1]
    assert match_components(locs, reference).tolist() == [1, 0]


def test_alignment_errors():
    with pytest.raises(ValueError, match=r"draws has the sites \['weights'\]; components are matched by 'locs'"):
        align_components({"weights": torch.ones(5, 2) / 2})
    with pytest.raises(ValueError, match=r"reference has shape \(2, 3\), but each draw of locs has shape \(2, 2\)"):
        align_components({"locs": torch.zeros(5, 2, 2)}, torch.zeros(2, 3))


# --------------------------------------------------------------------------------------------------- the whole way


def test_fit_of_old_faithful(faithful):
    gmm = lvm.GaussianMixture(2, 2)
    fit = lvm.fit(gmm, faithful, elbo=TraceEnum_ELBO(), epochs=30, seed=0, progress=False)
    assert gmm.log_prob(faithful).sum().item() == pytest.approx(FAITHFUL["full"], abs=0.01)
    assert fit.elbo == pytest.approx(gmm.log_prob(faithful).mean().item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_bayesian_fit_of_old_faithful(kind, faithful):
    gmm = lvm.GaussianMixture(2, 2, kind, prior=priors.weakly_informative(faithful))
    fit = lvm.fit(gmm, faithful, epochs=60, seed=0, progress=False)
    assert FAITHFUL[kind] / 272 - 0.25 < fit.elbo < FAITHFUL[kind] / 272
    best = GaussianMixture(2, 2, kind).double()
    best.initialize(faithful, seed=0)
    assert (fit.log_prob(faithful, seed=0).mean() - best.log_prob(faithful).mean()).abs() < 0.05
    draws = fit.posterior(faithful, num_draws=20, seed=0)
    assert draws is not None

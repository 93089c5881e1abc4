"""PPCA against its closed forms."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from sklearn.datasets import load_iris, load_wine
from sklearn.decomposition import PCA

from pyro_lvm.models.linear_gaussian import NOISE_FLOOR
from pyro_lvm.models.ppca import PPCA

GUIDES = ("diag", "full")
IRIS_LOG_LIKELIHOOD = {1: -470.6695, 2: -404.9628, 3: -379.9146}


@pytest.fixture
def iris() -> torch.Tensor:
    return torch.tensor(load_iris().data)


def scrambled(num_features: int, latent_dim: int, guide_covariance: str = "diag", seed: int = 0) -> PPCA:
    """A model with no parameter, buffer or guide at a special place."""
    ppca = PPCA(num_features, latent_dim, guide_covariance).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ppca.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        ppca.location.copy_(torch.randn(num_features, generator=generator, dtype=torch.float64))
        ppca.scale.fill_(1.7)
    return ppca


def as_numpy(ppca: PPCA) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loadings, mean and noise variance."""
    return tuple(t.detach().numpy() for t in (ppca.loadings, ppca.mean, ppca.noise_scale.square()))


def guide_moments(ppca: PPCA, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    loc = (x - ppca.mean) @ ppca.guide_weight.mT
    scale = ppca.guide_scale.diag() if ppca.guide_covariance == "diag" else ppca.guide_scale
    return loc.detach().numpy(), (scale @ scale.mT).detach().numpy()


def single_draw_losses(ppca: PPCA, x: torch.Tensor, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            losses.append(Trace_ELBO(max_plate_nesting=1).loss(ppca.model, ppca.guide, x))
    return losses


def train(model: torch.nn.Module, x: torch.Tensor, steps: int, seed: int = 0) -> None:
    """Plain Pyro, one draw per step, one-cycle Adam."""
    with torch.random.fork_rng(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        model.to(x.dtype)
        model.initialize(x, seed=seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
        elbo = TraceMeanField_ELBO(max_plate_nesting=1)
        for _ in range(steps):
            optimizer.zero_grad()
            elbo.differentiable_loss(model.model, model.guide, x).backward()
            optimizer.step()
            scheduler.step()


# The density and the posterior.


def test_log_prob_is_the_normal_density(iris):
    ppca = scrambled(4, 2)
    expected = oracles.linear_gaussian_log_density(iris.numpy(), *as_numpy(ppca))
    assert ppca.log_prob(iris).shape == (150,)
    np.testing.assert_allclose(ppca.log_prob(iris).detach().numpy(), expected, rtol=1e-8)


def test_posterior_is_the_conditioned_joint(iris):
    ppca = scrambled(4, 2)
    loc, covariance = oracles.linear_gaussian_posterior(iris.numpy(), *as_numpy(ppca))
    posterior = ppca.posterior(iris)
    assert posterior.batch_shape == (150,)
    assert posterior.event_shape == (2,)
    np.testing.assert_allclose(posterior.mean.detach().numpy(), loc, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(posterior.covariance_matrix[7].detach().numpy(), covariance, rtol=1e-8, atol=1e-10)


def test_log_prob_does_not_feel_a_rotation(iris):
    ppca = scrambled(4, 3)
    before = ppca.log_prob(iris).detach()
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    axes = ppca.principal_axes()
    with torch.no_grad():
        ppca._standard_loadings.copy_(ppca._standard_loadings @ rotation)
    torch.testing.assert_close(ppca.log_prob(iris).detach(), before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ppca.principal_axes(), axes, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", range(6))  # the sign that a decomposition returns is a matter of luck
def test_principal_axes_keep_the_covariance_and_are_sorted_and_signed(seed):
    ppca = scrambled(5, 3, seed=seed)
    axes = ppca.principal_axes()
    torch.testing.assert_close(axes @ axes.mT, (ppca.loadings @ ppca.loadings.mT).detach())
    gram = axes.mT @ axes
    torch.testing.assert_close(gram, gram.diagonal().diag())
    assert (gram.diagonal().diff() < 0).all()
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()


def test_log_prob_has_gradients(iris):
    ppca = scrambled(4, 2)
    model_parameters = (ppca._standard_loadings, ppca._standard_mean, ppca._unconstrained_noise)
    for gradient in torch.autograd.grad(ppca.log_prob(iris).sum(), model_parameters):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


# The ELBO.


@pytest.mark.parametrize("guide_covariance", GUIDES)
def test_evidence_is_elbo_plus_divergence_from_the_posterior(iris, guide_covariance):
    ppca = scrambled(4, 2, guide_covariance)
    q = guide_moments(ppca, iris)
    elbo = oracles.linear_gaussian_elbo(iris.numpy(), *as_numpy(ppca), *q)
    divergence = oracles.gaussian_kl(*q, *oracles.linear_gaussian_posterior(iris.numpy(), *as_numpy(ppca)))
    assert divergence.min() > 0.1
    np.testing.assert_allclose(ppca.log_prob(iris).detach().numpy(), elbo + divergence, rtol=1e-8)


@pytest.mark.parametrize("guide_covariance", GUIDES)
@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceMeanField_ELBO])
def test_pyro_estimates_the_closed_form_elbo(iris, guide_covariance, estimator):
    ppca = scrambled(4, 2, guide_covariance)
    expected = oracles.linear_gaussian_elbo(iris.numpy(), *as_numpy(ppca), *guide_moments(ppca, iris)).sum()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        draws = torch.tensor([-estimator().loss(ppca.model, ppca.guide, iris) for _ in range(400)])
    assert abs(draws.mean().item() - expected) < 4 * draws.std().item() / math.sqrt(400)


@pytest.mark.parametrize("guide_covariance", GUIDES)
def test_divergence_from_the_prior_is_in_closed_form(iris, guide_covariance):
    ppca = scrambled(4, 2, guide_covariance)
    guide_trace = poutine.trace(ppca.guide).get_trace(iris)
    prior = poutine.trace(poutine.replay(ppca.model, guide_trace)).get_trace(iris).nodes["z"]["fn"]
    divergence = torch.distributions.kl_divergence(guide_trace.nodes["z"]["fn"], prior)
    expected = oracles.gaussian_kl(*guide_moments(ppca, iris), np.zeros((1, 2)), np.eye(2))
    np.testing.assert_allclose(divergence.detach().numpy(), expected, rtol=1e-8)


@pytest.mark.parametrize("guide_covariance", GUIDES)
def test_every_draw_of_the_closed_form_gives_the_evidence(iris, guide_covariance):
    ppca = PPCA.closed_form(iris, 2, guide_covariance)
    evidence = ppca.log_prob(iris).sum().item()
    np.testing.assert_allclose(single_draw_losses(ppca, iris, range(5)), -evidence, rtol=1e-10)


def test_model_and_guide_turn_together(iris):
    ppca = PPCA.closed_form(iris, 3)
    before, factors = ppca.log_prob(iris).detach(), ppca.posterior(iris).mean.detach()
    with torch.no_grad():
        ppca._turn.copy_(torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [-5.0, 14.0, 0.0]]))
    torch.testing.assert_close(ppca.log_prob(iris).detach(), before)
    torch.testing.assert_close(ppca.encode(iris).mean, ppca.posterior(iris).mean)
    assert (ppca.posterior(iris).mean - factors).abs().max() > 0.1


def test_a_wrong_guide_has_variance(iris):
    losses = single_draw_losses(scrambled(4, 2), iris, range(5))
    assert np.std(losses) > 1.0


def test_minibatch_losses_average_to_the_full_loss(iris):
    ppca = scrambled(4, 2)
    z = torch.randn(150, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(rows: slice) -> torch.Tensor:
        """Minus the log weight of fixed factors, on these rows."""
        fixed = poutine.condition(ppca.model, {"z": z[rows]}), poutine.condition(ppca.guide, {"z": z[rows]})
        joint, guide = (poutine.trace(p).get_trace(iris[rows], size=150).log_prob_sum() for p in fixed)
        return guide - joint

    batches = [slice(0, 64), slice(64, 128), slice(128, 150)]
    average = sum(len(iris[rows]) / 150 * loss(rows) for rows in batches)
    torch.testing.assert_close(average, loss(slice(0, 150)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("guide_covariance", GUIDES)
def test_particles_vectorise(iris, guide_covariance):
    ppca = PPCA.closed_form(iris, 2, guide_covariance)
    elbo = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1)
    assert elbo.loss(ppca.model, ppca.guide, iris) == pytest.approx(-ppca.log_prob(iris).sum().item(), rel=1e-10)
    with pyro.plate("particles", 7, dim=-2):
        trace = poutine.trace(ppca.model).get_trace(None, size=5)
    assert trace.nodes["x"]["value"].shape == (7, 5, 4)


# The maximum.


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_closed_form_reproduces_the_published_maximum(iris, latent_dim):
    ppca = PPCA.closed_form(iris, latent_dim)
    log_likelihood = ppca.log_prob(iris).sum().item()
    maximum, noise_variance = oracles.ppca_maximum(iris.numpy(), latent_dim)
    assert log_likelihood == pytest.approx(IRIS_LOG_LIKELIHOOD[latent_dim], abs=1e-3)
    assert log_likelihood == pytest.approx(maximum, rel=1e-10)
    assert ppca.noise_scale.square().item() == pytest.approx(noise_variance, rel=1e-10)


def test_closed_form_has_no_gradient(iris):
    ppca = PPCA.closed_form(iris, 2)
    gradients = torch.autograd.grad(ppca.log_prob(iris).sum(), (ppca._standard_loadings, ppca._unconstrained_noise))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-8


def test_closed_form_scores_above_scikit_learn_and_below_with_its_covariance(iris):
    x = iris.numpy()
    oracle = PCA(2).fit(x)
    ppca = PPCA.closed_form(iris, 2)
    assert oracle.score(x) * 150 == pytest.approx(-404.9695, abs=1e-3)
    assert ppca.log_prob(iris).mean().item() > oracle.score(x)
    # scikit-learn's parameters are ours with every variance times n / (n - 1)
    inflated = (ppca.loadings @ ppca.loadings.mT + ppca.noise_scale.square() * torch.eye(4)) * 150 / 149
    np.testing.assert_allclose(oracle.get_covariance(), inflated.detach().numpy(), rtol=1e-8)
    directions = ppca.principal_axes() / ppca.principal_axes().norm(dim=0)
    np.testing.assert_allclose(np.abs(oracle.components_.T), directions.abs().numpy(), rtol=1e-8)


def test_closed_form_with_more_columns_than_rows():
    x = torch.randn(10, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ppca = PPCA.closed_form(x, 3)
    maximum, _ = oracles.ppca_maximum(x.numpy(), 3)
    assert ppca.log_prob(x).sum().item() == pytest.approx(maximum, rel=1e-10)


def test_closed_form_reaches_noise_far_below_the_floor_of_a_fit():
    generator = torch.Generator().manual_seed(0)
    x = 1e4 * torch.randn(50, 1, generator=generator, dtype=torch.float64).expand(50, 3)
    x = x + 1e-3 * torch.randn(50, 3, generator=generator, dtype=torch.float64)
    ppca = PPCA.closed_form(x, 1)
    assert 0.5e-3 < ppca.noise_scale.item() < 2e-3
    assert ppca.log_prob(x).sum().item() == pytest.approx(oracles.ppca_maximum(x.numpy(), 1)[0], abs=1e-4)


def test_gradients_reach_the_closed_form(iris):
    ppca = PPCA(4, 3)  # the third axis explains little more than the noise: the one that falls asleep
    train(ppca, iris, steps=3000)
    gap = (IRIS_LOG_LIKELIHOOD[3] - ppca.log_prob(iris).sum().item()) / 150
    assert -1e-6 < gap < 0.01
    elbo = oracles.linear_gaussian_elbo(iris.numpy(), *as_numpy(ppca), *guide_moments(ppca, iris)).mean()
    assert 0 <= ppca.log_prob(iris).mean().item() - elbo < 0.05


def test_a_change_of_units_changes_nothing_but_the_units(iris):
    plain, scaled = PPCA(4, 2), PPCA(4, 2)
    train(plain, iris, steps=20)
    train(scaled, 1e6 * iris - 1e7, steps=20)
    torch.testing.assert_close(scaled.loadings, 1e6 * plain.loadings, rtol=1e-6, atol=1e-3)
    expected = plain.log_prob(iris) - 4 * math.log(1e6)
    torch.testing.assert_close(scaled.log_prob(1e6 * iris - 1e7), expected, rtol=1e-6, atol=1e-6)


def test_one_scale_for_all_features_keeps_the_noise_isotropic():
    wine = torch.tensor(load_wine().data)
    ppca = PPCA(13, 2).double()
    ppca.initialize(wine, seed=0)
    covariance = ppca.loadings @ ppca.loadings.mT + ppca.noise_scale.square() * torch.eye(13)
    expected = oracles.linear_gaussian_log_density(wine.numpy(), *as_numpy(ppca))
    assert ppca.noise_scale.shape == ()
    np.testing.assert_allclose(ppca.log_prob(wine).detach().numpy(), expected, rtol=1e-8)
    assert covariance.diagonal().sum().item() == pytest.approx(wine.var(0, correction=0).sum().item(), rel=0.5)


# Where a fit starts.


def test_initialize_depends_on_its_seed_alone_and_happens_once(iris):
    state = torch.random.get_rng_state()
    first, second, third = PPCA(4, 2), PPCA(4, 2), PPCA(4, 2)
    for ppca, seed in ((first, 0), (second, 0), (third, 1)):
        ppca.double().initialize(iris, seed=seed)
    assert torch.equal(first.loadings, second.loadings)
    assert not torch.allclose(first.loadings @ first.loadings.mT, third.loadings @ third.loadings.mT)
    torch.testing.assert_close(first.mean.detach(), iris.mean(0))
    first.initialize(iris + 5.0, seed=3)
    assert torch.equal(first.loadings, second.loadings)
    assert torch.equal(first.location, second.location)
    assert torch.equal(torch.random.get_rng_state(), state)
    first.reset_parameters()
    first.initialize(iris + 5.0, seed=3)
    torch.testing.assert_close(first.mean.detach(), iris.mean(0) + 5.0)


@pytest.mark.parametrize("guide_covariance", GUIDES)
def test_set_parameters_makes_the_guide_exact(iris, guide_covariance):
    ppca = PPCA(4, 2, guide_covariance).double()
    ppca.initialize(iris, seed=0)
    loadings = torch.tensor([[1.0, 0.5], [0.3, 0.8], [-0.4, 1.0], [0.2, 0.2]], dtype=torch.float64)
    ppca.set_parameters(loadings=loadings, mean=iris[0], noise_scale=torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close((ppca.loadings @ ppca.loadings.mT).detach(), loadings @ loadings.mT)
    torch.testing.assert_close(ppca.mean.detach(), iris[0])
    torch.testing.assert_close(ppca.noise_scale.item(), 0.3)
    np.testing.assert_allclose(single_draw_losses(ppca, iris, range(3)), -ppca.log_prob(iris).sum().item(), rtol=1e-10)


def test_noise_has_a_floor(iris):
    ppca = PPCA(4, 2).double()
    ppca.initialize(iris, seed=0)
    with torch.no_grad():
        ppca._unconstrained_noise.fill_(-1e6)
    assert ppca.noise_scale.item() == pytest.approx(NOISE_FLOOR * ppca.scale.item())
    assert ppca.log_prob(iris).isfinite().all()


def test_the_state_survives_saving(iris):
    ppca, copy = PPCA.closed_form(iris, 2), PPCA(4, 2).double()
    copy.load_state_dict(ppca.state_dict())
    assert copy.is_initialized
    assert torch.equal(copy.log_prob(iris), ppca.log_prob(iris))


# Draws.


def test_draws_have_the_covariance_of_the_model():
    ppca = scrambled(3, 2)
    n = 40_000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        from_model = ppca.model(None, size=n)
    covariance = (ppca.loadings @ ppca.loadings.mT + ppca.noise_scale.square() * torch.eye(3)).detach()
    variances = covariance.diagonal()
    standard_error = ((variances[:, None] * variances + covariance.square()) / n).sqrt()
    for x in (from_model.detach(), ppca.sample(n, seed=1)):
        assert x.shape == (n, 3)
        assert ((x.mean(0) - ppca.mean).abs() < 4.5 * (variances / n).sqrt()).all()
        assert ((x.mT.cov() - covariance).abs() < 4.5 * standard_error).all()


def test_sample_is_repeatable_and_leaves_the_global_state_alone():
    ppca = scrambled(3, 2)
    state = torch.random.get_rng_state()
    assert torch.equal(ppca.sample(4, seed=1), ppca.sample(4, seed=1))
    assert not torch.equal(ppca.sample(4), ppca.sample(4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sites_and_their_dimensions(iris):
    trace = poutine.trace(scrambled(4, 2).model).get_trace(iris[:10], size=150)
    z, x = trace.nodes["z"], trace.nodes["x"]
    assert z["infer"]["event_dims"] == ("latent",)
    assert x["infer"]["event_dims"] == ("feature",)
    assert z["value"].shape == (10, 2)
    assert x["is_observed"]
    assert z["scale"] == x["scale"] == 15.0
    assert [frame.name for frame in x["cond_indep_stack"]] == ["data"]


# Criteria, names, types.


def test_number_of_parameters_is_the_rank_of_the_covariance_map():
    ppca = scrambled(5, 2)

    def covariance(loadings: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (loadings @ loadings.mT + noise.square() * torch.eye(5)).flatten()

    jacobians = torch.autograd.functional.jacobian(covariance, (ppca.loadings.detach(), ppca.noise_scale.detach()))
    rank = torch.linalg.matrix_rank(torch.cat([j.reshape(25, -1) for j in jacobians], dim=1))
    assert ppca.num_parameters == rank.item() + 5


def test_information_criteria(iris):
    ppca = PPCA.closed_form(iris, 2)
    assert ppca.num_parameters == 4 * 2 - 1 + 4 + 1
    assert ppca.aic(iris) == pytest.approx(2 * 404.9628 + 2 * 12, abs=2e-3)
    assert ppca.bic(iris) == pytest.approx(2 * 404.9628 + 12 * math.log(150), abs=2e-3)


@pytest.mark.parametrize("guide_covariance", GUIDES)
def test_constrained_parameters(guide_covariance):
    shapes = {name: tuple(value.shape) for name, value in scrambled(4, 2, guide_covariance).constrained().items()}
    scale = (2,) if guide_covariance == "diag" else (2, 2)
    assert shapes == {"loadings": (4, 2), "mean": (4,), "noise_scale": (), "guide_weight": (2, 4), "guide_scale": scale}


def test_single_precision(iris):
    x = iris.float()
    ppca = PPCA.closed_form(x, 2)
    assert ppca.log_prob(x).dtype == torch.float32
    assert ppca.sample(3, seed=0).dtype == torch.float32
    assert ppca.log_prob(x).sum().item() == pytest.approx(-404.9628, abs=1e-2)
    assert ppca.log_prob(iris).dtype == torch.float32
    trained = PPCA(4, 2)
    train(trained, x, steps=5)
    assert all(parameter.dtype == torch.float32 for parameter in trained.parameters())


def test_whole_numbers_are_data_too():
    x = torch.tensor([[0, 0], [2, 1], [4, 5], [7, 6]])
    ppca = PPCA.closed_form(x, 1)
    assert ppca.log_prob(x).isfinite().all()


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 0), r"latent_dim is 0.*latent_dim=1"),
        ((4, 4), r"latent_dim is 4 and num_features is 4.*latent_dim <= 3"),
        ((0, 1), r"num_features is 0"),
        ((4, 2, "tied"), r"guide_covariance is 'tied'; use 'diag' or 'full'"),
    ],
)
def test_wrong_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PPCA(*arguments)


@pytest.mark.parametrize("size", [None, 100])
@pytest.mark.parametrize("method", ["model", "guide"])
def test_data_of_another_width_are_refused(iris, method, size):
    with pytest.raises(ValueError, match=r"\(150, 4\), but num_features=5 asks for \(n, 5\)"):
        getattr(PPCA(5, 2), method)(iris, size=size)


@pytest.mark.parametrize("method", ["log_prob", "posterior", "encode"])
def test_closed_forms_refuse_data_of_another_width(iris, method):
    with pytest.raises(ValueError, match="num_features=5"):
        getattr(PPCA(5, 2), method)(iris)
    with pytest.raises(ValueError, match=r"\(5,\), but num_features=5"):
        getattr(PPCA(5, 2), method)(torch.zeros(5))


def test_missing_data_are_refused():
    with pytest.raises(ValueError, match="size=100"):
        PPCA(4, 2).model()
    with pytest.raises(ValueError, match="only the model can draw"):
        PPCA(4, 2).guide(None, size=10)


def test_closed_form_refuses_what_has_no_maximum(iris):
    with pytest.raises(ValueError, match=r"latent_dim is 4 and num_features is 4"):
        PPCA.closed_form(iris, 4)
    with pytest.raises(ValueError, match=r"3 rows, but latent_dim=2 needs at least 4"):
        PPCA.closed_form(iris[:3], 2)
    with pytest.raises(ValueError, match="rows and columns"):
        PPCA.closed_form(iris[0], 2)
    with pytest.raises(ValueError, match="explain x completely"):
        PPCA.closed_form(iris[:, :1] * torch.tensor([1.0, 2.0, 3.0]), 1)


def test_constant_data_are_refused():
    with pytest.raises(ValueError, match="x is constant over the 10 rows"):
        PPCA(4, 2).initialize(torch.full((10, 4), 0.1), seed=0)

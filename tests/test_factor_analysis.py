"""Factor analysis against its closed forms and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from sklearn.datasets import load_wine

from pyro_lvm.models.factor_analysis import FactorAnalysis
from pyro_lvm.models.linear_gaussian import NOISE_FLOOR
from pyro_lvm.models.ppca import PPCA

GUIDES = ("diag", "full")


@pytest.fixture
def wine() -> torch.Tensor:
    x = torch.tensor(load_wine().data)
    return (x - x.mean(0)) / x.std(0, correction=0)


def scrambled(num_features: int, latent_dim: int, guide_covariance: str = "diag", seed: int = 0) -> FactorAnalysis:
    """A model with no parameter, buffer or guide at a special place."""
    model = FactorAnalysis(num_features, latent_dim, guide_covariance).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        model.location.copy_(torch.randn(num_features, generator=generator, dtype=torch.float64))
        model.scale.copy_(torch.rand(num_features, generator=generator, dtype=torch.float64) + 0.5)
    return model


def as_numpy(model: FactorAnalysis) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loadings, mean and noise variances."""
    return tuple(t.detach().numpy() for t in (model.loadings, model.mean, model.noise_scale.square()))


def guide_moments(model: FactorAnalysis, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    loc = (x - model.mean) @ model.guide_weight.mT
    scale = model.guide_scale.diag() if model.guide_covariance == "diag" else model.guide_scale
    return loc.detach().numpy(), (scale @ scale.mT).detach().numpy()


def single_draw_losses(model: FactorAnalysis, x: torch.Tensor, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            losses.append(Trace_ELBO(max_plate_nesting=1).loss(model.model, model.guide, x))
    return losses


def train(model: FactorAnalysis, x: torch.Tensor, steps: int) -> None:
    """Plain Pyro, one draw per step, one-cycle Adam."""
    with torch.random.fork_rng(), pyro.validation_enabled(False):
        torch.manual_seed(0)
        model.to(x.dtype)
        model.initialize(x, seed=0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
        elbo = TraceMeanField_ELBO(max_plate_nesting=1)
        for _ in range(steps):
            optimizer.zero_grad()
            elbo.differentiable_loss(model.model, model.guide, x).backward()
            optimizer.step()
            scheduler.step()


def test_log_prob_is_the_normal_density(wine):
    model = scrambled(13, 3)
    expected = oracles.linear_gaussian_log_density(wine.numpy(), *as_numpy(model))
    np.testing.assert_allclose(model.log_prob(wine).detach().numpy(), expected, rtol=1e-8)


def test_posterior_is_the_conditioned_joint(wine):
    model = scrambled(13, 3)
    loc, covariance = oracles.linear_gaussian_posterior(wine.numpy(), *as_numpy(model))
    posterior = model.posterior(wine)
    assert posterior.batch_shape == (178,)
    np.testing.assert_allclose(posterior.mean.detach().numpy(), loc, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(posterior.covariance_matrix[7].detach().numpy(), covariance, rtol=1e-8, atol=1e-10)


def test_log_prob_does_not_feel_a_rotation(wine):
    model = scrambled(13, 3)
    before = model.log_prob(wine).detach()
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    with torch.no_grad():
        model._standard_loadings.copy_(model._standard_loadings @ rotation)
    torch.testing.assert_close(model.log_prob(wine).detach(), before, rtol=1e-10, atol=1e-10)


def test_equal_noise_makes_it_ppca(wine):
    ppca = PPCA.closed_form(wine, 2)
    model = FactorAnalysis(13, 2).double()
    noise_scale = ppca.noise_scale.expand(13)
    model.set_parameters(loadings=ppca.loadings, mean=ppca.mean, noise_scale=noise_scale)
    torch.testing.assert_close(model.log_prob(wine), ppca.log_prob(wine), rtol=1e-10, atol=1e-10)
    assert model.num_parameters == ppca.num_parameters + 12


@pytest.mark.parametrize("guide_covariance", GUIDES)
def test_evidence_is_elbo_plus_divergence_from_the_posterior(wine, guide_covariance):
    model = scrambled(13, 3, guide_covariance)
    q = guide_moments(model, wine)
    elbo = oracles.linear_gaussian_elbo(wine.numpy(), *as_numpy(model), *q)
    divergence = oracles.gaussian_kl(*q, *oracles.linear_gaussian_posterior(wine.numpy(), *as_numpy(model)))
    assert divergence.min() > 0.1
    np.testing.assert_allclose(model.log_prob(wine).detach().numpy(), elbo + divergence, rtol=1e-8)


@pytest.mark.parametrize("guide_covariance", GUIDES)
def test_pyro_estimates_the_closed_form_elbo(wine, guide_covariance):
    model = scrambled(13, 3, guide_covariance)
    expected = oracles.linear_gaussian_elbo(wine.numpy(), *as_numpy(model), *guide_moments(model, wine)).sum()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        draws = torch.tensor([-TraceMeanField_ELBO().loss(model.model, model.guide, wine) for _ in range(400)])
    assert abs(draws.mean().item() - expected) < 4 * draws.std().item() / math.sqrt(400)


@pytest.mark.parametrize("guide_covariance", GUIDES)
def test_set_parameters_makes_the_guide_exact(wine, guide_covariance):
    other = scrambled(13, 3, guide_covariance)
    model = FactorAnalysis(13, 3, guide_covariance).double()
    model.set_parameters(loadings=other.loadings, mean=other.mean, noise_scale=other.noise_scale)
    torch.testing.assert_close(model.log_prob(wine), other.log_prob(wine), rtol=1e-9, atol=1e-9)
    whitened = model.loadings / model.noise_scale.unsqueeze(-1)
    gram = whitened.mT @ whitened
    torch.testing.assert_close(gram, gram.diagonal().diag())
    losses = single_draw_losses(model, wine, range(5))
    np.testing.assert_allclose(losses, -model.log_prob(wine).sum().item(), rtol=1e-10)
    assert np.std(single_draw_losses(other, wine, range(5))) > 1.0


def test_minibatch_losses_average_to_the_full_loss(wine):
    model = scrambled(13, 3)
    z = torch.randn(178, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(rows: slice) -> torch.Tensor:
        """Minus the log weight of fixed factors, on these rows."""
        fixed = poutine.condition(model.model, {"z": z[rows]}), poutine.condition(model.guide, {"z": z[rows]})
        joint, guide = (poutine.trace(p).get_trace(wine[rows], size=178).log_prob_sum() for p in fixed)
        return guide - joint

    average = sum(len(wine[rows]) / 178 * loss(rows) for rows in (slice(0, 100), slice(100, 178)))
    torch.testing.assert_close(average, loss(slice(0, 178)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("guide_covariance", GUIDES)
def test_particles_vectorise(wine, guide_covariance):
    model = FactorAnalysis(13, 2, guide_covariance).double()
    model.initialize(wine, seed=0)
    elbo = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1)
    assert elbo.loss(model.model, model.guide, wine) == pytest.approx(-model.log_prob(wine).sum().item(), rel=1e-10)


def test_gradients_reach_the_optimum_of_scikit_learn(wine):
    maximum = oracles.factor_analysis_maximum(wine.numpy(), 2)
    assert maximum == pytest.approx(-2747.1911, abs=1e-2)
    model = FactorAnalysis(13, 2)
    train(model, wine, steps=1000)
    gap = (maximum - model.log_prob(wine).sum().item()) / 178
    assert -1e-4 < gap < 0.02
    elbo = oracles.linear_gaussian_elbo(wine.numpy(), *as_numpy(model), *guide_moments(model, wine)).mean()
    assert 0 <= model.log_prob(wine).mean().item() - elbo < 0.05


def test_a_change_of_units_per_feature_changes_nothing_but_the_units(wine):
    units = torch.logspace(-3, 5, 13, dtype=torch.float64)
    plain, scaled = FactorAnalysis(13, 2), FactorAnalysis(13, 2)
    train(plain, wine, steps=20)
    train(scaled, (wine + 3.0) * units, steps=20)
    torch.testing.assert_close(scaled.loadings, plain.loadings * units.unsqueeze(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scaled.noise_scale, plain.noise_scale * units, rtol=1e-6, atol=0)
    expected = plain.log_prob(wine) - units.log().sum()
    torch.testing.assert_close(scaled.log_prob((wine + 3.0) * units), expected, rtol=1e-6, atol=1e-6)


def test_a_feature_that_is_a_factor_stops_at_the_floor():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    x = torch.cat([z, z, z + torch.randn(200, 1, generator=generator, dtype=torch.float64)], dim=1)
    model = FactorAnalysis(3, 1)
    train(model, x, steps=200)
    assert model.log_prob(x).isfinite().all()
    with torch.no_grad():
        model._unconstrained_noise.fill_(-1e6)
    torch.testing.assert_close(model.noise_scale.detach(), NOISE_FLOOR * x.std(0, correction=0))
    assert model.log_prob(x).isfinite().all()


def test_draws_have_the_covariance_of_the_model():
    model = scrambled(4, 2)
    n = 40_000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        from_model = model.model(None, size=n)
    covariance = (model.loadings @ model.loadings.mT + model.noise_scale.square().diag()).detach()
    variances = covariance.diagonal()
    standard_error = ((variances[:, None] * variances + covariance.square()) / n).sqrt()
    for x in (from_model.detach(), model.sample(n, seed=1)):
        assert x.shape == (n, 4)
        assert ((x.mean(0) - model.mean).abs() < 4.5 * (variances / n).sqrt()).all()
        assert ((x.mT.cov() - covariance).abs() < 4.5 * standard_error).all()


def test_sites_and_their_dimensions(wine):
    trace = poutine.trace(scrambled(13, 2).model).get_trace(wine[:10], size=178)
    z, x = trace.nodes["z"], trace.nodes["x"]
    assert z["infer"]["event_dims"] == ("latent",)
    assert x["infer"]["event_dims"] == ("feature",)
    assert z["value"].shape == (10, 2)
    assert z["scale"] == x["scale"] == 17.8


def test_number_of_parameters_is_the_rank_of_the_covariance_map():
    model = scrambled(6, 2)

    def covariance(loadings: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (loadings @ loadings.mT + noise.square().diag()).flatten()

    jacobians = torch.autograd.functional.jacobian(covariance, (model.loadings.detach(), model.noise_scale.detach()))
    rank = torch.linalg.matrix_rank(torch.cat([j.reshape(36, -1) for j in jacobians], dim=1))
    assert model.num_parameters == rank.item() + 6


def test_constrained_parameters_and_criteria(wine):
    model = scrambled(13, 2)
    shapes = {name: tuple(value.shape) for name, value in model.constrained().items()}
    assert shapes == {
        "loadings": (13, 2),
        "mean": (13,),
        "noise_scale": (13,),
        "guide_weight": (2, 13),
        "guide_scale": (2,),
    }
    deviance = -2 * model.log_prob(wine).sum().item()
    assert model.num_parameters == 26 - 1 + 13 + 13
    assert model.aic(wine) == pytest.approx(deviance + 2 * 51)
    assert model.bic(wine) == pytest.approx(deviance + 51 * math.log(178))


def test_single_precision(wine):
    model = FactorAnalysis(13, 2)
    train(model, wine.float(), steps=5)
    assert model.log_prob(wine.float()).dtype == torch.float32
    assert model.sample(3, seed=0).dtype == torch.float32
    with torch.no_grad():
        difference = model.log_prob(wine.float()) - model.double().log_prob(wine)
    assert difference.abs().max() < 1e-4


def test_there_is_no_closed_form():
    assert not hasattr(FactorAnalysis, "closed_form")


def test_what_is_refused(wine):
    with pytest.raises(ValueError, match=r"latent_dim is 13 and num_features is 13.*latent_dim <= 12"):
        FactorAnalysis(13, 13)
    with pytest.raises(ValueError, match=r"latent_dim is 0"):
        FactorAnalysis(13, 0)
    with pytest.raises(ValueError, match=r"\(178, 13\), but num_features=5 asks for \(n, 5\)"):
        FactorAnalysis(5, 1).model(wine, size=178)
    constant = wine.clone()
    constant[:, [2, 5]] = 3.0
    with pytest.raises(ValueError, match=r"columns \[2, 5\] of x are constant over the 178 rows"):
        FactorAnalysis(13, 2).initialize(constant, seed=0)

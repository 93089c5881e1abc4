"""Missing values: scipy's marginals and conditionals are the oracle, complete data the limit."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_iris
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.missing import ObservedPart

KINDS = ("full", "tied", "diag", "spherical")
MISSING = {"missing": "marginalize"}


def iris():
    return torch.tensor(load_iris().data)


def four_features(n=150):
    """One factor behind all features, none of which it could swallow."""
    generator = np.random.default_rng(3)
    z = generator.normal(size=(n, 1))
    return torch.tensor(z * [2.0, 1.5, 1.0, -1.0] + generator.normal(size=(n, 4)))


def with_holes(x, share=0.2, seed=0):
    """Some values of x gone at random, one row without any."""
    gone = torch.tensor(np.random.default_rng(seed).random(x.shape) < share)
    gone[5] = True
    return torch.where(gone, torch.nan, x)


def climbed(program, x, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "EM stopped", lvm.ProgramWarning)
        return lvm.em(program, x, **{"seed": 0, "tol": 0.0, **MISSING, **options})


def linear_covariance(program):
    loadings, noise = program.loadings.detach().numpy(), program.noise_scale.detach().numpy()
    return loadings @ loadings.T + np.diag(np.broadcast_to(noise**2, len(loadings)))


def mixture_of_observed(mixture, x):
    """Log p(x_o, k), shape (n, K)."""
    weights, locs, covariances = (v.detach().numpy() for v in (mixture.weights, mixture.locs, mixture.covariances))
    matrices = oracles.gaussian_mixture_matrices(covariances, mixture.covariance, len(weights), x.shape[1])
    columns = [np.log(w) + oracles.normal_of_observed(x, m, c) for w, m, c in zip(weights, locs, matrices, strict=True)]
    return np.stack(columns, -1)


def fitted_mixture(kind, x, k=3):
    mixture = lvm.GaussianMixture(k, x.shape[1], covariance=kind)
    climbed(mixture, x, max_iter=20)
    return mixture


# --- exact marginals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_mixtures_density_of_what_is_seen(kind):
    x = with_holes(iris())
    mixture = fitted_mixture(kind, x)
    right = mixture_of_observed(mixture, x.numpy())
    np.testing.assert_allclose(mixture.log_prob(x, **MISSING).detach(), np.logaddexp.reduce(right, 1), atol=1e-9)
    assert float(mixture.log_prob(x, **MISSING)[5].detach()) == pytest.approx(0.0, abs=1e-12)
    given = mixture.responsibilities(x, **MISSING).detach()
    np.testing.assert_allclose(given, np.exp(right - np.logaddexp.reduce(right, 1)[:, None]), atol=1e-9)
    torch.testing.assert_close(given[5], mixture.weights.detach())


@pytest.mark.parametrize("family", [lvm.PPCA, lvm.FactorAnalysis])
def test_a_linear_models_density_of_what_is_seen(family):
    x, program = with_holes(iris()), family(4, 2)
    climbed(program, x, max_iter=20)
    mean, covariance = program.mean.detach().numpy(), linear_covariance(program)
    right = oracles.normal_of_observed(x.numpy(), mean, covariance)
    np.testing.assert_allclose(program.log_prob(x, **MISSING).detach(), right, atol=1e-9)
    posterior = program.posterior(x, **MISSING)
    torch.testing.assert_close(posterior.loc[5].detach(), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(posterior.covariance_matrix[5].detach(), torch.eye(2, dtype=torch.float64))
    seen = ~np.isnan(x.numpy()[0])
    w, noise = (
        program.loadings.detach().numpy()[seen],
        np.broadcast_to(program.noise_scale.detach().numpy() ** 2, 4)[seen],
    )
    precision = np.eye(2) + w.T @ (w / noise[:, None])
    np.testing.assert_allclose(posterior.covariance_matrix[0].detach(), np.linalg.inv(precision), atol=1e-9)
    expected = np.linalg.solve(precision, w.T @ ((x.numpy()[0] - mean)[seen] / noise))
    np.testing.assert_allclose(posterior.loc[0].detach(), expected, atol=1e-9)


@pytest.mark.parametrize(
    "build",
    [lambda: lvm.PPCA(4, 2), lambda: lvm.FactorAnalysis(4, 2)]
    + [(lambda kind=kind: lvm.GaussianMixture(3, 4, covariance=kind)) for kind in KINDS],
)
def test_nothing_missing_is_the_plain_path_to_the_bit(build):
    plain, asked = build(), build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lvm.ProgramWarning)
        one, other = lvm.em(plain, iris(), seed=0, max_iter=10), lvm.em(asked, iris(), seed=0, max_iter=10, **MISSING)
    assert one.elbo == other.elbo
    assert torch.equal(plain.log_prob(iris()), asked.log_prob(iris(), **MISSING))
    one = lvm.fit(build(), iris(), steps=20, seed=0)
    other = lvm.fit(build(), iris(), steps=20, seed=0, **MISSING)
    assert one.history["loss"] == other.history["loss"]
    assert one.elbo == other.elbo


# --- EM ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [lambda: lvm.PPCA(4, 1), lambda: lvm.FactorAnalysis(4, 1)]
    + [(lambda kind=kind: lvm.GaussianMixture(2, 4, covariance=kind)) for kind in KINDS],
)
def test_em_climbs_the_density_of_what_is_seen_to_a_stationary_point(build):
    x, program = with_holes(four_features()), build()
    fit = climbed(program, x, max_iter=600)
    path = [v for pair in zip(fit.history["elbo_after_m_step"], fit.history["elbo"], strict=True) for v in pair]
    assert (np.diff(path) >= -1e-10).all()
    density = program.log_prob(x, **MISSING).mean()
    assert density.item() == pytest.approx(fit.elbo, abs=1e-9)
    density.backward()
    gradients = [p.grad.abs().max() for p in program.parameters() if p.grad is not None]
    assert gradients
    assert max(float(g) for g in gradients) < 1e-4


def test_the_mode_with_a_prior_too():
    x = with_holes(iris())
    prior = lvm.priors.weakly_informative(iris(), 2)
    fit = climbed(lvm.GaussianMixture(2, 4, prior=prior), x, max_iter=30)
    assert (np.diff(fit.history["elbo"]) >= -1e-10).all()
    assert fit.log_prob(x, 1).isfinite().all()


def test_tobamovirus_with_a_fifth_of_its_values_gone(data_root):
    """Tipping and Bishop's experiment: the plane found without 136 of 684 values is the plane found with them."""
    x = torch.tensor(np.loadtxt(data_root / "tobamovirus.csv", delimiter=","))
    whole = lvm.PPCA.closed_form(x, 2).loadings.detach().numpy()
    angles, ratios = [], []
    for mask in range(20):
        chosen = np.random.default_rng(mask).permutation(x.numel())[:136]
        gone = np.zeros(x.numel(), dtype=bool)
        gone[chosen] = True
        holes = torch.where(torch.tensor(gone.reshape(x.shape)), torch.nan, x)
        ppca = lvm.PPCA(18, 2)
        fit = climbed(ppca, holes, tol=1e-6, max_iter=2000)
        bases = [np.linalg.qr(w)[0] for w in (whole, ppca.loadings.detach().numpy())]
        angles.append(np.degrees(np.arccos(np.linalg.svd(bases[0].T @ bases[1])[1].min())))
        imputed = fit.impute(holes, num_draws=400, seed=0).mean(0).numpy()
        mean, covariance = ppca.mean.detach().numpy(), linear_covariance(ppca)
        oracle = x.numpy().copy()
        for row in range(38):
            hole = np.isnan(holes.numpy()[row])
            if hole.any():
                oracle[row, hole] = oracles.conditional_normal(holes.numpy()[row], mean, covariance)[0]
        error = [np.sqrt(np.square(found - x.numpy())[gone.reshape(x.shape)].mean()) for found in (imputed, oracle)]
        ratios.append(error[0] / error[1])
    assert np.median(angles) < 10.0
    assert max(ratios) < 1.05


# --- imputation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "diag", "tied", "ppca"])
def test_imputations_are_draws_from_the_conditional(kind):
    x = with_holes(iris(), share=0.4)
    program = lvm.PPCA(4, 2) if kind == "ppca" else lvm.GaussianMixture(1, 4, covariance=kind)
    fit = climbed(program, x, max_iter=10)
    draws = fit.impute(x, num_draws=4000, seed=0).numpy()
    assert draws.shape == (4000, 150, 4)
    gone = np.isnan(x.numpy())
    assert (draws[:, ~gone] == x.numpy()[~gone]).all()
    if kind == "ppca":
        mean, covariance = program.mean.detach().numpy(), linear_covariance(program)
    else:
        mean = program.locs[0].detach().numpy()
        covariance = oracles.gaussian_mixture_matrices(program.covariances.detach().numpy(), kind, 1, 4)[0]
    rows = [5, *(i for i in range(150) if 0 < gone[i].sum() < 4)][:20]
    for row in rows:
        right, spread = oracles.conditional_normal(x.numpy()[row], mean, covariance)
        found = draws[:, row, gone[row]]
        error = np.sqrt(np.diag(spread) / 4000)
        assert (np.abs(found.mean(0) - right) < 5 * error + 1e-12).all()
        np.testing.assert_allclose(np.cov(found.T).reshape(spread.shape), spread, atol=0.12 * np.diag(spread).max())


def test_imputations_of_a_mixture_follow_its_responsibilities():
    far = torch.tensor([[-5.0, -5.0], [5.0, 5.0]], dtype=torch.float64)
    mixture = lvm.GaussianMixture(2, 2, covariance="diag").double()
    mixture.set_parameters(torch.tensor([0.25, 0.75]), far, torch.ones(2, 2))
    x = torch.tensor([[-5.0, torch.nan], [5.0, torch.nan], [torch.nan, torch.nan]], dtype=torch.float64)
    draws = mixture.impute(x, num_draws=4000, seed=0)
    assert float(draws[:, 0, 1].mean()) == pytest.approx(-5.0, abs=0.1)
    assert float(draws[:, 1, 1].mean()) == pytest.approx(5.0, abs=0.1)
    assert float((draws[:, 2, 0] > 0).double().mean()) == pytest.approx(0.75, abs=0.03)
    assert (draws[:, 2].sign().prod(-1) > 0).all()  # both values of one draw come from one component
    assert torch.equal(mixture.impute(x, 3, seed=1), mixture.impute(x, 3, seed=1))


def test_a_likelihood_that_is_a_normal_vector_imputes_from_its_conditional():
    generator = np.random.default_rng(0)
    factor = generator.normal(size=(3, 3))
    mean, covariance = generator.normal(size=3), factor @ factor.T + np.eye(3)
    row = np.array([0.7, np.nan, np.nan])
    normal = dist.MultivariateNormal(torch.tensor(mean), torch.tensor(covariance)).expand([4000])
    drawn = ObservedPart(normal).impute(torch.tensor(row).expand(4000, 3)).numpy()
    right, spread = oracles.conditional_normal(row, mean, covariance)
    assert (drawn[:, 0] == 0.7).all()
    assert (np.abs(drawn[:, 1:].mean(0) - right) < 5 * np.sqrt(np.diag(spread) / 4000)).all()
    np.testing.assert_allclose(np.cov(drawn[:, 1:].T), spread, atol=0.1 * np.diag(spread).max())


# --- likelihoods of programs -------------------------------------------------------------------------------------


def test_the_observed_part_of_a_normal_vector():
    generator = np.random.default_rng(0)
    factor = generator.normal(size=(3, 3))
    mean, covariance = generator.normal(size=3), factor @ factor.T + np.eye(3)
    value = torch.tensor([[0.3, np.nan, 1.0], [np.nan] * 3, [1.0, 2.0, 3.0]], dtype=torch.float64)
    for fn in (
        dist.MultivariateNormal(torch.tensor(mean), torch.tensor(covariance)),
        dist.LowRankMultivariateNormal(torch.tensor(mean), torch.tensor(factor), torch.ones(3, dtype=torch.float64)),
    ):
        right = oracles.normal_of_observed(value.numpy(), mean, covariance)
        np.testing.assert_allclose(ObservedPart(fn).log_prob(value), right, atol=1e-10)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(0.5, 2.0),
        dist.Bernoulli(0.3),
        dist.Poisson(2.0),
        dist.Gamma(2.0, 1.0),
        dist.Beta(2.0, 2.0),
        dist.Exponential(1.0),
        dist.LogNormal(0.0, 1.0),
        dist.Geometric(0.4),
    ],
)
def test_independent_features_leave_out_what_is_missing_and_so_do_their_gradients(fn):
    raw = torch.zeros(2, 3, requires_grad=True)
    value = fn.sample((2, 3)) if not isinstance(fn, dist.Beta) else torch.full((2, 3), 0.4)
    shifted = (
        type(fn)(
            **{name: getattr(fn, name) + raw for name in list(fn.arg_constraints)[:1]},
            **{name: getattr(fn, name) for name in list(fn.arg_constraints)[1:]},
        )
        if not isinstance(fn, dist.Bernoulli | dist.Geometric)
        else type(fn)(logits=fn.logits + raw)
    )
    holes = torch.where(torch.tensor([[True, False, False], [True, True, True]]), torch.nan, value)
    found = ObservedPart(shifted.to_event(1)).log_prob(holes)
    torch.testing.assert_close(found[0], shifted.log_prob(value)[0, 1:].sum())
    assert found[1].item() == 0.0
    found.sum().backward()
    assert raw.grad.isfinite().all()
    assert (raw.grad[holes.isnan()] == 0).all()
    assert (raw.grad[0, 1:] != 0).any()


class Regression(nn.Module):
    """A factor for each row by a plain function of the row; one feature is a count."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.5], dtype=torch.float64))
        self.to_loc = nn.Linear(2, 1, dtype=torch.float64)

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * self.weight, 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(self.to_loc(x)[:, 0], x.new_tensor(0.5)))


def correlated(n=100):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return z * torch.tensor([2.0, 1.0]) + 0.5 * torch.randn(n, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("capture", [False, "graph"])
@pytest.mark.parametrize("batch_size", [None, 32])
def test_a_program_of_ones_own_with_holes(capture, batch_size):
    x, program = with_holes(correlated()), Regression()
    fit = lvm.fit(program, x, steps=300, lr=0.01, batch_size=batch_size, seed=0, capture=capture, **MISSING)
    assert fit.info["missing"] == "marginalize"
    assert fit.info["capture"] == ("graph" if capture else "eager")
    weight = program.weight.detach().numpy()
    evidence = oracles.normal_of_observed(x.numpy(), np.zeros(2), np.outer(weight, weight) + np.eye(2)).mean()
    assert fit.elbo < evidence
    assert fit.elbo > evidence - 0.3
    drawn = fit.impute(x, num_draws=50, seed=0)
    assert drawn.isfinite().all()
    assert (drawn[:, ~x.isnan()] == x[~x.isnan()]).all()
    # the exact evidence, by importance weights of the guide
    estimated = lvm.log_evidence(fit, x, 2000, seed=0).mean()
    assert float(estimated) == pytest.approx(evidence, abs=0.02)
    data = fit.to_arviz(x, 3, seed=0)
    assert np.isnan(data["observed_data"]["x"].values).sum() == int(x.isnan().sum())


def test_the_guide_sees_means_and_the_model_sees_holes():
    seen = []

    class Watched(Regression):
        def guide(self, x, size=None):
            seen.append(x.detach().clone())
            super().guide(x, size)

    x = with_holes(correlated())
    lvm.fit(Watched(), x, steps=1, seed=0, **MISSING)
    right = torch.where(x.isnan(), torch.nanmean(x, 0), x)
    assert any(value.shape == right.shape and torch.allclose(value, right) for value in seen)
    assert not any(value.isnan().any() for value in seen)


def test_svi_with_holes_stays_at_the_maximum_of_em():
    x = with_holes(iris())
    mixture = lvm.GaussianMixture(2, 4, covariance="full")
    fit = climbed(mixture, x, max_iter=500)
    again = lvm.fit(mixture, x, steps=30, lr=1e-3, seed=0, **MISSING)
    assert again.elbo == pytest.approx(fit.elbo, abs=1e-4)
    assert float(lvm.log_evidence(again, x).mean()) == pytest.approx(again.elbo, abs=1e-9)


def test_a_vae_with_holes_trains_and_imputes():
    generator = torch.Generator().manual_seed(0)
    x = torch.bernoulli(torch.full((200, 1), 0.5), generator=generator).expand(200, 12).clone()  # all bits agree
    holes = torch.where(torch.rand(x.shape, generator=generator) < 0.3, torch.nan, x)
    vae = lvm.VAE(12, 2, hidden=(32,))
    fit = lvm.fit(vae, holes, epochs=60, batch_size=50, lr=5e-3, seed=0, **MISSING)
    assert np.isfinite(fit.history["elbo"]).all()
    gone = holes.isnan()
    imputed = fit.impute(holes, num_draws=50, seed=0).mean(0)
    accuracy = ((imputed > 0.5).float() == x)[gone].float().mean()
    assert float(accuracy) > 0.95


def test_training_on_whole_rows_and_imputing_others():
    x, program = correlated(), Regression()
    plain = lvm.fit(copy.deepcopy(program), x, steps=50, lr=0.01, seed=0)
    fit = lvm.fit(program, x, steps=50, lr=0.01, seed=0, **MISSING)
    assert torch.equal(fit.log_prob(x, 10, seed=0), plain.log_prob(x, 10, seed=0))
    holes = with_holes(x)
    assert fit.impute(holes, 5, seed=0).isfinite().all()
    assert fit.log_prob(holes, 10, seed=0).isfinite().all()
    assert torch.equal(fit.log_prob(x, 10, seed=0), plain.log_prob(x, 10, seed=0))


def test_holes_in_a_loader_and_in_held_out_rows():
    x = with_holes(correlated())
    loader = DataLoader(TensorDataset(x), batch_size=50)
    assert np.isfinite(lvm.fit(Regression(), loader, epochs=2, seed=0, **MISSING).elbo)
    fit = lvm.fit(Regression(), correlated(), epochs=2, validation=x, seed=0, **MISSING)
    assert np.isfinite(fit.history["validation_elbo"]).all()


# --- what it refuses ---------------------------------------------------------------------------------------------


def test_holes_that_nobody_spoke_of():
    x = with_holes(iris())
    for call in (
        lambda: lvm.fit(lvm.PPCA(4, 1), x, steps=1),
        lambda: lvm.em(lvm.PPCA(4, 1), x),
        lambda: lvm.PPCA(4, 1).double().log_prob(x),
        lambda: lvm.GaussianMixture(2, 4).double().responsibilities(x),
        lambda: lvm.fit(lvm.PPCA(4, 1), iris(), steps=1).log_prob(x),
    ):
        with pytest.raises(ValueError, match="missing='marginalize'"):
            call()
    with pytest.raises(ValueError, match="hard=True measures distances"):
        lvm.em(lvm.GaussianMixture(2, 4), x, hard=True, seed=0, **MISSING)
    with pytest.raises(lvm.ProgramError, match="fit again with missing='marginalize'"):
        lvm.fit(lvm.PPCA(4, 1), iris(), steps=1).impute(x)


def test_what_has_no_closed_form():
    def model(x, size=None):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.MultivariateStudentT(5.0, x.new_zeros(2), scale * torch.eye(2)), obs=x)

    x = with_holes(correlated()).float()
    with pytest.raises(lvm.ProgramError, match="site 'x' has missing values and a MultivariateStudentT likelihood"):
        lvm.fit((model, lambda x, size=None: None), x, steps=1, **MISSING)
    empty = torch.where(torch.tensor([True, False]), torch.nan, correlated())
    with pytest.raises(ValueError, match="no observed value in column"):
        lvm.fit(Regression(), empty, steps=1, **MISSING)
    with pytest.raises(ValueError, match="missing='zero' is not known"):
        lvm.fit(Regression(), correlated(), steps=1, missing="zero")
    with pytest.raises(ValueError, match="infinite"):
        lvm.fit(Regression(), torch.where(empty.isnan(), torch.inf, empty), steps=1, **MISSING)
    with pytest.raises(lvm.ProgramError, match="none of the observed sites"):
        lvm.fit(Regression(), correlated(), steps=1, **MISSING).impute(correlated(), 2)

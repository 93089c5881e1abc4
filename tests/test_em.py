"""EM against scikit-learn at the same iterate, published optima, its own laws, and scipy's densities."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import oracles
import pytest
import torch
from sklearn.datasets import load_iris
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.blocks import Blocks
from pyro_lvm.data import as_rows
from pyro_lvm.exact import Expectation
from pyro_lvm.models import mixture_statistics

KINDS = ("full", "tied", "diag", "spherical")
PPCA = {
    "iris": {1: -470.6695, 2: -404.9628, 3: -379.9146},
    "tobamovirus": {1: -1400.0966, 2: -1245.9325, 3: -1197.2301},
}


@pytest.fixture
def faithful(data_root):
    return torch.tensor(np.loadtxt(data_root / "faithful.csv", delimiter=",", skiprows=1))


@pytest.fixture
def tobamovirus(data_root):
    return torch.tensor(np.loadtxt(data_root / "tobamovirus.csv", delimiter=","))


def iris():
    return torch.tensor(load_iris().data)


def clusters(n=200, d=3, k=3, seed=0, spread=1.5):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(d, d))
    centers = spread * generator.normal(size=(k, d))
    return torch.tensor(generator.normal(size=(n, d)) @ mixing + centers[np.arange(n) % k])


def responsibilities(n, k, seed=1):
    return np.random.default_rng(seed).dirichlet(np.full(k, 0.7), size=n)


def climbed(program, x, **options):
    """EM that is allowed to stop before it has converged."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "EM stopped", lvm.ProgramWarning)
        return lvm.em(program, x, **{"seed": 0, "tol": 0.0, **options})


def natural(mixture):
    return [value.detach().numpy() for value in (mixture.weights, mixture.locs, mixture.covariances)]


# --- published and independent optima ----------------------------------------------------------------------------


def test_old_faithful(faithful):
    fit = lvm.em(lvm.GaussianMixture(2, 2), faithful, seed=0, tol=1e-10)
    assert fit.elbo * len(faithful) == pytest.approx(-1130.2640, abs=1e-3)


def test_iris_from_kmeans():
    from sklearn.cluster import KMeans

    labels = KMeans(3, n_init=10, random_state=0).fit(load_iris().data).labels_
    fit = lvm.em(lvm.GaussianMixture(3, 4), iris(), init=np.eye(3)[labels], tol=1e-10, max_iter=1000)
    assert fit.elbo * 150 == pytest.approx(-180.1855, abs=1e-3)


@pytest.mark.parametrize(("name", "latent_dim"), list(itertools.product(PPCA, (1, 2, 3))))
def test_ppca_reaches_its_published_maximum(name, latent_dim, request, tobamovirus):
    x = iris() if name == "iris" else tobamovirus
    fit = lvm.em(lvm.PPCA(x.shape[1], latent_dim), x, seed=0, tol=1e-9, max_iter=5000)
    assert fit.elbo * len(x) == pytest.approx(PPCA[name][latent_dim], rel=1e-6)


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_ppca_finds_the_closed_forms_parameters(latent_dim):
    ppca = lvm.PPCA(4, latent_dim)
    fit = climbed(ppca, iris(), max_iter=1000)
    closed = lvm.PPCA.closed_form(iris(), latent_dim)
    torch.testing.assert_close(ppca.principal_axes(), closed.principal_axes(), atol=1e-5, rtol=0)
    assert float(fit.params["noise_scale"]) == pytest.approx(closed.noise_scale.item(), abs=1e-6)
    # the guide is the exact posterior there: the bound by gradients' estimator is the one EM reports
    assert float(lvm.log_evidence(fit, iris()).mean()) == pytest.approx(fit.elbo, abs=1e-9)


@pytest.mark.parametrize(("name", "latent_dim"), [("tobamovirus", 1), ("tobamovirus", 2), ("made up", 2)])
def test_factor_analysis_reaches_scikit_learns_optimum(name, latent_dim, tobamovirus):
    loadings = np.random.default_rng(0).normal(size=(6, 2))
    made_up = np.random.default_rng(1).normal(size=(300, 2)) @ loadings.T
    made_up += np.random.default_rng(2).normal(size=(300, 6)) * np.linspace(0.5, 2.0, 6)
    x = tobamovirus if name == "tobamovirus" else torch.tensor(made_up)
    fit = lvm.em(lvm.FactorAnalysis(x.shape[1], latent_dim), x, seed=0, tol=1e-7, max_iter=20_000)
    right = oracles.factor_analysis_maximum(x.numpy(), latent_dim)
    assert fit.elbo * len(x) == pytest.approx(right, rel=1e-4)


def test_a_feature_that_a_factor_swallows_stops_at_the_floor():
    generator = np.random.default_rng(0)
    z = generator.normal(size=500)
    x = np.column_stack([z, z + generator.normal(size=500), 0.5 * z + generator.normal(size=500)])  # x_0 is the factor
    swallowed = {
        "loadings": torch.tensor([[z.std()], [1.0], [0.5]]),
        "mean": torch.tensor(x.mean(0)),
        "noise_scale": torch.tensor([1e-5, 1.0, 1.0]),
    }
    fit = climbed(lvm.FactorAnalysis(3, 1), torch.tensor(x), init=swallowed, max_iter=200)
    assert float(fit.params["noise_scale"][0]) == pytest.approx(1e-3 * z.std(), rel=2e-3)
    assert (np.diff(fit.history["elbo"]) >= -1e-10).all()
    assert fit.log_prob(torch.tensor(x)).isfinite().all()


# --- the same iterate as scikit-learn ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "num_steps"), list(itertools.product(KINDS, (1, 2, 10))))
def test_the_same_iterate_as_scikit_learn(kind, num_steps):
    x, given = clusters(), responsibilities(200, 3)
    right, evidence = oracles.scikit_learn_em(x.numpy(), given, kind, num_steps + 1)
    mixture = lvm.GaussianMixture(3, 3, covariance=kind, reg_covar=0.0)
    fit = climbed(mixture, x, init=given, max_iter=num_steps)
    assert fit.elbo * 200 == pytest.approx(evidence, abs=1e-8 * 200)
    for ours, theirs in zip(natural(mixture), (right.weights_, right.means_, right.covariances_), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_after_each_step_the_bound_and_the_kl_are_what_scipy_says(kind):
    x, given = clusters(), responsibilities(200, 3)
    fits = [
        climbed(lvm.GaussianMixture(3, 3, covariance=kind, reg_covar=0.0), x, init=given, max_iter=steps)
        for steps in (1, 2, 3, 4)
    ]
    joints = [oracles.gaussian_mixture_log_joint(x.numpy(), *natural(fit.program), kind) for fit in fits]
    history = fits[-1].history
    for step in (1, 2, 3):
        evidence = np.logaddexp.reduce(joints[step], axis=1).sum()
        kl = oracles.mixture_kl_to_posterior(joints[step - 1], joints[step])
        assert history["elbo"][step] * 200 == pytest.approx(evidence, abs=1e-8)
        assert history["kl_closed"][step] * 200 == pytest.approx(kl, abs=1e-8)
        assert history["elbo_after_m_step"][step] * 200 == pytest.approx(evidence - kl, abs=1e-8)


# --- laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_half_step_climbs(kind, with_prior):
    x = clusters(seed=3, spread=0.5)
    prior = lvm.priors.weakly_informative(x, 4, concentration=2.0) if with_prior else None
    mixture = lvm.GaussianMixture(4, 3, covariance=kind, prior=prior)
    fit = climbed(mixture, x, init=responsibilities(200, 4), max_iter=60)
    path = [value for pair in zip(fit.history["elbo_after_m_step"], fit.history["elbo"], strict=True) for value in pair]
    assert (np.diff(path) >= -1e-11).all()
    assert path[-1] > path[0] + 1e-4


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("family", [lvm.PPCA, lvm.FactorAnalysis])
def test_every_half_step_of_a_linear_model_climbs(family, latent_dim):
    fit = climbed(family(4, latent_dim), iris(), max_iter=50)
    path = [value for pair in zip(fit.history["elbo_after_m_step"], fit.history["elbo"], strict=True) for value in pair]
    assert (np.diff(path) >= -1e-11).all()


@pytest.mark.parametrize("family", [lvm.PPCA, lvm.FactorAnalysis])
def test_the_bound_of_a_linear_model_is_its_log_density(family):
    program = family(4, 2)
    fit = climbed(program, iris(), max_iter=3)
    natural_form = [fit.params[name].numpy() for name in ("loadings", "mean", "noise_scale")]
    noise = np.broadcast_to(natural_form[2] ** 2, 4)
    right = oracles.linear_gaussian_log_density(iris().numpy(), natural_form[0], natural_form[1], noise).sum()
    assert fit.elbo * 150 == pytest.approx(right, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mode_with_a_prior_is_a_mode_of_scipys_density(kind):
    x = clusters(n=60, d=2)
    prior = lvm.priors.weakly_informative(x, 3, concentration=1.7)
    mixture = lvm.GaussianMixture(3, 2, covariance=kind, prior=prior)
    fit = climbed(mixture, x, max_iter=1000)
    given = (prior.mean.numpy(), prior.mean_precision, prior.degrees_of_freedom, prior.scale_matrix.numpy())

    def density(weights, locs, covariances):
        joint = oracles.gaussian_mixture_log_joint(x.numpy(), weights, locs, covariances, kind)
        penalty = oracles.mixture_log_prior(weights, locs, covariances, kind, 1.7, given)
        return np.logaddexp.reduce(joint, axis=1).sum() + penalty

    best = natural(mixture)
    top = density(*best)
    assert fit.elbo * 60 == pytest.approx(top, abs=1e-8)
    generator = np.random.default_rng(0)
    for _ in range(40):
        weights = best[0] * np.exp(0.01 * generator.normal(size=3))
        locs = best[1] + 0.01 * generator.normal(size=(3, 2))
        shift = 0.01 * generator.normal(size=best[2].shape)
        covariances = best[2] * (1 + (shift + np.swapaxes(shift, -1, -2) if kind in ("full", "tied") else shift))
        assert density(weights / weights.sum(), locs, covariances) < top


def test_a_fit_with_a_prior_is_a_point_estimate():
    x = clusters(n=60, d=2)
    mixture = lvm.GaussianMixture(2, 2, prior=lvm.priors.weakly_informative(x, 2))
    fit = lvm.em(mixture, x, seed=0)
    torch.testing.assert_close(fit.posterior(x, num_draws=2, seed=0)["locs"][0], mixture.locs, rtol=1e-9, atol=1e-9)
    right = oracles.gaussian_mixture_log_joint(x.numpy(), *natural(mixture), "full")
    np.testing.assert_allclose(fit.log_prob(x, 1), np.logaddexp.reduce(right, axis=1), atol=1e-9)
    with pytest.raises(lvm.ProgramError, match="point estimates"):
        fit.loo(x)


def test_svi_stays_where_em_has_arrived(faithful):
    mixture = lvm.GaussianMixture(2, 2)
    fit = lvm.em(mixture, faithful, seed=0, tol=1e-12)
    again = lvm.fit(mixture, faithful, steps=50, lr=1e-3, seed=0)
    assert again.elbo == pytest.approx(fit.elbo, abs=1e-6)


@pytest.mark.parametrize("covariance", KINDS)
def test_labels_units_and_places_do_not_matter(covariance):
    x, given = clusters(), responsibilities(200, 3)
    unit, shift = 1e3, torch.tensor([1e5, -1e5, 0.0], dtype=torch.float64)
    fit = climbed(lvm.GaussianMixture(3, 3, covariance), x, init=given, max_iter=20)
    moved = climbed(lvm.GaussianMixture(3, 3, covariance), x * unit + shift, init=given[:, [2, 0, 1]], max_iter=20)
    assert moved.elbo + np.log(1e3) * 3 == pytest.approx(fit.elbo, abs=1e-7)
    np.testing.assert_allclose(moved.params["weights"], fit.params["weights"][[2, 0, 1]], atol=1e-7)


def source(kind, x, tmp_path):
    if kind == "memmap":
        path = tmp_path / "x.npy"
        np.save(path, x.numpy())
        return np.load(path, mmap_mode="r")
    if kind == "loader":
        return DataLoader(TensorDataset(x), batch_size=64)
    return {"array": x.numpy(), "dataset": TensorDataset(x), "tensor": x}[kind]


@pytest.mark.parametrize("kind", ["array", "memmap", "dataset", "loader"])
@pytest.mark.parametrize("program", [lambda: lvm.GaussianMixture(3, 3), lambda: lvm.PPCA(3, 1)])
def test_data_of_every_kind(program, kind, tmp_path):
    x = clusters()
    right = climbed(program(), x, max_iter=5)
    found = climbed(program(), source(kind, x, tmp_path), max_iter=5)
    assert found.elbo == pytest.approx(right.elbo, abs=1e-10)


def test_blocks_add_up_to_the_whole():
    x, given = clusters(), torch.tensor(responsibilities(200, 3))
    ends = []
    for rows_at_once in (7, 64, 1000):
        steps = lvm.GaussianMixture(3, 3).double().expectation_maximisation(Blocks(as_rows(x), rows_at_once))
        parameters = steps.start(given, 0)
        found = steps.expectation(parameters)
        ends.append((found.objective, steps.maximisation(parameters, found.statistics)[0]["covariances"]))
    for objective, covariances in ends[1:]:
        assert objective == pytest.approx(ends[0][0], abs=1e-9)
        torch.testing.assert_close(covariances, ends[0][1], atol=1e-11, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_statistics_are_what_measuring_every_row_gives(kind, monkeypatch):
    x, given = clusters() * torch.tensor([1.0, 1e4, 1e-4]) + 1e3, responsibilities(200, 3)
    ends = []
    for most in (mixture_statistics.MOST_CANCELLATION, 0.0):
        monkeypatch.setattr(mixture_statistics, "MOST_CANCELLATION", most)
        ends.append(climbed(lvm.GaussianMixture(3, 3, covariance=kind, reg_covar=1e-12), x, init=given, max_iter=15))
    # what cancels leaves ten digits in each of fifteen steps; how far they differ hangs on the processor
    assert ends[0].elbo == pytest.approx(ends[1].elbo, rel=1e-9)
    for name, value in ends[0].params.items():
        torch.testing.assert_close(value, ends[1].params[name], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_narrow_components_far_apart_keep_their_digits(kind):
    generator = np.random.default_rng(0)
    side = np.arange(400) % 2
    x = generator.normal(size=(400, 2)) * 1e-5 + np.where(side, 1.0, -1.0)[:, None]
    mixture = lvm.GaussianMixture(2, 2, covariance=kind, reg_covar=0.0)
    fit = climbed(mixture, torch.tensor(x), init=np.eye(2)[side], max_iter=20)
    right = np.stack([np.cov(x[side == k].T, bias=True) for k in (0, 1)])
    found = oracles.gaussian_mixture_matrices(mixture.covariances.detach().numpy(), kind, 2, 2)
    diagonal = np.eye(2, dtype=bool) if kind == "diag" else np.ones((2, 2), dtype=bool)
    np.testing.assert_allclose(found[:, diagonal], right[:, diagonal], rtol=1e-8, atol=1e-18)
    assert (np.diff(fit.history["elbo"]) >= -1e-9).all()


def test_single_precision_is_computed_in_double():
    x = clusters()
    mixture = lvm.GaussianMixture(3, 3)
    fit = lvm.em(mixture, x.float(), seed=0)
    assert fit.params["locs"].dtype is torch.float32
    assert fit.info["cast"] is None or "float32" in fit.info["cast"]
    right = lvm.em(lvm.GaussianMixture(3, 3), x.float().double(), seed=0)
    assert fit.elbo == pytest.approx(right.elbo, abs=1e-9)


def test_the_best_of_several_starts_and_the_same_seed_again(global_generators_stay):
    x = clusters(k=5, seed=5, spread=3.0)
    many = climbed(lvm.PPCA(3, 1), x, n_init=3, max_iter=4, seed=7)
    single = [climbed(lvm.PPCA(3, 1), x, max_iter=4, seed=7 + number).elbo for number in range(3)]
    assert many.elbo == max(single)
    assert len(set(single)) == 3
    assert climbed(lvm.PPCA(3, 1), x, n_init=3, max_iter=4, seed=7).elbo == many.elbo


def test_it_goes_on_from_where_a_program_is():
    x, mixture = clusters(), lvm.GaussianMixture(3, 3)
    climbed(mixture, x, init=responsibilities(200, 3), max_iter=4)
    fit = climbed(mixture, x, init=mixture.constrained(), max_iter=3)
    right = climbed(lvm.GaussianMixture(3, 3), x, init=responsibilities(200, 3), max_iter=7)
    assert fit.elbo == pytest.approx(right.elbo, abs=1e-9)
    ppca = lvm.PPCA(3, 1)
    climbed(ppca, x, max_iter=4)
    fit = climbed(ppca, x, init=ppca.constrained(), max_iter=3)
    assert fit.elbo == pytest.approx(climbed(lvm.PPCA(3, 1), x, max_iter=7).elbo, abs=1e-9)


def test_the_record_is_that_of_a_fit(faithful):
    fit = lvm.em(lvm.GaussianMixture(2, 2), faithful, init=faithful[:2], seed=0)
    assert fit.info["estimator"] == "EM"
    assert fit.info["stopped"] == f"converged after {fit.info['steps']} iterations"
    assert fit.info["steps"] == len(fit.history["elbo"]) > 2
    assert fit.history["elbo"][-1] == fit.elbo
    assert fit.history["loss"][-1] == pytest.approx(-272 * fit.elbo)
    assert fit.responsibilities(faithful).shape == (272, 2)
    assert "Fit of GaussianMixture to 272 data by EM" in repr(fit)
    assert lvm.plots.loss(fit) is not None


# --- K-means -----------------------------------------------------------------------------------------------------


def test_hard_assignments_are_kmeans():
    x = clusters(n=300, k=4, spread=3.0)
    means = x[:4]
    mixture = lvm.GaussianMixture(4, 3, covariance="diag")
    start = np.linalg.norm(x.numpy()[:, None] - means.numpy(), axis=-1).argmin(1)
    centres, inertia = oracles.lloyd(x.numpy(), np.stack([x.numpy()[start == k].mean(0) for k in range(4)]))
    fit = lvm.em(mixture, x, init=means, hard=True, tol=0.0)
    np.testing.assert_allclose(mixture.locs.detach(), centres, atol=1e-9)
    assert fit.history["loss"][-1] == pytest.approx(inertia, rel=1e-12)
    assert (np.diff(fit.history["loss"]) <= 0).all()
    assert fit.info["estimator"] == "K-means"
    # and the mixture is that of the clusters
    labels = np.linalg.norm(x.numpy()[:, None] - centres, axis=-1).argmin(1)
    np.testing.assert_allclose(mixture.weights.detach(), np.bincount(labels) / 300, atol=1e-12)
    within = np.stack([x.numpy()[labels == k].var(0) for k in range(4)])
    np.testing.assert_allclose(mixture.covariances.detach(), within, atol=1e-9)
    right = oracles.gaussian_mixture_log_joint(x.numpy(), *natural(mixture), "diag")
    assert fit.elbo == pytest.approx(np.logaddexp.reduce(right, axis=1).mean(), abs=1e-9)


def test_it_is_the_limit_of_em_as_the_components_shrink():
    x = clusters(n=300, k=4, spread=3.0).numpy()
    mixture = lvm.GaussianMixture(4, 3)
    fit = lvm.em(mixture, torch.tensor(x), init=torch.tensor(x[:4]), hard=True, tol=0.0)
    centres = mixture.locs.detach().numpy()
    nearest = np.eye(4)[np.linalg.norm(x[:, None] - centres, axis=-1).argmin(1)]
    scaled_bound = []
    gap = []
    for sigma in (1.0, 0.1, 0.01):
        joint = oracles.gaussian_mixture_log_joint(x, np.full(4, 0.25), centres, np.full(4, sigma**2), "spherical")
        soft = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))
        gap.append(np.abs(soft - nearest).max())
        constant = len(x) * (3 * np.log(sigma * np.sqrt(2 * np.pi)) + np.log(4))
        scaled_bound.append(-2 * sigma**2 * (np.logaddexp.reduce(joint, axis=1).sum() + constant))
        if sigma == 0.01:  # an M-step from these soft assignments moves no centre any more
            np.testing.assert_allclose(soft.T @ x / soft.sum(0)[:, None], centres, atol=1e-6)
    assert gap[0] > gap[1] > gap[2]
    assert gap[2] < 1e-6
    assert scaled_bound[-1] == pytest.approx(fit.history["loss"][-1], rel=1e-6)


# --- degenerate data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_component_is_the_moments(kind):
    x = clusters()
    mixture = lvm.GaussianMixture(1, 3, covariance=kind, reg_covar=0.0)
    lvm.em(mixture, x, seed=0)
    covariance = np.cov(x.numpy().T, bias=True)
    right = {
        "full": covariance[None],
        "tied": covariance,
        "diag": np.diag(covariance)[None],
        "spherical": np.array([np.diag(covariance).mean()]),
    }[kind]
    np.testing.assert_allclose(mixture.covariances.detach(), right, rtol=1e-9)
    np.testing.assert_allclose(mixture.locs[0].detach(), x.mean(0), atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_collinear_and_constant_features_and_duplicated_rows_stop_at_the_floor(kind):
    x = clusters(n=40, d=2)
    x = torch.cat([x, x[:, :1] * 2, torch.full((40, 1), 3.0, dtype=torch.float64)], 1).repeat(2, 1)
    mixture = lvm.GaussianMixture(2, 4, covariance=kind, reg_covar=1e-4)
    fit = climbed(mixture, x, max_iter=100)
    values = mixture.covariances.detach()
    smallest = torch.linalg.eigvalsh(values).min() if kind in ("full", "tied") else values.min()
    assert float(smallest) >= 1e-4 * (1 - 1e-6)
    assert (np.diff(fit.history["elbo"]) >= -1e-9).all()


def test_a_component_on_one_row_stops_at_the_floor():
    x = torch.cat([clusters(n=50, d=2), torch.full((1, 2), 50.0, dtype=torch.float64)])
    mixture = lvm.GaussianMixture(2, 2, reg_covar=1e-3)
    given = np.zeros((51, 2))
    given[:50, 0] = given[50, 1] = 1.0
    fit = lvm.em(mixture, x, init=given)
    np.testing.assert_allclose(mixture.covariances[1].detach(), 1e-3 * np.eye(2), atol=1e-9)
    assert np.isfinite(fit.elbo)


def test_an_empty_component_is_told():
    x, given = clusters(), np.zeros((200, 2))
    given[:, 0] = 1.0
    with pytest.warns(lvm.ProgramWarning, match=r"component \[1\] ended without rows: ask for fewer"):
        fit = lvm.em(lvm.GaussianMixture(2, 3), x, init=given)
    assert float(fit.params["weights"][1]) < 1e-12
    assert fit.params["locs"].isfinite().all()


# --- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": torch.zeros(5, 3)}, r"init has shape \(5, 3\): pass means of shape \(2, 3\), responsibilities"),
        ({"init": {"weights": torch.ones(2)}}, "init has weights: pass weights"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"n_init": 0}, "n_init is 0"),
        ({"n_init": 2, "init": torch.zeros(2, 3)}, "n_init=2 starts from one init"),
        ({"tol": -1.0}, "tol is -1.0"),
        ({"missing": "drop"}, "missing='drop' is not known"),
    ],
)
def test_arguments_that_make_no_sense(options, words):
    mixture = lvm.GaussianMixture(2, 3)
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        lvm.em(mixture, clusters(), seed=0, **options)
    assert all(torch.equal(value, before[name]) for name, value in mixture.state_dict().items())


def test_data_that_make_no_sense():
    x = clusters()
    with pytest.raises(ValueError, match="expected shape \\(n, 2\\)"):
        lvm.em(lvm.GaussianMixture(2, 2), x)
    with pytest.raises(ValueError, match="2 arrays"):
        lvm.em(lvm.GaussianMixture(2, 3), (x, x))
    holes = x.clone()
    holes[3, 1] = torch.nan
    with pytest.raises(ValueError, match="missing='marginalize'"):
        lvm.em(lvm.GaussianMixture(2, 3), holes)
    holes[3, 1] = torch.inf
    with pytest.raises(ValueError, match="infinite"):
        lvm.em(lvm.GaussianMixture(2, 3), holes, missing="marginalize")
    with pytest.raises(ValueError, match=r"columns \[1\] of x are constant"):
        lvm.em(lvm.FactorAnalysis(3, 1), torch.stack([x[:, 0], torch.ones(200), x[:, 1]], 1))
    with pytest.raises(ValueError, match="hard=True assigns rows to components"):
        lvm.em(lvm.PPCA(3, 1), x, hard=True)
    with pytest.raises(lvm.ProgramError, match="has no closed-form steps"):
        lvm.em(lvm.VAE(3, 1, likelihood="normal"), x)
    with pytest.raises(ValueError, match=r"concentration is 0\.5: below 1 the density"):
        lvm.em(lvm.GaussianMixture(2, 3, prior=lvm.priors.weakly_informative(x, 2, concentration=0.5)), x, seed=0)


def test_a_fit_that_was_stopped_early_says_so():
    with pytest.warns(lvm.ProgramWarning, match="max_iter=2 reached; its last iteration still gained"):
        lvm.em(lvm.GaussianMixture(3, 3), clusters(), init=responsibilities(200, 3), max_iter=2, tol=1e-12)


# --- a program of one's own --------------------------------------------------------------------------------------


class Coin(nn.Module):
    """Two coins, thrown in rows; EM's textbook example, with a fault to plant."""

    def __init__(self, fault=0.0):
        super().__init__()
        self.chances = nn.Parameter(torch.tensor([0.3, 0.6], dtype=torch.float64))
        self.fault = fault

    def model(self, x, size=None):
        with lvm_plate(size or len(x), x):
            coin = pyro_sample("coin", "categorical")
            lvm_bernoulli("x", self.chances[coin], x)

    def guide(self, x, size=None):
        pass

    def expectation_maximisation(self, data, *, hard):
        return CoinSteps(self, data, self.fault)


def lvm_plate(size, x):
    import pyro

    return pyro.plate("data", size, subsample=x)


def pyro_sample(name, _):
    import pyro
    import pyro.distributions as dist

    even = torch.tensor([0.5, 0.5], dtype=torch.float64)
    return pyro.sample(name, dist.Categorical(even), infer={"enumerate": "parallel"})


def lvm_bernoulli(name, chance, x):
    import pyro
    import pyro.distributions as dist

    return pyro.sample(name, dist.Bernoulli(chance.unsqueeze(-1).expand(*chance.shape, x.shape[-1])).to_event(1), obs=x)


class CoinSteps:
    def __init__(self, coin, data, fault):
        self.coin, self.data, self.fault = coin, data, fault

    def start(self, init, seed):
        return {"chances": self.coin.chances.detach().clone()}

    def expectation(self, parameters):
        p = parameters["chances"]

        def part(x):
            heads, tails = x.sum(-1, keepdim=True), (1 - x).sum(-1, keepdim=True)
            joint = heads * p.log() + tails * (1 - p).log() + np.log(0.5)
            r = joint.softmax(-1)
            return joint.logsumexp(-1).sum(), (r * heads).sum(0), (r * tails).sum(0)

        evidence, heads, tails = self.data.total(part)
        return Expectation(float(evidence), (heads, tails))

    def maximisation(self, parameters, statistics):
        heads, tails = statistics

        def expected(p):
            return float((heads * p.log() + tails * (1 - p).log()).sum())

        new = heads / (heads + tails)
        new = new + self.fault * (parameters["chances"].flip(0) - new)
        return {"chances": new}, expected(new) - expected(parameters["chances"])

    def apply(self, parameters):
        with torch.no_grad():
            self.coin.chances.copy_(parameters["chances"])


def throws():
    generator = torch.Generator().manual_seed(0)
    chance = torch.tensor([0.2, 0.8])[torch.arange(100) % 2].unsqueeze(-1).expand(100, 8)
    return torch.bernoulli(chance, generator=generator).double()


def test_a_program_of_ones_own_has_em_by_one_method():
    fit = lvm.em(Coin(), throws(), tol=1e-12)
    gradients = lvm.fit(Coin(), throws(), steps=600, lr=0.01, seed=0)
    assert fit.elbo == pytest.approx(gradients.elbo, abs=1e-6)
    torch.testing.assert_close(fit.params["chances"], gradients.params["chances"], atol=1e-4, rtol=0)


def test_pressing_ctrl_c_keeps_what_there_is(monkeypatch):
    counted = CoinSteps.maximisation
    calls = []

    def interrupted(self, parameters, statistics):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counted(self, parameters, statistics)

    monkeypatch.setattr(CoinSteps, "maximisation", interrupted)
    coin = Coin()
    fit = lvm.em(coin, throws(), tol=0.0, n_init=5)
    assert fit.info["stopped"] == "interrupted after 2 iterations"
    assert len(fit.history["elbo"]) == 2
    assert torch.equal(coin.chances.detach(), fit.params["chances"])


def test_a_wrong_m_step_is_found_out():
    coin = Coin(fault=0.9)
    with pytest.raises(lvm.ProgramError, match="iteration 1: the M-step lowered the bound"):
        lvm.em(coin, throws())
    assert torch.equal(coin.chances.detach(), torch.tensor([0.3, 0.6], dtype=torch.float64))

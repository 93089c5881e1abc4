"""Bayesian PPCA against Bishop's rounds by hand, its own program by brute force, and data of known rank."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_lvm as lvm
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.inference import bound as evaluated
from pyro_lvm.models import bayesian_ppca_updates


def of_rank(rank: int = 2, n: int = 60, d: int = 4, noise: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    loadings = normal(d, rank) * torch.linspace(2.0, 1.0, rank, dtype=torch.float64)
    return 5 + normal(n, rank) @ loadings.mT + noise * normal(n, d)


def ascend(x: Any, latent_dim: int | None = None, **options: Any) -> tuple[lvm.Fit, lvm.BayesianPPCA]:
    ppca = lvm.BayesianPPCA(x.shape[1], latent_dim, shape=0.02, rate=0.03, mean_precision=0.004)
    options.setdefault("seed", 0)
    return lvm.coordinate_ascent(ppca, x, **options), ppca


@pytest.mark.parametrize("rounds", [1, 6])
def test_rounds_and_bound_are_bishops(rounds):
    x, start = of_rank(), of_rank(1, 4, 3, seed=5) - 5
    fit, _ = ascend(x, 3, init=start, max_iter=rounds, tol=0.0)
    location, scale = x.mean(0).numpy(), x.var(0, correction=0).mean().sqrt().item()
    u = (x.numpy() - location) / scale
    q, bound = oracles.bayesian_ppca_rounds(u, start.numpy() / scale, 0.5, rounds, 0.02, 0.03, 0.004)
    assert fit.elbo * 60 == pytest.approx(bound - 60 * 4 * math.log(scale), abs=1e-8 * abs(bound))
    root = fit.params["loadings_scale_tril"].numpy()
    ours = {name: fit.params[name].numpy() for name in ("loadings", "mean", "mean_scale", "relevance_rate")}
    expected = {name: scale * q[name] for name in ("loadings", "mean_scale")}
    expected |= {"mean": location + scale * q["mean"], "relevance_rate": q["relevance_rate"]}
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-8, atol=1e-8, err_msg=name)
    np.testing.assert_allclose(root @ root.T, scale**2 * q["loadings_covariance"], rtol=1e-8)
    assert fit.params["precision_rate"].item() == pytest.approx(scale**2 * float(q["precision_rate"]), rel=1e-9)
    assert fit.params["precision_shape"].item() == pytest.approx(0.02 + 120)


def test_the_bound_is_the_programs_own_by_brute_force(monkeypatch):
    x = of_rank(n=40)
    fit, _ = ascend(x, max_iter=1)
    monkeypatch.setattr(evaluated, "MIN_FREEDOM", 60)
    evaluation = Evaluation.of(fit, x)
    with evaluation.running(0):
        brute = evaluated.mean_elbo(evaluation.bound, evaluation.structure, evaluation.rows, None, 3)
    assert brute.standard_error < 0.02
    assert abs(brute.elbo - fit.elbo) < 4 * brute.standard_error
    # the divergences that have a closed form, at the guide's own parameters
    assert set(fit.history["kl"]) == {"relevance", "loadings", "mean", "precision", "z"}
    total = fit.history["reconstruction"]["x"][-1] - sum(values[-1] for values in fit.history["kl"].values())
    assert total == pytest.approx(fit.elbo, abs=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_factors_beyond_the_rank_are_switched_off(rank):
    x = of_rank(rank, 300, 10, 0.5)
    ppca = lvm.BayesianPPCA(10)
    fit = lvm.coordinate_ascent(ppca, x, max_iter=2000, tol=1e-9)
    assert fit.info["stopped"].startswith("converged")
    assert (np.diff(fit.history["elbo"]) > -1e-11).all()
    explained = ppca.explained_variances()
    assert (explained > 1e-3 * explained.sum()).tolist() == [j < rank for j in range(9)]
    assert explained[rank:].sum() < 1e-6 * explained.sum()
    noise = (fit.params["precision_rate"] / fit.params["precision_shape"]).sqrt().item()
    assert noise == pytest.approx(0.5, rel=0.05)


def test_gradients_in_the_same_family_climb_to_the_same_bound():
    x = of_rank(1, 60, 3, noise=1.0)
    ppca = lvm.BayesianPPCA(3, 2, shape=0.02, rate=0.03, mean_precision=0.004).double()
    ppca.initialize(x, seed=0)
    with torch.no_grad():  # away from the principal axes, and with half the noise
        ppca._precision[0] += 0.7
        ppca._loadings += torch.tensor([[0.2, -0.1], [0.1, 0.1], [-0.1, 0.2]])
    ascent = lvm.coordinate_ascent(copy.deepcopy(ppca), x, tol=1e-10, max_iter=3000)
    fit = lvm.fit(ppca, x, steps=500, seed=0, progress=False)
    assert sum(fit.history["elbo"][:10]) / 10 < ascent.elbo - 0.05
    assert abs(fit.elbo - ascent.elbo) < 0.01 + 4 * fit.info["elbo_se"]
    assert fit.elbo < ascent.elbo + 4 * fit.info["elbo_se"]
    assert fit.info["estimator"].startswith("TraceMeanField")


def test_units_and_place_do_not_matter():
    x = of_rank()
    (fit, ppca), (other, far) = (ascend(data, max_iter=30) for data in (x, 1e4 * x - 1e6))
    assert other.elbo == pytest.approx(fit.elbo - 4 * math.log(1e4), abs=1e-8)
    torch.testing.assert_close(far.loadings, 1e4 * ppca.loadings, rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(other.params["mean"], 1e4 * fit.params["mean"] - 1e6)


def test_rows_blocks_and_precision_do_not_matter(monkeypatch):
    x = of_rank()
    fit, _ = ascend(x, max_iter=20)
    assert ascend(x.flip(0), max_iter=20)[0].elbo == pytest.approx(fit.elbo, abs=1e-10)
    single, ppca = ascend(x.float(), max_iter=20)
    assert single.elbo == pytest.approx(ascend(x.float().double(), max_iter=20)[0].elbo, abs=1e-10)
    assert ppca.loadings.dtype == torch.float32
    assert single.log_prob(x[:5], 5, seed=0).isfinite().all()
    monkeypatch.setattr(bayesian_ppca_updates, "BLOCK", 7)
    assert ascend(x, max_iter=20)[0].elbo == pytest.approx(fit.elbo, abs=1e-10)
    assert ascend(x.numpy(), max_iter=20)[0].elbo == pytest.approx(fit.elbo, abs=1e-10)


def test_awkward_data():
    x = of_rank()
    collinear = torch.cat([x, 2 * x[:, :1]], -1)
    few = of_rank(2, 4, 8)
    exact = of_rank(1, 50, 4, noise=0.0)
    for data in (collinear, few, exact):
        fit, _ = ascend(data, max_iter=300)
        assert math.isfinite(fit.elbo)
        assert (np.diff(fit.history["elbo"]) > -1e-9 * max(1, abs(fit.elbo))).all()


def test_every_method_of_the_fit_works():
    x = of_rank()
    fit, ppca = ascend(x)
    draws = fit.posterior(x[:7], 400, seed=0)
    assert draws["z"].shape == (400, 7, 3)
    error = draws["z"].std(0) / 20
    assert ((draws["z"].mean(0) - ppca.encode(x[:7]).mean).abs() < 4.5 * error).all()
    for name in ("loadings", "mean"):
        error = draws[name].std(0) / 20
        assert ((draws[name].mean(0) - fit.params[name]).abs() < 4.5 * error).all()
    mean_precision = fit.params["precision_shape"] / fit.params["precision_rate"]
    assert (draws["precision"].mean() - mean_precision).abs() < 4.5 * draws["precision"].std() / 20
    assert fit.log_prob(x, 100, seed=0).mean() > fit.elbo
    exported = fit.to_arviz(x[:9], 10, seed=0)
    assert exported.posterior["loadings"].dims == ("chain", "draw", "feature", "latent")
    with pytest.raises(ProgramError, match="responsibilities are of one enumerated site"):
        fit.responsibilities(x)


def test_the_model_draws_and_its_particles_vectorise():
    ppca = lvm.BayesianPPCA(4, 2, shape=3.0, rate=3.0, mean_precision=1.0).double()
    assert ppca.model(size=6).shape == (6, 4)
    x = of_rank()
    ppca.initialize(x, seed=0)
    losses = {}
    for vectorised in (False, True):
        elbo = Trace_ELBO(num_particles=400, vectorize_particles=vectorised, max_plate_nesting=1)
        with torch.no_grad():
            losses[vectorised] = elbo.loss(ppca.model, ppca.guide, x) / len(x)
    assert losses[True] == pytest.approx(losses[False], abs=0.05)


@pytest.mark.parametrize("guide", [None, "mean_field"])
def test_it_obeys_the_laws_of_programs(guide):
    lvm.testing.check_program(lvm.BayesianPPCA(4, 2, shape=1.0, rate=1.0).double(), of_rank(n=30), guide=guide)


def test_it_starts_at_the_principal_axes_goes_on_and_forgets():
    x = of_rank()
    ppca = lvm.BayesianPPCA(4, 2).double()
    ppca.initialize(x, seed=0)
    closed = lvm.PPCA.closed_form(x, 2)
    torch.testing.assert_close(ppca.loadings @ ppca.loadings.mT, closed.loadings @ closed.loadings.mT)
    before = ppca.loadings.clone()
    ppca.initialize(3 * x, seed=1)
    torch.testing.assert_close(ppca.loadings, before)
    first = lvm.coordinate_ascent(ppca, x, max_iter=5, tol=0.0)
    second = lvm.coordinate_ascent(ppca, x, max_iter=5, tol=0.0)
    straight = lvm.coordinate_ascent(lvm.BayesianPPCA(4, 2).double(), x, max_iter=10, tol=0.0)
    assert second.elbo == pytest.approx(straight.elbo, abs=1e-10)
    assert second.history["elbo"][0] > first.elbo - 1e-12
    starts = lvm.coordinate_ascent(ppca, x, n_init=2, max_iter=3, seed=1)
    assert len(set(starts.info["elbos"])) == 2
    assert set(ppca.initial_values()) == {"relevance", "loadings", "mean", "precision"}
    ppca.reset_parameters()
    assert not ppca.is_initialized
    assert not ppca.location.any()


def test_a_guide_built_from_the_model_trains():
    x = of_rank(1, 20, 3)
    ppca = lvm.BayesianPPCA(3, 1, shape=0.1, rate=0.1)
    fit = lvm.fit(ppca, x, guide="mean_field", steps=100, seed=0, progress=False)
    assert fit.history["elbo"][-1] > fit.history["elbo"][0]
    assert math.isfinite(fit.elbo)


def test_errors_say_what_came_and_what_was_expected():
    x = of_rank()
    with pytest.raises(ValueError, match="latent_dim is 4 and num_features is 4: there must be at least 1 component"):
        lvm.BayesianPPCA(4, 4)
    with pytest.raises(ValueError, match="rate is 0; it must be positive and finite"):
        lvm.BayesianPPCA(4, rate=0)
    ppca = lvm.BayesianPPCA(4)
    with pytest.raises(ValueError, match=r"x has shape \(60, 3\), but num_features=4 asks for \(n, 4\)"):
        lvm.coordinate_ascent(ppca, x[:, :3])
    with pytest.raises(ValueError, match="x is constant over the 60 rows"):
        lvm.coordinate_ascent(ppca, torch.ones(60, 4))
    with pytest.raises(ValueError, match=r"init has shape \(4, 2\): pass finite loadings .* here \(4, 3\)"):
        lvm.coordinate_ascent(ppca, x, init=torch.ones(4, 2))
    with pytest.raises(ValueError, match="say how many rows to draw"):
        ppca.model()
    with pytest.raises(ValueError, match="the guide conditions on data"):
        ppca.guide()
    assert not ppca.is_initialized

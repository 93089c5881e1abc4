"""Choosing between programs: the criteria against scikit-learn and arithmetic, and what is refused."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_iris

import pyro_lvm as lvm


def three_clusters(n=300, spread=8.0):
    generator = np.random.default_rng(0)
    centers = spread * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    return torch.tensor(centers[np.arange(n) % 3] + generator.normal(size=(n, 2)))


def mixtures(kind="full", prior=None):
    return {f"K={k}": lvm.GaussianMixture(k, 2, covariance=kind, prior=prior) for k in (1, 2, 3, 4)}


def test_bic_is_scikit_learns_and_finds_the_clusters():
    from sklearn.mixture import GaussianMixture

    x = three_clusters()
    chosen = lvm.select(x, mixtures(), criterion="bic", seed=0)
    assert chosen.best.name == "K=3"
    for k in (1, 2, 3):
        right = GaussianMixture(k, n_init=5, random_state=0, tol=1e-8, max_iter=500).fit(x.numpy()).bic(x.numpy())
        assert -2 * 300 * chosen[f"K={k}"].score == pytest.approx(right, abs=0.05)
    assert [c.difference for c in chosen.candidates] == sorted((c.difference for c in chosen.candidates), reverse=True)
    assert chosen.best.difference == 0.0
    assert chosen.best.fit.program.num_components == 3


def test_bic_chooses_a_latent_dimension_between_families():
    loadings = np.random.default_rng(1).normal(size=(6, 2)) * 2
    x = torch.tensor(np.random.default_rng(2).normal(size=(400, 2)) @ loadings.T)
    x = x + torch.tensor(np.random.default_rng(3).normal(size=(400, 6)) * [0.3, 0.5, 1.0, 1.5, 2.0, 3.0])
    candidates = {f"FA {q}": lvm.FactorAnalysis(6, q) for q in (1, 2, 3)} | {"PPCA 2": lvm.PPCA(6, 2)}
    assert lvm.select(x, candidates, seed=0).best.name == "FA 2"


def test_rows_held_out_are_the_same_for_all_and_unseen():
    x = three_clusters()
    chosen = lvm.select(x, mixtures(), criterion="heldout", heldout=0.25, seed=3)
    assert chosen.best.name in ("K=3", "K=4")
    assert chosen["K=1"].difference < -4 * chosen["K=1"].difference_standard_error
    fits = {candidate.name: candidate.fit for candidate in chosen.candidates}
    assert {fit.info["n"] for fit in fits.values()} == {225}
    # one normal: its held-out density by scipy from the rows it was fitted to
    mean, covariance = (fits["K=1"].program.locs[0].detach(), fits["K=1"].program.covariances[0].detach())
    density = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    total = density.sum()
    seen = fits["K=1"].elbo * 225
    assert float((total - seen) / 75) == pytest.approx(chosen["K=1"].score, abs=1e-9)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
def test_leave_one_out_of_bayesian_mixtures():
    x = three_clusters(n=90)
    candidates = mixtures(prior=lvm.priors.weakly_informative(x, 3))
    chosen = lvm.select(x, candidates, criterion="loo", num_samples=300, seed=0)
    assert chosen.best.name in ("K=3", "K=4")
    assert chosen["K=1"].difference < -3 * chosen["K=1"].difference_standard_error
    assert chosen.best.standard_error > 0


def test_any_program_by_a_fitter_of_ones_own():
    def normal(x, size=None):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def laplace(x, size=None):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Laplace(loc, 1.0), obs=x)

    x = torch.distributions.Laplace(0.0, 1.0).icdf(torch.linspace(0.01, 0.99, 200))
    chosen = lvm.select(
        x,
        {"normal": (normal, lambda x, size=None: None), "laplace": (laplace, lambda x, size=None: None)},
        criterion="heldout",
        fitter=lambda program, data, seed: lvm.fit(program, data, steps=50, seed=seed),
        seed=0,
    )
    assert chosen.best.name == "laplace"


def test_the_table_and_the_picture():
    chosen = lvm.select(three_clusters(), mixtures("diag"), seed=0)
    text = repr(chosen)
    assert text.splitlines()[0].startswith("by bic")
    assert text.splitlines()[1].startswith("K=3")
    figure = lvm.plots.selection(chosen)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][-1] == "K=3"
    with pytest.raises(KeyError, match="no candidate 'K=9'"):
        chosen["K=9"]


def test_what_it_refuses():
    x = torch.tensor(load_iris().data)
    with pytest.raises(ValueError, match="criterion='aic' is not known"):
        lvm.select(x, {"a": lvm.PPCA(4, 1)}, criterion="aic")
    with pytest.raises(ValueError, match="at least one program by its name"):
        lvm.select(x, {})
    with pytest.raises(lvm.ProgramError, match="VAE has no closed-form fit: pass one"):
        lvm.select(x, {"a": lvm.VAE(4, 1, likelihood="normal")}, seed=0)
    with pytest.raises(lvm.ProgramError, match="'a' does not say its num_parameters"):
        lvm.select(
            x,
            {"a": lvm.VAE(4, 1, hidden=(4,), likelihood="normal")},
            fitter=lambda program, data, seed: lvm.fit(program, data, steps=2, seed=seed),
            seed=0,
        )
    with pytest.raises(lvm.ProgramError, match="point estimates"):
        lvm.select(x, {"a": lvm.PPCA(4, 1)}, criterion="loo", seed=0)

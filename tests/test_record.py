"""The record of a fit: it evaluates with the parameters it ended with, and averages over their posterior."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import torch
from pyro.infer import TraceEnum_ELBO
from small_programs import rows
from torch.distributions import constraints

import pyro_lvm as lvm

N = 8
X = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def conjugate(x: torch.Tensor, size: int | None = None) -> None:
    m = pyro.sample("m", dist.Normal(x.new_tensor(0.5), 2.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(m, 0.8), obs=x)


def conjugate_guide(x: torch.Tensor, size: int | None = None) -> None:
    loc = pyro.param("loc", x.new_tensor(0.3))
    pyro.sample("m", dist.Normal(loc, pyro.param("scale", x.new_tensor(0.4), constraint=constraints.positive)))


def labels(x: torch.Tensor, size: int | None = None) -> None:
    locs = pyro.sample("locs", dist.Normal(x.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("data", size or len(x), subsample=x):
        k = pyro.sample("component", dist.Categorical(x.new_tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[k], 0.8), obs=x)


def labels_guide(x: torch.Tensor, size: int | None = None) -> None:
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    pyro.sample("locs", dist.Normal(loc, 0.5).to_event(1))


@pytest.fixture(scope="module")
def fitted() -> lvm.Fit:
    return lvm.fit((conjugate, conjugate_guide), X, steps=1, lr=1e-9, seed=0)


@pytest.fixture(scope="module")
def labelled() -> lvm.Fit:
    return lvm.fit((labels, labels_guide), X, steps=1, lr=1e-9, seed=0)


def test_log_prob_averages_over_the_posterior_of_the_parameters(fitted):
    draws = 800
    found = fitted.log_prob(X, num_samples=draws, seed=0)
    expected = oracles.normal_logpdf(X.numpy(), 0.3, math.hypot(0.4, 0.8))
    m = np.random.default_rng(0).normal(0.3, 0.4, 20_000)
    density = np.exp(oracles.normal_logpdf(X.numpy()[:, None], m, 0.8))
    error = density.std(-1) / density.mean(-1) / math.sqrt(draws)
    assert found.shape == (N,)
    assert np.all(np.abs(found.numpy() - expected) < 4.5 * error)
    other = torch.zeros(3, dtype=torch.float64)  # new data, of another number
    assert fitted.log_prob(other, 5).shape == (3,)


def test_responsibilities_average_over_the_posterior_of_the_parameters(labelled):
    draws = 400
    found = labelled.responsibilities(X, num_samples=draws, seed=0).numpy()
    locs = np.random.default_rng(0).normal([-1.0, 1.0], 0.5, (4000, 2))
    given = np.stack(
        [scipy.special.softmax(oracles.mixture_log_joint(X.numpy(), np.array([0.3, 0.7]), m, 0.8), -1) for m in locs]
    )
    assert found.shape == (N, 2)
    assert found.sum(-1) == pytest.approx(np.ones(N), rel=1e-6)
    assert np.all(np.abs(found - given.mean(0)) < 4.5 * given.std(0) / math.sqrt(draws) + 1e-9)
    assert np.abs(found - scipy.special.softmax(np.log([0.3, 0.7]))).max() > 0.2  # not the prior


@pytest.mark.parametrize("rows", [1, N])
@pytest.mark.parametrize("components", [1, 3])
def test_responsibilities_without_a_posterior_are_exact(rows, components):
    weights, locs = np.full(components, 1 / components), np.array([-1.0, 0.0, 1.0])[:components]

    def model(x, size=None):
        where = pyro.param("locs", lambda: torch.tensor(locs))
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("component", dist.Categorical(torch.tensor(weights)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(where[k], 0.8), obs=x)

    fit = lvm.fit(model, X, steps=1, lr=1e-9, seed=0)
    joint = oracles.mixture_log_joint(X[:rows].numpy(), weights, fit.params["locs"].numpy(), 0.8)
    assert fit.responsibilities(X[:rows]).numpy() == pytest.approx(scipy.special.softmax(joint, -1), rel=1e-8)
    assert fit.log_prob(X[:rows]).numpy() == pytest.approx(scipy.special.logsumexp(joint, -1), rel=1e-8)


def test_responsibilities_are_of_one_site(fitted):
    with pytest.raises(lvm.ProgramError, match=r"one enumerated site, and this program enumerates none"):
        fitted.responsibilities(X)

    def two(x, size=None):
        loc = pyro.param("loc", lambda: x.new_tensor(0.0))
        with pyro.plate("data", size or len(x), subsample=x):
            a = pyro.sample("a", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})
            b = pyro.sample("b", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc + a + b, 1.0), obs=x)

    with pytest.raises(lvm.ProgramError, match=r"\['a', 'b'\]"):
        lvm.fit(two, X, elbo=TraceEnum_ELBO(), steps=1, seed=0).responsibilities(X)


def test_a_label_that_all_share_couples_them():
    def model(x, size=None):
        m = pyro.param("m", lambda: x.new_tensor([-1.0, 1.0]))
        k = pyro.sample("k", dist.Categorical(x.new_ones(2)), infer={"enumerate": "parallel"})
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(m[k], 1.0), obs=x)

    with pytest.warns(lvm.ProgramWarning, match="'k'.*all 8 rows have one value of it in common"):
        fit = lvm.fit(model, X, steps=1, lr=1e-9, seed=0)
    with pytest.raises(lvm.ProgramError, match=r"'k' is enumerated and shared by all data.*log_evidence"):
        fit.log_prob(X)
    assert fit.posterior(X, 3)["k"].shape == (3,)
    assert "posterior" in str(fit.to_arviz(X, 3, ("posterior", "prior")))
    joint = oracles.normal_logpdf(X.numpy()[:, None], np.array([-1.0, 1.0]), 1.0).sum(0) - math.log(2)
    assert fit.responsibilities(X).numpy() == pytest.approx(scipy.special.softmax(joint), rel=1e-6)


def hierarchy(x: torch.Tensor, size: int | None = None) -> None:
    m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(m, 0.6))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


@pytest.mark.parametrize("kind", ["mean_field", "full_rank", "map"])
def test_latents_of_each_datum_are_averaged_out_whatever_the_guide(kind):
    """A full-rank guide has no density for the latents of one datum, and a point none at all: then the model draws."""
    fit = lvm.fit(hierarchy, X, guide=kind, steps=60, lr=0.1, seed=0)
    found = fit.log_prob(X, num_samples=200, seed=0).numpy()
    m = fit.posterior(X, num_draws=200, seed=1)["m"].numpy()
    predictive = oracles.normal_logpdf(X.numpy()[:, None], m, 1.0)  # 0.6^2 + 0.8^2 = 1
    expected = scipy.special.logsumexp(predictive, -1) - math.log(200)
    assert found == pytest.approx(expected, abs=0.3)
    one = fit.to_arviz(X, 2, ("log_likelihood",), num_samples=60, seed=0)["log_likelihood"]["x"].values[0]
    assert one.mean() == pytest.approx(expected.mean(), abs=0.5)


def test_without_a_posterior_log_prob_is_the_evidence():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fit = lvm.fit(lvm.PPCA(3, 1), x, steps=2, seed=0)
    assert torch.equal(fit.log_prob(x), lvm.log_evidence(fit, x))
    assert fit.log_prob(x).numpy() == pytest.approx(fit.program.log_prob(x).detach().numpy())


def test_a_later_fit_leaves_the_record_alone():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ppca = lvm.PPCA(3, 1)
    first = lvm.fit(ppca, x, steps=2, seed=0)
    before = (first.log_prob(x), first.posterior(x, 3, seed=0)["z"], first.params["mean"].clone())
    second = lvm.fit(ppca, x, steps=50, lr=0.1, seed=0)
    assert torch.equal(first.log_prob(x), before[0])
    assert torch.equal(first.posterior(x, 3, seed=0)["z"], before[1])
    assert torch.equal(first.params["mean"], before[2])
    assert not torch.equal(second.log_prob(x), before[0])
    assert torch.equal(ppca.log_prob(x).detach(), second.log_prob(x))


def test_it_draws_reproducibly_and_without_touching_the_callers_random_state(fitted):
    state = torch.get_rng_state()
    assert torch.equal(fitted.posterior(X, 4, seed=3)["m"], fitted.posterior(X, 4, seed=3)["m"])
    assert not torch.equal(fitted.posterior(X, 4)["m"], fitted.posterior(X, 4)["m"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not fitted.posterior(X, 4)["m"].requires_grad


def test_how_it_prints_and_compares(fitted):
    assert repr(fitted).startswith("Fit of (conjugate, conjugate_guide) to 8 data by TraceMeanField_ELBO(): ELBO -")
    assert repr(fitted).endswith("nats/datum after 1 steps (finished)")
    assert fitted == fitted
    assert len({fitted, fitted}) == 1
    with pytest.raises(AttributeError):
        fitted.elbo = 0.0


@pytest.mark.parametrize(("method", "argument"), [("posterior", "num_draws"), ("log_prob", "num_samples"),
                                                  ("responsibilities", "num_samples")])  # fmt: skip
def test_no_draws_are_refused(labelled, method, argument):
    with pytest.raises(ValueError, match=f"{argument} is 0: ask for at least 1"):
        getattr(labelled, method)(X, **{argument: 0})


def test_the_record_can_make_the_run_again():
    def fitted(**options):
        torch.manual_seed(5)
        return lvm.fit(lvm.PPCA(3, 1), rows(), **options)

    first = fitted(epochs=3, batch_size=16, grad_clip_norm=1.0, validation=0.2, optimizer=torch.optim.SGD, lr=1e-4)
    assert first.info["objects"] == {"optimizer": "torch.optim.sgd.SGD"}
    again = fitted(**first.info["arguments"], optimizer=torch.optim.SGD)
    assert first.history == again.history
    assert all(torch.equal(value, again.params[name]) for name, value in first.params.items())
    assert again.info["arguments"] == first.info["arguments"]

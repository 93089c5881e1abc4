"""Draws of the prior: right in few dimensions, hopeless in many; and the importance-weighted bound rising with K."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import torch
from small_programs import ppca_with_an_inexact_guide
from torch.distributions import constraints

import pyro_lvm as lvm

N = 7
X = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
WEIGHTS, LOCS = np.array([0.2, 0.5, 0.3]), np.array([-1.0, 0.0, 2.0])


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def no_guide(*args, size=None):
    pass


def conjugate(x, size=None):
    m = pyro.sample("m", dist.Normal(x.new_tensor(0.5), 2.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(m, 0.8), obs=x)


@pytest.fixture(scope="module")
def ppca() -> tuple[lvm.PPCA, torch.Tensor]:
    return ppca_with_an_inexact_guide()


def test_draws_of_the_prior_find_the_evidence(ppca):
    model, x = ppca
    found = lvm.log_evidence(model, x, 4000, seed=0, method="naive", return_diagnostics=True)
    error = (found.log_evidence - model.log_prob(x).detach()).numpy()
    assert np.all(np.abs(error) < 4.5 * found.standard_error.numpy())
    assert found.effective_sample_size.max() < 3000


def test_draws_of_the_prior_need_no_guide_and_sum_labels_out():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(tensor(WEIGHTS)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(tensor(LOCS)[k], 0.6))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    truth = scipy.special.logsumexp(oracles.mixture_log_joint(X.numpy(), WEIGHTS, LOCS, np.ones(3)), -1)
    found = lvm.log_evidence((model, no_guide), X, 2000, seed=0, method="naive", return_diagnostics=True)
    assert np.all(np.abs(found.log_evidence.numpy() - truth) < 4.5 * found.standard_error.numpy())


def test_draws_of_the_prior_keep_what_the_guide_clamps():
    """Three labels, of which the guide knows the second to be right: the evidence is that of the row and its label."""

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(tensor(WEIGHTS)))
            z = pyro.sample("z", dist.Normal(tensor(LOCS)[k], 0.6))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            known = torch.tensor([-torch.inf, 0.0, -torch.inf], dtype=torch.float64).expand(len(x), 3)
            pyro.sample("k", dist.Categorical(logits=known), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(x, 1.0))

    truth = np.log(WEIGHTS[1]) + oracles.normal_logpdf(X.numpy(), LOCS[1], 1.0)
    for method in ("naive", "importance"):
        found = lvm.log_evidence((model, guide), X, 2000, seed=0, method=method, return_diagnostics=True)
        assert np.all(np.abs(found.log_evidence.numpy() - truth) < 4.5 * found.standard_error.numpy())


def test_draws_of_the_prior_of_what_all_data_share():
    joint = oracles.conjugate_normal_evidence(X.numpy(), 0.5, 2.0, 0.8)
    found = lvm.log_evidence((conjugate, no_guide), X, 4000, seed=0, method="naive", return_diagnostics=True)
    assert abs(found.log_evidence[0].item() - joint / N) < 4.5 * found.standard_error[0].item()


def test_an_improper_prior_cannot_be_drawn_from():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(lvm.ProgramError, match=r"site 'z' .*improper prior"):
        lvm.log_evidence((model, guide), X, 2, method="naive")


def test_draws_of_the_prior_fail_in_many_dimensions_where_the_posterior_does_not():
    """The lecture's picture: the prior's error grows with the latent dimension; the exact guide's stays nought."""
    errors = {}
    for dim in (1, 10, 50):
        with torch.random.fork_rng():
            torch.manual_seed(dim)
            loadings = torch.randn(60, dim, dtype=torch.float64) / math.sqrt(dim)
        model = lvm.PPCA(60, dim, guide_covariance="full").double()
        model.set_parameters(loadings=loadings, mean=torch.zeros(60).double(), noise_scale=torch.tensor(0.3).double())
        model.solve_guide()
        x = model.sample(20, seed=0)
        truth = oracles.linear_gaussian_log_density(x.numpy(), loadings.numpy(), np.zeros(60), 0.09)
        by_method = {
            method: lvm.log_evidence(model, x, 1000, seed=0, method=method).numpy()
            for method in ("naive", "importance")
        }
        errors[dim] = (by_method["naive"] - truth).mean()
        assert np.abs(by_method["importance"] - truth).max() < 0.01
    assert abs(errors[1]) < 0.1
    assert errors[50] < errors[10] < -5
    assert errors[50] < -50


def test_the_bound_rises_with_the_number_of_draws_to_the_evidence(ppca):
    model, x = ppca
    x = x[:4]
    truth = model.log_prob(x).detach().numpy().mean()
    copies, means, errors = 400, [], []
    for k in (1, 2, 5, 20, 100):
        bounds = lvm.log_evidence(model, x.repeat(copies, 1), k, seed=k, method="importance", batch_size=100_000)
        by_copy = bounds.reshape(copies, -1).mean(-1).numpy()
        means.append(by_copy.mean())
        errors.append(by_copy.std() / math.sqrt(copies))
    for k in range(4):
        assert means[k + 1] > means[k] - 4 * math.hypot(errors[k], errors[k + 1])
    assert means[0] < truth - 0.1
    assert abs(means[-1] - truth) < 0.01

"""Annealed importance sampling: unbiased whatever the guide, close to the truth, and refused in words elsewhere."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_lvm as lvm
from pyro_lvm.criticism import annealed

DATA = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X = torch.linspace(-1.5, 2.5, 5, dtype=torch.float64)


@pytest.fixture(scope="module")
def ppca() -> tuple[lvm.PPCA, torch.Tensor, np.ndarray]:
    mixed = DATA @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = lvm.PPCA.closed_form(mixed, 2)
    x = mixed[:20]
    psi = model.noise_scale.item() ** 2
    truth = oracles.linear_gaussian_log_density(
        x.numpy(), model.loadings.detach().numpy(), model.mean.detach().numpy(), psi
    )
    return model, x, truth


def annealed_evidence(program, x, chains=128, *, steps=60, **options):
    options = {"seed": 0, "batch_size": 4096} | options
    return lvm.log_evidence(program, x, chains, method="annealed", num_steps=steps, return_diagnostics=True, **options)


def assert_near(found, truth, within=0.02):
    """The mean is within ``within`` nats, and every row within its standard errors."""
    error = found.log_evidence.numpy() - truth
    assert abs(error.mean()) < within
    assert np.all(np.abs(error) < 4.5 * found.standard_error.numpy() + 1e-9)


def test_from_the_prior_it_finds_the_evidence_of_ppca(ppca):
    model, x, truth = ppca
    assert_near(annealed_evidence(model, x, start="prior"), truth)


def test_from_the_posterior_every_weight_is_the_evidence(ppca):
    model, x, truth = ppca
    found = annealed_evidence(model, x[:3], 4, steps=10, start="guide")
    assert found.log_evidence.numpy() == pytest.approx(truth[:3], abs=1e-8)


@pytest.mark.parametrize("start", ["guide", None])
def test_a_bad_guide_costs_importance_sampling_nats_and_annealing_none(ppca, start):
    model, x, truth = ppca
    kept = model._standard_guide_weight.detach().clone()
    with torch.no_grad():
        model._standard_guide_weight.mul_(-1)  # the other side of the origin
    try:
        by_importance = lvm.log_evidence(model, x, 1000, method="importance", seed=0).numpy()
        assert (by_importance - truth).mean() < -1
        assert_near(annealed_evidence(model, x[:10], 256, steps=120, start=start), truth[:10])
    finally:
        with torch.no_grad():
            model._standard_guide_weight.copy_(kept)


def test_the_weights_are_unbiased_also_with_few_steps(ppca):
    model, x, truth = ppca
    copies = x[:1].repeat(300, 1)
    found = lvm.log_evidence(model, copies, 4, method="annealed", num_steps=5, start="prior", seed=0, batch_size=8192)
    ratio = np.exp(found.numpy() - truth[0])
    assert ratio.std() > 0.1
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))


def test_more_steps_leave_less_noise(ppca):
    model, x, _ = ppca
    few, many = (annealed_evidence(model, x, start="prior", steps=steps).standard_error for steps in (8, 80))
    assert many.mean() < 0.5 * few.mean()


def test_rows_and_chains_in_small_passes(ppca):
    model, x, truth = ppca
    found = annealed_evidence(model, x[:3], 40, steps=20, start="prior", batch_size=32)
    assert found.log_evidence.shape == (3,)
    assert np.all(np.abs(found.log_evidence.numpy() - truth[:3]) < 4.5 * found.standard_error.numpy())
    assert bool((found.effective_sample_size <= 40).all())


def test_bounded_supports_and_lone_models():
    """A positive latent and its mean-field fit, whose own coordinates are the unconstrained ones."""

    def model(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=x if index is None else index):
            s = pyro.sample("s", dist.HalfNormal(x.new_tensor(1.5)))
            pyro.sample("x", dist.Normal(s, 0.5), obs=x)

    truth = oracles.half_normal_evidence(X.numpy(), 1.5, 0.5)
    fit = lvm.fit(model, X, steps=50, lr=0.1, seed=0)
    for start in ("prior", "guide"):
        assert_near(annealed_evidence(fit, X, start=start), truth, within=0.03)


def test_labels_are_summed_out_and_a_plate_within_the_row_is_part_of_it():
    trials = 4
    heads = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.float64)

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x, dim=-1):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)), infer={"enumerate": "parallel"})
            p = pyro.sample("p", dist.Beta(2.0 * x.new_ones(()), 1.0))
            with pyro.plate("throws", trials, dim=-2):
                pyro.sample("x", dist.Bernoulli(torch.where(k > 0, p, 0.5)), obs=x.T)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x, dim=-1):
            pyro.sample("p", dist.Beta(1.5 * x.new_ones(()), 1.5))

    biased = oracles.beta_bernoulli_evidence(heads.sum(-1).numpy(), trials, 2.0, 1.0)
    truth = np.logaddexp(np.log(0.3) + biased, np.log(0.7) + trials * np.log(0.5))
    for start in ("prior", "guide"):
        assert_near(annealed_evidence((model, guide), heads, start=start), truth)


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_a_latent_whose_prior_has_a_label(start):
    weights, locs = torch.tensor([0.3, 0.7]).double(), torch.tensor([-2.0, 1.0]).double()

    def model(x, size=None):
        with plated(x, size):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(locs[k], 0.6))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(x, size=None):
        with plated(x, size):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    densities = np.log(weights.numpy()) + oracles.normal_logpdf(X.numpy()[:, None], locs.numpy(), 1.0)
    assert_near(annealed_evidence((model, guide), X, start=start), np.logaddexp(*densities.T), within=0.03)


def test_two_sites_of_which_one_depends_on_the_other():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            a = pyro.sample("a", dist.Normal(x.new_tensor(0.3), 1.0))
            b = pyro.sample("b", dist.Normal(a.unsqueeze(-1).expand(*a.shape, 2), 0.7).to_event(1))
            pyro.sample("x", dist.Normal(b.sum(-1), 0.5), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            a = pyro.sample("a", dist.Normal(x / 2, 1.0))
            pyro.sample("b", dist.Normal(a.unsqueeze(-1).expand(*a.shape, 2), 1.0).to_event(1))

    truth = oracles.normal_logpdf(X.numpy(), 0.6, math.sqrt(4 * 1.0 + 2 * 0.49 + 0.25))
    assert_near(annealed_evidence((model, guide), X), truth, within=0.03)
    with pytest.raises(lvm.ProgramError, match=r"guide site 'b' is computed from a.*start='prior'"):
        annealed_evidence((model, guide), X, start="guide")


def test_a_seed_gives_the_same_numbers_and_single_precision_stays_single():
    single = lvm.PPCA.closed_form(DATA.float(), 2)
    first, again = (annealed_evidence(single, DATA[:4].float(), 8, steps=10, start="prior") for _ in range(2))
    assert torch.equal(first.log_evidence, again.log_evidence)
    assert first.log_evidence.dtype == torch.float32


def plated(x, size):
    return pyro.plate("data", size or len(x), subsample=x)


def discrete(x, size=None):
    with plated(x, size):
        k = pyro.sample("k", dist.Poisson(x.new_tensor(2.0)))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def discrete_guide(x, size=None):
    with plated(x, size):
        pyro.sample("k", dist.Poisson(x.new_tensor(2.0)))


def shared(x, size=None):
    m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))
    with plated(x, size):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def shared_guide(x, size=None):
    pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))


def listed(x, size=None):
    with plated(x, size):
        k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5)))
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def listing_guide(x, size=None):
    with plated(x, size):
        pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})
        pyro.sample("z", dist.Normal(x, 1.0))


def nothing_sampled(x, size=None):
    with plated(x, size):
        k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def no_guide(x, size=None):
    pass


def unplated(x, size=None):
    z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def unplated_guide(x, size=None):
    pyro.sample("z", dist.Normal(x, 1.0).to_event(1))


def moving(x, size=None):
    with plated(x, size):
        a = pyro.sample("a", dist.Exponential(x.new_tensor(1.0)))
        b = pyro.sample("b", dist.Uniform(x.new_tensor(0.0), a))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def moving_guide(x, size=None):
    with plated(x, size):
        a = pyro.sample("a", dist.Exponential(x.new_tensor(1.0)))
        pyro.sample("b", dist.Uniform(x.new_tensor(0.0), a))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ((discrete, discrete_guide), "site 'k' .*is discrete .Poisson. and sampled.*infer="),
        ((shared, shared_guide), "site 'm' .*shared by all data.*method='importance'"),
        ((listed, listing_guide), "the guide lists site 'k'"),
        ((nothing_sampled, no_guide), "nothing to anneal: use method='exact'"),
        ((unplated, unplated_guide), "no plate over its rows"),
        ((moving, moving_guide), "the bounds of site 'b' depend on other draws"),
    ],
)
def test_what_cannot_be_annealed_is_refused(program, words):
    with pytest.raises(lvm.ProgramError, match=words):
        annealed_evidence(program, X)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"num_steps": 0}, "num_steps is 0"), ({"start": "posterior"}, "start='posterior' is not known")],
)
def test_arguments_that_mean_nothing(ppca, options, words):
    with pytest.raises(ValueError, match=words):
        lvm.log_evidence(ppca[0], ppca[1], method="annealed", **options)


def test_transitions_leave_their_density_where_it_is():
    """Chains that start as a standard normal still are one after fifty transitions with frozen, unequal strides."""

    class Standard:
        def at(self, u, beta):
            return annealed.Level(-0.5 * u.square().sum(-1), -u, torch.zeros(len(u)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        u = torch.randn(4000, 2, dtype=torch.float64)
        beta = torch.ones(4000, dtype=torch.float64)
        for _ in range(50):
            target, scale = Standard(), torch.tensor([1.3, 0.6]).double().expand(4000, 2)
            u, probability = annealed._transition(target, u, beta, target.at(u, beta), beta, scale)
    assert 0.3 < probability.mean() < 0.99
    assert u.mean(0).abs().max() < 4 / math.sqrt(4000)
    assert (u.var(0) - 1).abs().max() < 4 * math.sqrt(2 / 4000)

"""Relaxed discrete sites: what is optimised, what is reported, and what cannot be relaxed."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from draws_of_gradients import VALUE, OfTen, X, draws, off, prepared, spread
from oracles import posterior_moments
from pyro.infer import SVI
from small_programs import Labels
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.elbo import Relaxed
from pyro_lvm.parameters import isolated


class Switch(nn.Module):
    """Two Bernoullis a row: x ~ N(sum, 0.4); the guide has a logit for each row and switch."""

    def __init__(self, n, logits=(0.4, -1.0)):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64).expand(n, 2).clone())

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor([0.3, 0.6])).to_event(1))
            pyro.sample("x", dist.Normal(y.sum(-1), 0.4), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("y", dist.Bernoulli(logits=self.logits).to_event(1))


def clusters():
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.randn(40, generator=generator) * 0.5 + loc for loc in (-3.0, 0.0, 3.0)])


def evaluated(elbo, program, x, seed=0):
    with isolated(seed, validate=False):
        estimator, bound, batch = prepared(elbo, program, x)
        loss, terms = estimator.step(bound, batch, list(program.parameters()), None, 1)
    return loss.item() / len(x), terms.map(lambda value: value / len(x))


def test_the_kl_is_that_of_the_discrete_distributions_to_the_last_digit():
    """With a guide and a model that stop at the label nothing else is left; x hangs on nothing."""
    program = OfTen(7)
    with torch.no_grad():
        program.locs.zero_()
    x = torch.full((7,), X, dtype=torch.float64)
    loss, terms = evaluated(Relaxed(0.3), program, x)
    q = torch.softmax(program.logits[0].detach(), 0).numpy()
    kl = float(np.sum(q * np.log(q * 10)))
    likelihood = -0.5 * X**2 - 0.5 * np.log(2 * np.pi)
    assert loss == pytest.approx(kl - likelihood, abs=1e-12)
    assert terms.reconstruction["x"].item() == pytest.approx(likelihood, abs=1e-12)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False])
def test_the_plain_bound_is_reported_whatever_the_temperature(straight_through, num_particles, vectorize):
    x = torch.full((20_000,), X, dtype=torch.float64)
    elbo = Relaxed(2.0, straight_through, num_particles=num_particles, vectorize_particles=vectorize)
    loss, terms = evaluated(elbo, OfTen(len(x)), x)
    assert terms.elbo.item() == pytest.approx(VALUE, abs=0.03)
    assert (loss == pytest.approx(-VALUE, abs=0.03)) == straight_through


@pytest.mark.parametrize("elbo", [Relaxed(0.5), Relaxed(0.5, straight_through=True, num_particles=2)], ids=repr)
def test_a_minibatch_is_scaled_to_all_rows(elbo):
    program, x = OfTen(6), torch.full((6,), X, dtype=torch.float64)

    def scaled(size):
        with isolated(0, validate=False):
            estimator, bound, batch = prepared(elbo, program, x, size=size)
            program.zero_grad()
            loss, terms = estimator.step(bound, batch, list(program.parameters()), None, 1)
        return torch.stack([loss, terms.elbo]), program.logits.grad.clone(), program.locs.grad.clone()

    for part, whole in zip(scaled(6), scaled(24), strict=True):
        assert torch.allclose(whole, 4 * part, rtol=1e-12, atol=1e-14)


def test_rounded_draws_are_draws_of_the_discrete_distribution():
    program = OfTen(50_000)
    x = torch.full((50_000,), X, dtype=torch.float64)
    _, terms = evaluated(Relaxed(5.0), program, x)
    probabilities = torch.softmax(program.logits[0].detach(), 0)
    log_ratio = (probabilities * 10).log()
    mean = (probabilities * log_ratio).sum()
    variance = (probabilities * (log_ratio - mean) ** 2).sum()
    assert abs(terms.kl["y"].item() - mean) < 4 * (variance / 50_000) ** 0.5


def test_two_particles_are_the_mean_of_two():
    program = OfTen(20_000)
    one, _ = draws(Relaxed(0.5), program)
    one = {name: gradient.clone() for name, gradient in one.items()}
    for vectorize in (True, False):
        four, _ = draws(Relaxed(0.5, num_particles=4, vectorize_particles=vectorize), program, seed=1)
        assert off(four["logits"], one["logits"].mean(0)) < 6
        assert spread(four["logits"]) == pytest.approx(spread(one["logits"]) / 2, rel=0.05)


@pytest.mark.parametrize("straight_through", [False, True])
def test_bernoullis_are_relaxed_too_and_the_colder_the_nearer(straight_through):
    program = Switch(20_000)
    x = torch.full((20_000,), X, dtype=torch.float64)
    exact = torch.autograd.grad(exact_switch(program.logits[:1], X), program.logits)[0][0]
    biases = []
    for temperature in (1.0, 0.1):
        with isolated(0, validate=False):
            estimator, bound, batch = prepared(Relaxed(temperature, straight_through), program, x)
            program.zero_grad()
            estimator.step(bound, batch, [program.logits], None, 1)
        biases.append((program.logits.grad.mean(0) - exact).norm().item())
    assert biases[1] < 0.1
    if not straight_through:
        assert biases[1] < 0.5 * biases[0]
        assert biases[0] > 0.1


def exact_switch(logits, x):
    """Minus the bound of one row, summed over the four settings."""
    total = 0.0
    for y in torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 2):
        q = dist.Bernoulli(logits=logits[0]).log_prob(y).sum()
        p = dist.Bernoulli(torch.tensor([0.3, 0.6], dtype=torch.float64)).log_prob(y).sum()
        total = total + q.exp() * (q - p - dist.Normal(y.sum(), 0.4).log_prob(torch.tensor(x)))
    return total


def test_the_straight_through_draw_is_discrete():
    seen = []

    class Watched(OfTen):
        def model(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(10)))
                seen.append(y.detach())
                pyro.sample("x", dist.Normal((y * self.locs).sum(-1), 1.0), obs=x)

    evaluated(Relaxed(0.7, straight_through=True), Watched(30), torch.full((30,), X, dtype=torch.float64))
    assert all(set(y.unique().tolist()) == {0.0, 1.0} for y in seen)
    seen.clear()
    evaluated(Relaxed(0.7), Watched(30), torch.full((30,), X, dtype=torch.float64))
    _, relaxed, rounded = seen  # the first is of the structure, the last for the plain bound
    assert len(relaxed.unique()) == 300
    assert set(rounded.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(relaxed.argmax(-1), rounded.argmax(-1))


def test_a_fit_with_a_falling_temperature_comes_near_the_evidence():
    x = clusters()
    cooling = lvm.schedules.exponential(1.0, 0.2)
    fit = lvm.fit(Labels(dist.OneHotCategorical), x, elbo=Relaxed(cooling, num_particles=2), steps=400, lr=0.03, seed=0)
    locs = fit.params["locs"]
    evidence = dist.Normal(locs, 1.0).log_prob(x[:, None]).sub(np.log(3)).logsumexp(-1).mean().item()
    assert evidence - 0.3 < fit.elbo <= evidence + 0.01


def test_captured_steps_read_the_temperature_of_their_own_time():
    def trained(capture):
        torch.manual_seed(0)
        elbo = Relaxed(lvm.schedules.linear(2.0, 0.2))
        fit = lvm.fit(Labels(dist.OneHotCategorical), clusters(), elbo=elbo, steps=40, lr=0.03, seed=0, capture=capture)
        assert fit.info["capture"] == (capture or "eager")
        return fit.params

    captured, eager = trained("graph"), trained(False)
    assert all(torch.equal(captured[name], eager[name]) for name in eager)


def test_a_fit_has_a_temperature_of_its_own_that_graphs_are_given():
    elbo = Relaxed(lvm.schedules.linear(2.0, 0.2))
    x = torch.full((4,), X, dtype=torch.float64)
    estimator, _, _ = prepared(elbo, OfTen(4), x)
    estimator.advance(0.5)
    assert [value.item() for value in estimator.tensors()] == [pytest.approx(1.1)]
    with pytest.raises(lvm.ProgramError, match="nobody said how far"):  # the instance has heard nothing
        elbo.temperature.now()
    assert elbo.arrival() == 1.0
    assert Relaxed(0.5).arrival() == 0.0


def test_a_schedule_in_plain_svi_is_told_or_refused():
    program, elbo = Labels(dist.OneHotCategorical), Relaxed(lvm.schedules.linear(1.0, 0.3))

    def model(x):
        pyro.module("program", program)
        program.model(x)

    with pyro.get_param_store().scope():
        svi = SVI(model, program.guide, pyro.optim.Adam({"lr": 0.03}), elbo)
        with pytest.raises(lvm.ProgramError, match=r"temperature is a schedule .* call elbo.advance"):
            svi.step(clusters())
        losses = []
        for step in range(100):
            elbo.advance(step / 99)
            losses.append(svi.step(clusters()))
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_temperature_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"temperature is 0: it must be above 0"):
        Relaxed(0.0)
    with pytest.raises(ValueError, match=r"temperature is 0 at 1 of training: it must be above 0"):
        Relaxed(lvm.schedules.linear(1.0, 0.0))
    with pytest.raises(ValueError, match="num_particles is 0"):
        Relaxed(0.5, num_particles=0)


def test_an_integer_label_is_refused_with_the_edit():
    program = OfTen(4, kind=dist.Categorical)
    with pytest.raises(
        lvm.ProgramError, match=r"'y' .*\(Categorical\) cannot be relaxed.*OneHotCategorical.*y @ table"
    ):
        lvm.fit(program, torch.ones(4, dtype=torch.float64), elbo=Relaxed(0.5), steps=1)


def test_a_label_that_is_used_as_an_index_is_refused():
    class Indexed(OfTen):
        def model(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(10)))
                pyro.sample("x", dist.Normal(self.locs[0][y.argmax(-1)], 1.0), obs=x)

    with pytest.raises(lvm.ProgramError, match=r"no gradient comes back to its draw.*y @ table in place of table"):
        lvm.fit(Indexed(4), torch.ones(4, dtype=torch.float64), elbo=Relaxed(0.5), steps=1)


def test_nothing_to_relax_is_refused():
    with pytest.raises(lvm.ProgramError, match=r"finds no discrete site in the guide \(its sites: z\)"):
        lvm.fit(lvm.PPCA(3, 1), torch.randn(5, 3), elbo=Relaxed(0.5), steps=1)
    with pytest.raises(lvm.ProgramError, match=r"finds none of k in the guide"):
        lvm.fit(OfTen(4), torch.ones(4, dtype=torch.float64), elbo=Relaxed(0.5, sites=["k"]), steps=1)


def test_two_discrete_sites_of_which_one_is_left_alone_are_refused():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            a = pyro.sample("a", dist.Bernoulli(x.new_tensor(0.5)))
            b = pyro.sample("b", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x, size=None):
        logits = pyro.param("logits", torch.zeros(2))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("a", dist.Bernoulli(logits=logits[0]))
            pyro.sample("b", dist.Bernoulli(logits=logits[1]))

    with pytest.raises(lvm.ProgramError, match=r"'b' .*is neither relaxed nor reparameterised.*add it to sites="):
        lvm.fit((model, guide), torch.ones(4), elbo=Relaxed(0.5, sites=["a"]), steps=1)
    fit = lvm.fit((model, guide), torch.full((9,), 2.0), elbo=Relaxed(0.5), steps=200, lr=0.1, seed=0)
    assert (fit.params["logits"] > 0.2).all()


def test_a_kl_that_hangs_on_what_comes_later_is_refused():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            y = pyro.sample("y", dist.Bernoulli(logits=z))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(x, size=None):
        logits = pyro.param("logits", torch.tensor(0.0))
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", dist.Bernoulli(logits=logits))
            pyro.sample("z", dist.Normal(y, 1.0))

    with pytest.raises(lvm.ProgramError, match=r"'y' .*comes after 'z' in the model and before it in the guide"):
        lvm.fit((model, guide), torch.ones(4), elbo=Relaxed(0.5), steps=1)


def test_a_continuous_site_beside_it_keeps_its_own_path():
    """p(z) = N(0, 1), y ~ Bernoulli(0.5), x ~ N(z + 3y, 0.5); given y, the posterior of z is Normal."""

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.5)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + 3 * y, 0.5), obs=x)

    def guide(x, size=None):
        logit, m = pyro.param("logit", torch.tensor(0.0)), pyro.param("m", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("y", dist.Bernoulli(logits=logit))
            pyro.sample("z", dist.Normal(m, scale))

    fit = lvm.fit((model, guide), torch.full((50,), 3.5), elbo=Relaxed(0.3), steps=500, lr=0.03, seed=0)
    mean, sd = posterior_moments(lambda z: -0.5 * z**2 - 0.5 * (0.5 - z) ** 2 / 0.25, -5, 5)
    assert fit.params["m"].item() == pytest.approx(mean, abs=0.1)
    assert fit.params["scale"].item() == pytest.approx(sd, abs=0.1)
    assert fit.params["logit"] > 2

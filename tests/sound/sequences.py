"""Sequences as rows, their steps in a loop: hidden Markov models, deep Markov models, points of change."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import nn
from torch.distributions import constraints

from sound.corpus import binary, integers, normal, nothing, sound

PARALLEL = {"enumerate": "parallel"}
STEPS = 4


def chances(name, *shape):
    return pyro.param(name, torch.ones(*shape) / shape[-1], constraint=constraints.simplex)


def hidden_markov(x, size=None):
    start, move = chances("start", 3), chances("move", 3, 3)
    locs = pyro.param("locs", torch.tensor([-1.0, 0.0, 1.0]))
    with pyro.plate("data", size or len(x), subsample=x):
        state = None
        for t in pyro.markov(range(x.shape[1])):
            probs = start if state is None else Vindex(move)[state, :]
            state = pyro.sample(f"state_{t}", dist.Categorical(probs), infer=PARALLEL)
            pyro.sample(f"x_{t}", dist.Normal(locs[state], 1.0), obs=x[:, t])


@sound("default", "enum", "enum-vectorised", batch_sizes=(None, 7))
def hidden_markov_model():
    return (hidden_markov, nothing), normal(20, STEPS)


@sound("default", "enum")
def hidden_markov_model_of_three_rows_steps_and_states():
    return (hidden_markov, nothing), normal(3, 3)


def second_order(x, size=None):
    move = chances("move", 2, 2, 2)
    emit = pyro.param("emit", torch.tensor([0.3, 0.6]), constraint=constraints.unit_interval)
    with pyro.plate("data", size or len(x), subsample=x):
        before, now = torch.tensor(0), torch.tensor(0)
        for t in pyro.markov(range(x.shape[1]), history=2):
            before, now = now, pyro.sample(f"state_{t}", dist.Categorical(Vindex(move)[before, now, :]), infer=PARALLEL)
            pyro.sample(f"x_{t}", dist.Bernoulli(emit[now]), obs=x[:, t])


@sound("default", "enum", batch_sizes=(None, 7))
def hidden_markov_model_of_second_order():
    return (second_order, nothing), binary(20, 5)


def factorial(x, size=None):
    move_w, move_y = chances("move_w", 2, 2), chances("move_y", 3, 3)
    locs = pyro.param("locs", torch.arange(6.0).reshape(2, 3))
    with pyro.plate("sequences", size or len(x), subsample=x, dim=-1):
        w, y = torch.tensor(0), torch.tensor(0)
        for t in pyro.markov(range(x.shape[1])):
            w = pyro.sample(f"w_{t}", dist.Categorical(Vindex(move_w)[w, :]), infer=PARALLEL)
            y = pyro.sample(f"y_{t}", dist.Categorical(Vindex(move_y)[y, :]), infer=PARALLEL)
            pyro.sample(f"x_{t}", dist.Normal(Vindex(locs)[w, y], 1.0), obs=x[:, t])


@sound("default", "enum", batch_sizes=(None, 7))
def hidden_markov_model_of_two_chains():
    return (factorial, nothing), normal(20, STEPS)


def of_several_lengths(x, length, size=None):
    """Priors on the rows of both matrices; sequences end before the matrix does."""
    move = pyro.sample("move", dist.Dirichlet(0.9 * torch.eye(3) + 0.1).to_event(1))
    emit = pyro.sample("emit", dist.Beta(torch.ones(3, 2), torch.ones(3, 2)).to_event(2))
    with pyro.plate("data", size or len(x), subsample=x):
        state = torch.tensor(0)
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < length):
                state = pyro.sample(f"state_{t}", dist.Categorical(Vindex(move)[..., state, :]), infer=PARALLEL)
                tones = dist.Bernoulli(Vindex(emit)[..., state, :]).to_event(1)
                pyro.sample(f"x_{t}", tones, obs=x[:, t])


@sound("default", "enum", batch_sizes=(None, 7))
def hidden_markov_model_with_priors_and_lengths():
    return of_several_lengths, (binary(20, STEPS, 2), integers(STEPS, 20) + 1)


def summed_by_the_distribution(x, size=None):
    start, move = pyro.param("start", torch.zeros(3)), pyro.param("move", torch.zeros(3, 3))
    locs = pyro.param("locs", torch.tensor([-1.0, 0.0, 1.0]))
    with pyro.plate("data", size or len(x), subsample=x):
        chain = dist.DiscreteHMM(start, move, dist.Normal(locs, 1.0), duration=x.shape[1])
        pyro.sample("x", chain, obs=x)


@sound("default", "trace", batch_sizes=(None, 7))
def hidden_markov_model_of_one_distribution():
    return (summed_by_the_distribution, nothing), normal(20, STEPS)


class DeepMarkov(nn.Module):
    """z_t from z_{t-1} by a gate, x_t from z_t; the guide reads the sequence backwards."""

    def __init__(self, features: int = 3, latent: int = 2, hidden: int = 4) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(latent))
        self.move = nn.Linear(latent, 2 * latent)
        self.emit = nn.Linear(latent, features)
        self.reader = nn.GRU(features, hidden, batch_first=True)
        self.to_hidden = nn.Linear(latent, hidden)
        self.to_latent = nn.Linear(hidden, 2 * latent)

    @staticmethod
    def normal(raw):
        loc, raw_scale = raw.chunk(2, -1)
        return dist.Normal(loc, nn.functional.softplus(raw_scale) + 1e-3).to_event(1)

    def model(self, x, length, size=None):
        pyro.module("markov", self)
        z = self.first.expand(len(x), -1)
        with pyro.plate("data", size or len(x), subsample=x):
            for t in range(x.shape[1]):
                with poutine.mask(mask=t < length):
                    z = pyro.sample(f"z_{t}", self.normal(self.move(z)))
                    pyro.sample(f"x_{t}", dist.Bernoulli(logits=self.emit(z)).to_event(1), obs=x[:, t])

    def guide(self, x, length, size=None):
        pyro.module("markov", self)
        read = self.reader(x.flip(1))[0].flip(1)
        z = self.first.expand(len(x), -1)
        with pyro.plate("data", size or len(x), subsample=x):
            for t in range(x.shape[1]):
                with poutine.mask(mask=t < length):
                    both = 0.5 * (torch.tanh(self.to_hidden(z)) + read[:, t])
                    z = pyro.sample(f"z_{t}", self.normal(self.to_latent(both)))


@sound("default", "trace", "trace-vectorised", "mean-field", "graph", "renyi", batch_sizes=(None, 7))
def deep_markov_model():
    return DeepMarkov(), (binary(16, STEPS, 3), integers(STEPS, 16) + 1)


@sound("default", "trace", "mean-field")
def deep_markov_model_of_three_rows_and_steps():
    return DeepMarkov(), (binary(3, 3, 3), torch.tensor([3, 1, 2]))


def change_in_every_row(x, size=None):
    """Every sequence has its own step at which its rate changes."""
    rates = pyro.sample("rates", dist.Gamma(torch.ones(2), torch.ones(2)).to_event(1))
    steps = torch.arange(x.shape[1])
    with pyro.plate("data", size or len(x), subsample=x):
        change = pyro.sample("change", dist.Categorical(torch.ones(len(steps)) / len(steps)), infer=PARALLEL)
        after = (steps >= change[..., None]).long()
        pyro.sample("x", dist.Poisson(Vindex(rates)[..., after]).to_event(1), obs=x)


@sound("default", "enum", batch_sizes=(None, 7))
def point_of_change_in_every_row():
    return change_in_every_row, integers(5, 16, STEPS).float()


def change_of_all(x, year, size=None):
    """One series, a row for each year, with one year in which the rate changes."""
    with pyro.plate("regimes", 2):
        rates = pyro.sample("rates", dist.Gamma(1.0, 1.0))
    change = pyro.sample("change", dist.Categorical(torch.ones(12) / 12))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Poisson(Vindex(rates)[..., (year >= change).long()]), obs=x)


def guide_of_change(x, year, size=None):
    shape = pyro.param("shape", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("regimes", 2):
        pyro.sample("rates", dist.Gamma(shape, 1.0))
    logits = pyro.param("logits", torch.zeros(12))
    pyro.sample("change", dist.Categorical(logits=logits), infer=PARALLEL)


@sound("default", "enum", batch_sizes=(None, 5))
def point_of_change_of_all_enumerated_in_the_guide():
    return (change_of_all, guide_of_change), (integers(5, 12).float(), torch.arange(12))


def change_by_a_factor(x, year, size=None):
    """The same, where the sum over the year is the author's own."""
    rates = pyro.sample("rates", dist.Gamma(torch.ones(2), torch.ones(2)).to_event(1))
    early, late = (dist.Poisson(rates[..., i, None]).log_prob(x).cumsum(-1) for i in (0, 1))
    pyro.factor("x_given_rates", torch.logsumexp(early + late[..., -1:] - late, -1))


def change_summed_out(x, year, size=None):
    rates = pyro.sample("rates", dist.Gamma(torch.ones(2), torch.ones(2)).to_event(1))
    with pyro.plate("data", size or len(x), subsample=x):
        blend = torch.sigmoid((year - pyro.param("change", torch.tensor(5.0))) / 2.0)
        pyro.sample("x", dist.Poisson(rates[..., :1] * (1 - blend) + rates[..., 1:] * blend), obs=x)


@sound("default", "trace", "trace-vectorised", batch_sizes=(None, 5))
def point_of_change_that_is_smooth():
    return change_summed_out, (integers(5, 12).float(), torch.arange(12.0))


@sound("default", "trace")
def point_of_change_summed_in_a_factor():
    return change_by_a_factor, (integers(5, 12).float(), torch.arange(12))


def autoregressive(x, size=None):
    """Every value of a row depends on the one before: no latent, and a loop over observed sites."""
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x_0", dist.Normal(0.0, 1.0), obs=x[:, 0])
        for t in range(1, x.shape[1]):
            pyro.sample(f"x_{t}", dist.Normal(weight * x[:, t - 1], scale), obs=x[:, t])


@sound("default", "trace", "trace-vectorised", batch_sizes=(None, 7))
def autoregression():
    return autoregressive, normal(20, STEPS)

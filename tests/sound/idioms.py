"""Ways to write things: observed ones, loops for plates, labels that may be absent, plates opened twice."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn
from torch.distributions import constraints

from sound.corpus import binary, integers, normal, sound


def games(winner, loser, size=None):
    """Every row is a game that somebody won: what is observed is always one."""
    with pyro.plate("players", 5):
        strength = pyro.sample("strength", dist.Normal(0.0, 1.0))
    with pyro.plate("games", size or len(winner), subsample=winner):
        won = torch.ones(len(winner))
        pyro.sample("won", dist.Bernoulli(logits=strength[winner] - strength[loser]), obs=won)


@sound("default", "trace", "graph", batch_sizes=(None, 7))
def strength_of_players():
    return games, (integers(5, 20), integers(5, 20, seed=1))


def walked(x, size=None):
    for i in pyro.plate("data", size or len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])


def guide_of_walked(x, size=None):
    slope = pyro.param("slope", torch.tensor(0.4))
    for i in pyro.plate("data", size or len(x)):
        pyro.sample(f"z_{i}", dist.Normal(slope * x[i], 0.7))


@sound("default", "trace", "mean-field", "graph", "renyi")
def data_plate_that_is_walked():
    return (walked, guide_of_walked), normal(6)


class Labelled(nn.Module):
    """The label is observed where it is given, and drawn by the guide where it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.encoder = nn.Linear(5, 3), nn.Linear(8, 4)
        self.decoder = nn.Linear(5, 5)

    def model(self, x, y=None, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            label = pyro.sample("y", dist.OneHotCategorical(x.new_ones(len(x), 3) / 3), obs=y)
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            z, label = torch.broadcast_tensors(nn.functional.pad(z, (0, 3)), nn.functional.pad(label, (2, 0)))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z + label)).to_event(1), obs=x)

    def guide(self, x, y=None, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            if y is None:
                logits = self.classifier(x)
                y = pyro.sample("y", dist.OneHotCategorical(logits=logits), infer={"enumerate": "parallel"})
            x, y = torch.broadcast_tensors(nn.functional.pad(x, (0, 3)), nn.functional.pad(y, (5, 0)))
            loc, log_scale = self.encoder(x + y).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@sound("default", "enum", batch_sizes=(None, 7))
def labels_absent():
    return Labelled(), binary(20, 5)


@sound("default", "trace", "mean-field", "renyi", batch_sizes=(None, 7))
def labels_given():
    return Labelled(), (binary(20, 5), torch.eye(3)[integers(3, 20)])


class ModelAlone(nn.Module):
    """A module without a guide: its own parameters are trained, its prior's sites get a guide."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 3)
        self.register_buffer("grid", torch.arange(3))

    def model(self, x, y, size=None):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            at = pyro.sample("at", dist.Categorical(logits=self.network(x)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(self.grid[at].to(x.dtype), scale + 0.1), obs=y)


@sound("default", "enum", batch_sizes=(None, 7))
def module_without_a_guide():
    return ModelAlone(), {"x": normal(20, 2), "y": normal(20, seed=1)}


def opened_twice(x, size=None):
    """One plate of features, made once, around its prior and inside the rows'."""
    features = pyro.plate("features", 3, dim=-2)
    with features:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3, 1), 1.0))
    with pyro.plate("data", size or len(x), subsample=x, dim=-1), features:
        pyro.sample("x", dist.Laplace(loc, 1.0), obs=x.T)


def guide_of_opened(x, size=None):
    at = pyro.param("at", torch.zeros(3, 1))
    with pyro.plate("features", 3, dim=-2):
        pyro.sample("loc", dist.Normal(at, 0.2))


@sound("default", "trace", "mean-field", batch_sizes=(None, 3, 7))
def plate_opened_twice():
    return (opened_twice, guide_of_opened), normal(20, 3)


def parts_of_speech(x, y, known, size=None):
    """A label that is observed for some rows only, the others masked: no latent stands for them."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(0.0, scale).expand([len(x), 2]).to_event(1), obs=x)
        with poutine.mask(mask=known):
            pyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=y)


@sound("default", "trace", batch_sizes=(None, 7))
def labels_masked_where_unknown():
    return parts_of_speech, (normal(20, 2), binary(20), binary(20, seed=1).bool())


def rescaled(x, size=None):
    """Model and guide each look at their own rescaling of the data."""
    x = x / 10.0
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide_of_rescaled(x, size=None):
    x = (x - 3.0) / 10.0
    pyro.sample("loc", dist.Normal(pyro.param("at", torch.tensor(0.0)), 0.2))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * x, 0.5))


@sound("default", "trace", "mean-field", batch_sizes=(None, 7))
def data_rescaled_inside():
    return (rescaled, guide_of_rescaled), 10 * normal(20)

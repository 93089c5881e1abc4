"""More of what tutorials show: topics by a network, parts of an image, capture and recapture, endless mixtures."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.indexing import Vindex
from torch import nn
from torch.distributions import constraints

from sound.corpus import binary, integers, normal, nothing, sound

PARALLEL = {"enumerate": "parallel"}


class ProdLDA(nn.Module):
    """Documents are counts of words; how many words there are differs from document to document."""

    def __init__(self, vocabulary: int = 6, topics: int = 3) -> None:
        super().__init__()
        self.topics = topics
        self.encoder = nn.Sequential(nn.Linear(vocabulary, 5), nn.Softplus(), nn.Dropout(0.2))
        self.loc, self.log_scale = nn.Linear(5, topics), nn.Linear(5, topics)
        self.normalise = nn.BatchNorm1d(topics, affine=False)
        self.beta = nn.Linear(topics, vocabulary, bias=False)

    def model(self, docs, size=None):
        pyro.module("decoder", self.beta)
        with pyro.plate("documents", size or len(docs), subsample=docs):
            loc = docs.new_zeros(len(docs), self.topics)
            theta = pyro.sample("log_theta", dist.Normal(loc, 1.0).to_event(1)).softmax(-1)
            total = int(docs.sum(-1).max())
            pyro.sample("words", dist.Multinomial(total, logits=self.beta(theta)), obs=docs)

    def guide(self, docs, size=None):
        with pyro.plate("documents", size or len(docs), subsample=docs):
            hidden = self.encoder(docs)
            loc, scale = self.normalise(self.loc(hidden)), self.log_scale(hidden).exp()
            pyro.sample("log_theta", dist.Normal(loc, scale).to_event(1))


@sound("default", "trace", "mean-field", batch_sizes=(None, 8))
def topics_by_a_network():
    return ProdLDA(), integers(5, 20, 6).float() + torch.eye(6)[0]


class Parts(nn.Module):
    """An image is the sum of at most two parts; a part that is not there is not scored."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = nn.GRUCell(4, 5)
        self.there, self.what = nn.Linear(5, 1), nn.Linear(5, 4)
        self.draw = nn.Linear(2, 4)

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            there, image = x.new_ones(len(x)), torch.zeros_like(x)
            for t in range(2):
                there = pyro.sample(f"there_{t}", dist.Bernoulli(0.4 * there))
                what = dist.Normal(x.new_zeros(len(x), 2), 1.0).mask(there[:, None]).to_event(1)
                image = image + there[:, None] * self.draw(pyro.sample(f"what_{t}", what))
            pyro.sample("x", dist.Normal(image, 0.5).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            there, hidden = x.new_ones(len(x)), x.new_zeros(len(x), 5)
            for t in range(2):
                hidden = self.reader(x, hidden)
                chance = torch.sigmoid(self.there(hidden).squeeze(-1))
                there = pyro.sample(f"there_{t}", dist.Bernoulli(chance * there))
                loc, log_scale = self.what(hidden).chunk(2, -1)
                pyro.sample(f"what_{t}", dist.Normal(loc, log_scale.exp()).mask(there[:, None]).to_event(1))


@sound("graph", batch_sizes=(None, 7))
def parts_of_an_image():
    return Parts(), normal(20, 4)


def recaptured(captures, first, size=None):
    """Each animal is marked at ``first``, survives, and is seen again or not."""
    survival = pyro.sample("survival", dist.Uniform(0.0, 1.0))
    detection = pyro.sample("detection", dist.Uniform(0.0, 1.0))
    with pyro.plate("animals", size or len(captures), subsample=captures):
        alive = torch.ones(len(captures))
        for t in pyro.markov(range(captures.shape[1])):
            with poutine.mask(mask=first < t):
                alive = pyro.sample(f"alive_{t}", dist.Bernoulli(survival * alive), infer=PARALLEL)
                pyro.sample(f"seen_{t}", dist.Bernoulli(detection * alive), obs=captures[:, t])


def sightings():
    captures = binary(16, 4)
    captures[:, 0] = 1.0
    return captures, torch.zeros(16, dtype=torch.long)


@sound("default", "enum", batch_sizes=(None, 7))
def capture_and_recapture():
    return recaptured, sightings()


@sound("default", "enum", batch_sizes=(None, 7))
def capture_and_recapture_with_an_autoguide():
    guide = AutoDiagonalNormal(poutine.block(recaptured, expose=["survival", "detection"]))
    return (recaptured, guide), sightings()


STICKS = 4


def sticks(x, size=None, index=None):
    with pyro.plate("sticks", STICKS - 1):
        parts = pyro.sample("parts", dist.Beta(1.0, 1.5))
    with pyro.plate("components", STICKS):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    left = torch.cumprod(1 - parts, -1)
    weights = nn.functional.pad(parts, (0, 1), value=1.0) * nn.functional.pad(left, (1, 0), value=1.0)
    with pyro.plate("data", size or len(x), subsample=index):
        component = pyro.sample("component", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(Vindex(locs)[..., component, :], 1.0).to_event(1), obs=x)


def guide_of_sticks(x, size=None, index=None):
    rest = pyro.param("rest", torch.ones(STICKS - 1), constraint=constraints.positive)
    with pyro.plate("sticks", STICKS - 1):
        pyro.sample("parts", dist.Beta(torch.ones(STICKS - 1), rest))
    with pyro.plate("components", STICKS):
        pyro.sample("locs", dist.Normal(pyro.param("centres", normal(STICKS, 2)), 0.3).to_event(1))
    start = torch.full((size or len(x), STICKS), 1.0 / STICKS)
    with pyro.plate("data", size or len(x), subsample=index) as rows:
        phi = pyro.param("phi", start, constraint=constraints.simplex)
        pyro.sample("component", dist.Categorical(phi[rows]), infer=PARALLEL)


@sound("default", "enum", batch_sizes=(None, 4, 7))
def mixture_of_broken_sticks():
    return (sticks, guide_of_sticks), normal(18, 2)


@config_enumerate
def marked_by_a_decorator(x, size=None):
    locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", size or len(x), subsample=x):
        side = pyro.sample("side", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(Vindex(locs)[side.long()], 1.0), obs=x)


@sound("default", "enum", batch_sizes=(None, 7))
def mixture_marked_by_a_decorator():
    return (marked_by_a_decorator, nothing), normal(20)


def one_by_one(x, size=None):
    with pyro.plate("data", size or len(x), subsample=x):
        side = pyro.sample("side", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(2 * side - 1, 1.0), obs=x)


def guide_one_by_one(x, size=None):
    """A guide whose values are listed one at a time: twice the runs, half the memory."""
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("side", dist.Bernoulli(logits=slope * x), infer={"enumerate": "sequential"})


@sound("default", "enum", batch_sizes=(None, 7))
def label_enumerated_one_value_at_a_time():
    return (one_by_one, guide_one_by_one), normal(20)


def moving(x, size=None, index=None):
    """A level for each step of each row that walks at random."""
    speed = pyro.sample("speed", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("data", size or len(x), subsample=index):
        level = torch.zeros(())
        for t in range(x.shape[1]):
            level = pyro.sample(f"level_{t}", dist.Normal(level, speed))
            pyro.sample(f"x_{t}", dist.Normal(level, 0.5), obs=x[:, t])


@sound("default", "trace", "trace-vectorised", batch_sizes=(None, 7))
def random_walk_of_a_lone_model():
    return moving, normal(20, 4)


def filtered(x, size=None):
    """The same with the levels integrated out by the distribution."""
    speed = pyro.sample("speed", dist.LogNormal(-1.0, 0.5))
    start, noise = dist.Normal(torch.zeros(1), 1.0).to_event(1), dist.Normal(torch.zeros(1), 0.5).to_event(1)
    step = dist.Normal(torch.zeros(1), speed.unsqueeze(-1)).to_event(1)
    one = torch.eye(1)
    with pyro.plate("data", size or len(x), subsample=x):
        walk = dist.GaussianHMM(start, one, step, one, noise, duration=x.shape[1])
        pyro.sample("x", walk, obs=x[..., None])


@sound("default", "trace", batch_sizes=(None, 7))
def random_walk_integrated_out():
    return filtered, normal(20, 4)


@poutine.reparam(config={"theta": LocScaleReparam(0.0)})
def reparameterised(y, sigma, size=None, index=None):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", size or len(y), subsample=index):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@sound("default", "trace", "trace-vectorised", batch_sizes=(None, 3))
def schools_under_a_reparameterisation():
    return reparameterised, (10 * normal(8), 5 + normal(8, seed=1).abs())


def change_of_all(x, year, size=None):
    """One year in which the rate of all changes, summed out in the model: meant to be one for all rows."""
    rates = pyro.sample("rates", dist.Gamma(torch.ones(2), torch.ones(2)).to_event(1))
    change = pyro.sample("change", dist.Categorical(torch.ones(12) / 12), infer=PARALLEL)
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Poisson(Vindex(rates)[..., (year >= change).long()]), obs=x)


@sound("default", "enum")
def point_of_change_of_all_enumerated_in_the_model():
    return change_of_all, (integers(5, 12).float(), torch.arange(12))

"""Guides that are more than one Normal for one site: layers in several orders, flows of globals, auxiliary sites."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import ComposeTransform, affine_autoregressive, permute
from torch import nn
from torch.distributions import constraints

from sound.corpus import REPARAMETERISED, binary, normal, sound


def gaussian(raw):
    loc, raw_scale = raw.chunk(2, -1)
    return dist.Normal(loc, nn.functional.softplus(raw_scale) + 1e-3).to_event(1)


class Layers(nn.Module):
    """p(top) p(bottom | top) p(x | bottom)."""

    def __init__(self, upwards: bool) -> None:
        super().__init__()
        self.upwards = upwards
        self.down, self.emit = nn.Linear(2, 6), nn.Linear(3, 5)
        self.read = nn.Linear(5, 6 if upwards else 4)
        self.last = nn.Linear(3, 4) if upwards else nn.Linear(7, 6)

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            top = pyro.sample("top", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            bottom = pyro.sample("bottom", gaussian(self.down(top)))
            pyro.sample("x", dist.Bernoulli(logits=self.emit(bottom)).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            if self.upwards:
                bottom = pyro.sample("bottom", gaussian(self.read(x)))
                pyro.sample("top", gaussian(self.last(bottom)))
            else:
                top = pyro.sample("top", gaussian(self.read(x)))
                both = torch.cat([x.expand(*top.shape[:-1], -1), top], -1)
                pyro.sample("bottom", gaussian(self.last(both)))


@sound("default", "trace", "trace-vectorised", "graph", "renyi", batch_sizes=(None, 7))
def layers_read_upwards():
    return Layers(upwards=True), binary(20, 5)


@sound(*REPARAMETERISED, batch_sizes=(None, 7))
def layers_read_downwards():
    return Layers(upwards=False), binary(20, 5)


def line(x, y, size=None):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)


class Flow:
    """Two autoregressive layers over the weights of a regression; no module itself, it holds one."""

    def __init__(self) -> None:
        layers = [affine_autoregressive(2, hidden_dims=[4]), affine_autoregressive(2, hidden_dims=[4])]
        self.layers = nn.ModuleList(layers)
        self.flow = ComposeTransform([layers[0], permute(2, torch.tensor([1, 0])), layers[1]])

    def model(self, x, y, size=None):
        line(x, y, size)

    def guide(self, x, y, size=None):
        pyro.module("flow", self.layers)
        base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        pyro.sample("weight", dist.TransformedDistribution(base, [self.flow]))


@sound("default", "trace", "graph", batch_sizes=(None, 7))
def weights_with_a_flow():
    return Flow(), (normal(20, 2), normal(20, seed=1))


def rotated(x, y, size=None):
    """One draw gives the weights: an auxiliary site, and a point with the density of its transform."""
    angle = pyro.param("angle", torch.tensor(0.1))
    log_scale = pyro.param("log_scale", torch.zeros(2))
    base = pyro.sample("base", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    weight = (base * log_scale.exp()) @ turn.T
    pyro.sample("weight", dist.Delta(weight, log_density=-log_scale.sum(), event_dim=1))


@sound("default", "trace", "trace-particles", "renyi", batch_sizes=(None, 7))
def weights_from_an_auxiliary_site():
    return (line, rotated), (normal(20, 2), normal(20, seed=1))


def correlated(x, y, size=None):
    """A guide in which one site depends on the other: the model has them apart."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)


def guide_of_correlated(x, y, size=None):
    slope = pyro.param("slope", torch.tensor(-0.3))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    b = pyro.sample("b", dist.Normal(pyro.param("b_loc", torch.tensor(0.0)), scale[0]))
    pyro.sample("a", dist.Normal(slope * b, scale[1]))


@sound(*REPARAMETERISED, batch_sizes=(None, 7))
def sites_that_depend_on_each_other_in_the_guide_alone():
    return (correlated, guide_of_correlated), (normal(20), normal(20, seed=1))


def funnel(x, size=None):
    """Global and local latents that the guide draws in the other order: the local ones from the data alone."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of_funnel(x, size=None):
    weight = pyro.param("weight", torch.tensor(0.5))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(weight * x, scale[0]))
    pyro.sample("loc", dist.Normal(pyro.param("at", torch.tensor(0.0)), scale[1]))


@sound("default", "trace", "trace-vectorised", "graph", batch_sizes=(None, 7))
def global_after_local_in_the_guide():
    return (funnel, guide_of_funnel), normal(20)


@sound("default", "trace", batch_sizes=(None, 7))
def one_feature_in_a_column():
    def model(x, size=None):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return model, normal(20, 1)


class Chosen(nn.Module):
    """A binary code drawn on purpose, with a baseline that the module learns beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)
        self.baseline = nn.Linear(4, 1)

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            code = pyro.sample("code", dist.Bernoulli(x.new_full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(code), 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        infer = {"baseline": {"nn_baseline": lambda x: self.baseline(x).squeeze(-1), "nn_baseline_input": x}}
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("code", dist.Bernoulli(logits=self.encoder(x)).to_event(1), infer=infer)


@sound("graph", batch_sizes=(None, 7))
def binary_code_with_a_baseline():
    return Chosen(), normal(20, 4)

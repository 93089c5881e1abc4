"""Guides that Pyro makes from a model, and guides of one family for a site of another."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions import constraints, transforms
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)
from torch import nn

from sound.corpus import binary, integers, normal, sound


def regression(x, y, size=None):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("y", dist.Normal(x @ weight, scale), obs=y)


def xy():
    return normal(20, 3), normal(20, seed=1)


@sound("default", "trace", batch_sizes=(None, 7))
def list_of_autoguides():
    guide = AutoGuideList(regression)
    guide.append(AutoMultivariateNormal(poutine.block(regression, expose=["weight"])))
    guide.append(AutoDelta(poutine.block(regression, expose=["scale"])))
    return (regression, guide), xy()


@sound("default", "trace", batch_sizes=(None, 7))
def list_of_an_autoguide_and_a_function():
    def of_scale(x, y, size=None):
        pyro.sample("scale", dist.LogNormal(pyro.param("log_scale", torch.tensor(0.0)), 0.1))

    guide = AutoGuideList(regression)
    guide.append(AutoNormal(poutine.block(regression, hide=["scale"])))
    guide.append(of_scale)
    return (regression, guide), xy()


@sound("default", "trace", batch_sizes=(None, 7))
def structured_autoguide():
    return (regression, AutoStructured(regression)), xy()


@sound("default", "trace", batch_sizes=(None, 7))
def low_rank_autoguide():
    return (regression, AutoLowRankMultivariateNormal(regression, rank=1)), xy()


@sound("default", "trace", batch_sizes=(None, 7))
def autoguide_of_a_flow():
    return (regression, AutoNormalizingFlow(regression, transforms.affine_autoregressive)), xy()


class Grouped(EasyGuide):
    """One joint Normal for a group of sites."""

    def guide(self, *args, **kwargs):
        group = self.group(match="weight|scale")
        loc = pyro.param("loc", torch.zeros(group.event_shape))
        scale = pyro.param("spread", torch.ones(group.event_shape), constraint=constraints.positive)
        group.sample("both", dist.Normal(loc, scale).to_event(1))


@sound("default", "trace", batch_sizes=(None, 7))
def group_of_sites_in_an_easy_guide():
    return (regression, Grouped(regression)), xy()


def shares(x, size=None):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    faces = pyro.sample("faces", dist.Dirichlet(torch.ones(3)))
    wait = pyro.sample("wait", dist.HalfCauchy(1.0))
    level = pyro.sample("level", dist.StudentT(3.0, 0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        logits = (p * faces).log() * wait + level
        pyro.sample("x", dist.Categorical(logits=logits), obs=x)


def of_other_families(x, size=None):
    """On the same supports: a logistic Normal for a Beta and a Dirichlet, half a Normal, a Normal."""
    loc = pyro.param("loc", torch.zeros(5))
    normal_of_two = dist.Normal(loc[:2], 0.5).to_event(1)
    pyro.sample("p", dist.TransformedDistribution(dist.Normal(loc[2], 0.5), [transforms.SigmoidTransform()]))
    pyro.sample("faces", dist.TransformedDistribution(normal_of_two, [transforms.StickBreakingTransform()]))
    pyro.sample("wait", dist.HalfNormal(loc[3].exp()))
    pyro.sample("level", dist.Normal(loc[4], 0.5))


@sound("default", "trace", "graph", "renyi", batch_sizes=(None, 3, 7))
def guide_of_other_families_on_the_same_supports():
    return (shares, of_other_families), integers(3, 20)


class Relaxed(nn.Module):
    """A code of ones and zeros, smoothed alike in model and guide, or passed straight through in the guide."""

    def __init__(self, straight: bool) -> None:
        super().__init__()
        self.encoder, self.decoder, self.straight = nn.Linear(4, 3), nn.Linear(3, 4), straight

    def model(self, x, size=None):
        logits = x.new_zeros(len(x), 3)
        smooth = dist.RelaxedOneHotCategorical(x.new_tensor(0.7), logits=logits)
        with pyro.plate("data", size or len(x), subsample=x):
            code = pyro.sample("code", dist.OneHotCategorical(logits=logits) if self.straight else smooth)
            pyro.sample("x", dist.Normal(self.decoder(code), 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        logits = self.encoder(x)
        with pyro.plate("data", size or len(x), subsample=x):
            if self.straight:
                pyro.sample("code", dist.OneHotCategoricalStraightThrough(logits=logits))
            else:
                pyro.sample("code", dist.RelaxedOneHotCategorical(x.new_tensor(0.7), logits=logits))


@sound("default", "trace", batch_sizes=(None, 7))
def code_that_is_smoothed():
    return Relaxed(straight=False), normal(20, 4)


@sound("trace", batch_sizes=(None, 7))
def code_that_is_passed_straight_through():
    return Relaxed(straight=True), normal(20, 4)


def improper(x, size=None):
    loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def guide_of_improper(x, size=None):
    pyro.sample("loc", dist.Normal(pyro.param("at", torch.tensor(0.0)), 0.2))


@sound("default", "trace", "mean-field", batch_sizes=(None, 7))
def prior_that_is_improper():
    return (improper, guide_of_improper), normal(20)


def unobserved(x, seen, size=None, index=None):
    """Missing values are latents; which they are, Pyro sees to."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=index):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x, obs_mask=seen)


@sound("default", "trace", batch_sizes=(None, 7))
def values_missing_of_a_lone_model():
    return unobserved, (normal(20), binary(20).bool())

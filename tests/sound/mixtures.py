"""Mixtures: whose component a datum is, summed out in the model or in the guide, or drawn."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from pyro.ops.indexing import Vindex
from torch import nn
from torch.distributions import constraints

from sound.corpus import binary, integers, normal, nothing, sound

PARALLEL = {"enumerate": "parallel"}


def gaussian_points(x, size=None):
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    locs = pyro.param("locs", torch.arange(6.0).reshape(3, 2) - 2.0)
    scales = pyro.param("scales", torch.ones(3, 2), constraint=constraints.positive)
    with pyro.plate("data", size or len(x), subsample=x):
        component = pyro.sample("component", dist.Categorical(weights), infer=PARALLEL)
        loc, scale = Vindex(locs)[component, :], Vindex(scales)[component, :]
        pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


@sound("default", "enum", "enum-nesting-given", "enum-vectorised", batch_sizes=(None, 7))
def mixture_with_an_empty_guide():
    return (gaussian_points, nothing), normal(20, 2)


@sound("default", "enum", batch_sizes=(None, 7))
def mixture_of_a_lone_model():
    return gaussian_points, normal(20, 2)


def gaussian_bayesian(x, size=None):
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 0.5)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
    with pyro.plate("data", size or len(x), subsample=x):
        component = pyro.sample("component", dist.Categorical(weights), infer=PARALLEL)
        pyro.sample("x", dist.Normal(locs[component], scale), obs=x)


@sound("default", "enum", batch_sizes=(None, 7))
def mixture_with_priors_of_a_lone_model():
    return gaussian_bayesian, normal(20)


@sound("default", "enum", batch_sizes=(None, 2))
def mixture_with_as_many_components_as_rows():
    return gaussian_bayesian, normal(3)


@sound("default", batch_sizes=(None, 7), guide="map")
def mixture_at_the_mode():
    return gaussian_bayesian, normal(20)


@sound("default", "enum", batch_sizes=(None, 7))
def mixture_with_a_delta_autoguide_of_its_own():
    return (gaussian_bayesian, AutoDelta(poutine.block(gaussian_bayesian, hide=["component"]))), normal(20)


def multivariate(x, size=None):
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        factors = pyro.sample("factors", dist.LKJCholesky(3, 2.0))
    with pyro.plate("data", size or len(x), subsample=x):
        component = pyro.sample("component", dist.Categorical(torch.ones(3) / 3), infer=PARALLEL)
        pyro.sample("x", dist.MultivariateNormal(locs[component], scale_tril=factors[component]), obs=x)


@sound("default", "enum", batch_sizes=(None, 2))
def mixture_of_three_rows_features_and_components():
    return multivariate, normal(3, 3)


def experts(x, y, size=None):
    gate = pyro.param("gate", torch.zeros(2, 3))
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    noise = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("data", size or len(x), subsample=x):
        expert = pyro.sample("expert", dist.Categorical(logits=x @ gate), infer=PARALLEL)
        mean = (Vindex(weights)[..., expert, :] * x).sum(-1)
        pyro.sample("y", dist.Normal(mean, noise), obs=y)


@sound("default", "enum", batch_sizes=(None, 7))
def mixture_of_experts():
    return experts, (normal(20, 2), normal(20, seed=1))


def latent_classes(x, size=None):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("classes", 2):
        answers = pyro.sample("answers", dist.Beta(torch.ones(4), torch.ones(4)).to_event(1))
    with pyro.plate("data", size or len(x), subsample=x):
        component = pyro.sample("component", dist.Categorical(weights), infer=PARALLEL)
        pyro.sample("x", dist.Bernoulli(answers[component]).to_event(1), obs=x)


@sound("default", "enum", batch_sizes=(None, 7))
def latent_class_analysis():
    return latent_classes, binary(18, 4)


def annotators(x, size=None):
    """Several annotators of every item: which of three kinds it is, and how each of them errs."""
    kinds = pyro.param("kinds", torch.ones(3) / 3, constraint=constraints.simplex)
    with pyro.plate("annotator", 4, dim=-2), pyro.plate("kind", 3, dim=-1):
        confusion = pyro.sample("confusion", dist.Dirichlet(torch.ones(3) + torch.eye(3)[0]))
    with pyro.plate("items", size or len(x), subsample=x, dim=-1):
        kind = pyro.sample("kind_of_item", dist.Categorical(kinds), infer=PARALLEL)
        with pyro.plate("answers", 4, dim=-2):
            of_annotator = Vindex(confusion)[torch.arange(4)[:, None], kind, :]
            pyro.sample("answer", dist.Categorical(of_annotator), obs=x.T)


@sound("default", "enum", batch_sizes=(None, 5))
def annotators_with_plates_in_plates():
    return annotators, integers(3, 12, 4)


class Recognised(nn.Module):
    """The component recognised by a network from the datum."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.locs = nn.Parameter(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]))
        self.network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
        self.infer = PARALLEL if marked else {}

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            component = pyro.sample("component", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(Vindex(self.locs)[component, :], 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("component", dist.Categorical(logits=self.network(x)), infer=self.infer)


@sound("default", "enum", "enum-vectorised", batch_sizes=(None, 7))
def component_enumerated_in_the_guide():
    return Recognised(marked=True), normal(20, 2)


@sound("graph", "graph-vectorised", batch_sizes=(None, 7))
def component_drawn_on_purpose():
    return Recognised(marked=False), normal(20, 2)


def summed_by_the_distribution(x, size=None):
    logits = pyro.param("logits", torch.zeros(3))
    locs = pyro.param("locs", torch.arange(3.0))
    with pyro.plate("data", size or len(x), subsample=x):
        mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(locs, 1.0))
        pyro.sample("x", mixture, obs=x)


@sound("default", "trace", batch_sizes=(None, 7))
def mixture_of_one_family():
    return (summed_by_the_distribution, nothing), normal(20)

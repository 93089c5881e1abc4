"""Regressions: the data are a tuple or a dict, the latents are global, the plate is scaled in minibatches."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoLaplaceApproximation, AutoMultivariateNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import constraints

from sound.corpus import REPARAMETERISED, binary, integers, normal, sound


def linear(x, y, size=None):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        mean = (x * weight[..., None, :]).sum(-1) if weight.dim() > 1 else x @ weight
        pyro.sample("y", dist.Normal(mean + bias, scale), obs=y)


def guide_of_linear(x, y, size=None):
    columns = x.shape[-1]
    loc = pyro.param("loc", torch.zeros(columns))
    spread = pyro.param("spread", torch.full((columns,), 0.1), constraint=constraints.positive)
    pyro.sample("weight", dist.Normal(loc, spread).to_event(1))
    pyro.sample("bias", dist.Normal(pyro.param("at", torch.tensor(0.0)), 0.1))
    pyro.sample("scale", dist.LogNormal(pyro.param("log_scale", torch.tensor(0.0)), 0.1))


@sound("default", "trace", "trace-particles", "mean-field", "graph", "renyi", batch_sizes=(None, 7))
def linear_regression():
    return (linear, guide_of_linear), (normal(20, 3), normal(20, seed=1))


@sound("default", "trace", "graph", "renyi", batch_sizes=(None, 7))
def linear_regression_of_a_lone_model():
    return linear, (normal(20, 3), normal(20, seed=1))


@sound("default", "trace", batch_sizes=(None, 7), guide="full_rank")
def linear_regression_with_a_joint_guide():
    return linear, {"y": normal(20, seed=1), "x": normal(20, 3)}


@sound("default", batch_sizes=(None, 7), guide=AutoLaplaceApproximation)
def linear_regression_for_laplace():
    return linear, (normal(20, 3), normal(20, seed=1))


@sound("default", "trace", batch_sizes=(None, 7))
def linear_regression_with_autoguides_of_its_own():
    return (linear, AutoMultivariateNormal(linear)), (normal(20, 3), normal(20, seed=1))


@sound("default", "trace", batch_sizes=(None, 7), guide=AutoIAFNormal)
def linear_regression_with_a_flow_over_the_globals():
    return linear, (normal(20, 3), normal(20, seed=1))


@sound("default", "mean-field")
def linear_regression_of_three_rows_and_features():
    return (linear, guide_of_linear), (normal(3, 3), normal(3, seed=1))


@sound("default", "mean-field")
def linear_regression_of_one_row():
    return (linear, guide_of_linear), (normal(1, 3), normal(1, seed=1))


@sound("default", "trace", batch_sizes=(None, 7))
def linear_regression_of_one_feature_in_numpy():
    return (linear, guide_of_linear), (normal(20, 1).numpy(), np.linspace(-1.0, 1.0, 20, dtype=np.float32))


def slope(x, y, size=None):
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        mean = pyro.deterministic("mean", a + b * x)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def guide_of_slope(x, y, size=None):
    """The other way about: these two do not depend on each other anywhere."""
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    pyro.sample("b", dist.Normal(pyro.param("b_loc", torch.tensor(0.0)), scale[1]))
    pyro.sample("a", dist.Normal(pyro.param("a_loc", torch.tensor(0.0)), scale[0]))


@sound(*REPARAMETERISED, batch_sizes=(None, 7))
def independent_sites_in_another_order():
    return (slope, guide_of_slope), (normal(20), normal(20, seed=1))


def robust(x, y, size=None):
    freedom = pyro.sample("freedom", dist.Gamma(2.0, 0.1))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    weight = pyro.sample("weight", dist.Laplace(torch.zeros(()), 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("y", dist.StudentT(freedom, weight * x, scale), obs=y)


@sound("default", "trace", "trace-vectorised", batch_sizes=(None, 7))
def robust_regression():
    return robust, (normal(20), normal(20, seed=1))


def horseshoe(x, y, size=None):
    overall = pyro.sample("overall", dist.HalfCauchy(1.0))
    with pyro.plate("features", x.shape[-1]):
        local = pyro.sample("local", dist.HalfCauchy(1.0))
        weight = pyro.sample("weight", dist.Normal(0.0, overall * local))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)


@sound("default", "trace", "graph", batch_sizes=(None, 7))
def horseshoe_regression():
    return horseshoe, (normal(20, 4), normal(20, seed=1))


@sound("default", "trace", batch_sizes=(None, 2))
def horseshoe_regression_of_four_rows_and_features():
    return horseshoe, (normal(4, 4), normal(4, seed=1))


def logistic(x, label, size=None):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("label", dist.Bernoulli(logits=x @ weight), obs=label)


@sound("default", "trace", batch_sizes=(None, 7))
def logistic_regression():
    return logistic, {"x": normal(20, 3), "label": binary(20)}


class Softmax(nn.Module):
    """No latent at all: maximum likelihood of a network, with integer labels."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 4))

    def model(self, x, label, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("label", dist.Categorical(logits=self.network(x)), obs=label)

    def guide(self, x, label, size=None):
        pass


@sound("default", "trace", batch_sizes=(None, 7))
def softmax_regression_of_integer_labels():
    return Softmax(), (normal(20, 3), integers(4, 20))


def ordinal(x, grade, size=None):
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    cuts = pyro.param("cuts", torch.tensor([-1.0, 0.0, 1.0]), constraint=dist.constraints.ordered_vector)
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("grade", dist.OrderedLogistic(weight * x, cuts), obs=grade)


@sound("default", "trace", batch_sizes=(None, 7))
def ordinal_regression():
    return ordinal, (normal(20), integers(4, 20))


def counts(x, y, size=None):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 0.3).to_event(1))
    shape = pyro.sample("shape", dist.Exponential(1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        rate = (x @ weight).exp()
        pyro.sample("y", dist.GammaPoisson(shape, shape / rate), obs=y)


@sound("default", "trace", batch_sizes=(None, 7))
def regression_of_integer_counts():
    return counts, (normal(20, 2), integers(6, 20))


def zero_inflated(x, y, size=None):
    gate, weight = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("gate", "weight"))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate=(weight * x).exp(), gate_logits=gate + x), obs=y)


@sound("default", "trace", "trace-vectorised", batch_sizes=(None, 7))
def regression_of_counts_with_many_zeros():
    return zero_inflated, (normal(20), integers(4, 20).float())


class Bayesian(PyroModule):
    """A linear layer with priors, itself the model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x, y=None, size=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.1, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


@sound("default", "trace", batch_sizes=(None, 7))
def bayesian_layer_of_a_lone_module():
    return Bayesian(), (normal(20, 2), normal(20, seed=1))


@sound("default", "trace", batch_sizes=(None, 7))
def bayesian_layer_with_an_autoguide():
    model = Bayesian()
    return (model, AutoDiagonalNormal(model)), {"x": normal(20, 2), "y": normal(20, seed=1)}

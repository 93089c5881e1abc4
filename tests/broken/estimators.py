"""Pairs that an estimator does not suit."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, TraceMeanField_ELBO

from broken.mistake import COLUMN, Mistake, X, broken


def chain(x, size=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


@broken
def mean_field_against_the_models_order():
    """TraceMeanField_ELBO where the guide draws a parent from its child"""

    def turned(x, size=None):
        b = pyro.sample("b", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        pyro.sample("a", dist.Normal(pyro.param("w", torch.tensor(0.5)) * b, 1.0))

    return Mistake(
        chain,
        turned,
        ("site 'b'", r"\['a', 'b'\].*\['b', 'a'\]", "reorder the guide"),
        "warns",
        data=COLUMN,
        elbo=TraceMeanField_ELBO(),
    )


@broken
def mean_field_with_a_transformed_autoguide():
    """TraceMeanField_ELBO with an autoguide of a positive latent: its log-determinant is forgotten"""

    def positive(x, size=None):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    return Mistake(
        positive,
        None,
        ("site 'scale'", "leaves out", r"Trace_ELBO\(\)"),
        "silent",
        data=COLUMN,
        elbo=TraceMeanField_ELBO(),
    )


def counts(x, size=None):
    with pyro.plate("data", size or len(x), subsample=x):
        c = pyro.sample("c", dist.Poisson(2.0))
        pyro.sample("x", dist.Normal(c, 1.0), obs=x)


def counting(x, size=None):
    rate = pyro.param("rate", torch.tensor(1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("c", dist.Poisson((rate * x).exp()))


@broken
def mean_field_without_reparameterisation():
    """TraceMeanField_ELBO with a site that has no reparameterised draw"""
    return Mistake(
        counts,
        counting,
        ("guide site 'c'", r"\(Poisson\) cannot be reparameterised", "TraceGraph_ELBO"),
        "raises",
        data=COLUMN,
        elbo=TraceMeanField_ELBO(),
    )


@broken
def renyi_without_reparameterisation():
    """RenyiELBO with a site that has no reparameterised draw"""
    return Mistake(
        counts,
        counting,
        ("guide site 'c'", r"\(Poisson\) cannot be reparameterised", "TraceGraph_ELBO"),
        "silent",
        data=COLUMN,
        elbo=RenyiELBO(alpha=0.5, num_particles=2),
    )


@broken
def renyi_in_minibatches():
    """RenyiELBO in minibatches: weights to the power n/B, and no bound"""

    def guide(x, size=None):
        pyro.sample("a", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        pyro.sample("b", dist.Normal(pyro.param("k", torch.tensor(0.0)), 1.0))

    return Mistake(
        chain,
        guide,
        ("RenyiELBO", "power 2.*10 of 20 rows", "batch_size=None"),
        "silent",
        data=COLUMN,
        batch_size=10,
        elbo=RenyiELBO(alpha=0.0, num_particles=4),
    )


@broken
def weight_that_is_not_one():
    """A KL weight of a tenth on both sides, reported as an ELBO"""

    def latent(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, 3), 1.0).to_event(1), obs=x)

    def guide(x, size=None):
        weight = pyro.param("weight", torch.ones(2))
        with pyro.plate("data", size or len(x), subsample=x), poutine.scale(scale=0.1):
            pyro.sample("z", dist.Normal(x[:, :2] * weight, 1.0).to_event(1))

    return Mistake(latent, guide, ("site 'z'", "weighted 0.1", "weight 1"), "silent", data=X, warned=True)


@broken
def guide_that_does_not_see_the_data():
    """An amortised guide that does not depend on its data"""

    def latent(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, 3), 1.0).to_event(1), obs=x)

    torch.manual_seed(0)
    encoder = torch.nn.Linear(3, 2)

    def blind(x, size=None):
        pyro.module("encoder", encoder)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(encoder(torch.ones_like(x)), 1.0).to_event(1))

    return Mistake(latent, blind, ("guide site 'z'", "all 20 rows", "from x"), "silent", data=X, warned=True)


@broken
def shared_latent_inside_the_plate():
    """A latent that looks global lies in the data plate"""

    def inside(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x, size=None):
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("loc", dist.Normal(m, 1.0))

    return Mistake(
        inside, guide, ("site 'loc'", "each of 20 rows", "before the plate"), "silent", data=COLUMN, warned=True
    )

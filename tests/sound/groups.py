"""Latents of groups beside those of data: a plate that is not over the rows, indexed by what a row says."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

from sound.corpus import REPARAMETERISED, binary, integers, normal, sound


def radon(x, y, county, size=None):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(torch.ones(2)).to_event(1))
    with pyro.plate("counties", 4):
        line = pyro.sample("line", dist.Normal(mean, spread).to_event(1))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", size or len(x), subsample=x):
        a, b = line[county].unbind(-1)
        pyro.sample("y", dist.Normal(a + b * x, scale), obs=y)


def homes(rows=20, counties=4):
    return {"x": normal(rows), "y": normal(rows, seed=1), "county": integers(counties, rows)}


@sound("default", "trace", "graph", batch_sizes=(None, 7))
def lines_of_counties():
    return radon, homes()


@sound("default", "trace", batch_sizes=(None, 3))
def lines_of_as_many_counties_as_rows():
    return radon, homes(4)


@sound("default", "trace", batch_sizes=(None, 4))
def lines_of_as_many_counties_as_rows_in_a_batch():
    return radon, homes(10)


@sound("default", "trace", batch_sizes=(None, 7), guide=AutoLowRankMultivariateNormal)
def lines_of_counties_with_a_joint_guide():
    return radon, homes()


def offsets(y, county, size=None):
    with pyro.plate("counties", 4):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    overall = pyro.sample("overall", dist.Normal(0.0, 5.0))
    with pyro.plate("data", size or len(y), subsample=y):
        pyro.sample("y", dist.Normal(overall + Vindex(offset)[..., county], 1.0), obs=y)


def guide_of_offsets(y, county, size=None):
    pyro.sample("overall", dist.Normal(pyro.param("at", torch.tensor(0.0)), 0.2))
    loc = pyro.param("loc", torch.zeros(4))
    scale = pyro.param("scale", torch.ones(4), constraint=constraints.positive)
    with pyro.plate("counties", 4):
        pyro.sample("offset", dist.Normal(loc, scale))


@sound("default", "trace", "trace-particles", "mean-field", "graph", "renyi", batch_sizes=(None, 4))
def offsets_of_counties():
    return (offsets, guide_of_offsets), (normal(14), integers(4, 14))


@sound("default", "trace", batch_sizes=(None, 7))
def offsets_of_counties_with_an_autoguide():
    return (offsets, AutoNormal(offsets)), (normal(20), integers(4, 20))


def variances(x, batch, size=None):
    """The groups are hidden in the guide's order: spread after line in the model, before it in the guide."""
    with pyro.plate("batches", 3):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(Vindex(level)[..., batch], Vindex(spread)[..., batch]), obs=x)


def guide_of_variances(x, batch, size=None):
    loc = pyro.param("loc", torch.zeros(3))
    with pyro.plate("batches", 3):
        pyro.sample("spread", dist.LogNormal(loc, 0.1))
        pyro.sample("level", dist.Normal(loc, 0.1))


@sound("default", "trace", "mean-field", batch_sizes=(None, 3))
def variances_of_batches_in_another_order():
    return (variances, guide_of_variances), (normal(10), integers(3, 10))


def abilities(student, item, correct, size=None):
    """Item response: the rows are answers, students and items are plates side by side."""
    with pyro.plate("students", 5):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("items", 4):
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
        steepness = pyro.sample("steepness", dist.LogNormal(0.0, 0.5))
    with pyro.plate("answers", size or len(student), subsample=student):
        logits = steepness[item] * (ability[student] - difficulty[item])
        pyro.sample("correct", dist.Bernoulli(logits=logits), obs=correct)


@sound("default", "trace", batch_sizes=(None, 7))
def abilities_of_students():
    return abilities, (integers(5, 20), integers(4, 20, seed=1), binary(20))


def nested(x, size=None, index=None):
    """A latent for each datum, and one for each of its measurements."""
    overall = pyro.sample("overall", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=index, dim=-1):
        level = pyro.sample("level", dist.Normal(overall, 1.0))
        with pyro.plate("measurements", x.shape[1], dim=-2):
            true = pyro.sample("true", dist.Normal(level, 0.5))
            pyro.sample("x", dist.StudentT(4.0, true, 0.3), obs=x.T)


@sound("default", "trace", "mean-field", "renyi")
def measurements_of_each_datum():
    return nested, normal(8, 3)


@sound("default", "trace", batch_sizes=(None, 3))
def measurements_of_each_datum_in_minibatches():
    return nested, normal(8, 3)


def guide_of_nested(x, size=None, index=None):
    weight = pyro.param("weight", torch.tensor([0.5, 0.5]), constraint=constraints.unit_interval)
    pyro.sample("overall", dist.Normal(pyro.param("at", torch.tensor(0.0)), 0.2))
    with pyro.plate("data", size or len(x), subsample=index, dim=-1):
        level = pyro.sample("level", dist.Normal(weight[0] * x.mean(1), 0.3))
        with pyro.plate("measurements", x.shape[1], dim=-2):
            pyro.sample("true", dist.Normal(level + weight[1] * (x.T - level), 0.3))


@sound(*REPARAMETERISED, batch_sizes=(None, 3))
def measurements_with_a_guide_by_hand():
    return (nested, guide_of_nested), normal(8, 3)

"""Parameters, constants and data that cannot be what was meant."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from torch.distributions import constraints

from broken.mistake import COLUMN, LABELS, Mistake, X, broken, nothing

GREY = torch.linspace(0.0, 1.0, 60).reshape(20, 3)


def likelihood(make):
    def model(x, size=None):
        theta = pyro.param("theta", torch.tensor(0.5))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", make(theta), obs=x)

    return model


@broken
def parameter_outside_its_constraint():
    """A parameter starts outside its constraint"""

    def model(x, size=None):
        scale = pyro.param("scale", torch.tensor(-1.0), constraint=constraints.positive)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    return Mistake(
        model, nothing, ("'scale'", r"-1\.0.*GreaterThan", "change the initial value"), "raises", data=COLUMN
    )


@broken
def parameter_on_the_boundary():
    """A parameter starts on the boundary of its constraint"""

    def model(x, size=None):
        weights = pyro.param("weights", torch.tensor([1.0, 0.0]), constraint=constraints.simplex)
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[k], 1.0), obs=x)

    return Mistake(
        model,
        nothing,
        ("'weights'", r"1\.0, 0\.0.*Simplex", "initial value"),
        "silent",
        data=COLUMN,
        elbo=TraceEnum_ELBO(),
    )


@broken
def whole_numbers_for_a_parameter():
    """A parameter starts at a whole number"""

    def model(x, size=None):
        loc = pyro.param("loc", torch.tensor(0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return Mistake(model, nothing, ("'loc'", "torch.int64", "decimal point"), "raises", data=COLUMN)


@broken
def scale_without_a_constraint():
    """A scale that is negative, as nothing keeps it positive"""

    def model(x, size=None):
        raw = pyro.param("raw", torch.tensor(-0.3))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(0.0, raw), obs=x)

    return Mistake(
        model, nothing, (r"Normal \(at values.py:\d+\).*'scale'", r"-0\.3", r"\.exp\(\)"), "raises", data=COLUMN
    )


@broken
def constants_for_parameters():
    """Nothing can be trained: constants where parameters were meant"""

    def model(x, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x, size=None):
        pyro.sample("loc", dist.Normal(torch.tensor(0.0), torch.tensor(1.0)))

    return Mistake(model, guide, ("model, guide", "no parameter to train", "pyro.param"), "silent", data=COLUMN)


@broken
def parameter_without_a_start():
    """A parameter without an initial value"""

    def model(x, size=None):
        loc = pyro.param("loc")
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return Mistake(model, nothing, ("'loc'", "no initial value", r"pyro.param\('loc', tensor\)"), "raises", data=COLUMN)


@broken
def name_of_a_site_and_a_parameter():
    """A site and a parameter of one name"""

    def model(x, size=None):
        loc = pyro.param("loc", torch.tensor(0.0))
        loc = pyro.sample("loc", dist.Normal(loc, 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return Mistake(model, nothing, ("'loc'", "a site and a param", "rename"), "raises", data=COLUMN)


@broken
def constant_of_another_precision():
    """A float32 vector inside a program for float64 data"""

    def model(x, size=None):
        weight = pyro.param("weight", torch.zeros(3))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(x @ torch.ones(3, 2) @ weight.new_ones(2), 1.0), obs=x[:, 0])

    return Mistake(model, nothing, ("values.py", "torch.float64", "x.new_tensor"), "raises", data=X.double())


@broken
def tensor_on_another_device():
    """A tensor on another device than the data"""

    def model(x, size=None):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc + z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x, size=None):
        weight = pyro.param("weight", torch.ones(2))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(x[:, :2] * weight + torch.ones(2, device="meta"), 1.0).to_event(1))

    return Mistake(model, guide, (r"values.py:\d+", "data, which are on cpu.*meta", "device=x.device"), "raises")


@broken
def grey_pixels_under_bernoulli():
    """Grey pixels under a Bernoulli likelihood"""
    model = likelihood(lambda theta: dist.Bernoulli(logits=theta.expand(3)).to_event(1))
    return Mistake(
        model, nothing, ("site 'x'.*Bernoulli", "58 values.*0.01695 in row 0", "binarize="), "raises", data=GREY
    )


@broken
def negative_counts():
    """Negative numbers under a Poisson likelihood"""
    model = likelihood(lambda theta: dist.Poisson(theta.exp()))
    counts = torch.arange(20.0) - 1.0
    return Mistake(model, nothing, ("site 'x'.*Poisson", "1 values.*-1 in row 0", "pass counts"), "raises", data=counts)


@broken
def labels_from_one():
    """Categories numbered from 1"""
    model = likelihood(lambda theta: dist.Categorical(logits=theta.expand(3)))
    return Mistake(
        model,
        nothing,
        ("site 'x'.*Categorical", "values.*3 in row 2", "number the categories from 0"),
        "raises",
        data=LABELS + 1,
    )


@broken
def proportions_on_the_boundary():
    """Noughts and ones under a Beta likelihood"""
    model = likelihood(lambda theta: dist.Beta(theta.exp(), 1.0))
    data = torch.linspace(-0.1, 0.9, 20)
    return Mistake(model, nothing, ("site 'x'.*Beta", "-0.1 in row 0", "another likelihood"), "raises", data=data)


@broken
def whole_numbers_under_a_density():
    """Whole numbers under a continuous likelihood"""
    model = likelihood(lambda theta: dist.Normal(theta, 1.0))
    return Mistake(
        model, nothing, ("site 'x'.*Normal", "torch.int64, such as 0", r"x.to\(torch.float32\)"), "silent", data=LABELS
    )


@broken
def data_with_a_hole():
    """A missing value in the data"""
    model = likelihood(lambda theta: dist.Normal(theta, 1.0))
    holed = COLUMN.clone()
    holed[7] = torch.nan
    return Mistake(model, nothing, ("data holds NaN", "row 7", "drop or impute"), "raises", data=holed)


@broken
def scale_that_is_no_number():
    """A scale that is NaN"""

    def model(x, size=None):
        raw = pyro.param("raw", torch.tensor(-0.3))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(0.0, raw.log()), obs=x)

    return Mistake(model, nothing, (r"Normal \(at values.py:\d+\).*'scale'", "nan", "logarithm"), "raises", data=COLUMN)

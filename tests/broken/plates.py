"""Plates that are missing, of another size, or hold other rows; shapes that they do not hold."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO

from broken.mistake import COLUMN, Mistake, X, broken, nothing

WIDE = torch.randn(20, 20, generator=torch.Generator().manual_seed(1))
"""As many columns as rows, so that Pyro has nothing to say where the two are exchanged."""


def observing(likelihood, obs=lambda x: x):
    """A model with one shared location and one likelihood in the data plate."""

    def model(x, size=None):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", likelihood(x, loc), obs=obs(x))

    return model


@broken
def rows_without_a_plate():
    """The rows are in no plate"""

    def bare(x, size=None):
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("x", dist.Normal(loc.expand(len(x), 3), 1.0).to_event(1), obs=x)

    return Mistake(bare, nothing, ("site 'x'", "dim -1 of 20", r'pyro.plate\("data", size or len\(x\)'), "raises")


@broken
def rows_without_a_plate_as_one_event():
    """The rows are one event, in no plate: minibatches are not scaled"""

    def one_event(x, size=None):
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("x", dist.Normal(loc.expand(len(x), 3), 1.0).to_event(2), obs=x)

    return Mistake(one_event, nothing, ("site 'x'", r"event shape \(10, 3\)", "plate"), "silent", batch_size=10)


@broken
def latents_without_a_plate():
    """Latents of every row, in no plate"""

    def model(x, size=None):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(x * pyro.param("w", torch.tensor(1.0)), 1.0))

    return Mistake(model, guide, ("site 'z'", "dim -1 of 20", r'pyro.plate\("data"'), "raises", data=COLUMN)


@broken
def columns_without_an_event():
    """A missing to_event where the columns are not as many as the rows"""
    model = observing(lambda x, loc: dist.Normal(loc.expand(len(x), 3), 1.0))
    return Mistake(model, nothing, ("site 'x'", "plates.py.*20 rows.*has 3", r"\.to_event\(1\)"), "raises")


@broken
def square_data_without_an_event():
    """A missing to_event where there are as many columns as rows"""
    model = observing(lambda x, loc: dist.Normal(loc.expand(20, 20), 1.0))
    return Mistake(model, nothing, ("site 'x'", "dim -2 of 20", r"\.to_event\(1\)"), "raises", data=WIDE)


@broken
def rows_inside_the_event():
    """An event that swallows the rows: every datum counts 20 times"""
    model = observing(lambda x, loc: dist.Normal(loc.expand(len(x), 3), 1.0).to_event(2))
    return Mistake(model, nothing, ("site 'x'", "counted 20 times", r"\.to_event\(1\)"), "silent")


@broken
def rows_inside_the_event_of_a_latent():
    """Each datum has latents for all rows"""

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(z.mean((-1, -2)).unsqueeze(-1).expand(-1, 3), 1.0).to_event(1), obs=x)

    def guide(x, size=None):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(x[:, :2] + loc, 1.0).to_event(2))

    return Mistake(model, guide, ("site 'z'", r"\(20, 2\).*20 rows", r"\.to_event\(1\)"), "silent")


@broken
def column_of_data():
    """Data of shape (20, 1) under parameters of shape (20,)"""
    model = observing(lambda x, loc: dist.Normal(loc.expand(len(x)), 1.0), lambda x: x.unsqueeze(-1))
    return Mistake(
        model, nothing, ("site 'x'", r"\(20, 1\).*\(20, 20\)", r"the value.*\.squeeze\(-1\)"), "raises", data=COLUMN
    )


@broken
def column_of_parameters():
    """Parameters of shape (20, 1) under data of shape (20,)"""
    model = observing(lambda x, loc: dist.Normal(loc * x.unsqueeze(-1), 1.0))
    return Mistake(
        model,
        nothing,
        ("site 'x'", r"\(20, 1\).*\(20, 20\)", r"the parameters.*\.squeeze\(-1\)"),
        "raises",
        data=COLUMN,
    )


@broken
def column_of_parameters_outside_enumeration():
    """The same beside an enumerated label, to whose dims Pyro ascribes it"""

    def model(x, size=None):
        locs = pyro.param("locs", torch.zeros(2))
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x.unsqueeze(-1))

    return Mistake(
        model,
        nothing,
        ("site 'x'", r"\(20, 20\)|dim -2 of 20", "squeeze"),
        "raises",
        data=COLUMN,
        elbo=TraceEnum_ELBO(),
    )


@broken
def data_of_fewer_columns():
    """One column of data under three columns of parameters"""
    model = observing(lambda x, loc: dist.Normal(loc.expand(3), 1.0).to_event(1), lambda x: x[:, :1])
    return Mistake(model, nothing, ("site 'x'", r"\(20, 1\).*\(3,\)", "as many parameters.*1"), "silent")


@broken
def two_plates_at_one_dim():
    """Two plates at one dim"""

    def model(x, size=None):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", size or len(x), subsample=x, dim=-1), pyro.plate("columns", 3, dim=-1):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return Mistake(model, nothing, ("'columns' and 'data'|'data' and 'columns'", "dim -1", "dim=-2"), "raises")


@broken
def plates_in_the_wrong_order():
    """The parameters have the dims of two plates the other way round"""

    def model(x, size=None):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", size or len(x), subsample=x), pyro.plate("columns", 3):
            pyro.sample("x", dist.Normal(loc, 1.0).expand([len(x), 3]), obs=x)

    return Mistake(model, nothing, ("site 'x'", "'columns'.*3 rows in dim -2.*20", "transpose"), "raises")


@broken
def plate_of_a_fixed_size():
    """A plate with the number of other data"""

    def model(x, size=None):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", 100, subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return Mistake(model, nothing, ("site 'x'", "size 100.*20 rows", "size or len"), "silent")


@broken
def plate_longer_than_the_data():
    """A plate of 100 rows around 20"""

    def model(x, size=None):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", 100):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return Mistake(model, nothing, ("site 'x'", "100 rows.*have 20", "size or len"), "raises")


@broken
def plate_without_a_size():
    """A subsample without a size"""

    def model(x, size=None):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", None, subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return Mistake(model, nothing, (r"plate \(at plates.py:\d+\)", "20 rows", "size or len"), "raises")


@broken
def minibatches_without_size():
    """A program that cannot scale its minibatches"""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    return Mistake(
        model, guide, ("model", "10 rows at a time out of 20", "size=None"), "silent", data=COLUMN, batch_size=10
    )


@broken
def minibatches_that_ignore_size():
    """A program that takes `size` and leaves it unused"""

    def model(x, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x, size=None):
        pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    return Mistake(model, guide, ("site 'x'", "size 10.*20 rows", "size or len"), "silent", data=COLUMN, batch_size=10)


def per_datum(x, size=None, index=None):
    with pyro.plate("data", size or len(x), subsample=x if index is None else index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x if x.is_floating_point() else x.float())


@broken
def parameters_by_the_values_of_integer_data():
    """`subsample=x` around per-datum parameters, with whole numbers for data: values are taken for row numbers"""

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.zeros(size), event_dim=0), 1.0))

    return Mistake(
        model,
        guide,
        ("parameter 'loc'", "20 rows", "subsample=index"),
        "silent",
        data=torch.arange(20) % 7,
        batch_size=10,
    )


@broken
def parameters_by_the_values_of_real_data():
    """`subsample=x` around per-datum parameters, with real data"""

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.zeros(size), event_dim=0), 1.0))

    def model(x, size=None):
        per_datum(x, size)

    return Mistake(
        model, guide, ("parameter 'loc'", "20 rows", "subsample=index"), "raises", data=COLUMN, batch_size=10
    )


@broken
def parameters_of_the_batch():
    """Per-datum parameters as many as the batch has rows: every batch uses the same ones"""

    def model(x, size=None):
        per_datum(x, size)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.zeros(len(x))), 1.0))

    return Mistake(
        model,
        guide,
        ("parameter 'loc'", r"\(10,\).*10 rows.*20 rows", r"\[index\]"),
        "silent",
        data=COLUMN,
        batch_size=10,
    )


@broken
def batch_size_written_into_the_program():
    """A program for batches of 8 that meets a last one of 4"""

    def model(x, size=None):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", size, subsample=x):
            pyro.sample("x", dist.Normal(loc.expand(8, 3), 1.0).to_event(1), obs=x)

    return Mistake(model, nothing, ("8 rows.*the last, of 4.*'x'", "4.*8", r"Write len\(x\)"), "raises", batch_size=8)


@broken
def data_of_the_surroundings():
    """The model observes a variable of the surroundings, not its argument"""

    def model(x, size=None):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", size, subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=X[:10])

    return Mistake(model, nothing, ("site 'x'", "same 10 values", "obs=x"), "silent", batch_size=10)


@broken
def plate_inside_itself():
    """A plate is opened inside itself"""

    def model(x, size=None):
        plate = pyro.plate("data", size or len(x), subsample=x)
        with plate:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Mistake(
        model, nothing, ("plate 'data'", r"plates.py:\d+ and plates.py:\d+", "make it once"), "raises", data=COLUMN
    )


@broken
def data_of_fewer_rows():
    """Four rows of data under a parameter for each of 20"""
    model = observing(lambda x, loc: dist.Normal(loc * x, 1.0), lambda x: x[:4])
    return Mistake(
        model, nothing, ("site 'x'", r"\(4,\).*\(20,\)", r"as long as the value, \(4,\)"), "raises", data=COLUMN
    )


@broken
def one_number_for_all_columns():
    """A single number under three columns of parameters"""
    model = observing(lambda x, loc: dist.Normal(loc.expand(3), 1.0).to_event(1), lambda x: x[0, 0])
    return Mistake(model, nothing, ("site 'x'", r"\(\).*\(3,\)", "reshape the value"), "silent")


@broken
def parameters_of_all_rows_in_a_batch():
    """A parameter for each of all rows, where the batch has some of them"""

    def model(x, size=None):
        locs = pyro.param("locs", lambda: torch.zeros(size))
        with pyro.plate("data", size, subsample=x):
            pyro.sample("x", dist.Normal(locs, 1.0), obs=x)

    says = ("site 'x'", "10 rows.*has 20", r"parameter\[index\]")
    return Mistake(model, nothing, says, "raises", data=COLUMN, batch_size=10)


@broken
def subsample_of_another_size():
    """A subsample that is longer than its subsample_size"""

    def model(x, size=None):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", size, subsample_size=5, subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    says = (r"a plate \(at plates.py:\d+\)", "subsample_size 5.*10", "leave subsample_size out")
    return Mistake(model, nothing, says, "raises", data=COLUMN, batch_size=10)


@broken
def plate_opened_twice():
    """A plate is opened inside its own block"""

    def model(x, size=None):
        rows = pyro.plate("data", size or len(x), subsample=x)
        with rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with rows:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    says = (r"plate 'data'", r"plates.py:\d+", "open it once")
    return Mistake(model, nothing, says, "raises", data=COLUMN)


@broken
def inner_plates_of_two_sizes():
    """An inner plate that is larger in the guide"""

    def views(count):
        def callable_(x, size=None):
            with pyro.plate("data", size or len(x), subsample=x), pyro.plate("views", count):
                return pyro.sample("z", dist.Normal(pyro.param(f"loc{count}", torch.tensor(0.0)), 1.0))

        return callable_

    def model(x, size=None):
        z = views(1)(x, size)
        with pyro.plate("rows", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(z.mean(), 1.0), obs=x)

    says = ("site 'z'", "'views' of 1.*in the model and in 'views' of 4", "the sizes of the model's")
    return Mistake(model, views(4), says, "silent", data=COLUMN)

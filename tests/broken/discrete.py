"""Discrete sites that nobody sums out, or that cannot be."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from broken.mistake import COLUMN, LABELS, Mistake, X, broken, nothing

LISTED = {"enumerate": "parallel"}


def mixture(infer, obs=lambda x: x):
    def model(x, size=None):
        locs = pyro.param("locs", torch.tensor([-1.0, 0.0, 1.0]))
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)), infer=infer)
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    return model


def labelling(infer):
    def guide(x, size=None):
        weight = pyro.param("weight", torch.zeros(3))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("k", dist.Categorical(logits=x.unsqueeze(-1) * weight), infer=infer)

    return guide


@broken
def label_that_nobody_sums_out():
    """A label without a mark and without a guide site"""
    return Mistake(
        mixture({}),
        nothing,
        ("site 'k'", "nobody sums it out.*enumerate", "3 values of 'k' = 3×"),
        "warns",
        data=COLUMN,
    )


@broken
def label_that_nobody_sums_out_under_enumeration():
    """The same under TraceEnum_ELBO, which would draw it from its prior"""
    return Mistake(
        mixture({}),
        nothing,
        ("site 'k'", "nobody sums it out.*enumerate", "= 3×"),
        "warns",
        data=COLUMN,
        elbo=TraceEnum_ELBO(),
    )


@broken
def label_listed_for_trace_elbo():
    """A label is marked, but Trace_ELBO lists nothing"""
    return Mistake(
        mixture(LISTED),
        nothing,
        ("site 'k'", r"Trace_ELBO\(\) cannot.*TraceEnum_ELBO\(\)", "= 3×"),
        "warns",
        data=COLUMN,
        elbo=Trace_ELBO(),
    )


@broken
def label_listed_for_mean_field():
    """A label is marked, but TraceMeanField_ELBO lists nothing"""
    return Mistake(
        mixture(LISTED),
        nothing,
        ("site 'k'", r"TraceMeanField_ELBO\(\) cannot.*TraceEnum_ELBO\(\)", "= 3×"),
        "raises",
        data=COLUMN,
        elbo=TraceMeanField_ELBO(),
    )


@broken
def label_listed_for_renyi():
    """A label is marked, but RenyiELBO lists nothing"""
    return Mistake(
        mixture(LISTED),
        nothing,
        ("site 'k'", "RenyiELBO.*TraceEnum_ELBO", "= 3×"),
        "warns",
        data=COLUMN,
        elbo=RenyiELBO(alpha=0.0, num_particles=2),
    )


@broken
def guide_label_listed_for_trace_graph():
    """The guide's label is marked, but TraceGraph_ELBO lists nothing"""
    return Mistake(
        mixture({}),
        labelling(LISTED),
        ("site 'k'", "TraceGraph_ELBO.*TraceEnum_ELBO", "= 3×"),
        "warns",
        data=COLUMN,
        elbo=TraceGraph_ELBO(),
    )


@broken
def guide_label_drawn_unawares():
    """The guide draws a label without a mark: gradients of great variance"""
    return Mistake(
        mixture({}),
        labelling({}),
        ("guide site 'k'", "nobody sums it out.*enumerate", "= 3×.*TraceGraph_ELBO"),
        "silent",
        data=COLUMN,
    )


@broken
def labels_of_two_sites():
    """Two labels without a mark; the first is named with its cost"""

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", dist.Categorical(torch.ones(10)))
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(pyro.param("m", torch.zeros(10))[y] + k, 1.0), obs=x)

    return Mistake(
        model, nothing, ("site 'y'", "enumerate", "10 values of 'y' × 2 values of 'k' = 20×"), "warns", data=COLUMN
    )


@broken
def counts_that_cannot_be_listed():
    """A Poisson latent is marked for enumeration"""

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            c = pyro.sample("c", dist.Poisson(2.0), infer=LISTED)
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(1.0)) * c, 1.0), obs=x)

    return Mistake(
        model,
        nothing,
        ("site 'c'", r"\(Poisson\).*cannot be listed", "truncate"),
        "raises",
        data=COLUMN,
        elbo=TraceEnum_ELBO(),
    )


@broken
def model_site_listed_one_by_one():
    """A model's site is marked for sequential enumeration, which only guides have"""
    return Mistake(
        mixture({"enumerate": "sequential"}),
        nothing,
        ("site 'k'", "sequential", "parallel.*= 3×"),
        "raises",
        data=COLUMN,
        elbo=TraceEnum_ELBO(),
    )


@broken
def mask_that_drops_the_mark():
    """`obs_mask=` drops `infer=`: the hidden labels are drawn from their prior"""

    def model(x, y, size=None):
        locs = pyro.param("locs", torch.tensor([-1.0, 0.0, 1.0]))
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)), obs=y, obs_mask=y > 0, infer=LISTED)
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    return Mistake(
        model,
        nothing,
        ("site 'k_unobserved'", "obs_mask=, which drops infer=", "-inf"),
        "warns",
        data=(COLUMN, LABELS),
        elbo=TraceEnum_ELBO(),
    )


@broken
def label_outside_the_plate():
    """One label for all rows, where each has its own"""

    def model(x, size=None):
        locs = pyro.param("locs", torch.tensor([-1.0, 0.0, 1.0]))
        k = pyro.sample("k", dist.Categorical(torch.ones(3)), infer=LISTED)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    return Mistake(
        model,
        nothing,
        ("site 'k'", "all 20 rows", "move it into the plate"),
        "silent",
        data=COLUMN,
        warned=True,
        elbo=TraceEnum_ELBO(),
    )


@broken
def label_outside_the_plate_of_a_minibatch():
    """One label for all rows, in minibatches: a scaled sum is no sum"""
    return Mistake(
        label_outside_the_plate().model,
        nothing,
        ("site 'k'", "10 of 20 rows", "move it into the plate"),
        "raises",
        data=COLUMN,
        elbo=TraceEnum_ELBO(),
        batch_size=10,
    )


@broken
def labels_without_a_plate():
    """Labels of every row, in no plate"""

    def model(x, size=None):
        locs = pyro.param("locs", torch.tensor([-1.0, 0.0, 1.0]))
        k = pyro.sample("k", dist.Categorical(torch.ones(len(x), 3)), infer=LISTED)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    return Mistake(
        model,
        nothing,
        ("site 'k'", "dim -1 of 20", r'pyro.plate\("data"'),
        "raises",
        data=COLUMN,
        elbo=TraceEnum_ELBO(),
    )


@broken
def too_many_labels_at_once():
    """Twenty-one labels side by side: 2^21 assignments of each row"""

    def model(x, size=None):
        total = x.new_zeros(())
        with pyro.plate("data", size or len(x), subsample=x):
            for t in range(21):
                total = total + pyro.sample(f"k{t}", dist.Bernoulli(0.5), infer=LISTED)
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(1.0)) * total, 1.0), obs=x[:, 0])

    return Mistake(
        model,
        nothing,
        ("site 'k0'", r"20 more.*2\.1e\+06", "pyro.markov"),
        "silent",
        data=X[:2],
        elbo=TraceEnum_ELBO(),
    )


@broken
def chain_that_forgets():
    """A chain that looks back two steps where pyro.markov remembers one"""

    def model(x, size=None):
        move = pyro.param("move", torch.zeros(2, 2, 2))
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", size or len(x), subsample=x):
            before, last = 0, 0
            for t in pyro.markov(range(4)):
                k = pyro.sample(
                    f"k{t}", dist.Categorical(logits=pyro.ops.indexing.Vindex(move)[before, last]), infer=LISTED
                )
                pyro.sample(f"x{t}", dist.Normal(locs[k], 1.0), obs=x[:, t])
                before, last = last, k

    return Mistake(
        model,
        nothing,
        ("site '[kx]2'", "dim has been used again", "history=2"),
        "raises",
        data=torch.cat([X, X], 1),
        elbo=TraceEnum_ELBO(),
    )


@broken
def counts_that_nobody_lists():
    """A Poisson latent without a guide site"""

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            c = pyro.sample("c", dist.Poisson(2.0))
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(1.0)) * c, 1.0), obs=x)

    return Mistake(
        model, nothing, ("site 'c'", r"\(Poisson\).*cannot be listed", "TraceGraph_ELBO"), "warns", data=COLUMN
    )


@broken
def weights_around_part_of_a_sum():
    """A weight on the likelihood alone, where a label is summed out: the sum is no longer one"""

    def model(x, size=None):
        locs = pyro.param("locs", torch.tensor([-1.0, 0.0, 1.0]))
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)), infer=LISTED)
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    says = ("site 'k'", "different weights", "in the guide as well")
    return Mistake(model, nothing, says, "raises", data=COLUMN, elbo=TraceEnum_ELBO())

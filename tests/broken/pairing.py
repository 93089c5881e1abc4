"""Model and guide that do not belong together."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import constraints

from broken.mistake import COLUMN, Mistake, X, broken, nothing


def model(x, size=None):
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("x", dist.Normal(loc + z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)


def encoded(x):
    return x[:, :2] * pyro.param("weight", torch.ones(2))


def guide(x, size=None):
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(encoded(x), 1.0).to_event(1))


def positive(x, size=None):
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


@broken
def misspelt_guide_site():
    """The guide's site is misspelt"""

    def typo(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("zz", dist.Normal(encoded(x), 1.0).to_event(1))

    return Mistake(
        model, typo, (r"site 'z' \(pairing.py:\d+\)", "did you mean 'zz'", r"Rename pyro.sample\('zz'.*'z'"), "warns"
    )


@broken
def site_missing_from_the_guide():
    """A latent site has none in the guide"""

    def two(x, size=None):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        model(x + shift, size)

    return Mistake(two, guide, ("site 'shift'", "no site in the guide", r"Add pyro.sample\('shift'"), "warns")


@broken
def site_missing_under_mean_field():
    """The same under TraceMeanField_ELBO"""
    return Mistake(
        model,
        nothing,
        ("site 'z'", "no site in the guide", r"Add pyro.sample\('z'"),
        "raises",
        elbo=TraceMeanField_ELBO,
    )


@broken
def extra_guide_site():
    """The guide has a site that the model lacks"""

    def extra(x, size=None):
        guide(x, size)
        pyro.sample("slope", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    return Mistake(model, extra, ("guide site 'slope'", "no such latent site", "is_auxiliary"), "warns")


@broken
def site_observed_in_the_guide():
    """The guide observes what the model draws"""

    def observing(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(encoded(x), 1.0).to_event(1), obs=x[:, :2])

    return Mistake(model, observing, ("site 'z'", "observed in the guide", "take obs= away"), "raises")


@broken
def guide_draws_what_the_model_observes():
    """The guide draws what the model observes"""

    def drawing(x, size=None):
        guide(x, size)
        with pyro.plate("rows", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1))

    return Mistake(model, drawing, ("guide site 'x'", "no such latent site", "Take.*out of the guide"), "warns")


@broken
def likelihood_without_data():
    """The model never observes the data"""

    def forgetful(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, 3), 1.0).to_event(1))

    return Mistake(forgetful, guide, ("no site of the model observes data", "'z', 'x'", "obs=x"), "warns")


@broken
def same_name_twice():
    """Two sites have one name"""

    def twice(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Mistake(
        twice, nothing, ("site 'z'", r"pairing.py:\d+ and pairing.py:\d+", "rename one"), "raises", data=COLUMN
    )


@broken
def same_name_in_a_loop():
    """A loop samples one name again and again"""

    def looped(x, size=None):
        for _ in range(3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return Mistake(looped, nothing, ("site 'z'", "twice", r'f"z_\{i\}"'), "raises", data=COLUMN)


@broken
def event_missing_in_the_guide():
    """A missing to_event in the guide"""

    def no_event(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(encoded(x), 1.0))

    return Mistake(model, no_event, ("site 'z'", "20 rows.*2", r"\.to_event\(1\)"), "raises")


@broken
def event_missing_for_a_global_site():
    """A missing to_event on one side of a vector without plates"""

    def shared(x, size=None):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    def no_event(x, size=None):
        pyro.sample("w", dist.Normal(pyro.param("m", torch.zeros(3)), 1.0))

    return Mistake(shared, no_event, ("site 'w'", "dim -1 of 3", r"\.to_event\(1\)"), "raises")


@broken
def guide_of_another_width():
    """The guide's latent is narrower than the model's"""

    def narrow(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(x[:, :1] * pyro.param("w", torch.ones(1)), 1.0).to_event(1))

    return Mistake(model, narrow, ("site 'z'", r"\(2,\) in the model and \(1,\)", "as large as the model's"), "raises")


@broken
def normal_guide_of_a_positive_site():
    """A Normal guide for a positive latent"""

    def real(x, size=None):
        pyro.sample("scale", dist.Normal(pyro.param("m", torch.tensor(3.0)), 0.1))

    return Mistake(positive, real, ("site 'scale'", "GreaterThan.*0.0.*Real", "LogNormal"), "silent", data=COLUMN)


@broken
def gamma_guide_of_a_real_site():
    """A positive guide for a latent on the whole line"""

    def shifted(x, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def gamma(x, size=None):
        rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("loc", dist.Gamma(2.0, rate))

    return Mistake(shifted, gamma, ("site 'loc'", "Real.*GreaterThan", "dist.Normal"), "silent", data=COLUMN)


@broken
def beta_guide_of_a_positive_site():
    """A guide on (0, 1) for a positive latent"""

    def unit(x, size=None):
        pyro.sample("scale", dist.Beta(pyro.param("a", torch.tensor(2.0)), 2.0))

    return Mistake(positive, unit, ("site 'scale'", "GreaterThan.*Interval", "LogNormal"), "silent", data=COLUMN)


@broken
def point_outside_the_support():
    """A MAP guide at a value that the prior excludes"""

    def point(x, size=None):
        pyro.sample("scale", dist.Delta(pyro.param("m", torch.tensor(-0.5))))

    return Mistake(positive, point, ("site 'scale'", r"-0\.5", "constraint"), "raises", data=COLUMN)


@broken
def categories_that_differ():
    """The guide lists more categories than the model has"""

    def labelled(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(x.new_ones(2)))
            pyro.sample("x", dist.Normal(k.to(x), 1.0), obs=x)

    def wider(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            logits = pyro.param("logits", torch.zeros(3)) * x.unsqueeze(-1)
            pyro.sample("k", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    return Mistake(
        labelled,
        wider,
        ("site 'k'", "2 values in the model and 3", "Categorical 2"),
        "raises",
        data=COLUMN,
        elbo=pyro.infer.TraceEnum_ELBO(),
    )


@broken
def local_in_the_model_global_in_the_guide():
    """A latent of each datum in the model, one for all in the guide"""

    def shared(x, size=None):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(2)), 1.0).to_event(1))

    return Mistake(
        model, shared, ("site 'z'", "'data' of 20 in the model and in no plate", "inside of plate 'data'"), "raises"
    )


@broken
def global_in_the_model_local_in_the_guide():
    """A latent of all data in the model, one for each datum in the guide"""

    def global_model(x, size=None):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(len(x), 3), 1.0).to_event(1), obs=x)

    return Mistake(
        global_model,
        guide,
        ("site 'z'", "no plate in the model and in 'data' of 20", "outside of plate 'data'"),
        "raises",
    )


@broken
def weighted_in_the_model_alone():
    """A KL weight on the model's log p and not on the guide's log q"""

    def tempered(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, 3), 1.0).to_event(1), obs=x)

    return Mistake(tempered, guide, ("site 'z'", "0.1 in the model and 1 in the guide", "alike in both"), "silent")


@broken
def other_rows_in_the_guide():
    """Model and guide hold different rows of the data plate"""

    def by_number(x, size=None, index=None):
        with pyro.plate("data", size, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def other(x, size=None, index=None):
        loc = pyro.param("loc", lambda: torch.zeros(size))
        with pyro.plate("data", size, subsample=torch.arange(len(x)) + 1):
            pyro.sample("z", dist.Normal(loc[index], 1.0))

    return Mistake(
        by_number,
        other,
        ("plate 'data'", r"\[0, 1, 2\].*\[1, 2, 3\]", "subsample=index"),
        "silent",
        data=COLUMN,
        batch_size=8,
        elbo=Trace_ELBO(),
    )


@broken
def rows_drawn_by_the_guide():
    """The guide draws rows of its own"""

    def by_number(x, size=None, index=None):
        with pyro.plate("data", size, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def drawing(x, size=None, index=None):
        loc = pyro.param("loc", lambda: torch.zeros(size))
        with pyro.plate("data", size, subsample_size=len(x)) as rows:
            pyro.sample("z", dist.Normal(loc[rows], 1.0))

    return Mistake(
        by_number, drawing, ("plate 'data'", "8 of 20", "subsample=index"), "silent", data=COLUMN, batch_size=8
    )


@broken
def autoguide_of_minibatches():
    """An autoguide with a latent of each datum, in minibatches: it draws rows of its own"""
    return Mistake(
        model, None, ("site 'z'", "a value for each datum", "subsample=index"), "silent", batch_size=10, data=X
    )


@broken
def misspelt_label():
    """The guide's label is misspelt, and the model's nobody sums out"""

    def labelled(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            label = pyro.sample("label", dist.Categorical(x.new_ones(2)))
            pyro.sample("x", dist.Normal(label.to(x), pyro.param("s", torch.tensor(1.0))), obs=x)

    def mistyped(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("lable", dist.Categorical(x.new_ones(2)), infer={"enumerate": "parallel"})

    says = ("site 'label'", "did you mean 'lable'", "Rename pyro.sample")
    return Mistake(labelled, mistyped, says, "warns", data=COLUMN, elbo=pyro.infer.TraceEnum_ELBO())


@broken
def parameter_with_the_name_of_a_site():
    """A parameter of the guide has the name of the model's site"""

    def shared(x, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def confused(x, size=None):
        pyro.sample("location", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    return Mistake(shared, confused, ("'loc'", "a parameter of the guide and a site", "rename"), "raises", data=COLUMN)


@broken
def guide_that_observes_a_site_of_its_own():
    """The guide observes a site that the model lacks"""

    def observing(x, size=None):
        guide(x, size)
        pyro.sample("summary", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=x.mean())

    return Mistake(model, observing, ("guide site 'summary'", "is observed", "Take obs= away"), "warns")


def probability(x, size=None):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(p, 1.0), obs=x)


@broken
def normal_guide_of_a_probability():
    """A Normal guide for a probability"""

    def real(x, size=None):
        pyro.sample("p", dist.Normal(pyro.param("m", torch.tensor(0.5)), 0.01))

    return Mistake(probability, real, ("site 'p'", r"Interval\(0.0, 1.0\).*Real", "dist.Beta"), "silent", data=COLUMN)


@broken
def normal_guide_of_weights():
    """A Normal guide for weights that sum to one"""

    def weighted(x, size=None):
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    def real(x, size=None):
        pyro.sample("w", dist.Normal(pyro.param("m", torch.full((3,), 0.3)), 0.1).to_event(1))

    return Mistake(weighted, real, ("site 'w'", "Simplex.*Real", "dist.Dirichlet"), "raises")


@broken
def point_that_is_no_probability():
    """A MAP guide at a probability of one and a half"""

    def point(x, size=None):
        pyro.sample("p", dist.Delta(pyro.param("m", torch.tensor(1.5))))

    return Mistake(probability, point, ("site 'p'", r"1\.5.*Interval", "with a constraint"), "raises", data=COLUMN)


@broken
def vectors_of_two_lengths():
    """A vector of three in the model and of two in the guide, without plates"""

    def shared(x, size=None):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(w.mean(), x.new_ones(3)).to_event(1), obs=x)

    def shorter(x, size=None):
        pyro.sample("w", dist.Normal(pyro.param("m", torch.zeros(2)), 1.0).to_event(1))

    return Mistake(shared, shorter, ("site 'w'", r"\(3,\) in the model and \(2,\)", "as large as"), "raises")


@broken
def number_for_a_vector():
    """A number in the guide for a vector of the model"""

    def shared(x, size=None):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(w.mean(), x.new_ones(3)).to_event(1), obs=x)

    def number(x, size=None):
        pyro.sample("w", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    return Mistake(shared, number, ("site 'w'", r"\(3,\) in the model and \(\)", r"\.to_event\(1\).*guide"), "raises")

"""Small models of textbooks: coins, counts, dice, schools, covariances, points and factors."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch.distributions import constraints

from sound.corpus import REPARAMETERISED, binary, integers, normal, sound


def positive(name, *shape):
    return pyro.param(name, torch.ones(shape), constraint=constraints.positive)


def coin(x, size=None):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Bernoulli(p), obs=x)


def guide_of_coin(x, size=None):
    pyro.sample("p", dist.Beta(positive("a"), positive("b")))


@sound(*REPARAMETERISED, batch_sizes=(None, 3))
def fairness_of_a_coin():
    return (coin, guide_of_coin), binary(10)


@sound("default", "mean-field")
def fairness_of_a_coin_thrown_once():
    return (coin, guide_of_coin), binary(1)


def tosses_one_by_one(x, size=None):
    """A plate that is walked instead of broadcast."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    for i in pyro.plate("tosses", len(x)):
        pyro.sample(f"x_{i}", dist.Bernoulli(p), obs=x[i])


@sound("default", "trace", "mean-field", "graph")
def fairness_of_a_coin_in_a_loop():
    return (tosses_one_by_one, guide_of_coin), binary(6)


def rate(x, size=None):
    lam = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Poisson(lam), obs=x)


def guide_of_rate(x, size=None):
    pyro.sample("rate", dist.Gamma(positive("shape"), positive("inverse_scale")))


@sound("default", "trace", "mean-field", batch_sizes=(None, 7))
def rate_of_integer_counts():
    return (rate, guide_of_rate), integers(6, 20)


@sound("default", "trace", "trace-vectorised", batch_sizes=(None, 7))
def rate_with_a_guide_of_another_family():
    def guide(x, size=None):
        pyro.sample("rate", dist.LogNormal(pyro.param("loc", torch.tensor(0.0)), positive("scale")))

    return (rate, guide), integers(6, 20).float()


def rate_of_each(x, size=None, index=None):
    """Gamma-Poisson: a rate for each datum."""
    shape = positive("prior_shape")
    with pyro.plate("data", size or len(x), subsample=index):
        lam = pyro.sample("rate", dist.Gamma(shape, 1.0))
        pyro.sample("x", dist.Poisson(lam), obs=x)


def guide_of_each(x, size=None, index=None):
    with pyro.plate("data", size or len(x), subsample=index):
        shape = pyro.param("shape", lambda: torch.ones(size), constraint=constraints.positive, event_dim=0)
        pyro.sample("rate", dist.Gamma(shape, 2.0))


@sound("default", "trace", "mean-field", "renyi", batch_sizes=(None, 7))
def rate_of_each_datum():
    return (rate_of_each, guide_of_each), integers(6, 20).float()


@sound("default", "trace", batch_sizes=(None, 7))
def rate_of_each_datum_of_a_lone_model():
    return rate_of_each, integers(6, 20).float()


def dice(x, size=None):
    concentration = pyro.sample("concentration", dist.Exponential(1.0))
    faces = pyro.sample("faces", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.DirichletMultinomial(4 * concentration * faces, total_count=6), obs=x)


@sound("default", "trace", batch_sizes=(None, 7))
def dirichlet_multinomial():
    return dice, torch.nn.functional.one_hot(integers(4, 20, 6), 4).sum(1).float()


def multinomial_of_each(x, size=None, index=None):
    with pyro.plate("data", size or len(x), subsample=index):
        faces = pyro.sample("faces", dist.Dirichlet(torch.ones(4)))
        pyro.sample("x", dist.Multinomial(6, probs=faces), obs=x)


@sound("default", "trace", batch_sizes=(None, 7))
def multinomial_with_faces_of_each_datum():
    return multinomial_of_each, torch.nn.functional.one_hot(integers(4, 20, 6), 4).sum(1).float()


def schools(y, sigma, size=None, index=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", size or len(y), subsample=index):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def schools_apart(y, sigma, size=None, index=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", size or len(y), subsample=index):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


EFFECTS = 10 * normal(8)
ERRORS = 5 + 10 * normal(8, seed=1).abs()


@sound("default", "trace", "trace-vectorised", "graph", "renyi", batch_sizes=(None, 3))
def eight_schools():
    return schools, (EFFECTS, ERRORS)


@sound("default", "trace", "trace-vectorised", batch_sizes=(None, 3))
def eight_schools_apart_from_their_mean():
    return schools_apart, {"y": EFFECTS, "sigma": ERRORS}


def guide_of_schools(y, sigma, size=None, index=None):
    """As the tutorial has it: parameters for all schools."""
    loc, scale = pyro.param("loc", torch.zeros(len(y))), positive("scale", len(y))
    pyro.sample("mu", dist.Normal(pyro.param("mu_loc", torch.tensor(0.0)), positive("mu_scale")))
    pyro.sample("tau", dist.LogNormal(pyro.param("tau_loc", torch.tensor(0.0)), positive("tau_scale")))
    with pyro.plate("schools", len(y)):
        pyro.sample("eta", dist.Normal(loc, scale))


@sound(*REPARAMETERISED)
def eight_schools_with_a_guide_by_hand():
    return (schools_apart, guide_of_schools), (EFFECTS, ERRORS)


def covariance(x, size=None):
    scales = pyro.sample("scales", dist.LogNormal(torch.zeros(3), 0.5).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=scales[..., None] * factor), obs=x)


@sound("default", "trace", batch_sizes=(None, 7))
def covariance_with_a_prior():
    return covariance, normal(20, 3)


@sound("default", "trace", batch_sizes=(None, 2))
def covariance_of_three_rows_and_features():
    return covariance, normal(3, 3)


def at_a_point(x, size=None):
    pyro.sample("p", dist.Delta(pyro.param("p_at", torch.tensor(0.4), constraint=constraints.unit_interval)))


@sound("default", "trace", "trace-vectorised", batch_sizes=(None, 3))
def mode_of_a_coin():
    return (coin, at_a_point), binary(10)


def gathered(x, size=None):
    """A prior of one's own as a factor, and a datum's likelihood as another."""
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.factor("penalty", -0.5 * loc**2)
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.factor("smooth", -torch.nn.functional.softplus(-z))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of_gathered(x, size=None):
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * x, positive("scale")))


@sound("default", "trace", "trace-vectorised", "mean-field", batch_sizes=(None, 7))
def factors_beside_sites():
    return (gathered, guide_of_gathered), normal(20)


def missing(x, seen, size=None):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", size or len(x), subsample=x), pyro.plate("features", 3, dim=-2), poutine.mask(mask=seen.T):
        pyro.sample("x", dist.Normal(loc[..., None], 1.0), obs=x.T)


@sound("default", "trace", "mean-field", batch_sizes=(None, 7))
def entries_missing_under_a_mask():
    return missing, (normal(20, 3), binary(20, 3).bool())


def missing_in_events(x, seen, size=None):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(loc, 1.0).mask(seen).to_event(1), obs=x)


@sound("default", "trace", "mean-field", batch_sizes=(None, 7))
def entries_missing_in_an_event():
    return missing_in_events, {"x": normal(20, 3), "seen": binary(20, 3).bool()}


def times(x, censored, size=None):
    """Times that end with the study: a factor for those, a density for the others."""
    lam = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        with poutine.mask(mask=~censored):
            pyro.sample("x", dist.Exponential(lam), obs=x)
        with poutine.mask(mask=censored):
            pyro.factor("survived", -lam * x)


@sound("default", "trace", batch_sizes=(None, 7))
def times_censored():
    return (times, guide_of_times), (normal(20).abs(), binary(20).bool())


def guide_of_times(x, censored, size=None):
    pyro.sample("rate", dist.Gamma(positive("shape"), positive("inverse_scale")))

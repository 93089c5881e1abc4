"""Linear factors of each datum: components, ratings, topics; with networks, with parameters for each row."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import nn
from torch.distributions import constraints

from sound.corpus import REPARAMETERISED, integers, normal, sound


class Linear(nn.Module):
    """Probabilistic PCA, or with a noise for each feature factor analysis."""

    def __init__(self, features: int = 4, latent: int = 2, each: bool = False) -> None:
        super().__init__()
        self.loadings = nn.Parameter(normal(features, latent))
        self.mean = nn.Parameter(torch.zeros(features))
        self.log_noise = nn.Parameter(torch.zeros(features if each else 1))
        self.regression = nn.Parameter(torch.zeros(latent, features))
        self.log_scale = nn.Parameter(torch.zeros(latent))

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.loadings.shape[1]), 1.0).to_event(1))
            mean = z @ self.loadings.T + self.mean
            pyro.sample("x", dist.Normal(mean, self.log_noise.exp()).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal((x - self.mean) @ self.regression.T, self.log_scale.exp()).to_event(1))


@sound(*REPARAMETERISED, batch_sizes=(None, 7))
def probabilistic_pca():
    return Linear(), normal(20, 4)


@sound("default", "trace", "mean-field", batch_sizes=(None, 7))
def factor_analysis():
    return Linear(each=True), normal(20, 4, dtype=torch.float64)


@sound("default", "trace", "mean-field", batch_sizes=(None, 2))
def pca_of_three_rows_features_and_latents():
    return Linear(3, 3), normal(3, 3)


@sound("default", "mean-field", batch_sizes=(None, 1))
def pca_in_batches_of_one():
    return Linear(3, 1), normal(4, 3)


class FullCovariance(Linear):
    """One covariance of z for all data: right, for a linear model has one."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.eye(2))

    def guide(self, x, size=None):
        triangle = torch.tril(self.factor, -1) + torch.diag(self.log_scale.exp())
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.MultivariateNormal((x - self.mean) @ self.regression.T, scale_tril=triangle))


@sound("default", "trace", batch_sizes=(None, 7))
def pca_with_a_full_covariance():
    return FullCovariance(), normal(20, 4)


def pca_by_rows(x, size=None, index=None):
    loadings = pyro.param("loadings", normal(4, 2))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loadings.T, 1.0).to_event(1), obs=x)


def guide_by_rows(x, size=None, index=None):
    with pyro.plate("data", size or len(x), subsample=index) as rows:
        loc = pyro.param("loc", torch.zeros(size or len(x), 2))[rows]
        scale = pyro.param("scale", torch.ones(size or len(x), 2), constraint=constraints.positive)[rows]
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))


@sound("default", "trace", "trace-vectorised", "mean-field", batch_sizes=(None, 7))
def pca_with_parameters_for_each_row():
    return (pca_by_rows, guide_by_rows), normal(20, 4)


@sound("default", "trace", "mean-field", batch_sizes=(None, 7))
def pca_of_a_lone_model():
    return pca_by_rows, normal(20, 4)


@sound("default", "trace", batch_sizes=(None, 2))
def pca_of_a_lone_model_of_four_rows():
    return pca_by_rows, normal(4, 4)


def bayesian_pca(x, size=None, index=None):
    """The loadings have a prior in two plates, the noise one of its own."""
    with pyro.plate("factors", 2, dim=-2), pyro.plate("features", 4, dim=-1):
        loadings = pyro.sample("loadings", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.InverseGamma(3.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loadings, noise).to_event(1), obs=x)


@sound("default", "trace", batch_sizes=(None, 7))
def pca_with_a_prior_on_the_loadings():
    return bayesian_pca, normal(20, 4)


@sound("default", "trace", batch_sizes=(None, 2))
def pca_with_a_prior_of_four_rows_and_features():
    return bayesian_pca, normal(4, 4)


def ratings(x, size=None, index=None):
    """Users are rows, films are a plate of their own, what is rated is in both."""
    with pyro.plate("films", 5, dim=-2):
        film = pyro.sample("film", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", size or len(x), subsample=index, dim=-1):
        user = pyro.sample("user", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("films_again", 5, dim=-2):
            pyro.sample("rating", dist.Normal((film * user).sum(-1), 0.5), obs=x.T)


@sound("default", "trace", "trace-vectorised", "mean-field", batch_sizes=(None, 7))
def ratings_in_two_plates():
    return ratings, normal(18, 5)


@sound("default", "trace")
def ratings_of_as_many_users_as_films():
    return ratings, normal(5, 5)


def gamma_factors(x, size=None, index=None):
    with pyro.plate("words", 5, dim=-1):
        topics = pyro.sample("topics", dist.Gamma(torch.ones(3), 1.0).to_event(1))
    with pyro.plate("data", size or len(x), subsample=index):
        activity = pyro.sample("activity", dist.Gamma(torch.ones(3), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson(activity @ topics.T).to_event(1), obs=x)


@sound("default", "trace", batch_sizes=(None, 7))
def poisson_factorisation_of_integer_counts():
    return gamma_factors, integers(5, 18, 5)


WORDS, VOCABULARY, TOPICS = 6, 8, 3


def topic_model(x, size=None, index=None):
    with pyro.plate("topics", TOPICS):
        weight = pyro.sample("weight", dist.Gamma(1.0 / TOPICS, 1.0))
        words_of_topic = pyro.sample("words_of_topic", dist.Dirichlet(torch.ones(VOCABULARY) / VOCABULARY + 0.5))
    with pyro.plate("data", size or len(x), subsample=index, dim=-1):
        topics = pyro.sample("topics_of_document", dist.Dirichlet(weight + 0.1))
        with pyro.plate("words", x.shape[1], dim=-2):
            topic = pyro.sample("topic", dist.Categorical(topics), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Categorical(Vindex(words_of_topic)[..., topic, :]), obs=x.T)


@sound("default", "enum", batch_sizes=(None, 5))
def topic_model_of_a_lone_model():
    return topic_model, integers(VOCABULARY, 12, WORDS)


class Topics(nn.Module):
    """The same with a network that reads the counts of a document's words."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(VOCABULARY, 5), nn.Softplus(), nn.Linear(5, TOPICS), nn.Softplus())

    def model(self, x, size=None):
        return topic_model(x, size, x)

    def guide(self, x, size=None):
        weight = pyro.param("weight_loc", torch.zeros(TOPICS))
        words = pyro.param("words_at", torch.ones(TOPICS, VOCABULARY), constraint=constraints.positive)
        with pyro.plate("topics", TOPICS):
            pyro.sample("weight", dist.LogNormal(weight, 0.1))
            pyro.sample("words_of_topic", dist.Dirichlet(words))
        counts = nn.functional.one_hot(x, VOCABULARY).sum(1).float()
        with pyro.plate("data", size or len(x), subsample=x, dim=-1):
            pyro.sample("topics_of_document", dist.Dirichlet(0.1 + self.network(counts)))


@sound("default", "enum", "enum-nesting-given", batch_sizes=(None, 5))
def topic_model_read_by_a_network():
    return Topics(), integers(VOCABULARY, 12, WORDS)


class AtAPoint(Topics):
    """The same with every document at a point of the simplex."""

    def guide(self, x, size=None):
        with pyro.plate("topics", TOPICS):
            pyro.sample("weight", dist.Delta(pyro.param("at", torch.ones(TOPICS), constraint=constraints.positive)))
            start = torch.ones(TOPICS, VOCABULARY) / VOCABULARY
            words = pyro.param("words_at", start, constraint=constraints.simplex)
            pyro.sample("words_of_topic", dist.Delta(words, event_dim=1))
        counts = nn.functional.one_hot(x, VOCABULARY).sum(1).float()
        with pyro.plate("data", size or len(x), subsample=x, dim=-1):
            topics = torch.softmax(self.network(counts), -1)
            pyro.sample("topics_of_document", dist.Delta(topics, event_dim=1))


@sound("default", "enum", batch_sizes=(None, 5))
def topic_model_at_a_point():
    return AtAPoint(), integers(VOCABULARY, 12, WORDS)

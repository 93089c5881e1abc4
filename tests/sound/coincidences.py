"""Sizes that are equal by chance, plates of every name, and data of every kind: nothing to raise an eyebrow at."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import spline_autoregressive
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sound.corpus import REPARAMETERISED, binary, integers, normal, nothing, sound


def rated(x, size=None, index=None):
    """Two plates of one length around the data; the rows are those at dim -1, under a name of their own."""
    with pyro.plate("films", x.shape[1], dim=-2):
        film = pyro.sample("film", dist.Normal(0.0, 1.0))
    with pyro.plate("users", size or len(x), subsample=index, dim=-1):
        user = pyro.sample("user", dist.Normal(0.0, 1.0))
        with pyro.plate("films_again", x.shape[1], dim=-2):
            pyro.sample("rating", dist.Normal(film * user, 0.5), obs=x.T)


def guide_of_rated(x, size=None, index=None):
    with pyro.plate("films", x.shape[1], dim=-2):
        pyro.sample("film", dist.Normal(pyro.param("film_loc", normal(5, 1)), 0.2))
    with pyro.plate("users", size or len(x), subsample=index, dim=-1):
        weight = pyro.param("weight", torch.ones(5) / 5)
        pyro.sample("user", dist.Normal(x @ weight, 0.2))


@sound("default", "trace", "mean-field", batch_sizes=(None, 2))
def square_matrix_of_ratings():
    return (rated, guide_of_rated), normal(5, 5)


@sound("default", "trace", batch_sizes=(None, 2))
def square_matrix_of_ratings_of_a_lone_model():
    return rated, normal(5, 5)


@sound("default", "trace", batch_sizes=(5, 7))
def ratings_in_batches_as_long_as_the_films():
    return (rated, guide_of_rated), normal(18, 5)


class Conv(nn.Module):
    """Images of one channel, an event of three dims."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 16), nn.Unflatten(-1, (1, 4, 4)))

    def model(self, x, size=None):
        with pyro.plate("images", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(3), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("images", size or len(x), subsample=x):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@sound(*REPARAMETERISED, batch_sizes=(None, 4, 7))
def images():
    return Conv(), binary(20, 1, 4, 4)


@sound("default", "trace")
def as_many_images_as_they_have_lines():
    return Conv(), binary(4, 1, 4, 4)


@sound("default", "trace")
def images_of_a_loader():
    return Conv(), DataLoader(TensorDataset(binary(20, 1, 4, 4)), batch_size=8)


@sound("default", "trace", batch_sizes=(None, 7, 100))
def images_of_a_data_set():
    return Conv(), TensorDataset(binary(20, 1, 4, 4))


class Bytes(Conv):
    """The bytes are turned into numbers by the program."""

    def model(self, x, size=None):
        super().model((x > 127).float(), size)

    def guide(self, x, size=None):
        super().guide(x / 255.0, size)


@sound("default", "trace", batch_sizes=(None, 7))
def images_of_bytes():
    return Bytes(), integers(256, 20, 1, 4, 4).to(torch.uint8)


class Frozen(Conv):
    """A decoder that is not to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder.requires_grad_(False)


@sound("default", "trace", batch_sizes=(None, 7))
def images_with_a_frozen_decoder():
    return Frozen(), binary(20, 1, 4, 4)


class Rows(nn.Module):
    """An embedding of the row numbers, all zeros at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.loc = nn.Embedding(size, 2)
        nn.init.zeros_(self.loc.weight)
        self.decoder = nn.Linear(2, 3)

    def model(self, x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            pyro.sample("z", dist.Normal(self.loc(index), 0.5).to_event(1))


@sound(*REPARAMETERISED, batch_sizes=(None, 3, 7))
def embedding_of_row_numbers():
    return Rows(20), normal(20, 3)


class PointOfEachRow(Rows):
    def guide(self, x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            pyro.sample("z", dist.Delta(self.loc(index), event_dim=1))


@sound("default", "trace", batch_sizes=(None, 7))
def point_of_each_row():
    return PointOfEachRow(20), normal(20, 3)


def location(x, size=None, *, width=1.0):
    loc = pyro.sample("loc", dist.Normal(0.0, width))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@sound("default", "trace", "mean-field", batch_sizes=(None, 7))
def model_with_an_argument_bound():
    return partial(location, width=3.0), normal(20)


@sound("default", "trace", batch_sizes=(None, 7))
def model_of_rows_that_are_all_the_same():
    return location, torch.zeros(20)


@sound("default", "mean-field", batch_sizes=(None, 1, 100))
def model_of_one_row():
    return location, normal(1)


def prior_predictive(x=None, size=None):
    """Data may be absent, observations are columns, what is observed is a function of the data."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("left", dist.Normal(loc[..., 0], 1.0), obs=None if x is None else x[:, 0])
        pyro.sample("right", dist.Normal(loc[..., 1], 1.0), obs=None if x is None else x[:, 1].exp().log1p())


@sound("default", "trace", "mean-field", batch_sizes=(None, 2, 7))
def columns_observed_apart():
    return prior_predictive, normal(20, 2)


def by_name(*, x, y, size=None, **_):
    """A plate made once and opened twice; arguments by name alone, and others left alone."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).mask(False))
    rows = pyro.plate("data", size or len(x), subsample=x)
    with rows:
        level = pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.squeeze(-1))
    with rows:
        pyro.sample("y", dist.Normal(slope * level, 1.0), obs=y)


@sound("default", "trace", batch_sizes=(None, 7))
def arguments_by_name_alone():
    return by_name, {"x": normal(20, 1), "y": normal(20, seed=1)}


class Density(nn.Module):
    """Nothing latent: a flow is the likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = spline_autoregressive(2, hidden_dims=[4], count_bins=3)

    def model(self, x, size=None):
        base = dist.Normal(x.new_zeros(2), 1.0).to_event(1)
        likelihood = dist.TransformedDistribution(base, [self.flow])
        likelihood.clear_cache()  # else the last step's graph is used again where x is the same tensor
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", likelihood, obs=x)


@sound("default", "trace", batch_sizes=(None, 2, 7))
def density_of_a_flow():
    density = Density()
    return (density.model, nothing), normal(20, 2)


def angles(x, size=None):
    loc = pyro.sample("loc", dist.Uniform(-torch.pi, torch.pi))
    strength = pyro.sample("strength", dist.HalfNormal(2.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.VonMises(loc, strength), obs=x)


@sound("default", "trace", batch_sizes=(None, 7))
def directions():
    return angles, torch.atan2(normal(20), normal(20, seed=1))

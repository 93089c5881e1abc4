"""Variational autoencoders: one layer of latents, likelihoods of several kinds, labels known, unknown and in part."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import affine_autoregressive, conditional_planar
from torch import nn

from sound.corpus import REPARAMETERISED, binary, integers, normal, sound

HIDDEN = 6


class Encoder(nn.Module):
    def __init__(self, features: int, latent: int, zero: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, HIDDEN)
        self.loc = nn.Linear(HIDDEN, latent)
        self.log_scale = nn.Linear(HIDDEN, latent)
        if zero:
            for layer in (self.loc, self.log_scale):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        hidden = torch.tanh(self.hidden(x))
        return dist.Normal(self.loc(hidden), self.log_scale(hidden).exp()).to_event(1)


class VAE(nn.Module):
    def __init__(self, features: int = 5, latent: int = 2, zero: bool = False, validate: bool | None = None) -> None:
        super().__init__()
        self.latent, self.validate = latent, validate
        self.encoder = Encoder(features, latent, zero)
        self.decoder = nn.Sequential(nn.Linear(latent, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, features))

    def likelihood(self, raw):
        return dist.Bernoulli(logits=raw, validate_args=self.validate)

    def model(self, x, size=None):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", size or len(x), subsample=x):
            loc = x.new_zeros(len(x), self.latent)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            pyro.sample("x", self.likelihood(self.decoder(z)).to_event(1), obs=x)

    def guide(self, x, size=None):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", self.encoder(x))


@sound(*REPARAMETERISED, "trace-particles", batch_sizes=(None, 7))
def autoencoder():
    return VAE(), binary(20, 5)


@sound("default", "trace", batch_sizes=(None, 7))
def autoencoder_as_a_tuple_of_methods():
    vae = VAE()
    return (vae.model, vae.guide), binary(20, 5)


@sound("default", "trace", "mean-field", "renyi", batch_sizes=(None, 7))
def autoencoder_whose_last_layer_starts_at_zero():
    return VAE(zero=True), binary(20, 5)


@sound("default", "trace", "renyi", batch_sizes=(None, 7))
def autoencoder_of_grey_pixels_on_purpose():
    return VAE(validate=False), torch.sigmoid(normal(20, 5))


@sound("default", "trace", "trace-vectorised", "mean-field", batch_sizes=(None, 2))
def autoencoder_of_three_rows_features_and_latents():
    return VAE(3, 3), binary(3, 3)


@sound("default", "trace", "trace-vectorised", "mean-field", "renyi")
def autoencoder_of_one_row():
    return VAE(), binary(1, 5)


@sound("default", "trace", batch_sizes=(None, 7))
def autoencoder_with_one_latent_and_one_feature():
    return VAE(1, 1), binary(20, 1)


class RealVAE(VAE):
    """A likelihood whose scale is one learned number for each feature; a class of its own data type."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.log_scale = nn.Parameter(torch.zeros(4))
        self.normalise = nn.BatchNorm1d(4)

    def likelihood(self, raw):
        return dist.Normal(raw, self.log_scale.exp())

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", self.encoder(self.normalise(x)))


@sound("default", "trace", "mean-field", batch_sizes=(None, 7))
def autoencoder_in_double_precision_with_batch_norm():
    return RealVAE(), normal(20, 4, dtype=torch.float64)


class CountsVAE(VAE):
    """Counts of words, independent given the latents."""

    def likelihood(self, raw):
        return dist.Poisson(raw.exp())


@sound("default", "trace", "trace-vectorised", batch_sizes=(None, 7))
def autoencoder_of_counts():
    return CountsVAE(), integers(6, 20, 5).float()


class FlowVAE(VAE):
    """The guide's Normal goes through an autoregressive flow."""

    def __init__(self) -> None:
        super().__init__(5, 2)
        self.flow = affine_autoregressive(2, hidden_dims=[4])

    def guide(self, x, size=None):
        pyro.module("flow", self.flow)
        with pyro.plate("data", size or len(x), subsample=x):
            base = self.encoder(x)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


@sound("default", "trace", "mean-field", "graph", "renyi", batch_sizes=(None, 7))
def autoencoder_with_a_flow():
    return FlowVAE(), binary(20, 5)


class ConditionalFlowVAE(VAE):
    """The flow's own parameters are a function of the datum, its base distribution is the same for all."""

    def __init__(self) -> None:
        super().__init__(5, 2)
        self.flow = conditional_planar(2, context_dim=5, hidden_dims=[4])

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            base = dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1)
            pyro.sample("z", dist.ConditionalTransformedDistribution(base, [self.flow]).condition(x))


@sound("default", "trace", batch_sizes=(None, 7))
def autoencoder_with_a_conditional_flow():
    return ConditionalFlowVAE(), binary(20, 5)


class Semisupervised(nn.Module):
    """Label y and style z make x; a label of -1 is unknown, and known ones leave the guide no choice."""

    def __init__(self, features: int = 5, classes: int = 3, latent: int = 2, one_hot: bool = False) -> None:
        super().__init__()
        self.classes, self.latent, self.one_hot = classes, latent, one_hot
        self.classifier = nn.Sequential(nn.Linear(features, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, classes))
        self.encoder = Encoder(features + classes, latent)
        self.decoder = nn.Sequential(nn.Linear(latent + classes, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, features))

    def label(self, logits):
        return dist.OneHotCategorical(logits=logits) if self.one_hot else dist.Categorical(logits=logits)

    def hot(self, y, dtype):
        return y if self.one_hot else nn.functional.one_hot(y, self.classes).to(dtype)

    def model(self, x, known=None, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", self.label(x.new_zeros(len(x), self.classes)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), self.latent), 1.0).to_event(1))
            hot = self.hot(y, x.dtype)
            shape = torch.broadcast_shapes(hot.shape[:-1], z.shape[:-1])
            both = torch.cat([z.expand(*shape, -1), hot.expand(*shape, -1)], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(both)).to_event(1), obs=x)

    def guide(self, x, known=None, size=None):
        logits = self.classifier(x)
        if known is not None:
            other = torch.arange(self.classes) != known[:, None]
            certain = torch.zeros_like(logits).masked_fill(other, -torch.inf)
            logits = torch.where((known >= 0)[:, None], certain, logits)
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", self.label(logits), infer={"enumerate": "parallel"})
            hot = self.hot(y, x.dtype)
            shape = torch.broadcast_shapes(hot.shape[:-1], x.shape[:-1])
            both = torch.cat([x.expand(*shape, -1), hot.expand(*shape, -1)], -1)
            pyro.sample("z", self.encoder(both))


@sound("default", "enum", "enum-vectorised", batch_sizes=(None, 7))
def labels_enumerated_in_the_guide():
    return Semisupervised(), binary(20, 5)


@sound("default", "enum", batch_sizes=(None, 7))
def labels_known_in_part():
    return Semisupervised(), (binary(20, 5), integers(4, 20) - 1)


@sound("default", "enum", batch_sizes=(None, 7))
def labels_as_one_hot_vectors():
    return Semisupervised(one_hot=True), {"x": binary(20, 5), "known": integers(4, 20) - 1}


@sound("default", "enum")
def labels_of_three_rows_features_and_classes():
    return Semisupervised(3, 3, 3), (binary(3, 3), torch.tensor([0, -1, 2]))

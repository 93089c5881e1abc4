"""The semi-supervised VAE without the library: by hand in torch, and as in Pyro's tutorial."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot, relu, softplus


class ByHand(nn.Module):
    """First layers are split in a part of the numbers and a part of the label, so that labels share the product."""

    def __init__(self, features: int, classes: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.classes = classes
        self.classifier = nn.Sequential(
            nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
        self.encoder_of_x, self.encoder_of_y = nn.Linear(features, hidden), nn.Embedding(classes, hidden)
        self.encoder_head = nn.Linear(hidden, 2 * latent)
        self.decoder_of_z, self.decoder_of_y = nn.Linear(latent, hidden), nn.Embedding(classes, hidden)
        self.decoder_head = nn.Linear(hidden, features)

    def loss(self, unlabelled: Tensor, labelled: Tensor, label: Tensor) -> Tensor:
        """Minus the bound per datum; rows with a label are decoded once, the others once for every label."""
        of_x = self.encoder_of_x(torch.cat([unlabelled, labelled]))
        count = len(unlabelled)
        every = of_x[:count] + self.encoder_of_y.weight.unsqueeze(1)
        bound = self._bound(unlabelled, every, self.decoder_of_y.weight.unsqueeze(1))
        known = self._bound(labelled, of_x[count:] + self.encoder_of_y(label), self.decoder_of_y(label))
        log_q = self.classifier(unlabelled).log_softmax(-1).mT
        summed = (log_q.exp() * (bound - log_q)).sum()
        total = summed + known.sum() - (count + len(labelled)) * math.log(self.classes)
        return -total / (count + len(labelled))

    def loss_of_every_label(self, x: Tensor, y: Tensor) -> Tensor:
        """The same with every label for every row, known labels being given all the probability."""
        every = self.encoder_of_x(x) + self.encoder_of_y.weight.unsqueeze(1)
        bound = self._bound(x, every, self.decoder_of_y.weight.unsqueeze(1))
        log_q = self.classifier(x).log_softmax(-1)
        known = (y >= 0).unsqueeze(-1)
        q = torch.where(known, one_hot(y.clamp(min=0), self.classes).to(log_q.dtype), log_q.exp())
        entropy = -torch.where(known, 0.0, q * log_q).sum()
        return -((q.mT * bound).sum() + entropy - len(x) * math.log(self.classes)) / len(x)

    def _bound(self, x: Tensor, before: Tensor, label_in_decoder: Tensor) -> Tensor:
        """log p(x | z, y) - KL, for rows or for labels by rows."""
        loc, raw = self.encoder_head(relu(before)).chunk(2, -1)
        scale = softplus(raw)
        z = loc + scale * torch.randn_like(scale)
        logits = self.decoder_head(relu(self.decoder_of_z(z) + label_in_decoder))
        surprise = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        divergence = (0.5 * (loc.square() + scale.square() - 1) - scale.log()).sum(-1)
        return -surprise - divergence


class Tutorial(nn.Module):
    """As in Pyro's tutorial: a one-hot label appended to the input, and a step of its own for each kind of row."""

    def __init__(self, features: int, classes: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.classes, self.latent = classes, latent
        self.classifier = nn.Sequential(
            nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
        self.encoder = nn.Sequential(nn.Linear(features + classes, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent + classes, hidden), nn.ReLU(), nn.Linear(hidden, features))

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        """Label and style make the image."""
        pyro.module("program", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), x.new_ones(self.latent)).to_event(1))
            prior = dist.OneHotCategorical(x.new_full((len(x), self.classes), 1 / self.classes))
            label = pyro.sample("y", prior, obs=None if y is None else one_hot(y, self.classes).to(x.dtype))
            logits = self.decoder(_beside(z, label))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    @config_enumerate
    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """The label from the image, unless it is known; the style from both."""
        with pyro.plate("data", len(x)):
            if y is None:
                label = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(x)))
            else:
                label = one_hot(y, self.classes).to(x.dtype)
            loc, raw = self.encoder(_beside(x, label)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw)).to_event(1))


def _beside(numbers: Tensor, label: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(numbers.shape[:-1], label.shape[:-1])
    return torch.cat([numbers.expand(*shape, -1), label.expand(*shape, -1)], -1)

"""A VAE, an importance-weighted autoencoder and its doubly reparameterised gradient: the evidence of the same images.

With a folder that holds MNIST it is the one-layer architecture of Burda, Grosse and Salakhutdinov (2016,
https://arxiv.org/abs/1509.00519): `python examples/importance_weighted.py 400 data`.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_lvm as lvm


def load(root: str | None) -> tuple[Any, Tensor]:
    """Training images as bits that every epoch draws anew, and 1 000 test images; without a root, the digits."""
    if root is None:
        digits = lvm.datasets.digits()
        return (digits.train.x > 0.5).float(), (digits.test.x > 0.5).float()
    mnist = lvm.datasets.mnist(root, binarize="dynamic", download=False)
    return mnist.train.x, mnist.test.x[:1000]


def main(epochs: int = 60, root: str | None = None, num_samples: int = 100) -> dict[str, tuple[float, int]]:
    """Negative log evidence of the test images (nats per datum) and active units, by estimator."""
    train, test = load(root)
    num_features = test.shape[1]
    latent_dim, hidden = (50, (200, 200)) if root else (16, (100, 100))
    mlp = partial(lvm.networks.MLP, activation=nn.Tanh)
    found: dict[str, tuple[float, int]] = {}
    first: Tensor | None = None
    for elbo in (TraceMeanField_ELBO(), lvm.elbo.ImportanceWeighted(5), lvm.elbo.ImportanceWeighted(5, "dreg")):
        encoder = mlp(num_features, hidden, 2 * latent_dim)
        vae = lvm.VAE(num_features, latent_dim, encoder=encoder, decoder=mlp(latent_dim, hidden, num_features))
        fit = lvm.fit(vae, train, elbo=elbo, epochs=epochs, batch_size=128, seed=0)
        evidence = lvm.log_evidence(fit, test, num_samples=num_samples, seed=0)
        active = int((vae.encode(test).mean.var(0) > 0.01).sum())
        first = evidence if first is None else first
        gain = evidence - first  # image by image: what all estimators find hard cancels
        error = gain.std().item() / math.sqrt(len(gain))
        found[fit.info["estimator"]] = (-evidence.mean().item(), active)
        print(
            f"{fit.info['estimator']:<55} NLL {-evidence.mean().item():7.3f} nats/datum, {active:2} active units; "
            f"{gain.mean().item():+.3f} ± {error:.3f} beside the first"
        )
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*[int(sys.argv[1])] if len(sys.argv) > 1 else [], *sys.argv[2:3])

"""How an epoch of ours grows with the number of rows; a slope of one is what the work itself costs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import pyro_lvm as lvm
from benchmarks.mixture import make_start
from benchmarks.ours import burst, make_loop
from benchmarks.timing import Burst, Comparison, Contender


def comparisons(tiny: bool = False, everything: bool = False) -> Iterator[Comparison]:
    """The mixture on all data at once, and the VAE on minibatches, as graphs."""
    mixtures = [_mixture(n) for n in ((50, 100) if tiny else (10**3, 10**4, 10**5, 10**6))]
    yield Comparison("epoch of a mixture against n, K=5, graph", "", mixtures, unit="epoch")
    vaes = [_vae(n) for n in ((50, 100) if tiny else (10**3, 10**4, 10**5))]
    yield Comparison("epoch of a VAE 784-400-20 against n, batch 128, graph", "", vaes, unit="epoch")


def _mixture(n: int) -> Contender:
    epochs = max(1, min(50, 10**5 // n))

    def make() -> Burst:
        start = make_start(n, 5)
        return burst(make_loop(start.ours(), start.x, "graph"), "graph", epochs)

    return Contender(f"n={n}", make, epochs, size=n)


def _vae(n: int) -> Contender:
    features, hidden, latent, batch_size = (784, 400, 20, 128) if n >= 1000 else (30, 8, 2, 16)

    def make() -> Burst:
        x = torch.bernoulli(torch.full((n, features), 0.3), generator=torch.Generator().manual_seed(0))
        loop = make_loop(lvm.VAE(features, latent, (hidden,)), x, "graph", batch_size=batch_size)
        return burst(loop, "graph", loop.order.steps_per_epoch)

    return Contender(f"n={n}", make, 1, size=n)

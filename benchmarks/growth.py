"""How an epoch of ours grows with the number of rows; a slope of one is what the work itself costs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import pyro_lvm as lvm
from benchmarks.mixture import make_start
from benchmarks.ours import burst, make_loop
from benchmarks.timing import Burst, Comparison, Contender


def comparisons(tiny: bool = False, everything: bool = False) -> Iterator[Comparison]:
    """The mixture on all data at once and in minibatches, and the VAE in minibatches, as graphs."""
    sizes, batch_size = ((50, 100), 20) if tiny else ((10**3, 10**4, 10**5, 10**6), 1_000)
    whole = [_mixture(n, None) for n in sizes]
    yield Comparison("epoch of a mixture against n, K=5, graph", "", whole, unit="epoch")
    batches = [_mixture(n, batch_size) for n in sizes]
    yield Comparison(f"epoch of a mixture against n, K=5, batch {batch_size}, graph", "", batches, unit="epoch")
    vaes = [_vae(n) for n in sizes]
    yield Comparison("epoch of a VAE 784-400-20 against n, batch 128, graph", "", vaes, unit="epoch")


def _mixture(n: int, batch_size: int | None) -> Contender:
    epochs = max(1, min(50, 10**5 // n))

    def make() -> Burst:
        start = make_start(n, 5)
        loop = make_loop(start.ours(), start.x, "graph", batch_size=batch_size)
        return burst(loop, "graph", epochs * loop.order.steps_per_epoch)

    return Contender(f"n={n}", make, epochs, size=n)


def _vae(n: int) -> Contender:
    features, hidden, latent, batch_size = (784, 400, 20, 128) if n >= 1000 else (30, 8, 2, 16)

    def make() -> Burst:
        # in place: with a million rows, 3 GB once and not twice
        x = torch.empty(n, features).bernoulli_(0.3, generator=torch.Generator().manual_seed(0))
        loop = make_loop(lvm.VAE(features, latent, (hidden,)), x, "graph", batch_size=batch_size)
        return burst(loop, "graph", loop.order.steps_per_epoch)

    return Contender(f"n={n}", make, 1, size=n)

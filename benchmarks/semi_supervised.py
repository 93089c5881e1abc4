"""The semi-supervised VAE: half of every batch without labels, which are summed out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

import pyro_lvm as lvm
from benchmarks.by_hand import by_hand
from benchmarks.ours import ours
from benchmarks.semi_supervised_programs import ByHand, Tutorial
from benchmarks.stock import slices, stock
from benchmarks.timing import Burst, Comparison, Contender

REFERENCE = "hand-written torch"


def comparisons(tiny: bool = False, everything: bool = False) -> Iterator[Comparison]:
    """One comparison: a batch of 200 MNIST-sized rows, 100 of them labelled."""
    sizes = (30, 3, 2, 8) if tiny else (784, 10, 50, 500)
    batch_size, steps = (8, 2) if tiny else (200, 5)
    features, classes, latent, hidden = sizes
    generator = torch.Generator().manual_seed(0)
    rows = batch_size * steps
    x = torch.bernoulli(torch.full((rows, features), 0.3), generator=generator)
    y = torch.randint(classes, (rows,), generator=generator)
    y[::2] = -1
    title = f"semi-supervised VAE {features}-{hidden}-{latent}, {classes} classes, batch {batch_size}, half labelled"
    yield Comparison(title, REFERENCE, list(_contenders(x, y, sizes, batch_size, steps)))


def _contenders(x: Tensor, y: Tensor, sizes: Any, batch_size: int, steps: int) -> Iterator[Contender]:
    features, classes, latent, hidden = sizes
    half = batch_size // 2
    known, unknown = slices(half, x[y >= 0], y[y >= 0]), slices(half, x[y < 0])

    def halves() -> Iterator[tuple[Tensor, ...]]:
        for (unlabelled,), (labelled, label) in zip(unknown(), known(), strict=True):
            yield unlabelled, labelled, label

    def both() -> Iterator[tuple[Tensor, ...]]:
        for unlabelled, labelled, label in halves():
            yield torch.cat([unlabelled, labelled]), torch.cat([torch.full((len(unlabelled),), -1), label])

    def hand(compiled: bool = False) -> Burst:
        program = ByHand(features, classes, latent, hidden)
        return by_hand(program.loss, program.parameters(), halves, compiled=compiled)

    def every_label() -> Burst:
        program = ByHand(features, classes, latent, hidden)
        return by_hand(program.loss_of_every_label, program.parameters(), both)

    def built_in() -> lvm.SemiSupervisedVAE:
        weights: Any = {"classifier_weight": 0.0, "smoothness_weight": 0.0, "labelled_share": 0.5}
        return lvm.SemiSupervisedVAE(features, classes, latent, (hidden,), **weights)

    def stock_on_built_in() -> Burst:
        program = built_in()
        return stock(_registered(program, "model"), _registered(program, "guide"), TraceEnum_ELBO(), both)

    def tutorial() -> Burst:
        program = Tutorial(features, classes, latent, hidden)
        step = stock(program.model, program.guide, TraceEnum_ELBO(max_plate_nesting=1), _one_after_another(halves))
        return step

    yield Contender(REFERENCE, hand, steps)
    yield Contender("hand-written, torch.compile", lambda: hand(True), steps, ("compiler",))
    yield Contender("hand-written, every label for every row", every_label, steps)
    yield Contender("stock Pyro, as in the tutorial", tutorial, steps)
    yield Contender("stock Pyro on the library's program", stock_on_built_in, steps)
    yield from ours(built_in, (x, y), steps, batch_size=batch_size)


def _registered(program: lvm.SemiSupervisedVAE, name: str) -> Any:
    """The program's callable with its parameters made known to Pyro's store."""
    import pyro

    def registered(*data: Tensor) -> None:
        pyro.module("program", program)
        getattr(program, name)(*data)

    return registered


def _one_after_another(halves: Any) -> Any:
    """The tutorial has a step on rows without labels and then one on rows with them."""

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for unlabelled, labelled, label in halves():
            yield (unlabelled,)
            yield labelled, label

    return batches

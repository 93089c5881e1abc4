"""What a checkpoint after every epoch costs: an epoch of the VAE, 60 000 rows, as a graph, with and without."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import pyro_lvm as lvm
from benchmarks.ours import make_loop
from benchmarks.timing import Burst, Comparison, Contender
from pyro_lvm.inference.checkpoint import Checkpoints
from pyro_lvm.inference.loop import Watch
from pyro_lvm.parameters import isolated

EPOCHS = 2


def comparisons(tiny: bool = False, everything: bool = False) -> Iterator[Comparison]:
    """An epoch with and without; each burst also writes what a fit writes at its end."""
    contenders = [_contender(name, every_epoch, tiny) for name, every_epoch in (("none", False), ("each epoch", True))]
    yield Comparison("checkpoints of a VAE 784-400-20, batch 128, graph", "none", contenders, unit="epoch")


def _contender(name: str, every_epoch: bool, tiny: bool) -> Contender:
    n, features, hidden, latent, batch_size = (100, 30, 8, 2, 16) if tiny else (60_000, 784, 400, 20, 128)

    def make() -> Burst:
        x = torch.bernoulli(torch.full((n, features), 0.3), generator=torch.Generator().manual_seed(0))
        loop = make_loop(lvm.VAE(features, latent, (hidden,)), x, "graph", batch_size=batch_size)
        loop.total_steps = EPOCHS * loop.order.steps_per_epoch

        def run() -> None:
            loop.steps_done, loop.epoch, loop.batches_done, loop.stopped = 0, 0, 0, None
            watch = Watch((), None, None, 0, progress=False)
            if not every_epoch:
                with isolated(0, validate=False):
                    loop.run(watch)
                return
            folder = Path(tempfile.mkdtemp(dir=Path.cwd()))  # the disk of the project, where /tmp may be memory
            try:
                checkpoints = Checkpoints(folder, loop.order.steps_per_epoch, False, "raise")
                checkpoints.begin({}, loop.total_steps, loop.order.steps_per_epoch)
                with isolated(0, validate=False), checkpoints.held():
                    loop.run(watch, checkpoints)
            finally:
                shutil.rmtree(folder)

        return run

    return Contender(name, make, EPOCHS)

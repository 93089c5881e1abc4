"""What a checkpoint after every epoch costs: an epoch of the VAE, 60 000 rows, as a graph, with and without.

The difference of two epochs drowns in what else the machine does; what is added to an epoch is timed alone too.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import pyro_lvm as lvm
from benchmarks.ours import make_loop
from benchmarks.timing import Burst, Comparison, Contender
from pyro_lvm.inference.checkpoint import Checkpoints
from pyro_lvm.inference.loop import Loop, Watch
from pyro_lvm.parameters import isolated

EPOCHS = 2
WRITES = 20


def comparisons(tiny: bool = False, everything: bool = False) -> Iterator[Comparison]:
    """An epoch with and without; each burst with them also writes what a fit writes at its end."""
    contenders = [
        Contender("none", lambda: _epochs(_loop(tiny), False), EPOCHS),
        Contender("each epoch", lambda: _epochs(_loop(tiny), True), EPOCHS),
        Contender("a checkpoint alone", lambda: _writes(_loop(tiny)), WRITES),
    ]
    yield Comparison("checkpoints of a VAE 784-400-20, batch 128, graph", "none", contenders, unit="epoch")


def _loop(tiny: bool) -> Loop:
    n, features, hidden, latent, batch_size = (100, 30, 8, 2, 16) if tiny else (60_000, 784, 400, 20, 128)
    x = torch.bernoulli(torch.full((n, features), 0.3), generator=torch.Generator().manual_seed(0))
    loop = make_loop(lvm.VAE(features, latent, (hidden,)), x, "graph", batch_size=batch_size)
    loop.total_steps = EPOCHS * loop.order.steps_per_epoch
    return loop


def _epochs(loop: Loop, every_epoch: bool) -> Burst:
    def run() -> None:
        loop.steps_done, loop.epoch, loop.batches_done, loop.stopped = 0, 0, 0, None
        watch = Watch((), None, None, 0, progress=False)
        with isolated(0, validate=False):
            if not every_epoch:
                loop.run(watch)
                return
            with _checkpoints(loop) as checkpoints:
                loop.run(watch, checkpoints)

    return run


def _writes(loop: Loop) -> Burst:
    """What a loop does where a checkpoint is due."""
    loop.total_steps = 2
    _epochs(loop, False)()  # the optimiser has moments

    def run() -> None:
        with _checkpoints(loop) as checkpoints:
            for step in range(WRITES):
                loop.steps_done = step
                loop.read_out()
                checkpoints.save(loop.state())

    return run


@contextmanager
def _checkpoints(loop: Loop) -> Iterator[Checkpoints]:
    folder = Path(tempfile.mkdtemp(dir=Path.cwd()))  # the disk of the project, where /tmp may be memory
    try:
        checkpoints = Checkpoints(folder, loop.order.steps_per_epoch, False, "raise")
        checkpoints.begin({}, loop.total_steps, loop.order.steps_per_epoch)
        with checkpoints.held():
            yield checkpoints
    finally:
        shutil.rmtree(folder)

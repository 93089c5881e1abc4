"""Checkpoints of a fit whose steps another engine takes, an epoch at a time: `pyro_lvm.fit` goes on from them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_lvm.errors import StorageError
from pyro_lvm.inference.checkpoint import Checkpoints, require_same
from pyro_lvm.inference.loop import Loop
from pyro_lvm.inference.made_with import made_with
from pyro_lvm.parameters import isolated

__all__ = ["WholeEpochs"]


class WholeEpochs:
    """A folder of checkpoints, written and gone on from between epochs.

    Args:
        checkpoints: the folder.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.found = checkpoints.latest()

    def begin(self, loop: Loop, writes: bool, **made: Any) -> None:
        """Go on from what was found; take the folder.

        Args:
            loop: what the engine's steps belong to.
            writes: whether this process is the one that writes.
            **made: what the fit is made with, as `made_with` takes it.

        Raises:
            StorageError: if it was another fit, or the checkpoint lies within an epoch.
        """
        folder, same = self.checkpoints.folder, made_with(loop, None, **made)
        if self.found is not None:
            require_same(folder, self.found["made"], same)
            into = self.found["batches"]
            if into not in (0, loop.order.steps_per_epoch):
                raise StorageError(
                    f"the checkpoint in {folder} is of step {self.found['steps']}, {into} steps into an epoch, and "
                    "Lightning begins with whole ones: go on with pyro_lvm.fit, and leave out checkpoint_every"
                )
            loop.load_state(self.found)
            if into:
                loop.end_epoch()
        if writes:
            self.checkpoints.begin(same, loop.total_steps, loop.order.steps_per_epoch)

    def save(self, loop: Loop, epochs: int, order: Tensor, noise: int) -> None:
        """Write what `pyro_lvm.fit` goes on from.

        Args:
            loop: what the engine's steps belong to.
            epochs: how many are done.
            order: where the generator of the permutations stands before the next.
            noise: the seed of what is drawn from here on.
        """
        loop.epoch, loop.steps_done = epochs, epochs * loop.order.steps_per_epoch
        loop.stopped = "finished" if loop.steps_done >= loop.total_steps else None
        loop.order.load_state({"own": order})
        with isolated(noise, validate=False):
            self.checkpoints.save(loop.state())

"""Which rows each of several processes takes: its part of every batch of one permutation, the same on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RowNumbers", "SharedOrder"]


class RowNumbers(NamedTuple):
    """What one rank takes in one step: row numbers, and the factor of its loss."""

    rows: Tensor
    share: float


class SharedOrder:
    """The permutations of all epochs, as `pyro_lvm.fit` draws them, shared out.

    Args:
        rows: their number.
        joined: rows in a batch of all ranks together; None for all, in the order in which they lie.
        seed: of the permutations.
    """

    def __init__(self, rows: int, joined: int | None, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.joined = None if joined is None or joined >= rows else joined
        self.steps_per_epoch = 1 if self.joined is None else -(-rows // self.joined)
        self._next, self._generator = 0, self._seeded()

    def epoch(self, number: int, rank: int, world: int) -> Iterator[RowNumbers]:
        """What ``rank`` of ``world`` takes in an epoch, step after step."""
        order = torch.arange(self.rows)
        if self.joined is not None:
            self._wind_to(number)
            order = torch.randperm(self.rows, generator=self._generator)
            self._next = number + 1
        for batch in order.split(self.joined or self.rows):
            mine = batch.tensor_split(world)[rank]
            if len(mine):
                yield RowNumbers(mine, world * len(mine) / len(batch))
            else:  # fewer rows than ranks: this one has to take part, and counts for nothing
                yield RowNumbers(batch[:1], 0.0)

    def generator_state(self, epoch: int) -> Tensor:
        """Where the generator stands before ``epoch``."""
        if self.joined is not None:
            self._wind_to(epoch)
        return self._generator.get_state()

    def _seeded(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _wind_to(self, epoch: int) -> None:
        if self._next > epoch:
            self._next, self._generator = 0, self._seeded()
        for _ in range(self._next, epoch):
            torch.randperm(self.rows, generator=self._generator)
        self._next = epoch

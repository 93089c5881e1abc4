r"""The order in which a fit sees its rows.

Rows are visited by slices of one permutation per epoch. A stratified program (one with a ``strata`` hook) gets a
fixed number of rows of each stratum in every batch; the row weights

.. math:: w_i = \frac{n_s / b_s}{n / B}

(n_s rows in the stratum, b_s of them in a batch of B) undo the over-representation, so that the expected loss is the
full one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.data import Batch, Rows
from pyro_lvm.program import Program, require_named

__all__ = ["Order"]


class Order:
    """Batches, epoch after epoch.

    Args:
        rows: the data.
        batch_size: rows in a batch; None for all.
        strata: (row numbers, rows in each batch) for each stratum, or None.
        seed: of the permutations.
    """

    def __init__(self, rows: Rows, batch_size: int | None, strata: list[tuple[Tensor, int]] | None, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.batch_size = None if batch_size is None or batch_size >= len(rows) else batch_size
        self.strata = strata if self.batch_size is not None else None
        self._generator = torch.Generator().manual_seed(seed)
        self._start = self._generators()
        self._full: Batch | None = None
        if rows.loader is not None:
            self.steps_per_epoch = rows.batches_of_loader
        else:
            self.steps_per_epoch = 1 if self.batch_size is None else -(-len(rows) // self.batch_size)

    def epoch(self, number: int, skip: int = 0) -> Iterator[tuple[Batch, float]]:
        """The batches of one epoch, each with its share of the epoch's mean loss.

        Args:
            number: of the epoch, from 0.
            skip: how many of its batches are done already, in an epoch that `load_state` knows the start of.
        """
        draws = self.batch_size is not None or self.rows.loader is not None
        if skip:
            self._load_generators(self._start)
        elif draws:  # else they stand where they stood
            self._start = self._generators()
        rows = self.rows.redrawn(number, self.seed)
        if rows.loader is not None:
            yield from self._loaded(rows, skip)
        elif self.batch_size is None:
            if self._full is None or rows is not self.rows:
                self._full = rows.whole()
            yield from [(self._full, 1.0)][skip:]
        else:
            plan = islice(self._planned(rows, self.batch_size), skip, None)
            counts = None if self.strata is None else tuple(count for _, count in self.strata)

            def read(planned: tuple[Tensor, Tensor | None, float]) -> tuple[Batch, float]:
                index, weight, share = planned
                return rows.take(index, weight, counts), share

            yield from rows.reading(plan, read)

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on within the running epoch: the generators as they were at its start."""
        return self._start

    def load_state(self, state: dict[str, Any]) -> None:
        """Begin the next epoch that is asked for where `state` was taken."""
        self._start = state
        self._load_generators(state)

    def _generators(self) -> dict[str, Any]:
        generators: dict[str, Any] = {"own": self._generator.get_state()}
        loader = self.rows.loader
        if loader is not None:  # it draws its order from a generator of its own, or from the global one
            generators["global"] = torch.get_rng_state()
            generators["loader"] = None if loader.generator is None else loader.generator.get_state()
        return generators

    def _load_generators(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["own"])
        loader = self.rows.loader
        if loader is not None and loader.generator is not None:
            loader.generator.set_state(state["loader"])

    def _loaded(self, rows: Rows, skip: int) -> Iterator[tuple[Batch, float]]:
        batches = rows.batches(None)
        if skip:
            now = torch.get_rng_state()
            torch.set_rng_state(self._start["global"])  # the order is drawn when the first batch is asked for
            for _ in islice(batches, skip):
                pass
            torch.set_rng_state(now)
        for batch in batches:
            yield batch, len(batch) / len(rows)

    def _planned(self, rows: Rows, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None, float]]:
        """Row numbers, row weights and share of each batch, before any row is read."""
        if self.strata is not None:
            yield from self._stratified(rows, self.strata)
            return
        for index in torch.randperm(len(rows), generator=self._generator).split(batch_size):
            yield index, None, len(index) / len(rows)

    def _stratified(
        self, rows: Rows, strata: list[tuple[Tensor, int]]
    ) -> Iterator[tuple[Tensor, Tensor | None, float]]:
        total = sum(count for _, count in strata)
        dtype = rows.dtype or torch.get_default_dtype()
        orders = [self._endless(numbers, count) for numbers, count in strata]
        weight = torch.cat(
            [
                torch.full((count,), (len(numbers) / count) / (len(rows) / total), dtype=dtype)
                for numbers, count in strata
                if count
            ]
        )
        for _ in range(self.steps_per_epoch):
            yield torch.cat([next(order) for order in orders]), weight, 1.0 / self.steps_per_epoch

    def _endless(self, numbers: Tensor, count: int) -> Iterator[Tensor]:
        """``count`` rows at a time, shuffled anew whenever the stratum is exhausted."""
        pool = numbers[:0]
        while True:
            while len(pool) < count:
                pool = torch.cat([pool, numbers[torch.randperm(len(numbers), generator=self._generator)]])
            yield pool[:count]
            pool = pool[count:]


def strata_of(program: Program, rows: Rows, batch_size: int | None) -> list[tuple[Tensor, int]] | None:
    """What the program's ``strata`` hook asks for on these rows, or None.

    Raises:
        ValueError: if the strata leave out a row, hold one twice, or do not fill the batch.
        ProgramError: if model or guide does not name ``weight``: the over-represented rows would count too much.
    """
    hook = program.hook("strata")
    in_arrays = rows.dataset is None and rows.loader is None
    if hook is None or batch_size is None or batch_size >= len(rows) or not in_arrays:
        return None
    asked = hook(*rows.args, **rows.kwargs, batch_size=batch_size)
    strata: list[tuple[Tensor, int]] = [
        (torch.as_tensor(numbers).cpu(), int(count) if len(numbers) else 0) for numbers, count in asked
    ]
    covered = torch.cat([torch.empty(0, dtype=torch.long), *(numbers for numbers, _ in strata)]).sort().values
    if not torch.equal(covered, torch.arange(len(rows))):
        raise ValueError(
            f"strata() must hold each of the {len(rows)} row numbers once; it holds {len(covered)} numbers, "
            f"{len(covered.unique())} of them distinct"
        )
    counts = [count for numbers, count in strata if len(numbers)]
    if len(counts) == 1:
        return None
    if sum(counts) != batch_size or min(counts) < 1:
        raise ValueError(f"strata() must fill a batch of {batch_size} with at least one row each; it asks for {counts}")
    require_named(program, "weight", "its strata() over-represents some rows, whose weights must scale them back")
    return strata

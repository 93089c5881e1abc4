"""What every evaluation shares: a program with its parameters, data seen as rows, and a random state of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide

from pyro_lvm.data import Batch, Rows, as_rows
from pyro_lvm.errors import ProgramError
from pyro_lvm.guides import GivenDraws
from pyro_lvm.parameters import BoundProgram, Snapshot, isolated
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import Program, as_program, floating_dtype
from pyro_lvm.structure import Structure
from pyro_lvm.walk import rows_at_a_time

__all__ = ["Evaluation", "fresh_seed", "streams"]

FEWEST_ROWS_TO_TRACE, MOST_ROWS_TO_TRACE = 4, 256
"""A single row would look like a dimension that broadcasts, however large it is."""


@dataclass(frozen=True)
class Evaluation:
    """A program at fixed parameters, and data to evaluate it on.

    Attributes:
        bound: the program and its parameters.
        snapshot: the parameter values to evaluate with; None for the live ones.
        rows: the data.
        structure: what one trace on the data tells.
    """

    bound: BoundProgram
    snapshot: Snapshot | None
    rows: Rows
    structure: Structure

    @staticmethod
    def of(program: Any, x: Any) -> Evaluation:
        """Set up an evaluation of a `Fit`, or of a program with a guide, on the data ``x``."""
        snapshot: Snapshot | None = None
        if hasattr(program, "_bound"):  # a Fit; importing its class here would turn the imports round
            bound, snapshot = program._bound, program._snapshot
            rows = as_rows(x, "x", missing=bound.program.missing is not None)
        else:
            rows = as_rows(x, "x")
            resolved = as_program(program)
            if resolved.guide is None:
                raise ProgramError(
                    f"{resolved.name} has no guide to evaluate with: fit it, and pass what fit returns, or pass a "
                    "(model, guide) tuple"
                )
            bound = BoundProgram(resolved)
        if bound.first_rows is not None:
            with isolated(0, validate=True), _missing(bound, rows):
                bound.first_rows(bound, rows.like(bound.reference(snapshot)))
        with isolated(0, validate=True), bound.holding(snapshot), _missing(bound, rows):
            rows = rows.like(bound.reference(snapshot))
            bound.functions.dtype = bound.functions.dtype or floating_dtype(rows.first(1).tensors().values())
            bound.program.require_arguments(*rows.first(1).data())
            structure = traced(bound.model, bound.guide, rows.first(batch_to_trace(bound.program, rows)))
        return Evaluation(bound, snapshot, rows, structure)

    def whole(self) -> tuple[Batch, Structure]:
        """All rows in one batch, and the structure seen on them; call it while `running`."""
        batch = self.rows.whole()
        return batch, traced(self.bound.model, self.bound.guide, batch)

    @property
    def takes_parts(self) -> bool:
        """Whether the program can be given a part of the rows: an autoguide must be told which."""
        program = self.bound.program
        own = any(site.name in self.structure.guide for site in self.structure.local_latent)
        by_row = isinstance(program.guide, AutoGuide) and own
        return program.names("size") and (not by_row or program.names("index"))

    @property
    def given(self) -> GivenDraws | None:
        """The guide, where it says given draws again instead of making its own."""
        guide = self.bound.program.guide
        return guide if isinstance(guide, GivenDraws) else None

    def numbers(self, num_draws: int) -> Iterator[int]:
        """Count draws; a guide of given draws is moved to each."""
        given = self.given
        for number in range(num_draws):
            if given is not None:
                given.number = number
            yield number

    @contextmanager
    def running(self, seed: int | None) -> Iterator[None]:
        """Evaluate with the snapshot, in eval mode, under a random state that leaves the process's alone."""
        noise = isolated(fresh_seed() if seed is None else seed, validate=False)
        with noise, self.bound.holding(self.snapshot), _missing(self.bound, self.rows):
            yield


def _missing(bound: BoundProgram, rows: Rows) -> AbstractContextManager[None]:
    """What is missing in these rows is integrated out, if the fit was asked to."""
    return nullcontext() if bound.program.missing is None else bound.program.missing.during(rows)


def batch_to_trace(program: Program, rows: Rows) -> int:
    """Rows enough to see a program's structure: a few where it can take part of them, else all.

    An autoguide sees all of them: it remembers how many rows its first call had, and draws rows of its own where
    they were a part. Given draws have values for all rows.
    """
    automatic = program.guide is None or isinstance(program.guide, AutoGuide | GivenDraws)
    if not program.names("size") or automatic or rows.loader is not None:
        return len(rows)
    return min(len(rows), MOST_ROWS_TO_TRACE, max(FEWEST_ROWS_TO_TRACE, rows_at_a_time(rows)))


def fresh_seed() -> int:
    """A seed from the system's entropy; the process's random state is not asked."""
    return int(torch.Generator().seed() % 2**32)


def streams(seed: int) -> list[int]:
    """Independent seeds for initialisation, order, noise and evaluation."""
    generator = torch.Generator().manual_seed(seed)
    return [int(s) for s in torch.randint(2**31, (4,), generator=generator)]

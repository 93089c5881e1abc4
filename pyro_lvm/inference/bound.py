"""The plain bound at fixed parameters, averaged until it is known well enough."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pyro.infer.autoguide import AutoGuide

from pyro_lvm.capture.graph import CapturedStep
from pyro_lvm.capture.step import LookAtBound, StepResult
from pyro_lvm.data import Batch, Rows
from pyro_lvm.elbo.estimator import plain_estimator
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.structure import Structure
from pyro_lvm.walk import rows_at_a_time

__all__ = ["MeanElbo", "mean_elbo", "validation_elbo"]

TOLERANCE = 0.01
"""Standard error of ``fit.elbo`` to reach, nats per datum."""

MIN_FREEDOM = 7
"""Degrees of freedom before the error is trusted: whoever stops at the first small error of a few stops on luck."""

MAX_PASSES = 1000
"""Passes over the data after which it is reported with the error it has."""

EVALUATION_BATCH = 1024
"""Rows in one part of an evaluation where they are small: it keeps no gradients, so it may take more than a step."""

EVALUATIONS_THAT_REPAY_A_GRAPH = 100
"""Batches of one size, evaluated through Pyro before the rest are captured: about what a capture costs."""


@dataclass(frozen=True)
class MeanElbo:
    """The plain bound, nats per datum, its standard error, and the passes over the data it took."""

    elbo: float
    standard_error: float
    passes: int


def mean_elbo(
    bound: BoundProgram, structure: Structure, rows: Rows, batch_size: int | None, seed: int, *, capture: bool = True
) -> MeanElbo:
    """The plain bound on all rows, averaged over passes until its standard error is at most 0.01 nats per datum.

    Where that takes many passes they are captured, if ``capture`` allows; the numbers are the same.
    """
    look = _Evaluations(bound, structure, len(rows), capture)
    chunk = _chunk(bound, structure, rows, batch_size)
    listed = {site.name for site in (*structure.enumerated_in_model, *structure.enumerated_in_guide)}
    drawn = any(site.name not in listed for site in structure.latent)
    with isolated(seed, validate=False), bound.holding(None):
        passes = [_one_pass(look, rows, chunk)]
        try:
            while drawn and len(passes) < MAX_PASSES and not _known(passes):
                passes.append(_one_pass(look, rows, chunk))
        except KeyboardInterrupt:
            pass  # who cannot wait gets the mean of what there is, with its standard error
    mean = sum(sum(parts) for parts in passes) / len(passes)
    return MeanElbo(mean, _standard_error(passes) if drawn else 0.0, len(passes))


def _known(passes: list[list[float]]) -> bool:
    freedom = len(passes[0]) * (len(passes) - 1)
    return freedom >= MIN_FREEDOM and _standard_error(passes) <= TOLERANCE


def validation_elbo(bound: BoundProgram, structure: Structure, rows: Rows, seed: int) -> float:
    """The plain bound on held-out rows, nats per datum, with the same noise every time it is asked for."""
    with isolated(seed, validate=False), bound.holding(None):
        look = LookAtBound(bound, plain_estimator(structure), None, [], len(rows))
        return sum(_one_pass(look, rows, _chunk(bound, structure, rows, None)))


def _chunk(bound: BoundProgram, structure: Structure, rows: Rows, batch_size: int | None) -> int | None:
    """Rows at a time: all of them where the program cannot take a part, or where all rows share latents."""
    if not bound.program.names("size") or rows.loader is not None:
        return None
    per_row_guide = isinstance(bound.program.guide, AutoGuide) and bool(structure.local_latent)
    if per_row_guide and batch_size is None:
        return None
    return max(batch_size or 0, min(EVALUATION_BATCH, rows_at_a_time(rows)))


class _Evaluations:
    """Evaluations of the plain bound, through Pyro until there have been so many that a graph repays its capture."""

    def __init__(self, bound: BoundProgram, structure: Structure, size: int, capture: bool) -> None:
        self.through_pyro = LookAtBound(bound, plain_estimator(structure), None, [], size)
        self.captured = CapturedStep(self.through_pyro, "graph" if capture else "eager", "")
        self.seen: Counter[int] = Counter()

    def __call__(self, batch: Batch) -> StepResult:
        self.seen[len(batch)] += 1
        many = self.seen[len(batch)] > EVALUATIONS_THAT_REPAY_A_GRAPH
        return (self.captured if many else self.through_pyro)(batch)


def _one_pass(look: Callable[[Batch], StepResult], rows: Rows, chunk: int | None) -> list[float]:
    """What each chunk of rows contributes to the mean; their noise is independent."""
    parts, seen = [], 0
    for batch in rows.batches(chunk):
        parts.append(look(batch).values.double().item() / len(rows) * len(batch))
        seen += len(batch)  # a loader may leave rows out
    parts = [part / seen for part in parts]
    # a loader may shuffle: its chunks are not the same rows in every pass
    return parts if rows.loader is None else [sum(parts)]


def _standard_error(passes: list[list[float]]) -> float:
    """Of the mean over passes: the chunks' variances between passes add up."""
    variance = float(np.var(passes, axis=0, ddof=1).sum()) if len(passes) > 1 else 0.0
    return math.sqrt(variance / len(passes))

"""The estimator, evaluated once before anything moves: whatever it would say in the first step, it says now."""

from __future__ import annotations

import copy
import warnings

import torch

from pyro_lvm.data import Batch
from pyro_lvm.elbo.estimator import Estimator
from pyro_lvm.errors import ProgramError
from pyro_lvm.parameters import BoundProgram
from pyro_lvm.preflight.explain import Circumstances, explained
from pyro_lvm.structure import Recorder, Structure

__all__ = ["try_estimator"]


def try_estimator(bound: BoundProgram, structure: Structure, estimator: Estimator, batch: Batch) -> None:
    """Evaluate the bound once, in eval mode and without parameters' gradients.

    Raises:
        ProgramError: if the estimator cannot be evaluated, with an edit where the cause is known.
    """
    if batch.weight is None and bound.program.hook("strata") is not None and bound.program.names("weight"):
        weight = torch.linspace(0.5, 1.5, len(batch), device=batch.index.device if batch.index is not None else None)
        batch = Batch(batch.args, batch.kwargs, batch.size, batch.index, weight)
    seen = Circumstances(batch, Recorder(), Recorder())
    trial = _Seen(bound, seen)
    try:
        with bound.holding(None), warnings.catch_warnings():
            # a loss that is not finite is the loop's affair, which reads it and restores the parameters
            warnings.filterwarnings("ignore", "Encountered", UserWarning)
            # Pyro goes by the order of sites; the pre-flight has gone by what hangs on what
            warnings.filterwarnings("ignore", "Failed to verify mean field restriction", UserWarning)
            estimator.evaluate(trial, batch)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, AssertionError, NotImplementedError, KeyError, IndexError) as error:
        if isinstance(error, ProgramError):
            raise
        reason = _does_not_broadcast(bound, structure, estimator, batch) or explained(error, seen)
        if reason is not None:
            raise ProgramError(reason) from error
        raise


def _does_not_broadcast(bound: BoundProgram, structure: Structure, estimator: Estimator, batch: Batch) -> str | None:
    """The words for a program that can be drawn from again and again, but not all at once; None for others."""
    count = estimator.elbo.num_particles
    if not estimator.elbo.vectorize_particles or count == 1:
        return None
    one_by_one = copy.copy(estimator.elbo)
    one_by_one.vectorize_particles = False
    try:
        with bound.holding(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Estimator(one_by_one, structure, estimator.reason).evaluate(bound, batch)
    except Exception:  # then it is no matter of dims
        return None
    return (
        f"{estimator!r} draws its {count} particles in one pass, with a dim of {count} on the left of every plate, and "
        "the program does not broadcast over it: write shapes from the right (x.shape[-1], torch.cat(..., -1), Vindex) "
        "or give the estimator vectorize_particles=False"
    )


class _Seen:
    """A bound program whose model and guide are recorded while they run."""

    def __init__(self, bound: BoundProgram, seen: Circumstances) -> None:
        self.model, self.guide = seen.model(bound.model), seen.guide(bound.guide)

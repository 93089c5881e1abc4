"""What a fit is made with, in plain values: enough to know it again, or to see that it is another."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lvm.data import Rows
from pyro_lvm.inference.loop import Loop
from pyro_lvm.storage.files import digest
from pyro_lvm.storage.tree import is_plain

__all__ = ["arguments_of", "made_with"]

NO_MATTER = (
    *("program", "data", "callbacks", "progress"),
    *("checkpoint", "checkpoint_every", "resume", "on_checkpoint_error"),
)
"""Arguments of `fit` that are handed over anew, or decide nothing of what it finds."""

LOOKED_AT = 256
"""Rows, spread over all, whose bytes tell one data set from another."""


def made_with(
    loop: Loop,
    held_out: Rows | None,
    *,
    program: str,
    guide: str,
    seed: int,
    batch_size: int | None,
    optimizer: str,
    grad_clip_norm: float | None = None,
    early_stopping: Any = None,
    capture: bool | str = "auto",
    autocast: torch.dtype | None = None,
    missing: str | None = None,
    on_nonfinite: Any = "raise",
) -> dict[str, Any]:
    """The arguments, the data, the parameters' shapes, the estimator and the surroundings of a fit about to begin."""
    rows, bound = loop.order.rows, loop.prepared.bound
    return {
        "program": program,
        "guide": guide,
        "seed": seed,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "grad_clip_norm": grad_clip_norm,
        "early_stopping": repr(early_stopping),
        "capture": capture,
        "autocast": None if autocast is None else str(autocast),
        "missing": missing,
        "on_nonfinite": on_nonfinite,
        "data": _told_apart(rows),
        "validation": None if held_out is None else _told_apart(held_out),
        "n": len(rows),
        "total_steps": loop.total_steps,
        "steps_per_epoch": loop.order.steps_per_epoch,
        "estimator": repr(loop.prepared.estimator),
        "alternate": None if loop.alternation is None else loop.alternation.described,
        "tensors": {name: f"{t.dtype} {tuple(t.shape)}" for name, t in bound.tensors()},
        "surroundings": {
            **{name: version(name) for name in ("torch", "pyro-ppl", "pyro-lvm")},
            "processor": platform.machine(),
            "device": str(rows.device),
            "threads": torch.get_num_threads(),
        },
    }


def arguments_of(given: dict[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    """The arguments of a call as its record says them: plain ones as they are, others as they show themselves."""
    matter = {name: value for name, value in given.items() if name not in NO_MATTER}
    plain = {name: value for name, value in matter.items() if _all_plain(value)} | {"seed": seed}
    return {"arguments": plain, "objects": {name: _shown(value) for name, value in matter.items() if name not in plain}}


def _shown(value: Any) -> str:
    """An object in words that hold no address."""
    named = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{named}" if named else type(value).__name__ if " at 0x" in repr(value) else repr(value)


def _all_plain(value: Any) -> bool:
    return all(map(_all_plain, value)) if isinstance(value, tuple) else is_plain(value)


def _told_apart(rows: Rows) -> str:
    """A digest of some rows of arrays; of what may draw its rows anew only the number can be told."""
    arrays = (*rows.args, *rows.kwargs.values())
    if not arrays or not all(isinstance(array, Tensor | np.ndarray) for array in arrays):
        return f"{len(rows)} rows"
    batch = rows.take(torch.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).long().unique())
    return digest(f"{len(rows)}", {name: value.detach().cpu() for name, value in batch.tensors().items()})

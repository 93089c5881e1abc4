"""Trace a pair, and turn what Pyro or torch says about its plates, names and tensors into an edit."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample

from pyro_lvm.data import Batch
from pyro_lvm.errors import ProgramError
from pyro_lvm.preflight.explain import Circumstances, explained, wrong_rows
from pyro_lvm.structure import Plate, Recorder, Structure, trace_structure

__all__ = ["traced"]


def traced(model: Any, guide: Any | None, batch: Batch) -> Structure:
    """`trace_structure`, with what Pyro says about plates turned into an edit.

    Raises:
        ProgramError: if a distribution does not fit its plate, or the plate over the rows does not hold this batch's.
    """
    rows = _RowsOfPlates(len(batch))
    seen = (Recorder(), Recorder())
    try:
        structure = trace_structure(rows(model), None if guide is None else rows(guide), batch, seen)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        if isinstance(error, ProgramError):  # to which Pyro has added its table of shapes
            raise ProgramError(str(error).split("\nTrace Shapes:")[0]) from error
        if rows.misfit is not None:  # whatever shapes clashed, they clashed for this
            raise ProgramError(wrong_rows(*rows.misfit, batch)) from error
        reason = explained(error, Circumstances(batch, *seen))
        if reason is None:
            raise
        raise ProgramError(reason) from error
    plate = structure.data_plate
    if plate is not None and plate in rows.random:
        raise ProgramError(
            f"plate {plate!r} draws rows of its own ({rows.random[plate]}) instead of those of the batch, and each "
            f'datum would train the parameters of another: write pyro.plate("{plate}", size, subsample=index) with '
            "`size=None, index=None` in the signature (for an autoguide: in the model's, and pass guide='mean_field')"
        )
    for site in (*structure.model.values(), *structure.guide.values()):
        for found in site.plates:
            if found.name == plate and found.rows != len(batch):
                raise ProgramError(wrong_rows(found, str(site), batch))
    _require_rows_of_parameters(rows, structure, batch)
    return structure


class _RowsOfPlates(Messenger):
    """Notes which rows plates hold, and what goes by them.

    Attributes:
        random: by plate, how many rows it draws of how many.
        misfit: the first data plate that does not hold the batch's rows, and the site in it.
        by_row: (plate, name) of every parameter of which a plate that holds a part of its rows takes a part.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.random: dict[str, str] = {}
        self.misfit: tuple[Plate, str] | None = None
        self.by_row: list[tuple[str, str]] = []

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, _Subsample) and msg["value"] is None and fn.subsample_size not in (None, fn.size):
            self.random[msg["name"]] = f"{fn.subsample_size} of {fn.size}"
        for frame in msg["cond_indep_stack"]:
            if frame.name == "data" and frame.vectorized and frame.size != self.rows and self.misfit is None:
                plate = Plate(frame.name, frame.dim, int(frame.size), int(frame.full_size or frame.size))
                self.misfit = (plate, f"site {msg['name']!r}")

    def _pyro_param(self, msg: Any) -> None:
        self._note(msg)

    def _pyro_subsample(self, msg: Any) -> None:
        self._note(msg)

    def _note(self, msg: Any) -> None:
        if msg["kwargs"].get("event_dim") is not None:
            parts = [f.name for f in msg["cond_indep_stack"] if f.vectorized and f.size < (f.full_size or f.size)]
            self.by_row += [(plate, str(msg["name"])) for plate in parts]


def _require_rows_of_parameters(rows: _RowsOfPlates, structure: Structure, batch: Batch) -> None:
    """A plate that takes some rows of a parameter must know their numbers; the data themselves are none."""
    for plate, name in rows.by_row:
        held = structure.model_rows.get(plate, structure.guide_rows.get(plate))
        if plate == structure.data_plate and batch.index is not None and not _same(held, batch.index):
            raise ProgramError(
                f"parameter {name!r} has a value for each of {batch.size} rows, but plate {plate!r} takes its rows by "
                "the values of the data instead of their numbers: write "
                f'pyro.plate("{plate}", size or len(x), subsample=index) with `index=None` in the signature'
            )


def _same(held: Any, index: torch.Tensor) -> bool:
    return isinstance(held, torch.Tensor) and held.shape == index.shape and bool((held == index).all())

"""Questions that one trace cannot answer: a second one, on other rows or on one row fewer."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lvm.data import Batch, Rows
from pyro_lvm.errors import ProgramError
from pyro_lvm.parameters import BoundProgram
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.structure import Structure, trace_structure

__all__ = ["check_rows"]


def check_rows(bound: BoundProgram, structure: Structure, batch: Batch, rows: Rows, batch_size: int | None) -> None:
    """Raise where the program does not follow the rows it is given.

    Args:
        bound: the program.
        structure: its trace on ``batch``.
        batch: the first rows.
        rows: all of them.
        batch_size: rows in a step; None for all.

    Raises:
        ProgramError: naming the site or parameter, the numbers, and one edit.
    """
    if len(batch) < 2:
        return
    _check_observed_rows(bound, structure, batch)
    _check_one_row_fewer(bound, structure, batch)
    if batch_size is not None and rows.loader is None and len(rows) % batch_size and batch_size < len(rows):
        last = rows.take(torch.arange(len(rows) - len(rows) % batch_size, len(rows)))
        try:
            traced(bound.model, bound.guide, last)
        except (ValueError, RuntimeError) as error:
            raise ProgramError(
                f"the program takes the first batch, of {batch_size} rows, but not the last, of {len(last)} "
                f"({len(rows)} rows in all): {str(error).split('. ')[0]}. Write len(x) where it has a number of rows"
            ) from error


def _check_observed_rows(bound: BoundProgram, structure: Structure, batch: Batch) -> None:
    """What is observed is the batch, not something of the same shape that stays when the rows change."""
    given = {value.data_ptr() for value in batch.tensors().values() if isinstance(value, Tensor)}
    inside = [
        site
        for site in structure.observed
        if site.inside(structure.data_plate)
        and site.value.numel() >= len(batch)
        and not bool((site.value == site.value.flatten()[0]).all())  # a constant is the same for all rows
    ]
    if not inside or any(site.value.data_ptr() in given for site in inside):
        return
    turned = batch.turned()
    if all(torch.equal(a, b) for a, b in zip(batch.tensors().values(), turned.tensors().values(), strict=True)):
        return
    again = trace_structure(bound.model, None, turned).model
    if all(torch.equal(site.value, again[site.name].value) for site in inside if site.name in again):
        raise ProgramError(
            f"{inside[0]} observes the same {len(batch)} values whatever rows the model is given: observe its "
            "argument, obs=x, and not a variable of the surroundings"
        )


def _check_one_row_fewer(bound: BoundProgram, structure: Structure, batch: Batch) -> None:
    """Sizes that happen to be the number of rows: do they go with it?"""
    part = len(batch) != batch.size
    suspects = {name: tuple(p.shape) for name, p in bound.functions.unconstrained.items() if len(batch) in p.shape}
    events = [
        site
        for site in (*structure.local_latent, *structure.guide.values())
        if site.inside(structure.data_plate) and site.fn.event_shape[:1] == (len(batch),)
    ]
    if not events and not (suspects and part):
        return
    program = bound.program
    if isinstance(program.guide, AutoGuide):
        program = program.with_guide(lambda *args, **kwargs: None)
    smaller = BoundProgram(program, None, bound.functions.dtype, bound.functions.device)
    fewer = _fewer(batch, part)
    try:
        found = trace_structure(smaller.model, smaller.guide, fewer)
    except (ValueError, RuntimeError, IndexError):
        return  # a program for so many rows and no others: only the last batch, which is tried, could object
    for site in events:
        other = found.model.get(site.name) or found.guide.get(site.name)
        if other is not None and other.fn.event_shape != site.fn.event_shape:
            dims = getattr(site.fn, "reinterpreted_batch_ndims", 1)
            raise ProgramError(
                f"{site} has event shape {tuple(site.fn.event_shape)}, which holds the {len(batch)} rows of plate "
                f"{structure.data_plate!r} as well: each datum would have latents for all rows. Write "
                f"{f'.to_event({dims - 1})' if dims > 1 else 'it without .to_event(1)'}"
            )
    for name, shape in suspects.items():
        again = smaller.functions.unconstrained.get(name)
        if part and again is not None and tuple(again.shape) != shape:
            raise ProgramError(
                f"parameter {name!r} has shape {shape}, an entry for each of the {len(batch)} rows of the batch: the "
                f"same numbers would serve every batch of the {batch.size} rows. Make it as long as the data set and "
                "take the batch's entries, pyro.param(name, torch.zeros(size))[index], with `size=None, index=None` "
                "in the signature"
            )


def _fewer(batch: Batch, part: bool) -> Batch:
    def cut(value: Any) -> Any:
        return value[:-1] if isinstance(value, Tensor) else value

    return Batch(
        tuple(cut(value) for value in batch.args),
        {name: cut(value) for name, value in batch.kwargs.items()},
        batch.size if part else batch.size - 1,
        cut(batch.index),
        cut(batch.weight),
    )

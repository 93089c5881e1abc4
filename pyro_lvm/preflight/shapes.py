"""Each site by itself: its log-probability has the dims of its plates and no others, and their scale is right."""

from __future__ import annotations

import torch
from torch.distributions import Independent

from pyro_lvm.data import Batch
from pyro_lvm.errors import ProgramError
from pyro_lvm.preflight.explain import plate_of_rows
from pyro_lvm.structure import Site, Structure

__all__ = ["check_shapes"]


def check_shapes(structure: Structure, batch: Batch) -> None:
    """Raise where a site's log-probability would be summed a wrong number of times.

    Raises:
        ProgramError: naming the site, its shapes, and one edit.
    """
    sites = (*structure.model.values(), *structure.guide.values())
    for site in sites:
        value_shape = _value_shape(site, structure)
        if value_shape is not None:
            _check_value(site, value_shape)
        _check_rows_in_event(site, structure, batch)
        _check_log_prob_shape(site, value_shape, structure, batch)
    for site in sites:
        _check_size(site, structure.data_plate, batch)


def _value_shape(site: Site, structure: Structure) -> tuple[int, ...] | None:
    """The shape of a value that stands at its own distribution; None where the guide has put it into the model."""
    if structure.model.get(site.name) is site and not site.observed and site.name in structure.guide:
        return None
    return tuple(getattr(site.value, "shape", ()))


def _shapes(site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch shape and event shape of the distribution."""
    return tuple(site.fn.batch_shape), tuple(site.fn.event_shape)


def _own_batch_shape(site: Site) -> tuple[int, ...]:
    """The batch shape that the program gave the distribution, before plates expanded it: those dims have no stride."""
    batch_shape = tuple(site.fn.batch_shape)
    named = [getattr(site.base, name, None) for name in getattr(site.base, "arg_constraints", {})]
    parameters = [tensor for tensor in named if isinstance(tensor, torch.Tensor)]
    whole = batch_shape + tuple(site.fn.event_shape)
    if not parameters or any(tuple(tensor.shape) != whole for tensor in parameters):
        return batch_shape
    made = [any(tensor.stride(dim) for tensor in parameters) for dim in range(len(batch_shape))]
    first = made.index(True) if True in made else len(made)
    return tuple(n if own else 1 for n, own in zip(batch_shape[first:], made[first:], strict=True))


def _check_value(site: Site, value_shape: tuple[int, ...]) -> None:
    """A value has the event shape of its distribution, and its other dims go with the batch shape."""
    batch_shape, event_shape = _shapes(site)
    split = max(len(value_shape) - len(event_shape), 0)
    own = value_shape[split:]
    if len(own) != len(event_shape) or any(a not in (1, b) for b, a in zip(own, event_shape, strict=True)):
        raise ProgramError(
            f"{site} has a value of shape {value_shape}, but one draw of its distribution ({site.kind}) has shape "
            f"{event_shape}: {_same_columns(value_shape, event_shape)}"
        )
    try:
        torch.broadcast_shapes(batch_shape, value_shape[:split])
    except RuntimeError:
        raise ProgramError(
            f"{site} has a value of shape {value_shape}, but its distribution has batch shape {batch_shape} and event "
            f"shape {event_shape}: make the parameters as long as the value, {value_shape[:split]}"
        ) from None


def _same_columns(value_shape: tuple[int, ...], event_shape: tuple[int, ...]) -> str:
    if value_shape and event_shape and value_shape[-1] != event_shape[-1]:
        return f"make as many parameters as the value has columns, {value_shape[-1]}"
    return f"reshape the value to (..., {', '.join(map(str, event_shape))})"


def _check_rows_in_event(site: Site, structure: Structure, batch: Batch) -> None:
    """An event that has swallowed the rows is counted once for every row of the plate."""
    _, event_shape = _shapes(site)
    value_shape = tuple(getattr(site.value, "shape", ()))
    if not site.observed or event_shape[:1] != (len(batch),) or len(batch) < 2:
        return
    if not site.inside(structure.data_plate):
        given = [v.data_ptr() for v in batch.tensors().values() if isinstance(v, torch.Tensor)]
        if len(batch) != batch.size and site.value.data_ptr() in given:
            raise ProgramError(
                f"{site} has event shape {event_shape}, which holds the {len(batch)} rows of the batch, in no plate: "
                f"it would not be scaled to the {batch.size} rows of the data. Write {plate_of_rows('data')}, and one "
                "event dim fewer"
            )
        return
    if len(value_shape) == len(event_shape) and isinstance(site.fn, Independent):
        dims = site.fn.reinterpreted_batch_ndims
        raise ProgramError(
            f"{site} has event shape {event_shape}, which holds the {len(batch)} rows of plate "
            f"{structure.data_plate!r} as well: the log-probability of all rows would be counted {len(batch)} times. "
            f"Write {f'.to_event({dims - 1})' if dims > 1 else 'it without .to_event(1)'}"
        )


def _check_log_prob_shape(site: Site, value_shape: tuple[int, ...] | None, structure: Structure, batch: Batch) -> None:
    """Every dim of the log-probability that is longer than one belongs to a plate."""
    batch_shape, event_shape = _shapes(site)
    of_value = () if value_shape is None else value_shape[: len(value_shape) - len(event_shape)]
    shape = tuple(torch.broadcast_shapes(batch_shape, of_value))
    dims = {plate.dim for plate in site.plates}
    loose = [dim for dim in range(-1, -len(shape) - 1, -1) if shape[dim] > 1 and dim not in dims]
    if not loose:
        return
    inside = ", ".join(f"{p.name!r} of {p.rows}" for p in site.plates) or "none"
    own = _own_batch_shape(site)
    raise ProgramError(
        f"{site} has batch shape {own}"
        f"{'' if value_shape is None else f' and a value of shape {value_shape}'}, so that its log-probability has "
        f"shape {shape}, whose dim {loose[0]} of {shape[loose[0]]} is in no plate (plates around it: {inside}). "
        f"{_edit(site, shape, of_value, own, loose, structure, batch)}"
    )


def _edit(
    site: Site,
    shape: tuple[int, ...],
    of_value: tuple[int, ...],
    batch_shape: tuple[int, ...],
    loose: list[int],
    structure: Structure,
    batch: Batch,
) -> str:
    """The one edit that the sizes tell."""
    if site.observed and of_value != batch_shape and (1,) in (of_value[-1:], batch_shape[-1:]):
        what, column = ("the value", of_value) if of_value[-1:] == (1,) else ("the parameters", batch_shape)
        return (
            f"Parameters of shape {batch_shape} and a value of shape {of_value} were broadcast against each other: "
            f"give {what} the shape {column[:-1]}, with .squeeze(-1)"
        )
    if not site.inside(structure.data_plate) and shape[loose[-1]] == len(batch):
        events = len(loose) - 1
        plate = f"Those {len(batch)} are the rows: write {plate_of_rows('data')}"
        return plate + (f", and .to_event({events}) for the rest" if events else "")
    return f"Those {shape[loose[0]]} belong to one datum: declare them an event with .to_event({len(loose)})"


def _check_size(site: Site, data_plate: str | None, batch: Batch) -> None:
    for plate in site.plates:
        if plate.name == data_plate and plate.size != batch.size:
            raise ProgramError(
                f"plate {plate.name!r} around {site} has size {plate.size}, but the data set has {batch.size} rows: "
                f"its scale would be wrong. Write {plate_of_rows(plate.name)}"
            )

"""The data as the likelihoods see them: support, kind of number, device, and whether they are looked at at all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_lvm.data import Batch, Rows
from pyro_lvm.errors import ProgramError
from pyro_lvm.parameters import BoundProgram
from pyro_lvm.structure import Site, Structure, support_of_entry, trace_structure
from pyro_lvm.walk import rows_at_a_time

__all__ = ["check_observations", "check_support"]

_SCALE_TO_UNIT = "scale the data to [0, 1], or use likelihood 'normal'"
_MENDS = {
    "Bernoulli": "make them 0 or 1 (`binarize=` of the data sets, or x > threshold), or use a likelihood of values "
    "in between, such as 'continuous_bernoulli' or 'normal'",
    "ContinuousBernoulli": _SCALE_TO_UNIT,
    "TiltedUniform": _SCALE_TO_UNIT,
    "Poisson": "pass counts 0, 1, 2, ..., or use likelihood 'normal'",
    "Categorical": "number the categories from 0 and raise their number to cover all that occur",
}


def check_observations(structure: Structure, batch: Batch) -> None:
    """Raise where values and distributions are of different kinds, or on different devices.

    Raises:
        ProgramError: naming the site, the numbers, and one edit.
    """
    device = next((v.device for v in batch.tensors().values() if isinstance(v, Tensor)), None)
    for site in (*structure.model.values(), *structure.guide.values()):
        value = site.value
        if isinstance(value, Tensor) and device is not None and value.device != device and not _is_number(value):
            raise ProgramError(
                f"{site} has a value on {value.device}, but the data are on {device}: make the tensors of its "
                "distribution there, x.new_tensor(...) or torch.zeros(..., device=x.device), or register them as "
                "buffers of the module"
            )
    for site in structure.observed:
        value = site.value
        if not isinstance(value, Tensor) or value.is_floating_point() or site.discrete or not value.dim():
            continue
        if any(value.data_ptr() == given.data_ptr() for given in batch.tensors().values()):
            raise ProgramError(
                f"{site} ({site.kind}) has a continuous likelihood, but its data are {value.dtype}, such as "
                f"{value.flatten()[0].item()}: pass them as real numbers on purpose, x.to(torch.float32), or use a "
                "likelihood of counts or categories"
            )


def _is_number(value: Tensor) -> bool:
    return value.dim() == 0 and value.device.type == "cpu"  # torch lets these meet any device


def check_support(bound: BoundProgram, structure: Structure, batch: Batch, rows: Rows) -> None:
    """Raise where a row of the data lies outside the support of the site that observes it.

    Only supports that do not change from row to row are checked, on all rows (on the first batch of a loader), and
    not where the distribution was made with ``validate_args=False``.

    Raises:
        ProgramError: naming the site, how many values, one of them and its row, and an edit.
    """
    chunk = rows_at_a_time(rows) if rows.loader is None and bound.program.names("size") else None
    for site, name in _observed_arguments(structure, batch):
        support = _shared_by_rows(site.fn.support)
        if support is None or getattr(site.base, "_validate_args", True) is False:
            continue
        start = 0
        for part in [batch] if rows.loader is not None else rows.batches(chunk):
            value = part.tensors()[name]
            inside = torch.as_tensor(support.check(value))
            if rows.missing:
                inside = inside | value.isnan()
            if not bool(inside.all()) and not _inside_of_its_own(bound, site, part, value):
                _refuse(site, name, value, inside, start)
            start += len(part)


def _inside_of_its_own(bound: BoundProgram, site: Site, part: Batch, value: Tensor) -> bool:
    """Whether the rows lie in the support that the program gives them; that of the first rows may be another."""
    try:
        again = trace_structure(bound.model, None, part).model[site.name]
    except (RuntimeError, ValueError, KeyError):
        return False
    return bool(torch.as_tensor(again.fn.support.check(value)).all())


def _observed_arguments(structure: Structure, batch: Batch) -> Iterator[tuple[Site, str]]:
    for site in structure.observed:
        for name, value in batch.tensors().items():
            if site.value is value:
                yield site, name


def _shared_by_rows(support: Any) -> Any | None:
    """The support of one entry, with plates' copies of one bound made one; None if it depends on the row."""
    base = support_of_entry(support)
    if base is None or constraints.is_dependent(base):
        return None
    base = copy.copy(base)
    for name, bound in vars(base).items():
        if isinstance(bound, Tensor) and bound.numel() > 1:
            if not bool((bound == bound.flatten()[0]).all()):
                return None
            setattr(base, name, bound.flatten()[0])
    return base


def _refuse(site: Site, name: str, value: Tensor, inside: Tensor, start: int) -> None:
    outside = (~inside).nonzero()
    where = tuple(outside[0].tolist())
    example = value[where] if inside.shape == value.shape else value[where[0]]
    mend = _MENDS.get(site.kind, "transform the data into the support, or choose another likelihood")
    raise ProgramError(
        f"{site} has a {site.kind} likelihood, but {name} holds {len(outside)} values outside its support "
        f"{site.support} in rows {start} to {start + len(value) - 1}, such as {_shown(example)} in row "
        f"{start + where[0]}: {mend}"
    )


def _shown(value: Tensor) -> str:
    return f"{value.item():.4g}" if value.dim() == 0 else str(value.flatten()[:4].tolist())

"""Which site a NaN or an infinity came from: the step once more, through Pyro, from the same random state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.capture.step import Step
from pyro_lvm.data import Batch
from pyro_lvm.declaration import raised_at
from pyro_lvm.inference.buffers import remember_all
from pyro_lvm.missing import ObservedPart
from pyro_lvm.parameters import isolated
from pyro_lvm.structure import Site, Structure, trace_structure

__all__ = ["why_not_finite"]

SMALLEST = 1e-6
"""A scale below it, in whatever units, is on its way to nought."""

SCALES = ("scale", "scale_tril", "covariance_matrix", "cov_diag", "concentration", "rate")
"""Arguments of distributions that have to stay away from nought."""

MATRICES = ("scale_tril", "covariance_matrix")
"""Those of which the diagonal counts."""

SHOWN = 5
"""Entries and columns that are named; of more there is the number."""

_SMALLER = "try a smaller rate (lr=...) or grad_clip_norm=..."


def why_not_finite(
    step: Step, batch: Batch, generators: tuple[Tensor, list[Tensor]], error: Exception | None
) -> str | None:
    """What is not finite in a step, where it comes from, and an edit; None where ``error`` has nothing to do with it.

    Args:
        step: the step as Pyro takes it; its parameters are those before the update.
        batch: what it was taken on.
        generators: torch's random states before it, of the CPU and of each GPU.
        error: what torch raised in it, if it did.
    """
    parameters = {name: p for name, p in step.bound.trainable().items() if not _finite(p)}
    rows = [_of_rows(name, value, batch) for name, value in batch.tensors().items() if not _may_be_used(step, value)]
    loss, gradients, structure = _replayed(step, batch, generators)
    sites = [text for site in _sites(structure) if (text := _of_site(site))]
    if error is not None and not (parameters or rows or sites):
        return None
    what = [f"loss became NaN or infinite ({loss})"] if loss is not None else []
    what += [f"parameter {name} is not finite ({_statistics(p)})" for name, p in parameters.items()]
    if not what:
        what.append(f"the gradient of parameter {', '.join(gradients) or 'of the estimator'} became NaN or infinite")
    if error is not None:
        where = raised_at(error)
        what.append(f"torch says: {str(error).splitlines()[0]}" + (f", at {where}" if where else ""))
    told = [", ".join(what), *rows, *sites]
    if not rows:
        told.append("The rows of the batch are finite")
    told.append(f"Parameters are those of the last finite step: {_edit(bool(parameters), rows, structure, batch)}")
    return ". ".join(told)


def _replayed(
    step: Step, batch: Batch, generators: tuple[Tensor, list[Tensor]]
) -> tuple[float | None, list[str], Structure | None]:
    """The loss per datum if it is not finite, parameters whose gradient is not, and what one trace shows."""
    loss, gradients, structure = None, [], None
    kept = [(p, p.grad) for p in step.parameters]
    buffers = remember_all(step.bound.modules)
    names = {id(p): name for name, p in step.bound.trainable().items()}
    with isolated(None, validate=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _set(generators)
            value = float(step(batch).values[0]) / step.size
            loss = None if abs(value) < float("inf") else value
            gradients = [names[id(p)] for p in step.parameters if id(p) in names and not _finite(p.grad)]
        except (RuntimeError, ValueError):
            pass  # the trace shows how far it came
        try:
            _set(generators)
            structure = trace_structure(step.bound.model, step.bound.guide, batch)
        except (RuntimeError, ValueError):
            pass
    for parameter, gradient in kept:
        parameter.grad = gradient
    for buffer in buffers:
        buffer.put_back()
    return loss, gradients, structure


def _set(generators: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(generators[0])
    if generators[1]:
        torch.cuda.set_rng_state_all(generators[1])


def _sites(structure: Structure | None) -> Iterator[Site]:
    if structure is not None:
        yield from structure.guide.values()
        yield from (site for name, site in structure.model.items() if name not in structure.guide or site.observed)


def _of_site(site: Site) -> str | None:
    """What is wrong with a site, in which entries, and its distribution's arguments in numbers; None if nothing is."""
    arguments = _arguments(site)
    wrong = [
        f"its {name}{_where(~value.isfinite(), site, name)}" for name, value in arguments.items() if not _finite(value)
    ]
    value = _seen(site)
    if not _finite(value):
        wrong.append(f"its value{_where(~value.isfinite(), site)}")
    small: list[str] = []
    if not wrong:
        wrong = _of_log_prob(site, arguments)
        small = [
            f"its {name} is {float(diagonal.min()):.3g}{_where(diagonal < SMALLEST, site)}"
            for name, diagonal in _scales(arguments)
            if float(diagonal.min()) < SMALLEST
        ]
    if not wrong:
        return None
    shown = ", ".join(f"{name} {_statistics(value)}" for name, value in arguments.items())
    what = f"{site}: {', '.join(wrong)} not finite; {site.kind} with {shown or 'no arguments'}"
    return "; ".join([what, *small])


def _seen(site: Site) -> Tensor:
    """The site's value, with noughts in the place of what is missing and may be."""
    value = site.value.detach()
    return torch.where(value.isnan(), 0.0, value) if isinstance(site.fn, ObservedPart) else value


def _where(bad: Tensor, site: Site, name: str = "") -> str:
    """Which entries of an event are ``bad`` in any row, in words; nothing for a single number."""
    if name in MATRICES:
        bad = bad.any(-1)
    dims = len(site.fn.event_shape)
    if not dims or bad.dim() < dims:
        return ""
    entries = bad.reshape(-1, *bad.shape[bad.dim() - dims :]).any(0)
    return f" ({_numbers(entries, 'entry', 'entries')})"


def _numbers(bad: Tensor, one: str, several: str) -> str:
    """Such as "entry 3 of 5", "entries [1, 3] of 5", or "all 5 entries"; counted from 0."""
    places = [place[0] if len(place) == 1 else tuple(place) for place in bad.nonzero().tolist()]
    if len(places) == 1:
        return f"{one} {places[0]} of {bad.numel()}"
    if len(places) == bad.numel():
        return f"all {bad.numel()} {several}"
    listed = ", ".join(map(str, places[:SHOWN])) + (", ..." if len(places) > SHOWN else "")
    return f"{several} [{listed}] of {bad.numel()}" + (f", {len(places)} in all" if len(places) > SHOWN else "")


def _scales(arguments: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Those arguments that have to stay away from nought; of a matrix its diagonal."""
    return [
        (name, value.diagonal(dim1=-2, dim2=-1) if name in MATRICES else value)
        for name, value in arguments.items()
        if name in SCALES and value.numel()
    ]


def _arguments(site: Site) -> Mapping[str, Tensor]:
    base = site.base
    named = {name: vars(base).get(name) for name in getattr(base, "arg_constraints", {})}
    return {name: value.detach() for name, value in named.items() if isinstance(value, Tensor)}


def _of_log_prob(site: Site, arguments: Mapping[str, Tensor]) -> list[str]:
    """What is not finite: the log-probability, or one of its slopes in the arguments."""
    with torch.no_grad():
        log_prob = torch.as_tensor(site.fn.log_prob(site.value))
        if not _finite(log_prob):
            of_entries = torch.as_tensor(site.base.log_prob(_seen(site)))
            whole = of_entries.dim() < site.value.dim()  # a vector has one log-probability, and no entries
            return ["its log-probability" + ("" if whole else _where(~of_entries.isfinite(), site))]
    try:
        leaves = {n: v.clone().requires_grad_() for n, v in arguments.items() if v.is_floating_point()}
        with torch.enable_grad():
            total = type(site.base)(**leaves, validate_args=False).log_prob(_seen(site)).sum()
            slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    except (TypeError, ValueError, RuntimeError):  # not every distribution can be made again from its arguments
        return []
    return [
        f"the gradient of its log-probability in {name}{_where(~slope.isfinite(), site, name)}"
        for name, slope in zip(leaves, slopes, strict=True)
        if slope is not None and not _finite(slope)
    ]


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())


def _may_be_used(step: Step, value: Any) -> bool:
    """Whether a column of the batch is finite, or missing where that is allowed."""
    allowed = step.bound.program.missing is not None and isinstance(value, Tensor) and value.is_floating_point()
    return _finite(value.nan_to_num(nan=0.0) if allowed else value)


def _statistics(value: Tensor) -> str:
    finite = value.detach()[torch.isfinite(value)]
    bad = value.numel() - finite.numel()
    if not finite.numel():
        return f"all {value.numel()} not finite"
    return f"from {float(finite.min()):.4g} to {float(finite.max()):.4g}" + (
        f", {bad} of {value.numel()} not finite" if bad else ""
    )


def _of_rows(name: str, value: Tensor, batch: Batch) -> str:
    bad = ~torch.isfinite(value.reshape(len(value), -1)).all(-1)
    place = int(bad.nonzero()[0])
    row = place if batch.index is None else int(batch.index[place])
    of = "of the batch" if batch.index is None else "of the data"
    columns = ~torch.isfinite(value).all(0)
    where = f" ({_numbers(columns, 'column', 'columns')})" if columns.dim() else ""
    count = f"{int(bad.sum())} of {len(value)} rows{where}"
    return f"{name} holds NaN or infinite values in {count}, the first in row {row} {of}"


def _of_constants(batch: Batch) -> str:
    """Which columns of the data have one value in all rows of the batch."""
    found = []
    for name, value in batch.tensors().items():
        if isinstance(value, Tensor) and value.dim() > 1 and len(value) > 1:
            same = (value == value[:1]).all(0)
            if bool(same.any()):
                values = value[0][same]
                at = f", at {float(values[0]):.4g}" if bool((values == values[0]).all()) else ""
                found.append(f"constant in all {len(value)} rows of {name}{at}: {_numbers(same, 'column', 'columns')}")
    return f" ({'; '.join(found)})" if found else ""


def _edit(broken: bool, rows: list[str], structure: Structure | None, batch: Batch) -> str:
    if rows:
        return "drop or impute such rows, or pass missing='marginalize' where they are NaN"
    if broken:
        return "initialise again with fresh=True, or load finite values before the fit"
    for site in _sites(structure):
        for name, value in _scales(_arguments(site)):
            smallest = float(value.min())
            if smallest < SMALLEST:
                where = _where(value < SMALLEST, site)
                return (
                    f"{name} of {site} has come down to {smallest:.3g}{where}: put a floor under it, or drop a column "
                    f"that does not vary{_of_constants(batch)}"
                )
    return _SMALLER

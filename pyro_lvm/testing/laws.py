"""The laws about one evaluation: gradients, prior draws, rows in another order, rows in batches."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from pyro_lvm.elbo.terms import is_random
from pyro_lvm.parameters import isolated
from pyro_lvm.program import restore_mode, training_mode
from pyro_lvm.structure import Site
from pyro_lvm.testing.record import Law, broken, does_not_apply, holds, running
from pyro_lvm.testing.setting import Setting, relative

__all__ = ["batch_rows", "batch_scale", "gradients", "prior_draws", "row_order"]


def gradients(at: Setting, batch_size: int | None) -> Law:
    """One step's gradient, at the start and in training mode as a fit takes it, is finite."""
    bound, prepared = at.bound, at.prepared
    batch = at.whole if batch_size is None else at.rows.first(batch_size)
    start, trainable = bound.snapshot(), bound.trainable()
    before = training_mode(bound.modules, True)
    for parameter in trainable.values():
        parameter.grad = None  # the caller's own would be added to
    try:
        with isolated(at.seed, validate=False):
            hook = prepared.auxiliary_loss
            extra = None if hook is None else hook(*batch.args, **batch.named())
            loss, _ = prepared.estimator.step(bound, batch, list(trainable.values()), extra, batch.size)
        found = {name: None if p.grad is None else p.grad.clone() for name, p in trainable.items()}
    finally:
        restore_mode(before)
        bound.load(start)
        for parameter in trainable.values():
            parameter.grad = None
    value = loss.item()
    if not math.isfinite(value):
        raise broken("gradients", f"the loss of {len(batch)} rows is {value} at the start", _FINITE)
    for name, gradient in found.items():
        wrong = 0 if gradient is None else int((~torch.isfinite(gradient)).sum())
        if gradient is not None and wrong:
            raise broken(
                "gradients",
                f"the loss is {value:.6g}, finite, but {wrong} of {gradient.numel()} entries of the gradient of "
                f"parameter {name!r} are not, the first of them "
                f"{gradient.flatten()[int((~torch.isfinite(gradient)).flatten().nonzero()[0])].item()}",
                _FINITE,
            )
    unused = [name for name, gradient in found.items() if gradient is None]
    zero = [name for name, gradient in found.items() if gradient is not None and not bool(gradient.any())]
    notes = [f"{len(found)} parameter{'s' * (len(found) != 1)} under {prepared.estimator!r}"]
    notes += [f"without a gradient: {', '.join(unused)}"] if unused else []
    notes += [f"gradient zero everywhere: {', '.join(zero)}"] if zero else []
    return holds("gradients", "; ".join(notes))


_FINITE = (
    "keep logarithms, roots and quotients away from nought where the parameters start, for example "
    "(value + 1e-12).sqrt(), or change the start"
)


def prior_draws(at: Setting) -> Law:
    """Draws from the model without data have the sites and shapes of the data, with as many rows as asked for."""
    takes_none = _takes_no_data(at)
    count, size_named = len(at.rows), at.bound.program.names("size")
    if takes_none:
        wanted = [m for m in (3, 7, 4) if m != count][:2]
        how = "x=None, size=m"
    else:
        wanted = [m for m in (3, 7) if m < count and size_named] or [count]
        how = "on rows of the data with the observations put aside"
    seen: dict[str, None] = {}
    for m in wanted:
        call = f"model(x=None, size={m})" if takes_none else f"the model on {m} rows, unconditioned,"
        with running("prior draws", call, _ROWS), at.measuring():
            nodes = _prior(at, m, takes_none)
        for site in at.structure.model.values():
            if not isinstance(site.fn, Unit):  # a pyro.factor draws nothing
                _check_prior_site(at, site, nodes, m, takes_none)
                seen[site.name] = None
    return holds("prior draws", f"{', '.join(seen)} with {' and '.join(map(str, wanted))} rows ({how})")


_ROWS = (
    'with `x=None` in its signature a model draws size rows from the prior: write pyro.plate("data", size or len(x), '
    "subsample=x), and take the number of rows from the plate or as `size if x is None else len(x)`"
)


def _takes_no_data(at: Setting) -> bool:
    """Whether the signature says that the model draws rows where it gets none."""
    program = at.bound.program
    if not program.names("size") or program.names("index"):
        return False
    args, kwargs = at.whole.data()
    try:
        signature = inspect.signature(program.model)
        given = signature.bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return False
    return all(name in signature.parameters and signature.parameters[name].default is None for name in given)


def _prior(at: Setting, m: int, takes_none: bool) -> dict[str, Any]:
    with torch.no_grad(), poutine.block():
        if takes_none:
            trace = poutine.trace(at.bound.model).get_trace(size=m)
        else:
            batch = at.rows.take(torch.arange(m))
            trace = poutine.trace(poutine.uncondition(at.bound.model)).get_trace(*batch.args, **batch.named())
    return {name: node for name, node in trace.nodes.items() if is_random(node)}


def _check_prior_site(at: Setting, site: Site, nodes: dict[str, Any], m: int, takes_none: bool) -> None:
    call = f"model(x=None, size={m})" if takes_none else f"the model on {m} rows"
    if site.name not in nodes:
        raise broken("prior draws", f"{call} draws no {site}, which the model has where it is given data", _ROWS)
    node = nodes[site.name]
    inside = site.inside(at.structure.data_plate)
    if takes_none and node["is_observed"] and inside:
        raise broken("prior draws", f"{call} observes {site} although it is given no data", "write obs=x there")
    came, expected = tuple(node["value"].shape), _expected_shape(site, at.structure.data_plate, m)
    if came != expected:
        raise broken(
            "prior draws",
            f"{call} draws {site} with shape {came}, where {m} rows of what it has on data have shape {expected}",
            _ROWS,
        )


def _expected_shape(site: Site, data_plate: str | None, m: int) -> tuple[int, ...]:
    sizes = {plate.dim: m if plate.name == data_plate else plate.rows for plate in site.plates}
    return (*(sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)), *site.fn.event_shape)


def row_order(at: Setting) -> Law:
    """The same rows in another order, with their own draws and numbers, have the same loss."""
    count = len(at.rows)
    reason = _no_rows(at) or at.noise or at.keeps_rows_by_place()
    if reason is not None:
        return does_not_apply("rows", reason)
    order = _rows_in_order(at)
    shown = f"{len(order)} of {count} rows" if len(order) < count else f"{count} rows"
    turned = order[_permutation(len(order), at.seed + 1)]
    losses = []
    with running("rows", f"the loss of {shown} in another order", _OWN_ROW), at.measuring():
        for index in (order, turned):
            loss, size = at.loss(at.rows.take(index), at.held(index))
            losses.append(loss)
    deviation = relative(losses[0], losses[1], size)
    if deviation <= at.tolerance:
        return holds("rows", f"{shown} in another order", deviation, at.tolerance)
    by_place = [] if at.bound.program.names("size") else _as_long_as_the_data(at)
    if by_place:
        return does_not_apply(
            "rows", f"parameter {by_place[0]!r} has an entry for each of {count} rows, which are taken all at a time"
        )
    raise broken(
        "rows",
        f"{shown} have loss {losses[0]:.10g} nats, and {losses[1]:.10g} nats in another order with the same draws "
        f"(relative difference {deviation:.1e}, tolerance {at.tolerance:.1e}): what a row gets depends on its place",
        _OWN_ROW,
    )


def _rows_in_order(at: Setting) -> Tensor:
    """All rows; of a program that takes a part, all but one: Pyro gives a plate that is full no row's number."""
    count = len(at.rows)
    part = at.bound.program.names("size") and count > 2
    return _permutation(count, at.seed)[: count - 1 if part else count].sort().values


_OWN_ROW = (
    "compute what belongs to a row from that row of x alone, and take per-row parameters by their numbers, "
    "parameter[index] with `index=None` in the signature"
)


def _as_long_as_the_data(at: Setting) -> list[str]:
    return [name for name, parameter in at.bound.trainable().items() if len(at.rows) in parameter.shape]


def _no_rows(at: Setting) -> str | None:
    if at.structure.data_plate is None:
        return "the program has no plate over its rows"
    return "the data have one row" if len(at.rows) < 2 else None


def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def batch_rows(at: Setting, batch_size: int | None) -> tuple[int, str | None]:
    """Rows in a batch for the batch law, such that the last batch is short if it can be; and why there is no law."""
    count = len(at.rows)
    size = batch_size if batch_size is not None and batch_size < count else max(1, (2 * count + 4) // 5)
    if not at.bound.program.names("size"):
        return size, "the model does not name `size`: it takes all rows at a time"
    return size, _no_rows(at) or at.noise or at.keeps_rows_by_place()


def batch_scale(at: Setting, batch_size: int | None) -> Law:
    """The losses of batches, weighted by their rows, have the full loss for their mean."""
    rows_at_once, reason = batch_rows(at, batch_size)
    if reason is not None:
        return does_not_apply("batch scale", reason)
    count = len(at.rows)
    mean, size, lengths = 0.0, 0.0, []
    with at.measuring():
        loss, _ = at.loss(at.whole, at.held())
        for index in _batches(count, rows_at_once, at.seed):
            batch = at.rows.take(index)
            with running("batch scale", f"the loss of a batch of {len(index)} of {count} rows", _SCALED):
                part, its_size = at.loss(batch, at.held(index))
            mean += part * len(index) / count
            size += its_size * len(index) / count
            lengths.append(len(index))
    shown = ", ".join(map(str, lengths[:2])) + (", ..., " if len(lengths) > 3 else ", ") * (len(lengths) > 2)
    shown += str(lengths[-1]) * (len(lengths) > 2)
    deviation = relative(loss, mean, size)
    if deviation > at.tolerance:
        raise broken(
            "batch scale",
            f"all {count} rows have loss {loss:.10g} nats, but the losses of batches of {shown} rows have the weighted "
            f"mean {mean:.10g} nats with the same draws (relative difference {deviation:.1e}, tolerance "
            f"{at.tolerance:.1e})",
            _SCALED,
        )
    return holds("batch scale", f"{count} rows in batches of {shown}", deviation, at.tolerance)


_SCALED = (
    'put everything that belongs to a row into pyro.plate("data", size or len(x), subsample=x), which scales it, take '
    "nothing from the other rows of the batch (x.mean(0), len(x)), and let what all rows share see none of them"
)


def _batches(count: int, rows_at_once: int, seed: int) -> Iterator[Tensor]:
    yield from _permutation(count, seed + 1).split(rows_at_once)

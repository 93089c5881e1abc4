"""The pre-flight: what would train to a wrong number, or fail with a shape, is refused before the first step."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import Independent

from pyro_lvm.data import Batch, Rows
from pyro_lvm.elbo.estimator import Estimator
from pyro_lvm.errors import ProgramError
from pyro_lvm.structure import Site, Structure, trace_structure

__all__ = ["check_pair", "check_support", "traced"]

_MENDS = {
    "Bernoulli": "make them 0 or 1 (`binarize=` of the data sets, or x > threshold), or use a likelihood of values "
    "in between, such as 'continuous_bernoulli' or 'normal'",
    "ContinuousBernoulli": "scale the data to [0, 1], or use likelihood 'normal'",
    "Poisson": "pass counts 0, 1, 2, ..., or use likelihood 'normal'",
    "Categorical": "number the categories from 0 and raise their number to cover all that occur",
}


def traced(model: Any, guide: Any | None, batch: Batch) -> Structure:
    """`trace_structure`, with Pyro's complaint about a plate's shape turned into an edit."""
    try:
        return trace_structure(model, guide, batch)
    except ValueError as error:
        text = str(error)
        if "Shape mismatch inside plate" in text or "at site" in text and "dim" in text:
            first = text.splitlines()[0]
            raise ProgramError(
                f"{first}. The distribution's rightmost batch dim does not fit the plate: when its last dims belong "
                "to one datum, declare them an event with .to_event(1)"
            ) from error
        raise


def check_pair(structure: Structure, estimator: Estimator, batch: Batch) -> None:
    """Raise `ProgramError` where model, guide and estimator do not belong together.

    Raises:
        ProgramError: naming the site, the numbers, and one edit.
    """
    for site in structure.latent:
        if site.name not in structure.guide:
            _check_uncovered(site, structure, estimator)
    for site in structure.guide.values():
        model_site = structure.model.get(site.name)
        if not site.auxiliary and (model_site is None or model_site.observed):
            raise ProgramError(
                f"guide site {site.name!r} {_near_miss(site.name, [s.name for s in structure.latent])}: the model "
                "has no such latent site. Rename it, or mark it infer={'is_auxiliary': True}"
            )
        if site.enumerated and not isinstance(estimator.elbo, TraceEnum_ELBO):
            raise ProgramError(_not_summed_out(site, estimator))
    for site in (*structure.model.values(), *structure.guide.values()):
        _check_batch_shape(site)
    for name, guide_site in structure.guide.items():
        if name in structure.model and not structure.model[name].observed:
            _check_same_shape(structure.model[name], guide_site)
    if isinstance(estimator.elbo, TraceMeanField_ELBO):
        _check_mean_field(structure, estimator)
    for plate in {p for site in structure.observed for p in site.plates if p.name == structure.data_plate}:
        if plate.size != batch.size:
            raise ProgramError(
                f"plate {plate.name!r} has size {plate.size}, but the data set has {batch.size} rows: its scale would "
                f'be wrong. Write pyro.plate("{plate.name}", size or len(x), subsample=x) with `size=None` in the '
                "signatures of model and guide"
            )


def _check_uncovered(site: Site, structure: Structure, estimator: Estimator) -> None:
    if site.discrete and site.enumerated is None:
        raise ProgramError(
            f"site {site.name!r} ({_kind(site)}) is discrete and nobody sums it out: add "
            f'infer={{"enumerate": "parallel"}} to its pyro.sample and fit with TraceEnum_ELBO()'
        )
    if site.enumerated:
        if not isinstance(estimator.elbo, TraceEnum_ELBO):
            raise ProgramError(_not_summed_out(site, estimator))
        return
    extra = [g.name for g in structure.guide.values() if g.name not in structure.model and not g.auxiliary]
    raise ProgramError(
        f"site {site.name!r} of the model has no site in the guide{_near_miss(site.name, extra)}: it would be drawn "
        f"from its prior and never learned. Add pyro.sample({site.name!r}, ...) to the guide"
    )


def _not_summed_out(site: Site, estimator: Estimator) -> str:
    return (
        f"site {site.name!r} ({_kind(site)}) is enumerated, but {estimator!r} cannot sum it out: "
        "use elbo=TraceEnum_ELBO()"
    )


def _near_miss(name: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _kind(site: Site) -> str:
    fn = site.fn
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return type(fn).__name__.removeprefix("Expanded").removesuffix("Distribution") or type(fn).__name__


def _check_batch_shape(site: Site) -> None:
    """Every batch dim longer than one must belong to a plate."""
    dims = {plate.dim: plate for plate in site.plates}
    shape = site.fn.batch_shape
    for dim in range(-len(shape), 0):
        if shape[dim] > 1 and dim not in dims:
            inside = ", ".join(f"{p.name!r} of {p.rows}" for p in site.plates) or "none"
            raise ProgramError(
                f"site {site.name!r} has batch shape {tuple(shape)}, whose dim {dim} of {shape[dim]} is in no plate "
                f"(plates around it: {inside}). If those {shape[dim]} belong to one datum, declare them an event with "
                ".to_event(1); if parameters and data were broadcast against each other, give both one shape"
            )


def _check_same_shape(model_site: Site, guide_site: Site) -> None:
    if model_site.fn.event_shape != guide_site.fn.event_shape:
        raise ProgramError(
            f"site {model_site.name!r} has event shape {tuple(model_site.fn.event_shape)} in the model and "
            f"{tuple(guide_site.fn.event_shape)} in the guide: give both one shape, with .to_event(1) in both"
        )


def _check_mean_field(structure: Structure, estimator: Estimator) -> None:
    for site in structure.guide.values():
        fn = site.fn
        while isinstance(fn, Independent):
            fn = fn.base_dist
        if isinstance(fn, Delta) and bool((torch.as_tensor(fn.log_density) != 0).any()):
            raise ProgramError(
                f"site {site.name!r} is a transformed Normal of an autoguide, for which {estimator!r} leaves out the "
                "transform's log-determinant: use elbo=Trace_ELBO()"
            )
        if not site.fn.has_rsample:
            raise ProgramError(
                f"guide site {site.name!r} ({_kind(site)}) cannot be reparameterised, which {estimator!r} requires: "
                "use elbo=TraceGraph_ELBO(), or TraceEnum_ELBO() if it can be enumerated"
            )
    model_order = [site.name for site in structure.latent]
    guide_order = [name for name in structure.guide if name in structure.model]
    if model_order != guide_order:
        raise ProgramError(
            f"{estimator!r} is right only when model and guide sample their sites in one order, but the model has "
            f"{model_order} and the guide {guide_order}: reorder the guide, or use elbo=Trace_ELBO()"
        )


def check_support(structure: Structure, batch: Batch, rows: Rows, batch_size: int) -> None:
    """Raise `ValueError` where a row of the data lies outside the support of the site that observes it.

    Only supports that do not change from row to row are checked, on all rows (on the first batch of a loader).
    """
    for site, name in _observed_arguments(structure, batch):
        support = site.fn.support
        if getattr(support, "is_dependent", False) and not hasattr(support, "check"):
            continue
        start = 0
        for part in [batch] if rows.loader is not None else rows.batches(max(batch_size, 1024)):
            value = part.tensors()[name]
            inside = _inside(support, value)
            if inside is not None and not bool(inside.all()):
                _refuse(site, name, value, inside, start)
            start += len(part)


def _observed_arguments(structure: Structure, batch: Batch) -> Iterator[tuple[Site, str]]:
    for site in structure.observed:
        for name, value in batch.tensors().items():
            if site.value is value:
                yield site, name


def _inside(support: Any, value: Tensor) -> Tensor | None:
    """Whether each entry lies in the support; None where the support is another for each row."""
    base = support
    while hasattr(base, "base_constraint"):
        base = base.base_constraint
    if any(isinstance(bound, Tensor) and bound.numel() > 1 for bound in vars(base).values()):
        return None
    try:
        return torch.as_tensor(base.check(value))
    except NotImplementedError:
        return None


def _refuse(site: Site, name: str, value: Tensor, inside: Tensor, start: int) -> None:
    outside = (~inside).nonzero()
    where = tuple(outside[0].tolist())
    example = value[where] if inside.shape == value.shape else value[where[0]]
    kind = _kind(site)
    mend = _MENDS.get(kind, "transform the data into the support, or choose another likelihood")
    raise ValueError(
        f"site {site.name!r} has a {kind} likelihood, but {name} holds {len(outside)} values outside its support "
        f"{site.fn.support} in rows {start} to {start + len(value) - 1}, such as {_shown(example)} in row "
        f"{start + where[0]}: {mend}"
    )


def _shown(value: Tensor) -> str:
    return f"{value.item():.4g}" if value.dim() == 0 else str(value.flatten()[:4].tolist())

"""The pre-flight: what would train to a wrong number, or fail with a shape, is refused before the first step."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Independent, constraints

from pyro_lvm.data import Batch, Rows
from pyro_lvm.elbo.estimator import Estimator
from pyro_lvm.errors import ProgramError
from pyro_lvm.structure import Plate, Site, Structure, trace_structure

__all__ = ["check_pair", "check_support", "traced"]

_SCALE_TO_UNIT = "scale the data to [0, 1], or use likelihood 'normal'"
_MENDS = {
    "Bernoulli": "make them 0 or 1 (`binarize=` of the data sets, or x > threshold), or use a likelihood of values "
    "in between, such as 'continuous_bernoulli' or 'normal'",
    "ContinuousBernoulli": _SCALE_TO_UNIT,
    "TiltedUniform": _SCALE_TO_UNIT,
    "Poisson": "pass counts 0, 1, 2, ..., or use likelihood 'normal'",
    "Categorical": "number the categories from 0 and raise their number to cover all that occur",
}

PLATE_OF_ROWS = (
    'pyro.plate("{name}", size or len(x), subsample=x), with `size=None` in the signatures of model and guide'
)


def traced(model: Any, guide: Any | None, batch: Batch) -> Structure:
    """`trace_structure`, with what Pyro says about plates turned into an edit.

    Raises:
        ProgramError: if a distribution does not fit its plate, or the plate over the rows does not hold this batch's.
    """
    seen = _PlatesSeen(len(batch))
    try:
        structure = trace_structure(seen(model), None if guide is None else seen(guide), batch)
    except (RuntimeError, ValueError) as error:
        if seen.misfit is not None:  # whatever shapes clashed, they clashed for this
            raise ProgramError(_wrong_rows(*seen.misfit, batch)) from error
        explained = _explained(error, batch)
        if explained is None:
            raise
        raise explained from error
    plate = structure.data_plate
    if plate is not None and plate in seen.random:
        raise ProgramError(
            f"plate {plate!r} draws rows of its own ({seen.random[plate]}) instead of those of the batch, and each "
            f'datum would train the parameters of another: write pyro.plate("{plate}", size, subsample=index) with '
            "`size=None, index=None` in the signature (for an autoguide: in the model's, and pass guide='mean_field')"
        )
    for site in (*structure.model.values(), *structure.guide.values()):
        for found in site.plates:
            if found.name == plate and found.rows != len(batch):
                raise ProgramError(_wrong_rows(found, site.name, batch))
    return structure


class _PlatesSeen(Messenger):
    """Notes every plate that draws a part of its rows at random, and a site in a data plate of other rows.

    Attributes:
        random: by plate, how many rows it draws of how many.
        misfit: the first data plate that does not hold the batch's rows, and the site in it.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.random: dict[str, str] = {}
        self.misfit: tuple[Plate, str] | None = None

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, _Subsample) and msg["value"] is None and fn.subsample_size not in (None, fn.size):
            self.random[msg["name"]] = f"{fn.subsample_size} of {fn.size}"
        for frame in msg["cond_indep_stack"]:
            if frame.name == "data" and frame.vectorized and frame.size != self.rows and self.misfit is None:
                self.misfit = (
                    Plate(frame.name, frame.dim, int(frame.size), int(frame.full_size or frame.size)),
                    msg["name"],
                )


_MISMATCH = re.compile(
    r"Shape mismatch inside plate\('(?P<plate>.*)'\) at site (?P<site>.*) dim (-\d+), (\d+) vs (\d+)"
)


def _explained(error: Exception, batch: Batch) -> ProgramError | None:
    """Pyro's error with an edit; None where it is not about a plate."""
    first = str(error).splitlines()[0] if str(error) else ""
    if "invalid shape of pyro.param" in first:
        return ProgramError(f"{first}. The program has parameters for each row that it was fitted to: pass those rows")
    mismatch = _MISMATCH.match(first)
    if mismatch is None:
        return None
    dim, rows, found = (int(number) for number in mismatch.groups()[2:])
    name = mismatch["plate"]
    if name == "data" and dim == -1 and rows != len(batch):
        return ProgramError(_wrong_rows(Plate(name, dim, rows, rows), mismatch["site"], batch))
    return ProgramError(
        f"site {mismatch['site']!r} does not fit plate {name!r}: the plate has {rows} rows in dim {dim}, where the "
        f"distribution's batch shape has {found}. When its last dims belong to one datum, declare them an event with "
        ".to_event(1)"
    )


def _wrong_rows(plate: Plate, site: str, batch: Batch) -> str:
    why = ""
    if batch.index is None and len(batch) != batch.size:
        why = " (a DataLoader hides the row numbers, so `index` is None: pass the arrays themselves)"
    return (
        f"plate {plate.name!r} around site {site!r} has {plate.rows} rows, but the data have {len(batch)}{why}: write "
        f"{PLATE_OF_ROWS.format(name=plate.name)}. A guide with parameters for each row fits only the rows it was "
        "trained on"
    )


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
                f"guide site {site.name!r}{_near_miss(site.name, [s.name for s in structure.latent])}: the model "
                "has no such latent site. Rename it, or mark it infer={'is_auxiliary': True}"
            )
        if site.enumerated and not isinstance(estimator.elbo, TraceEnum_ELBO):
            raise ProgramError(_not_summed_out(site, estimator))
    sites = (*structure.model.values(), *structure.guide.values())
    for name, guide_site in structure.guide.items():
        if name in structure.model:
            _check_same_shape(structure.model[name], guide_site)
    for site in sites:
        _check_log_prob_shape(site, batch)
        _check_scale(site, structure.data_plate, batch)
    for name, guide_site in structure.guide.items():
        if name in structure.model:
            _check_same_plates(structure.model[name], guide_site)
    if isinstance(estimator.elbo, TraceMeanField_ELBO):
        _check_mean_field(structure, estimator)


def _check_uncovered(site: Site, structure: Structure, estimator: Estimator) -> None:
    extra = [g.name for g in structure.guide.values() if g.name not in structure.model and not g.auxiliary]
    near = _near_miss(site.name, extra)
    if site.discrete and site.enumerated != "parallel" and not near:
        raise ProgramError(
            f"site {site.name!r} ({_kind(site)}) is discrete and nobody sums it out: add "
            f'infer={{"enumerate": "parallel"}} to its pyro.sample and fit with TraceEnum_ELBO()'
        )
    if site.enumerated == "parallel":
        if not isinstance(estimator.elbo, TraceEnum_ELBO):
            raise ProgramError(_not_summed_out(site, estimator))
        if not site.enumerable:
            raise ProgramError(
                f"site {site.name!r} ({_kind(site)}) is marked for enumeration, but its values cannot be listed: take "
                "the mark away and sample it in the guide, or truncate it to a Categorical"
            )
        return
    raise ProgramError(
        f"site {site.name!r} of the model has no site in the guide{near}: it would be drawn from its prior and never "
        f"learned. Add pyro.sample({site.name!r}, ...) to the guide"
    )


def _not_summed_out(site: Site, estimator: Estimator) -> str:
    return (
        f"site {site.name!r} ({_kind(site)}) is enumerated, but {estimator!r} cannot sum it out: "
        "use elbo=TraceEnum_ELBO()"
    )


def _near_miss(name: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _base(fn: Any) -> Any:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


def _kind(site: Site) -> str:
    return type(_base(site.fn)).__name__


def _check_log_prob_shape(site: Site, batch: Batch) -> None:
    """Value and distribution must agree, and every batch dim longer than one must belong to a plate."""
    batch_shape, event_shape = tuple(site.fn.batch_shape), tuple(site.fn.event_shape)
    value_shape = tuple(getattr(site.value, "shape", ()))
    split = len(value_shape) - len(event_shape)
    own = value_shape[max(split, 0) :]
    if len(own) != len(event_shape) or any(a not in (1, b) for b, a in zip(own, event_shape, strict=True)):
        raise ProgramError(
            f"site {site.name!r} has a value of shape {value_shape}, but one draw of its distribution ({_kind(site)}) "
            f"has shape {event_shape}: give the parameters and the data one shape"
        )
    try:
        shape = tuple(torch.broadcast_shapes(batch_shape, value_shape[:split]))
    except RuntimeError:
        raise ProgramError(
            f"site {site.name!r} has a value of shape {value_shape}, but its distribution has batch shape "
            f"{batch_shape} and event shape {event_shape}: give the parameters and the data one shape"
        ) from None
    dims = {plate.dim for plate in site.plates}
    for dim in range(-len(shape), 0):
        if shape[dim] > 1 and dim not in dims:
            inside = ", ".join(f"{p.name!r} of {p.rows}" for p in site.plates) or "none"
            plate = (
                f"If they are the rows, write {PLATE_OF_ROWS.format(name='data')}. " if shape[dim] == len(batch) else ""
            )
            raise ProgramError(
                f"site {site.name!r} has batch shape {batch_shape} and a value of shape {value_shape}, so that its "
                f"log-probability has shape {shape}, whose dim {dim} of {shape[dim]} is in no plate (plates around "
                f"it: {inside}). {plate}If those {shape[dim]} belong to one datum, declare them an event with "
                ".to_event(1); if parameters and data were broadcast against each other, give both one shape"
            )


def _check_scale(site: Site, data_plate: str | None, batch: Batch) -> None:
    for plate in site.plates:
        if plate.name == data_plate and plate.size != batch.size:
            raise ProgramError(
                f"plate {plate.name!r} around site {site.name!r} has size {plate.size}, but the data set has "
                f"{batch.size} rows: its scale would be wrong. Write {PLATE_OF_ROWS.format(name=plate.name)}"
            )


def _check_same_shape(model_site: Site, guide_site: Site) -> None:
    if model_site.fn.event_shape != guide_site.fn.event_shape:
        raise ProgramError(
            f"site {model_site.name!r} has event shape {tuple(model_site.fn.event_shape)} in the model and "
            f"{tuple(guide_site.fn.event_shape)} in the guide: give both one shape, with .to_event(1) in both"
        )


def _check_same_plates(model_site: Site, guide_site: Site) -> None:
    model_plates, guide_plates = (
        {plate.dim: plate for plate in site.plates if plate.rows > 1} for site in (model_site, guide_site)
    )
    if {d: (p.rows, p.size) for d, p in model_plates.items()} != {d: (p.rows, p.size) for d, p in guide_plates.items()}:
        told = [
            ", ".join(f"{p.name!r} of {p.size}" for p in plates.values()) or "no plate"
            for plates in (model_plates, guide_plates)
        ]
        raise ProgramError(
            f"site {model_site.name!r} is in {told[0]} in the model and in {told[1]} in the guide: its terms would be "
            "counted a different number of times. Open the same plates around it in both"
        )


def _check_mean_field(structure: Structure, estimator: Estimator) -> None:
    for site in structure.guide.values():
        fn = _base(site.fn)
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

    Raises:
        ValueError: naming the site, how many values, one of them and its row, and an edit.
    """
    for site, name in _observed_arguments(structure, batch):
        support = _shared_by_rows(site.fn.support)
        if support is None:
            continue
        start = 0
        for part in [batch] if rows.loader is not None else rows.batches(max(batch_size, 1024)):
            value = part.tensors()[name]
            inside = torch.as_tensor(support.check(value))
            if not bool(inside.all()):
                _refuse(site, name, value, inside, start)
            start += len(part)


def _observed_arguments(structure: Structure, batch: Batch) -> Iterator[tuple[Site, str]]:
    for site in structure.observed:
        for name, value in batch.tensors().items():
            if site.value is value:
                yield site, name


def _shared_by_rows(support: Any) -> Any | None:
    """The support of one entry, with plates' copies of one bound made one; None if it depends on the row."""
    base = support
    while hasattr(base, "base_constraint"):
        base = base.base_constraint
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
    kind = _kind(site)
    mend = _MENDS.get(kind, "transform the data into the support, or choose another likelihood")
    raise ValueError(
        f"site {site.name!r} has a {kind} likelihood, but {name} holds {len(outside)} values outside its support "
        f"{site.fn.support} in rows {start} to {start + len(value) - 1}, such as {_shown(example)} in row "
        f"{start + where[0]}: {mend}"
    )


def _shown(value: Tensor) -> str:
    return f"{value.item():.4g}" if value.dim() == 0 else str(value.flatten()[:4].tolist())

"""Trace a pair once: its sites, their plates and shapes, and what is discrete, global or observed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Independent

from pyro_lvm.data import Batch
from pyro_lvm.declaration import declared_at
from pyro_lvm.missing import ObservedPart

__all__ = ["Plate", "Recorder", "Site", "Structure", "base_of", "support_of_entry", "trace_structure"]


def base_of(fn: Any) -> Any:
    """A distribution without `to_event`, whatever part of it is observed."""
    while isinstance(fn, Independent | ObservedPart):
        fn = fn.base_dist
    return fn


def support_of_entry(support: Any) -> Any:
    """The constraint on one entry of an event."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


@dataclass(frozen=True)
class Plate:
    """One plate: its name, dim (counted from the right, negative), rows in this batch and in the whole."""

    name: str
    dim: int
    rows: int
    size: int


@dataclass(frozen=True)
class Site:
    """One sample statement as the trace saw it.

    Attributes:
        name: the site's name.
        fn: its distribution.
        value: its value in this trace.
        observed: whether data stand at it.
        auxiliary: whether the guide marked it ``infer={"is_auxiliary": True}``.
        enumerated: "parallel", "sequential" or None, from its ``infer`` dictionary.
        plates: the plates around it, from the leftmost dim to the rightmost.
        event_dims: names for its event dimensions, from ``infer={"event_dims": (...)}``.
        scale: what its log-probability is multiplied with, plates included: a number or a tensor.
        declared: the line of its statement as "file.py:12"; None for an autoguide's.
        markov: whether it stands in `pyro.markov`, which uses its enumeration dims again.
    """

    name: str
    fn: Any
    value: Tensor
    observed: bool
    auxiliary: bool
    enumerated: str | None
    plates: tuple[Plate, ...]
    event_dims: tuple[str, ...]
    scale: Any
    declared: str | None
    markov: bool

    def __str__(self) -> str:
        return f"site {self.name!r}" + (f" ({self.declared})" if self.declared else "")

    @property
    def base(self) -> Any:
        """Its distribution without `to_event` and `expand`."""
        return base_of(self.fn)

    @property
    def kind(self) -> str:
        """The name of its distribution."""
        return type(self.base).__name__.removesuffix("Distribution")

    @property
    def discrete(self) -> bool:
        """Whether its values are a countable set, so that no gradient flows through them."""
        return bool(getattr(self.fn.support, "is_discrete", False))

    @property
    def enumerable(self) -> bool:
        """Whether its support can be listed."""
        return bool(getattr(self.fn, "has_enumerate_support", False))

    @property
    def support(self) -> str:
        """The values that one entry can take, in words."""
        leaf = support_of_entry(self.fn.support)
        varies = [bound for bound in vars(leaf).values() if isinstance(bound, Tensor) and bound.numel() > 1]
        if varies:
            return type(leaf).__name__.lstrip("_")
        return str(leaf).removesuffix("()").replace("lower_bound=", "").replace("upper_bound=", "")

    @property
    def num_values(self) -> int | None:
        """How many values one entry can take, where they can be listed."""
        return len(self.base.enumerate_support(expand=False)) if self.enumerable else None

    @property
    def plate_scale(self) -> float:
        """What its plates alone multiply its log-probability with."""
        scale = 1.0
        for plate in self.plates:
            scale *= plate.size / plate.rows
        return scale

    def inside(self, plate: str | None) -> bool:
        """Whether the site lies in the plate of that name."""
        return any(p.name == plate for p in self.plates)


@dataclass(frozen=True)
class Structure:
    """What one trace of model and guide tells.

    Attributes:
        model: sample sites of the model by name, in order.
        guide: sample sites of the guide by name, in order; empty where there is no guide yet.
        data_plate: name of the plate over the rows, or None.
        max_plate_nesting: the largest number of dims that plates take.
        model_rows: the rows that each plate of the model holds, as it was given them or drew them, by name.
        guide_rows: the same for the guide.
    """

    model: Mapping[str, Site]
    guide: Mapping[str, Site]
    data_plate: str | None
    max_plate_nesting: int
    model_rows: Mapping[str, Any] = field(default_factory=dict)
    guide_rows: Mapping[str, Any] = field(default_factory=dict)

    @property
    def observed(self) -> list[Site]:
        """Sites of the model at which data stand."""
        return [site for site in self.model.values() if site.observed]

    @property
    def latent(self) -> list[Site]:
        """Sites of the model without data."""
        return [site for site in self.model.values() if not site.observed]

    @property
    def enumerated_in_model(self) -> list[Site]:
        """Latent sites that enumeration sums out in the model: marked parallel and without a guide site."""
        return [site for site in self.latent if site.enumerated == "parallel" and site.name not in self.guide]

    @property
    def enumerated_in_guide(self) -> list[Site]:
        """Guide sites whose values enumeration lists, weighted by the guide."""
        return [site for site in self.guide.values() if site.enumerated]

    @property
    def global_latent(self) -> list[Site]:
        """Latent sites outside the data plate: what all data share."""
        return [site for site in self.latent if not site.inside(self.data_plate)]

    @property
    def local_latent(self) -> list[Site]:
        """Latent sites inside the data plate: one value for each datum."""
        return [site for site in self.latent if site.inside(self.data_plate)]


def trace_structure(
    model: Any, guide: Any | None, batch: Batch, seen: tuple[Recorder, Recorder] | None = None
) -> Structure:
    """Run guide and model once on ``batch`` and read off their structure.

    The caller sees to the random state; parameters are created if they do not exist yet. Latent sites are replayed
    from the guide where it has them. ``seen`` are recorders for model and guide, for a caller who wants to know how
    far an execution came that failed.
    """
    arguments = batch.named()
    of_model, of_guide = seen or (Recorder(), Recorder())
    with torch.no_grad(), poutine.block():
        guide_trace = None
        if guide is not None:
            guide_trace = poutine.trace(of_guide(guide)).get_trace(*batch.args, **arguments)
        replayed = of_model(model) if guide_trace is None else poutine.replay(of_model(model), trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*batch.args, **arguments)
    traces = [trace for trace in (model_trace, guide_trace) if trace is not None]
    nodes: list[Any] = [node for trace in traces for node in trace.nodes.values()]
    dims = [frame.dim for node in nodes for frame in node.get("cond_indep_stack", ()) if frame.vectorized]
    sites = _sites(model_trace, of_model)
    return Structure(
        sites,
        {} if guide_trace is None else _sites(guide_trace, of_guide),
        _data_plate(sites, batch),
        -min(dims, default=0),
        _rows(model_trace, of_model),
        {} if guide_trace is None else _rows(guide_trace, of_guide),
    )


class Recorder(Messenger):
    """Notes of every sample statement, before it is carried out, what the trace loses.

    Attributes:
        infer: by site, what the program itself says; replaying puts the guide's words in its place.
        lines: by site, the lines that declare it, "file.py:12"; several where the name is used again.
        plates: by site, the plates around it.
        params: names of the parameters asked for so far.
        last: the site met last.
        rows: by plate, the rows that it was given; replaying puts the guide's in their place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.infer: dict[str, Any] = {}
        self.lines: dict[str, list[str | None]] = {}
        self.plates: dict[str, tuple[Plate, ...]] = {}
        self.params: list[str] = []
        self.last: str | None = None
        self.rows: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        self.lines.setdefault(name, []).append(declared_at())
        self.infer[name] = dict(msg["infer"] or {})
        if isinstance(msg["fn"], _Subsample):
            self.rows[name] = msg["value"]
        else:
            self.plates[name] = _plates(msg["cond_indep_stack"])
            self.last = name

    def _pyro_param(self, msg: Any) -> None:
        self.params.append(msg["name"])


def _sites(trace: Any, recorder: Recorder) -> dict[str, Site]:
    return {
        name: _site(node, recorder)
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not isinstance(node["fn"], _Subsample)
        and not node["infer"].get("_deterministic", False)
    }


def _site(node: Any, recorder: Recorder) -> Site:
    infer = recorder.infer[node["name"]]
    return Site(
        node["name"],
        node["fn"],
        node["value"],
        bool(node["is_observed"]),
        bool(infer.get("is_auxiliary", False)),
        infer.get("enumerate"),
        _plates(node["cond_indep_stack"]),
        tuple(infer.get("event_dims", ())),
        node["scale"],
        recorder.lines[node["name"]][-1],
        "_markov_scope" in infer or "_markov_depth" in infer,
    )


def _plates(frames: Any) -> tuple[Plate, ...]:
    vectorized = sorted((frame for frame in frames if frame.vectorized), key=lambda frame: frame.dim)
    return tuple(Plate(f.name, f.dim, int(f.size), int(f.full_size or f.size)) for f in vectorized)


def _rows(trace: Any, recorder: Recorder) -> dict[str, Any]:
    drawn = {name: node["value"] for name, node in trace.nodes.items() if isinstance(node.get("fn"), _Subsample)}
    return drawn | {name: rows for name, rows in recorder.rows.items() if rows is not None}


def _data_plate(sites: Mapping[str, Site], batch: Batch) -> str | None:
    """The plate over the rows: called "data", else the leftmost one around data that is as long as the batch."""
    plates = [plate for site in sites.values() for plate in site.plates]
    if any(plate.name == "data" for plate in plates):
        return "data"
    around_data = [plate for site in sites.values() if site.observed for plate in site.plates]
    return next((p.name for p in around_data if p.rows == len(batch) and p.size == batch.size), None)

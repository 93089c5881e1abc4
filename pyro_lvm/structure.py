"""Trace a pair once: its sites, their plates and shapes, and what is discrete, global or observed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_lvm.data import Batch

__all__ = ["Plate", "Site", "Structure", "trace_structure"]


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
    """

    name: str
    fn: Any
    value: Tensor
    observed: bool
    auxiliary: bool
    enumerated: str | None
    plates: tuple[Plate, ...]
    event_dims: tuple[str, ...]

    @property
    def discrete(self) -> bool:
        """Whether its values are a countable set, so that no gradient flows through them."""
        return bool(getattr(self.fn.support, "is_discrete", False))

    @property
    def enumerable(self) -> bool:
        """Whether its support can be listed."""
        return bool(getattr(self.fn, "has_enumerate_support", False))

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
    """

    model: Mapping[str, Site]
    guide: Mapping[str, Site]
    data_plate: str | None
    max_plate_nesting: int

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


def trace_structure(model: Any, guide: Any | None, batch: Batch) -> Structure:
    """Run guide and model once on ``batch`` and read off their structure.

    The caller sees to the random state; parameters are created if they do not exist yet. Latent sites are replayed
    from the guide where it has them.
    """
    arguments = batch.named()
    with torch.no_grad(), poutine.block():
        guide_trace = None
        if guide is not None:
            guide_trace = poutine.trace(guide).get_trace(*batch.args, **arguments)
        own = _OwnInfer()
        replayed = own(model) if guide_trace is None else poutine.replay(own(model), trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*batch.args, **arguments)
    traces = [trace for trace in (model_trace, guide_trace) if trace is not None]
    nodes: list[Any] = [node for trace in traces for node in trace.nodes.values()]
    dims = [frame.dim for node in nodes for frame in node.get("cond_indep_stack", ()) if frame.vectorized]
    for name, infer in own.by_site.items():
        model_trace.nodes[name]["infer"] = infer
    sites = _sites(model_trace)
    return Structure(
        sites, _sites(guide_trace) if guide_trace is not None else {}, _data_plate(sites, batch), -min(dims, default=0)
    )


class _OwnInfer(Messenger):
    """Keeps what the model says about its sites, in place of which replaying puts what the guide says."""

    def __init__(self) -> None:
        super().__init__()
        self.by_site: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        self.by_site[msg["name"]] = dict(msg["infer"] or {})


def _sites(trace: Any) -> dict[str, Site]:
    return {
        name: _site(node)
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not isinstance(node["fn"], _Subsample)
        and not node["infer"].get("_deterministic", False)
    }


def _site(node: Any) -> Site:
    infer = node["infer"]
    frames = sorted((frame for frame in node["cond_indep_stack"] if frame.vectorized), key=lambda frame: frame.dim)
    plates = tuple(Plate(f.name, f.dim, int(f.size), int(f.full_size or f.size)) for f in frames)
    return Site(
        node["name"],
        node["fn"],
        node["value"],
        bool(node["is_observed"]),
        bool(infer.get("is_auxiliary", False)),
        infer.get("enumerate"),
        plates,
        tuple(infer.get("event_dims", ())),
    )


def _data_plate(sites: Mapping[str, Site], batch: Batch) -> str | None:
    """The plate over the rows: called "data", else the leftmost one around data that is as long as the batch."""
    plates = [plate for site in sites.values() for plate in site.plates]
    if any(plate.name == "data" for plate in plates):
        return "data"
    around_data = [plate for site in sites.values() if site.observed for plate in site.plates]
    return next((p.name for p in around_data if p.rows == len(batch) and p.size == batch.size), None)

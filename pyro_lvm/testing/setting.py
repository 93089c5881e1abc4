"""A program made ready for the laws: parameters at a general point, one draw of the guide held fixed, and the loss."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoNormal
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_lvm.data import Batch, Rows
from pyro_lvm.elbo.estimator import Estimator, make_estimator, plain_estimator
from pyro_lvm.elbo.terms import is_random
from pyro_lvm.inference.prepare import Prepared
from pyro_lvm.parameters import BoundProgram, Snapshot, isolated
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.structure import Structure, base_of

__all__ = ["Held", "Setting", "generators_stay", "make_setting", "relative"]

SHAKE = 0.1
"""How far parameters are moved from their start, where zeros and symmetries hide what depends on what."""


class Held(Messenger):
    """Gives sites the values they are to have, whatever their distribution."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"] and not msg["done"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


@dataclass(frozen=True)
class _HeldPair:
    """A program whose guide draws the values it is told; the model is replayed from it."""

    bound: BoundProgram
    values: Mapping[str, Tensor]

    @property
    def model(self) -> Any:
        return self.bound.model

    @property
    def guide(self) -> Any:
        return Held(self.values)(self.bound.guide)


@dataclass(frozen=True)
class Setting:
    """What the laws about the loss share.

    Attributes:
        prepared: the program as a fit would have it before its first step.
        rows: the data, cast and placed.
        whole: all of them.
        structure: the program's trace on them.
        plain: the estimator of the plain bound, nothing of it in closed form but what is summed out.
        point: parameter values to measure at.
        draw: one draw of the guide on all rows: sites that enumeration does not list and that are not computed.
        seed: of everything random.
        noise: what differs between two seeds although all sites are held; None where nothing does.
    """

    prepared: Prepared
    rows: Rows
    whole: Batch
    structure: Structure
    plain: Estimator
    point: Snapshot
    draw: Mapping[str, Tensor]
    seed: int
    noise: str | None = field(default=None)

    @property
    def bound(self) -> BoundProgram:
        """The program and its parameters."""
        return self.prepared.bound

    @property
    def tolerance(self) -> float:
        """The largest relative difference that is rounding: 1e-8 for float64, 1.2e-5 for float32."""
        return max(1e-8, 100 * torch.finfo(self.rows.dtype or torch.get_default_dtype()).eps)

    @contextmanager
    def measuring(self, seed: int | None = None) -> Iterator[None]:
        """Evaluate at the point, in eval mode, under a random state that starts at the seed."""
        with isolated(self.seed if seed is None else seed, validate=False), self.bound.holding(self.point):
            yield

    def held(self, index: Tensor | None = None) -> dict[str, Tensor]:
        """The draw for the rows ``index``, or for all of them."""
        if index is None:
            return dict(self.draw)
        return {name: self._of_rows(name, value, index) for name, value in self.draw.items()}

    def _of_rows(self, name: str, value: Tensor, index: Tensor) -> Tensor:
        site = self.structure.guide[name]
        dims = [plate.dim for plate in site.plates if plate.name == self.structure.data_plate]
        if not dims:
            return value
        dim = value.dim() + dims[0] - len(site.fn.event_shape)
        return value.index_select(dim, index.to(value.device))

    def loss(self, batch: Batch, held: Mapping[str, Tensor]) -> tuple[float, float]:
        """The plain loss, nats of the whole data set, and how large its parts are together; call it `measuring`."""
        return _loss(self.bound, self.plain, batch, held)

    def keeps_rows_by_place(self) -> str | None:
        """Why the guide cannot follow rows that come in parts or in another order; None where it can."""
        guide = self.bound.program.guide
        drawn = [site.name for site in self.structure.local_latent if site.name in self.structure.guide]
        if not drawn or not isinstance(guide, AutoGuide):
            return None
        name = type(guide).__name__
        if not isinstance(guide, AutoNormal | AutoDelta):
            return f"guide {name} has one joint distribution for {drawn[0]!r} of all rows"
        if not self.bound.program.names("index"):
            return f"guide {name} has parameters for {drawn[0]!r} by row, and the model does not name `index`"
        if guide.create_plates is None:
            return f"guide {name} has parameters for {drawn[0]!r} by row, and no create_plates that takes `index`"
        return None


def make_setting(prepared: Prepared, rows: Rows, seed: int) -> Setting:
    """Find a point to measure at and draw from the guide."""
    bound, whole = prepared.bound, rows.whole()
    with isolated(seed, validate=True), bound.holding(None):
        structure = traced(bound.model, bound.guide, whole)
    plain = _sampled(structure)
    point = _point(bound, plain, whole, seed)
    with isolated(seed, validate=False), bound.holding(point):
        draw = _draw(bound, structure, whole)
    setting = Setting(prepared, rows, whole, structure, plain, point, draw, seed)
    return Setting(prepared, rows, whole, structure, plain, point, draw, seed, _noise(setting))


def _sampled(structure: Structure) -> Estimator:
    """The plain bound at the draw itself: a closed-form KL would not see whose draw it is."""
    plain = plain_estimator(structure)
    return plain if isinstance(plain.elbo, TraceEnum_ELBO) else make_estimator(Trace_ELBO(), structure)


def _point(bound: BoundProgram, plain: Estimator, batch: Batch, seed: int) -> Snapshot:
    """The start, with every parameter moved a little where the bound is finite there too."""
    start = bound.snapshot()
    generator = torch.Generator().manual_seed(seed)
    shaken = dict(start)
    for name in bound.trainable():
        value = start[name]
        step = SHAKE / math.sqrt(value.shape[-1]) if value.dim() > 1 and value.numel() else SHAKE
        shaken[name] = value + step * torch.randn(value.shape, generator=generator).to(value)
    try:
        with isolated(seed, validate=True), bound.holding(shaken):
            return shaken if math.isfinite(_loss(bound, plain, batch, {})[0]) else start
    except (ValueError, RuntimeError):
        return start  # a scale that is a bare parameter has no room to be moved


def _draw(bound: BoundProgram, structure: Structure, batch: Batch) -> dict[str, Tensor]:
    listed = {site.name for site in structure.enumerated_in_guide}
    with torch.no_grad(), poutine.block():
        trace: Any = poutine.trace(bound.guide).get_trace(*batch.args, **batch.named())
    return {
        name: node["value"]
        for name, node in trace.nodes.items()
        if is_random(node) and name not in listed and not node["is_observed"] and not _is_computed(node["fn"])
    }


def _is_computed(fn: Any) -> bool:
    """A Delta is no draw, and its density is nought a rounding error away."""
    return isinstance(base_of(fn), Delta)


def _loss(bound: BoundProgram, plain: Estimator, batch: Batch, held: Mapping[str, Tensor]) -> tuple[float, float]:
    pair: Any = _HeldPair(bound, held)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered", UserWarning)  # the caller reads the number
        loss, terms = plain.evaluate(pair, batch)
    parts = (*terms.reconstruction.values(), *terms.kl.values())
    return loss.item(), sum((abs(part.item()) for part in parts), abs(loss.item()))


def _noise(setting: Setting) -> str | None:
    losses = []
    for seed in (setting.seed, setting.seed + 1):
        with setting.measuring(seed):
            losses.append(setting.loss(setting.whole, setting.held())[0])
    if losses[0] == losses[1]:
        return None
    return f"the program draws noise that is no sample site: at the same values of all sites, {_pair(losses)} nats"


def _pair(losses: list[float]) -> str:
    return " and ".join(f"{loss:.10g}" for loss in losses)


def relative(one: float, other: float, size: float) -> float:
    """The difference of two sums whose parts are ``size`` large together."""
    return abs(one - other) / max(size, 1.0)


@contextmanager
def generators_stay() -> Iterator[None]:
    """Give Python's and NumPy's random generators back as they were, whatever the program does with them."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002

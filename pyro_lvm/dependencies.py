"""Which sites a site's distribution is computed from, by tracking values through one execution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample

from pyro_lvm.data import Batch
from pyro_lvm.structure import base_of

__all__ = ["Parents", "descendants", "parents"]

Parents = Mapping[str, frozenset[str]]
"""By site, the sites its distribution is computed from."""


def parents(function: Callable[..., Any], batch: Batch, values: Mapping[str, Any]) -> Parents:
    """Run ``function`` on ``batch`` with its latent sites at ``values`` and see what each site is computed from.

    Args:
        function: a model or a guide.
        batch: the data.
        values: values of sites by name; the others are drawn.

    Returns:
        By sample site, its parents. A value that passes through Python numbers (``.item()``) loses its origin.
    """
    tracked = _Tracked(values)
    with torch.no_grad(), pyro.validation_enabled(False), poutine.block(), tracked:
        function(*batch.args, **batch.named())
    return tracked.parents


def descendants(of: Parents, name: str) -> set[str]:
    """The sites that are computed from ``name``, directly or through others."""
    found: set[str] = set()
    fresh = {name}
    while fresh:
        fresh = {site for site, sources in of.items() if sources & fresh} - found
        found |= fresh
    return found


class _Tracked(Messenger):
    """Gives every sampled value its site's name for origin, and reads the origins that its distribution has."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values
        self.parents: dict[str, frozenset[str]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        # what `pyro.deterministic` names keeps the origins it has
        if isinstance(msg["fn"], _Subsample) or (msg["infer"] or {}).get("_deterministic"):
            return
        value = detach_provenance(msg["value"])
        self.parents[msg["name"]] = _origins(msg["fn"], value)
        msg["value"] = ProvenanceTensor(value, frozenset({msg["name"]}))


def _origins(fn: Any, value: Any) -> frozenset[str]:
    base = base_of(fn)
    if isinstance(base, Delta):
        return frozenset(get_provenance([base.v, base.log_density]))
    try:
        return frozenset(get_provenance(fn.log_prob(value)))
    except (KeyError, NotImplementedError):  # a flow without an inverse knows the density of its latest draw alone
        return frozenset(get_provenance(fn.sample()))

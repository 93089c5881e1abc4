"""The sites of a program in plain values, for whoever reads a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_lvm.structure import Site, Structure

__all__ = ["SiteTable", "site_table"]

SiteTable = Mapping[str, list[dict[str, Any]]]
"""Under "model" and "guide" an entry for each sample site, in order."""


def site_table(structure: Structure) -> SiteTable:
    """Name, kind, distribution, plates with their sizes (outermost dim first) and event shape of every site."""
    return {
        "model": [_entry(site, "observed" if site.observed else "latent") for site in structure.model.values()],
        "guide": [_entry(site, "auxiliary" if site.auxiliary else "latent") for site in structure.guide.values()],
    }


def _entry(site: Site, kind: str) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": kind,
        "distribution": site.kind,
        "plates": {plate.name: plate.size for plate in site.plates},
        "event_shape": list(site.fn.event_shape),
        "enumerated": site.enumerated,
    }

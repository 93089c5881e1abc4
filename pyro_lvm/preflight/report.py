"""What the pre-flight found, as a table and as a diagram of plates that a person can read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_lvm.data import Batch
from pyro_lvm.elbo.estimator import Estimator
from pyro_lvm.elbo.terms import closed_form_kl
from pyro_lvm.preflight.discrete import enumeration_cost
from pyro_lvm.structure import Plate, Site, Structure

__all__ = ["Report", "SiteReport", "make_report"]


@dataclass(frozen=True)
class SiteReport:
    """One sample site.

    Attributes:
        name: its name.
        declared: the line that declares it, "file.py:12"; "" for an autoguide's.
        role: "observed", "latent" or "auxiliary" (of the guide alone).
        distribution: the name of its distribution.
        plates: the plates around it, outermost first.
        batch_shape: of its distribution, shape of one trace.
        event_shape: of its distribution: one draw.
        support: the values it can take.
        enumeration: how a discrete site is summed out; "" for a continuous one.
        scale: what its log-probability is multiplied with.
        guide: what the guide does with it.
        kl: how its part of the KL is computed: "closed form", "sampled", "summed out"; "" for an observed one.
    """

    name: str
    declared: str
    role: str
    distribution: str
    plates: tuple[Plate, ...]
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    support: str
    enumeration: str
    scale: str
    guide: str
    kl: str


@dataclass(frozen=True)
class Report:
    """A program that passed: its sites, and what the estimator does with them.

    ``str(report)`` is the table; `describe` prints it with the plate diagram; `pyro_lvm.plots.graph` draws it.

    Attributes:
        sites: one entry for each sample site of the model, then those that only the guide has.
        parents: by site of the model, the sites it is computed from.
        estimator: the estimator, and why it.
        cost: what summing out discrete sites multiplies the work with, or None.
        warnings: what may be meant but seldom is.
        rows: rows of the batch that was traced, and of the data.
    """

    sites: tuple[SiteReport, ...]
    parents: Mapping[str, frozenset[str]]
    estimator: str
    cost: str | None
    warnings: tuple[str, ...]
    rows: tuple[int, int]

    def __str__(self) -> str:
        head = ("site", "declared", "plates", "batch", "event", "support", "enumeration", "scale", "guide", "KL")
        table = [head] + [
            (
                site.name,
                site.declared,
                ", ".join(f"{plate.name} {_of(plate, '/')}" for plate in site.plates),
                str(site.batch_shape),
                str(site.event_shape),
                site.support,
                site.enumeration,
                site.scale,
                site.guide,
                site.kl,
            )
            for site in self.sites
        ]
        used = [column for column in range(len(head)) if any(row[column] for row in table[1:])]
        widths = {column: max(len(row[column]) for row in table) for column in used}
        lines = ["  ".join(row[column].ljust(widths[column]) for column in used).rstrip() for row in table]
        lines += ["", f"estimator: {self.estimator}"]
        lines += [f"enumeration: {self.cost}"] if self.cost else []
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)

    def describe(self) -> None:
        """Print the table, and the model's plates as nested boxes."""
        sys.stdout.write(f"{self}\n\n{self.diagram()}\n")

    def diagram(self) -> str:
        """The model's plates as nested boxes, with each site's distribution and what it is computed from."""
        entries = [(site.plates, self._line(site)) for site in self.sites if site.role != "auxiliary"]
        return "\n".join(_boxes(entries, 0))

    def _line(self, site: SiteReport) -> str:
        parents = ", ".join(sorted(self.parents.get(site.name, ())))
        given = f" | {parents}" if parents else ""
        state = {"observed": "  (observed)"}.get(site.role, "  (summed out)" if site.kl == "summed out" else "")
        return f"{site.name}{given} ~ {site.distribution}{state}"


def _of(plate: Plate, between: str) -> str:
    return f"{plate.size}" if plate.rows == plate.size else f"{plate.rows}{between}{plate.size}"


def _boxes(entries: list[tuple[tuple[Plate, ...], str]], depth: int) -> Iterator[str]:
    """Lines of the sites at this depth; neighbours in one further plate share a box."""
    position = 0
    while position < len(entries):
        plates, line = entries[position]
        if len(plates) == depth:
            yield line
            position += 1
            continue
        plate = plates[depth]
        together = [entries[position]]
        while position + len(together) < len(entries):
            following = entries[position + len(together)]
            if len(following[0]) <= depth or following[0][depth] != plate:
                break
            together.append(following)
        position += len(together)
        inner = list(_boxes(together, depth + 1))
        size = f"{plate.name}: {_of(plate, ' of ')}"
        width = max(len(size) + 2, *(len(text) for text in inner))
        yield f"┌─ {size} " + "─" * (width - len(size) - 1) + "┐"
        yield from (f"│ {text.ljust(width)} │" for text in inner)
        yield "└" + "─" * (width + 2) + "┘"


def make_report(
    structure: Structure,
    estimator: Estimator,
    batch: Batch,
    parents: Mapping[str, frozenset[str]],
    warnings: tuple[str, ...],
) -> Report:
    """Put a report together from what one trace and the checks found."""
    alone = [site for name, site in structure.guide.items() if name not in structure.model]
    return Report(
        tuple(_row(site, structure, estimator) for site in (*structure.model.values(), *alone)),
        {name: sources & set(structure.model) for name, sources in parents.items()},
        f"{estimator!r} ({estimator.reason})",
        enumeration_cost(structure),
        warnings,
        (len(batch), batch.size),
    )


def _row(site: Site, structure: Structure, estimator: Estimator) -> SiteReport:
    guide_site = structure.guide.get(site.name)
    role = "auxiliary" if site.name not in structure.model else "observed" if site.observed else "latent"
    listed = site.enumerated or (guide_site.enumerated if guide_site is not None else None)
    return SiteReport(
        site.name,
        site.declared or "",
        role,
        site.kind,
        site.plates[::-1],
        tuple(site.fn.batch_shape),
        tuple(site.fn.event_shape),
        site.support,
        f"{site.num_values} values, {listed}" if listed and not site.observed else "",
        _scale(site),
        _in_guide(site, guide_site, role),
        _kl(site, guide_site, role, estimator),
    )


def _scale(site: Site) -> str:
    if isinstance(site.scale, Tensor) and site.scale.numel() > 1:
        return "by row"
    return f"{float(site.scale):.4g}"


def _in_guide(site: Site, guide_site: Site | None, role: str) -> str:
    if role == "observed":
        return "observed"
    if guide_site is None:
        return "summed out" if site.enumerated else "—"
    if guide_site.enumerated:
        return f"{guide_site.kind}, summed out"
    return f"{guide_site.kind}, {'reparameterised' if guide_site.fn.has_rsample else 'score function'}"


def _kl(site: Site, guide_site: Site | None, role: str, estimator: Estimator) -> str:
    if role != "latent":
        return ""
    if guide_site is None or guide_site.enumerated:
        return "summed out"
    if estimator.analytic and closed_form_kl(guide_site.fn, site.fn) is not None:
        return "closed form"
    return "sampled"

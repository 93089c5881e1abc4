r"""A guide with parameters for each datum, in place of one that computes them from the datum.

.. math:: q_\phi(z_i \mid x_i) = q(z_i;\, \lambda_i), \quad \lambda_i = f_\phi(x_i)
          \qquad\longrightarrow\qquad q(z_i;\, \lambda_i), \quad \lambda_i \text{ free}

The family stays, and every :math:`\lambda_i` starts at what the amortised guide says. Its best bound is at least the
amortised one; the difference is the amortization gap (Cremer, Li and Duvenaud, 2018, https://arxiv.org/abs/1801.03558).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_lvm.data import Batch, Rows
from pyro_lvm.dependencies import parents
from pyro_lvm.errors import ProgramError
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.program import batch_arguments
from pyro_lvm.structure import Plate, Site, Structure, base_of

__all__ = [
    "PerDatumGuide",
    "described",
    "freed",
    "from_description",
    "nothing_to_replace",
    "per_datum_guide",
    "replaced_sites",
]

ROWS_AT_A_TIME = 1024
"""Rows in one pass of the amortised guide; it keeps no gradients."""

FAMILIES: Mapping[Any, tuple[str, ...]] = {
    dist.Normal: ("loc", "scale"),
    dist.LogNormal: ("loc", "scale"),
    dist.MultivariateNormal: ("loc", "scale_tril"),
    dist.Bernoulli: ("logits",),
    dist.Categorical: ("logits",),
}
"""The distributions whose parameters can be freed, and those parameters; each by itself or in an event of many."""


@dataclass(frozen=True)
class SiteOfEach:
    """A site of the guide with parameters for each datum.

    Attributes:
        family: its distribution, a key of `FAMILIES`.
        start: its parameters where they start, shape (rows, ...), constrained.
        event_dims: dims of the family's batch shape that belong to the event.
        infer: what the statement says to inference.
    """

    family: Any
    start: dict[str, Tensor]
    event_dims: int
    infer: dict[str, Any]

    def of_rows(self, name: str, rows: Tensor) -> Any:
        """The distribution of some rows, from parameters called after the site."""
        kinds = self.family.arg_constraints
        values = {
            parameter: pyro.param(f"{name}.{parameter}", start, constraint=kinds[parameter])[rows]
            for parameter, start in self.start.items()
        }
        return self.family(**values).to_event(self.event_dims)


class PerDatumGuide:
    """A guide with parameters by ``index``: `pyro.param` statements "site.parameter" with an entry for each row.

    Args:
        sites: the sites, by name.
        plate: the plate over the rows.
        size: rows in the whole data set.
        first: number of the first row that there are parameters for.
        shared: the guide, where it has sites outside the plate: they stay as they are, and it is run for them.
        keywords: the row keywords that ``shared`` takes.
    """

    def __init__(
        self,
        sites: Mapping[str, SiteOfEach],
        plate: Plate,
        size: int,
        first: int = 0,
        shared: Callable[..., Any] | None = None,
        keywords: frozenset[str] = frozenset(),
    ) -> None:
        self.sites, self.plate, self.size, self.first = dict(sites), plate, size, first
        self.shared, self.keywords = shared, keywords

    def __call__(
        self,
        *args: Any,
        size: int | None = None,
        index: Tensor | None = None,
        weight: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Sample every site for the rows ``index``."""
        if index is None:
            raise ProgramError(
                "the guide has parameters for each row and must know which it is given: a DataLoader hides the row "
                "numbers, pass its dataset or the arrays"
            )
        if size not in (None, self.size):
            raise ProgramError(
                f"the guide has parameters for each of the {self.size} rows it was fitted to and knows nothing of "
                f"these {size}: fit with amortized=True, or fit these rows"
            )
        if weight is not None:
            raise ProgramError(
                "the batches are stratified, and a guide with parameters for each datum knows no row weights: fit "
                "with batch_size=None"
            )
        rows = index - self.first
        found = {name: site.of_rows(name, rows) for name, site in self.sites.items()}
        if self.shared is not None:
            with _InPlaceOf(found):
                self.shared(*args, **kwargs, **batch_arguments(self.keywords, size=size, index=index, weight=weight))
            return
        with pyro.plate(self.plate.name, self.size, subsample=index, dim=self.plate.dim):
            for name, site in self.sites.items():
                infer: Any = dict(site.infer)  # Pyro's type for it does not know the names of event dims
                pyro.sample(name, found[name], infer=infer)


def described(guide: PerDatumGuide) -> dict[str, Any]:
    """The guide in plain values; what its parameters are and what it shares is not said."""
    return {
        "sites": {
            name: {"family": site.family.__name__, "event_dims": site.event_dims, "infer": site.infer}
            for name, site in guide.sites.items()
        },
        "plate": asdict(guide.plate),
        "size": guide.size,
        "first": guide.first,
    }


def from_description(
    tree: Mapping[str, Any],
    values: Mapping[str, Tensor],
    shared: Callable[..., Any] | None,
    keywords: frozenset[str],
) -> PerDatumGuide:
    """The guide that `described` describes.

    Args:
        tree: the description.
        values: constrained values by name in `pyro.param`.
        shared: as for `PerDatumGuide`.
        keywords: as for `PerDatumGuide`.

    Raises:
        ValueError: if the tree is no description, or a value is missing.
    """
    families = {family.__name__: family for family in FAMILIES}
    try:
        sites, size, first = {}, int(tree["size"]), int(tree["first"])
        for name, entry in tree["sites"].items():
            family, event_dims = families[entry["family"]], int(entry["event_dims"])
            start = {key: values[f"{name}.{key}"] for key in FAMILIES[family]}
            if not all(0 <= event_dims < value.dim() and len(value) == size for value in start.values()):
                raise ValueError(f"{name!r} has {event_dims} event dims and {size} rows")
            sites[str(name)] = SiteOfEach(family, start, event_dims, dict(entry["infer"]))
        plate = tree["plate"]
        around = Plate(str(plate["name"]), int(plate["dim"]), int(plate["rows"]), int(plate["size"]))
        if around.dim >= 0 or not 0 <= first <= size:
            raise ValueError(f"its plate has dim {around.dim}, and its rows begin at {first}")
        return PerDatumGuide(sites, around, size, first, shared, keywords)
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from error


class _InPlaceOf(Messenger):
    """Distributions in place of those that a guide says: all else, its order and its noise, stays the guide's."""

    def __init__(self, distributions: Mapping[str, Any]) -> None:
        super().__init__()
        self.distributions = distributions

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.distributions:
            msg["fn"] = self.distributions[msg["name"]]


def nothing_to_replace(program_name: str, why: str) -> ProgramError:
    """The error for a program without an amortised guide."""
    return ProgramError(f"{program_name}: {why}, so there is nothing amortised to replace: drop amortized=False")


def replaced_sites(bound: BoundProgram, structure: Structure, batch: Batch) -> list[Site]:
    """The sites of the guide inside the data plate, once it is clear that each can have its own parameters.

    Args:
        bound: the program with its amortised guide.
        structure: its trace on ``batch``.
        batch: the first rows.

    Raises:
        ProgramError: if the guide is not amortised; or naming a site that depends on another of the guide, lies in a
            further plate, is masked or weighted, or is of a family that is not known.
    """
    program = bound.program
    sites = [site for site in structure.guide.values() if site.inside(structure.data_plate)]
    if isinstance(program.guide, AutoGuide):
        raise nothing_to_replace(program.name, f"guide {type(program.guide).__name__} is no function of the data")
    if not sites:
        raise nothing_to_replace(program.name, "the guide has no site inside the data plate")
    if "index" in program.keywords["guide"]:
        raise nothing_to_replace(program.name, "the guide takes `index`: it has parameters for each datum already")
    if batch.index is None:
        raise ProgramError(
            "a guide with parameters for each datum needs row numbers, which a DataLoader hides: pass its dataset or "
            "the arrays"
        )
    with isolated(0, validate=False), bound.holding(None):
        of_guide = parents(bound.guide, batch, {})
    for site in sites:
        _require_replaceable(site, structure, sorted(of_guide.get(site.name, ())))
    return sites


def _require_replaceable(site: Site, structure: Structure, depends_on: list[str]) -> None:
    what = f"amortized=False: guide {site} is {site.kind} and"
    if depends_on:
        listed = [name for name in depends_on if structure.guide[name].enumerated]
        kind = "enumerated site" if listed else "site"
        raise ProgramError(
            f"{what} depends on {kind} {(listed or depends_on)[0]!r} of the guide: one set of parameters for each "
            "datum would be another family. Use amortized=True"
        )
    others = [plate.name for plate in site.plates if plate.name != structure.data_plate]
    if others:
        raise ProgramError(
            f"{what} lies in plate {others[0]!r} besides {structure.data_plate!r}: make it one event, .to_event(1), "
            "or use amortized=True"
        )
    if type(site.base) not in FAMILIES:
        names = ", ".join(family.__name__ for family in FAMILIES)
        raise ProgramError(f"{what} not one of the families with known parameters ({names}): use amortized=True")
    weighted = isinstance(site.scale, Tensor) or abs(site.scale - site.plate_scale) > 1e-6 * site.plate_scale
    if weighted:
        raise ProgramError(f"{what} has a scale beside its plate's (poutine.scale): use amortized=True")


@torch.no_grad()
def per_datum_guide(
    bound: BoundProgram,
    structure: Structure,
    batches: Iterable[Batch],
    *,
    shared: Callable[..., Any] | None,
    keywords: frozenset[str],
) -> PerDatumGuide:
    """The guide with parameters for each row of ``batches``, which follow one another.

    Args:
        bound: the program with its amortised guide, at the parameters to start from.
        structure: its trace; `replaced_sites` has found nothing wrong.
        batches: the rows, some at a time.
        shared: run for the sites outside the plate, where there are any.
        keywords: the row keywords that ``shared`` takes.

    Raises:
        ProgramError: if a parameter starts where it cannot be trained (a log-probability of minus infinity).
    """
    sites = [site for site in structure.guide.values() if site.inside(structure.data_plate)]
    parts: dict[str, list[dict[str, Tensor]]] = {site.name: [] for site in sites}
    first, size = None, 0
    with isolated(0, validate=False), bound.holding(None), poutine.block():
        for batch in batches:
            if first is None:
                first, size = int(batch.index[0]), batch.size  # type: ignore[index]
            trace = poutine.trace(bound.guide).get_trace(*batch.args, **batch.named())
            for site in sites:
                node = trace.nodes[site.name]
                if node["mask"] is not None:
                    raise ProgramError(f"amortized=False: guide {site} is masked (poutine.mask): use amortized=True")
                parts[site.name].append(_parameters(node["fn"]))
    made: dict[str, SiteOfEach] = {}
    for site in sites:
        start = {name: torch.cat([part[name] for part in parts[site.name]]) for name in parts[site.name][0]}
        for name, value in start.items():
            if not bool(torch.isfinite(value).all()):
                raise ProgramError(
                    f"amortized=False: guide {site} is {site.kind} and its {name} is infinite for some rows, from "
                    "where nothing can be trained: use amortized=True"
                )
        event_dims = len(site.fn.event_shape) - len(site.base.event_shape)
        infer: dict[str, Any] = {"enumerate": site.enumerated} if site.enumerated else {}
        infer |= {"is_auxiliary": True} if site.auxiliary else {}
        infer |= {"event_dims": site.event_dims} if site.event_dims else {}
        made[site.name] = SiteOfEach(type(site.base), start, event_dims, infer)
    plate = next(plate for plate in sites[0].plates if plate.name == structure.data_plate)
    others = any(site.name not in made for site in structure.guide.values())
    return PerDatumGuide(made, plate, size, first or 0, shared if others else None, keywords)


def _parameters(fn: Any) -> dict[str, Tensor]:
    """The parameters of a site for each row of a batch, in the first dim."""
    base = base_of(fn)
    named = {name: getattr(base, name) for name in FAMILIES[type(base)]}
    kinds: Any = base.arg_constraints
    return {
        name: value.expand(base.batch_shape + value.shape[value.dim() - kinds[name].event_dim :]).clone()
        for name, value in named.items()
    }


def freed(bound: BoundProgram, structure: Structure, first: Batch, rows: Rows) -> PerDatumGuide:
    """The guide that takes the place of an amortised one in a fit to ``rows``; its trace on ``first`` is known."""
    program = bound.program
    replaced_sites(bound, structure, first)
    batches = rows.batches(ROWS_AT_A_TIME if program.names("size") else None)
    return per_datum_guide(bound, structure, batches, shared=program.guide, keywords=program.keywords["guide"])

r"""Guides made from a model: the mean-field baseline and its relatives.

.. math:: q(z) = \prod_s N\big(t_s^{-1}(z_s);\, m_s, \operatorname{diag} \sigma_s^2\big)

Every latent site is Normal on its unconstrained scale; sites that enumeration sums out have no part in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuide,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
    init_to_median,
    init_to_value,
)
from torch import Tensor

from pyro_lvm.errors import ProgramError
from pyro_lvm.structure import Site, Structure

__all__ = ["AUTOGUIDES", "WORDS", "GivenDraws", "GuideKind", "is_recipe", "make_guide", "nothing_to_approximate"]

GuideKind = Literal["mean_field", "full_rank", "low_rank", "map"]
"""The guides that one word asks for."""

WORDS: tuple[str, ...] = get_args(GuideKind)

_CLASSES: dict[str, type[AutoGuide]] = {
    "mean_field": AutoNormal,
    "full_rank": AutoMultivariateNormal,
    "low_rank": AutoLowRankMultivariateNormal,
    "map": AutoDelta,
}


AUTOGUIDES: dict[str, type[AutoGuide]] = {
    kind.__name__: kind
    for kind in (
        AutoDelta,
        AutoDiagonalNormal,
        AutoGaussian,
        AutoIAFNormal,
        AutoLaplaceApproximation,
        AutoLowRankMultivariateNormal,
        AutoMultivariateNormal,
        AutoNormal,
        AutoStructured,
    )
}
"""Pyro's classes that are made from a model alone, which a file may name."""


def is_recipe(guide: Any) -> bool:
    """Whether ``guide`` says how to build a guide (a word or an autoguide class) rather than being one."""
    return isinstance(guide, str) or (inspect.isclass(guide) and issubclass(guide, AutoGuide))


def make_guide(
    model: Callable[..., Any],
    structure: Structure,
    kind: GuideKind | type[AutoGuide] = "mean_field",
    *,
    names_index: bool,
    minibatches: bool,
    start: dict[str, Tensor] | None = None,
) -> Callable[..., Any]:
    """Build a guide for ``model``.

    Args:
        model: the model.
        structure: one trace of it.
        kind: "mean_field" (a diagonal Normal), "full_rank", "low_rank" (Normals over all sites jointly), "map"
            (a point), or one of Pyro's autoguide classes.
        names_index: whether the model names ``index``, so that per-datum parameters can follow their rows.
        minibatches: whether it will be fitted on part of the rows at a time.
        start: constrained starting values by site; the others start at the median of a few prior draws.

    Returns:
        The guide; where enumeration leaves nothing to approximate, one without sites.

    Raises:
        ValueError: if ``kind`` is not one of the words.
        ProgramError: if its per-datum parameters could not follow their rows: Pyro's autoguides then draw rows of
            their own, and each datum trains another's posterior.
    """
    if isinstance(kind, str) and kind not in _CLASSES:
        words = ", ".join(repr(word) for word in get_args(GuideKind))
        raise ValueError(f"guide={kind!r} is not known: use one of {words}, a Pyro autoguide class, or a callable")
    hidden = [site.name for site in structure.latent if site.discrete]
    covered = [site for site in structure.latent if not site.discrete]
    if not covered:
        return nothing_to_approximate
    guide_class = _CLASSES[kind] if isinstance(kind, str) else kind
    taken = inspect.signature(guide_class).parameters
    starts = "init_loc_fn" in taken and not issubclass(guide_class, AutoIAFNormal)  # which takes it and warns
    options: dict[str, Any] = {"init_loc_fn": _start(start)} if starts else {}
    local = [site.name for site in covered if site.inside(structure.data_plate)]
    covered_plates = [plate for site in covered for plate in site.plates]
    if local and minibatches and not names_index:
        raise ProgramError(
            f"site {local[0]!r} has a value for each datum, and a guide built from the model keeps parameters for "
            "each: in minibatches it must know which rows it sees. Name `index` in the model's signature and write "
            f'pyro.plate("{structure.data_plate}", size or len(x), subsample=index)'
        )
    if local and names_index:
        if not issubclass(guide_class, AutoNormal | AutoDelta):
            if minibatches:
                raise ProgramError(
                    f"guide {guide_class.__name__} is one joint Normal over all rows of {local[0]!r} and cannot be "
                    "fitted in minibatches: use guide='mean_field' or batch_size=None"
                )
        else:
            plate = next(p for p in covered_plates if p.name == structure.data_plate)
            options["create_plates"] = partial(_data_plate, plate.name, plate.dim)
    return guide_class(poutine.block(model, hide=hidden), **options)


def _start(values: dict[str, Tensor] | None) -> Any:
    return init_to_value(values=values, fallback=init_to_median) if values else init_to_median


def _data_plate(name: str, dim: int, *_args: Any, index: Tensor, size: int | None = None, **_kwargs: Any) -> Any:
    return pyro.plate(name, size or len(index), subsample=index, dim=dim)


def nothing_to_approximate(*args: Any, **kwargs: Any) -> None:
    """The guide of a model in which nothing is left to approximate."""


class GivenDraws:
    """A guide that says draws again which were made elsewhere, one after the other; it has no density.

    Attributes:
        sites: the sites that it has.
        draws: by site, shape (number of draws, *the site's value).
        order: which of the draws, in which order.
        number: the place in ``order`` of the draw that the next call gives.
    """

    def __init__(self) -> None:
        self.sites: tuple[Site, ...] = ()
        self.draws: Mapping[str, Tensor] = {}
        self.order: Sequence[int] = (0,)
        self.number = 0

    def fill(self, sites: Sequence[Site], draws: Mapping[str, Tensor]) -> None:
        """Take these draws of these sites."""
        self.sites, self.draws = tuple(sites), draws
        self.order, self.number = range(len(next(iter(draws.values())))), 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Sample every site, in the plates of its model."""
        for site in self.sites:
            value = self.draws[site.name][self.order[self.number]]
            # hidden, the plates hold no rows that would be put into the model's
            with ExitStack() as stack:
                with poutine.block(hide=[plate.name for plate in site.plates]):
                    plates = [pyro.plate(plate.name, plate.rows, dim=plate.dim) for plate in site.plates]
                for plate in reversed(plates):
                    stack.enter_context(plate)
                pyro.sample(site.name, dist.Delta(value, event_dim=len(site.fn.event_shape)))

"""The one seam to ArviZ: draws with named dims become `InferenceData` (ArviZ 0.x) or a `DataTree` (1.x)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["Groups", "loo", "to_arviz"]

WITHOUT_DRAWS = ("observed_data",)


@dataclass(frozen=True)
class Groups:
    """What goes into the export.

    Attributes:
        values: by group and variable; draws have shape (num_draws, ...), observed data their own.
        dims: by group and variable, names of the dims after the draws.
        attrs: facts about the whole, such as how it was made.
    """

    values: Mapping[str, Mapping[str, Tensor]]
    dims: Mapping[str, Mapping[str, tuple[str, ...]]]
    attrs: Mapping[str, str | int | float] = field(default_factory=dict)


def to_arviz(groups: Groups) -> Any:
    """Convert draws to what the installed ArviZ calls its data.

    Draws become ``(chain=1, draw=S, ...)``. Draws of a variational fit are independent, so R-hat means nothing for
    them; use ``az.summary(..., kind="stats")``.

    Returns:
        `arviz.InferenceData` under ArviZ 0.x, `xarray.DataTree` under 1.x.

    Raises:
        ValueError: if a dim bears the name of a site.
    """
    import arviz
    import xarray

    for group, variables in groups.values.items():
        named = {dim for name in variables for dim in groups.dims[group][name]}
        for clash in named & set(variables):
            raise ValueError(
                f"{clash!r} names both a site and a dim in group {group!r}, and xarray would take the site for the "
                f'dim\'s coordinates: give the dim another name in infer={{"event_dims": (...)}} or rename the plate'
            )
    datasets = {
        group: xarray.Dataset(
            {name: _variable(group, value, groups.dims[group][name]) for name, value in variables.items()}
        )
        for group, variables in groups.values.items()
    }
    for group, dataset in datasets.items():
        datasets[group] = dataset.assign_coords({str(dim): np.arange(size) for dim, size in dataset.sizes.items()})
    inference_data: Any = vars(arviz).get("InferenceData")  # to ask ArviZ 1.x for it by attribute makes it warn
    if inference_data is not None:
        return inference_data(attrs=dict(groups.attrs), **datasets)
    tree = xarray.DataTree.from_dict(datasets)
    tree.attrs.update(groups.attrs)
    return tree


def loo(data: Any, **options: Any) -> Any:
    """ArviZ's PSIS leave-one-out cross-validation of exported data."""
    import arviz

    arviz_of_any_age: Any = arviz
    return arviz_of_any_age.loo(data, **options)


def _variable(group: str, value: Tensor, dims: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
    array: np.ndarray = value.detach().cpu().numpy()
    return (dims, array) if group in WITHOUT_DRAWS else (("chain", "draw", *dims), array[None])

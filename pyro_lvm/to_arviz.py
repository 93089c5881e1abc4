"""The one seam to ArviZ: draws with named dims become `InferenceData` (ArviZ 0.x) or a `DataTree` (1.x)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["Groups", "convergence", "loo", "pareto_k", "to_arviz"]

WITHOUT_DRAWS = ("observed_data",)


@dataclass(frozen=True)
class Groups:
    """What goes into the export.

    Attributes:
        values: by group and variable; draws have shape (num_draws, ...), observed data their own.
        dims: by group and variable, names of the dims after the draws.
        attrs: facts about the whole, such as how it was made.
        chains: by group, how many chains its draws are, one after the other; 1 where nothing is said.
    """

    values: Mapping[str, Mapping[str, Tensor]]
    dims: Mapping[str, Mapping[str, tuple[str, ...]]]
    attrs: Mapping[str, str | int | float] = field(default_factory=dict)
    chains: Mapping[str, int] = field(default_factory=dict)


def to_arviz(groups: Groups) -> Any:
    """Convert draws to what the installed ArviZ calls its data.

    Draws become ``(chain, draw, ...)``. Draws of a variational fit are independent and make one chain, so R-hat means
    nothing for them; use ``az.summary(..., kind="stats")``.

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
            {
                name: _variable(value, groups.dims[group][name], None if group in WITHOUT_DRAWS else chains)
                for name, value in variables.items()
            }
        )
        for group, variables in groups.values.items()
        for chains in (groups.chains.get(group, 1),)
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


def pareto_k(log_weights: np.ndarray) -> np.ndarray:
    """The Pareto tail index of each row of log-weights, shape (rows, draws) -> (rows,)."""
    import arviz

    arviz_of_any_age: Any = arviz
    if hasattr(arviz, "psislw"):
        return np.atleast_1d(np.asarray(arviz_of_any_age.psislw(log_weights)[1]))
    stats: Any = importlib.import_module("arviz_stats.base").array_stats  # of ArviZ 1.x: it takes minus the log-weights
    return np.atleast_1d(np.asarray(stats.psislw(-log_weights, axis=-1)[1]))


def convergence(draws: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """By variable, the largest rank-normalised R-hat and the smallest bulk effective sample size of its entries.

    Args:
        draws: by variable, shape (chains, draws, ...).

    Returns:
        NaN where ArviZ knows none, such as R-hat of one chain. A chain in which nothing moves has no effective draw.
    """
    import arviz
    import xarray

    arviz_of_any_age: Any = arviz
    found = {}
    for name in draws:
        entries = draws[name].detach().cpu().flatten(2) if draws[name].dim() > 2 else draws[name].cpu().unsqueeze(-1)
        # entries that never move, such as the zeros of a triangle, have no R-hat and are none of its business
        moving = entries[..., (entries != entries[:1, :1]).any(0).any(0)].numpy()
        dataset = xarray.Dataset({name: (("chain", "draw", "entry"), moving)})
        rhat = ess = np.array([])
        if moving.size:
            with np.errstate(all="ignore"):
                rhat = np.asarray(arviz_of_any_age.rhat(dataset)[name]) if len(moving) > 1 else rhat
                ess = np.asarray(arviz_of_any_age.ess(dataset, method="bulk")[name])
        stuck = any(bool((chain == chain[0]).all()) for chain in draws[name])
        found[name] = (_of_known(np.max, rhat), 0.0 if stuck else _of_known(np.min, ess))
    return found


def _of_known(reduce: Any, values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(reduce(known)) if known.size else float("nan")


def _variable(value: Tensor, dims: tuple[str, ...], chains: int | None) -> tuple[tuple[str, ...], np.ndarray]:
    array: np.ndarray = value.detach().cpu().numpy()
    if chains is None:
        return dims, array
    return ("chain", "draw", *dims), array.reshape(chains, len(array) // chains, *array.shape[1:])

r"""One numbering of the components for all draws and all runs.

The density of a mixture does not change when its components are renumbered, so two draws, two chains or two seeds may
call the same cluster by different numbers, and their average means nothing. Each draw is matched to a reference:

.. math:: \hat\sigma_s = \arg\min_{\sigma} \sum_k \lVert \mu_{s, \sigma(k)} - \mu^{\mathrm{ref}}_k \rVert^2

with every feature in units of its spread (Stephens, 2000, https://doi.org/10.1111/1467-9868.00265, gives the general
form; the minimum over permutations is Kuhn's assignment problem, 1955, https://doi.org/10.1002/nav.3800020109).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["align_components", "match_components"]


def match_components(locs: Tensor, reference: Tensor, unit: Tensor | None = None) -> Tensor:
    """The permutation of each draw's components that brings its locations closest to a reference.

    Args:
        locs: component locations, shape (..., K, D).
        reference: locations in the wanted order, shape (K, D).
        unit: what to divide each feature by before distances are taken, shape (D,). Default: the standard deviation of
            all given locations, reference included.

    Returns:
        Shape (..., K), int64: ``locs[..., permutation[k], :]`` is the component called k in the reference.

    Raises:
        ValueError: if reference is not of shape (K, D).

    Example:
        >>> import torch
        >>> match_components(torch.tensor([[5.0], [0.0], [9.0]]), reference=torch.tensor([[0.1], [5.2], [8.0]]))
        tensor([1, 0, 2])
    """
    from scipy.optimize import linear_sum_assignment

    if reference.shape != locs.shape[-2:]:
        raise ValueError(
            f"reference has shape {tuple(reference.shape)}, but each draw of locs has shape {tuple(locs.shape[-2:])}: "
            f"pass one location per component, in the order you want."
        )
    flat, target = locs.detach().double().cpu().reshape(-1, *reference.shape), reference.detach().double().cpu()
    unit = _spread(torch.cat([flat, target[None]])) if unit is None else unit.detach().double().cpu()
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    costs = torch.cdist(target / unit, flat / unit).square().numpy()
    permutations = np.stack([linear_sum_assignment(cost)[1] for cost in costs])
    return torch.from_numpy(permutations).reshape(locs.shape[:-1]).to(locs.device)


def align_components(
    draws: Mapping[str, Tensor], reference: Tensor | None = None, max_iterations: int = 20
) -> tuple[dict[str, Tensor], Tensor]:
    """Renumber the components of every draw, in all sites alike.

    Knows a mixture's sites by name: ``weights`` (..., K), ``locs`` (..., K, D), ``scales`` (..., K, D) or (..., K),
    ``scale_tril`` (..., K, D, D) or, shared, (..., D, D), and the labels ``component`` (..., n), whose values are
    renumbered. Other sites are returned as they are. Leading shapes such as (draw,) or (chain, draw) must agree.

    Locations decide: components that share a location and differ only in their scales cannot be told apart here.

    Args:
        draws: site values by name; ``locs`` is needed.
        reference: locations in the wanted order, shape (K, D), for instance another run's. Default: the mean of the
            aligned draws, found by alternating between mean and alignment from the first draw on, numbered by
            decreasing weight where the draws hold weights.
        max_iterations: of that alternation.

    Returns:
        The renumbered draws, and the permutations (..., K): component k of a result was ``permutation[..., k]``.

    Raises:
        ValueError: if locs is missing, or reference does not fit it.

    Example:
        >>> import torch
        >>> locs = torch.tensor([[[0.0], [4.0]], [[4.1], [0.1]]])  # the second draw has them the other way round
        >>> weights = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> aligned, permutation = align_components({"locs": locs, "weights": weights})
        >>> aligned["weights"].T
        tensor([[0.9000, 0.8000],
                [0.1000, 0.2000]])
    """
    if "locs" not in draws:
        raise ValueError(f"draws has the sites {sorted(draws)}; components are matched by 'locs', shape (..., K, D).")
    locs = draws["locs"]
    batch_dims = locs.dim() - 2
    if reference is not None:
        permutation = match_components(locs, reference)
    else:
        permutation = _self_consistent_permutation(locs, max_iterations)
        if "weights" in draws:
            mean_weights = draws["weights"].gather(-1, permutation).flatten(0, -2).mean(0)
            permutation = permutation[..., mean_weights.argsort(descending=True, stable=True)]
    aligned: dict[str, Tensor] = {}
    for name, value in draws.items():
        has_component_axis = name in ("weights", "locs", "scales") or (
            name == "scale_tril" and value.dim() == batch_dims + 3
        )
        if has_component_axis:
            index = permutation.reshape(permutation.shape + (1,) * (value.dim() - batch_dims - 1))
            aligned[name] = value.take_along_dim(index, batch_dims)
        elif name == "component":
            aligned[name] = permutation.argsort(-1).gather(-1, value.long()).to(value.dtype)
        else:
            aligned[name] = value
    return aligned, permutation


def _self_consistent_permutation(locs: Tensor, max_iterations: int) -> Tensor:
    flat = locs.reshape(-1, *locs.shape[-2:])
    unit = _spread(flat)
    permutation = match_components(flat, flat[0], unit)
    for _ in range(max_iterations):
        center = flat.take_along_dim(permutation.unsqueeze(-1), 1).mean(0)
        again = match_components(flat, center, unit)
        if torch.equal(again, permutation):
            break
        permutation = again
    return permutation.reshape(locs.shape[:-1])


def _spread(locs: Tensor) -> Tensor:
    """Standard deviation of each feature over all draws and components."""
    return locs.detach().double().flatten(0, 1).std(0, correction=0)

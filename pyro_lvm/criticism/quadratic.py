r"""Exact expectations of quadratic log-probabilities under a normal guide.

.. math::
    q = N(m, S S^\top): \qquad E_q f = f(m) + \tfrac12 \sum_j \bigl[f(m + s_j) + f(m - s_j) - 2 f(m)\bigr]

holds for every f that is at most cubic, with :math:`s_j` the columns of S: the sum is the trace of Hessian times
covariance. Linear-Gaussian programs (probabilistic PCA, factor analysis, Bayesian regression) are of that kind. Whether
f is quadratic is seen at random places: along any line its third differences vanish.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from pyro_lvm.criticism.expectations import Parts, parts_of
from pyro_lvm.criticism.weights import Source, sampled_sites
from pyro_lvm.data import Batch

__all__ = ["expected_by_quadratic"]

MOST_COORDINATES = 200
"""Two passes for each coordinate: beyond this many, draws are the cheaper way."""

ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Third differences that are nought but for rounding, relative to the values that they are made of."""


def expected_by_quadratic(source: Source, batch: Batch, plate: str) -> Parts | None:
    """The parts with the model's terms in expectation, shape (1, rows); None where they are not known to be quadratic.

    Only the model's own terms (``observed`` and ``latent``) are expectations.
    """
    structure = source.structure
    sampled = sampled_sites(structure)
    if len(sampled) != 1 or len(structure.latent) != 1 or set(structure.guide) != {sampled[0].name}:
        return None
    name = sampled[0].name
    guide_trace = source.draw(batch).guide_trace
    fn = guide_trace.nodes[name]["fn"]
    root = _root(fn)
    if root is None or len(structure.guide[name].plates) != 1 or root.shape[-1] > MOST_COORDINATES:
        return None

    def at(z: Tensor) -> Parts:
        return parts_of(source.holding(guide_trace.nodes, {name: z}).draw(batch), structure, plate)

    centre = fn.mean
    middle = at(centre)
    for _ in range(2):
        step = fn.sample() - centre
        if not _quadratic(middle, *(at(centre + k * step) for k in (-1, 1, 2))):
            return None
    columns = root.unbind(-1) if fn.event_dim else [root[..., 0]]
    sides = [at(centre + sign * column) for column in columns for sign in (1.0, -1.0)]

    def expected(part: str) -> dict[str, Tensor]:
        return {
            site: value + 0.5 * torch.stack([getattr(side, part)[site] - value for side in sides]).sum(0)
            for site, value in getattr(middle, part).items()
        }

    return replace(middle, observed=expected("observed"), latent=expected("latent"))


def _root(fn: Any) -> Tensor | None:
    """A root of the covariance of a normal distribution, shape (rows, event, event), or None if it is no normal."""
    if isinstance(fn, MultivariateNormal):
        return fn.scale_tril.expand(*fn.batch_shape, -1, -1)
    if isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == 1 and isinstance(fn.base_dist, Normal):
        return torch.diag_embed(fn.stddev)
    if isinstance(fn, Normal):
        return fn.stddev.unsqueeze(-1)
    return None


def _quadratic(middle: Parts, behind: Parts, ahead: Parts, further: Parts) -> bool:
    for part in ("observed", "latent"):
        for site, f in getattr(middle, part).items():
            before, after, beyond = (getattr(place, part)[site] for place in (behind, ahead, further))
            third = beyond - 3 * after + 3 * f - before
            size = torch.stack([before, f, after, beyond]).abs().amax(0).clamp(min=1.0)
            if not bool((third.abs() <= ROUNDING.get(f.dtype, 1e-2) * size).all()):
                return False
    return True

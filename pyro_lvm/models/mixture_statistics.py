r"""Both halves of an EM step as matrix products: a normal's log density is linear in the squares of the data.

.. math::
    \log \pi_k \mathcal{N}(x \mid \mu_k, \Sigma_k) = \eta_k^\top \phi(x), \qquad
    \phi(x) = (1,\; u,\; u_i u_j \,|\, i \le j), \quad u = (x - c) / s, \qquad
    t_k = \sum_i \tau_{ik} \, \phi(x_i)

with :math:`c, s` a centre and a unit of the data. It is several times as fast as measuring every row in units of every
component, and loses the digits that cancel: as many as the square of a row's distance from the centre, in widths of the
narrowest component. `MixtureEM` asks `is_exact_enough` and measures where it is not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["QuadraticStatistics"]

MOST_CANCELLATION = 1e6
"""Squared distance over squared width up to which the ten digits that are left of sixteen are enough."""


class QuadraticStatistics:
    """The statistics of rows, and what normals are in terms of them.

    Args:
        center: amid the data, shape (D,).
        unit: of each feature, shape (D,).
        farthest: square of the largest distance of a row from the centre, in these units.
        with_products: whether u_i u_j for i < j are among the statistics.
    """

    def __init__(self, center: Tensor, unit: Tensor, farthest: float, with_products: bool) -> None:
        self.center, self.unit, self.farthest, self.with_products = center, unit, farthest, with_products
        features = len(center)
        self.above = torch.triu_indices(features, features, device=center.device)
        self.count = 1 + features + (self.above.shape[1] if with_products else features)
        self._room = center.new_empty(0)

    def of(self, x: Tensor) -> Tensor:
        """The statistics of rows (b, D), shape (1 + D + ..., b); they stand in memory that the next call uses anew."""
        rows, features = x.shape
        if self._room.numel() < self.count * rows:
            self._room = x.new_empty(self.count * rows)
        table = self._room[: self.count * rows].view(self.count, rows)
        table[0] = 1.0
        u = table[1 : features + 1]
        u.copy_(((x - self.center) / self.unit).mT)
        if not self.with_products:
            torch.mul(u, u, out=table[features + 1 :])
            return table
        start = features + 1
        for i in range(features):
            torch.mul(u[i], u[i:], out=table[start : start + features - i])
            start += features - i
        return table

    def is_exact_enough(self, inverse: Tensor) -> bool:
        """Whether normals with these inverse factors, (K, D, D) or standard deviations inverted (K, D), fare well."""
        in_units = inverse * self.unit
        widths = in_units.square().flatten(1).sum(-1) if self.with_products else in_units.square().amax(-1)
        return float(widths.max()) * self.farthest < MOST_CANCELLATION

    def coefficients(self, constant: Tensor, locs: Tensor, inverse: Tensor) -> Tensor:
        """What a row's log joint density is in terms of the statistics, (K, 1 + D + ...).

        Args:
            constant: the logarithm of weight over determinant's root, (K,).
            locs: means, (K, D).
            inverse: inverse Cholesky factors (K, D, D), or inverse standard deviations (K, D).
        """
        shift = (locs - self.center) / self.unit
        if self.with_products:
            in_units = inverse * self.unit
            precision = in_units.mT @ in_units
            linear = (precision @ shift.unsqueeze(-1)).squeeze(-1)
            each_once = torch.where(self.above[0] == self.above[1], -0.5, -1.0).to(precision)
            quadratic = precision[:, self.above[0], self.above[1]] * each_once
        else:
            precision = (inverse * self.unit).square()
            linear, quadratic = precision * shift, -0.5 * precision
        level = constant - 0.5 * (linear * shift).sum(-1) - 0.5 * len(self.center) * math.log(2 * math.pi)
        return torch.cat([level.unsqueeze(-1), linear, quadratic], -1)

    def moments(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts (K,), means (K, D) and scatters (K, D, D) or (K, D), from weighted sums of statistics (K, 1 + ...)."""
        features = len(self.center)
        counts, first, second = sums.split([1, features, self.count - features - 1], -1)
        mean = first / counts.clamp_min(1e-300)
        if self.with_products:
            matrices = sums.new_zeros(len(sums), features, features)
            matrices[:, self.above[0], self.above[1]] = second
            matrices[:, self.above[1], self.above[0]] = second
            scatters = matrices - counts.unsqueeze(-1) * mean.unsqueeze(-1) * mean.unsqueeze(-2)
            scatters = scatters * (self.unit.unsqueeze(-1) * self.unit)
        else:
            scatters = (second - counts * mean.square()).clamp_min(0) * self.unit.square()
        return counts.squeeze(-1), self.center + mean * self.unit, scatters

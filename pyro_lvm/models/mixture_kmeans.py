"""K-means: EM of a mixture with hard assignments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_lvm.exact import Expectation, Parameters
from pyro_lvm.models.mixture_em import MixtureEM, nearest

__all__ = ["KMeans"]


class KMeans:
    r"""Lloyd's algorithm, the limit of EM as the components, spherical, alike and of equal weight, shrink to points.

    .. math::
        \tau_{ik} \xrightarrow{\;\sigma \to 0\;} \bigl[k = \arg\min_j \|x_i - \mu_j\|\bigr], \qquad
        -2 \sigma^2 \, \mathrm{ELBO} \to \sum_i \min_k \|x_i - \mu_k\|^2

    The objective is minus the inertia, the sum on the right. At the end the mixture is given the shares and moments of
    the clusters. Lloyd (1982), https://doi.org/10.1109/TIT.1982.1056489.
    """

    def __init__(self, steps: MixtureEM) -> None:
        self.steps = steps

    def start(self, init: Any, seed: int) -> Parameters:
        """As the mixture's."""
        return {"locs": self.steps.start(init, seed)["locs"]}

    def expectation(self, parameters: Parameters) -> Expectation:
        """Each row to its nearest mean."""

        def sums(x: Tensor) -> tuple[Tensor, ...]:
            if bool(x.isnan().any()):
                raise ValueError(
                    "hard=True measures distances, which rows with missing values do not have: drop hard=True, or "
                    "drop those rows"
                )
            assigned, squares = nearest(x, parameters["locs"])
            return squares.sum(), assigned.sum(-1, keepdim=True), assigned @ (x - self.steps.center)

        inertia, counts, offsets = self.steps.data.total(sums)
        return Expectation(-float(inertia), (counts, offsets))

    def maximisation(self, parameters: Parameters, statistics: Any) -> tuple[Parameters, float]:
        """Each mean to the middle of its rows; a mean without rows stays."""
        counts, offsets = statistics
        means = torch.where(counts > 0, self.steps.center + offsets / counts.clamp_min(1), parameters["locs"])
        return {"locs": means}, float((counts * (means - parameters["locs"]).square()).sum())

    def apply(self, parameters: Parameters) -> None:
        """Shares and moments of the clusters."""
        self.steps.apply(self.steps.given(lambda x, _: nearest(x, parameters["locs"])[0]))

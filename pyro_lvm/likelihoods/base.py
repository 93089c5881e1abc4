"""What the likelihoods have in common, and what a likelihood of one's own may inherit."""

from __future__ import annotations

import math

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

__all__ = ["Likelihood", "check_floor"]


class Likelihood(nn.Module):
    r"""What the likelihoods here have in common; a base to inherit from, never required.

    .. math:: p(x \mid r) = \prod_{d=1}^D p(x_d \mid r_d), \quad r \in \mathbb R^{D \times P}

    A subclass sets `num_parameters` and writes `forward`. Data outside the support of the distribution are refused by
    `fit`, which knows every row, and not here.

    Args:
        num_features: numbers per datum, D.

    Raises:
        ValueError: num_features is below 1.
    """

    num_parameters: int = 1
    """Raw numbers per feature, P."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, but got {num_features}.")
        self.num_features = num_features

    def forward(self, raw: Tensor) -> TorchDistribution:
        """The distribution of a datum, batch shape (...), event shape (num_features,).

        Args:
            raw: unconstrained numbers, shape (..., num_features * num_parameters).

        Raises:
            ValueError: raw has another number of columns.
        """
        raise NotImplementedError

    def mean(self, raw: Tensor) -> Tensor:
        """The mean of a datum, in the units of x; shape (..., num_features) from raw (..., num_features * P)."""
        mean: Tensor = self(raw).mean
        return mean

    def constrained(self) -> dict[str, Tensor]:
        """The learned parameters in their natural form; empty where there are none."""
        return {}

    def _columns(self, raw: Tensor) -> Tensor:
        """Check raw and view it as (num_parameters, ..., num_features)."""
        expected = self.num_features * self.num_parameters
        if raw.ndim == 0 or raw.shape[-1] != expected:
            raise ValueError(
                f"{type(self).__name__} likelihood expects num_features * num_parameters = {self.num_features} * "
                f"{self.num_parameters} = {expected} raw numbers per datum, but got an input of shape "
                f"{tuple(raw.shape)}. Give the decoder {expected} outputs."
            )
        return raw.reshape(*raw.shape[:-1], self.num_parameters, self.num_features).movedim(-2, 0)


def check_floor(floor: float) -> None:
    """Refuse a floor that bounds nothing.

    Raises:
        ValueError: floor is not positive and finite.
    """
    if not 0 < floor < math.inf:
        raise ValueError(
            f"floor must be positive and finite, but got {floor}. Without a floor the density is unbounded; "
            f"take a small number in the units of x, such as 1e-3."
        )

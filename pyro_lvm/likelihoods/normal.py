"""Likelihoods of real data: normal, with the noise scale given, learned, or told by the decoder."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_lvm.likelihoods.base import Likelihood, check_floor
from pyro_lvm.storage.classes import storable

__all__ = ["Normal", "NormalFixed", "NormalPerDatum", "NormalPerFeature"]


@storable
class NormalFixed(Likelihood):
    r"""Real data with a noise scale that is given and not learned.

    .. math:: p(x_d \mid r_d) = N(x_d; r_d, \sigma^2)

    With `scale=1.0` this is the squared error, constants kept:
    :math:`-\log p(x \mid r) = \tfrac12 \lVert x - r \rVert^2 + \tfrac D2 \log 2\pi` nats per datum.

    Raw: the location of each feature.

    Args:
        num_features: numbers per datum.
        scale: standard deviation of the noise, in the units of x.

    Raises:
        ValueError: scale is not positive and finite.

    Example:
        >>> NormalFixed(2)(torch.zeros(1, 2)).log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    def __init__(self, num_features: int, scale: float = 1.0) -> None:
        super().__init__(num_features)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, but got {scale}. Give the noise in the units of x.")
        self.scale = scale

    def forward(self, raw: Tensor) -> TorchDistribution:
        """Normal with locations raw, shape (..., num_features)."""
        (loc,) = self._columns(raw)
        return dist.Independent(dist.Normal(loc, self.scale), 1)


@storable
class Normal(Likelihood):
    r"""Real data with one learned noise scale for all features.

    .. math:: p(x_d \mid r_d) = N(x_d; r_d, \sigma^2), \quad \sigma = \text{floor} + \text{softplus}(s)

    Raw: the location of each feature. s is a parameter of this module. Without a floor the likelihood is unbounded
    (reproduce one datum exactly, let :math:`\sigma \to 0`); with it, no feature contributes more than
    :math:`-\log(\text{floor} \sqrt{2\pi})` nats. Where the fitted scale sits at the floor, the ELBO measures the floor.

    Args:
        num_features: numbers per datum.
        initial_scale: scale to start from, in the units of x.
        floor: smallest scale allowed, in the units of x.

    Raises:
        ValueError: not 0 < floor < initial_scale.

    Example:
        >>> Normal(2, initial_scale=0.5).scale.item()
        0.5
    """

    def __init__(self, num_features: int, initial_scale: float = 1.0, floor: float = 1e-3) -> None:
        super().__init__(num_features)
        check_floor(floor)
        if not floor < initial_scale < math.inf:
            raise ValueError(
                f"initial_scale must be finite and above floor={floor}, but got {initial_scale}. Start from the "
                f"standard deviation of the data, or lower the floor."
            )
        self.initial_scale = initial_scale
        self.floor = floor
        self.raw_scale = nn.Parameter(torch.empty(self._scale_shape()))
        self.reset_parameters()

    def _scale_shape(self) -> tuple[int, ...]:
        return ()

    def reset_parameters(self) -> None:
        """Set the scale back to `initial_scale`."""
        above = self.initial_scale - self.floor
        # softplus inverted; expm1 of the negative number cannot overflow
        nn.init.constant_(self.raw_scale, above + math.log(-math.expm1(-above)))

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the noise, in the units of x; shape (), or (num_features,) where it is per feature."""
        return self.floor + softplus(self.raw_scale)

    def constrained(self) -> dict[str, Tensor]:
        """The noise scale under the name `scale`."""
        return {"scale": self.scale}

    def forward(self, raw: Tensor) -> TorchDistribution:
        """Normal with locations raw, shape (..., num_features)."""
        (loc,) = self._columns(raw)
        return dist.Independent(dist.Normal(loc, self.scale), 1)


@storable
class NormalPerFeature(Normal):
    r"""Real data with a learned noise scale for every feature, the same for all data.

    .. math:: p(x_d \mid r_d) = N(x_d; r_d, \sigma_d^2), \quad \sigma_d = \text{floor} + \text{softplus}(s_d)

    Raw, arguments and errors as in `Normal`; the scale has shape (num_features,). A feature that is constant in the
    data (a border pixel) drives its scale to the floor and then dominates the ELBO.

    Example:
        >>> NormalPerFeature(3).scale.shape
        torch.Size([3])
    """

    def _scale_shape(self) -> tuple[int, ...]:
        return (self.num_features,)


@storable
class NormalPerDatum(Likelihood):
    r"""Real data whose location and noise scale both come from the decoder.

    .. math:: p(x_d \mid r_d) = N(x_d; m_d, \sigma_d^2), \quad (m_d, s_d) = r_d, \; \sigma_d = \text{floor} +
        \text{softplus}(s_d)

    Raw: num_features locations, then num_features raw scales. Without the floor the likelihood is unbounded, and here
    a fit does find that out: any feature that repeats exactly from datum to datum pulls its scale to the floor.

    Args:
        num_features: numbers per datum.
        floor: smallest scale allowed, in the units of x.

    Raises:
        ValueError: floor is not positive and finite.

    Source: the deep Gaussian decoder of Kingma and Welling (2014), appendix C.2, https://arxiv.org/abs/1312.6114.

    Example:
        >>> NormalPerDatum(1)(torch.tensor([[2.0, -1000.0]])).stddev
        tensor([[0.0010]])
    """

    num_parameters = 2

    def __init__(self, num_features: int, floor: float = 1e-3) -> None:
        super().__init__(num_features)
        check_floor(floor)
        self.floor = floor

    def forward(self, raw: Tensor) -> TorchDistribution:
        """Normal with locations and raw scales from raw, shape (..., 2 * num_features)."""
        loc, raw_scale = self._columns(raw)
        return dist.Independent(dist.Normal(loc, self.floor + softplus(raw_scale)), 1)

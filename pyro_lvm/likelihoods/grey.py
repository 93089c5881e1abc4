"""The likelihood of grey levels in [0, 1]."""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_lvm.likelihoods.base import Likelihood
from pyro_lvm.storage.classes import storable

__all__ = ["ContinuousBernoulli", "TiltedUniform"]

Shape = torch.Size | list[int] | tuple[int, ...]

# Taylor coefficients about zero, in powers of (natural / 2) squared, of log(sinh(u) / u), of its first derivative
# divided by u, and of its second; below |natural| = 0.5 what is cut off is under 1e-14
_LOG_NORMALISER = (0.0, 1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775)
_SLOPE = (1 / 3, -1 / 45, 2 / 945, -1 / 4725, 2 / 93555, -1382 / 638512875)
_CURVATURE = (1 / 3, -1 / 15, 2 / 189, -1 / 675, 2 / 10395, -1382 / 58046625)


@storable
class ContinuousBernoulli(Likelihood):
    r"""Grey levels in [0, 1], with the normalising constant that a Bernoulli density lacks there.

    .. math:: p(x_d \mid r_d) = \frac{r_d}{e^{r_d} - 1} e^{r_d x_d}, \quad 0 \le x_d \le 1

    Raw: the natural parameter of each feature. The mean is **not** the sigmoid of it, but
    :math:`\tfrac12 + \tfrac12 (\coth u - 1/u)` with :math:`u = r_d / 2`. A density can exceed one, so the ELBO may be
    positive. Written in the natural parameter, it stays exact for saturated pixels, where torch's class clamps the
    probability and from about :math:`|r| = 16` on (float32) no longer integrates to one.

    Args:
        num_features: numbers per datum.

    Source: Loaiza-Ganem and Cunningham (2019), https://arxiv.org/abs/1907.06845.

    Example:
        >>> ContinuousBernoulli(1).mean(torch.tensor([[0.0], [1000.0]])).squeeze(-1)
        tensor([0.5000, 0.9990])
    """

    def forward(self, raw: Tensor) -> TorchDistribution:
        """Continuous Bernoulli with natural parameters raw, shape (..., num_features)."""
        (natural,) = self._columns(raw)
        return dist.Independent(TiltedUniform(natural), 1)


class TiltedUniform(TorchDistribution):
    r"""The continuous Bernoulli distribution in its natural parameter, exact for every size of it.

    .. math:: p(x) = \frac{\eta}{e^\eta - 1} e^{\eta x}, \quad 0 \le x \le 1

    From the end it favours, it is an exponential distribution of rate :math:`|\eta|` cut off at one; the formulas use
    that away from zero, where nothing overflows or cancels, and a Taylor series near zero.

    Args:
        natural: natural parameter, any shape, which is the batch shape; events are numbers.
        validate_args: check the parameter and the values; None follows Pyro's setting.

    Example:
        >>> TiltedUniform(torch.tensor([0.0, 1000.0])).log_prob(torch.tensor(1.0))
        tensor([0.0000, 6.9078])
    """

    arg_constraints: ClassVar = {"natural": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, natural: Tensor, validate_args: bool | None = None) -> None:
        self.natural = natural
        super().__init__(natural.shape, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: TorchDistribution | None = None) -> TiltedUniform:
        """The same distribution with a larger batch shape."""
        return TiltedUniform(self.natural.expand(batch_shape), validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at value in nats; shape of value and the batch shape, broadcast."""
        if self._validate_args:
            self._validate_sample(value)
        near_zero = _near_zero(self.natural)
        centred = self.natural * (value - 0.5) - _series(_LOG_NORMALISER, self.natural)
        rate = self._rate()
        from_end = torch.where(self.natural > 0, 1 - value, value)
        truncated_exponential = rate.log() - rate * from_end - torch.log(-torch.expm1(-rate))
        return torch.where(near_zero, centred, truncated_exponential)

    @property
    def mean(self) -> Tensor:
        """Mean, between 0 and 1; the batch shape."""
        rate = self._rate()
        from_end = 1 / rate - 1 / torch.expm1(rate)
        centred = 0.5 + self.natural / 4 * _series(_SLOPE, self.natural)
        return torch.where(_near_zero(self.natural), centred, torch.where(self.natural > 0, 1 - from_end, from_end))

    @property
    def variance(self) -> Tensor:
        """Variance, at most 1/12; the batch shape."""
        rate = self._rate()
        exact = rate**-2 - torch.exp(-rate) / torch.expm1(-rate) ** 2
        return torch.where(_near_zero(self.natural), _series(_CURVATURE, self.natural) / 4, exact)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws by inversion, reparameterised; sample_shape before the batch shape."""
        uniform = self.natural.new_empty(self._extended_shape(sample_shape)).uniform_()
        # accurate down to the smallest rate, so no series is needed: near zero it is the identity
        rate = self.natural.abs().clamp(min=torch.finfo(self.natural.dtype).tiny)
        from_end = -torch.log1p(uniform * torch.expm1(-rate)) / rate
        return torch.where(self.natural > 0, 1 - from_end, from_end).clamp(0, 1)

    def _rate(self) -> Tensor:
        """The absolute natural parameter, with one where the series is used: a branch unused may not give NaN."""
        return torch.where(_near_zero(self.natural), 1.0, self.natural.abs())


def _near_zero(natural: Tensor) -> Tensor:
    return natural.abs() < 0.5


def _series(coefficients: tuple[float, ...], natural: Tensor) -> Tensor:
    """Power series in (natural / 2)**2, finite for any natural."""
    square = (natural.clamp(-0.5, 0.5) / 2) ** 2
    total = torch.zeros_like(square)
    for coefficient in reversed(coefficients):
        total = total * square + coefficient
    return total

"""Likelihoods of data that take separate values: bits, pixels with 256 levels, counts."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn.functional import softplus

from pyro_lvm.likelihoods.base import Likelihood, check_floor
from pyro_lvm.storage.classes import storable

__all__ = ["Bernoulli", "Categorical", "Poisson"]


@storable
class Bernoulli(Likelihood):
    r"""Ones and zeros.

    .. math:: p(x_d = 1 \mid r_d) = 1 / (1 + e^{-r_d})

    Raw: the logit of each feature. The mean is the probability of a one. Grey levels in [0, 1] are *not* binary data:
    the formula gives a number there, but no density; binarise them or take `ContinuousBernoulli`.

    Args:
        num_features: numbers per datum.

    Example:
        >>> Bernoulli(3)(torch.zeros(2, 3)).log_prob(torch.ones(2, 3)).exp()
        tensor([0.1250, 0.1250])
    """

    def forward(self, raw: Tensor) -> TorchDistribution:
        """Bernoulli with logits raw, shape (..., num_features)."""
        (logits,) = self._columns(raw)
        return dist.Independent(dist.Bernoulli(logits=logits), 1)


@storable
class Categorical(Likelihood):
    r"""Pixels (or other features) that take one of a few unordered integer values.

    .. math:: p(x_d = c \mid r_d) = e^{r_{dc}} / \sum_{c'} e^{r_{dc'}}, \quad c = 0, \dots, C - 1

    Raw: C logits per feature. x holds the integers 0 to C - 1, as floats or as integers; feed an encoder x / (C - 1).
    A draw is an int64 tensor. The mean is the expected value, in the units of x.

    Args:
        num_features: numbers per datum.
        num_categories: values a feature can take, C; 256 for a byte.

    Raises:
        ValueError: num_categories is below 2.

    Example:
        >>> Categorical(2, num_categories=4).mean(torch.zeros(1, 8))
        tensor([[1.5000, 1.5000]])
    """

    def __init__(self, num_features: int, num_categories: int = 256) -> None:
        super().__init__(num_features)
        if num_categories < 2:
            raise ValueError(f"num_categories must be at least 2, but got {num_categories}.")
        self.num_categories = self.num_parameters = num_categories

    def forward(self, raw: Tensor) -> TorchDistribution:
        """Categorical with logits raw, shape (..., num_features * num_categories)."""
        return dist.Independent(dist.Categorical(logits=self._columns(raw).movedim(0, -1)), 1)

    def mean(self, raw: Tensor) -> Tensor:
        """The expected integer of each feature, shape (..., num_features)."""
        probabilities = self._columns(raw).softmax(0).movedim(0, -1)
        return probabilities @ torch.arange(self.num_parameters, dtype=raw.dtype, device=raw.device)


@storable
class Poisson(Likelihood):
    r"""Counts.

    .. math:: p(x_d \mid r_d) = \lambda_d^{x_d} e^{-\lambda_d} / x_d!, \quad \lambda_d = \text{floor} +
        \text{softplus}(r_d)

    Raw: one number per feature. The rate grows linearly in it and not exponentially: one large output of an untrained
    decoder then costs a large loss, where exp overflows (from 89 on in float32) and a clamped exp has no gradient left
    to come back with. The floor keeps a count above zero from being impossible when the softplus underflows.

    Args:
        num_features: numbers per datum.
        floor: smallest rate allowed, in counts.

    Raises:
        ValueError: floor is not positive and finite.

    Example:
        >>> Poisson(1).mean(torch.tensor([[-1000.0], [1000.0]])).squeeze(-1)
        tensor([1.0000e-06, 1.0000e+03])
    """

    def __init__(self, num_features: int, floor: float = 1e-6) -> None:
        super().__init__(num_features)
        check_floor(floor)
        self.floor = floor

    def forward(self, raw: Tensor) -> TorchDistribution:
        """Poisson with raw rates raw, shape (..., num_features)."""
        (raw_rate,) = self._columns(raw)
        return dist.Independent(dist.Poisson(self.floor + softplus(raw_rate)), 1)

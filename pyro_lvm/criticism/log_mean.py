"""The log of a mean of weights, and how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Evidence", "LogMean", "joined"]


class Evidence(NamedTuple):
    """The evidence and how far to trust it; every field has shape (n,).

    Attributes:
        log_evidence: log p(x_i), nats per datum.
        standard_error: of ``log_evidence``, by the delta method; 0 where it is exact.
        effective_sample_size: (sum w)^2 / sum w^2, of ``num_samples``; infinite where it is exact.
    """

    log_evidence: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor


class LogMean:
    """Running log-mean of weights and of their squares, in double precision.

    Args:
        shape: of what is estimated.
    """

    def __init__(self, *shape: int) -> None:
        self._log_sum = torch.full(shape, -torch.inf, dtype=torch.float64)
        self._log_sum_of_squares = self._log_sum.clone()
        self._count = 0

    def add(self, log_weights: Tensor) -> None:
        """More log weights, shape (draws, *shape)."""
        log_weights = log_weights.double().cpu()
        self._log_sum = torch.logaddexp(self._log_sum, log_weights.logsumexp(0))
        self._log_sum_of_squares = torch.logaddexp(self._log_sum_of_squares, (2 * log_weights).logsumexp(0))
        self._count += len(log_weights)

    def result(self) -> Evidence:
        """The log of the mean, its standard error, and the effective sample size."""
        size = torch.exp(2 * self._log_sum - self._log_sum_of_squares).nan_to_num(nan=0.0)  # no draw had any weight
        variance = (1 / size - 1 / self._count).clamp(min=0.0)
        return Evidence(self._log_sum - math.log(self._count), variance.sqrt(), size)


def joined(parts: Sequence[Evidence], like: Tensor) -> Evidence:
    """The evidence of all rows, from that of some at a time; dtype and device of ``like``."""
    return Evidence(*(torch.cat(column).to(like) for column in zip(*parts, strict=True)))

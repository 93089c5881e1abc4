"""Scores of a density that charge for its parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["InformationCriteria"]


class InformationCriteria:
    """Akaike's and the Bayesian criterion of a module with ``log_prob`` and ``num_parameters``."""

    log_prob: Any
    num_parameters: Any

    @torch.no_grad()
    def aic(self, x: Tensor) -> float:
        """Akaike's criterion over all rows of x (n, D): -2 log-likelihood + 2 parameters, nats; smaller is better."""
        return float(-2 * self.log_prob(x).sum() + 2 * self.num_parameters)

    @torch.no_grad()
    def bic(self, x: Tensor) -> float:
        """Bayesian criterion over all rows of x (n, D): -2 log-likelihood + parameters log n, nats; smaller is better.

        mclust prints the negative.
        """
        return float(-2 * self.log_prob(x).sum() + self.num_parameters * math.log(len(x)))

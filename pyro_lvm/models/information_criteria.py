"""Scores of a density that charge for its parameters."""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["InformationCriteria"]


class InformationCriteria:
    """Akaike's and the Bayesian criterion of a module with ``log_prob`` and ``num_parameters``."""

    log_prob: Any
    num_parameters: Any

    @torch.no_grad()
    def aic(self, x: Any) -> float:
        """Akaike's criterion over all rows of x (any data): -2 log-likelihood + 2 parameters, nats; small is good."""
        return float(-2 * self.log_prob(x).sum() + 2 * self.num_parameters)

    @torch.no_grad()
    def bic(self, x: Any) -> float:
        """Bayesian criterion over all rows of x (any data): -2 log-likelihood + parameters log n, nats; small is good.

        mclust prints the negative.
        """
        log_prob = self.log_prob(x)
        return float(-2 * log_prob.sum() + self.num_parameters * math.log(len(log_prob)))

r"""The Pareto tail index of importance weights: whether the guide covers what the posterior covers.

.. math:: w_s = \frac{p(x, z_s)}{q(z_s \mid x)}, \quad z_s \sim q, \qquad P(w > t) \sim t^{-1/k}

The weights' tail is fitted by a generalised Pareto distribution. With k < 1/2 their variance is finite; above 0.7 the
number of draws that an estimate needs grows beyond reach, and the guide is no stand-in for the posterior. For
normal q and p with standard deviations s_q < s_p the index is :math:`k = 1 - s_q^2 / s_p^2`.

Source: Vehtari, Simpson, Gelman, Yao and Gabry, 2024, https://arxiv.org/abs/1507.02646; for variational guides: Yao,
Vehtari, Simpson and Gelman, 2018, https://arxiv.org/abs/1802.02538.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_lvm.to_arviz import pareto_k

__all__ = ["CONSTANT", "k_hat"]

CONSTANT = 1e-3
"""Weights that differ by less than this, in nats, are one weight: whatever their tail looks like is rounding, and with
them the variance of an estimate is below a millionth of its square."""


def k_hat(log_weights: Tensor) -> Tensor:
    """The tail index of each column of log-weights, by ArviZ.

    Args:
        log_weights: shape (num_draws, ...), nats, up to a constant in each column; at least 25 draws.

    Returns:
        Shape (...), float64. Where all weights are equal (the guide is the posterior) or the largest ones are (the
        weights take few values and are bounded) there is no tail to fit and importance sampling cannot fail for it:
        the index is 0. It is never NaN; it is infinite only where no draw has any weight.

    Raises:
        ValueError: if there are fewer than 25 draws: the tail, a fifth of them, must have five.
    """
    num_draws = len(log_weights)
    if num_draws < 25:
        raise ValueError(f"{num_draws} draws have no tail that could be fitted: a k-hat needs at least 25, better 1000")
    columns = log_weights.detach().double().cpu().reshape(num_draws, -1)
    columns = torch.where(columns.isnan(), -math.inf, columns)
    largest = columns.amax(0)
    found = torch.zeros(columns.shape[1], dtype=torch.float64)
    found[largest == -math.inf] = math.inf
    tail = math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))  # as many as ArviZ fits, or one more
    ordered = columns.sort(0).values
    # in the digits of the weights' own type, numbers of this size cannot be told apart any better
    rounding = 64 * torch.finfo(log_weights.dtype).eps * largest.abs().nan_to_num(posinf=0.0)
    varies = (largest > -math.inf) & (largest - columns.amin(0) > rounding.clamp_min(CONSTANT))
    steps = (ordered[-tail:] - ordered[-tail - 1 : -1] > 1e-12).sum(0)  # values that the tail takes
    fitted = varies & (steps >= 5)
    if bool(fitted.any()):
        shifted = (columns[:, fitted] - largest[fitted]).clamp_min(-700.0)  # exp of less is no number to ArviZ
        found[fitted] = torch.as_tensor(pareto_k(shifted.T.contiguous().numpy()))
    return found.reshape(log_weights.shape[1:])

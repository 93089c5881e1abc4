"""What amortised programs share: an encoder's Normal, a prior scale, and evaluation outside a fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_lvm.program import restore_mode, training_mode

__all__ = ["DiagonalNormal", "PriorScale", "evaluating", "matching", "require_columns"]

SCALE_FLOOR = 1e-5
"""An encoder's scale never reaches nought: its KL would be infinite."""


class DiagonalNormal(nn.Module):
    r"""A network read as a Normal: :math:`N(\mu, \operatorname{diag} \sigma^2)`, :math:`\sigma` = softplus(raw).

    Args:
        network: maps its inputs to (..., 2 * latent_dim): location, raw scale.
        latent_dim: L.
        name: what the user calls the network, for error messages.

    Raises:
        ValueError: when called, if the network's output has not 2 * latent_dim columns.
    """

    def __init__(self, network: nn.Module, latent_dim: int, name: str) -> None:
        super().__init__()
        self.network, self.latent_dim, self.name = network, latent_dim, name

    def forward(self, *inputs: Tensor) -> TorchDistribution:
        """The Normal, event shape (latent_dim,)."""
        return self.normal(self.network(*inputs))

    def normal(self, output: Tensor) -> TorchDistribution:
        """The Normal that the network's output stands for."""
        if output.shape[-1] != 2 * self.latent_dim:
            raise ValueError(
                f"{self.name} gave {output.shape[-1]} numbers per datum, but latent_dim={self.latent_dim} needs "
                f"{2 * self.latent_dim}: a location and a raw scale for each latent coordinate"
            )
        loc, raw_scale = output.chunk(2, -1)
        normal: TorchDistribution = dist.Normal(loc, softplus(raw_scale) + SCALE_FLOOR).to_event(1)
        return normal


class PriorScale(nn.Module):
    """The prior's scale: 1, or a positive parameter that starts there; shape ()."""

    log_scale: Tensor

    def __init__(self, learned: bool) -> None:
        super().__init__()
        if learned:
            self.log_scale = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("log_scale", torch.zeros(()))

    def reset_parameters(self) -> None:
        """Back to a scale of 1."""
        nn.init.zeros_(self.log_scale)

    def forward(self) -> Tensor:
        """The scale."""
        return self.log_scale.exp()


@contextmanager
def evaluating(module: nn.Module, seed: int | None = None) -> Iterator[None]:
    """No gradients, eval mode, and with a seed a random state of its own; all put back afterwards."""
    before = training_mode([module], False)
    try:
        with torch.no_grad(), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        restore_mode(before)


def matching(module: nn.Module, x: Any) -> Tensor:
    """``x``, a tensor, array or any data that ``x[:]`` makes a tensor, in the module's dtype and on its device."""
    reference = next(module.parameters())
    rows = x if isinstance(x, Tensor | np.ndarray) else x[:]
    return torch.as_tensor(rows).to(dtype=reference.dtype, device=reference.device)


def require_columns(x: Tensor | None, num_features: int) -> None:
    """Raise `ValueError` unless x has shape (rows, num_features)."""
    if x is not None and (x.dim() != 2 or x.shape[-1] != num_features):
        raise ValueError(
            f"data of shape {tuple(x.shape)} do not fit num_features={num_features}: pass rows of {num_features} "
            f"numbers, or make the model with num_features={x.shape[-1] if x.dim() > 1 else 1}"
        )

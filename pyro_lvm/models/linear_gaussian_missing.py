r"""Linear-Gaussian models of rows with missing values: the features that are there say all there is to say.

With :math:`o` the observed features of a row, :math:`r = \Psi_o^{-1/2}(x_o - \mu_o)` and
:math:`V = \Psi_o^{-1/2} W_o`,

.. math::
    M = I + V^\top V, \quad \hat z = M^{-1} V^\top r, \quad z \mid x_o \sim N(\hat z, M^{-1}), \qquad
    \log p(x_o) = -\tfrac12 \bigl[ |o| \log 2\pi + \log|\Psi_o| + \log|M| + \|r - V \hat z\|^2 + \|\hat z\|^2 \bigr]

NaN marks what is missing. A row that misses everything has the prior for its posterior and log density 0.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lvm.memory import require_room
from pyro_lvm.walk import FEWER_DRAWS

__all__ = ["impute_rows", "observed_log_density", "observed_posterior"]


def observed_posterior(x: Tensor, loadings: Tensor, mean: Tensor, noise_scale: Tensor) -> dist.MultivariateNormal:
    """Posterior of the factors given what is observed; its covariance differs between rows.

    Args:
        x: rows, shape (n, D), NaN where missing.
        loadings: shape (D, L).
        mean: shape (D,).
        noise_scale: standard deviations, shape (D,) or ().

    Returns:
        A normal with batch shape (n,) and event shape (L,).
    """
    residual, whitened = _whitened(x, loadings, mean, noise_scale)
    root, z = _condition(residual, whitened)
    return dist.MultivariateNormal(z, scale_tril=torch.linalg.cholesky(torch.cholesky_inverse(root)))


def observed_log_density(x: Tensor, loadings: Tensor, mean: Tensor, noise_scale: Tensor) -> Tensor:
    """Log density of the observed features of each row, shape (n,), nats; arguments as above."""
    residual, whitened = _whitened(x, loadings, mean, noise_scale)
    root, z = _condition(residual, whitened)
    left = residual - (whitened @ z.unsqueeze(-1)).squeeze(-1)
    seen = (~x.isnan()).to(x.dtype)
    constant = seen @ (noise_scale.log().expand(mean.shape) + 0.5 * math.log(2 * math.pi))
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (left.square().sum(-1) + z.square().sum(-1)) - constant - log_det


@torch.no_grad()
def impute_rows(
    x: Tensor,
    loadings: Tensor,
    mean: Tensor,
    noise_scale: Tensor,
    num_draws: int,
    generator: torch.Generator,
) -> Tensor:
    """Draws of the missing values given the others, shape (num_draws, n, D); arguments as above."""
    features, latent = loadings.shape
    require_room(
        num_draws * len(x) * (4 * features + 2 * latent) * x.element_size(),
        f"{num_draws} draws of {len(x)} rows",
        FEWER_DRAWS,
    )
    posterior = observed_posterior(x, loadings, mean, noise_scale)
    shape = (num_draws, len(x), latent + features)
    draws = torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
    for_z, noise = draws.split([latent, features], -1)
    z = posterior.loc + (posterior.scale_tril @ for_z.unsqueeze(-1)).squeeze(-1)
    return torch.where(x.isnan(), z @ loadings.mT + mean + noise_scale * noise, x)


def _whitened(x: Tensor, loadings: Tensor, mean: Tensor, noise_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals (n, D) and loadings (n, D, L) in units of the noise, noughts where nothing was observed."""
    seen = (~x.isnan()).to(x.dtype)
    residual = seen * (torch.where(x.isnan(), 0.0, x.nan_to_num(0.0)) - mean) / noise_scale
    return residual, seen.unsqueeze(-1) * (loadings / noise_scale.expand(mean.shape).unsqueeze(-1))


def _condition(residual: Tensor, whitened: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors (n, L, L) of the posterior precisions, and posterior means (n, L)."""
    identity = torch.eye(whitened.shape[-1], dtype=residual.dtype, device=residual.device)
    root = torch.linalg.cholesky(identity + whitened.mT @ whitened)
    return root, torch.cholesky_solve(whitened.mT @ residual.unsqueeze(-1), root).squeeze(-1)

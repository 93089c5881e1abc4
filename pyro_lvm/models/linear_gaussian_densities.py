r"""Closed forms of linear-Gaussian models, as pure functions: the density of the data, the posterior of the factors.

.. math:: z \sim N(0, I_L), \quad x \mid z \sim N(W z + \mu, \Psi), \qquad x \sim N(\mu, W W^\top + \Psi)
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["condition", "marginal_log_density", "posterior_given"]


def posterior_given(x: Tensor, loadings: Tensor, mean: Tensor, noise_scale: Tensor) -> dist.MultivariateNormal:
    r"""Exact posterior of the factors of a linear-Gaussian model; its covariance is the same for every row.

    .. math:: z \mid x \sim N(M^{-1} W^\top \Psi^{-1} (x - \mu),\; M^{-1}), \qquad M = I_L + W^\top \Psi^{-1} W

    Args:
        x: rows, shape (n, D).
        loadings: :math:`W`, shape (D, L).
        mean: :math:`\mu`, shape (D,).
        noise_scale: standard deviations :math:`\Psi^{1/2}`, shape (D,) or ().

    Returns:
        A normal with batch shape (n,) and event shape (L,).
    """
    precision_root, loc = condition(*_whiten(x, loadings, mean, noise_scale))
    # L L^T = M gives M^{-1} = L^{-T} L^{-1}, whose lower factor is that of the explicit inverse
    return dist.MultivariateNormal(loc, scale_tril=torch.linalg.cholesky(torch.cholesky_inverse(precision_root)))


def marginal_log_density(x: Tensor, loadings: Tensor, mean: Tensor, noise_scale: Tensor) -> Tensor:
    r"""Exact log density of the rows with the factors integrated out, by Woodbury's identity.

    .. math::
        \log p(x) = -\tfrac12 \bigl[ D \log 2\pi + \log|\Psi| + \log|M| + \|r - V \hat z\|^2 + \|\hat z\|^2 \bigr],
        \quad r = \Psi^{-1/2}(x - \mu),\; V = \Psi^{-1/2} W,\; M = I_L + V^\top V,\; \hat z = M^{-1} V^\top r

    The two squares replace the textbook difference :math:`r^\top r - \hat z^\top M \hat z`, which cancels when the
    noise is small. Costs O(n D L), no D x D matrix is ever formed.

    Args:
        x: rows, shape (n, D).
        loadings: :math:`W`, shape (D, L).
        mean: :math:`\mu`, shape (D,).
        noise_scale: standard deviations :math:`\Psi^{1/2}`, shape (D,) or ().

    Returns:
        Nats per datum, shape (n,).
    """
    residual, whitened_loadings = _whiten(x, loadings, mean, noise_scale)
    precision_root, z = condition(residual, whitened_loadings)
    square = (residual - z @ whitened_loadings.mT).square().sum(-1) + z.square().sum(-1)
    log_noise = noise_scale.log().expand(mean.shape).sum()
    return -0.5 * (square + mean.shape[-1] * math.log(2 * math.pi)) - log_noise - precision_root.diagonal().log().sum()


def _whiten(x: Tensor, loadings: Tensor, mean: Tensor, noise_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals (n, D) and loadings (D, L) in units of the noise."""
    return (x - mean) / noise_scale, loadings / noise_scale.expand(mean.shape).unsqueeze(-1)


def condition(residual: Tensor, whitened_loadings: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor (L, L) of the posterior precision and posterior means (n, L), both in units of the noise."""
    identity = torch.eye(whitened_loadings.shape[-1], dtype=residual.dtype, device=residual.device)
    precision_root = torch.linalg.cholesky(identity + whitened_loadings.mT @ whitened_loadings)
    return precision_root, torch.cholesky_solve((residual @ whitened_loadings).mT, precision_root).mT

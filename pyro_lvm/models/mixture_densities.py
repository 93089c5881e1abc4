r"""Closed forms of a Gaussian mixture, as pure functions that broadcast over draws of its parameters.

.. math::
    p(x) = \sum_{k=1}^K \pi_k \, \mathcal{N}(x \mid \mu_k, \Sigma_k), \qquad
    p(k \mid x) = \frac{\pi_k \, \mathcal{N}(x \mid \mu_k, \Sigma_k)}{p(x)}

Shapes, for data ``x`` of shape (n, D) and any leading shape ``...`` of parameter draws (none for one value):

============= ================ ===================== ==========================================
covariance    scale            shape                 Sigma_k
============= ================ ===================== ==========================================
"full"        Cholesky factors (..., K, D, D)        scale[k] @ scale[k].T
"tied"        Cholesky factor  (..., D, D)           scale @ scale.T, the same for all k
"diag"        std deviations   (..., K, D)           diag(scale[k] ** 2)
"spherical"   std deviations   (..., K)              scale[k] ** 2 times the identity
============= ================ ===================== ==========================================

All densities are in nats per datum, all keep gradients.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "COVARIANCES",
    "Covariance",
    "covariances_from_scale",
    "mixture_log_joint",
]

Covariance = Literal["full", "tied", "diag", "spherical"]
COVARIANCES: tuple[str, ...] = get_args(Covariance)


def covariances_from_scale(scale: Tensor, covariance: Covariance) -> Tensor:
    """Covariances in scikit-learn's shapes: (..., K, D, D), (..., D, D), (..., K, D) or (..., K)."""
    return scale @ scale.mT if covariance in ("full", "tied") else scale.square()


def _component_log_density(x: Tensor, locs: Tensor, scale: Tensor, covariance: Covariance) -> Tensor:
    """Log N(x_i | mu_k, Sigma_k), shape (..., n, K)."""
    deviation = x - locs.unsqueeze(-2)  # (..., K, n, D)
    num_features = x.shape[-1]
    if covariance in ("full", "tied"):
        factor = scale.unsqueeze(-3) if covariance == "tied" else scale
        whitened = torch.linalg.solve_triangular(factor, deviation.mT, upper=False)  # (..., K, D, n)
        squared_distance = whitened.square().sum(-2)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    else:
        per_feature = scale.unsqueeze(-1).expand_as(locs) if covariance == "spherical" else scale
        squared_distance = (deviation / per_feature.unsqueeze(-2)).square().sum(-1)
        log_det = per_feature.log().sum(-1)
    log_density: Tensor = -0.5 * (squared_distance + num_features * math.log(2 * math.pi)) - log_det.unsqueeze(-1)
    return log_density.mT


def mixture_log_joint(x: Tensor, weights: Tensor, locs: Tensor, scale: Tensor, covariance: Covariance) -> Tensor:
    r"""Joint density of a datum and its label, :math:`\log \pi_k + \log \mathcal{N}(x_i \mid \mu_k, \Sigma_k)`.

    Args:
        x: data, shape (n, D).
        weights: mixing weights, shape (..., K).
        locs: component means, shape (..., K, D).
        scale: see the table at the top of this module.
        covariance: which row of that table.

    Returns:
        Shape (..., n, K), nats per datum. A weight of exactly 0 gives -inf in its column. Its logsumexp over the last
        axis is the evidence log p(x_i), its softmax Bayes' rule.

    Example:
        >>> import torch
        >>> weights, locs, scale = torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.ones(2)
        >>> log_joint = mixture_log_joint(torch.zeros(1, 1), weights, locs, scale, "spherical")
        >>> round(log_joint.logsumexp(-1).item(), 4)
        -1.4189
    """
    return weights.log().unsqueeze(-2) + _component_log_density(x, locs, scale, covariance)

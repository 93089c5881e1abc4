r"""The conjugate prior of a mixture, for closed forms: its density, and the mode of its posterior.

Densities are over weights, means and covariances (variances, where features are independent). A mode depends on what it
is a mode over: that of the Cholesky factor, the site of the program, lies elsewhere by a share of order 1/(nu + N).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_lvm.exact import Parameters
from pyro_lvm.models.mixture_densities import Covariance
from pyro_lvm.priors import NormalInverseWishart

__all__ = ["log_prior", "posterior_mode"]


def posterior_mode(
    counts: Tensor, means: Tensor, scatters: Tensor, prior: NormalInverseWishart, covariance: Covariance
) -> Parameters:
    """The joint mode of weights, means and covariances given weighted rows.

    Args:
        counts: rows by component, (K,).
        means: their means, (K, D).
        scatters: sums of squares about the means, (K, D, D), or (K, D) where features are independent.
        prior: the prior.
        covariance: "full", "tied", "diag" or "spherical".

    Raises:
        ValueError: if the concentration is below one, where the density has no mode inside.
    """
    concentration = torch.as_tensor(prior.concentration, dtype=counts.dtype, device=counts.device).expand_as(counts)
    if not bool((concentration >= 1).all()):
        raise ValueError(
            f"prior.concentration is {float(concentration.min()):g}: below 1 the density of the weights is infinite "
            "where one is nought, and has no mode. Use a concentration of 1 or more, or lvm.coordinate_ascent"
        )
    weights = counts + concentration - 1
    precision, nu, features = prior.mean_precision, prior.degrees_of_freedom, means.shape[-1]
    center, psi = prior.mean.to(means), prior.scale_matrix.to(means)
    locs = (counts.unsqueeze(-1) * means + precision * center) / (counts.unsqueeze(-1) + precision)
    offset, shrink = means - center, precision * counts / (precision + counts)
    if covariance in ("full", "tied"):
        each = scatters + shrink[:, None, None] * offset.unsqueeze(-1) * offset.unsqueeze(-2)
        if covariance == "full":
            spread = (psi + each) / (nu + counts + features + 2)[:, None, None]
        else:
            spread = (psi + each.sum(0)) / (nu + features + 1 + len(counts) + counts.sum())
    else:
        each = scatters + shrink.unsqueeze(-1) * offset.square()
        degrees = prior.variance_degrees_of_freedom
        if covariance == "diag":
            spread = (psi.diagonal() + each) / (degrees + 3 + counts).unsqueeze(-1)
        else:
            spread = (psi.diagonal().mean() + each.sum(-1)) / (degrees + 2 + features + features * counts)
    return {"weights": weights / weights.sum(), "locs": locs, "covariances": spread}


def log_prior(parameters: Parameters, prior: NormalInverseWishart, covariance: Covariance) -> Tensor:
    """Log density of weights, means and covariances, nats."""
    weights, locs, covariances = (parameters[name] for name in ("weights", "locs", "covariances"))
    concentration = torch.as_tensor(prior.concentration, dtype=weights.dtype, device=weights.device)
    concentration = concentration.expand_as(weights)
    log_density: Tensor = torch.lgamma(concentration.sum()) - torch.lgamma(concentration).sum()
    log_density = log_density + torch.xlogy(concentration - 1, weights).sum()
    offset, features = locs - prior.mean.to(locs), locs.shape[-1]
    precision, psi = prior.mean_precision, prior.scale_matrix.to(locs)
    constant = 0.5 * features * math.log(precision / (2 * math.pi))
    if covariance in ("full", "tied"):
        factor = torch.linalg.cholesky(covariances)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_density = log_density + _inverse_wishart(factor, log_det, psi, prior.degrees_of_freedom).sum()
        each = factor.expand(len(locs), features, features)
        distance = torch.linalg.solve_triangular(each, offset.unsqueeze(-1), upper=False).square().sum((-2, -1))
        of_means: Tensor = (constant - 0.5 * log_det - 0.5 * precision * distance).sum()
        return log_density + of_means
    scale = psi.diagonal() if covariance == "diag" else psi.diagonal().mean()
    shape = covariances.new_tensor(prior.variance_degrees_of_freedom / 2)
    log_density = log_density + torch.distributions.InverseGamma(shape, scale / 2).log_prob(covariances).sum()
    variances = covariances if covariance == "diag" else covariances.unsqueeze(-1).expand_as(locs)
    distance = (offset.square() / variances).sum(-1)
    of_means = (constant - 0.5 * variances.log().sum(-1) - 0.5 * precision * distance).sum()
    return log_density + of_means


def _inverse_wishart(factor: Tensor, log_det: Tensor, psi: Tensor, degrees_of_freedom: float) -> Tensor:
    features = psi.shape[-1]
    half = psi.new_tensor(degrees_of_freedom / 2)
    trace: Tensor = torch.cholesky_solve(psi.expand_as(factor), factor).diagonal(dim1=-2, dim2=-1).sum(-1)
    log_constant = half * (torch.logdet(psi) - features * math.log(2.0)) - torch.mvlgamma(half, features)
    return log_constant - 0.5 * (degrees_of_freedom + features + 1) * log_det - 0.5 * trace

r"""A Gaussian mixture of rows with missing values: what is not there is integrated out, component by component.

A normal restricted to the observed features o is normal again, and so is what is missing given them:

.. math::
    p(x_o \mid k) = \mathcal{N}(x_o \mid \mu_o, \Sigma_{oo}), \qquad
    x_m \mid x_o, k \sim \mathcal{N}\bigl(\mu_m + \Sigma_{mo} \Sigma_{oo}^{-1} (x_o - \mu_o),\;
    \Sigma_{mm} - \Sigma_{mo} \Sigma_{oo}^{-1} \Sigma_{om}\bigr)

NaN marks what is missing. Rows that miss the same features share their matrices, of which there are as many as patterns
among the rows; a row that misses everything has log density 0 and the component itself for its conditional. Little and
Rubin (2019), Statistical Analysis with Missing Data, https://doi.org/10.1002/9781119482260, chapter 11.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lvm.memory import require_room
from pyro_lvm.models.mixture_densities import Covariance
from pyro_lvm.walk import FEWER_DRAWS

__all__ = ["Conditionals", "conditionals", "impute_rows", "observed_log_joint"]

_ROWS_AT_ONCE = 2048  # each row has a D x D matrix for every component


@dataclass(frozen=True)
class Conditionals:
    """Every row under every component, given the values that are there.

    Attributes:
        log_density: of the observed values, (n, K), nats.
        deviation: expected x - mu_k, (n, K, D); the observed part is as observed.
        pattern: which pattern of missing features a row has, (n,).
        covariance: of the missing values, noughts elsewhere: (P, K, D, D), or the diagonal (P, K, D) where features
            are independent within a component.
    """

    log_density: Tensor
    deviation: Tensor
    pattern: Tensor
    covariance: Tensor


def conditionals(x: Tensor, locs: Tensor, scale: Tensor, covariance: Covariance) -> Conditionals:
    """Condition on what is observed.

    Args:
        x: rows, shape (n, D), NaN where missing.
        locs: component means, shape (K, D).
        scale: as in `mixture_densities`.
        covariance: which row of the table there.
    """
    missing = x.isnan()
    patterns, pattern = torch.unique(missing, dim=0, return_inverse=True)
    deviation = torch.where(missing, 0.0, x.nan_to_num(0.0)).unsqueeze(-2) - locs  # (n, K, D)
    deviation = torch.where(missing.unsqueeze(-2), 0.0, deviation)
    observed_constant = 0.5 * math.log(2 * math.pi) * (~missing).to(x.dtype).sum(-1, keepdim=True)
    if covariance in ("diag", "spherical"):
        deviations = scale.unsqueeze(-1).expand_as(locs) if covariance == "spherical" else scale
        standardised = deviation / deviations
        log_det = (~missing).to(x.dtype) @ deviations.log().mT
        log_density = -0.5 * standardised.square().sum(-1) - log_det - observed_constant
        return Conditionals(log_density, deviation, pattern, patterns.unsqueeze(-2) * deviations.square())
    factor = scale.expand(len(locs), *scale.shape[-2:])
    sigma = factor @ factor.mT
    seen = (~patterns).to(x.dtype)
    both_seen = (seen.unsqueeze(-1) * seen.unsqueeze(-2)).unsqueeze(1)  # (P, 1, D, D)
    # the identity in the place of what is missing: it adds nothing to determinant or distance
    restricted = torch.linalg.cholesky(both_seen * sigma + (1 - seen).diag_embed().unsqueeze(1))
    log_det = restricted.diagonal(dim1=-2, dim2=-1).log().sum(-1)[pattern]
    whitened = torch.linalg.solve_triangular(restricted[pattern], deviation.unsqueeze(-1), upper=False).squeeze(-1)
    log_density = -0.5 * whitened.square().sum(-1) - log_det - observed_constant
    # regression of all features on the observed ones: the identity on these
    from_seen = both_seen * torch.cholesky_inverse(restricted)
    unseen = (1 - seen)[:, None, :, None]
    regression = unseen * (sigma @ from_seen)
    expected = deviation + (regression[pattern] @ deviation.unsqueeze(-1)).squeeze(-1)
    both_unseen = unseen * unseen.mT
    return Conditionals(log_density, expected, pattern, both_unseen * (sigma - regression @ sigma))


def observed_log_joint(x: Tensor, weights: Tensor, locs: Tensor, scale: Tensor, covariance: Covariance) -> Tensor:
    """Log of pi_k N(x_o | mu_k, Sigma_k) over the observed features, shape (n, K), nats per datum."""
    blocks = [conditionals(block, locs, scale, covariance).log_density for block in x.split(_ROWS_AT_ONCE)]
    return weights.log() + torch.cat(blocks)


@torch.no_grad()
def impute_rows(
    x: Tensor,
    weights: Tensor,
    locs: Tensor,
    scale: Tensor,
    covariance: Covariance,
    num_draws: int,
    generator: torch.Generator,
) -> Tensor:
    """Draws of the missing values given the others, shape (num_draws, n, D)."""
    features = x.shape[-1]
    squares = 0 if covariance in ("diag", "spherical") else 3 * min(len(x), _ROWS_AT_ONCE) * features**2
    require_room(
        num_draws * (2 * x.numel() + squares) * x.element_size(), f"{num_draws} draws of {len(x)} rows", FEWER_DRAWS
    )
    drawn = []
    for block in x.split(_ROWS_AT_ONCE):
        found = conditionals(block, locs, scale, covariance)
        responsibilities = (weights.log() + found.log_density).softmax(-1)
        component = torch.multinomial(responsibilities, num_draws, replacement=True, generator=generator).mT
        row = torch.arange(len(block), device=x.device).expand(num_draws, -1)
        noise = torch.randn((*component.shape, x.shape[-1]), generator=generator, dtype=x.dtype, device=x.device)
        spread = found.covariance[found.pattern.expand(num_draws, -1), component]
        if covariance in ("diag", "spherical"):
            offset = spread.sqrt() * noise
        else:
            # noughts in the rows and columns of what was observed: a factor from eigenvectors takes them
            values, vectors = torch.linalg.eigh(spread)
            scaled = values.clamp_min(0).sqrt() * noise
            offset = (vectors @ scaled.unsqueeze(-1)).squeeze(-1)
        drawn.append(torch.where(block.isnan(), locs[component] + found.deviation[row, component] + offset, block))
    return torch.cat(drawn, 1)

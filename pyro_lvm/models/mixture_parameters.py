r"""The free parameters of a maximum-likelihood mixture, in coordinates in which one step size suits all data.

Every component is written relative to where it started, :math:`(m_k, W_k)`, with :math:`W_k W_k^\top` its first
covariance:

.. math::
    \pi = \mathrm{softmax}(a), \qquad \mu_k = m_k + W_k \delta_k, \qquad
    \Sigma_k = (W_k C_k)(W_k C_k)^\top + r I

with :math:`C_k` lower triangular and its diagonal in logarithms. In these coordinates the curvature of the likelihood
is of order one in every direction, whatever the units of the data and however stretched the clusters: Adam's steps of
1e-2 are one hundredth of a cluster's own standard deviation. The floor :math:`r` (``reg_covar``, in squared units of
the data, as in scikit-learn) bounds the likelihood, which without it is infinite (a component that sits on one datum).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_lvm.models.mixture_densities import Covariance

__all__ = ["MixtureParameters", "scale_shape"]


def scale_shape(covariance: Covariance, num_components: int, num_features: int) -> tuple[int, ...]:
    """Shape of the scale parameter, which is also the shape of the covariances."""
    shapes: dict[str, tuple[int, ...]] = {
        "full": (num_components, num_features, num_features),
        "tied": (num_features, num_features),
        "diag": (num_components, num_features),
        "spherical": (num_components,),
    }
    return shapes[covariance]


class MixtureParameters(nn.Module):
    """Unconstrained parameters of K Gaussians and the affine maps that make them dimensionless.

    Args:
        num_components: K.
        num_features: D.
        covariance: "full", "tied", "diag" or "spherical".
        reg_covar: the floor r, added to every variance; squared units of the data.
    """

    origin: Tensor
    whitener: Tensor

    def __init__(self, num_components: int, num_features: int, covariance: Covariance, reg_covar: float) -> None:
        super().__init__()
        self.covariance: Covariance = covariance
        self.reg_covar = reg_covar
        shape = scale_shape(covariance, num_components, num_features)
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.shifts = nn.Parameter(torch.zeros(num_components, num_features))
        self.spread = nn.Parameter(torch.zeros(shape))
        self.register_buffer("origin", torch.zeros(num_components, num_features))
        self.register_buffer("whitener", torch.zeros(shape))
        self.reset()

    @property
    def weights(self) -> Tensor:
        """Mixing weights, shape (K,)."""
        return self.logits.softmax(-1)

    @property
    def locs(self) -> Tensor:
        """Component means, shape (K, D), in units of the data."""
        if self.covariance in ("full", "tied"):
            return self.origin + (self.whitener @ self.shifts.unsqueeze(-1)).squeeze(-1)
        per_feature = self.whitener.unsqueeze(-1) if self.covariance == "spherical" else self.whitener
        return self.origin + per_feature * self.shifts

    @property
    def scale(self) -> Tensor:
        """Cholesky factors or standard deviations, floor included; shape as in `mixture_densities`."""
        if self.covariance in ("full", "tied"):
            log_diagonal = self.spread.diagonal(dim1=-2, dim2=-1)
            factor = self.whitener @ (self.spread.tril(-1) + log_diagonal.exp().diag_embed())
            return _cholesky_with_floor(factor, self.reg_covar)
        return ((self.whitener * self.spread.exp()).square() + self.reg_covar).sqrt()

    @torch.no_grad()
    def set_natural(self, weights: Tensor, locs: Tensor, covariances: Tensor) -> None:
        """Start from these values: they become the new origin of the coordinates.

        Args:
            weights: shape (K,), not negative, sum one.
            locs: shape (K, D).
            covariances: shape of :func:`scale_shape`, every variance at least the floor.

        Raises:
            ValueError: if a shape does not fit, the weights do not sum to one, or a variance is below the floor.
        """
        self._check_natural(weights, locs, covariances)
        covariances = covariances.detach().cpu().double()  # K small matrices: full precision costs nothing here
        if self.covariance in ("full", "tied"):
            identity = torch.eye(covariances.shape[-1], dtype=torch.float64)
            values, vectors = torch.linalg.eigh(covariances)
            whitener = _cholesky_with_floor(vectors * values.clamp_min(0).sqrt().unsqueeze(-2), self.reg_covar)
            root = self._without_floor(values).sqrt()
            above_floor = _cholesky_with_floor(vectors * root.unsqueeze(-2), 0.0)
            relative = torch.linalg.solve_triangular(whitener, above_floor, upper=False)
            log_diagonal = relative.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).log()
            spread = relative.tril(-1) + log_diagonal.unsqueeze(-1) * identity
        else:
            whitener = covariances.clamp_min(self.reg_covar).sqrt()
            spread = (self._without_floor(covariances).sqrt() / whitener).log()
        self.logits.copy_(weights.clamp_min(torch.finfo(self.logits.dtype).tiny).log())
        self.shifts.zero_()
        self.spread.copy_(spread)
        self.origin.copy_(locs)
        self.whitener.copy_(whitener)

    def _check_natural(self, weights: Tensor, locs: Tensor, covariances: Tensor) -> None:
        given = {"weights": weights, "locs": locs, "covariances": covariances}
        wanted = {"weights": self.logits.shape, "locs": self.origin.shape, "covariances": self.spread.shape}
        for name, value in given.items():
            if value.shape != wanted[name]:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; this {self.covariance!r} mixture of {len(self.logits)} "
                    f"components in {self.origin.shape[1]} dimensions needs {tuple(wanted[name])}."
                )
        total = weights.sum().item()
        if bool((weights < 0).any()) or not abs(total - 1) < 1e-4:
            raise ValueError(f"weights must not be negative and must sum to one; they are {weights.tolist()}.")
        is_matrix = self.covariance in ("full", "tied")
        smallest = (torch.linalg.eigvalsh(covariances) if is_matrix else covariances).min().item()
        rounding = 8 * torch.finfo(covariances.dtype).eps * covariances.abs().max().item()
        if not smallest >= self.reg_covar * (1 - 1e-6) - rounding or smallest <= -rounding:
            raise ValueError(
                f"covariances has a variance of {smallest:.3g} in some direction, below reg_covar={self.reg_covar:.3g},"
                f" which every variance of this mixture includes: add reg_covar to them, or build the mixture with a "
                f"smaller one."
            )

    def _without_floor(self, variances: Tensor) -> Tensor:
        # A variance at the floor would need a logarithm of zero: one part in 10^10 of it stays free to grow again.
        return (variances - self.reg_covar).clamp_min(1e-10 * self.reg_covar + torch.finfo(variances.dtype).tiny)

    @torch.no_grad()
    def reset(self) -> None:
        """Equal weights, unit covariances, and means that differ: K equal components would stay equal for ever."""
        generator = torch.Generator().manual_seed(0)
        locs = torch.randn(self.origin.shape, generator=generator, dtype=torch.float64).to(self.origin.device)
        unit = torch.ones_like(self.spread)
        if self.covariance in ("full", "tied"):
            unit = torch.eye(self.spread.shape[-1], dtype=unit.dtype, device=unit.device).expand_as(unit)
        self.set_natural(torch.full_like(self.logits, 1 / len(self.logits)), locs, (1 + self.reg_covar) * unit)


def _cholesky_with_floor(factor: Tensor, floor: float) -> Tensor:
    """Cholesky factor of ``factor @ factor.mT + floor * I``, shape (..., D, D).

    By QR of the stacked square roots: the sum itself, whose condition number is the square of theirs, is never formed,
    so collinear features and float32 cannot make it fail.
    """
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    rows = torch.cat([factor.mT, (floor**0.5 * identity).expand_as(factor)], -2)
    upper = torch.linalg.qr(rows).R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(factor.dtype)
    lower = (upper * sign.unsqueeze(-1)).mT
    # Every diagonal entry is at least sqrt(floor); rounding may say otherwise by one part in the precision.
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    return torch.tril(lower, -1) + torch.diag_embed(diagonal.clamp_min(floor**0.5))

"""Synthetic data drawn from models whose every parameter and latent is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "GaussianMixtureData",
    "LinearGaussianData",
    "make_factor_analysis",
    "make_gaussian_mixture",
    "make_ppca",
]


@dataclass(frozen=True, eq=False)
class GaussianMixtureData:
    """Draws of a Gaussian mixture and the truth behind them, all float64 but the labels.

    Attributes:
        x: data, shape (n, num_features).
        component: which component each row comes from, int64, shape (n,).
        weights: shape (num_components,), sums to one.
        locs: means, shape (num_components, num_features).
        covariances: covariance matrices, shape (num_components, num_features, num_features), whatever their type.
    """

    x: Tensor
    component: Tensor
    weights: Tensor
    locs: Tensor
    covariances: Tensor


@dataclass(frozen=True, eq=False)
class LinearGaussianData:
    """Draws of a linear Gaussian model and the truth behind them, all float64.

    Attributes:
        x: data, shape (n, num_features).
        z: latents, shape (n, latent_dim).
        loadings: the matrix W, shape (num_features, latent_dim); identified only up to a rotation.
        loc: mean of the data, shape (num_features,).
        noise: standard deviation of the noise of each feature, shape (num_features,); for PPCA all are equal.
    """

    x: Tensor
    z: Tensor
    loadings: Tensor
    loc: Tensor
    noise: Tensor

    @property
    def covariance(self) -> Tensor:
        r"""The covariance of a datum, :math:`W W^T + \text{diag}(\sigma^2)`, which *is* identified; shape (D, D)."""
        return self.loadings @ self.loadings.T + torch.diag(self.noise**2)


def make_gaussian_mixture(
    n: int,
    num_components: int,
    num_features: int,
    covariance: Literal["full", "tied", "diag", "spherical"] = "full",
    separation: float = 4.0,
    seed: int = 0,
) -> GaussianMixtureData:
    r"""Draw from a Gaussian mixture whose parameters are drawn first.

    .. math:: k_n \sim \text{Categorical}(\pi), \quad x_n \mid k_n \sim N(\mu_{k_n}, \Sigma_{k_n})

    :math:`\pi \sim \text{Dirichlet}(10)`, so that no component is rare; :math:`\mu_k \sim N(0, s^2 I)` with s =
    `separation`; standard deviations uniform on [0.5, 1.5], along randomly turned axes for "full" and "tied".

    Args:
        n: number of rows.
        num_components: number of components, K.
        num_features: numbers per row, D.
        covariance: "full", one matrix per component; "tied", one matrix for all; "diag"; "spherical".
        separation: standard deviation of the means; a typical standard deviation within a component is one.
        seed: seed of parameters and data.

    Raises:
        ValueError: a size is below 1, separation is negative, or covariance is unknown.

    Example:
        >>> data = make_gaussian_mixture(100, num_components=3, num_features=2, seed=0)
        >>> data.x.shape, data.covariances.shape
        (torch.Size([100, 2]), torch.Size([3, 2, 2]))
    """
    _check_sizes(n=n, num_components=num_components, num_features=num_features)
    if separation < 0:
        raise ValueError(f"separation must not be negative, but got {separation}.")
    generator = np.random.default_rng(seed)
    matrices = 1 if covariance == "tied" else num_components
    match covariance:
        case "full" | "tied":
            axes = np.linalg.qr(generator.standard_normal((matrices, num_features, num_features)))[0]
            factors = axes * generator.uniform(0.5, 1.5, (matrices, 1, num_features))
        case "diag":
            factors = np.eye(num_features) * generator.uniform(0.5, 1.5, (matrices, 1, num_features))
        case "spherical":
            factors = np.eye(num_features) * generator.uniform(0.5, 1.5, (matrices, 1, 1))
        case _:
            raise ValueError(f"covariance must be 'full', 'tied', 'diag' or 'spherical', but got {covariance!r}.")
    factors = np.broadcast_to(factors, (num_components, num_features, num_features))
    weights = generator.dirichlet(np.full(num_components, 10.0))
    locs = separation * generator.standard_normal((num_components, num_features))
    component = generator.choice(num_components, size=n, p=weights)
    x = locs[component] + np.einsum("nij,nj->ni", factors[component], generator.standard_normal((n, num_features)))
    covariances = factors @ factors.transpose(0, 2, 1)
    return GaussianMixtureData(*map(torch.from_numpy, (x, component, weights, locs, covariances)))


def make_ppca(n: int, num_features: int, latent_dim: int, noise: float = 0.5, seed: int = 0) -> LinearGaussianData:
    r"""Draw from probabilistic PCA with loadings and mean drawn from N(0, 1).

    .. math:: z_n \sim N(0, I_L), \quad x_n \mid z_n \sim N(W z_n + \mu, \sigma^2 I_D)

    Args:
        n: number of rows.
        num_features: numbers per row, D.
        latent_dim: latent coordinates, L.
        noise: standard deviation of the noise, in the units of x.
        seed: seed of parameters and data.

    Raises:
        ValueError: a size is below 1, or noise is not positive.

    Source: Tipping and Bishop (1999), https://doi.org/10.1111/1467-9868.00196.

    Example:
        >>> make_ppca(100, num_features=5, latent_dim=2, noise=0.1, seed=0).noise
        tensor([0.1000, 0.1000, 0.1000, 0.1000, 0.1000], dtype=torch.float64)
    """
    return _linear_gaussian(n, num_features, latent_dim, (noise, noise), seed)


def make_factor_analysis(
    n: int, num_features: int, latent_dim: int, noise: tuple[float, float] = (0.2, 2.0), seed: int = 0
) -> LinearGaussianData:
    r"""Draw from factor analysis: as `make_ppca`, but every feature has a noise of its own.

    .. math:: z_n \sim N(0, I_L), \quad x_n \mid z_n \sim N(W z_n + \mu, \text{diag}(\sigma_1^2, \dots, \sigma_D^2))

    Args:
        n: number of rows.
        num_features: numbers per row, D.
        latent_dim: latent coordinates, L.
        noise: smallest and largest standard deviation of the noise, between which those of the features are drawn
            uniformly in their logarithm; in the units of x.
        seed: seed of parameters and data.

    Raises:
        ValueError: a size is below 1, or not 0 < noise[0] <= noise[1].

    Source: Rubin and Thayer (1982), https://doi.org/10.1007/BF02293851.

    Example:
        >>> make_factor_analysis(100, num_features=5, latent_dim=2, seed=0).x.shape
        torch.Size([100, 5])
    """
    return _linear_gaussian(n, num_features, latent_dim, noise, seed)


def _linear_gaussian(
    n: int, num_features: int, latent_dim: int, noise: tuple[float, float], seed: int
) -> LinearGaussianData:
    _check_sizes(n=n, num_features=num_features, latent_dim=latent_dim)
    low, high = noise
    if not 0 < low <= high < np.inf:
        raise ValueError(
            f"noise must be positive and finite (the smaller standard deviation first), but got {low} and {high}."
        )
    generator = np.random.default_rng(seed)
    loadings = generator.standard_normal((num_features, latent_dim))
    loc = generator.standard_normal(num_features)
    scale = low * (high / low) ** generator.uniform(size=num_features)
    z = generator.standard_normal((n, latent_dim))
    x = z @ loadings.T + loc + scale * generator.standard_normal((n, num_features))
    return LinearGaussianData(*map(torch.from_numpy, (x, z, loadings, loc, scale)))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, but got {size}.")

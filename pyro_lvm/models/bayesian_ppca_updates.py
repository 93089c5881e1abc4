r"""Coordinate ascent's updates of Bayesian PPCA: the data enter through their mean and scatter matrix alone.

With u the data in standardised units, :math:`\bar\alpha, \bar\tau` means of q, :math:`M` the mean of W,
:math:`\Sigma_w` the covariance of each of its rows (Bishop, 1999, Variational principal components,
https://www.microsoft.com/en-us/research/publication/variational-principal-components/):

.. math::
    q(z_n) &= N(\bar\tau \, \Sigma_z M^\top (u_n - m),\, \Sigma_z), \quad
        \Sigma_z^{-1} = I + \bar\tau (M^\top M + D \Sigma_w) \\
    q(\mu) &= N(m, s^2 I), \quad s^{-2} = \beta + n \bar\tau, \quad
        m = s^2 \bar\tau \textstyle\sum_n (u_n - M \bar z_n) \\
    q(w_d) &= N(M_d, \Sigma_w), \quad
        \Sigma_w^{-1} = \mathrm{diag}(\bar\alpha) + \bar\tau \textstyle\sum_n E[z_n z_n^\top], \quad
        M_d = \bar\tau \, \Sigma_w \textstyle\sum_n \bar z_n (u_{nd} - m_d) \\
    q(\alpha_l) &= \mathrm{Gamma}(a + D / 2,\; b + \tfrac12 E \|w_{\cdot l}\|^2) \\
    q(\tau) &= \mathrm{Gamma}\bigl(c + n D / 2,\; d + \tfrac12 \textstyle\sum_n E \|u_n - W z_n - \mu\|^2\bigr)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.data import Rows

__all__ = ["BayesianPPCAState", "BayesianPPCAUpdates", "Hyperparameters", "factor_posterior"]

BLOCK = 2048
"""Rows at a time."""

LEAST_NOISE = 1e-6
"""Of the variance of the data: where a start's factors would explain all, so much is left to the noise."""


@dataclass(frozen=True)
class Hyperparameters:
    """Of the prior, in standardised units: shape and rate of both Gammas, precision of the mean."""

    shape: float
    rate: float
    mean_precision: float


@dataclass(frozen=True)
class Standardised:
    """The data, as far as a linear-Gaussian model can see them.

    Attributes:
        n: rows.
        mean: of the standardised rows, shape (D,).
        scatter: sum of squares about it, shape (D, D).
        location: where standardised units begin, units of the data, shape (D,).
        scale: their size, shape ().
    """

    n: int
    mean: Tensor
    scatter: Tensor
    location: Tensor
    scale: Tensor


@dataclass(frozen=True)
class BayesianPPCAState:
    """Q of the parameters, standardised units, float64.

    Attributes:
        relevance_shape: shape (L,).
        relevance_rate: shape (L,).
        loadings: means, shape (D, L).
        loadings_covariance: of each row, shape (L, L).
        mean: shape (D,).
        mean_variance: of each entry, shape ().
        precision_shape: shape ().
        precision_rate: shape ().
        data: what the updates have to know of them.
    """

    relevance_shape: Tensor
    relevance_rate: Tensor
    loadings: Tensor
    loadings_covariance: Tensor
    mean: Tensor
    mean_variance: Tensor
    precision_shape: Tensor
    precision_rate: Tensor
    data: Standardised

    @property
    def precision(self) -> Tensor:
        """Mean of the noise precision."""
        return self.precision_shape / self.precision_rate

    @property
    def relevance(self) -> Tensor:
        """Means of the relevances, shape (L,)."""
        return self.relevance_shape / self.relevance_rate

    @property
    def loadings_square(self) -> Tensor:
        """Mean of the product of the loadings with themselves, shape (L, L)."""
        return self.loadings.mT @ self.loadings + len(self.loadings) * self.loadings_covariance


def factor_posterior(loadings: Tensor, loadings_square: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """The best q of the factors: a matrix (L, D) from the residual to the means, and the covariance (L, L).

    Args:
        loadings: their mean, shape (D, L).
        loadings_square: the mean of their product with themselves, shape (L, L).
        precision: the mean of the noise precision, shape ().
    """
    identity = torch.eye(loadings.shape[-1], dtype=loadings.dtype, device=loadings.device)
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(identity + precision * loadings_square))
    return precision * covariance @ loadings.mT, covariance


class BayesianPPCAUpdates:
    """What `lvm.coordinate_ascent` asks of a program, for Bayesian PPCA.

    Args:
        prior: its numbers.
        latent_dim: L.
        present: the program's q with these data: (location, scale) and a function that completes them to a state; None
            where it has none yet.
        make_guide: puts a state into the program and gives its guide.
    """

    def __init__(
        self,
        prior: Hyperparameters,
        latent_dim: int,
        present: tuple[Tensor, Tensor, Callable[[Standardised], BayesianPPCAState]] | None,
        make_guide: Callable[[BayesianPPCAState], Any],
    ) -> None:
        self.prior, self.latent_dim = prior, latent_dim
        self._present, self._make_guide = present, make_guide

    @torch.no_grad()
    def start(self, x: Rows, seed: int, init: Any, fresh: bool) -> BayesianPPCAState:
        """From the principal axes, or from loadings.

        Args:
            x: the data, one array of rows (n, D).
            seed: of random loadings, where `fresh` asks for them.
            init: None, or loadings (D, L) in the units of the data.
            fresh: random loadings instead of the principal axes or what the program has.

        Raises:
            ValueError: if init has another shape or is not finite, or x is constant.
        """
        if self._present is not None and init is None and not fresh:
            location, scale, complete = self._present
            return complete(standardised(x, location.double(), scale.double()))
        data = standardised(x)
        d, latent_dim = len(data.mean), self.latent_dim
        if init is not None:
            loadings = torch.as_tensor(init).detach().double().to(data.mean.device)
            if loadings.shape != (d, latent_dim) or not bool(loadings.isfinite().all()):
                raise ValueError(
                    f"init has shape {tuple(loadings.shape)}: pass finite loadings (num_features, latent_dim), "
                    f"here ({d}, {latent_dim}), in the units of the data"
                )
            return self._around(loadings / data.scale, 0.5, data)
        if fresh:
            generator = torch.Generator().manual_seed(seed)
            draws = torch.randn(d, latent_dim, generator=generator, dtype=torch.float64)
            return self._around(draws.to(data.mean.device) / math.sqrt(2 * latent_dim), 0.5, data)
        values, axes = torch.linalg.eigh(data.scatter / data.n)
        noise = max(values[: d - latent_dim].mean().item(), LEAST_NOISE)
        widths = (values[d - latent_dim :] - noise).clamp_min(0).sqrt()
        return self._around((axes[:, d - latent_dim :] * widths).flip(-1), noise, data)

    def _around(self, loadings: Tensor, noise: float, data: Standardised) -> BayesianPPCAState:
        """The state with these loadings, known as well as n data let them be, and this noise variance."""
        (d, latent_dim), n = loadings.shape, data.n
        ones = torch.ones(latent_dim, dtype=loadings.dtype, device=loadings.device)
        shape = ones[0] * (self.prior.shape + n * d / 2)
        state = BayesianPPCAState(
            relevance_shape=ones * (self.prior.shape + d / 2),
            relevance_rate=ones,
            loadings=loadings,
            loadings_covariance=noise / n * ones.diag(),
            mean=data.mean,
            mean_variance=ones[0] / (self.prior.mean_precision + n / noise),
            precision_shape=shape,
            precision_rate=shape * noise,
            data=data,
        )
        return self._with_relevance(state)

    def _with_relevance(self, state: BayesianPPCAState) -> BayesianPPCAState:
        rate = self.prior.rate + 0.5 * state.loadings_square.diagonal()
        return replace(state, relevance_rate=rate)

    @torch.no_grad()
    def update(self, state: BayesianPPCAState, x: Rows) -> BayesianPPCAState:
        """Factors, mean, loadings, relevances, and noise, in this order."""
        data, tau = state.data, state.precision
        n, d = data.n, len(data.mean)
        gain, covariance = factor_posterior(state.loadings, state.loadings_square, tau)
        before = data.mean - state.mean
        sum_of_squares = n * covariance + gain @ (data.scatter + n * torch.outer(before, before)) @ gain.mT
        mean_variance = 1 / (self.prior.mean_precision + n * tau)
        mean = mean_variance * tau * n * (data.mean - state.loadings @ (gain @ before))
        products = gain @ (data.scatter + n * torch.outer(before, data.mean - mean))  # (L, D)
        root = torch.linalg.cholesky(state.relevance.diag() + tau * sum_of_squares)
        loadings_covariance = torch.cholesky_inverse(root)
        state = replace(
            state,
            mean=mean,
            mean_variance=mean_variance,
            loadings=tau * products.mT @ loadings_covariance,
            loadings_covariance=loadings_covariance,
            relevance_shape=torch.full_like(state.relevance_shape, self.prior.shape + d / 2),
            precision_shape=torch.full_like(state.precision_shape, self.prior.shape + n * d / 2),
        )
        state = self._with_relevance(state)
        return replace(state, precision_rate=self.prior.rate + 0.5 * _residual(state, products, sum_of_squares))

    @torch.no_grad()
    def bound(self, state: BayesianPPCAState, x: Rows) -> tuple[dict[str, float], dict[str, float]]:
        """The full bound in its parts, with the factors at their best; nats of the data set."""
        data, tau, prior = state.data, state.precision, self.prior
        n, (d, latent_dim) = data.n, state.loadings.shape
        gain, covariance = factor_posterior(state.loadings, state.loadings_square, tau)
        deviation = data.mean - state.mean
        scatter = data.scatter + n * torch.outer(deviation, deviation)
        sum_of_squares = n * covariance + gain @ scatter @ gain.mT
        log_tau = state.precision_shape.digamma() - state.precision_rate.log()
        reconstruction = 0.5 * n * d * (log_tau - math.log(2 * math.pi)) - n * d * data.scale.log()
        reconstruction -= 0.5 * tau * _residual(state, gain @ scatter, sum_of_squares)
        log_relevance = state.relevance_shape.digamma() - state.relevance_rate.log()
        loadings = (state.relevance * state.loadings_square.diagonal()).sum() - d * (
            latent_dim + torch.logdet(state.loadings_covariance) + log_relevance.sum()
        )
        ratio = prior.mean_precision * state.mean_variance
        mean = prior.mean_precision * state.mean.square().sum() + d * (ratio - 1 - ratio.log())
        factors = sum_of_squares.trace() - n * (latent_dim + torch.logdet(covariance))
        kl = {
            "relevance": _gamma_divergence(state.relevance_shape, state.relevance_rate, prior).sum(),
            "loadings": 0.5 * loadings,
            "mean": 0.5 * mean,
            "precision": _gamma_divergence(state.precision_shape, state.precision_rate, prior),
            "z": 0.5 * factors,
        }
        return {"x": float(reconstruction)}, {site: float(value) for site, value in kl.items()}

    def guide(self, state: BayesianPPCAState) -> Any:
        """The program's guide, which then holds `state`."""
        return self._make_guide(state)


def _residual(state: BayesianPPCAState, products: Tensor, sum_of_squares: Tensor) -> Tensor:
    """Mean of the sum of squares that mean and factors leave unexplained; ``products`` of factors and residuals."""
    data = state.data
    deviation = data.mean - state.mean
    about_mean = data.scatter.trace() + data.n * (deviation.square().sum() + len(data.mean) * state.mean_variance)
    return about_mean + (state.loadings_square * sum_of_squares).sum() - 2 * (state.loadings * products.mT).sum()


def _gamma_divergence(shape: Tensor, rate: Tensor, prior: Hyperparameters) -> Tensor:
    q, p = (
        torch.distributions.Gamma(shape, rate),
        torch.distributions.Gamma(torch.full_like(shape, prior.shape), torch.full_like(rate, prior.rate)),
    )
    return torch.distributions.kl_divergence(q, p)


def standardised(x: Rows, location: Tensor | None = None, scale: Tensor | None = None) -> Standardised:
    """Mean and scatter in standardised units; these are the data's own where they are not given.

    Raises:
        ValueError: if the data are constant, and so have no unit.
    """
    blocks = [next(iter((*batch.args, *batch.kwargs.values()))).double() for batch in x.batches(BLOCK)]
    n = len(x)
    center = torch.stack([block.sum(0) for block in blocks]).sum(0) / n
    scatter = torch.stack([(block - center).mT @ (block - center) for block in blocks]).sum(0)
    if location is None or scale is None:
        location, scale = center, (scatter.trace() / (n * len(center))).sqrt()
        if not scale > 1e-12 * location.abs().max():
            raise ValueError(
                f"x is constant over the {n} rows: there is no variance to explain, and no unit to measure noise in"
            )
    return Standardised(n, (center - location) / scale, scatter / scale.square(), location, scale)

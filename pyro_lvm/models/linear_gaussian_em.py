r"""EM for linear-Gaussian models: probabilistic PCA and factor analysis, with or without missing values.

With :math:`V = \Psi^{-1/2} W` and :math:`M = I + V^\top V`, restricted to the features that row n has:

.. math::
    \text{E: } \hat z_n = M_n^{-1} W^\top \Psi^{-1} (x_n - \mu), \quad
    \mathbb{E}[z_n z_n^\top] = M_n^{-1} + \hat z_n \hat z_n^\top, \qquad
    \text{M: } (w_d, \mu_d) \leftarrow \Bigl(\sum_n \mathbb{E}[\tilde z_n \tilde z_n^\top]\Bigr)^{-1}
    \sum_n x_{nd}\, \mathbb{E}[\tilde z_n], \quad \tilde z = (z, 1)

and the noise is what that regression leaves. Where nothing is missing the sums over n are functions of the covariance
of the data, which is all that is kept of them. After each M-step the factors are scaled back to unit covariance,
:math:`W \leftarrow W \operatorname{chol} \mathbb{E}[z z^\top]`: the M-step of a model whose prior covariance is free as
well, which has the same likelihood and arrives in far fewer steps (Liu, Rubin and Wu, 1998, Parameter expansion to
accelerate EM, https://doi.org/10.1093/biomet/85.4.755). EM for these models: Rubin and Thayer, 1982,
https://doi.org/10.1007/BF02293851; Tipping and Bishop, 1999, https://doi.org/10.1111/1467-9868.00196.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lvm.blocks import Blocks
from pyro_lvm.exact import Expectation, Parameters

__all__ = ["LinearGaussianEM", "Moments"]


@dataclass(frozen=True)
class Moments:
    """Means and variances of the values that are there.

    Attributes:
        mean: by feature, shape (D,).
        variance: by feature, shape (D,), with the number of values as denominator.
        covariance: (D, D), or None where values are missing.
        counts: values by feature, shape (D,).
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor | None
    counts: Tensor

    @staticmethod
    def of(data: Blocks) -> Moments:
        """In two walks over the data: the first finds the means, about which the second sums squares."""
        counts, total = data.total(lambda x: ((~x.isnan()).double().sum(0), x.nan_to_num(0.0).sum(0)))
        mean = total / counts  # a feature without values has NaN; who uses the moments names it

        def squares(x: Tensor) -> tuple[Tensor, Tensor]:
            deviation = x - mean
            complete = not bool(deviation.isnan().any())
            product = deviation.mT @ deviation if complete else deviation.new_full((len(mean), len(mean)), torch.nan)
            return deviation.nan_to_num(0.0).square().sum(0), product

        square, product = data.total(squares)
        complete = bool(counts.min() == len(data))
        return Moments(mean, square / counts, product / len(data) if complete else None, counts)


@dataclass(frozen=True)
class _Statistics:
    """Sums over rows; zz of the augmented factors (z, 1), shape (D or 1, L + 1, L + 1), xz (D, L + 1), xx (D,)."""

    zz: Tensor
    xz: Tensor
    xx: Tensor
    prior: Tensor  # the same as zz over all rows, whatever they miss: (L + 1, L + 1)


class LinearGaussianEM:
    """The steps of EM; everything is measured from the mean of the data.

    Args:
        data: the rows.
        moments: of those rows.
        latent_dim: L.
        one_noise: whether all features share one noise (probabilistic PCA).
        lowest_noise: the smallest standard deviation of the noise, shape (D,) or ().
        start: makes loadings, mean and noise to start from, given a seed.
        write: takes the loadings, mean and noise that were found.
    """

    def __init__(
        self,
        data: Blocks,
        moments: Moments,
        latent_dim: int,
        one_noise: bool,
        lowest_noise: Tensor,
        start: Callable[[int], Parameters],
        write: Callable[[Parameters], None],
    ) -> None:
        self.data, self.moments, self.latent_dim, self.one_noise = data, moments, latent_dim, one_noise
        self.lowest_variance = lowest_noise.double().square()
        self._start, self.apply = start, write

    def start(self, init: object, seed: int) -> Parameters:
        """Random loadings, or those of ``init``, a mapping with loadings, mean and noise_scale."""
        given = self._start(seed) if init is None else init
        names = ("loadings", "mean", "noise_scale")
        if not isinstance(given, dict) or not set(names) <= set(given):
            raise ValueError(
                f"init is {type(init).__name__}: pass a dict with {', '.join(names)}, as program.constrained() gives, "
                "or None for random loadings"
            )
        features = len(self.moments.mean)
        shapes = {"loadings": (features, self.latent_dim), "mean": (features,)}
        shapes["noise_scale"] = () if self.one_noise else (features,)
        for name in names:
            if tuple(given[name].shape) != shapes[name]:
                raise ValueError(f"init[{name!r}] has shape {tuple(given[name].shape)}; it must be {shapes[name]}")
        found = {name: given[name].detach().double() for name in names}
        found["noise_scale"] = found["noise_scale"].clamp_min(self.lowest_variance.sqrt())
        return found

    def expectation(self, parameters: Parameters) -> Expectation:
        """Moments of the factors given the data, and log p(x) in nats of the data set."""
        variance = parameters["noise_scale"].square().expand(len(self.moments.mean))
        offset = parameters["mean"] - self.moments.mean
        if self.moments.covariance is not None:
            return self._from_covariance(parameters["loadings"], offset, variance, self.moments.covariance)
        weighted = parameters["loadings"] / variance.unsqueeze(-1)
        outer = (weighted.unsqueeze(-1) * parameters["loadings"].unsqueeze(-2)).flatten(1)
        log_evidence, zz, xz, xx, prior = self.data.total(
            lambda x: self._of_rows(x - self.moments.mean, weighted, offset, variance, outer)
        )
        return Expectation(float(log_evidence), _Statistics(zz, xz, xx, prior))

    def _from_covariance(self, loadings: Tensor, offset: Tensor, variance: Tensor, covariance: Tensor) -> Expectation:
        n, latent = len(self.data), self.latent_dim
        weighted = loadings / variance.unsqueeze(-1)
        precision = torch.eye(latent, dtype=variance.dtype, device=variance.device) + loadings.mT @ weighted
        root = torch.linalg.cholesky(precision)
        # second moments about the model's mean, should it not be the data's
        about = covariance + offset.unsqueeze(-1) * offset
        to_factors = torch.cholesky_solve(weighted.mT, root)  # posterior means are this times x - mu
        projected = about @ to_factors.mT
        trace = (about.diagonal() / variance).sum() - (weighted * projected).sum()
        log_det = variance.log().sum() + 2 * root.diagonal().log().sum()
        log_evidence = -0.5 * n * (len(variance) * math.log(2 * math.pi) + log_det + trace)
        means = -to_factors @ offset  # the mean of the posterior means
        second = torch.cholesky_inverse(root) + to_factors @ projected
        zz = _augmented(n * second, n * means, n)
        xz = n * torch.cat([covariance @ to_factors.mT, torch.zeros_like(offset).unsqueeze(-1)], -1)
        return Expectation(float(log_evidence), _Statistics(zz.unsqueeze(0), xz, n * covariance.diagonal(), zz))

    def _of_rows(
        self, x: Tensor, weighted: Tensor, offset: Tensor, variance: Tensor, outer: Tensor
    ) -> tuple[Tensor, ...]:
        """Log evidence of some rows, NaN marking what is missing, and their part of the statistics."""
        seen = (~x.isnan()).double()
        x = x.nan_to_num(0.0)
        residual = seen * (x - offset)
        identity = torch.eye(self.latent_dim, dtype=x.dtype, device=x.device)
        root = torch.linalg.cholesky(identity + (seen @ outer).unflatten(-1, identity.shape))
        pulled = residual @ weighted
        means = torch.cholesky_solve(pulled.unsqueeze(-1), root).squeeze(-1)
        squares = (residual.square() / variance).sum(-1) - (pulled * means).sum(-1)
        constants = seen @ (variance.log() + math.log(2 * math.pi))
        log_evidence = -0.5 * (constants + squares).sum() - root.diagonal(dim1=-2, dim2=-1).log().sum()
        second = torch.cholesky_inverse(root) + means.unsqueeze(-1) * means.unsqueeze(-2)
        rows = _augmented(second, means, torch.ones_like(means[:, 0]))
        augmented = torch.cat([means, torch.ones_like(means[:, :1])], -1)
        zz = (seen.mT @ rows.flatten(1)).unflatten(-1, rows.shape[-2:])
        return log_evidence, zz, (seen * x).mT @ augmented, (seen * x.square()).sum(0), rows.sum(0)

    def maximisation(self, parameters: Parameters, statistics: _Statistics) -> tuple[Parameters, float]:
        """Regress the data on the factors; the gain is in nats of the data set."""
        counts, n = self.moments.counts, len(self.data)
        coefficients = torch.linalg.solve(statistics.zz.expand(len(counts), -1, -1), statistics.xz)
        left = self._left(coefficients, statistics)
        variance = left.sum() / counts.sum() if self.one_noise else left / counts
        variance = variance.clamp_min(self.lowest_variance)
        mean_of_factors = statistics.prior[-1, :-1] / n
        covariance = statistics.prior[:-1, :-1] / n - mean_of_factors.unsqueeze(-1) * mean_of_factors
        scale = torch.linalg.cholesky((covariance + covariance.mT) / 2)

        old = torch.cat([parameters["loadings"], (parameters["mean"] - self.moments.mean).unsqueeze(-1)], -1)
        before = self._expected(old, parameters["noise_scale"].square(), statistics)
        before = before - 0.5 * statistics.prior.diagonal()[:-1].sum()
        after = self._expected(coefficients, variance, statistics)
        after = after - 0.5 * n * self.latent_dim - n * scale.diagonal().log().sum()
        found = {
            "loadings": coefficients[:, :-1] @ scale,
            "mean": self.moments.mean + coefficients[:, -1] + coefficients[:, :-1] @ mean_of_factors,
            "noise_scale": variance.sqrt(),
        }
        return found, float(after - before)

    def _left(self, coefficients: Tensor, statistics: _Statistics) -> Tensor:
        """Expected squares that the regression leaves, by feature, (D,)."""
        explained = (coefficients.unsqueeze(-2) @ statistics.zz).squeeze(-2)
        return statistics.xx + (coefficients * (explained - 2 * statistics.xz)).sum(-1)

    def _expected(self, coefficients: Tensor, variance: Tensor, statistics: _Statistics) -> Tensor:
        """E log p(x | z), without the constant."""
        variance = variance.expand(len(self.moments.counts))
        return -0.5 * (self.moments.counts * variance.log() + self._left(coefficients, statistics) / variance).sum()


def _augmented(second: Tensor, mean: Tensor, count: Tensor | int) -> Tensor:
    """Second moments of (z, 1) from those of z, shape (..., L + 1, L + 1)."""
    corner = torch.as_tensor(count, dtype=mean.dtype, device=mean.device).expand(mean.shape[:-1])[..., None, None]
    top = torch.cat([second, mean.unsqueeze(-1)], -1)
    return torch.cat([top, torch.cat([mean.unsqueeze(-2), corner], -1)], -2)

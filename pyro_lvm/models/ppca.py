"""Probabilistic principal component analysis."""

from __future__ import annotations

from typing import Any, Self

import pyro
import torch
from torch import Tensor

from pyro_lvm.columns import columns_of
from pyro_lvm.models.linear_gaussian import GuideCovariance, LinearGaussianModel
from pyro_lvm.storage.classes import storable

__all__ = ["PPCA"]


@storable
class PPCA(LinearGaussianModel):
    r"""Probabilistic PCA: a linear-Gaussian latent variable model with the same noise in every direction.

    .. math::
        z_n \sim N(0, I_L), \qquad x_n \mid z_n \sim N(W z_n + \mu,\; \sigma^2 I_D), \qquad
        q(z_n \mid x_n) = N\bigl(A (x_n - \mu),\; \operatorname{diag}(s^2)\bigr)

    Sites: ``z`` (plate "data"; event (L,), dimension "latent"), ``x`` (plate "data"; event (D,), dimension "feature";
    observed). Estimators: any; nothing is discrete, and the divergence of guide from prior is known in closed form.

    Why this guide is exact at the maximum: the true posterior is :math:`N(M^{-1} W^\top (x - \mu), \sigma^2 M^{-1})`
    with :math:`M = W^\top W + \sigma^2 I`, linear in x with one covariance for all rows. The density of the data does
    not feel a rotation :math:`W \to W R`, so W may be turned until :math:`W^\top W` is diagonal, and then so is the
    posterior covariance. Away from there a diagonal guide leaves a gap, whose only effect on the optimum is to choose
    that rotation; it adds no local maxima (Lucas et al., 2019). The guide shares :math:`\mu` with the model.
    ``guide_covariance="full"`` replaces diag(s^2) by any covariance, exact for every rotation; it is the quicker to put
    a weak factor to sleep while the noise is still large, so the diagonal guide is the safer one to fit with.

    When it is wrong: features in different units share one noise level, so the unit chosen decides the answer
    (standardise, or use factor analysis); W is identified up to rotation only, compare :math:`W W^\top` or
    `principal_axes`; noise below a thousandth of the scale of the data is not reached by gradients (a floor keeps the
    density bounded), use `closed_form`.

    Source: Tipping & Bishop, 1999, Probabilistic principal component analysis,
    https://doi.org/10.1111/1467-9868.00196; on the landscape: Lucas et al., 2019, https://arxiv.org/abs/1911.02469.

    Args:
        num_features: D, columns of the data.
        latent_dim: L, at least 1 and less than D.
        guide_covariance: "diag" or "full", the covariance of the guide.

    Raises:
        ValueError: if latent_dim is not in 1..D-1, or guide_covariance is unknown.

    Example:
        >>> import torch
        >>> from pyro_lvm.models.ppca import PPCA
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 2.2], [4.0, 3.8], [6.0, 6.0]])
        >>> ppca = PPCA.closed_form(x, latent_dim=1)
        >>> ppca.principal_axes().T
        tensor([[2.2340, 2.1934]])
        >>> bool(ppca.log_prob(x).sum() > ppca.log_prob(x + 1.0).sum())
        True
    """

    def _noise_shape(self) -> tuple[int, ...]:
        return ()

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Generative story; x: rows (batch, D) or None to draw ``size`` rows, size: rows of the whole data set."""
        with pyro.plate("data", self._num_rows(x, size), subsample=x):
            z = pyro.sample("z", self._prior(), infer={"event_dims": ("latent",)})  # type: ignore[arg-type]
            return pyro.sample("x", self.decode(z), obs=x, infer={"event_dims": ("feature",)})  # type: ignore[arg-type]

    def guide(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Linear approximate posterior of the factors of rows x (batch, D)."""
        with pyro.plate("data", self._num_rows(x, size), subsample=x):
            return pyro.sample("z", self.encode(x))

    @classmethod
    @torch.no_grad()
    def closed_form(cls, x: Any, latent_dim: int, guide_covariance: GuideCovariance = "diag") -> Self:
        r"""Maximum likelihood without iteration; the guide is the exact posterior, so its ELBO is the log evidence.

        .. math::
            \sigma^2 = \frac{1}{D - L} \sum_{j > L} \lambda_j, \qquad W = U_L (\Lambda_L - \sigma^2 I)^{1/2}

        where :math:`\lambda_1 \ge \dots \ge \lambda_D` and U are eigenvalues and eigenvectors of the covariance of the
        data with denominator n (scikit-learn's PCA divides by n - 1 and ends a little below this maximum).

        Args:
            x: data, shape (n, D), in any form that `fit` takes; walked twice, computed in double precision. The model
                gets the dtype and device of x.
            latent_dim: L, at least 1 and less than D; at most n - 2, or nothing is left for the noise.
            guide_covariance: as in `PPCA`.

        Raises:
            ValueError: if x is not one table, holds values that are not finite or too few rows, if latent_dim does not
                fit D, or if L axes explain x completely.
        """
        columns = columns_of(x)
        size, num_features = columns.size, len(columns.mean)
        ppca = cls(num_features, latent_dim, guide_covariance)
        if size < latent_dim + 2:
            raise ValueError(
                f"x has {size} rows, but latent_dim={latent_dim} needs at least {latent_dim + 2}: fewer rows lie in "
                f"a {latent_dim}-dimensional plane and leave no noise. Use more rows, or latent_dim <= {size - 2}"
            )
        like = columns.reference
        ppca.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
        # Eigenvalues of the covariance from singular values of the data: the small ones keep their digits.
        _, singular_values, axes = torch.linalg.svd(columns.triangle, full_matrices=False)
        eigenvalues = singular_values.square() / size
        noise_variance = eigenvalues[latent_dim:].sum() / (num_features - latent_dim)
        if not noise_variance > 1e-20 * eigenvalues[0]:
            raise ValueError(
                f"latent_dim={latent_dim} axes explain x completely and leave no noise: the density would be "
                "unbounded. Use a smaller latent_dim"
            )
        loadings = axes[:latent_dim].mT * (eigenvalues[:latent_dim] - noise_variance).clamp_min(0).sqrt()
        ppca.location.copy_(columns.mean)
        ppca.scale.copy_(noise_variance.sqrt())  # so that the floor lies far below the noise
        ppca.set_parameters(loadings=loadings, mean=columns.mean, noise_scale=noise_variance.sqrt())
        ppca.is_initialized.fill_(True)
        return ppca

"""Factor analysis."""

from __future__ import annotations

import pyro
from torch import Tensor

from pyro_lvm.models.linear_gaussian import LinearGaussianModel
from pyro_lvm.storage.classes import storable

__all__ = ["FactorAnalysis"]


@storable
class FactorAnalysis(LinearGaussianModel):
    r"""Factor analysis: a linear-Gaussian latent variable model in which every feature has its own noise.

    .. math::
        z_n \sim N(0, I_L), \qquad x_n \mid z_n \sim N(W z_n + \mu,\; \Psi), \quad \Psi = \operatorname{diag}(\psi^2),
        \qquad q(z_n \mid x_n) = N\bigl(A (x_n - \mu),\; \operatorname{diag}(s^2)\bigr)

    Sites: ``z`` (plate "data"; event (L,), dimension "latent"), ``x`` (plate "data"; event (D,), dimension "feature";
    observed). Estimators: any; nothing is discrete, and the divergence of guide from prior is known in closed form.

    The factors explain what features have in common, the noise what each has to itself; so rescaling a feature rescales
    its row of W and its noise and changes nothing else, unlike in PPCA. The diagonal guide is exact at a rotation of W
    where :math:`W^\top \Psi^{-1} W` is diagonal; the density of the data does not feel the rotation.
    ``guide_covariance="full"`` is exact for every rotation. The guide shares :math:`\mu` with the model.

    When it is wrong: the maximum has no closed form and may not be unique; a factor may swallow a feature whole, whose
    noise then goes to zero (a Heywood case): it stops at a thousandth of the feature's standard deviation. W is
    identified up to rotation only, compare :math:`W W^\top`. With L so large that :math:`(D - L)^2 < D + L` more
    parameters are asked for than a covariance has.

    Source: Rubin & Thayer, 1982, EM algorithms for ML factor analysis, https://doi.org/10.1007/BF02293851.

    Args:
        num_features: D, columns of the data.
        latent_dim: L, at least 1 and less than D.
        guide_covariance: "diag" or "full", the covariance of the guide.

    Raises:
        ValueError: if latent_dim is not in 1..D-1, or guide_covariance is unknown.

    Example:
        >>> import torch
        >>> from pyro_lvm.models.factor_analysis import FactorAnalysis
        >>> factor_analysis = FactorAnalysis(num_features=3, latent_dim=1)
        >>> x = torch.tensor([[0.0, 1.0, 100.0], [1.0, 3.0, 500.0], [2.0, 4.0, 100.0], [3.0, 8.0, 300.0]])
        >>> factor_analysis.initialize(x, seed=0)
        >>> factor_analysis.posterior(x).mean.shape, factor_analysis.num_parameters
        (torch.Size([4, 1]), 9)
        >>> factor_analysis.noise_scale / x.std(0, correction=0)
        tensor([0.7000, 0.7000, 0.7000], grad_fn=<DivBackward0>)
    """

    def _noise_shape(self) -> tuple[int, ...]:
        return (self.num_features,)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Generative story; x: rows (batch, D) or None to draw ``size`` rows, size: rows of the whole data set."""
        with pyro.plate("data", self._num_rows(x, size), subsample=x):
            z = pyro.sample("z", self._prior(), infer={"event_dims": ("latent",)})  # type: ignore[arg-type]
            return pyro.sample("x", self.decode(z), obs=x, infer={"event_dims": ("feature",)})  # type: ignore[arg-type]

    def guide(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Linear approximate posterior of the factors of rows x (batch, D)."""
        with pyro.plate("data", self._num_rows(x, size), subsample=x):
            return pyro.sample("z", self.encode(x))

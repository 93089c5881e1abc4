r"""Priors for the parameters of built-in programs, as plain data.

One conjugate object serves every way of fitting a Bayesian mixture: gradients, EM with a prior, coordinate ascent.

Example:
    >>> import torch
    >>> x = torch.tensor([[0.0, 10.0], [1.0, 30.0], [2.0, 20.0]])
    >>> weakly_informative(x).mean
    tensor([ 1., 20.])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.columns import columns_of
from pyro_lvm.storage.classes import storable

__all__ = ["NormalInverseWishart", "weakly_informative"]


@storable
@dataclass(frozen=True, eq=False)
class NormalInverseWishart:
    r"""Conjugate prior of a Gaussian mixture: Dirichlet weights, normal-inverse-Wishart components.

    .. math::
        \pi \sim \mathrm{Dirichlet}(\alpha), \qquad
        \Sigma_k \sim \mathcal{IW}(\nu, \Psi), \qquad
        \mu_k \mid \Sigma_k \sim \mathcal{N}(m, \Sigma_k / \kappa)

    "tied" mixtures share one :math:`\Sigma`, and their :math:`\mu_k` have covariance :math:`\Sigma / \kappa`. "diag"
    mixtures take the marginals of the diagonal,
    :math:`\sigma_{kd}^2 \sim \mathrm{InverseGamma}((\nu - D + 1)/2, \Psi_{dd}/2)`, and "spherical" ones the same with
    the mean of the :math:`\Psi_{dd}`, so that all four agree for one feature and one component, and
    :math:`\mathbb{E}[\Sigma] = \Psi / (\nu - D - 1)` wherever it exists.

    Args:
        mean: m, shape (D,).
        scale_matrix: Psi, shape (D, D), symmetric, positive definite; a sum of squares, in squared units of the data.
        degrees_of_freedom: nu > D - 1; how many data the belief about the covariance is worth.
        mean_precision: kappa > 0; how many data the belief about the mean is worth.
        concentration: alpha > 0, a number for all components or a tensor of shape (K,). Below 1 it favours empty
            components.

    Raises:
        ValueError: if a shape does not fit or a number is out of its range.

    Murphy (2012), Machine Learning: A Probabilistic Perspective, section 4.6.3; https://probml.github.io/pml-book/book0.html

    Example:
        >>> import torch
        >>> NormalInverseWishart(torch.zeros(2), torch.eye(2), degrees_of_freedom=4.0).num_features
        2
    """

    mean: Tensor
    scale_matrix: Tensor
    degrees_of_freedom: float
    mean_precision: float = 0.01
    concentration: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if self.mean.dim() != 1:
            raise ValueError(f"mean has shape {tuple(self.mean.shape)}; pass a vector (D,), one number per feature.")
        num_features = len(self.mean)
        if self.scale_matrix.shape != (num_features, num_features):
            raise ValueError(
                f"scale_matrix has shape {tuple(self.scale_matrix.shape)}, but mean has {num_features} features: pass "
                f"a matrix of shape ({num_features}, {num_features})."
            )
        symmetric = torch.allclose(self.scale_matrix, self.scale_matrix.mT)
        if not symmetric or torch.linalg.cholesky_ex(self.scale_matrix).info.item() != 0:
            raise ValueError(
                "scale_matrix is not symmetric and positive definite, so no covariance can be drawn from it: add a "
                "small multiple of the identity, or leave out a feature that repeats the others."
            )
        if not self.degrees_of_freedom > num_features - 1:
            raise ValueError(
                f"degrees_of_freedom is {self.degrees_of_freedom}; with {num_features} features it must exceed "
                f"{num_features - 1}. {num_features + 2} is the smallest whole number with a finite mean covariance."
            )
        if not self.mean_precision > 0:
            raise ValueError(
                f"mean_precision is {self.mean_precision}; it counts data and must be positive, for example 0.01."
            )
        concentration = torch.as_tensor(self.concentration)
        if concentration.dim() > 1 or not bool((concentration > 0).all()):
            raise ValueError(
                f"concentration is {self.concentration}; it must be one positive number, or one for each component."
            )

    @property
    def num_features(self) -> int:
        """D."""
        return len(self.mean)

    @property
    def variance_degrees_of_freedom(self) -> float:
        """Degrees of freedom of one variance on the diagonal, nu - D + 1."""
        return self.degrees_of_freedom - self.num_features + 1


def weakly_informative(x: Any, num_components: int = 1, concentration: float | Tensor = 1.0) -> NormalInverseWishart:
    r"""A prior that knows the place and the units of the data and little else.

    .. math:: m = \bar x, \quad \kappa = 0.01, \quad \nu = D + 2, \quad \Psi = S / K^{2/D}

    with S the sample covariance. The mean of a component's covariance is then S, or S shrunk so that K of them fill
    the volume of the data. It looks at the data, so its evidence flatters the model a little; with few data in many
    dimensions state a prior of your own. Fraley and Raftery (2007), https://doi.org/10.1007/s00357-007-0004-5, sec. 3.

    Args:
        x: data, shape (n, D), n >= 2, in any form that `fit` takes.
        num_components: K of the volume rule; 1 leaves S as it is.
        concentration: of the Dirichlet over the weights.

    Returns:
        The prior, in the dtype and on the device of x.

    Raises:
        TypeError: if x is no data.
        ValueError: if x is not a table of at least two finite rows, or num_components < 1.
    """
    if num_components < 1:
        raise ValueError(f"num_components is {num_components}; it must be at least 1.")
    columns = columns_of(x)
    like = columns.reference
    if columns.size < 2 or not like.is_floating_point():
        raise ValueError(
            f"x must hold floating-point numbers in at least 2 rows, to have a covariance; it has {columns.size} "
            f"of {like.dtype}."
        )
    num_features, covariance = len(columns.mean), columns.covariance
    variances = covariance.diagonal()
    # A constant or repeated feature has no width of its own: lend it a little of the others', that Psi has an inverse.
    lent = 1e-5 * torch.where(variances > 0, variances, variances.mean().clamp_min(1e-8))
    scale_matrix = (covariance + lent.diag()) / num_components ** (2 / num_features)
    return NormalInverseWishart(
        mean=columns.mean.to(like),
        scale_matrix=scale_matrix.to(like),
        degrees_of_freedom=float(num_features + 2),
        concentration=concentration,
    )

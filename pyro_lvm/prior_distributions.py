r"""Distributions of the parameters of Gaussian components, whose unconstrained coordinates carry no units.

Mean-field guides and NUTS work on unconstrained coordinates, with step sizes and first widths of order 0.1. A mean
measured in micrometres or in parsecs is far from that scale, so the supports here carry a `unit` per feature: the
coordinate is the value divided by it. The densities themselves are in the units of the data, as always.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import (
    Distribution,
    Transform,
    biject_to,
    constraints,
    kl_divergence,
    register_kl,
    transform_to,
)
from torch.distributions.transforms import AffineTransform

__all__ = ["InUnits", "InverseWishartCholesky"]

_Shape = torch.Size | list[int] | tuple[int, ...]
_ONE = torch.Size()


class _ScaledReal(constraints.Constraint):
    """Real numbers, whose unconstrained coordinate is value / unit."""

    def __init__(self, unit: Tensor) -> None:
        self.unit = unit
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return torch.as_tensor(constraints.real.check(value))


class _ScaledCholesky(constraints.Constraint):
    """Lower triangular, positive diagonal; row i is measured in unit[i]."""

    event_dim = 2

    def __init__(self, unit: Tensor) -> None:
        self.unit = unit
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return torch.as_tensor(constraints.lower_cholesky.check(value))


class _VectorToCholesky(Transform):
    r"""D(D+1)/2 reals to a Cholesky factor: the logarithms :math:`v` of the diagonal, then a unit triangle, row by row.

    .. math:: L = \mathrm{diag}(\mathrm{unit}) \, T \, \mathrm{diag}(e^{v}), \qquad T_{ii} = 1

    The entries of T are the coefficients of each feature on what is new in the features before it. Given data they are
    all but uncorrelated with each other and with v, as the entries of L are not, so that mean field loses little here.

    Torch has no bijection onto Cholesky factors (`transform_to` spends D^2 reals, so the entropy of a guide over the
    unused upper half would grow without bound).
    """

    domain = constraints.real_vector
    bijective = True

    def __init__(self, unit: Tensor, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.unit = unit

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return _ScaledCholesky(self.unit)

    def with_cache(self, cache_size: int = 1) -> _VectorToCholesky:
        return self if cache_size == self._cache_size else _VectorToCholesky(self.unit, cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _VectorToCholesky) and torch.equal(self.unit, other.unit)

    __hash__ = None  # type: ignore[assignment]

    def _below(self) -> tuple[Tensor, Tensor]:
        num_features = self.unit.shape[-1]
        rows, columns = torch.tril_indices(num_features, num_features, offset=-1, device=self.unit.device)
        return rows, columns

    def _call(self, x: Tensor) -> Tensor:
        num_features = self.unit.shape[-1]
        rows, columns = self._below()
        diagonal = x[..., :num_features].exp()
        matrix = torch.diag_embed(torch.ones_like(diagonal))
        matrix[..., rows, columns] = x[..., num_features:]
        return self.unit.unsqueeze(-1) * matrix * diagonal.unsqueeze(-2)

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = self._below()
        matrix = y / self.unit.unsqueeze(-1)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        return torch.cat([diagonal.log(), (matrix / diagonal.unsqueeze(-2))[..., rows, columns]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        num_features = self.unit.shape[-1]
        in_row = torch.arange(1, num_features + 1, device=x.device)
        return (in_row.flip(0) * x[..., :num_features]).sum(-1) + (in_row * self.unit.log()).sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-1], self.unit.shape[-1], self.unit.shape[-1]])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-2], shape[-1] * (shape[-1] + 1) // 2])


# Torch's registries are keyed by class, and these two are ours alone: nobody else's constraint changes its meaning.
for _registry in (biject_to, transform_to):
    _registry.register(_ScaledReal, lambda constraint: AffineTransform(0.0, constraint.unit))
    _registry.register(_ScaledCholesky, lambda constraint: _VectorToCholesky(constraint.unit))


class InUnits(TorchDistribution):
    """The same distribution over real features, with unconstrained coordinates value / unit.

    Args:
        base_dist: any distribution over vectors, event shape (D,).
        unit: one positive number per feature, shape (D,).

    Example:
        >>> import pyro.distributions as dist, torch
        >>> lengths = InUnits(dist.Normal(torch.zeros(1), 2000.0).to_event(1), unit=torch.tensor([1000.0]))
        >>> biject_to(lengths.support)(torch.tensor([1.5]))
        tensor([1500.])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, base_dist: Distribution, unit: Tensor, validate_args: bool | None = None) -> None:
        self.base_dist, self.unit = base_dist, unit
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Real vectors, each feature in its unit."""
        return constraints.independent(_ScaledReal(self.unit), 1)

    @property
    def mean(self) -> Tensor:
        """Mean of the base distribution."""
        return self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        """Variance of the base distribution."""
        return self.base_dist.variance

    def expand(self, batch_shape: _Shape, _instance: Any = None) -> InUnits:
        """Expand the batch shape."""
        return InUnits(self.base_dist.expand(torch.Size(batch_shape)), self.unit, validate_args=False)

    def rsample(self, sample_shape: _Shape = _ONE) -> Tensor:
        """Reparameterised draws."""
        return self.base_dist.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Density of the base distribution, in the units of the data."""
        log_density: Tensor = self.base_dist.log_prob(value)
        return log_density


@register_kl(InUnits, InUnits)  # type: ignore[untyped-decorator]
def _kl_in_units(p: InUnits, q: InUnits) -> Tensor:
    """Units are a matter of the coordinates: the divergence is that of the distributions inside."""
    divergence: Tensor = kl_divergence(p.base_dist, q.base_dist)
    return divergence


class InverseWishartCholesky(TorchDistribution):
    r"""The Cholesky factor of an inverse-Wishart covariance.

    .. math::
        \Sigma = L L^\top \sim \mathcal{IW}(\nu, \Psi), \qquad
        p(L) = \mathcal{IW}(L L^\top \mid \nu, \Psi) \; 2^D \prod_{i=1}^D L_{ii}^{D - i + 1}

    The product is the Jacobian of :math:`L \mapsto L L^\top`. Event shape (D, D). Draws are exact (Bartlett's
    decomposition, 1933, https://doi.org/10.1017/S0370164600021544) and reparameterised. The mean of the covariance is
    :math:`\Psi / (\nu - D - 1)` where :math:`\nu > D + 1`.

    Args:
        degrees_of_freedom: nu > D - 1, shape () or (...).
        scale_tril: Cholesky factor of Psi, shape (..., D, D); its batch shape and that of nu are broadcast.
        batch_shape: a larger batch shape, as :meth:`expand` gives; default: what the two arguments say.

    Example:
        >>> import torch
        >>> prior = InverseWishartCholesky(torch.tensor(5.0), torch.eye(2))
        >>> round(prior.log_prob(torch.eye(2)).item(), 4)
        -3.9365
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "degrees_of_freedom": constraints.positive,
        "scale_tril": constraints.lower_cholesky,
    }
    has_rsample = True

    def __init__(
        self,
        degrees_of_freedom: Tensor,
        scale_tril: Tensor,
        batch_shape: torch.Size | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.degrees_of_freedom, self.scale_tril = degrees_of_freedom, scale_tril
        if batch_shape is None:
            batch_shape = torch.broadcast_shapes(degrees_of_freedom.shape, scale_tril.shape[:-2])
        super().__init__(batch_shape, scale_tril.shape[-2:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=2)
    def support(self) -> constraints.Constraint:
        """Cholesky factors, row i in units of the prior's standard deviation of feature i."""
        return _ScaledCholesky((self.scale_tril.square().sum(-1) / self.degrees_of_freedom.unsqueeze(-1)).sqrt())

    def expand(self, batch_shape: _Shape, _instance: Any = None) -> InverseWishartCholesky:
        """Expand the batch shape."""
        return InverseWishartCholesky(self.degrees_of_freedom, self.scale_tril, torch.Size(batch_shape), False)

    def rsample(self, sample_shape: _Shape = _ONE) -> Tensor:
        """Reparameterised draws, shape sample_shape + batch_shape + (D, D)."""
        psi = self.scale_tril
        num_features = psi.shape[-1]
        shape = self._extended_shape(torch.Size(sample_shape))
        # The precision is Wishart; Bartlett's factor is taken with its features in reverse order, so that its inverse
        # transpose is lower triangular and the product with that of Psi needs no further decomposition.
        spare = self.degrees_of_freedom.unsqueeze(-1) - num_features
        degrees = (spare + torch.arange(1, num_features + 1, device=psi.device)).to(psi.dtype).expand(shape[:-1])
        diagonal = torch.distributions.Chi2(degrees).rsample().sqrt()
        below = torch.randn(shape, dtype=psi.dtype, device=psi.device).tril(-1)
        factor = below + diagonal.diag_embed()
        drawn: Tensor = torch.linalg.solve_triangular(factor, psi.expand(shape), upper=False, left=False)
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density over the D(D+1)/2 free entries of the factor."""
        if self._validate_args:
            self._validate_sample(value)
        num_features = value.shape[-1]
        nu, log2 = self.degrees_of_freedom, math.log(2)
        log_diagonal = value.diagonal(dim1=-2, dim2=-1).log()
        whitened = torch.linalg.solve_triangular(value, self.scale_tril.expand(value.shape), upper=False)
        trace, log_det = whitened.square().sum((-2, -1)), 2 * log_diagonal.sum(-1)
        log_det_psi = 2 * self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        normaliser = 0.5 * nu * (log_det_psi - num_features * log2) - torch.special.multigammaln(0.5 * nu, num_features)
        powers = torch.arange(num_features, 0, -1, device=value.device)
        log_jacobian = num_features * log2 + (powers * log_diagonal).sum(-1)
        log_density: Tensor = normaliser - 0.5 * (nu + num_features + 1) * log_det - 0.5 * trace + log_jacobian
        return log_density

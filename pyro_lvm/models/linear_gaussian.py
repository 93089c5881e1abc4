r"""What probabilistic PCA and factor analysis share: the guide, the closed forms, the units.

.. math:: z \sim N(0, I_L), \quad x \mid z \sim N(W z + \mu, \Psi), \qquad x \sim N(\mu, W W^\top + \Psi)
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_lvm.blocks import Blocks
from pyro_lvm.exact import Parameters
from pyro_lvm.missing import Missing, has_missing
from pyro_lvm.models.information_criteria import InformationCriteria
from pyro_lvm.models.linear_gaussian_densities import condition, marginal_log_density, posterior_given
from pyro_lvm.models.linear_gaussian_em import LinearGaussianEM, Moments
from pyro_lvm.models.linear_gaussian_missing import impute_rows, observed_log_density, observed_posterior
from pyro_lvm.parameters import generator_for
from pyro_lvm.walk import by_rows

__all__ = ["LinearGaussianModel"]

GuideCovariance = Literal["diag", "full"]

# The noise never falls below this fraction of the scale of the data. Without a floor the density is unbounded where
# the factors explain features completely (a Heywood case); the square of the floor, 1e-6, is still above what single
# precision resolves in the posterior precision.
NOISE_FLOOR = 1e-3

# While the noise is larger than what a factor explains, the exact posterior puts that factor to sleep (its loadings go
# to zero), and it wakes slowly when the noise has fallen. A diagonal guide keeps all factors awake as long as they are
# mixed, so they must not be sorted out before the noise has fallen: the turn is slowed. A full guide does not need them
# mixed, so it starts with less noise instead, which helps, but less. (PPCA of iris with three factors ends 0.1 nats
# per datum short where the third is asleep: two seeds in ten at three times this turn, none in ten at this one.)
TURN_RATE = 0.06
START_NOISE = {"diag": 0.7, "full": 0.3}


class LinearGaussianModel(InformationCriteria, nn.Module):
    r"""Parameters, guide and closed forms of a linear-Gaussian latent variable model, whatever its noise.

    The parameters live in standardised units: with :math:`x = \text{location} + \text{scale} \cdot u`, two buffers
    that `initialize` takes from the data, one step size suits data of any scale. `loadings`, `mean` and `noise_scale`
    are in the units of the data. The density is that of :math:`x`, never of :math:`u`.

    Subclasses say how many noise scales there are (`_noise_shape`) and hold `model` and `guide`.
    """

    _unconstrained_noise: nn.Parameter
    location: Tensor
    scale: Tensor
    is_initialized: Tensor

    def __init__(self, num_features: int, latent_dim: int, guide_covariance: GuideCovariance = "diag") -> None:
        """Say the sizes; the arguments are described with the subclasses."""
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}; a model needs at least 1 feature")
        if latent_dim < 1:
            raise ValueError(f"latent_dim is {latent_dim}; a model needs at least 1 latent dimension: latent_dim=1")
        if latent_dim >= num_features:
            raise ValueError(
                f"latent_dim is {latent_dim} and num_features is {num_features}: with as many factors as features "
                f"nothing is left for the noise and the maximum is not defined. Use latent_dim <= {num_features - 1}"
            )
        if guide_covariance not in ("diag", "full"):
            raise ValueError(f"guide_covariance is {guide_covariance!r}; use 'diag' or 'full'")
        self.num_features = num_features
        self.latent_dim = latent_dim
        self.guide_covariance = guide_covariance
        self._standard_loadings = nn.Parameter(torch.empty(num_features, latent_dim))
        self._standard_mean = nn.Parameter(torch.empty(num_features))
        self._unconstrained_noise = nn.Parameter(torch.empty(self._noise_shape()))
        self._standard_guide_weight = nn.Parameter(torch.empty(latent_dim, num_features))
        guide_shape = (latent_dim,) if guide_covariance == "diag" else (latent_dim, latent_dim)
        self._unconstrained_guide_scale = nn.Parameter(torch.empty(guide_shape))
        # To become exact, a diagonal guide has to turn the factors, and W and A with them. In the entries of W and A
        # that is a walk along a narrow curved valley, where some starts were stuck after 3000 steps; with a parameter
        # for the turn, TURN_RATE of a radian per unit, it is a straight line. The density does not feel it.
        turns = guide_covariance == "diag" and latent_dim > 1
        self._turn = nn.Parameter(torch.empty(latent_dim, latent_dim)) if turns else None
        self.register_buffer("location", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(self._noise_shape()))
        self.register_buffer("is_initialized", torch.tensor(False))
        self.reset_parameters()

    def _noise_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    # Parameters, in the units of the data.

    @property
    def loadings(self) -> Tensor:
        """Loadings W, shape (D, L); identified only up to a rotation, compare W W^T."""
        standard = self._standard_loadings if self._turn is None else self._standard_loadings @ _rotation(self._turn)
        return standard * self.scale.expand(self.num_features).unsqueeze(-1)

    @property
    def mean(self) -> Tensor:
        """Mean of the data, shape (D,)."""
        return self.location + self.scale * self._standard_mean

    @property
    def noise_scale(self) -> Tensor:
        """Standard deviation of the noise, positive; shape () for PPCA, (D,) for factor analysis."""
        return self.scale * (NOISE_FLOOR + softplus(self._unconstrained_noise))

    @property
    def guide_weight(self) -> Tensor:
        """The matrix A of the guide, shape (L, D)."""
        standard = self._standard_guide_weight
        return (standard if self._turn is None else _rotation(self._turn).mT @ standard) / self.scale

    @property
    def guide_scale(self) -> Tensor:
        """Standard deviations (L,) of a diagonal guide, lower Cholesky factor (L, L) of a full one."""
        raw = self._unconstrained_guide_scale
        if self.guide_covariance == "diag":
            return softplus(raw)
        return raw.tril(-1) + torch.diag_embed(softplus(raw.diagonal(dim1=-2, dim2=-1)))

    def constrained(self) -> dict[str, Tensor]:
        """The parameters by name, in their natural form and in the units of the data."""
        names = ("loadings", "mean", "noise_scale", "guide_weight", "guide_scale")
        return {name: getattr(self, name) for name in names}

    # Where a fit starts.

    def reset_parameters(self) -> None:
        """Forget the data and any training; the next `initialize` starts afresh."""
        with torch.no_grad():
            self.is_initialized.fill_(False)
            self.location.zero_()
            self.scale.fill_(1.0)
            self._start(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def initialize(self, x: Tensor, *, seed: int) -> None:
        """Take location and scale from the data, random loadings from the seed; a second call changes nothing.

        Args:
            x: the whole data, shape (n, D).
            seed: of the random loadings; the global random state is left alone.

        Raises:
            ValueError: if x does not have D columns, or if a scale is zero, as it is for constant data.
        """
        if self.is_initialized:
            return
        x = self._as_rows(x).double()
        location = x.mean(0)
        self._take_units(location, (x - location).square().mean(0), len(x))
        self._start(torch.Generator().manual_seed(seed))

    def _take_units(self, location: Tensor, variance: Tensor, num_rows: int) -> None:
        """Measure from the mean of the data, in their standard deviations."""
        scale = (variance if self._noise_shape() else variance.mean()).sqrt()
        rounding = 1e-12 * (location.abs() if self._noise_shape() else location.abs().max())
        unusable = ~(scale > rounding)
        if unusable.any():
            where = f"columns {unusable.nonzero().flatten().tolist()} of x are" if self._noise_shape() else "x is"
            raise ValueError(
                f"{where} constant over the {num_rows} rows (or not finite): the noise there would be zero and the "
                "density unbounded. Drop what is constant: x = x[:, x.std(0) > 0]"
            )
        self.location.copy_(location)
        self.scale.copy_(scale)
        self.is_initialized.fill_(True)

    def _start(self, generator: torch.Generator) -> None:
        """Random loadings that explain half of the variance of a standardised feature."""
        shape = self._standard_loadings.shape
        draws = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(2 * self.latent_dim)
        self.set_parameters(
            loadings=self.scale.expand(self.num_features).unsqueeze(-1) * draws.to(self.scale),
            mean=self.location,
            noise_scale=self.scale * START_NOISE[self.guide_covariance],
        )

    @torch.no_grad()
    def set_parameters(self, *, loadings: Tensor, mean: Tensor, noise_scale: Tensor) -> None:
        r"""Set the model, and the guide to the exact posterior under it.

        The loadings are rotated, :math:`W \to W R`, until :math:`W^\top \Psi^{-1} W` is diagonal. That leaves the
        density of the data as it was and makes the posterior covariance diagonal, so a diagonal guide is exact too.

        Args:
            loadings: shape (D, L), units of the data, as everything here.
            mean: shape (D,).
            noise_scale: shape () for PPCA, (D,) for factor analysis; raised to the floor where it is below.
        """
        whitened = loadings / noise_scale.expand(mean.shape).unsqueeze(-1)
        _, singular_values, rotation = torch.linalg.svd(whitened, full_matrices=False)
        variance = 1 / (1 + singular_values.square())
        if self._turn is not None:
            self._turn.zero_()
        self._standard_loadings.copy_(loadings @ rotation.mT / self.scale.expand(mean.shape).unsqueeze(-1))
        self._standard_mean.copy_((mean - self.location) / self.scale)
        above_floor = (noise_scale / self.scale - NOISE_FLOOR).clamp_min(1e-3 * NOISE_FLOOR)
        self._unconstrained_noise.copy_(_inverse_softplus(above_floor))
        weight = variance.unsqueeze(-1) * (whitened @ rotation.mT).mT / noise_scale
        self._standard_guide_weight.copy_(weight * self.scale)
        raw_scale = _inverse_softplus(variance.sqrt())
        self._unconstrained_guide_scale.copy_(raw_scale if self.guide_covariance == "diag" else raw_scale.diag())

    def expectation_maximisation(self, data: Blocks, *, hard: bool = False) -> LinearGaussianEM:
        """The steps of EM for these data; `pyro_lvm.em` takes them."""
        if hard:
            raise ValueError(f"hard=True assigns rows to components, and {type(self).__name__} has none: drop it")
        self._as_rows(next(iter(data)))
        moments = Moments.of(data)
        self._take_units(moments.mean, moments.variance, len(data))

        def start(seed: int) -> Parameters:
            self._start(torch.Generator().manual_seed(seed))
            return {"loadings": self.loadings, "mean": self.mean, "noise_scale": self.noise_scale}

        # just above the floor, which the parameters reach only at minus infinity
        lowest = self.scale * (1 + 1e-3) * NOISE_FLOOR
        one_noise = not self._noise_shape()
        return LinearGaussianEM(
            data, moments, self.latent_dim, one_noise, lowest, start, lambda found: self.set_parameters(**found)
        )

    @torch.no_grad()
    def solve_guide(self) -> None:
        r"""Set the guide to the exact posterior under the model as it is: an E-step without gradients.

        A diagonal guide can be exact only where :math:`W^\top \Psi^{-1} W` is diagonal, so there the loadings are
        rotated as in `set_parameters`, which the density of the data does not feel. A full guide leaves them alone.
        """
        whitened = self.loadings / self.noise_scale.expand(self.num_features).unsqueeze(-1)
        if self.guide_covariance == "full":
            precision_root, _ = condition(torch.zeros_like(whitened.mT), whitened)
            weight = torch.cholesky_solve(whitened.mT, precision_root) / self.noise_scale
            factor = torch.linalg.cholesky(torch.cholesky_inverse(precision_root))
            raw_scale = factor.tril(-1) + _inverse_softplus(factor.diagonal()).diag()
        else:
            _, singular_values, rotation = torch.linalg.svd(whitened, full_matrices=False)
            # columns keep their sign from one call to the next: an optimiser remembers which way they went
            rotation = rotation * torch.where(rotation.diagonal() < 0, -1.0, 1.0).to(rotation).unsqueeze(-1)
            standard = self.loadings @ rotation.mT / self.scale.expand(self.num_features).unsqueeze(-1)
            if self._turn is not None:
                self._turn.zero_()
            self._standard_loadings.copy_(standard)
            variance = 1 / (1 + singular_values.square())
            weight = variance.unsqueeze(-1) * (whitened @ rotation.mT).mT / self.noise_scale
            raw_scale = _inverse_softplus(variance.sqrt())
        self._standard_guide_weight.copy_(weight * self.scale)
        self._unconstrained_guide_scale.copy_(raw_scale)

    # The pieces of model and guide.

    def _prior(self) -> dist.TorchDistribution:
        """N(0, I), in the family of the guide: between these two pairs torch knows the divergence in closed form."""
        zero = self.scale.new_zeros(self.latent_dim)
        if self.guide_covariance == "diag":
            return _independent_normal(zero, torch.ones_like(zero))
        return dist.MultivariateNormal(zero, scale_tril=torch.ones_like(zero).diag())

    @by_rows()
    def encode(self, x: Any) -> dist.TorchDistribution:
        """The guide's q(z given x) for rows x (n, D), any data: batch shape (n,), event shape (L,)."""
        loc = (self._as_rows(x) - self.mean) @ self.guide_weight.mT
        if self.guide_covariance == "diag":
            return _independent_normal(loc, self.guide_scale)
        return dist.MultivariateNormal(loc, scale_tril=self.guide_scale)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """The model's p(x given z) for factors z (..., L): batch shape (...), event shape (D,)."""
        return _independent_normal(z @ self.loadings.mT + self.mean, self.noise_scale)

    def _num_rows(self, x: Tensor | None, size: int | None) -> int:
        """Rows of the whole data set; refuses data of the wrong width."""
        rows = size if x is None else self._as_rows(x).shape[0]
        if rows is None:
            raise ValueError("x is None and size is None: say how many rows to draw, model(None, size=100)")
        return size or rows

    def _as_rows(self, x: Tensor | None) -> Tensor:
        if x is None:
            raise ValueError("x is None: guide and closed forms condition on data, only the model can draw them")
        if x.ndim != 2 or x.shape[-1] != self.num_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but num_features={self.num_features} asks for "
                f"(n, {self.num_features}). Make the model for the data, num_features={x.shape[-1] if x.ndim else 1}, "
                "or bring the data into rows and columns"
            )
        return x if x.is_floating_point() else x.to(self.scale)

    # Closed forms.

    @by_rows()
    def log_prob(self, x: Any, *, missing: Missing = None) -> Tensor:
        """Exact log evidence of rows x (n, D): nats per datum, shape (n,). Of a tensor it keeps gradients.

        NaN is an error, or integrated out with ``missing="marginalize"``. Other data that `fit` takes are walked.
        """
        x = self._as_rows(x).to(self.scale)
        density = observed_log_density if has_missing(x, missing) else marginal_log_density
        return density(x, self.loadings, self.mean, self.noise_scale)

    @by_rows()
    def posterior(self, x: Any, *, missing: Missing = None) -> dist.MultivariateNormal:
        """Exact p(z given x) for rows x (n, D): batch shape (n,), event shape (L,). Of a tensor it keeps gradients.

        NaN is an error, or integrated out with ``missing="marginalize"``. Other data that `fit` takes are walked.
        """
        x = self._as_rows(x).to(self.scale)
        given = observed_posterior if has_missing(x, missing) else posterior_given
        return given(x, self.loadings, self.mean, self.noise_scale)

    @by_rows(dim=1, missing=True)
    def impute(self, x: Any, num_draws: int = 100, seed: int | None = None) -> Tensor:
        """Draws of what is NaN in x (n, D) from its exact conditional given the rest, shape (num_draws, n, D).

        Data other than a tensor are walked, each part with a seed of its own.
        """
        x = self._as_rows(x).to(self.scale)
        generator = generator_for(seed, x.device)
        return impute_rows(x, self.loadings, self.mean, self.noise_scale, num_draws, generator)

    @torch.no_grad()
    def principal_axes(self) -> Tensor:
        r"""The loadings in a form that can be compared between fits, shape (D, L).

        The columns are orthogonal, sorted by the variance of the data they explain (:math:`\|w_l\|^2`, largest first),
        and signed so that the entry of largest size is positive. Not unique where two columns explain equal variance.
        """
        u, singular_values, _ = torch.linalg.svd(self.loadings, full_matrices=False)
        axes = u * singular_values
        largest: Tensor = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        return torch.where(largest < 0, -axes, axes)

    @torch.no_grad()
    def sample(self, n: int, seed: int | None = None) -> Tensor:
        """Draw n rows from the fitted density, shape (n, D); the same seed gives the same rows on every device."""
        generator = generator_for(seed, torch.device("cpu"))
        draws = torch.randn((n, self.latent_dim + self.num_features), generator=generator, dtype=self.scale.dtype)
        z, noise = torch.split(draws.to(self.scale), [self.latent_dim, self.num_features], dim=-1)
        return z @ self.loadings.mT + self.mean + self.noise_scale * noise

    @property
    def num_parameters(self) -> int:
        """Free parameters of the density: the L (L - 1) / 2 rotations of W, which it does not feel, are taken off."""
        loadings = self.num_features * self.latent_dim - self.latent_dim * (self.latent_dim - 1) // 2
        return loadings + self.num_features + math.prod(self._noise_shape())


def _independent_normal(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    return dist.Independent(dist.Normal(loc, scale), 1)


def _rotation(turn: Tensor) -> Tensor:
    """The rotation (L, L) that the lower triangle of `turn` stands for, by Cayley's transform."""
    skew = 0.5 * TURN_RATE * (turn.tril(-1) - turn.tril(-1).mT)
    identity = torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)
    rotation: Tensor = torch.linalg.solve(identity - skew, identity + skew)
    return rotation


def _inverse_softplus(positive: Tensor) -> Tensor:
    return positive + (-(-positive).expm1()).log()

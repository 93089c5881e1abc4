"""Bayesian PPCA: principal components that are switched off where the data do not need them."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_lvm.data import as_rows
from pyro_lvm.models.bayesian_ppca_updates import (
    BayesianPPCAState,
    BayesianPPCAUpdates,
    Hyperparameters,
    Standardised,
    factor_posterior,
)
from pyro_lvm.models.mixture_prior import global_site
from pyro_lvm.prior_distributions import InUnits
from pyro_lvm.storage.classes import storable
from pyro_lvm.walk import by_rows

__all__ = ["BayesianPPCA"]


@storable
class BayesianPPCA(nn.Module):
    r"""Probabilistic PCA with a prior over all its parameters and automatic relevance determination.

    .. math::
        \alpha_l \sim \mathrm{Gamma}(a, b), \quad w_{dl} \mid \alpha_l \sim N(0, s^2 / \alpha_l), \quad
        \mu \sim N(\bar x, (s^2 / \beta) I), \quad \tau s^2 \sim \mathrm{Gamma}(a, b) \\
        z_n \sim N(0, I_L), \qquad x_n \mid z_n \sim N(W z_n + \mu, \tau^{-1} I_D)

    A column of W that explains too little to pay for itself is given a large :math:`\alpha_l`, and goes to zero: the
    number of components is an outcome. :math:`\bar x` and :math:`s^2`, the mean variance of a feature, are taken from
    the data by `initialize`; they stand for the place and unit of the data, of which the prior shall say nothing.

    Sites: ``relevance`` (event (L,)), ``loadings`` (event (D, L)), ``mean`` (event (D,)), ``precision`` (event ()),
    ``z`` (plate "data"; event (L,)), ``x`` (plate "data"; event (D,); observed). The guide is of the conjugate family,

    .. math::
        q = \prod_l \mathrm{Gamma}(\alpha_l) \prod_d N(w_d \mid M_d, \Sigma_w) \; N(\mu \mid m, \sigma^2 I) \;
        \mathrm{Gamma}(\tau) \prod_n N(z_n \mid \bar z_n, \Sigma_z)

    with the factors' part always the best that goes with the others, so that ``lvm.fit`` (gradients, also in
    minibatches) and ``lvm.coordinate_ascent`` (closed form, quicker) climb the same bound; ``guide="mean_field"``
    trains too, slowly.

    When it is wrong: W is identified up to rotation only, which the relevances break in favour of orthogonal columns;
    mean field then reports widths that know nothing of the rest. Features in different units share one noise level:
    standardise first. Coordinate ascent switches a factor off slowly, over many rounds of small gains: a tolerance of
    1e-6 nats per datum may leave it half alight.

    Source: Bishop, 1999, Variational principal components,
    https://www.microsoft.com/en-us/research/publication/variational-principal-components/.

    Args:
        num_features: D, columns of the data.
        latent_dim: L, the most components there can be, less than D. Default: D - 1.
        shape: a, of the relevances and the noise precision.
        rate: b, of both; in standardised units.
        mean_precision: beta, in standardised units.

    Raises:
        ValueError: if latent_dim is not in 1..D-1, or a number of the prior is not positive.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> generator = torch.Generator().manual_seed(0)
        >>> line = torch.randn(200, 1, generator=generator) @ torch.ones(1, 4)
        >>> ppca = lvm.BayesianPPCA(num_features=4)
        >>> fit = lvm.coordinate_ascent(ppca, line + 0.1 * torch.randn(200, 4, generator=generator), max_iter=500)
        >>> (ppca.explained_variances() > 0.1).tolist()
        [True, False, False]
    """

    location: Tensor
    scale: Tensor
    is_initialized: Tensor

    def __init__(
        self,
        num_features: int,
        latent_dim: int | None = None,
        shape: float = 1e-3,
        rate: float = 1e-3,
        mean_precision: float = 1e-3,
    ) -> None:
        super().__init__()
        latent_dim = num_features - 1 if latent_dim is None else latent_dim
        if not 1 <= latent_dim < num_features:
            raise ValueError(
                f"latent_dim is {latent_dim} and num_features is {num_features}: there must be at least 1 component, "
                "and fewer than features, or nothing is left for the noise"
            )
        for name, value in (("shape", shape), ("rate", rate), ("mean_precision", mean_precision)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be positive and finite, for example 1e-3")
        self.num_features, self.latent_dim = num_features, latent_dim
        self._given = {"shape": shape, "rate": rate, "mean_precision": mean_precision}
        self.hyperparameters = Hyperparameters(shape, rate, mean_precision)
        # q in standardised units; Gammas by the logarithms of mean and shape
        self._relevance = nn.Parameter(torch.empty(2, latent_dim))
        self._loadings = nn.Parameter(torch.empty(num_features, latent_dim))
        self._loadings_root = nn.Parameter(torch.empty(latent_dim, latent_dim))
        self._mean = nn.Parameter(torch.empty(num_features))
        self._mean_log_scale = nn.Parameter(torch.empty(()))
        self._precision = nn.Parameter(torch.empty(2))
        self.register_buffer("location", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("is_initialized", torch.tensor(False))
        self.reset_parameters()

    # ------------------------------------------------------------------------------------------------ the program

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Draw the parameters, then the rows; x: rows (batch, D) or None to draw ``size`` rows, size: of the data."""
        rows = self._num_rows(x, size)
        prior, one = self.hyperparameters, torch.ones_like(self.scale)
        gamma = dist.Gamma(prior.shape * one, prior.rate * one)
        relevance = global_site("relevance", gamma.expand(torch.Size([self.latent_dim])).to_event(1), "latent")
        root = (self.scale / relevance.sqrt()).diag_embed().unsqueeze(-3)
        columns = dist.MultivariateNormal(root.new_zeros(self.latent_dim), scale_tril=root)
        columns = columns.expand(torch.Size([*columns.batch_shape[:-1], self.num_features]))
        loadings = global_site("loadings", self._in_units(columns).to_event(1), "feature", "latent")
        around = dist.Normal(self.location, self.scale / prior.mean_precision**0.5).to_event(1)
        mean = global_site("mean", self._in_units(around), "feature")
        precision = global_site("precision", dist.Gamma(prior.shape * one, prior.rate * self.scale.square()))
        with pyro.plate("data", rows, subsample=x):
            zero = self.location.new_zeros(self.latent_dim)
            z = global_site("z", dist.MultivariateNormal(zero, scale_tril=torch.ones_like(zero).diag()), "latent")
            across = loadings.squeeze(-3) if loadings.dim() > 2 else loadings  # drawn once for all rows
            density = dist.Normal(z @ across.mT + mean, precision.rsqrt().unsqueeze(-1)).to_event(1)
            named: Any = {"event_dims": ("feature",)}
            return pyro.sample("x", density, obs=x, infer=named)

    def guide(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The conjugate family; arguments as those of the model, x needed."""
        if x is None:
            raise ValueError("x is None: the guide conditions on data, only the model can draw them")
        rows = self._num_rows(x, size)
        shape, mean = self._relevance[1].exp(), self._relevance[0].exp()
        pyro.sample("relevance", dist.Gamma(shape, shape / mean).to_event(1))
        around = dist.MultivariateNormal(self.scale * self._loadings, scale_tril=self.scale * self._root())
        pyro.sample("loadings", self._in_units(around).to_event(1))
        near = dist.Normal(self.location + self.scale * self._mean, self.scale * self._mean_log_scale.exp())
        pyro.sample("mean", self._in_units(near.to_event(1)))
        shape, mean = self._precision[1].exp(), self._precision[0].exp()
        pyro.sample("precision", dist.Gamma(shape, shape / mean * self.scale.square()))
        with pyro.plate("data", rows, subsample=x):
            return pyro.sample("z", self.encode(x))

    @by_rows()
    def encode(self, x: Any) -> dist.MultivariateNormal:
        """The guide's q of the factors of rows x (n, D), any data: batch shape (n,), event shape (L,)."""
        self._check_columns(x)
        root = self._root()
        square = self._loadings.mT @ self._loadings + self.num_features * root @ root.mT
        gain, covariance = factor_posterior(self._loadings, square, self._precision[0].exp())
        residual = (x - self.location) / self.scale - self._mean
        return dist.MultivariateNormal(residual @ gain.mT, scale_tril=torch.linalg.cholesky(covariance))

    # -------------------------------------------------------------------------------------------- what q says of it

    @property
    def loadings(self) -> Tensor:
        """Mean of W under q, shape (D, L), units of the data."""
        return self.scale * self._loadings

    @torch.no_grad()
    def explained_variances(self) -> Tensor:
        """Squared length of each column of the mean of W, shape (L,), squared units of the data; 0 is switched off."""
        return self.loadings.square().sum(0)

    def constrained(self) -> dict[str, Tensor]:
        """Numbers of q, in the units of the data: of a Gamma its shape and rate, of a normal its mean and width."""
        relevance, precision = self._relevance.exp(), self._precision.exp()
        return {
            "relevance_shape": relevance[1],
            "relevance_rate": relevance[1] / relevance[0],
            "loadings": self.loadings,
            "loadings_scale_tril": self.scale * self._root(),
            "mean": self.location + self.scale * self._mean,
            "mean_scale": self.scale * self._mean_log_scale.exp(),
            "precision_shape": precision[1],
            "precision_rate": precision[1] / precision[0] * self.scale.square(),
        }

    def initial_values(self) -> dict[str, Tensor]:
        """Where a guide that is built from the model starts: the means of q, by site."""
        values = {
            "relevance": self._relevance[0].exp(),
            "loadings": self.loadings,
            "mean": self.location + self.scale * self._mean,
            "precision": self._precision[0].exp() / self.scale.square(),
        }
        return {name: value.detach().clone() for name, value in values.items()}

    # ------------------------------------------------------------------------------------------------ where it starts

    def reset_parameters(self) -> None:
        """Forget the data and any training; the next `initialize` starts afresh."""
        with torch.no_grad():
            self.is_initialized.fill_(False)
            self.location.zero_()
            self.scale.fill_(1.0)
            for parameter in self.parameters():
                parameter.zero_()
            self._loadings.fill_diagonal_(0.5)
            self._loadings_root.copy_(torch.full_like(self._loadings_root[0], -2.0).diag())
            self._mean_log_scale.fill_(-2.0)

    @torch.no_grad()
    def initialize(self, x: Tensor, *, seed: int) -> None:
        """Take place and unit from the data, and q from their principal axes; a second call changes nothing.

        Args:
            x: the whole data, shape (n, D).
            seed: not used: the principal axes are what they are.

        Raises:
            ValueError: if x does not have D columns, or is constant.
        """
        if not self.is_initialized:
            self._check_columns(x)
            updates = self.coordinate_updates()
            updates.guide(updates.start(as_rows(x, "x"), seed, None, False))

    def coordinate_updates(self) -> BayesianPPCAUpdates:
        """Closed-form updates for :func:`~pyro_lvm.coordinate_ascent`."""
        present = (self.location, self.scale, self._state) if self.is_initialized else None
        return BayesianPPCAUpdates(self.hyperparameters, self.latent_dim, present, self._hold)

    @torch.no_grad()
    def _hold(self, state: BayesianPPCAState) -> Any:
        """Make q this state, and its data's place and unit those of the prior; the guide."""
        self.location.copy_(state.data.location)
        self.scale.copy_(state.data.scale)
        self._relevance.copy_(torch.stack([state.relevance, state.relevance_shape]).log())
        self._loadings.copy_(state.loadings)
        root = torch.linalg.cholesky(state.loadings_covariance)
        self._loadings_root.copy_(root.tril(-1) + root.diagonal().log().diag())
        self._mean.copy_(state.mean)
        self._mean_log_scale.copy_(state.mean_variance.log() / 2)
        self._precision.copy_(torch.stack([state.precision, state.precision_shape]).log())
        self.is_initialized.fill_(True)
        return self.guide

    @torch.no_grad()
    def _state(self, data: Standardised) -> BayesianPPCAState:
        """Q as it is now, with these data."""
        relevance, precision = self._relevance.double().exp(), self._precision.double().exp()
        root = self._root().double()
        return BayesianPPCAState(
            relevance_shape=relevance[1],
            relevance_rate=relevance[1] / relevance[0],
            loadings=self._loadings.double(),
            loadings_covariance=root @ root.mT,
            mean=self._mean.double(),
            mean_variance=(2 * self._mean_log_scale.double()).exp(),
            precision_shape=precision[1],
            precision_rate=precision[1] / precision[0],
            data=data,
        )

    # -------------------------------------------------------------------------------------------------- the inside

    def _root(self) -> Tensor:
        """Cholesky factor of the covariance of a row of W, standardised units."""
        return self._loadings_root.tril(-1) + self._loadings_root.diagonal().exp().diag_embed()

    def _in_units(self, fn: Any) -> Any:
        """The same distribution, with unconstrained coordinates in units of the data's scale."""
        return InUnits(fn, self.scale.expand(fn.event_shape[-1]))

    def _num_rows(self, x: Tensor | None, size: int | None) -> int:
        self._check_columns(x)
        rows = size or (None if x is None else len(x))
        if rows is None:
            raise ValueError("x is None and size is None: say how many rows to draw, model(None, size=100)")
        return rows

    def _check_columns(self, x: Tensor | None) -> None:
        if x is not None and (x.dim() != 2 or x.shape[-1] != self.num_features):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but num_features={self.num_features} asks for "
                f"(n, {self.num_features}): make the model for the data, or bring the data into rows and columns"
            )

r"""Gaussian mixture: K clusters, each an ellipsoid.

.. math::
    k_i \sim \mathrm{Categorical}(\pi), \qquad x_i \mid k_i \sim \mathcal{N}(\mu_{k_i}, \Sigma_{k_i}), \qquad
    \log p(x) = \sum_i \log \sum_k \pi_k \, \mathcal{N}(x_i \mid \mu_k, \Sigma_k)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from pyro_lvm.blocks import Blocks
from pyro_lvm.errors import ProgramError
from pyro_lvm.exact import ExpectationMaximisation
from pyro_lvm.missing import Missing, has_missing
from pyro_lvm.models.conjugate_mixture import ConjugateFactors
from pyro_lvm.models.conjugate_mixture_guide import ConjugateMixtureGuide
from pyro_lvm.models.information_criteria import InformationCriteria
from pyro_lvm.models.mixture_densities import (
    COVARIANCES,
    Covariance,
    covariances_from_scale,
    mixture_log_joint,
)
from pyro_lvm.models.mixture_em import MixtureEM
from pyro_lvm.models.mixture_initialization import best_of_short_runs
from pyro_lvm.models.mixture_kmeans import KMeans
from pyro_lvm.models.mixture_missing import impute_rows, observed_log_joint
from pyro_lvm.models.mixture_parameters import MixtureParameters
from pyro_lvm.models.mixture_prior import conjugate_prior, fitting_concentration, prior_sites
from pyro_lvm.models.mixture_updates import MixtureUpdates
from pyro_lvm.parameters import generator_for
from pyro_lvm.priors import NormalInverseWishart
from pyro_lvm.storage.classes import storable
from pyro_lvm.walk import by_rows

__all__ = ["GaussianMixture"]


@storable
class GaussianMixture(InformationCriteria, nn.Module):
    r"""Gaussian mixture with its label enumerated, by maximum likelihood or with a prior over its parameters.

    .. math::
        k_i \sim \mathrm{Categorical}(\pi), \qquad x_i \mid k_i \sim \mathcal{N}(\mu_{k_i}, \Sigma_{k_i})

    Sites: ``component`` (plate "data"; event ()), summed out exactly; ``x`` (plate "data"; event (D,)), observed.
    With a prior also the global sites ``weights`` (K,), ``locs`` (K, D), and ``scales`` ((K, D) for "diag", (K,) for
    "spherical") or ``scale_tril`` ((K, D, D) for "full", (D, D) for "tied").

    Without a prior nothing latent is left once the label is summed out: the ELBO *is* the log-likelihood, and the
    guide is empty. With one, the guide is mean field over the global sites (``guide`` is None, and ``fit`` builds it).

    When it is wrong: the likelihood has many maxima and, without `reg_covar`, no upper bound. A fit starts from the
    best of many short runs and may still end in another maximum for another seed. Components can be renumbered at
    will: compare runs or average draws after :func:`~pyro_lvm.label_switching.align_components`. McLachlan
    and Peel (2000), https://doi.org/10.1002/0471721182, chapters 2 and 3.

    Args:
        num_components: K.
        num_features: D.
        covariance: "full" (an ellipsoid each), "tied" (one for all), "diag" (axes along the features), "spherical"
            (balls).
        prior: None for maximum likelihood, or a prior such as ``priors.weakly_informative(x)``.
        reg_covar: floor under every variance, in squared units of the data, as in scikit-learn. With a prior it is used
            for the start only; there the prior keeps the variances away from zero.

    Raises:
        ValueError: if a size is not positive, a name is unknown, or the prior is for another number of features.

    Example:
        >>> import torch
        >>> gmm = GaussianMixture(num_components=2, num_features=1)
        >>> gmm.set_parameters(torch.tensor([0.5, 0.5]), torch.tensor([[-2.0], [2.0]]), torch.ones(2, 1, 1))
        >>> gmm.responsibilities(torch.tensor([[-2.0], [0.0]])).detach().round(decimals=3)
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]])
    """

    is_initialized: Tensor
    prior_mean: Tensor
    prior_scale_tril: Tensor
    prior_concentration: Tensor

    def __init__(
        self,
        num_components: int,
        num_features: int,
        covariance: Covariance = "full",
        prior: NormalInverseWishart | None = None,
        reg_covar: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_components < 1 or num_features < 1:
            raise ValueError(
                f"num_components={num_components} and num_features={num_features} must both be at least 1; "
                f"num_features is the number of columns of x."
            )
        if covariance not in COVARIANCES:
            names = ", ".join(map(repr, COVARIANCES))
            raise ValueError(f"covariance={covariance!r} is unknown; choose one of {names}.")
        if not reg_covar >= 0 or math.isinf(reg_covar):
            raise ValueError(f"reg_covar={reg_covar} must be a variance, finite and not negative, for example 1e-6.")
        self.num_components, self.num_features = num_components, num_features
        self.covariance: Covariance = covariance
        self.reg_covar, self.prior = float(reg_covar), prior
        self.register_buffer("is_initialized", torch.tensor(False))
        # With a prior the parameters are sites; this module then only remembers where their fit shall start.
        self.coordinates = MixtureParameters(num_components, num_features, covariance, self.reg_covar)
        if prior is not None:
            self._register_prior(prior)

    # ------------------------------------------------------------------------------------------------ the program

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Draw a label, then a datum.

        Args:
            x: data, shape (batch, D), or None to draw `size` rows.
            size: rows of the whole data set; the plate's scale. Default: len(x).

        Returns:
            x, or the rows drawn, shape (size, D).

        Raises:
            ValueError: if x does not have D columns, or neither x nor size is given.
        """
        if x is None and size is None:
            raise ValueError("model needs data x, or x=None with size=n to draw n rows; got neither.")
        self._check_columns(x)
        weights, locs, scale = self._natural() if self.prior is None else self._prior_sites(self.prior)
        with pyro.plate("data", size or (0 if x is None else len(x)), subsample=x):
            component = pyro.sample("component", dist.Categorical(weights), infer={"enumerate": "parallel"})
            likelihood = self._component_distribution(component, locs, scale)
            named: Any = {"event_dims": ("feature",)}
            return pyro.sample("x", likelihood, obs=x, infer=named)

    @property
    def guide(self) -> Callable[..., None] | None:
        """Nothing to guide without a prior; with one None, which asks ``fit`` for mean field over the global sites."""
        return None if self.prior is not None else self._empty_guide

    def _empty_guide(self, x: Tensor | None = None, size: int | None = None) -> None:
        """The only latent site is enumerated in the model."""

    def _component_distribution(self, component: Tensor, locs: Tensor, scale: Tensor) -> Any:
        loc = Vindex(locs)[..., component, :]
        if self.covariance == "full":
            return dist.MultivariateNormal(loc, scale_tril=Vindex(scale)[..., component, :, :])
        if self.covariance == "tied":
            return dist.MultivariateNormal(loc, scale_tril=scale)
        if self.covariance == "diag":
            return dist.Normal(loc, Vindex(scale)[..., component, :]).to_event(1)
        return dist.Normal(loc, Vindex(scale)[..., component].unsqueeze(-1)).to_event(1)

    def _prior_sites(self, prior: NormalInverseWishart) -> tuple[Tensor, Tensor, Tensor]:
        return prior_sites(prior, *self._hyperparameters())

    def _hyperparameters(self) -> tuple[Covariance, Tensor, Tensor, Tensor]:
        return self.covariance, self.prior_concentration, self.prior_mean, self.prior_scale_tril

    def conjugate_guide(self) -> ConjugateMixtureGuide:
        """A guide of the prior's family; ``lvm.fit(mixture, x, guide=mixture.conjugate_guide())`` trains it.

        Raises:
            ProgramError: without a prior.
        """
        return ConjugateMixtureGuide(self._conjugate_prior("conjugate_guide"), self._start)

    def coordinate_updates(self) -> MixtureUpdates:
        """Closed-form updates for :func:`~pyro_lvm.coordinate_ascent`.

        Raises:
            ProgramError: without a prior.
        """
        return MixtureUpdates(self._conjugate_prior("coordinate_ascent"), self._start, self.conjugate_guide)

    def _start(self, x: Tensor, seed: int, fresh: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        if self.is_initialized and not fresh:
            return self._natural()
        start = best_of_short_runs(x, self.num_components, self.covariance, self.reg_covar, seed)
        parameters = MixtureParameters(self.num_components, self.num_features, self.covariance, self.reg_covar)
        parameters.to(start[1]).set_natural(*start)
        return parameters.weights, parameters.locs, parameters.scale

    def _conjugate_prior(self, purpose: str) -> ConjugateFactors:
        if self.prior is None:
            need = f"{purpose} needs a prior over the parameters, and this mixture has none"
            raise ProgramError(f"{need}: build it with prior=priors.weakly_informative(x).")
        return conjugate_prior(self.prior, *self._hyperparameters())

    # ------------------------------------------------------------------------------------------------ closed forms

    @by_rows()
    def log_prob(self, x: Any, *, missing: Missing = None) -> Tensor:
        """Exact log evidence of each row, label summed out; of a tensor it keeps gradients.

        Args:
            x: data, shape (n, D); other data than a tensor are walked, whatever `fit` takes.
            missing: "marginalize" integrates out what is NaN; None makes NaN an error.

        Returns:
            Shape (n,), nats per datum.

        Raises:
            ProgramError: with a prior; ``fit.log_prob(x)`` averages over the posterior.
        """
        return self._log_joint(x, "log_prob", missing).logsumexp(-1)

    @by_rows()
    def responsibilities(self, x: Any, *, missing: Missing = None) -> Tensor:
        """Bayes' rule for the label, p(component = k | x); of a tensor it keeps gradients.

        Args:
            x: data, shape (n, D); other data than a tensor are walked, whatever `fit` takes.
            missing: as for `log_prob`.

        Returns:
            Shape (n, K); rows sum to one.

        Raises:
            ProgramError: with a prior; ``fit.responsibilities(x)`` averages over the posterior.
        """
        return self._log_joint(x, "responsibilities", missing).softmax(-1)

    def _log_joint(self, x: Tensor, method: str, missing: Missing) -> Tensor:
        """Log p(x, component = k), shape (n, K)."""
        self._check(x, method)
        if has_missing(x, missing):
            return observed_log_joint(x, *self._natural(), self.covariance)
        return mixture_log_joint(x, *self._natural(), self.covariance)

    @by_rows(dim=1, missing=True)
    def impute(self, x: Any, num_draws: int = 100, seed: int | None = None) -> Tensor:
        """Draws of what is NaN in x (n, D) from its exact conditional given the rest, shape (num_draws, n, D).

        Data other than a tensor are walked, each part with a seed of its own.

        Raises:
            ProgramError: with a prior; ``fit.impute(x)`` draws the parameters too.
        """
        self._check(x, "impute")
        generator = generator_for(seed, x.device)
        return impute_rows(x, *self._natural(), self.covariance, num_draws, generator)

    @by_rows(dim=-2)
    def log_joint_given(self, x: Any, sites: dict[str, Tensor]) -> Tensor:
        """Log p(x, component = k | parameters) for given parameter draws; what posterior averages are made of.

        Args:
            x: data, shape (n, D), in any form that `fit` takes.
            sites: ``weights`` (..., K), ``locs`` (..., K, D) and ``scales`` or ``scale_tril`` (...), as drawn.

        Returns:
            Shape (..., n, K), nats per datum. Its logsumexp over k is log p(x | parameters), its softmax Bayes' rule.
        """
        self._check_columns(x)
        return mixture_log_joint(x, sites["weights"], sites["locs"], sites[self._scale_site], self.covariance)

    @torch.no_grad()
    def sample(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw from the mixture, without touching the global random state.

        Args:
            n: number of rows.
            seed: of the draw.

        Returns:
            x of shape (n, D), and the labels of shape (n,), int64.

        Raises:
            ValueError: if n < 1.
            ProgramError: with a prior.
        """
        self._refuse_prior("sample")
        if n < 1:
            raise ValueError(f"n is {n}; ask for at least one row.")
        locs, factor = self.locs, self.scale_tril
        generator = torch.Generator(locs.device).manual_seed(seed)
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.num_features, 1, generator=generator, dtype=locs.dtype, device=locs.device)
        each = factor if self.covariance == "tied" else factor[component]
        return locs[component] + (each @ noise).squeeze(-1), component

    @property
    def num_parameters(self) -> int:
        """Free parameters: K - 1 weights, K means, and the entries of the covariances that may differ."""
        k, d = self.num_components, self.num_features
        in_covariances = {"full": k * d * (d + 1) // 2, "tied": d * (d + 1) // 2, "diag": k * d, "spherical": k}
        return k - 1 + k * d + in_covariances[self.covariance]

    # -------------------------------------------------------------------------------------------------- parameters

    @property
    def weights(self) -> Tensor:
        """Mixing weights, shape (K,); with a prior, where its fit starts."""
        return self.coordinates.weights

    @property
    def locs(self) -> Tensor:
        """Component means, shape (K, D); with a prior, where its fit starts."""
        return self.coordinates.locs

    @property
    def covariances(self) -> Tensor:
        """Covariances, floor included: (K, D, D) full, (D, D) tied, (K, D) diag, (K,) spherical, as in scikit-learn."""
        return covariances_from_scale(self.coordinates.scale, self.covariance)

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factors of the covariances, shape (K, D, D), or (D, D) if tied, whatever the covariance type."""
        scale = self.coordinates.scale
        if self.covariance == "spherical":
            scale = scale.unsqueeze(-1).expand(self.num_components, self.num_features)
        return scale if self.covariance in ("full", "tied") else scale.diag_embed()

    def constrained(self) -> dict[str, Tensor]:
        """Parameters by the names of the Bayesian sites: weights, locs, and scales or scale_tril; {} with a prior."""
        return {} if self.prior is not None else self._by_site()

    def initial_values(self) -> dict[str, Tensor]:
        """Where the global sites of a Bayesian fit start: the best of the short runs, by site name; {} without a prior.

        The medians of the prior would make all components equal, and equal components stay equal.
        """
        start = self._by_site() if self.prior is not None else {}
        return {name: value.detach().clone() for name, value in start.items()}

    @torch.no_grad()
    def initialize(self, x: Tensor, *, seed: int) -> None:
        """Start from the best of many short runs, seeded by k-means++ in whitened coordinates.

        Does nothing if the mixture has parameters already; :meth:`reset_parameters` makes it forget them.

        Args:
            x: the whole data, shape (n, D), n >= K.
            seed: of the restarts.

        Raises:
            ValueError: if x has no rows, fewer rows than components, another number of columns, or is not finite.
        """
        if self.is_initialized:
            return
        self._check_columns(x)
        start = best_of_short_runs(x, self.num_components, self.covariance, self.reg_covar, seed)
        self.coordinates.set_natural(*start)
        self.is_initialized.fill_(True)

    @torch.no_grad()
    def set_parameters(self, weights: Tensor, locs: Tensor, covariances: Tensor) -> None:
        """Take these parameters, for instance another program's solution; a fit then continues from them.

        Args:
            weights: shape (K,), positive, sum one.
            locs: shape (K, D).
            covariances: as :attr:`covariances`, with every variance at least `reg_covar`.

        Raises:
            ValueError: if a shape does not fit, the weights do not sum to one, or a variance is below `reg_covar`.
        """
        self.coordinates.set_natural(weights, locs, covariances)
        self.is_initialized.fill_(True)

    def expectation_maximisation(self, data: Blocks, *, hard: bool = False) -> ExpectationMaximisation:
        """The steps of EM for these data, or of K-means; `pyro_lvm.em` takes them."""
        self._check_columns(next(iter(data)))
        steps = MixtureEM(
            data,
            self.num_components,
            self.covariance,
            self.reg_covar if self.prior is None else 0.0,
            self.prior,
            lambda found: self.set_parameters(**found),
        )
        return KMeans(steps) if hard else steps

    def reset_parameters(self) -> None:
        """Forget everything; the next fit initialises again."""
        self.coordinates.reset()
        self.is_initialized.fill_(False)

    # -------------------------------------------------------------------------------------------------- the inside

    @property
    def _scale_site(self) -> str:
        return "scale_tril" if self.covariance in ("full", "tied") else "scales"

    def _natural(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.coordinates.weights, self.coordinates.locs, self.coordinates.scale

    def _by_site(self) -> dict[str, Tensor]:
        return dict(zip(("weights", "locs", self._scale_site), self._natural(), strict=True))

    def _register_prior(self, prior: NormalInverseWishart) -> None:
        concentration = fitting_concentration(prior, self.num_components, self.num_features)
        for parameter in self.coordinates.parameters():
            parameter.requires_grad_(False)
        self.register_buffer("prior_mean", prior.mean.clone())
        self.register_buffer("prior_scale_tril", torch.linalg.cholesky(prior.scale_matrix))
        self.register_buffer("prior_concentration", concentration)

    def _refuse_prior(self, method: str) -> None:
        if self.prior is not None:
            raise ProgramError(
                f"{method} needs one value of the parameters, but with a prior they have a posterior: use "
                f"fit.log_prob(x) or fit.responsibilities(x), which average over it, or draw fit.posterior(x)."
            )

    def _check(self, x: Tensor, method: str) -> None:
        self._refuse_prior(method)
        self._check_columns(x)
        if x.dtype != self.coordinates.logits.dtype:
            raise TypeError(
                f"x has dtype {x.dtype}, the mixture {self.coordinates.logits.dtype}: call mixture.to(x.dtype) first, "
                f"or cast x (fit casts the mixture to the data's dtype)."
            )

    def _check_columns(self, x: Tensor | None) -> None:
        if x is not None and (x.dim() != 2 or x.shape[-1] != self.num_features):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but the mixture was built with num_features={self.num_features}: "
                f"expected shape (n, {self.num_features})."
            )

    def extra_repr(self) -> str:
        """Sizes, for print(mixture)."""
        return f"{self.num_components}, {self.num_features}, {self.covariance!r}, reg_covar={self.reg_covar:g}"

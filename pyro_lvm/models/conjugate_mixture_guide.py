r"""The conjugate guide of a Bayesian Gaussian mixture: what coordinate ascent finds, as a program.

.. math::
    \pi \sim \mathrm{Dir}(\alpha_{1:K}), \qquad \Sigma_k \sim \mathcal{IW}(\nu_k, \Psi_k), \qquad
    \mu_k \mid \Sigma_k \sim \mathcal{N}(m_k, \Sigma_k / \kappa_k), \qquad
    q(k_i) \propto \exp E_q[\log \pi_k + \log \mathcal{N}(x_i \mid \mu_k, \Sigma_k)]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_lvm.models.conjugate_mixture import (
    ConjugateFactors,
    absorb,
    expected_log_joint,
    weighted_moments,
)
from pyro_lvm.models.mixture_densities import mixture_log_joint
from pyro_lvm.models.mixture_parameters import MixtureParameters
from pyro_lvm.models.mixture_prior import global_site
from pyro_lvm.prior_distributions import InUnits, InverseWishartCholesky

__all__ = ["ConjugateMixtureGuide"]

Start = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
"""From data (n, D) and a seed to weights, locs and scale of a mixture, as in `mixture_densities`."""


class ConjugateMixtureGuide(nn.Module):
    r"""Dirichlet times normal-inverse-Wisharts, and for each label the best factor that goes with them.

    Sites: ``weights`` (event (K,)), ``scale_tril`` or ``scales`` (as in the model), ``locs`` (event (K, D)), and
    ``component`` (plate "data"; event ()), listed in the guide. Its bound is therefore the mean-field bound, in which
    labels and parameters are independent. The model's own enumeration, where the guide has no label, sums the label out
    given the parameters and is a little tighter.

    The parameters live relative to where a fit starts, in the units of the clusters there
    (:class:`~pyro_lvm.models.mixture_parameters.MixtureParameters`), counts and degrees of freedom in logarithms, so
    that one step size suits all. ``GaussianMixture.conjugate_guide()`` makes one; ``lvm.coordinate_ascent`` returns a
    fit with one, and ``lvm.fit(gmm, x, guide=gmm.conjugate_guide())`` climbs to the same place by gradients.

    When it is wrong: q makes labels and parameters independent, and so is too narrow where clusters overlap; and it
    knows one numbering of the components. Bishop (2006), Pattern Recognition and Machine Learning, section 10.2.

    Args:
        prior: the factors of the prior, where the guide starts without data.
        start: gives a mixture to start from; `initialize` asks it.
    """

    is_initialized: Tensor

    def __init__(self, prior: ConjugateFactors, start: Start) -> None:
        super().__init__()
        self.covariance = prior.covariance
        self._start = start
        self.register_buffer("is_initialized", torch.tensor(False))
        for name in ("concentration", "mean", "mean_precision", "degrees_of_freedom", "root"):
            self.register_buffer(f"prior_{name}", getattr(prior, name).detach().clone())
        k, d = prior.mean.shape
        # weights, locs and scale stand for the mean weights, m and the root of Psi / nu
        self.coordinates = MixtureParameters(k, d, prior.covariance, 0.0)
        self.log_total = nn.Parameter(torch.zeros(()))
        self.log_mean_precision = nn.Parameter(torch.zeros(k))
        self.log_spare_degrees = nn.Parameter(torch.zeros(prior.degrees_of_freedom.shape))
        self.to(prior.mean.dtype)
        self.set_factors(prior)
        self.is_initialized.fill_(False)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> None:
        """Draw the parameters, then every label; arguments as those of the model."""
        if x is None:
            raise ValueError("x is None: the guide conditions on data, only the model can draw them")
        q = self.factors
        global_site("weights", dist.Dirichlet(q.concentration), "cluster")
        root_kappa = q.mean_precision.sqrt().unsqueeze(-1)
        means: Any
        if q.is_matrix:
            wishart: Any = InverseWishartCholesky(q.degrees_of_freedom, q.root)
            drawn = global_site("scale_tril", wishart.to_event(q.degrees_of_freedom.dim()))
            each = drawn if q.covariance == "full" else drawn.unsqueeze(-3)
            means = dist.MultivariateNormal(q.mean, scale_tril=each / root_kappa.unsqueeze(-1))
        else:
            half = q.degrees_of_freedom / 2
            precision = dist.Gamma(half.unsqueeze(-1) if q.covariance == "diag" else half, q.root.square() / 2)
            to_deviation = dist.transforms.PowerTransform(half.new_tensor(-0.5))
            deviation = dist.TransformedDistribution(precision, [to_deviation]).to_event(q.root.dim())
            drawn = global_site("scales", deviation)
            each = drawn if q.covariance == "diag" else drawn.unsqueeze(-1)
            means = dist.Normal(q.mean, each / root_kappa).to_event(1)
        located: Any = InUnits(means, torch.ones_like(q.mean[0]))  # the model's kind of support
        global_site("locs", located.to_event(1))
        with pyro.plate("data", size or len(x), subsample=x):
            label = dist.Categorical(logits=expected_log_joint(x, q))
            pyro.sample("component", label, infer={"enumerate": "parallel"})

    @property
    def factors(self) -> ConjugateFactors:
        """Q of the parameters; keeps gradients."""
        degrees = self._fewest_degrees + self.log_spare_degrees.exp()
        scale = self.coordinates.scale
        beside = degrees.reshape(degrees.shape + (1,) * (scale.dim() - degrees.dim()))
        return ConjugateFactors(
            self.covariance,
            concentration=self.log_total.exp() * self.coordinates.weights,
            mean=self.coordinates.locs,
            mean_precision=self.log_mean_precision.exp(),
            degrees_of_freedom=degrees,
            root=scale * beside.sqrt(),
        )

    @property
    def prior(self) -> ConjugateFactors:
        """The factors of the prior."""
        names = ("concentration", "mean", "mean_precision", "degrees_of_freedom", "root")
        return ConjugateFactors(self.covariance, *(self.get_buffer(f"prior_{name}") for name in names))

    @property
    def _fewest_degrees(self) -> int:
        """A Wishart of D features needs more than D - 1 degrees of freedom."""
        return self.coordinates.origin.shape[-1] - 1 if self.covariance in ("full", "tied") else 0

    def constrained(self) -> dict[str, Tensor]:
        """The factors' numbers; ``scale_matrix`` is Psi, or the sums of squares of "diag" and "spherical"."""
        q = self.factors
        return {
            "concentration": q.concentration,
            "mean": q.mean,
            "mean_precision": q.mean_precision,
            "degrees_of_freedom": q.degrees_of_freedom,
            "scale_matrix": q.root @ q.root.mT if q.is_matrix else q.root.square(),
        }

    @torch.no_grad()
    def set_factors(self, q: ConjugateFactors) -> None:
        """Take these factors; they become the new origin of the coordinates."""
        total = q.concentration.sum()
        covariances = q.scale @ q.scale.mT if q.is_matrix else q.scale.square()
        self.coordinates.set_natural(q.concentration / total, q.mean, covariances)
        self.log_total.copy_(total.log())
        self.log_mean_precision.copy_(q.mean_precision.log())
        self.log_spare_degrees.copy_((q.degrees_of_freedom - self._fewest_degrees).log())
        self.is_initialized.fill_(True)

    @torch.no_grad()
    def initialize(self, x: Tensor, *, seed: int) -> None:
        """Start where the mixture starts, with one conjugate update from its responsibilities.

        Does nothing where the guide has factors already; :meth:`reset_parameters` makes it forget them.

        Args:
            x: the whole data, shape (n, D).
            seed: of the mixture's start, where it has none yet.
        """
        if self.is_initialized:
            return
        weights, locs, scale = self._start(x, seed)
        blocks = ((b, mixture_log_joint(b, weights, locs, scale, self.covariance).softmax(-1)) for b in x.split(2048))
        self.set_factors(absorb(self.prior, weighted_moments(blocks, x.mean(0), self.covariance)))

    def reset_parameters(self) -> None:
        """Forget everything; the next fit initialises again."""
        self.set_factors(self.prior)
        self.is_initialized.fill_(False)

"""The global sites of a Bayesian mixture, drawn from its conjugate prior."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lvm.models.conjugate_mixture import ConjugateFactors
from pyro_lvm.models.mixture_densities import Covariance
from pyro_lvm.models.mixture_parameters import scale_shape
from pyro_lvm.prior_distributions import InUnits, InverseWishartCholesky
from pyro_lvm.priors import NormalInverseWishart

__all__ = ["conjugate_prior", "fitting_concentration", "global_site", "prior_sites"]


def fitting_concentration(prior: NormalInverseWishart, num_components: int, num_features: int) -> Tensor:
    """The concentration of the weights, shape (K,), of a prior that is for this mixture.

    Raises:
        ValueError: if the prior is for another number of features or components.
    """
    if prior.num_features != num_features:
        raise ValueError(
            f"prior is for {prior.num_features} features, the mixture has num_features={num_features}: build "
            f"the prior from the same columns, for example priors.weakly_informative(x)."
        )
    concentration = torch.as_tensor(prior.concentration, dtype=prior.mean.dtype, device=prior.mean.device)
    if concentration.dim() == 1 and len(concentration) != num_components:
        raise ValueError(
            f"prior.concentration has {len(concentration)} entries, the mixture has num_components="
            f"{num_components}: pass one number for all components, or one for each."
        )
    return concentration.expand(num_components).clone()


def prior_sites(
    prior: NormalInverseWishart, covariance: Covariance, concentration: Tensor, mean: Tensor, scale_tril: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw weights, covariances, and means given the covariances; all outside the plate.

    Args:
        prior: its numbers of degrees of freedom and of data.
        covariance: "full", "tied", "diag" or "spherical".
        concentration: of the weights, shape (K,).
        mean: of the means, shape (D,).
        scale_tril: Cholesky factor of the prior's scale matrix, shape (D, D).

    Returns:
        The values of ``weights`` (K,), of ``locs`` (K, D), and of ``scale_tril`` or ``scales``.
    """
    num_components = len(concentration)
    shape = scale_shape(covariance, num_components, len(mean))
    psi = scale_tril.square().sum(-1)  # the diagonal of the prior's scale matrix
    weights = global_site("weights", dist.Dirichlet(concentration), "cluster")
    if covariance in ("full", "tied"):
        wishart: Any = InverseWishartCholesky(psi.new_tensor(prior.degrees_of_freedom), scale_tril)
        names = ("cluster", "feature", "feature_bis")[-len(shape) :]
        scale = global_site("scale_tril", wishart.expand(shape[:-2]).to_event(len(shape) - 2), *names)
        each = scale if covariance == "full" else scale.unsqueeze(-3)
        means = dist.MultivariateNormal(mean, scale_tril=each / prior.mean_precision**0.5)
    else:
        half_degrees = psi.new_tensor(prior.variance_degrees_of_freedom / 2)
        precision = dist.Gamma(half_degrees, (psi if covariance == "diag" else psi.mean()) / 2)
        to_deviation = dist.transforms.PowerTransform(psi.new_tensor(-0.5))
        deviation = dist.TransformedDistribution(precision.expand(shape), [to_deviation]).to_event(len(shape))
        scale = global_site("scales", deviation, *("cluster", "feature")[: len(shape)])
        each = scale if covariance == "diag" else scale.unsqueeze(-1)
        means = dist.Normal(mean, each / prior.mean_precision**0.5).to_event(1)
    means = means.expand(torch.Size([*means.batch_shape[:-1], num_components]))
    unit = (psi / prior.degrees_of_freedom).sqrt()
    located: Any = InUnits(means, unit)
    return weights, global_site("locs", located.to_event(1), "cluster", "feature"), scale


def conjugate_prior(
    prior: NormalInverseWishart, covariance: Covariance, concentration: Tensor, mean: Tensor, scale_tril: Tensor
) -> ConjugateFactors:
    """The same prior as numbers of the conjugate family; arguments as in :func:`prior_sites`."""
    num_components, psi = len(concentration), scale_tril.square().sum(-1)
    roots = {
        "full": scale_tril.expand(num_components, *scale_tril.shape),
        "tied": scale_tril,
        "diag": psi.sqrt().expand(num_components, len(psi)),
        "spherical": psi.mean().sqrt().expand(num_components),
    }
    is_matrix = covariance in ("full", "tied")
    degrees = psi.new_tensor(prior.degrees_of_freedom if is_matrix else prior.variance_degrees_of_freedom)
    return ConjugateFactors(
        covariance,
        concentration=concentration,
        mean=mean.expand(num_components, len(mean)),
        mean_precision=torch.full_like(concentration, prior.mean_precision),
        degrees_of_freedom=degrees if covariance == "tied" else degrees.expand(num_components),
        root=roots[covariance],
    )


def global_site(name: str, fn: Any, *event_dims: str) -> Tensor:
    """A sample statement whose event dims have names."""
    infer: Any = {"event_dims": event_dims}
    return pyro.sample(name, fn, infer=infer)

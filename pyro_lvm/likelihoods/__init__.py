r"""Likelihoods: from the raw output of a decoder to the distribution of a datum.

A likelihood is a small module that *owns the output transform*. It says how many raw numbers per feature it takes
(`num_parameters`), turns raw (..., num_features * num_parameters) into a Pyro distribution with event shape
(num_features,), and holds those parameters that are learned but do not depend on the latents, such as a noise scale.
Raw number :math:`p` of feature :math:`d` sits at position :math:`p D + d`: all first numbers, then all second ones.

A likelihood of one's own is any `torch.nn.Module` with `num_parameters` and `forward`; `mean` is worth
having. Features are independent given the raw numbers, so `forward(raw).log_prob(x)` has the shape of the
leading dimensions and is in nats per datum; it keeps all constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import nn

from pyro_lvm.likelihoods.base import Likelihood
from pyro_lvm.likelihoods.discrete import Bernoulli, Categorical, Poisson
from pyro_lvm.likelihoods.grey import ContinuousBernoulli
from pyro_lvm.likelihoods.normal import Normal, NormalFixed, NormalPerDatum, NormalPerFeature

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "Likelihood",
    "Normal",
    "NormalFixed",
    "NormalPerDatum",
    "NormalPerFeature",
    "Poisson",
    "make_likelihood",
]

_BY_NAME: dict[str, Callable[[int], Likelihood]] = {
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
    "normal": Normal,
    "normal_fixed": NormalFixed,
    "normal_per_feature": NormalPerFeature,
    "normal_per_datum": NormalPerDatum,
    "categorical": Categorical,
    "poisson": Poisson,
}


def make_likelihood(name_or_module: str | nn.Module, num_features: int) -> Likelihood:
    """Look a likelihood up by name, or check one that is given as a module.

    The names are "bernoulli", "continuous_bernoulli", "normal" (one learned scale), "normal_fixed" (scale 1),
    "normal_per_feature", "normal_per_datum", "categorical" (256 values) and "poisson", each with its defaults.

    Args:
        name_or_module: a name, or a module with `num_parameters` and a `forward` that returns a distribution.
        num_features: numbers per datum.

    Returns:
        A new likelihood, or the module that came in, which need not inherit from `Likelihood` although the annotation
        says so: it has what was checked here, and `mean` only if its author wrote it.

    Raises:
        ValueError: the name is unknown, the module has no `num_parameters`, or is built for other data.

    Example:
        >>> make_likelihood("poisson", 5).num_parameters
        1
    """
    if isinstance(name_or_module, str) and name_or_module in _BY_NAME:
        return _BY_NAME[name_or_module](num_features)
    if not isinstance(name_or_module, nn.Module):
        raise ValueError(
            f"likelihood={name_or_module!r} is neither a torch.nn.Module nor one of the names "
            f"{', '.join(map(repr, _BY_NAME))}. Give one of these names, or an instance of a likelihood."
        )
    if not isinstance(getattr(name_or_module, "num_parameters", None), int):
        raise ValueError(
            f"The likelihood {type(name_or_module).__name__} has no integer num_parameters, so no decoder can be "
            f"built for it. Set num_parameters to the raw numbers it takes per feature."
        )
    if getattr(name_or_module, "num_features", num_features) != num_features:
        raise ValueError(
            f"The likelihood {type(name_or_module).__name__} was built for num_features={name_or_module.num_features}, "
            f"but the data have {num_features}. Build it with num_features={num_features}."
        )
    return cast(Likelihood, name_or_module)

"""What each estimator asks of a pair, and the estimators that would do instead."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.distributions import Delta
from pyro.infer import RenyiELBO

from pyro_lvm.data import Batch
from pyro_lvm.dependencies import Parents, descendants
from pyro_lvm.elbo.estimator import Estimator
from pyro_lvm.elbo.objective import Objective
from pyro_lvm.errors import ProgramError
from pyro_lvm.structure import Site, Structure

__all__ = ["check_estimator"]


def check_estimator(
    structure: Structure, estimator: Estimator, batch: Batch, dependencies: Callable[[], tuple[Parents, Parents]]
) -> None:
    """Raise where the estimator's value, or its gradient, would not be what its name promises.

    Args:
        structure: the pair.
        estimator: the estimator.
        batch: the data of the trace.
        dependencies: gives the parents of the sites of model and of guide; asked only where the order leaves a doubt.

    Raises:
        ProgramError: naming the site and the estimators that would do.
    """
    if isinstance(estimator.elbo, Objective):
        estimator.elbo.check(structure, batch)
    if estimator.analytic:
        _check_mean_field(structure, estimator, dependencies)
    if isinstance(estimator.elbo, RenyiELBO):
        _check_renyi(structure, estimator, batch)


def _check_reparameterised(site: Site, estimator: Estimator) -> None:
    if not site.fn.has_rsample:
        others = (
            "TraceGraph_ELBO(), or TraceEnum_ELBO() with the site enumerated"
            if site.enumerable
            else ("TraceGraph_ELBO()")
        )
        raise ProgramError(
            f"guide {site} ({site.kind}) cannot be reparameterised, which {estimator!r} requires: use elbo={others}"
        )


def _check_mean_field(
    structure: Structure, estimator: Estimator, dependencies: Callable[[], tuple[Parents, Parents]]
) -> None:
    for site in structure.guide.values():
        fn = site.base
        takes_draws = isinstance(estimator.elbo, Objective)  # whose log-density counts the determinant
        if not takes_draws and isinstance(fn, Delta) and bool((torch.as_tensor(fn.log_density) != 0).any()):
            raise ProgramError(
                f"{site} is a transformed Normal of an autoguide, for which {estimator!r} leaves out the transform's "
                "log-determinant: use elbo=Trace_ELBO()"
            )
        _check_reparameterised(site, estimator)
    model_order = [site.name for site in structure.latent]
    guide_order = [name for name in structure.guide if name in structure.model]
    if model_order == guide_order:
        return  # whatever a site of the model hangs on, the guide has drawn before it
    of_model, of_guide = dependencies()
    for name in model_order:
        after = sorted(of_model.get(name, frozenset()) & descendants(of_guide, name))
        if after:
            raise ProgramError(
                f"{structure.model[name]} hangs on {after[0]!r} in the model, but in the guide {after[0]!r} hangs on "
                f"{name!r}: {estimator!r} takes KL(q({name}) || p({name} | {after[0]})) in closed form, which is right "
                f"only where {after[0]!r} is drawn first (order in the model {model_order}, in the guide "
                f"{guide_order}): reorder the guide, or use {estimator.argument}=Trace_ELBO()"
            )


def _check_renyi(structure: Structure, estimator: Estimator, batch: Batch) -> None:
    for site in structure.guide.values():
        _check_reparameterised(site, estimator)
    if estimator.elbo.num_particles > 1 and len(batch) != batch.size:
        raise ProgramError(
            f"{estimator!r} averages weights that are raised to the power {batch.size / len(batch):.4g}, by which the "
            f"plate {structure.data_plate!r} scales {len(batch)} of {batch.size} rows, and what comes out is no bound: "
            f"fit with batch_size=None, or use elbo=lvm.elbo.ImportanceWeighted({estimator.elbo.num_particles}), which "
            "weighs every row by itself (at alpha=0)"
        )

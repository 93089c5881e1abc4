"""All that one trace of a pair can tell, in the order in which an author would want to hear it."""

from __future__ import annotations

from pyro_lvm.data import Batch
from pyro_lvm.dependencies import Parents, parents
from pyro_lvm.elbo.estimator import Estimator
from pyro_lvm.parameters import BoundProgram
from pyro_lvm.preflight.discrete import check_discrete
from pyro_lvm.preflight.estimators import check_estimator
from pyro_lvm.preflight.observations import check_observations
from pyro_lvm.preflight.pairing import check_pairing
from pyro_lvm.preflight.shapes import check_shapes
from pyro_lvm.structure import Structure

__all__ = ["check_pair", "dependencies"]


def check_pair(bound: BoundProgram, structure: Structure, estimator: Estimator, batch: Batch) -> None:
    """Raise `ProgramError` where model, guide and estimator do not belong together.

    Raises:
        ProgramError: naming the site, its line, the numbers, and one edit.
    """
    check_observations(structure, batch)
    check_shapes(structure, batch)
    check_pairing(structure)
    check_discrete(structure, estimator)
    check_estimator(structure, estimator, batch, lambda: dependencies(bound, structure, batch))


def dependencies(bound: BoundProgram, structure: Structure, batch: Batch) -> tuple[Parents, Parents]:
    """The parents of the sites of model and guide."""
    values = {name: site.value for name, site in (*structure.model.items(), *structure.guide.items())}
    return parents(bound.model, batch, values), parents(bound.guide, batch, values)

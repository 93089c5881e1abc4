"""Discrete sites: who sums them out, at what cost, and whether it can be done at all."""

from __future__ import annotations

import math

from pyro_lvm.elbo.estimator import Estimator
from pyro_lvm.errors import ProgramError
from pyro_lvm.structure import Site, Structure

__all__ = ["MARK", "check_discrete", "cost", "enumeration_cost", "not_summed_out"]

MARK = 'infer={"enumerate": "parallel"}'

MOST_ASSIGNMENTS = 10**6
"""Joint assignments of enumerated sites, for one datum, beyond which no machine takes a step."""


def cost(sites: list[Site]) -> str:
    """What summing sites out multiplies the work with, as "10 values of 'y' × 1 of 'k' = 10×"."""
    counts = [(site.num_values or 1, site.name) for site in sites]
    terms = " × ".join(f"{count} values of {name!r}" for count, name in counts)
    return f"{terms} = {math.prod(count for count, _ in counts)}×"


def enumeration_cost(structure: Structure) -> str | None:
    """`cost` of all sites that are summed out at once; None where none is."""
    summed = _at_once(structure)
    return cost(summed) if summed else None


def _at_once(structure: Structure) -> list[Site]:
    """Sites whose dims stand side by side: those of a Markov chain use theirs again, two at a time."""
    summed = [*structure.enumerated_in_model, *structure.enumerated_in_guide]
    chained = [site for site in summed if site.markov]
    return [site for site in summed if not site.markov] + chained[:2]


def check_discrete(structure: Structure, estimator: Estimator) -> None:
    """Raise where a discrete site is neither summed out nor knowingly sampled, or cannot be summed out.

    Raises:
        ProgramError: naming the site, the cost of enumerating it, and one edit.
    """
    enumerates = estimator.enumerates
    for site in (*structure.latent, *structure.guide.values()):
        if site.enumerated and not site.enumerable:
            raise ProgramError(
                f"{site} ({site.kind}) is marked for enumeration, but its values cannot be listed: take the mark away "
                f"and sample it in the guide with elbo=TraceGraph_ELBO(), or truncate it to a Categorical"
            )
    for site in structure.latent:
        if site.name in structure.guide:
            _check_covered(site, structure.guide[site.name], estimator)
        elif site.enumerated == "parallel" and not enumerates:
            raise ProgramError(not_summed_out(site, estimator))
        elif site.enumerated == "sequential":
            raise ProgramError(
                f"{site} ({site.kind}) of the model is marked for sequential enumeration, which only a guide site can "
                f"have: write {MARK} ({cost([site])})"
            )
        elif site.discrete and not site.enumerated:
            raise ProgramError(_unmarked(site, structure))
    if enumerates:
        _check_number_of_dims(structure)


def not_summed_out(site: Site, estimator: Estimator) -> str:
    """The words for a site marked for an enumeration that the estimator does not carry out."""
    return (
        f"{site} ({site.kind}) is enumerated, but {estimator!r} cannot sum it out: use "
        f"{estimator.argument}=TraceEnum_ELBO() "
        f"(cost: {cost([site])})"
    )


def _unmarked(site: Site, structure: Structure) -> str:
    if site.name.endswith("_unobserved"):
        return (
            f"{site} ({site.kind}) comes from obs_mask=, which drops infer= so that nobody sums it out: sample "
            f"{site.name.removesuffix('_unobserved')!r} without obs, marked {MARK}, and where it is known let the "
            "guide give all other values the logit -inf"
        )
    if not site.enumerable:
        return (
            f"{site} ({site.kind}) is discrete, nobody sums it out, and its values cannot be listed: sample it in the "
            "guide and use elbo=TraceGraph_ELBO(), or truncate it to a Categorical"
        )
    together = [s for s in structure.latent if s.enumerable and s.name not in structure.guide]
    return (
        f"{site} ({site.kind}) is discrete and nobody sums it out: add {MARK} to its pyro.sample and fit with "
        f"TraceEnum_ELBO() (cost: {cost(together)})"
    )


def _check_covered(site: Site, guide_site: Site, estimator: Estimator) -> None:
    """A discrete site that the guide has: listed there, or sampled on purpose."""
    if guide_site.enumerated:
        if not estimator.enumerates_guide:
            raise ProgramError(not_summed_out(guide_site, estimator))
        return
    knowingly = estimator.samples_discrete or not guide_site.enumerable
    if guide_site.discrete and guide_site.fn.has_rsample is False and not knowingly:
        raise ProgramError(
            f"guide {guide_site} ({guide_site.kind}) is discrete and nobody sums it out: add {MARK} to its pyro.sample "
            f"in the guide and fit with TraceEnum_ELBO() (cost: {cost([guide_site])}), or sample it on purpose with "
            "elbo=TraceGraph_ELBO()"
        )


def _check_number_of_dims(structure: Structure) -> None:
    at_once = _at_once(structure)
    assignments = math.prod(site.num_values or 1 for site in at_once)
    if assignments > MOST_ASSIGNMENTS:
        names = ", ".join(repr(site.name) for site in at_once[:3])
        raise ProgramError(
            f"{at_once[0]} and {len(at_once) - 1} more are summed out at once ({names}, ...), and together have "
            f"{assignments:.3g} assignments: if each depends only on the one before, loop with "
            "`for t in pyro.markov(range(...))`; if they are alike, make them one site in a plate; else sample them in "
            "the guide"
        )

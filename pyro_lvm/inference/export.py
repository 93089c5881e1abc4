"""What a record of an inference gives to ArviZ: the groups, gathered for any posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyro_lvm.criticism.predictive import (
    data_sites,
    draw_posterior,
    draw_prior,
    log_likelihood,
    site_dims,
    site_shape,
)
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.structure import Site, Structure
from pyro_lvm.to_arviz import Groups, to_arviz

__all__ = ["GROUPS", "Export", "at_least_one", "export", "refuse_unknown"]

GROUPS = (
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "log_likelihood",
    "observed_data",
    "sample_stats",
)
OF_THE_POSTERIOR = ("posterior", "posterior_predictive", "sample_stats")


@dataclass(frozen=True)
class Export:
    """What is to be exported.

    Attributes:
        evaluation: the program and the data.
        groups: which groups.
        num_draws: draws in each chain.
        num_samples: draws of the latents of a datum for each value of ``log_likelihood``.
        seed: of all draws; None for fresh ones.
        max_bytes: the largest export.
        attributes: facts about the whole, told the structure.
        chains: how many chains the draws of the posterior are.
        statistics: further variables of ``sample_stats``, shape (chains * num_draws,).
        by_datum: what gives ``log_likelihood`` where data share no latents; None is ``evaluation``.
    """

    evaluation: Evaluation
    groups: Sequence[str]
    num_draws: int
    num_samples: int
    seed: int | None
    max_bytes: int
    attributes: Callable[[Structure], Mapping[str, str | float]]
    chains: int = 1
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    by_datum: Evaluation | None = None


def at_least_one(count: int, argument: str) -> int:
    """The count, if it is one.

    Raises:
        ValueError: if it is below 1.
    """
    if count < 1:
        raise ValueError(f"{argument} is {count}: ask for at least 1")
    return count


def refuse_unknown(groups: Sequence[str]) -> None:
    """Raise `ValueError` for groups that nobody makes."""
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ValueError(f"groups {unknown} are not known: choose from {list(GROUPS)}")


def export(wanted: Export) -> Any:
    """Draw what the groups hold, and hand it to ArviZ.

    Raises:
        ValueError: if the export would be larger than ``wanted.max_bytes``.
    """
    evaluation, groups, total = wanted.evaluation, wanted.groups, wanted.chains * wanted.num_draws
    values: dict[str, Mapping[str, Tensor]] = {}
    chains = dict.fromkeys(OF_THE_POSTERIOR, wanted.chains)
    with evaluation.running(0):
        _, structure = evaluation.whole()
    _refuse_large(structure, len(evaluation.rows), total, groups, wanted.max_bytes)
    with evaluation.running(wanted.seed):
        if set(OF_THE_POSTERIOR) & set(groups):
            posterior, predicted = draw_posterior(evaluation, total, "posterior_predictive" in groups)
            values["posterior"] = posterior.draws
            values["posterior_predictive"] = predicted
            of_guide = {} if posterior.log_q is None else {"lq": posterior.log_q}
            values["sample_stats"] = {"lp": posterior.log_p, **of_guide, **wanted.statistics}
        if {"prior", "prior_predictive"} & set(groups):
            values["prior"], values["prior_predictive"] = draw_prior(evaluation, wanted.num_draws)
        if "log_likelihood" in groups and structure.data_plate is not None:
            name = "+".join(site.name for site in data_sites(structure))
            if structure.global_latent:
                chains["log_likelihood"] = wanted.chains
                values["log_likelihood"] = {name: log_likelihood(evaluation, total, wanted.num_samples)}
            else:
                by_datum = wanted.by_datum or evaluation
                values["log_likelihood"] = {name: log_likelihood(by_datum, 1, wanted.num_samples)}
    values["observed_data"] = {site.name: site.value for site in data_sites(structure)}
    kept = {group: values[group] for group in groups if values.get(group)}
    dims = {site.name: site_dims(site) for site in structure.model.values()}
    named = {group: {name: dims.get(name, ()) for name in variables} for group, variables in kept.items()}
    if "log_likelihood" in named:
        named["log_likelihood"] = dict.fromkeys(named["log_likelihood"], (str(structure.data_plate),))
    return to_arviz(Groups(kept, named, wanted.attributes(structure), chains))


def _refuse_large(structure: Structure, rows: int, num_draws: int, groups: Sequence[str], max_bytes: int) -> None:
    def size(sites: Iterable[Site]) -> int:
        return num_draws * sum(math.prod(site_shape(site)) * site.value.element_size() for site in sites)

    sizes = {
        "posterior": size(structure.latent),
        "prior": size(structure.latent),
        "posterior_predictive": size(data_sites(structure)),
        "prior_predictive": size(data_sites(structure)),
        "log_likelihood": rows * 8 * (num_draws if structure.global_latent else 1),
    }
    wanted = {group: sizes.get(group, 0) for group in groups}
    total = sum(wanted.values())
    if total > max_bytes:
        largest = max(wanted, key=lambda group: wanted[group])
        raise ValueError(
            f"the export would take {total / 1e9:.3g} GB ({num_draws} draws of {rows} rows; {largest} alone "
            f"{wanted[largest] / 1e9:.3g} GB), more than max_bytes={max_bytes / 1e9:.3g} GB: pass fewer rows, "
            f"num_draws={max(1, int(num_draws * max_bytes / total))}, groups=... without {largest!r}, or a larger "
            "max_bytes"
        )

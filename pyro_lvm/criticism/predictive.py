"""Draws from posterior, prior and their predictives, and pointwise log-likelihoods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from pyro_lvm.criticism.evidence import estimate_evidence
from pyro_lvm.criticism.shared_draws import RowsMatter, SharedDraws, log_prob_of
from pyro_lvm.criticism.weights import (
    Draw,
    draw_enumerated,
    draw_latent,
    draw_local,
    enumerated_probabilities,
    local_log_weight,
    log_joint,
    sampled_sites,
    weighs_rows,
)
from pyro_lvm.data import Batch
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.memory import require_room
from pyro_lvm.posterior import Posterior
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.structure import Site, Structure
from pyro_lvm.walk import FEWER_DRAWS, Joined, parts_of, rows_at_a_time

__all__ = [
    "data_sites",
    "draw_imputations",
    "draw_posterior",
    "draw_prior",
    "log_likelihood",
    "log_predictive",
    "mean_responsibilities",
    "site_dims",
    "site_shape",
    "takes_rows_apart",
]

Result = TypeVar("Result")


def data_sites(structure: Structure) -> list[Site]:
    """Observed sites that hold data; a `pyro.factor` holds none."""
    return [site for site in structure.observed if not isinstance(site.fn, Unit)]


def site_dims(site: Site) -> tuple[str, ...]:
    """Names of a site's dims: its plates from the left, then its event dims."""
    plates = sorted(site.plates, key=lambda plate: plate.dim)
    count = len(site.fn.event_shape)
    events = site.event_dims if len(site.event_dims) == count else [f"{site.name}_dim_{i}" for i in range(count)]
    return (*(plate.name for plate in plates), *events)


def site_shape(site: Site) -> tuple[int, ...]:
    """Sizes of the dims that `site_dims` names."""
    plates = sorted(site.plates, key=lambda plate: plate.dim)
    return (*(plate.rows for plate in plates), *site.fn.event_shape)


@torch.no_grad()
def draw_posterior(
    evaluation: Evaluation, num_draws: int, predictive: bool = False
) -> tuple[Posterior, dict[str, Tensor]]:
    """Draws of every latent site and, if asked for, of the observed ones given them.

    Many rows are drawn for a part at a time (`takes_rows_apart`). The caller sets up random state and parameters
    (`Evaluation.running`).

    Raises:
        NotEnoughMemoryError: if the draws would not fit in memory.
    """
    _require_room(evaluation, num_draws, predictive)
    return _by_parts(evaluation, lambda batches, shared: _drawn(evaluation, batches, num_draws, predictive, shared))


def _drawn(
    evaluation: Evaluation, batches: Iterable[Batch], num_draws: int, predictive: bool, shared: SharedDraws
) -> tuple[Posterior, dict[str, Tensor]]:
    structure = evaluation.structure
    sites = {site.name: site for site in structure.model.values()}
    places = {
        name: 1 + site_dims(site).index(str(structure.data_plate))
        for name, site in sites.items()
        if site.inside(structure.data_plate)
    }
    drawn, predicted = (Joined(len(evaluation.rows), "draws", FEWER_DRAWS) for _ in range(2))
    first: tuple[Posterior, dict[str, Tensor]] | None = None
    for batch in batches:
        posterior, made = _draws(evaluation, batch, num_draws, predictive, shared)
        for joined, values in ((drawn, posterior.draws), (predicted, made)):
            of_rows = {name: value for name, value in values.items() if name in places}
            if of_rows:
                joined.add(of_rows, places)
        if first is None:
            first = posterior, made
            continue
        first[0].log_p.add_(posterior.log_p)
        if first[0].log_q is not None and posterior.log_q is not None:
            first[0].log_q.add_(posterior.log_q)
    assert first is not None, "there is at least one row"
    together = {**first[0].draws, **drawn.result()}
    return replace(first[0], draws=together), {**first[1], **predicted.result()}


def takes_rows_apart(evaluation: Evaluation) -> bool:
    """Whether there are many rows, and parts of them can be looked at one by one, given what all data share."""
    structure, rows = evaluation.structure, evaluation.rows
    if structure.data_plate is None or rows.loader is not None or len(rows) <= rows_at_a_time(rows):
        return False
    sites = (*structure.model.values(), *structure.guide.values())
    shared = [site for site in sites if not site.inside(structure.data_plate)]
    drawn = all(site.name in structure.guide and not site.enumerated for site in structure.global_latent)
    apart = not shared or (drawn and weighs_rows(structure))
    return evaluation.takes_parts and evaluation.given is None and apart


def _by_parts(evaluation: Evaluation, find: Callable[[Iterable[Batch], SharedDraws], Result]) -> Result:
    """What ``find`` makes of the rows in parts, or of all at once where parts of them would not do."""
    plate = evaluation.structure.data_plate
    if takes_rows_apart(evaluation):
        try:
            return find(parts_of(evaluation.rows), SharedDraws(plate))
        except RowsMatter:
            pass  # the guide computes what is shared from the rows
    return find([evaluation.rows.whole()], SharedDraws(plate))


def _require_room(evaluation: Evaluation, num_draws: int, predictive: bool) -> None:
    structure, rows = evaluation.structure, len(evaluation.rows)
    sites = [*structure.latent, *(data_sites(structure) if predictive else [])]
    of_draw = 0
    for site in sites:
        sizes = [
            rows if dim == structure.data_plate else size
            for dim, size in zip(site_dims(site), site_shape(site), strict=True)
        ]
        of_draw += math.prod(sizes) * site.value.element_size()
    copies = 1 if takes_rows_apart(evaluation) else 2  # draws one by one are stacked in the end
    needed = copies * num_draws * of_draw
    require_room(
        needed,
        f"{num_draws} draws of {', '.join(site.name for site in sites)} for {rows} rows",
        FEWER_DRAWS,
    )


def _draws(
    evaluation: Evaluation, batch: Batch, num_draws: int, predictive: bool, shared: SharedDraws
) -> tuple[Posterior, dict[str, Tensor]]:
    """Draws given the rows of one batch."""
    bound = evaluation.bound
    structure = traced(bound.model, bound.guide, batch)
    observed = data_sites(structure) if predictive else []
    shapes = {site.name: site_shape(site) for site in (*structure.latent, *observed)}
    dims = {site.name: site_dims(site) for site in structure.latent}
    predicted: dict[str, list[Tensor]] = {site.name: [] for site in observed}
    columns: dict[str, list[Tensor]] = {name: [] for name in dims}
    del structure, observed  # they hold every distribution of the rows, and would do so beside those of each draw
    log_p, log_q = [], []
    for number in evaluation.numbers(num_draws):
        trace, joint, density = _one_draw(evaluation, batch, shared, number)
        for name, values in columns.items():
            values.append(trace.nodes[name]["value"].reshape(shapes[name]))
        log_p.append(joint)
        log_q.append(density)
        if predictive:
            drawn = _predict(bound.model, trace, batch)
            for name, values in predicted.items():
                values.append(drawn.nodes[name]["value"].reshape(shapes[name]))
            del drawn
        del trace
    posterior = Posterior(
        {name: torch.stack(values).cpu() for name, values in columns.items()},
        dims,
        torch.stack(log_p).cpu(),
        None if evaluation.given is not None else torch.stack(log_q).cpu(),
    )
    return posterior, {name: torch.stack(values).cpu() for name, values in predicted.items()}


def _one_draw(evaluation: Evaluation, batch: Batch, shared: SharedDraws, number: int) -> tuple[Any, Tensor, Tensor]:
    """A model trace with every latent drawn, log p(x, latents), and the log density it was drawn with.

    What all data share is held, and its density left out, from the second part of the rows on.
    """
    bound, structure = evaluation.bound, evaluation.structure
    held = shared.held(number)
    guide = bound.guide if held is None else poutine.replay(bound.guide, trace=held)
    with poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*batch.args, **batch.named())
    shared.keep(number, guide_trace)
    density = log_prob_of(guide_trace) - shared.counted(number, guide_trace, "guide")
    if structure.enumerated_in_model:
        draw = draw_latent(bound, structure, batch, fixed=guide_trace)
        trace = draw_enumerated(bound, draw, batch)
        joint = log_prob_of(trace)
        of_labels = joint - log_joint(draw)
    else:
        with poutine.block():
            replayed = poutine.replay(bound.model, trace=guide_trace)
            trace = poutine.trace(replayed).get_trace(*batch.args, **batch.named())
        joint = log_prob_of(trace)
        of_labels = torch.zeros_like(joint)
    return trace, joint - shared.counted(number, trace, "model"), density + of_labels


@torch.no_grad()
def draw_imputations(evaluation: Evaluation, num_draws: int) -> Tensor:
    """Draws of the missing values of the one observed site that has any, shape (num_draws, *plates, *event).

    Many rows are drawn for a part at a time, as for `draw_posterior`.

    Raises:
        NotEnoughMemoryError: if the draws would not fit in memory.
        ProgramError: unless one observed site has NaN.
    """
    site, structure = _site_to_impute(evaluation), evaluation.structure
    named = list(zip(site_dims(site), site_shape(site), strict=True))
    of_draw = math.prod(len(evaluation.rows) if dim == structure.data_plate else size for dim, size in named)
    copies = 1 if takes_rows_apart(evaluation) else 2  # draws one by one are stacked in the end
    require_room(
        copies * num_draws * of_draw * site.value.element_size(),
        f"{num_draws} draws of {site.name} for {len(evaluation.rows)} rows",
        FEWER_DRAWS,
    )

    def drawn(batches: Iterable[Batch], shared: SharedDraws) -> Tensor:
        joined = Joined(len(evaluation.rows), f"{num_draws} draws of {site.name}", FEWER_DRAWS)
        place = site_dims(site).index(structure.data_plate) if structure.data_plate in site_dims(site) else 0
        for batch in batches:
            shape = [len(batch) if dim == structure.data_plate else size for dim, size in named]
            draws = []
            for number in range(num_draws):
                node = _one_draw(evaluation, batch, shared, number)[0].nodes[site.name]
                draws.append(node["fn"].impute(node["value"]).reshape(shape))
            joined.add({site.name: torch.stack(draws).cpu()}, {site.name: 1 + place})
        return joined.result()[site.name]

    return _by_parts(evaluation, drawn)


def _site_to_impute(evaluation: Evaluation) -> Site:
    bound, found = evaluation.bound, dict[str, Site]()
    parts = parts_of(evaluation.rows) if takes_rows_apart(evaluation) else iter([evaluation.rows.whole()])
    for batch in parts:
        sites = data_sites(traced(bound.model, bound.guide, batch))
        found |= {site.name: site for site in sites if bool(site.value.isnan().any())}
    if len(found) != 1:
        named = ", ".join(map(str, found.values())) or "none of the observed sites"
        raise ProgramError(f"missing values are imputed for one observed site; {named} has NaN: pass x with NaN in one")
    return next(iter(found.values()))


def _predict(model: Any, trace: Any, batch: Batch) -> Any:
    with poutine.block():
        free = poutine.uncondition(poutine.replay(model, trace=_without_data(trace)))
        return poutine.trace(free).get_trace(*batch.args, **batch.named())


def _without_data(trace: Any) -> Any:
    kept = poutine.Trace()
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not node["is_observed"]:
            kept.add_node(name, **node)
    return kept


@torch.no_grad()
def draw_prior(evaluation: Evaluation, num_draws: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws of the latent sites from their prior, and of the observed ones given them; shapes (num_draws, ...)."""
    bound = evaluation.bound
    _require_room(evaluation, num_draws, predictive=True)
    batch, structure = evaluation.whole()
    prior: dict[str, list[Tensor]] = {site.name: [] for site in structure.latent}
    predicted: dict[str, list[Tensor]] = {site.name: [] for site in data_sites(structure)}
    for _ in range(num_draws):
        drawn = _predict(bound.model, poutine.Trace(), batch)
        for columns in (prior, predicted):
            for name, values in columns.items():
                values.append(drawn.nodes[name]["value"].reshape(site_shape(structure.model[name])))
    return (
        {name: torch.stack(values).cpu() for name, values in prior.items()},
        {name: torch.stack(values).cpu() for name, values in predicted.items()},
    )


@torch.no_grad()
def log_likelihood(evaluation: Evaluation, num_draws: int, num_samples: int) -> Tensor:
    r"""Log p(x_i | theta^{(s)}) of every datum, per-datum latents summed or averaged out; shape (draws, n), nats.

    A program without latent variables that all data share has one theta: the result then has one draw.
    """
    structure = evaluation.structure
    if not structure.global_latent:
        return estimate_evidence(evaluation, num_samples, "auto", 512).log_evidence.unsqueeze(0).cpu()
    plate = structure.data_plate
    sampled = any(site.inside(plate) for site in sampled_sites(structure))

    def likelihood(batches: Iterable[Batch], shared: SharedDraws) -> Tensor:
        joined = Joined(len(evaluation.rows), f"{num_draws} draws of the log-likelihood", FEWER_DRAWS)
        for batch in batches:
            values = []
            for draw in _latent_draws(evaluation, batch, num_draws, shared):
                weights = [_local_weight(evaluation, batch, draw) for _ in range(num_samples if sampled else 1)]
                values.append(_log_mean(weights))
            joined.add({"log_likelihood": torch.stack(values).cpu()}, {"log_likelihood": 1})
        return joined.result()["log_likelihood"]

    return _by_parts(evaluation, likelihood)


@torch.no_grad()
def log_predictive(evaluation: Evaluation, num_draws: int) -> Tensor:
    r"""Log of the mean over draws of p(x_i | theta), shape (n,), nats per datum."""
    structure = evaluation.structure
    by_row = weighs_rows(structure)

    def predictive(batches: Iterable[Batch], shared: SharedDraws) -> Tensor:
        parts = []
        for batch in batches:
            draws = _latent_draws(evaluation, batch, num_draws, shared)
            if by_row:
                parts.append(_log_mean([local_log_weight(draw, structure.data_plate) for draw in draws]).cpu())
            else:
                parts.append(_log_mean([_local_weight(evaluation, batch, draw) for draw in draws]).cpu())
        return torch.cat(parts)

    return _by_parts(evaluation, predictive)


def _latent_draws(evaluation: Evaluation, batch: Batch, num_draws: int, shared: SharedDraws) -> Iterator[Draw]:
    """Draws of the latents given a part of the rows, with what all data share as it was for the first part."""
    for number in evaluation.numbers(num_draws):
        draw = draw_latent(evaluation.bound, evaluation.structure, batch, fixed=shared.held(number))
        shared.keep(number, draw.guide_trace)
        shared.counted(number, draw.guide_trace, "guide")  # which other rows must not change
        yield draw


def _local_weight(evaluation: Evaluation, batch: Batch, shared: Draw) -> Tensor:
    """Log w of each datum with its own latents drawn anew, shape (n,)."""
    again = draw_local(evaluation.bound, evaluation.structure, batch, shared)
    return local_log_weight(again, evaluation.structure.data_plate)


def _log_mean(log_weights: list[Tensor]) -> Tensor:
    return torch.stack(log_weights).logsumexp(0) - math.log(len(log_weights))


@torch.no_grad()
def mean_responsibilities(evaluation: Evaluation, num_draws: int) -> Mapping[str, Tensor]:
    """p(k_i | x_i), averaged over draws of everything else, by enumerated site; shape (*plates, K), float64."""
    places = {
        site.name: site_dims(site).index(str(evaluation.structure.data_plate))
        for site in evaluation.structure.local_latent
    }

    def responsibilities(batches: Iterable[Batch], shared: SharedDraws) -> dict[str, Tensor]:
        joined = Joined(len(evaluation.rows), "responsibilities")
        for batch in batches:
            found = _responsibilities(evaluation, batch, num_draws, shared)
            if not set(found) <= set(places):
                return found  # what all data share has no rows; they were looked at all at once
            joined.add(found, places)
        return joined.result()

    return _by_parts(evaluation, responsibilities)


def _responsibilities(evaluation: Evaluation, batch: Batch, num_draws: int, shared: SharedDraws) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for draw in _latent_draws(evaluation, batch, num_draws, shared):
        for name, probabilities in enumerated_probabilities(draw).items():
            totals[name] = totals.get(name, 0.0) + probabilities.double().cpu() / num_draws
    return totals

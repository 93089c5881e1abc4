"""Draws from posterior, prior and their predictives, and pointwise log-likelihoods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_lvm.criticism.evidence import estimate_evidence
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
from pyro_lvm.elbo.terms import is_random
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.memory import require_room
from pyro_lvm.posterior import Posterior
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.structure import Site, Structure

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

ROWS_AT_A_TIME, BYTES_AT_A_TIME = 16_384, 2**21
"""The most in one pass; other draws come out if they are changed, where there is more."""


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

    Many rows are drawn for a part at a time where the latents of each are its own. The caller sets up random state and
    parameters (`Evaluation.running`).

    Raises:
        NotEnoughMemoryError: if the draws would not fit in memory.
    """
    _require_room(evaluation, num_draws, predictive)
    if not takes_rows_apart(evaluation):
        return _draws(evaluation, evaluation.rows.whole(), num_draws, predictive)
    plate, start = evaluation.structure.data_plate, 0
    joined: tuple[Posterior, dict[str, Tensor]] | None = None
    for batch in evaluation.rows.batches(_rows_at_a_time(evaluation)):
        posterior, predicted = _draws(evaluation, batch, num_draws, predictive)
        if joined is None:
            dims = {site.name: site_dims(site) for site in evaluation.structure.model.values()}
            total = Posterior(
                _room_for(posterior.draws, dims, plate, len(evaluation.rows)),
                posterior.dims,
                torch.zeros_like(posterior.log_p),
                None if posterior.log_q is None else torch.zeros_like(posterior.log_q),
            )
            joined = total, _room_for(predicted, dims, plate, len(evaluation.rows))
        for whole, part in ((joined[0].draws, posterior.draws), (joined[1], predicted)):
            for name, values in part.items():
                whole[name].narrow(1 + dims[name].index(plate), start, len(batch)).copy_(values)
        joined[0].log_p.add_(posterior.log_p)
        if joined[0].log_q is not None and posterior.log_q is not None:
            joined[0].log_q.add_(posterior.log_q)
        start += len(batch)
    assert joined is not None, "there is at least one row"
    return joined


def takes_rows_apart(evaluation: Evaluation) -> bool:
    """Whether there are many rows, and everything random belongs to one of them, so that parts of them do."""
    structure, rows = evaluation.structure, evaluation.rows
    plate = structure.data_plate
    if plate is None or rows.loader is not None or len(rows) <= _rows_at_a_time(evaluation):
        return False
    sites = (*structure.model.values(), *structure.guide.values())
    return evaluation.takes_parts and evaluation.given is None and all(site.inside(plate) for site in sites)


def _rows_at_a_time(evaluation: Evaluation) -> int:
    return min(ROWS_AT_A_TIME, max(BYTES_AT_A_TIME // max(evaluation.rows.bytes_per_row, 1), 1))


def _room_for(
    draws: Mapping[str, Tensor], dims: Mapping[str, tuple[str, ...]], plate: str | None, rows: int
) -> dict[str, Tensor]:
    """Empty tensors like these, of all rows."""
    found = {}
    for name, values in draws.items():
        shape = list(values.shape)
        shape[1 + dims[name].index(str(plate))] = rows
        found[name] = values.new_empty(shape)
    return found


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
        "ask for fewer draws (num_draws=), or for some of the rows at a time",
    )


def _draws(
    evaluation: Evaluation, batch: Batch, num_draws: int, predictive: bool
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
    for _ in evaluation.numbers(num_draws):
        trace, joint, density = _one_draw(evaluation, batch)
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


def _one_draw(evaluation: Evaluation, batch: Batch) -> tuple[Any, Tensor, Tensor]:
    """A model trace with every latent drawn, log p(x, latents), and the log density it was drawn with."""
    bound, structure = evaluation.bound, evaluation.structure
    with poutine.block():
        guide_trace = poutine.trace(bound.guide).get_trace(*batch.args, **batch.named())
    density = _log_prob(guide_trace)
    if structure.enumerated_in_model:
        draw = draw_latent(bound, structure, batch, fixed=guide_trace)
        trace = draw_enumerated(bound, draw, batch)
        joint = _log_prob(trace)
        return trace, joint, density + joint - log_joint(draw)
    with poutine.block():
        replayed = poutine.replay(bound.model, trace=guide_trace)
        trace = poutine.trace(replayed).get_trace(*batch.args, **batch.named())
    return trace, _log_prob(trace), density


@torch.no_grad()
def draw_imputations(evaluation: Evaluation, num_draws: int) -> Tensor:
    """Draws of the missing values of the one observed site that has any, shape (num_draws, *plates, *event)."""
    batch, structure = evaluation.whole()
    sites = [site for site in data_sites(structure) if bool(site.value.isnan().any())]
    if len(sites) != 1:
        named = ", ".join(str(site) for site in sites) or "none of the observed sites"
        raise ProgramError(f"missing values are imputed for one observed site; {named} has NaN: pass x with NaN in one")
    drawn = []
    for _ in range(num_draws):
        trace, _, _ = _one_draw(evaluation, batch)
        node = trace.nodes[sites[0].name]
        drawn.append(node["fn"].impute(node["value"]).reshape(site_shape(sites[0])))
    return torch.stack(drawn).cpu()


def _log_prob(trace: Any) -> Tensor:
    """The trace's log-probability, masked but without the plates' scale, shape ()."""
    trace.compute_log_prob(site_filter=lambda name, node: is_random(node))
    nodes = [node for node in trace.nodes.values() if is_random(node)]
    parts = [scale_and_mask(node["unscaled_log_prob"], mask=node["mask"]).sum() for node in nodes]
    return torch.as_tensor(sum(parts, torch.zeros(())))


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
    batch = evaluation.rows.whole()
    sampled = any(site.inside(structure.data_plate) for site in sampled_sites(structure))
    values = []
    for _ in evaluation.numbers(num_draws):
        shared = draw_latent(evaluation.bound, structure, batch)
        weights = [_local_weight(evaluation, batch, shared) for _ in range(num_samples if sampled else 1)]
        values.append(_log_mean(weights))
    return torch.stack(values).cpu()


@torch.no_grad()
def log_predictive(evaluation: Evaluation, num_draws: int) -> Tensor:
    r"""Log of the mean over draws of p(x_i | theta), shape (n,), nats per datum."""
    batch, structure = evaluation.rows.whole(), evaluation.structure
    draws = (draw_latent(evaluation.bound, structure, batch) for _ in evaluation.numbers(num_draws))
    if weighs_rows(structure):
        return _log_mean([local_log_weight(draw, structure.data_plate) for draw in draws]).cpu()
    return _log_mean([_local_weight(evaluation, batch, draw) for draw in draws]).cpu()


def _local_weight(evaluation: Evaluation, batch: Batch, shared: Draw) -> Tensor:
    """Log w of each datum with its own latents drawn anew, shape (n,)."""
    again = draw_local(evaluation.bound, evaluation.structure, batch, shared)
    return local_log_weight(again, evaluation.structure.data_plate)


def _log_mean(log_weights: list[Tensor]) -> Tensor:
    return torch.stack(log_weights).logsumexp(0) - math.log(len(log_weights))


@torch.no_grad()
def mean_responsibilities(evaluation: Evaluation, num_draws: int) -> Mapping[str, Tensor]:
    """p(k_i | x_i), averaged over draws of everything else, by enumerated site; shape (*plates, K), float64."""
    parts = (
        evaluation.rows.batches(_rows_at_a_time(evaluation))
        if takes_rows_apart(evaluation)
        else iter([evaluation.rows.whole()])
    )
    found = [_responsibilities(evaluation, batch, num_draws) for batch in parts]
    if len(found) == 1:
        return found[0]
    rows = {
        site.name: site_dims(site).index(str(evaluation.structure.data_plate)) for site in evaluation.structure.latent
    }
    return {name: torch.cat([part[name] for part in found], rows[name]) for name in found[0]}


def _responsibilities(evaluation: Evaluation, batch: Batch, num_draws: int) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for _ in evaluation.numbers(num_draws):
        draw = draw_latent(evaluation.bound, evaluation.structure, batch)
        for name, probabilities in enumerated_probabilities(draw).items():
            totals[name] = totals.get(name, 0.0) + probabilities.double().cpu() / num_draws
    return totals

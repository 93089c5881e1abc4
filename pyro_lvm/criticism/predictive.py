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
from pyro_lvm.posterior import Posterior
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
]


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

    The caller sets up random state and parameters (`Evaluation.running`).
    """
    bound = evaluation.bound
    batch, structure = evaluation.whole()
    latent = structure.latent
    columns: dict[str, list[Tensor]] = {site.name: [] for site in latent}
    observed = data_sites(structure) if predictive else []
    predicted: dict[str, list[Tensor]] = {site.name: [] for site in observed}
    log_p, log_q = [], []
    for _ in evaluation.numbers(num_draws):
        trace, joint, density = _one_draw(evaluation, batch)
        for site in latent:
            columns[site.name].append(trace.nodes[site.name]["value"].reshape(site_shape(site)))
        log_p.append(joint)
        log_q.append(density)
        if predictive:
            drawn = _predict(bound.model, trace, batch)
            for site in observed:
                predicted[site.name].append(drawn.nodes[site.name]["value"].reshape(site_shape(site)))
    posterior = Posterior(
        {name: torch.stack(values).cpu() for name, values in columns.items()},
        {site.name: site_dims(site) for site in latent},
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
    batch = evaluation.rows.whole()
    totals: dict[str, Tensor] = {}
    for _ in evaluation.numbers(num_draws):
        draw = draw_latent(evaluation.bound, evaluation.structure, batch)
        for name, probabilities in enumerated_probabilities(draw).items():
            totals[name] = totals.get(name, 0.0) + probabilities.double().cpu() / num_draws
    return totals

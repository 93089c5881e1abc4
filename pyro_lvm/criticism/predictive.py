"""Draws from posterior, prior and their predictives, and pointwise log-likelihoods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.traceenum_elbo import _compute_marginals
from torch import Tensor

from pyro_lvm.criticism.evidence import estimate_evidence
from pyro_lvm.criticism.weights import (
    Draw,
    draw_enumerated,
    draw_latent,
    local_log_weight,
    log_joint,
    only_global,
)
from pyro_lvm.data import Batch
from pyro_lvm.elbo.terms import is_random
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.posterior import Posterior
from pyro_lvm.structure import Site

__all__ = ["draw_posterior", "draw_prior", "log_likelihood", "log_predictive", "site_dims"]


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
    predicted: dict[str, list[Tensor]] = {site.name: [] for site in structure.observed} if predictive else {}
    log_p, log_q = [], []
    for _ in range(num_draws):
        trace, joint, density = _one_draw(evaluation, batch)
        for site in latent:
            columns[site.name].append(trace.nodes[site.name]["value"].reshape(site_shape(site)))
        log_p.append(joint)
        log_q.append(density)
        if predictive:
            drawn = _predict(bound.model, trace, batch)
            for site in structure.observed:
                predicted[site.name].append(drawn.nodes[site.name]["value"].reshape(site_shape(site)))
    posterior = Posterior(
        {name: torch.stack(values).cpu() for name, values in columns.items()},
        {site.name: site_dims(site) for site in latent},
        torch.stack(log_p).cpu(),
        torch.stack(log_q).cpu(),
    )
    return posterior, {name: torch.stack(values).cpu() for name, values in predicted.items()}


def _one_draw(evaluation: Evaluation, batch: Batch) -> tuple[Any, Tensor, Tensor]:
    """A model trace with every latent drawn, log p(x, latents), and the log density it was drawn with."""
    bound, structure = evaluation.bound, evaluation.structure
    plain = [site.name for site in structure.enumerated_in_guide]
    with torch.no_grad(), poutine.block():
        guide_trace = poutine.trace(bound.guide).get_trace(*batch.args, **batch.named())
    guide_log_prob = _log_prob(guide_trace)
    if structure.enumerated_in_model:
        draw = draw_latent(bound, structure, batch, fixed=guide_trace)
        if plain:
            raise ProgramError(
                f"{', '.join(plain)} is enumerated in the guide and {structure.enumerated_in_model[0].name} in the "
                "model: draws from both at once are not known; enumerate all of them on one side"
            )
        summed = log_joint(draw)
        trace = draw_enumerated(bound, draw, batch)
        joint = _log_prob(trace)
        return trace, joint, guide_log_prob + joint - summed
    with torch.no_grad(), poutine.block():
        replayed = poutine.replay(bound.model, trace=guide_trace)
        trace = poutine.trace(replayed).get_trace(*batch.args, **batch.named())
    return trace, _log_prob(trace), guide_log_prob


def _log_prob(trace: Any) -> Tensor:
    """The trace's log-probability without the plates' scale, shape ()."""
    with torch.no_grad():
        trace.compute_log_prob(site_filter=lambda name, node: is_random(node))
    parts = [node["unscaled_log_prob"].sum() for node in trace.nodes.values() if is_random(node)]
    return torch.as_tensor(sum(parts, torch.zeros(())))


def _predict(model: Any, trace: Any, batch: Batch) -> Any:
    with torch.no_grad(), poutine.block():
        free = poutine.uncondition(poutine.replay(model, trace=_without_data(trace)))
        return poutine.trace(free).get_trace(*batch.args, **batch.named())


def _without_data(trace: Any) -> Any:
    kept = poutine.Trace()
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not node["is_observed"]:
            kept.add_node(name, **node)
    return kept


def draw_prior(evaluation: Evaluation, num_draws: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws of the latent sites from their prior, and of the observed ones given them; shapes (num_draws, ...)."""
    bound = evaluation.bound
    batch, structure = evaluation.whole()
    prior: dict[str, list[Tensor]] = {site.name: [] for site in structure.latent}
    predicted: dict[str, list[Tensor]] = {site.name: [] for site in structure.observed}
    for _ in range(num_draws):
        drawn = _predict(bound.model, poutine.Trace(), batch)
        for columns in (prior, predicted):
            for name, values in columns.items():
                values.append(drawn.nodes[name]["value"].reshape(site_shape(structure.model[name])))
    return (
        {name: torch.stack(values).cpu() for name, values in prior.items()},
        {name: torch.stack(values).cpu() for name, values in predicted.items()},
    )


def log_likelihood(evaluation: Evaluation, num_draws: int, num_samples: int) -> Tensor:
    r"""log p(x_i | theta^{(s)}) of every datum, per-datum latents summed or averaged out; shape (draws, n).

    A program without latent variables that all data share has one theta: the result then has one draw.
    """
    structure = evaluation.structure
    if not structure.global_latent:
        return estimate_evidence(evaluation, num_samples, "auto", 512).log_evidence.unsqueeze(0).cpu()
    batch = evaluation.rows.whole()
    sampled = _local_sampled(evaluation)
    values = []
    for _ in range(num_draws):
        draw = draw_latent(evaluation.bound, structure, batch)
        weights = [local_log_weight(draw, structure.data_plate)]
        held = only_global(draw, structure.data_plate)
        for _ in range(num_samples - 1 if sampled else 0):
            again = draw_latent(evaluation.bound, structure, batch, fixed=held)
            weights.append(local_log_weight(again, structure.data_plate))
        stacked = torch.stack(weights)
        values.append(stacked.logsumexp(0) - torch.log(torch.tensor(float(len(weights)), dtype=stacked.dtype)))
    return torch.stack(values).cpu()


def _local_sampled(evaluation: Evaluation) -> bool:
    listed = {s.name for s in (*evaluation.structure.enumerated_in_model, *evaluation.structure.enumerated_in_guide)}
    return any(site.name not in listed for site in evaluation.structure.local_latent)


def log_predictive(evaluation: Evaluation, num_draws: int) -> Tensor:
    r"""log of the mean over draws of p(x_i | theta, z_i), shape (n,), nats per datum."""
    batch = evaluation.rows.whole()
    structure = evaluation.structure
    weights = [
        local_log_weight(draw_latent(evaluation.bound, structure, batch), structure.data_plate)
        for _ in range(num_draws)
    ]
    stacked = torch.stack(weights)
    return (stacked.logsumexp(0) - torch.log(torch.tensor(float(num_draws), dtype=stacked.dtype))).cpu()


def mean_responsibilities(evaluation: Evaluation, num_draws: int) -> Mapping[str, Tensor]:
    """p(k_i | x_i), averaged over draws of everything else, by enumerated site; shape (n, K), float64."""
    batch = evaluation.rows.whole()
    totals: dict[str, Tensor] = {}
    for _ in range(num_draws):
        draw: Draw = draw_latent(evaluation.bound, evaluation.structure, batch)
        for name, marginal in _compute_marginals(draw.model_trace, draw.guide_trace).items():
            support = marginal.enumerate_support(expand=True)
            probabilities = marginal.log_prob(support).exp().movedim(0, -1).double()
            totals[name] = totals.get(name, torch.zeros_like(probabilities)) + probabilities / num_draws
    return totals



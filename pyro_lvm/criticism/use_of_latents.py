r"""Whether the decoder uses its latents at all: what is lost when data exchange them.

.. math:: \Delta = \frac1n \sum_i \Bigl\{ E_{z \sim q(z \mid x_i)}[\log p(x_i \mid z)]
          - E_{z \sim q(z \mid x_{j(i)})}[\log p(x_i \mid z)] \Bigr\}

with j a permutation that leaves no row where it is. A decoder that ignores z has a difference of exactly nought,
whatever the guide does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_lvm.criticism.findings import Finding, judged
from pyro_lvm.criticism.judged_rows import JudgedRows
from pyro_lvm.data import Batch
from pyro_lvm.elbo.factors import in_plate
from pyro_lvm.elbo.terms import is_random
from pyro_lvm.evaluation import Evaluation

__all__ = ["use_of_latents"]

DRAWS = 8
"""Draws of each row; averaged over the rows, they are many."""

IGNORED, LITTLE = 0.01, 0.1
"""Nats per datum below which the decoder ignores, or hardly uses, its latents."""


@torch.no_grad()
def use_of_latents(evaluation: Evaluation, rows: JudgedRows) -> Finding:
    """Finding "use_of_latents"; for programs whose sampled latents of a datum are drawn in the guide."""
    batch, bound = rows.whole, evaluation.bound
    order = torch.randperm(len(rows))
    partner = torch.empty_like(order).scatter_(0, order, order.roll(1))  # one circle: nobody keeps his own
    own, exchanged = [], []
    for _ in range(DRAWS):
        with poutine.block():
            drawn = poutine.trace(bound.guide).get_trace(*batch.args, **batch.named())
        own.append(_reconstruction(evaluation, batch, drawn))
        exchanged.append(_reconstruction(evaluation, batch, _exchanged(drawn, evaluation, partner)))
    difference = torch.stack(own).mean(0) - torch.stack(exchanged).mean(0)
    mean = difference.mean().item()
    verdict = judged(-mean, -LITTLE, -IGNORED)
    advice = {
        "fine": "the decoder needs the latents of each datum to explain it",
        "look": "the decoder hardly uses its latents: look at the units, and try a longer KL warm-up",
        "wrong": "the decoder ignores its latents (collapse): try free bits or a KL warm-up, a weaker decoder, or a "
        "smaller scale of the noise",
    }[verdict]
    if mean < -LITTLE:
        advice = (
            "data are explained better by the latents of others than by their own: guide and decoder have not found "
        )
        advice += "each other; train longer, or at a smaller rate"
    numbers = {
        "nats_per_datum": mean,
        "standard_error": difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else 0.0,
        "own": torch.stack(own).mean().item(),
        "exchanged": torch.stack(exchanged).mean().item(),
    }
    return Finding("use_of_latents", verdict, numbers, advice, {"by_row": difference.cpu()})


def _exchanged(drawn: Any, evaluation: Evaluation, partner: Tensor) -> Any:
    """The guide's trace with the latents of every datum taken from its partner."""
    kept = drawn.copy()
    plate = evaluation.structure.data_plate
    for name, node in kept.nodes.items():
        if is_random(node) and in_plate(node, plate):
            frame = next(frame for frame in node["cond_indep_stack"] if frame.name == plate)
            dim = node["value"].dim() - len(node["fn"].event_shape) + frame.dim
            moved = node["value"].index_select(dim, partner.to(node["value"].device))
            kept.nodes[name] = {**node, "value": moved}
    return kept


def _reconstruction(evaluation: Evaluation, batch: Batch, drawn: Any) -> Tensor:
    """Log p(x_i | z) of each row, shape (rows,), float64."""
    plate = evaluation.structure.data_plate
    with poutine.block():
        trace = poutine.trace(poutine.replay(evaluation.bound.model, trace=drawn)).get_trace(
            *batch.args, **batch.named()
        )
    total = torch.zeros(len(batch), dtype=torch.float64)
    nodes: list[Any] = list(trace.nodes.values())
    for node in nodes:
        if is_random(node) and node["is_observed"] and in_plate(node, plate):
            frame = next(frame for frame in node["cond_indep_stack"] if frame.name == plate)
            value = scale_and_mask(node["fn"].log_prob(node["value"]), mask=node["mask"])
            dim = value.dim() + frame.dim
            others = [d for d in range(value.dim()) if d != dim]
            total += (value.sum(others) if others else value).double().cpu()
    return total

r"""How far the guide is from the posterior, by importance weights: tail index and KL divergence.

.. math:: w_{is} = \frac{p(x_i, z_s)}{q(z_s \mid x_i)}, \quad z_s \sim q(z \mid x_i), \qquad
          \mathrm{KL}\bigl(q \,\Vert\, p(z \mid x_i)\bigr) = \log p(x_i) - E_q[\log w_i]
          \approx \log \frac1S \sum_s w_{is} - \frac1S \sum_s \log w_{is}
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lvm.criticism.evidence import estimate_evidence
from pyro_lvm.criticism.findings import VERDICTS, Finding, Verdict, judged
from pyro_lvm.criticism.judged_rows import JudgedRows, row_log_weights
from pyro_lvm.criticism.k_hat import k_hat
from pyro_lvm.criticism.weights import draw_latent, log_weight, weighs_rows
from pyro_lvm.evaluation import Evaluation

__all__ = ["closeness_of_rows", "joint_closeness"]

GOOD_K, BAD_K = 0.5, 0.7
"""Below the first the weights' variance is finite; above the second no affordable number of draws is enough."""

SMALL_GAP, LARGE_GAP = 0.1, 3.0
"""Nats: at a KL of 0.1 no probability is wrong by more than 0.23 (Pinsker); at 3 that says nothing any more."""


@dataclass(frozen=True)
class _Rows:
    """By row, shape (rows,), nats: tail index, bound, evidence by importance weights, effective sample size."""

    k_hat: Tensor
    elbo: Tensor
    log_evidence: Tensor
    effective: Tensor


def _summary(log_weights: Tensor) -> _Rows:
    exact = log_weights.double()
    log_sum = exact.logsumexp(0)
    return _Rows(
        k_hat(log_weights),
        exact.mean(0),
        log_sum - math.log(len(exact)),
        (2 * log_sum - (2 * exact).logsumexp(0)).exp(),
    )


@torch.no_grad()
def closeness_of_rows(evaluation: Evaluation, rows: JudgedRows, num_samples: int) -> list[Finding]:
    """Findings "k_hat" and "gap" for a guide with a density for the latents of each datum by themselves."""
    bound, structure = evaluation.bound, evaluation.structure
    shared = draw_latent(bound, structure, rows.batches[0]) if structure.global_latent else None
    parts = [_summary(row_log_weights(evaluation, batch, num_samples, shared)) for batch in rows.batches]
    k, elbo, estimate, effective = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("k_hat", "elbo", "log_evidence", "effective")
    )
    exact = None if structure.global_latent else _exact_evidence(evaluation)
    evidence = estimate if exact is None else exact[rows.index].double().cpu()
    gap = evidence - elbo
    return [_k_hat(k, effective, num_samples), _gap(gap, elbo, evidence, known=exact is not None)]


def _k_hat(k: Tensor, effective: Tensor, num_samples: int) -> Finding:
    bad = (k > BAD_K).double().mean().item()
    some = (k > GOOD_K).double().mean().item()
    # a tenth of the fits of an innocent tail end above the first mark by noise alone
    verdict: Verdict = "wrong" if bad > 0.1 else "look" if bad > 0.02 or some > 0.1 else "fine"
    advice = {
        "fine": "the guide covers the posteriors of nearly all data: importance weighting can be trusted",
        "look": f"{100 * bad:.0f} % of the data have a posterior with more tail than their guide (k above {BAD_K}): "
        'look at the rows in finding["by_row"], and try a guide with a full covariance or more draws',
        "wrong": f"for {100 * bad:.0f} % of the data the guide is too narrow for the posterior (k above {BAD_K}), so "
        "that neither its spreads nor importance weights can be trusted: try a full covariance or a flow, or "
        "ImportanceWeighted",
    }[verdict]
    numbers = {
        "median": k.median().item(),
        "max": k.max().item(),
        f"above_{BAD_K}": bad,
        "least_ess": effective.min().item(),
        "num_samples": float(num_samples),
    }
    return Finding("k_hat", verdict, numbers, advice, {"by_row": k, "effective_sample_size": effective})


def _gap(gap: Tensor, elbo: Tensor, evidence: Tensor, *, known: bool) -> Finding:
    mean = gap.mean().item()
    verdict = judged(mean, SMALL_GAP, LARGE_GAP)
    advice = {
        "fine": "the bound is close to the evidence: q and the posterior differ by little",
        "look": "the bound lies below the evidence by KL(q || posterior): compare models by log_evidence instead of "
        "the bound, and try a richer guide, or ImportanceWeighted",
        "wrong": "q and the posterior have little in common: try a richer guide, longer training, or another encoder",
    }[verdict]
    if not known:
        advice += " (the evidence is itself estimated, from below: where k_hat is large the true gap is larger)"
    error = gap.std().item() / math.sqrt(len(gap)) if len(gap) > 1 else 0.0
    numbers = {"nats_per_datum": mean, "standard_error": error, "elbo": elbo.mean().item()}
    numbers["log_evidence"] = evidence.mean().item()
    return Finding("gap", verdict, numbers, advice, {"by_row": gap, "elbo": elbo, "log_evidence": evidence})


def _exact_evidence(evaluation: Evaluation) -> Tensor | None:
    try:
        return estimate_evidence(evaluation, 1, "exact", 512).log_evidence
    except ValueError:  # it has no closed form
        return None


@torch.no_grad()
def joint_closeness(evaluation: Evaluation, num_samples: int) -> list[Finding]:
    """Findings "k_hat_joint" and "gap_joint" of all latents together, given all rows."""
    batch = evaluation.rows.whole()
    drawn = [log_weight(draw_latent(evaluation.bound, evaluation.structure, batch)).cpu() for _ in range(num_samples)]
    log_weights = torch.stack(drawn)
    found = _summary(log_weights[:, None])
    k, n = found.k_hat.item(), evaluation.rows.size
    gap = (found.log_evidence - found.elbo).item()
    spread = _summary_error(log_weights.double())
    # with latents of every datum among them, small misfits add up: they are judged by row
    adds_up = any(site.name in evaluation.structure.guide for site in evaluation.structure.local_latent)
    worst: Verdict = "look" if adds_up and weighs_rows(evaluation.structure) else "wrong"
    verdict = min(judged(k, GOOD_K, BAD_K), worst, key=VERDICTS.index)
    advice = {
        "fine": "the guide covers the posterior of everything that is latent, taken together",
        "look": "the guide's tails are light for the posterior of everything latent, taken together: correct "
        "expectations by importance weights, or try guide='full_rank'",
        "wrong": "the guide is too narrow for the posterior, or stands beside it: its spreads are not to be trusted; "
        "try guide='full_rank', a flow, or lvm.mcmc to compare with",
    }[verdict]
    numbers = {"k": k, "ess": found.effective.item(), "num_samples": float(num_samples)}
    total = min(judged(gap, SMALL_GAP, LARGE_GAP), worst, key=VERDICTS.index)
    advice_of_gap = {
        "fine": "guide and posterior differ by little, all latents taken together",
        "look": "guide and posterior differ, all latents taken together (small misfits of every datum add up): "
        "intervals may be too narrow; try guide='full_rank' or more steps",
        "wrong": "guide and posterior have little in common: try a richer guide, or more steps",
    }[total]
    gap_numbers = {"nats": gap, "standard_error": spread, "nats_per_datum": gap / n, "elbo": found.elbo.item() / n}
    return [
        Finding("k_hat_joint", verdict, numbers, advice, {"log_weights": log_weights}),
        Finding("gap_joint", total, gap_numbers, advice_of_gap),
    ]


def _summary_error(log_weights: Tensor) -> float:
    """Of log mean w - mean log w, by the delta method."""
    relative = (log_weights - log_weights.max()).exp()
    influence = relative / relative.mean() - log_weights
    return influence.std().item() / math.sqrt(len(log_weights))

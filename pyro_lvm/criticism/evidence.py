r"""The evidence of the data, exact where it has a closed form, else by weighted draws.

.. math:: \log p(x_i) = \log E_q\!\left[\frac{p(x_i, z)}{q(z \mid x_i)}\right]
          \approx \log \frac1K \sum_{k=1}^K w_{ik}, \qquad z_k \sim q(z \mid x_i)

The estimate is a lower bound in expectation that rises to the evidence with K (Burda et al., 2016,
https://arxiv.org/abs/1509.00519). What the draws come from decides how fast: the guide ("importance"), the prior
("naive"), or chains on their way from either to the posterior ("annealed").
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from pyro_lvm.criticism.annealed import anneal
from pyro_lvm.criticism.log_mean import Evidence, LogMean, joined
from pyro_lvm.criticism.particles import Passes
from pyro_lvm.criticism.weights import (
    Source,
    from_guide,
    from_prior,
    local_log_weight,
    log_weight,
    point_estimates,
    sampled_sites,
    weighs_rows,
)
from pyro_lvm.data import Batch
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.memory import require_room
from pyro_lvm.walk import FEWER

__all__ = ["Evidence", "estimate_evidence", "log_evidence"]

Method = Literal["auto", "exact", "importance", "naive", "annealed"]

NUM_SAMPLES = 1000
"""Draws for each datum where the caller does not say how many; an annealed chain is worth many draws."""

NUM_CHAINS = 16
NUM_STEPS = 200


@overload
def log_evidence(
    program: Any,
    x: Any,
    num_samples: int | None = ...,
    *,
    seed: int | None = ...,
    method: Method = ...,
    num_steps: int = ...,
    start: Literal["guide", "prior"] | None = ...,
    batch_size: int = ...,
    return_diagnostics: Literal[False] = ...,
) -> Tensor: ...


@overload
def log_evidence(
    program: Any,
    x: Any,
    num_samples: int | None = ...,
    *,
    seed: int | None = ...,
    method: Method = ...,
    num_steps: int = ...,
    start: Literal["guide", "prior"] | None = ...,
    batch_size: int = ...,
    return_diagnostics: Literal[True],
) -> Evidence: ...


def log_evidence(
    program: Any,
    x: Any,
    num_samples: int | None = None,
    *,
    seed: int | None = None,
    method: Method = "auto",
    num_steps: int = NUM_STEPS,
    start: Literal["guide", "prior"] | None = None,
    batch_size: int = 512,
    return_diagnostics: bool = False,
) -> Tensor | Evidence:
    r"""Log p(x) of every datum, in nats per datum.

    .. math::
        \text{importance:} \quad & \log p(x_i) \approx
            \log \frac1K \sum_{k=1}^K \frac{p(x_i, z_k)}{q(z_k \mid x_i)}, & z_k &\sim q(z \mid x_i) \\
        \text{naive:} \quad & \log p(x_i) \approx \log \frac1K \sum_{k=1}^K p(x_i \mid z_k), & z_k &\sim p(z) \\
        \text{annealed:} \quad & \log p(x_i) \approx \log \frac1K \sum_{k=1}^K
            \prod_{t=1}^T \left[\frac{p(x_i, z_{k,t-1})}{q_0(z_{k,t-1})}\right]^{\beta_t - \beta_{t-1}},
            & z_{k,0} &\sim q_0

    - ``"exact"``: by the program's ``log_prob``, or where enumeration sums every latent site out.
    - ``"importance"``: as good as the guide. With the posterior for guide one draw would do.
    - ``"naive"``: what the lectures warn of. Few draws of the prior explain a datum, and their share falls
      exponentially with the dimension of z.
    - ``"annealed"``: chains that walk from :math:`q_0`, the guide or the prior, to the posterior in T steps and carry
      their weight along (Neal, 2001, https://arxiv.org/abs/physics/9803008; Wu et al., 2017,
      https://arxiv.org/abs/1611.04273). It does not need a good guide. The transitions are Hamiltonian; step sizes,
      scales and temperatures are found for every datum by a pilot run of 16 other chains and then frozen, which keeps
      the mean of the weights exact. It costs 3 gradients for each step and chain, and half as much again for each
      start that the pilot tries.
    - ``"auto"``: exact if it can be, else importance.

    Enumerated sites are summed out exactly in every weight. A program with latent variables that all data share
    (a posterior over parameters) has no evidence for one datum: every entry is then the joint
    :math:`\log p(x_1, \ldots, x_n)` divided by n, and so are the entries of the standard error. The same goes for a
    guide that draws the latents of all data jointly (full rank). Where the guide clamps a site to what is known (the
    labels of a semi-supervised program) that knowledge is part of the data: the entry is log p(x_i, y_i).

    Args:
        program: a `Fit`, or anything that `fit` takes with a guide (evaluated at its present parameters).
        x: data as for `fit`: n rows.
        num_samples: K, draws or chains for each datum; None for 1000 draws, or 16 chains.
        seed: of the draws; None for fresh ones.
        method: one of the five above.
        num_steps: T, temperatures of annealing. The variance of a chain's log w falls as 1/T.
        start: "guide" or "prior", where annealing starts; None for whichever the pilot finds the shorter way from.
        batch_size: rows in one pass, each counted once for every draw of it that the pass holds; memory only. Few rows
            are drawn many at a time, on a dim left of all plates. The first pass of every shape is checked against
            single draws, and a program that does not broadcast, or mixes the draws, is run one at a time.
        return_diagnostics: also return standard errors and effective sample sizes.

    Returns:
        Tensor of shape (n,), or an `Evidence` of three such tensors.

    Raises:
        ValueError: if ``method="exact"`` and the program has no closed form, or a number is not positive.
        NotEnoughMemoryError: if the numbers of all rows would not fit in memory.
        ProgramError: if the guide is a point (``guide="map"``), which has no density to weigh draws by; if the program
            cannot be annealed (a discrete site that is sampled or listed by the guide, latents shared by all data).

    When it is wrong: a guide that misses a mode or has lighter tails than the posterior gives too low a number with
    a small standard error. An effective sample size of a few says so; a large one does not prove the contrary. The same
    holds for "naive" in many dimensions, and for "annealed" with too few steps, or where all chains miss a mode.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> ppca = lvm.PPCA(num_features=3, latent_dim=1)
        >>> x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(lvm.log_evidence(ppca, x), ppca.log_prob(x)))
        True
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not known: use one of {', '.join(map(repr, get_args(Method)))}")
    if num_samples is None:
        num_samples = NUM_CHAINS if method == "annealed" else NUM_SAMPLES
    for name, value in (("num_samples", num_samples), ("num_steps", num_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: the estimate needs at least 1")
    if start not in (None, "guide", "prior"):
        raise ValueError(f"start={start!r} is not known: annealing starts from 'guide' or 'prior'")
    evaluation = Evaluation.of(program, x)
    with evaluation.running(seed):
        if method == "annealed":
            _require_room(evaluation)
            evidence = anneal(evaluation, num_samples, num_steps, start, batch_size)
        else:
            evidence = estimate_evidence(evaluation, num_samples, method, batch_size)
    return evidence if return_diagnostics else evidence.log_evidence


@torch.no_grad()
def estimate_evidence(evaluation: Evaluation, num_samples: int, method: str, batch_size: int) -> Evidence:
    """`log_evidence` for a caller that has set up random state and parameters; all methods but annealing."""
    _require_room(evaluation)
    bound, structure = evaluation.bound, evaluation.structure
    if method == "naive":
        improper = [site for site in structure.latent if site.kind == "ImproperUniform"]
        if improper:
            raise ProgramError(f"{improper[0]} has an improper prior, which nothing can be drawn from")
        source = from_prior(bound, structure)
        return _estimate(evaluation, source, not structure.global_latent, num_samples, batch_size)
    if method != "importance":
        exact = _exact(evaluation, batch_size)
        if exact is not None:
            return Evidence(exact, torch.zeros_like(exact), torch.full_like(exact, torch.inf))
        if method == "exact":
            raise ValueError(
                f"{bound.program.name} has no closed-form evidence: it has sampled latent sites and no log_prob "
                "method. Use method='importance'"
            )
    points = point_estimates(structure)
    if points:
        raise ProgramError(
            f"the guide of {', '.join(points)} is a point, without the density that importance weights divide by: fit "
            "with guide='mean_field' (or another guide with a spread)"
        )
    return _importance(evaluation, num_samples, batch_size)


def _require_room(evaluation: Evaluation) -> None:
    """Three numbers for every row, in parts and put together; the rows themselves are walked."""
    rows = len(evaluation.rows)
    require_room(6 * 8 * rows, f"the log evidence of {rows} rows, and how far to trust it,", FEWER)


def _exact(evaluation: Evaluation, batch_size: int) -> Tensor | None:
    structure = evaluation.structure
    if not sampled_sites(structure):
        return _importance(evaluation, 1, batch_size).log_evidence
    log_prob = evaluation.bound.program.hook("log_prob")
    if log_prob is None or structure.global_latent:
        return None
    marginal: dict[str, Any] = {}
    if evaluation.rows.missing:
        if "missing" not in inspect.signature(log_prob).parameters:
            return None
        marginal = {"missing": "marginalize"}
    return torch.cat([log_prob(*b.args, **b.kwargs, **marginal) for b in evaluation.rows.batches(batch_size)])


def _importance(evaluation: Evaluation, num_samples: int, batch_size: int) -> Evidence:
    structure = evaluation.structure
    by_row = not structure.global_latent and weighs_rows(structure)
    return _estimate(evaluation, from_guide(evaluation.bound, structure), by_row, num_samples, batch_size)


def _estimate(evaluation: Evaluation, source: Source, by_row: bool, num_samples: int, batch_size: int) -> Evidence:
    """Each row's log-mean weight, or that of all rows together divided by their number."""
    plate = evaluation.structure.data_plate
    weigh = (lambda draw: local_log_weight(draw, plate)) if by_row else log_weight
    passes = Passes(source, weigh, batch_size, one_at_a_time=evaluation.given is not None)
    if not by_row:
        n = evaluation.rows.size
        joint, error, size = _log_mean(passes, evaluation.rows.whole(), num_samples)
        return Evidence((joint / n).repeat(n), (error / n).repeat(n), size.repeat(n))
    rows = rows_at_a_time(evaluation, batch_size)
    parts = [_log_mean(passes, batch, num_samples) for batch in evaluation.rows.batches(rows)]
    return joined(parts, parts[0].log_evidence)


def _log_mean(passes: Passes, batch: Batch, num_samples: int) -> Evidence:
    mean: LogMean | None = None
    for _, log_weights in passes.draws(batch, num_samples):
        mean = mean or LogMean(*log_weights.shape[1:])
        mean.add(log_weights)
        like = log_weights
    assert mean is not None, "there is at least one draw"
    return Evidence(*(column.to(like) for column in mean.result()))


def rows_at_a_time(evaluation: Evaluation, batch_size: int) -> int | None:
    """Rows at a time: all of them where the program cannot take a part."""
    return batch_size if evaluation.takes_parts else None

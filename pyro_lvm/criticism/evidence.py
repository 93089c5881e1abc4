r"""The evidence of the data, exact where it has a closed form, else importance-weighted.

.. math:: \log p(x_i) = \log E_q\!\left[\frac{p(x_i, z)}{q(z \mid x_i)}\right]
          \approx \log \frac1K \sum_{k=1}^K w_{ik}, \qquad z_k \sim q(z \mid x_i)

The estimate is a lower bound in expectation that rises to the evidence with K (Burda et al., 2016,
https://arxiv.org/abs/1509.00519).
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lvm.criticism.weights import (
    draw_latent,
    local_log_weight,
    log_weight,
    point_estimates,
    sampled_sites,
    weighs_rows,
)
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation

__all__ = ["Evidence", "estimate_evidence", "log_evidence"]


class Evidence(NamedTuple):
    """The evidence and how far to trust it; every field has shape (n,).

    Attributes:
        log_evidence: log p(x_i), nats per datum.
        standard_error: of ``log_evidence``, by the delta method; 0 where it is exact.
        effective_sample_size: (sum w)^2 / sum w^2, of ``num_samples``; infinite where it is exact.
    """

    log_evidence: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor


@dataclass
class _LogMean:
    """Running log-mean of weights and of their squares."""

    log_sum: Tensor
    log_sum_of_squares: Tensor
    count: int = 0

    def add(self, log_weights: Tensor) -> None:
        self.log_sum = torch.logaddexp(self.log_sum, log_weights)
        self.log_sum_of_squares = torch.logaddexp(self.log_sum_of_squares, 2 * log_weights)
        self.count += 1

    def result(self) -> Evidence:
        size = torch.exp(2 * self.log_sum - self.log_sum_of_squares).nan_to_num(nan=0.0)  # no draw had any weight
        variance = (1 / size - 1 / self.count).clamp(min=0.0)
        return Evidence(self.log_sum - math.log(self.count), variance.sqrt(), size)


@overload
def log_evidence(
    program: Any,
    x: Any,
    num_samples: int = ...,
    *,
    seed: int | None = ...,
    method: Literal["auto", "exact", "importance"] = ...,
    batch_size: int = ...,
    return_diagnostics: Literal[False] = ...,
) -> Tensor: ...


@overload
def log_evidence(
    program: Any,
    x: Any,
    num_samples: int = ...,
    *,
    seed: int | None = ...,
    method: Literal["auto", "exact", "importance"] = ...,
    batch_size: int = ...,
    return_diagnostics: Literal[True],
) -> Evidence: ...


def log_evidence(
    program: Any,
    x: Any,
    num_samples: int = 1000,
    *,
    seed: int | None = None,
    method: Literal["auto", "exact", "importance"] = "auto",
    batch_size: int = 512,
    return_diagnostics: bool = False,
) -> Tensor | Evidence:
    r"""Log p(x) of every datum, in nats per datum.

    .. math:: \log p(x_i) \approx \log \frac1K \sum_{k=1}^K \frac{p(x_i, z_k)}{q(z_k \mid x_i)}

    Enumerated sites are summed out exactly in every weight. A program with latent variables that all data share
    (a posterior over parameters) has no evidence for one datum: every entry is then the joint
    :math:`\log p(x_1, \ldots, x_n)` divided by n, and so are the entries of the standard error. The same goes for a
    guide that draws the latents of all data jointly (full rank). Where the guide clamps a site to what is known (the
    labels of a semi-supervised program) that knowledge is part of the data: the entry is log p(x_i, y_i).

    Args:
        program: a `Fit`, or anything that `fit` takes with a guide (evaluated at its present parameters).
        x: data as for `fit`: n rows.
        num_samples: K, draws from the guide for each datum.
        seed: of the draws; None for fresh ones.
        method: "exact" by the program's ``log_prob`` or by enumeration, "importance", or "auto": exact if it can be.
        batch_size: rows in one pass; memory only.
        return_diagnostics: also return standard errors and effective sample sizes.

    Returns:
        Tensor of shape (n,), or an `Evidence` of three such tensors.

    Raises:
        ValueError: if ``method="exact"`` and the program has no closed form, or ``num_samples < 1``.
        ProgramError: if the guide is a point (``guide="map"``), which has no density to weigh draws by.

    When it is wrong: a guide that misses a mode or has lighter tails than the posterior gives too low a number with
    a small standard error. An effective sample size of a few says so; a large one does not prove the contrary.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> ppca = lvm.PPCA(num_features=3, latent_dim=1)
        >>> x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(lvm.log_evidence(ppca, x), ppca.log_prob(x)))
        True
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: the estimate needs at least 1")
    if method not in ("auto", "exact", "importance"):
        raise ValueError(f"method={method!r} is not known: use 'auto', 'exact' or 'importance'")
    evaluation = Evaluation.of(program, x)
    with evaluation.running(seed):
        evidence = estimate_evidence(evaluation, num_samples, method, batch_size)
    return evidence if return_diagnostics else evidence.log_evidence


@torch.no_grad()
def estimate_evidence(evaluation: Evaluation, num_samples: int, method: str, batch_size: int) -> Evidence:
    """`log_evidence` for a caller that has set up random state and parameters."""
    structure = evaluation.structure
    if method != "importance":
        exact = _exact(evaluation, batch_size)
        if exact is not None:
            return Evidence(exact, torch.zeros_like(exact), torch.full_like(exact, torch.inf))
        if method == "exact":
            raise ValueError(
                f"{evaluation.bound.program.name} has no closed-form evidence: it has sampled latent sites and no "
                "log_prob method. Use method='importance'"
            )
    points = point_estimates(structure)
    if points:
        raise ProgramError(
            f"the guide of {', '.join(points)} is a point, without the density that importance weights divide by: fit "
            "with guide='mean_field' (or another guide with a spread)"
        )
    return _estimate(evaluation, num_samples, batch_size)


def _exact(evaluation: Evaluation, batch_size: int) -> Tensor | None:
    structure = evaluation.structure
    if not sampled_sites(structure):
        return _estimate(evaluation, 1, batch_size).log_evidence
    log_prob = evaluation.bound.program.hook("log_prob")
    if log_prob is None or structure.global_latent:
        return None
    marginal: dict[str, Any] = {}
    if evaluation.rows.missing:
        if "missing" not in inspect.signature(log_prob).parameters:
            return None
        marginal = {"missing": "marginalize"}
    return torch.cat([log_prob(*b.args, **b.kwargs, **marginal) for b in evaluation.rows.batches(batch_size)])


def _estimate(evaluation: Evaluation, num_samples: int, batch_size: int) -> Evidence:
    structure = evaluation.structure
    if structure.global_latent or not weighs_rows(structure):
        return _joint(evaluation, num_samples)
    return _per_datum(evaluation, num_samples, batch_size)


def _per_datum(evaluation: Evaluation, num_samples: int, batch_size: int) -> Evidence:
    bound, structure = evaluation.bound, evaluation.structure
    results = []
    for batch in evaluation.rows.batches(_chunk(evaluation, batch_size)):
        start = torch.full((len(batch),), -torch.inf, dtype=torch.float64)
        mean = _LogMean(start, start.clone())
        for _ in range(num_samples):
            weight = local_log_weight(draw_latent(bound, structure, batch), structure.data_plate)
            mean.add(weight.double().cpu())
        results.append([column.to(weight) for column in mean.result()])
    return Evidence(*(torch.cat(column) for column in zip(*results, strict=True)))


def _chunk(evaluation: Evaluation, batch_size: int) -> int | None:
    """Rows at a time: all of them where the program cannot take a part."""
    program = evaluation.bound.program
    by_row = isinstance(program.guide, AutoGuide) and bool(evaluation.structure.local_latent)
    return batch_size if program.names("size") and (not by_row or program.names("index")) else None


def _joint(evaluation: Evaluation, num_samples: int) -> Evidence:
    batch = evaluation.rows.whole()
    start = torch.full((), -torch.inf, dtype=torch.float64)
    mean = _LogMean(start, start.clone())
    for _ in range(num_samples):
        weight = log_weight(draw_latent(evaluation.bound, evaluation.structure, batch))
        mean.add(weight.double().cpu())
    joint, error, size = (column.to(weight) for column in mean.result())
    n = evaluation.rows.size
    return Evidence((joint / n).repeat(n), (error / n).repeat(n), size.repeat(n))

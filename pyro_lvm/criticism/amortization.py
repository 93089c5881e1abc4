r"""What amortising costs: the bound of the guide as it is, and of one with parameters for each datum.

.. math::
    \text{gap} = \frac1n \sum_i \Bigl[\max_{\lambda_i} \mathcal{L}_i(\lambda_i) - \mathcal{L}_i(f_\phi(x_i))\Bigr],
    \qquad \mathcal{L}_i(\lambda) = E_{q(z; \lambda)}[\log p(x_i, z) - \log q(z; \lambda)]

With the evidence :math:`\log p(x_i)` the whole distance of a bound to it falls into this gap and the one that is left
because the posterior is not of the guide's family (Cremer, Li and Duvenaud, 2018, https://arxiv.org/abs/1801.03558).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_lvm.criticism.weights import draw_latent, local_log_weight, sampled_sites
from pyro_lvm.data import Batch
from pyro_lvm.elbo.estimator import Estimator, plain_estimator
from pyro_lvm.errors import ProgramError
from pyro_lvm.evaluation import Evaluation, batch_to_trace, fresh_seed
from pyro_lvm.function_parameters import FunctionParameters, bind
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.per_datum import per_datum_guide, replaced_sites
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import ROW_KEYWORDS
from pyro_lvm.structure import Structure

__all__ = ["AmortizationGap", "amortization_gap"]

LEARNING_RATE = 0.02
"""Adam's rate at the start; it falls to nought in a straight line, so that the noise of the last steps averages out.
A parameter can so travel ``steps`` times half of it: in 500 steps five units, of z or of the logarithm of its scale."""

NUM_SAMPLES = 100
"""Draws of both bounds, with the same noise, for each datum: what the two have in common then cancels."""

ROWS_AT_A_TIME = 4096
"""Rows whose parameters are trained together; each row's are its own, so that the number changes no result."""


@dataclass(frozen=True)
class AmortizationGap:
    """What amortising costs, nats per datum.

    Attributes:
        gap: ``elbo_per_datum`` minus ``elbo_amortized``.
        standard_error: of ``gap`` as an estimate for all data like these: over data, and over draws.
        elbo_amortized: the bound of the guide as it is.
        elbo_per_datum: the bound of one with parameters for each datum, of the same family.
        steps: gradient steps that trained them.
    """

    gap: float
    standard_error: float
    elbo_amortized: float
    elbo_per_datum: float
    steps: int


@dataclass(frozen=True)
class _Pair:
    """Model and guide, as much of a `BoundProgram` as an estimator asks for."""

    model: Callable[..., Any]
    guide: Callable[..., Any]


def amortization_gap(
    fit: Any,
    x: Any,
    *,
    steps: int = 500,
    lr: float = LEARNING_RATE,
    num_samples: int = NUM_SAMPLES,
    seed: int | None = None,
    batch_size: int | None = None,
) -> AmortizationGap:
    r"""Nats per datum that are lost because one function gives the guide of every datum its parameters.

    .. math:: \text{gap} = \frac1n \sum_i \bigl[\mathcal{L}_i(\lambda_i^*) - \mathcal{L}_i(f_\phi(x_i))\bigr] \ge 0

    The model stands still. Every datum gets parameters :math:`\lambda_i` of its own, of the guide's family, which
    start at the guide's and are trained by Adam; then both bounds are evaluated with the same noise (in closed form
    where the plain bound has no noise). Nothing of the fit or its modules moves.

    Latents that all data share are drawn from their guide; their own KL, the same in both bounds, is left out of both.

    Args:
        fit: a `Fit`, or anything that `fit` takes with a guide (at its present parameters).
        x: data as for `fit`: n rows. Those of the fit tell of the fit; others, how the guide does on new data.
        steps: of Adam, for each datum.
        lr: Adam's rate at the start; it falls to nought.
        num_samples: draws for each datum to evaluate the bounds with.
        seed: of all draws; None for fresh ones.
        batch_size: rows in one pass; memory only.

    Returns:
        An `AmortizationGap`.

    Raises:
        ProgramError: if the guide is not amortised, or a site cannot have parameters of its own: it depends on another
            site of the guide, lies in a further plate, or is not Normal, LogNormal, MultivariateNormal, Bernoulli or
            Categorical; if both model and guide enumerate.
        ValueError: if ``steps``, ``lr``, ``num_samples`` or ``batch_size`` is not positive.

    When it is wrong: too few steps, or too small a rate, leave part of the gap unseen: it is then too small. Twice the
    steps should tell the same.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> exact = lvm.PPCA.closed_form(x, latent_dim=1)
        >>> gap = lvm.amortization_gap(exact, x, steps=50, num_samples=10, seed=0)
        >>> abs(gap.gap) < 0.01  # the guide is the exact posterior
        True
    """
    for name, value in (("steps", steps), ("lr", lr), ("num_samples", num_samples), ("batch_size", batch_size)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}: it must be positive")
    evaluation = Evaluation.of(fit, x)
    with evaluation.running(fresh_seed() if seed is None else seed), _standing_still(evaluation.bound):
        rows = batch_size or ROWS_AT_A_TIME
        first = evaluation.rows.first(batch_to_trace(evaluation.bound.program, evaluation.rows))
        replaced_sites(evaluation.bound, evaluation.structure, first)
        blocks = [
            _block(evaluation, batch, steps, lr, num_samples)
            for batch in evaluation.rows.batches(rows if evaluation.bound.program.names("size") else None)
        ]
    amortized, per_datum = (torch.cat(values, dim=-1) for values in zip(*blocks, strict=True))
    difference = per_datum - amortized  # (draws, n)
    return AmortizationGap(
        difference.mean().item(),
        _standard_error(difference, shared=bool(evaluation.structure.global_latent)),
        amortized.mean().item(),
        per_datum.mean().item(),
        steps,
    )


def _standard_error(difference: Tensor, *, shared: bool) -> float:
    """Of the mean of (draws, rows): rows are independent given what they share, and a row's draws are in its mean."""
    draws, rows = difference.shape
    variance = difference.mean(0).var().item() / rows if rows > 1 else 0.0
    if (shared or rows == 1) and draws > 1:
        variance += difference.mean(1).var().item() / draws
    return math.sqrt(variance)


@contextmanager
def _standing_still(bound: BoundProgram) -> Iterator[None]:
    """The program's parameters ask for no gradient."""
    trainable = list(bound.trainable().values())
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _block(evaluation: Evaluation, batch: Batch, steps: int, lr: float, num_samples: int) -> tuple[Tensor, Tensor]:
    """Both bounds of the rows of one batch, shape (draws, rows), nats, once its own parameters are trained."""
    bound, structure = evaluation.bound, evaluation.structure
    # drawn first, so that another number of steps is judged by the same noise
    seeds = torch.randint(2**31, (num_samples if sampled_sites(structure) else 1,)).tolist()
    # what all data share is answered by the program itself, and is nothing to train
    shared = poutine.block(bound.guide, hide_types=["param"])
    keywords = frozenset(ROW_KEYWORDS)
    guide = per_datum_guide(bound, structure, [batch], shared=shared, keywords=keywords)
    parameters = FunctionParameters(bound.functions.dtype, bound.functions.device)
    pair: Any = _Pair(bound.model, bind(guide, keywords, parameters))
    freed = traced(pair.model, pair.guide, batch)
    _train(pair, freed, batch, list(parameters.unconstrained.values()), steps, lr)
    return _bounds(bound, structure, batch, seeds), _bounds(pair, freed, batch, seeds)


def _train(pair: Any, structure: Structure, batch: Batch, parameters: list[Tensor], steps: int, lr: float) -> None:
    """Adam, on the bound of all rows; each row's parameters feel its own bound alone."""
    estimator = plain_estimator(structure)
    drawn = not any(site.discrete for site in structure.guide.values() if site.inside(structure.data_plate))
    optimizer = torch.optim.Adam(parameters, lr)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        if drawn:
            _loss_of_paths(pair, structure, batch).backward()
        else:
            estimator.step(pair, batch, parameters, None, len(batch))  # type: ignore[arg-type]
        optimizer.step()
        falling.step()


def _loss_of_paths(pair: Any, structure: Structure, batch: Batch) -> Tensor:
    """Minus the bound, with the gradient that reaches it through the draws alone.

    What is left out, the score of q at its draws, has mean nought; without it the gradient's noise vanishes where q is
    the posterior, and does not shake the parameters there (Roeder, Wu and Duvenaud, 2017,
    https://arxiv.org/abs/1703.09194).
    """
    draw = draw_latent(pair, structure, batch)
    loss = -local_log_weight(draw, structure.data_plate).sum()
    for site in structure.guide.values():
        if site.inside(structure.data_plate):
            node = draw.guide_trace.nodes[site.name]
            loss = loss - node["fn"].log_prob(node["value"].detach()).sum()
    return loss


def _bounds(bound: BoundProgram, structure: Structure, batch: Batch, seeds: list[int]) -> Tensor:
    """The bound of each row of ``batch``, shape (seeds, rows), nats."""
    estimator, plate = plain_estimator(structure), structure.data_plate
    by_row = _reader(estimator, structure)
    values = []
    for seed in seeds:
        with isolated(seed, validate=False):
            values.append(by_row(bound, batch, plate).detach().double().cpu())
    return torch.stack(values)


def _reader(estimator: Estimator, structure: Structure) -> Callable[..., Tensor]:
    if isinstance(estimator.elbo, TraceMeanField_ELBO):
        return estimator.evaluate_rows
    if isinstance(estimator.elbo, TraceEnum_ELBO) and structure.enumerated_in_guide:
        if structure.enumerated_in_model:
            names = structure.enumerated_in_guide[0].name, structure.enumerated_in_model[0].name
            raise ProgramError(
                f"the guide enumerates site {names[0]!r} and the model site {names[1]!r}: what each row adds to such a "
                "bound cannot be told. Enumerate both in the model, or both in the guide"
            )
        return estimator.evaluate_rows

    @torch.no_grad()
    def sampled(bound: BoundProgram, batch: Batch, plate: str) -> Tensor:
        return local_log_weight(draw_latent(bound, structure, batch), plate)

    return sampled

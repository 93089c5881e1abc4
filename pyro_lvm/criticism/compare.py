"""Estimators side by side: value, noise of the gradient, and cost, at fixed parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO
from torch import nn

from pyro_lvm.elbo.estimator import make_estimator
from pyro_lvm.evaluation import Evaluation, fresh_seed
from pyro_lvm.preflight.pair import check_pair

__all__ = ["ElboRow", "ElboTable", "compare_elbos"]


@dataclass(frozen=True)
class ElboRow:
    """One estimator's record.

    Attributes:
        estimator: its name and options.
        value: minus its mean loss, nats per datum. A bound other than the plain one (Renyi) has another mean.
        standard_error: of ``value``.
        gradient_std: standard deviation of the gradient of the loss per datum: the root of the summed variances of
            all its entries.
        milliseconds: median time of one loss and gradient.
    """

    estimator: str
    value: float
    standard_error: float
    gradient_std: float
    milliseconds: float


@dataclass(frozen=True, repr=False)
class ElboTable(Sequence[ElboRow]):
    """Rows of `compare_elbos`; prints as a table."""

    rows: tuple[ElboRow, ...]

    def __getitem__(self, i: Any) -> Any:
        return self.rows[i]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ElboRow]:
        return iter(self.rows)

    def __repr__(self) -> str:
        width = max([len("estimator"), *(len(row.estimator) for row in self.rows)])
        lines = [f"{'estimator':<{width}}  {'nats/datum':>11} ± {'s.e.':<8}  {'gradient sd':>11}  {'ms/step':>8}"]
        lines += [
            f"{row.estimator:<{width}}  {row.value:>11.4f} ± {row.standard_error:<8.4f}  {row.gradient_std:>11.4g}  "
            f"{row.milliseconds:>8.2f}"
            for row in self.rows
        ]
        return "\n".join(lines)


def compare_elbos(
    program: Any,
    x: Any,
    elbos: Sequence[ELBO | type[ELBO]],
    *,
    num_draws: int = 100,
    seed: int | None = None,
) -> ElboTable:
    r"""Measure estimators on one program at its present parameters, on all rows of ``x``.

    .. math:: \text{gradient sd} = \sqrt{\textstyle\sum_j \operatorname{Var} \big[\partial_j \hat L / n\big]}

    Args:
        program: a `Fit`, or anything that `fit` takes with a guide.
        x: data as for `fit`.
        elbos: the estimators, instances or classes.
        num_draws: evaluations of each.
        seed: every estimator starts from it, so that equal estimators give equal numbers.

    Returns:
        An `ElboTable`: value ± standard error (nats per datum), gradient standard deviation, milliseconds per step.

    Raises:
        ProgramError: if an estimator does not suit the program.
        TypeError: if one of ``elbos`` is not a Pyro ELBO.
        ValueError: if ``num_draws < 2``: a spread needs two.

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> table = lvm.compare_elbos(lvm.PPCA(3, 1), x, [Trace_ELBO(), TraceMeanField_ELBO()], num_draws=10, seed=0)
        >>> [row.estimator for row in table]
        ['Trace_ELBO()', 'TraceMeanField_ELBO()']
    """
    if num_draws < 2:
        raise ValueError(f"num_draws is {num_draws}: a standard error needs at least 2")
    evaluation = Evaluation.of(program, x)
    seed = fresh_seed() if seed is None else seed
    return ElboTable(tuple(_measure(evaluation, elbo, num_draws, seed) for elbo in elbos))


def _measure(evaluation: Evaluation, elbo: ELBO | type[ELBO], num_draws: int, seed: int) -> ElboRow:
    bound, size = evaluation.bound, len(evaluation.rows)
    with evaluation.running(seed):
        batch, structure = evaluation.whole()
        estimator = make_estimator(elbo, structure)
        check_pair(bound, structure, estimator, batch)
        parameters = list(bound.trainable().values())
        kept = [parameter.grad for parameter in parameters]
        spread = _Spread(sum(parameter.numel() for parameter in parameters))
        losses, seconds = [], []
        try:
            for _ in range(num_draws):
                for parameter in parameters:
                    parameter.grad = None
                started = time.perf_counter()
                loss, _ = estimator.step(bound, batch, parameters, None, size)
                seconds.append(time.perf_counter() - started)
                losses.append(loss.double())
                spread.add(parameters)
        finally:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient
    values = -torch.stack(losses) / size
    return ElboRow(
        repr(estimator),
        values.mean().item(),
        values.std().item() / math.sqrt(num_draws),
        spread.result(),
        1e3 * sorted(seconds)[num_draws // 2],
    )


class _Spread:
    """Running variance of a gradient's entries (Welford's updates: the draws themselves would not fit)."""

    def __init__(self, entries: int) -> None:
        self.mean = torch.zeros(entries, dtype=torch.float64)
        self.squares = torch.zeros(entries, dtype=torch.float64)
        self.count = 0

    def add(self, parameters: list[nn.Parameter]) -> None:
        self.count += 1
        start = 0
        for parameter in parameters:
            part = slice(start, start := start + parameter.numel())
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            entries = gradient.detach().flatten().double().cpu()
            shift = entries - self.mean[part]
            self.mean[part] += shift / self.count
            self.squares[part] += shift * (entries - self.mean[part])

    def result(self) -> float:
        return math.sqrt(self.squares.sum().item() / (self.count - 1))

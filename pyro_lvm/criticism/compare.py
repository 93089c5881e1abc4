"""Estimators side by side: value, noise of the gradient, and cost, at fixed parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyro.infer import ELBO

from pyro_lvm.criticism.gradient_meter import Measurement, measure
from pyro_lvm.criticism.row_table import RowTable
from pyro_lvm.evaluation import Evaluation, fresh_seed

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
class ElboTable(RowTable[ElboRow]):
    """Rows of `compare_elbos`; prints as a table."""

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

    Schedules stand where training ends. `gradient_report` tells the groups of parameters apart.

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
    return ElboTable(tuple(_row(measure(evaluation, elbo, num_draws, seed)) for elbo in elbos))


def _row(found: Measurement) -> ElboRow:
    values = -found.losses
    return ElboRow(
        found.estimator,
        values.mean().item(),
        values.std().item() / math.sqrt(len(values)),
        math.sqrt(sum(variance.sum().item() for variance in found.variance.values())),
        found.milliseconds,
    )

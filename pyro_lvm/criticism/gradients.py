r"""How noisy an estimator's gradient is, parameter by parameter, and what it costs to quieten it.

.. math:: \bar g = E[\hat g], \qquad V = \sum_j \operatorname{Var}[\hat g_j], \qquad
          \mathrm{SNR} = \lVert \bar g \rVert / \sqrt{V}, \qquad \text{cost} = t \, V

The mean of m gradients has the variance V / m and takes the time m t, so that t V is the time in which an estimator
reaches the variance one: of two estimators of one gradient the one with the smaller t V is the better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pyro.infer import ELBO
from torch import Tensor

from pyro_lvm.criticism.gradient_meter import Measurement, measure
from pyro_lvm.criticism.row_table import RowTable
from pyro_lvm.evaluation import Evaluation, batch_to_trace, fresh_seed
from pyro_lvm.owners import owners_of

__all__ = ["GradientReport", "GradientRow", "gradient_report"]

Grouping = Literal["owner", "parameter", "all"]


@dataclass(frozen=True)
class GradientRow:
    r"""One estimator's gradient with respect to one group of parameters.

    Attributes:
        estimator: its name and options.
        group: the group's name.
        entries: numbers in the group.
        mean: Euclidean norm of the mean gradient of the loss per datum, nats per datum and unit of the parameters.
        variance: V, summed over the group's entries, of one gradient.
        signal_to_noise: the norm of the mean over the root of V, with the noise's own share (V over the number of
            draws) taken off the squared norm, not below nought; infinite without noise, nought without a gradient.
        milliseconds: median time of one loss and gradient, of all parameters together.
        cost: milliseconds times variance.
    """

    estimator: str
    group: str
    entries: int
    mean: float
    variance: float
    signal_to_noise: float
    milliseconds: float
    cost: float


@dataclass(frozen=True, repr=False)
class GradientReport(RowTable[GradientRow]):
    """Rows of `gradient_report`, estimator by estimator; prints as a table.

    Attributes:
        rows: one for each estimator and group.
        means: by position of the estimator, then by parameter, the mean gradient; the parameter's unconstrained shape.
        variances: the same, of each entry.
        num_draws: gradients that each was computed from.
    """

    means: tuple[Mapping[str, Tensor], ...] = field(compare=False)
    variances: tuple[Mapping[str, Tensor], ...] = field(compare=False)
    num_draws: int

    def __repr__(self) -> str:
        names = max(9, *(len(row.estimator) for row in self.rows)) if self.rows else 9
        groups = max(5, *(len(row.group) for row in self.rows)) if self.rows else 5
        lines = [
            f"{'estimator':<{names}}  {'group':<{groups}}  {'entries':>7}  {'|mean|':>10}  {'variance':>10}  "
            f"{'SNR':>8}  {'ms/step':>8}  {'ms x var':>10}"
        ]
        lines += [
            f"{row.estimator:<{names}}  {row.group:<{groups}}  {row.entries:>7}  {row.mean:>10.4g}  "
            f"{row.variance:>10.4g}  {row.signal_to_noise:>8.3g}  {row.milliseconds:>8.2f}  {row.cost:>10.4g}"
            for row in self.rows
        ]
        return "\n".join(lines)


def gradient_report(
    program: Any,
    x: Any,
    elbos: Sequence[ELBO | type[ELBO]],
    *,
    num_draws: int = 100,
    seed: int | None = None,
    groups: Grouping | Callable[[str], str] = "owner",
) -> GradientReport:
    r"""Mean, variance and signal-to-noise of estimators' gradients at fixed parameters, on all rows of ``x``.

    .. math:: \mathrm{SNR} = \frac{\lVert E \hat g \rVert}{\sqrt{\sum_j \operatorname{Var} \hat g_j}}, \qquad
              \hat g = \frac1n \nabla \hat L

    The gradient is that of the loss per datum, with respect to unconstrained parameters. Schedules stand where
    training ends; what an estimator learns by itself (a baseline) it first learns during ``num_draws`` evaluations
    that are not counted. A program's auxiliary loss is left out.

    Args:
        program: a `Fit`, or anything that `fit` takes with a guide.
        x: data as for `fit`.
        elbos: the estimators, instances or classes.
        num_draws: gradients of each.
        seed: every estimator starts from it, so that equal estimators give equal numbers.
        groups: "owner" for theta (what the model depends on) and phi (the guide's own), "parameter" for each by its
            name, "all" for one group, or a function from a parameter's name to its group's.

    Returns:
        A `GradientReport`. A variance is known to about :math:`\sqrt{2 / \text{num\_draws}}` of itself, or worse where
        the gradient has heavy tails.

    Raises:
        ProgramError: if an estimator does not suit the program.
        TypeError: if one of ``elbos`` is not a Pyro ELBO.
        ValueError: if ``num_draws < 2``, or ``groups`` is not known.

    When it is wrong: noise differs from place to place. At the start of training and at its end the order of two
    estimators may be another: measure where it matters. Estimators of different bounds (more particles inside the
    logarithm) have different means, and less variance may come with less signal: compare their SNR then (Rainforth et
    al., 2018, https://arxiv.org/abs/1802.04537).

    Example:
        >>> import torch, pyro_lvm as lvm
        >>> from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> elbos = [Trace_ELBO(), TraceMeanField_ELBO()]
        >>> report = lvm.gradient_report(lvm.PPCA(3, 1), x, elbos, num_draws=10, seed=0)
        >>> [(row.estimator, row.group) for row in report[:3]]
        [('Trace_ELBO()', 'theta'), ('Trace_ELBO()', 'phi'), ('TraceMeanField_ELBO()', 'theta')]
    """
    if num_draws < 2:
        raise ValueError(f"num_draws is {num_draws}: a variance needs at least 2")
    if not callable(groups) and groups not in get_args(Grouping):
        known = ", ".join(map(repr, get_args(Grouping)))
        raise ValueError(f"groups={groups!r} is not known: use {known} or a function")
    evaluation = Evaluation.of(program, x)
    seed = fresh_seed() if seed is None else seed
    of_group = _groups(evaluation, groups)
    found = [measure(evaluation, elbo, num_draws, seed) for elbo in elbos]
    rows = [_row(m, name, members, num_draws) for m in found for name, members in of_group.items()]
    return GradientReport(tuple(rows), tuple(m.mean for m in found), tuple(m.variance for m in found), num_draws)


def _groups(evaluation: Evaluation, groups: Grouping | Callable[[str], str]) -> dict[str, list[str]]:
    """Parameters by group."""
    names = list(evaluation.bound.trainable())
    if groups == "owner":
        bound = evaluation.bound
        with evaluation.running(0):
            batch = evaluation.rows.first(batch_to_trace(bound.program, evaluation.rows))
            owners = owners_of(bound, batch)
        known = {"theta": list(owners.theta), "phi": list(owners.phi)}
        known["neither"] = [name for name in names if name not in {*owners.theta, *owners.phi}]
        return {group: members for group, members in known.items() if members}
    found: dict[str, list[str]] = {}
    for name in names:
        group = groups(name) if callable(groups) else name if groups == "parameter" else "all"
        found.setdefault(group, []).append(name)
    return found


def _row(found: Measurement, group: str, members: Sequence[str], num_draws: int) -> GradientRow:
    square = sum(found.mean[name].square().sum().item() for name in members)
    variance = sum(found.variance[name].sum().item() for name in members)
    signal = math.sqrt(max(square - variance / num_draws, 0.0))
    return GradientRow(
        found.estimator,
        group,
        sum(found.mean[name].numel() for name in members),
        math.sqrt(square),
        variance,
        signal / math.sqrt(variance) if variance > 0 else math.inf if signal > 0 else 0.0,
        found.milliseconds,
        found.milliseconds * variance,
    )

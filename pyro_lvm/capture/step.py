"""One step of training as a function: loss, parts of the bound, and gradients in the parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lvm.capture.hardware import multiplied_in
from pyro_lvm.data import Batch
from pyro_lvm.elbo.estimator import Estimator
from pyro_lvm.elbo.terms import Terms
from pyro_lvm.parameters import BoundProgram

__all__ = ["Column", "LookAtBound", "Step", "StepResult", "told"]

Column = tuple[str, str]
"""A number of every step: ("loss", ""), ("reconstruction", site), ("kl", site) or ("auxiliary_loss", "").

An evaluation has the one number ("elbo", "").
"""


@dataclass(frozen=True)
class StepResult:
    """What a step tells.

    Attributes:
        columns: names of the numbers.
        values: the numbers, shape (len(columns),), float64: losses and parts of the bound in nats of the whole data
            set, the auxiliary loss in nats per datum.
    """

    columns: tuple[Column, ...]
    values: Tensor


@dataclass(frozen=True)
class Step:
    """A step as Pyro takes it. Calling it leaves gradients of the loss per datum in the parameters.

    Attributes:
        bound: the program and its parameters.
        estimator: the estimator.
        auxiliary_loss: a further loss, nats per datum, or None.
        parameters: what is trained.
        size: rows in the whole data set.
        autocast: the dtype in which matrices are multiplied, or None.
    """

    bound: BoundProgram
    estimator: Estimator
    auxiliary_loss: Callable[..., Tensor] | None
    parameters: list[nn.Parameter]
    size: int
    autocast: torch.dtype | None = None

    def __call__(self, batch: Batch) -> StepResult:
        """Take the step on ``batch``."""
        for parameter in self.parameters:
            parameter.grad = None
        with multiplied_in(self.autocast, self.parameters[0].device):
            auxiliary = None if self.auxiliary_loss is None else self.auxiliary_loss(*batch.args, **batch.named())
            loss, terms = self.estimator.step(self.bound, batch, self.parameters, auxiliary, self.size)
        return told(loss, terms, auxiliary)


@dataclass(frozen=True)
class LookAtBound(Step):
    """An evaluation as Pyro makes it: the plain bound on a batch, nats of the whole data set, and no gradients."""

    def __call__(self, batch: Batch) -> StepResult:
        """Evaluate on ``batch``; the number keeps the dtype that it was summed in."""
        elbo = self.estimator.evaluate_terms(self.bound, batch).elbo
        return StepResult((("elbo", ""),), elbo.reshape(1))


def told(loss: Tensor, terms: Terms, auxiliary: Tensor | None) -> StepResult:
    """The numbers of a step, side by side."""
    named: dict[Column, Any] = {("loss", ""): loss}
    named |= {("reconstruction", site): value for site, value in terms.reconstruction.items()}
    named |= {("kl", site): value for site, value in terms.kl.items()}
    if auxiliary is not None:
        named["auxiliary_loss", ""] = auxiliary.detach()
    values = torch.stack([value.detach().double().reshape(()) for value in named.values()])
    return StepResult(tuple(named), values)

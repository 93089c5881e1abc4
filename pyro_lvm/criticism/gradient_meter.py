"""One estimator's losses, gradients and time at fixed parameters; what `compare_elbos` and `gradient_report` read."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_lvm.data import Batch
from pyro_lvm.elbo.estimator import Estimator, make_estimator
from pyro_lvm.elbo.objective import Objective
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.preflight.pair import check_pair

__all__ = ["Measurement", "measure"]

BASELINE_RATE = 1e-2
"""Adam's rate for what an estimator learns by itself."""


@dataclass(frozen=True)
class Measurement:
    """What ``num_draws`` evaluations of one estimator gave.

    Attributes:
        estimator: its name and options.
        losses: shape (num_draws,), float64, nats per datum.
        mean: by parameter, the mean gradient of the loss per datum; the parameter's (unconstrained) shape.
        variance: by parameter, the variance of each entry of one gradient, without bias.
        milliseconds: median time of one loss and gradient.
    """

    estimator: str
    losses: Tensor
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    milliseconds: float


def measure(evaluation: Evaluation, elbo: ELBO | type[ELBO], num_draws: int, seed: int) -> Measurement:
    """Evaluate ``elbo`` and its gradient on all rows, with its schedules where training ends.

    An estimator that learns something of its own (a baseline) first learns it during as many evaluations, on a copy.
    """
    bound, size = evaluation.bound, len(evaluation.rows)
    with evaluation.running(seed):
        batch, structure = evaluation.whole()
        if isinstance(elbo, Objective) and elbo.modules():
            elbo = copy.deepcopy(elbo)  # what it learns here is not for the fits to come
        estimator = make_estimator(elbo, structure)
        for module in estimator.modules:
            module.to(device=evaluation.rows.device, dtype=evaluation.rows.dtype)
        check_pair(bound, structure, estimator, batch)
        estimator.advance(1.0)
        trainable = bound.trainable()
        parameters = list(trainable.values())
        kept = [parameter.grad for parameter in parameters]
        spread = {name: _Spread(parameter) for name, parameter in trainable.items()}
        losses, seconds = [], []
        try:
            _learn(estimator, bound, batch, num_draws, seed)
            for _ in range(num_draws):
                _forget(parameters)
                started = _now()
                loss, _ = estimator.step(bound, batch, parameters, None, size)
                seconds.append(_now() - started)
                losses.append(loss.double().cpu())
                for name, parameter in trainable.items():
                    spread[name].add(parameter)
        finally:
            for parameter, gradient in zip(parameters, kept, strict=True):
                parameter.grad = gradient
    return Measurement(
        repr(estimator),
        torch.stack(losses) / size,
        {name: found.mean for name, found in spread.items()},
        {name: found.squares / (num_draws - 1) for name, found in spread.items()},
        1e3 * sorted(seconds)[num_draws // 2],
    )


def _learn(estimator: Estimator, bound: BoundProgram, batch: Batch, steps: int, seed: int) -> None:
    """Let the estimator learn what it learns by itself (a baseline), with noise of its own."""
    own = [parameter for module in estimator.modules for parameter in module.parameters()]
    if not own:
        return
    optimizer = torch.optim.Adam(own, BASELINE_RATE)
    parameters = list(bound.trainable().values())
    with isolated(seed, validate=False):
        for _ in range(steps):
            _forget(parameters)
            optimizer.zero_grad()
            estimator.step(bound, batch, parameters, None, len(batch))
            optimizer.step()


def _forget(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _now() -> float:
    """The time, once an accelerator has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class _Spread:
    """Running mean and variance of a gradient's entries (Welford's updates: the draws themselves would not fit)."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.mean = torch.zeros(parameter.shape, dtype=torch.float64)
        self.squares = torch.zeros(parameter.shape, dtype=torch.float64)
        self.count = 0

    def add(self, parameter: nn.Parameter) -> None:
        self.count += 1
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        entries = gradient.detach().double().cpu()
        shift = entries - self.mean
        self.mean += shift / self.count
        self.squares += shift * (entries - self.mean)

"""One torch optimiser over all parameters, and its schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch
from pyro.optim import PyroOptim
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from pyro_lvm.inference.adam import FusedAdam

__all__ = ["make_optimizer"]

PEAK_RATE = 1e-2
"""Peak of the default one-cycle schedule; 1e-3 does not arrive within the steps that small programs need."""

PEAK_RATE_OF_NETWORKS = 2e-3
"""The same where the program holds a neural network."""

_PYRO = (
    "optimizer is one of pyro.optim, which keep one optimiser for each parameter: pass the class of torch.optim that "
    "it stands for (and lr=...)"
)


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    optimizer: Callable[..., Optimizer] | None,
    scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None,
    lr: float | None,
    total_steps: int,
    has_network: bool,
) -> tuple[Optimizer, LRScheduler | ReduceLROnPlateau | None, str]:
    """The optimiser, its schedule and a description of both.

    Args:
        parameters: what is trained.
        optimizer: a torch optimiser class or factory, called with the parameters (and ``lr`` if that is given).
        scheduler: a factory called with the optimiser; it is stepped after each step, a plateau after each epoch with
            minus the validation ELBO (or the training ELBO), nats per datum; plus, where its mode is "max".
        lr: the rate; alone it means Adam at that constant rate.
        total_steps: the length of the default one-cycle schedule.
        has_network: whether the default peak is the smaller one.

    Raises:
        TypeError: if ``optimizer`` or ``scheduler`` is no factory, or is one of Pyro's.
        ValueError: if ``lr`` is not positive.
    """
    parameters = list(parameters)
    if lr is not None and not lr > 0:
        raise ValueError(f"lr is {lr}: the rate must be positive")
    of_pyro = not inspect.isclass(optimizer) and getattr(optimizer, "__module__", "").startswith("pyro.optim")
    if isinstance(optimizer, PyroOptim) or of_pyro:
        raise TypeError(_PYRO)
    if optimizer is not None and not callable(optimizer):
        raise TypeError(
            "optimizer must be a class or factory that takes the parameters, such as torch.optim.SGD or "
            f"lambda parameters: torch.optim.SGD(parameters, lr=0.1); got {optimizer!r}"
        )
    if scheduler is not None and not callable(scheduler):
        raise TypeError(f"scheduler must be a factory that takes the optimiser; got {scheduler!r}")
    if optimizer is None:
        rate = lr or (PEAK_RATE_OF_NETWORKS if has_network else PEAK_RATE)
        chosen: Optimizer = FusedAdam(parameters, rate) if _can_fuse(parameters) else torch.optim.Adam(parameters, rate)
    else:
        chosen = optimizer(parameters) if lr is None else optimizer(parameters, lr=lr)
        if not isinstance(chosen, Optimizer):
            raise TypeError(f"optimizer must make a torch.optim.Optimizer; it made {chosen!r}")
        if inspect.signature(chosen.step).parameters["closure"].default is inspect.Parameter.empty:
            raise TypeError(
                f"{type(chosen).__name__} evaluates the loss several times a step, which fit does not: choose an "
                "optimiser of first order such as torch.optim.Adam"
            )
    name = "Adam" if optimizer is None else type(chosen).__name__
    described = f"{name}(lr={chosen.param_groups[0]['lr']:g})"
    if scheduler is not None:
        schedule = scheduler(chosen)
        if not isinstance(schedule, LRScheduler | ReduceLROnPlateau):
            raise TypeError(
                "scheduler must make a torch.optim.lr_scheduler, such as lambda optimizer: StepLR(optimizer, 100); "
                f"it made {schedule!r}"
            )
        return chosen, schedule, f"{described}, {type(schedule).__name__}"
    if optimizer is None and lr is None:
        one_cycle = OneCycleLR(chosen, max_lr=chosen.param_groups[0]["lr"], total_steps=max(total_steps, 2))
        return chosen, one_cycle, f"{described}, OneCycleLR over {total_steps} steps"
    return chosen, None, f"{described}, constant"


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
    device, dtype = next(iter(kinds))
    return len(kinds) == 1 and device.type in ("cpu", "cuda") and dtype.is_floating_point


def plateau_step(schedule: ReduceLROnPlateau, elbo: float) -> None:
    """Tell a plateau schedule the bound (nats per datum) in the direction that it watches."""
    schedule.step(elbo if schedule.mode == "max" else -elbo)

r"""Values that change during training, as functions of how far it is: 0 at the first step, 1 at the last.

.. math:: \text{linear}(t) = a + (b - a) \min(t / u, 1), \qquad
          \text{exponential}(t) = a\,(b / a)^{\min(t / u, 1)}

Any function of one number in [0, 1] is a schedule. Those made here cannot fail to arrive: what they take to rise is a
fraction of training, not a count of steps or epochs that a shorter run would never reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lvm.errors import ProgramError

__all__ = ["Schedule", "Scheduled", "cyclic", "exponential", "linear"]

POINTS = 1000
"""In so many steps from the end of training to its beginning is looked where a schedule last moved."""

Schedule = Callable[[float], float]
"""A value from the fraction of training that is done."""


def linear(start: float, end: float, until: float = 1.0) -> Schedule:
    r"""From ``start`` to ``end`` in a straight line, there from the fraction ``until`` of training on.

    .. math:: a + (b - a) \min(t / u, 1)

    Args:
        start: a, at the first step.
        end: b.
        until: u, a fraction of training above 0, at most 1.

    Raises:
        ValueError: if ``until`` is not in (0, 1]: the schedule would never arrive.

    Example:
        >>> import pyro_lvm as lvm
        >>> warm_up = lvm.schedules.linear(0.0, 1.0, until=0.5)
        >>> warm_up(0.0), warm_up(0.25), warm_up(1.0)
        (0.0, 0.5, 1.0)
    """
    _require_arrival(until)
    return _Shown(
        lambda progress: start + (end - start) * min(progress / until, 1.0),
        f"linear({start:g}, {end:g}, until={until:g})",
    )


def exponential(start: float, end: float, until: float = 1.0) -> Schedule:
    r"""From ``start`` to ``end`` by a constant factor, there from the fraction ``until`` of training on.

    .. math:: a\,(b / a)^{\min(t / u, 1)}

    Args:
        start: a, positive, at the first step.
        end: b, positive.
        until: u, a fraction of training above 0, at most 1.

    Raises:
        ValueError: if ``until`` is not in (0, 1], or one end is not positive.

    Example:
        >>> import pyro_lvm as lvm
        >>> cooling = lvm.schedules.exponential(1.0, 0.25)
        >>> cooling(0.0), cooling(0.5), cooling(1.0)
        (1.0, 0.5, 0.25)
    """
    _require_arrival(until)
    if not (start > 0 and end > 0):
        raise ValueError(f"an exponential schedule from {start} to {end} has no constant factor: both must be positive")
    return _Shown(
        lambda progress: float(start * (end / start) ** min(progress / until, 1.0)),
        f"exponential({start:g}, {end:g}, until={until:g})",
    )


def cyclic(start: float, end: float, cycles: int = 4, rising: float = 0.5) -> Schedule:
    r"""From ``start`` to ``end`` again and again: each cycle rises in a straight line, then stays.

    (Fu et al., 2019, https://arxiv.org/abs/1903.10145.) Training ends at ``end``.

    Args:
        start: at the beginning of each cycle.
        end: where each cycle stays.
        cycles: how many.
        rising: the fraction of a cycle that rises, above 0 and at most 1.

    Raises:
        ValueError: if ``rising`` is not in (0, 1], or ``cycles`` is below 1.

    Example:
        >>> import pyro_lvm as lvm
        >>> kl_weight = lvm.schedules.cyclic(0.0, 1.0, cycles=2)
        >>> [kl_weight(t) for t in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.5, 1.0, 0.0, 1.0, 1.0]
    """
    _require_arrival(rising, "rising")
    if cycles < 1:
        raise ValueError(f"cycles is {cycles}: it must be at least 1")
    rise = linear(start, end, rising)
    return _Shown(
        lambda progress: end if progress >= 1.0 else rise(math.modf(progress * cycles)[0]),
        f"cyclic({start:g}, {end:g}, cycles={cycles}, rising={rising:g})",
    )


@dataclass(frozen=True, repr=False)
class _Shown:
    """A schedule that says what it is."""

    function: Schedule
    text: str

    def __call__(self, progress: float) -> float:
        return self.function(progress)

    def __repr__(self) -> str:
        return self.text


def _require_arrival(until: float, name: str = "until") -> None:
    if not 0.0 < until <= 1.0:
        raise ValueError(
            f"{name} is {until}: it is the fraction at which the schedule arrives, above 0 and at most 1; beyond it, "
            f"it would never arrive: for example {name}=0.5"
        )


class Scheduled:
    """A number, or a schedule with its present value in a tensor that captured graphs read.

    Args:
        value: the number, or a function of the fraction of training.
        name: what it is called in errors, such as "beta".
        valid: whether a value makes sense.
        rule: the same in words, such as "0 or more".

    Raises:
        TypeError: if ``value`` is neither a number nor a function.
        ValueError: if the number, or the schedule at its beginning, middle or end, is not valid.
    """

    def __init__(self, value: float | Schedule, name: str, valid: Callable[[float], bool], rule: str) -> None:
        if not callable(value) and not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r}: it must be a number, or a function of the fraction of training")
        self.value, self.name, self._valid, self._rule = value, name, valid, rule
        for progress in (0.0, 0.5, 1.0) if callable(value) else (0.0,):
            self._at(progress)
        # the tensor is an input of captured graphs, so that no value is baked in; of no dims, it promotes nothing
        self.tensor = torch.full((), math.nan if callable(value) else float(value), dtype=torch.float64)

    def __repr__(self) -> str:
        if not callable(self.value):
            return f"{self.value:g}"
        return repr(self.value) if isinstance(self.value, _Shown) else getattr(self.value, "__name__", "schedule")

    def fresh(self) -> Scheduled:
        """The same with a tensor of its own."""
        return Scheduled(self.value, self.name, self._valid, self._rule)

    def advance(self, progress: float) -> None:
        """Take the value at ``progress``, between 0 and 1."""
        if callable(self.value):
            self.tensor.fill_(self._at(progress))

    def arrival(self) -> float:
        """The fraction of training from which on the value is what it is at the end; 0 for a number."""
        if not callable(self.value):
            return 0.0
        moving = (point for point in range(POINTS, -1, -1) if self._at(point / POINTS) != self._at(1.0))
        return (next(moving, -1) + 1) / POINTS

    def now(self) -> Tensor:
        """The present value, shape ().

        Raises:
            ProgramError: if it is a schedule that was never told how far training is.
        """
        if callable(self.value) and self.tensor._version == 0:
            raise ProgramError(
                f"{self.name} is a schedule over the fraction of training, and nobody said how far training is: "
                "lvm.fit does; around pyro.infer.SVI call elbo.advance(step / total_steps) before every step"
            )
        return self.tensor

    def _at(self, progress: float) -> float:
        value = float(self.value(progress) if callable(self.value) else self.value)
        if not (math.isfinite(value) and self._valid(value)):
            where = f" at {progress:g} of training" if callable(self.value) else ""
            raise ValueError(f"{self.name} is {value:g}{where}: it must be {self._rule}")
        return value

r"""Variational EM: the parameters of guide and model in turn.

.. math::
    \text{E: } \phi \leftarrow \phi + \eta \, \partial_\phi \mathcal{L}(\theta, \phi), \qquad
    \text{M: } \theta \leftarrow \theta + \eta \, \partial_\theta \mathcal{L}(\theta, \phi)

Both climb the one bound :math:`\mathcal{L}`, so that it rises over each turn. With phi at its maximum before each
M-step this is EM: Neal and Hinton (1998), https://doi.org/10.1007/978-94-011-5014-9_12.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_lvm.capture.step import StepResult
from pyro_lvm.data import Batch
from pyro_lvm.errors import ProgramError
from pyro_lvm.inference.prepare import Prepared
from pyro_lvm.owners import Owners, owners_of
from pyro_lvm.parameters import BoundProgram

__all__ = ["Alternate", "Alternation", "alternation", "require_alternate"]

Alternate = tuple[int, int] | Literal["until-converged"]
"""Steps of phi and of theta in a cycle, or a word."""

WINDOW = 20
"""Steps whose mean loss is compared with that of as many before: enough to average the noise, and to estimate it."""

TOLERANCE = 1e-4
"""Nats per datum that a window must gain for a turn to go on; a hundredth of what ``fit.elbo`` is known to."""

STANDARD_ERRORS = 2.0
"""What a window gains counts from so many standard errors on. To end a turn too soon costs nothing: it comes again."""

LONGEST_TURN = 200
"""Steps of one turn at most: the other parameters' optimum has moved by then, and to follow this one is wasted."""

NOTHING_TO_TRAIN = "E-step exact: nothing in the guide to train"
SOLVED = "E-step exact: the program's solve_guide()"
BY_GRADIENT = "E-step by gradient"


def require_alternate(alternate: Any) -> Alternate | None:
    """``alternate`` as `fit` takes it, or words on what is wrong with it.

    Raises:
        TypeError: if it is neither None, a pair of whole numbers nor a word.
        ValueError: if a number is not positive, there are not two, or the word is not known.
    """
    if alternate is None:
        return None
    if isinstance(alternate, str):
        if alternate == "until-converged":
            return "until-converged"
        raise ValueError(f"alternate={alternate!r} is not known: use 'until-converged' or (phi_steps, theta_steps)")
    if not isinstance(alternate, Sequence):
        raise TypeError(
            f"alternate is {alternate!r}: it must be a pair (phi_steps, theta_steps) such as (5, 1), or "
            "'until-converged'"
        )
    if len(alternate) != 2:
        raise ValueError(f"alternate has {len(alternate)} entries: it must be a pair (phi_steps, theta_steps)")
    counts = []
    for name, count in zip(("phi_steps", "theta_steps"), alternate, strict=True):
        try:
            counts.append(operator.index(count))
        except TypeError:
            raise TypeError(f"{name} of alternate is {count!r}: it must be a whole number") from None
        if counts[-1] < 1:
            raise ValueError(f"{name} of alternate is {count}: each turn takes at least 1 step")
    return counts[0], counts[1]


class Alternation:
    """Whose turn it is.

    Args:
        schedule: steps of phi and of theta in a cycle, or "until-converged".
        bound: the program; its parameters are told apart by ``owners``.
        owners: which are whose.
        size: rows of the whole data set.
        solve: puts the guide at its optimum in place of steps of phi, or None.
    """

    def __init__(
        self,
        schedule: Alternate,
        bound: BoundProgram,
        owners: Owners,
        size: int,
        solve: Callable[[], Any] | None = None,
    ) -> None:
        self.schedule, self.owners, self.solve, self.size = schedule, owners, solve, size
        theta = set(owners.theta)
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in bound.trainable().items():
            groups[name in theta].append(parameter)
        self._theta, self._others = groups[True], groups[False]
        self._is_theta = not owners.phi
        self._taken = 0
        self._losses: list[Tensor] = []
        self._window: tuple[float, float] | None = None

    @property
    def e_step(self) -> str:
        """How the E-step is done, in words."""
        if self.solve is not None:
            return SOLVED
        return BY_GRADIENT if self.owners.phi else NOTHING_TO_TRAIN

    @property
    def described(self) -> dict[str, Any]:
        """What ``fit.info`` says."""
        return {
            "schedule": self.schedule,
            "e_step": self.e_step,
            "phi": list(self.owners.phi),
            "theta": list(self.owners.theta),
        }

    def begin_step(self) -> None:
        """Before the gradients of a step: the exact E-step, where there is one and it is its turn."""
        if self.solve is not None and not self._is_theta:
            self.solve()
            self._pass_on()

    def hold(self) -> None:
        """Take the gradients from the parameters whose turn it is not; the optimiser then leaves them alone."""
        if not self.owners.phi:
            return
        for parameter in self._others if self._is_theta else self._theta:
            parameter.grad = None

    def end_step(self, result: StepResult) -> None:
        """Count the step, and pass the turn on where it is over."""
        self._taken += 1
        if self._over(result) and self.owners.phi:
            self._pass_on()

    def finish(self) -> None:
        """After the last step: an exact E-step, so that the bound is the one that belongs to the last theta."""
        if self.solve is not None:
            self.solve()

    def state(self) -> dict[str, Any]:
        """Whose turn it is and what it has seen, as plain values and tensors."""
        return {
            "is_theta": self._is_theta,
            "taken": self._taken,
            "losses": self._losses,
            "window": self._window,
        }

    def load_state(self, state: dict[str, Any], device: torch.device | None) -> None:
        """Go on from what `state` gave."""
        self._is_theta, self._taken = state["is_theta"], state["taken"]
        self._losses, self._window = [loss.to(device) for loss in state["losses"]], state["window"]

    def _pass_on(self) -> None:
        self._is_theta = not self._is_theta
        self._taken, self._losses, self._window = 0, [], None

    def _over(self, result: StepResult) -> bool:
        if self.schedule != "until-converged":
            return self._taken >= self.schedule[self._is_theta]
        self._losses.append(_objective(result, self.size))
        if len(self._losses) < WINDOW:
            return False
        losses = torch.stack(self._losses).tolist()
        self._losses = []
        before, self._window = self._window, (statistics.fmean(losses), statistics.variance(losses) / WINDOW)
        if before is None:
            return False
        gained = before[0] - self._window[0]
        error = math.sqrt(before[1] + self._window[1])
        return gained < max(TOLERANCE, STANDARD_ERRORS * error) or self._taken >= LONGEST_TURN


def _objective(result: StepResult, size: int) -> Tensor:
    """What a step minimises, nats per datum."""
    values = dict(zip(result.columns, result.values, strict=True))
    loss: Tensor = values["loss", ""] / size + values.get(("auxiliary_loss", ""), 0.0)
    return loss


def alternation(alternate: Alternate | None, prepared: Prepared, batch: Batch, size: int) -> Alternation | None:
    """The turns that ``alternate`` asks for.

    Raises:
        ProgramError: if the model has nothing to train.
    """
    if alternate is None:
        return None
    bound = prepared.bound
    with bound.holding(None):
        owners = owners_of(bound, batch, prepared.auxiliary_loss)
    if not owners.theta:
        raise ProgramError(
            f"the log joint of {bound.program.name} depends on no trainable parameter, so there is nothing to "
            f"alternate with ({', '.join(owners.phi) or 'nothing'} is the guide's): drop alternate="
        )
    return Alternation(alternate, bound, owners, size, _solver(bound) if owners.phi else None)


def _solver(bound: BoundProgram) -> Callable[[], Any] | None:
    """The program's `solve_guide`, where the guide in use is the one that it sets."""
    hook = bound.program.hook("solve_guide")
    owner = getattr(hook, "__self__", None)
    if owner is None or getattr(bound.program.guide, "__self__", None) is not owner:
        return None
    # a row with values missing has another posterior than the hook, which sees no rows, can know of
    return hook if getattr(bound.program, "missing", None) is None else None

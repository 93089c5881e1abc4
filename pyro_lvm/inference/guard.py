r"""No NaN and no infinity reaches a parameter.

After every step one kernel looks at losses and gradients and leaves a flag on their device. In the mode "raise" the
flag masks the update there and then, and every one after it,

.. math:: \theta \leftarrow \theta - (1 - \text{found}) \, \Delta\theta,

as a gradient scaler does, so that nobody waits for the device; when the flag is read, at the latest after
`STEPS_BETWEEN_READS` steps, parameters and optimiser are where they were before the step that is at fault, which is
replayed through Pyro from its batch and random state to say why. On the CPU, where reading costs nothing, and in the
modes that go on, it is read in every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_lvm.capture.step import Step, StepResult
from pyro_lvm.data import Batch
from pyro_lvm.errors import NonFiniteError
from pyro_lvm.inference.buffers import Buffers, Remembered
from pyro_lvm.inference.iterations import require_counts
from pyro_lvm.inference.nonfinite import why_not_finite
from pyro_lvm.parameters import BoundProgram, Snapshot

__all__ = ["Guard", "OnNonFinite", "require_on_nonfinite"]

OnNonFinite = Literal["raise", "skip", "restore"] | tuple[Literal["restore"], int]
"""What becomes of a step that is not finite."""

RESTORES = 10
"""How often "restore" goes back, where nobody says."""

IN_A_ROW = 20
"""Steps left out one after the other, after which it is no accident."""

STEPS_BETWEEN_READS = {"cpu": 1}
"""By device, steps after which the flag is read; each keeps its batch until then. `OTHERWISE` on other devices."""

OTHERWISE = 50


@dataclass(frozen=True)
class _Kept:
    """A step that may have to be replayed."""

    number: int
    batch: Batch
    generators: tuple[Tensor, list[Tensor]]
    found: Tensor
    buffers: list[Remembered]


class Guard:
    """Masks the update of a step that is not finite, and says what was wrong with it.

    Args:
        step: the step as Pyro takes it, for the replay.
        optimizer: what updates the parameters.
        mode: "raise", "skip" or "restore".
        most: how often "restore" goes back before it raises.
        device: where losses and gradients are.
    """

    def __init__(self, step: Step, optimizer: Optimizer, mode: str, most: int, device: torch.device | None) -> None:
        self.step, self.optimizer, self.mode, self.most = step, optimizer, mode, most
        self.bound: BoundProgram = step.bound
        self.rate, self.restores, self.skipped, self._in_a_row = 1.0, 0, 0, 0
        self._device = device or torch.device("cpu")
        every = STEPS_BETWEEN_READS.get(self._device.type, OTHERWISE)
        # others than fused optimisers know no mask: as a gradient scaler does, the flag is read before their step
        self._masks = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._every = every if mode == "raise" and self._masks else 1
        self._buffers = Buffers(self.bound.modules)
        self._one = torch.ones((), dtype=torch.float32, device=self._device)  # whatever the default dtype is
        self._sticky = torch.zeros_like(self._one)
        self._unset = torch.zeros_like(self._one)  # the flag of every step, where it is read in every step
        self._kept: list[_Kept] = []
        self._good: tuple[Snapshot, dict[str, Any]] | None = None
        if mode == "restore":
            self.all_is_well()

    def take(self, number: int, batch: Batch, step: Callable[[Batch], StepResult]) -> StepResult:
        """Take a step, and remember what it takes to repeat it.

        Raises:
            NonFiniteError: if the step could not be taken because of values that are not finite.
        """
        on_cuda = torch.cuda.get_rng_state_all() if self._device.type == "cuda" else []
        found = torch.zeros_like(self._one) if self._every > 1 else self._unset
        kept = _Kept(number, batch, (torch.get_rng_state(), on_cuda), found, self._buffers.remember())
        self._kept.append(kept)
        try:
            return step(batch)
        except RuntimeError as error:  # a decomposition refuses what the flag would have found
            self._kept.pop()
            self.read()
            reason = why_not_finite(self.step, batch, kept.generators, error)
            if reason is None:
                raise
            _put_back(kept)
            raise NonFiniteError(f"step {number + 1}: {reason}") from error

    def look(self, result: StepResult) -> bool:
        """Look at losses and gradients; whether the update is to be left out, as far as that is known yet.

        Raises:
            NonFiniteError: if the step was not finite and that ends the fit.
        """
        kept = self._kept[-1]
        groups: dict[torch.dtype, list[Tensor]] = {result.values.dtype: [result.values]}
        for parameter in self.step.parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if 0 in gradient.stride():  # a graph may leave one number seen many times, which cannot be written to
                gradient = parameter.grad = gradient.contiguous()
            groups.setdefault(gradient.dtype, []).append(gradient)
        for tensors in groups.values():  # times one: what it is good for here is the flag
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, kept.found, self._one)
        if self._every > 1:
            self._sticky = torch.maximum(self._sticky, kept.found)
        return len(self._kept) >= self._every and self.read()

    def read(self) -> bool:
        """Wait for the device; whether the last step was not finite and the fit goes on without it.

        Raises:
            NonFiniteError: if a step was not finite and that ends the fit; parameters and optimiser are as they were
                before it.
        """
        if not self._kept:
            return False
        steps, self._kept = self._kept, []
        found = torch.stack([kept.found for kept in steps]).tolist() if len(steps) > 1 else [steps[0].found.item()]
        if not any(found):
            self._in_a_row = 0
            return False
        self._unset = torch.zeros_like(self._one)
        first = steps[found.index(max(found))]
        _put_back(first)
        if self.mode == "skip" and self._in_a_row < IN_A_ROW - 1:
            self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
            return True
        if self.goes_back():
            return True
        reason = why_not_finite(self.step, first.batch, first.generators, None)
        before = f" (after {self.restores} restores at lower and lower rates)" if self.restores else ""
        before += f" (the {IN_A_ROW}th in a row)" if self.mode == "skip" else ""
        raise NonFiniteError(f"step {first.number + 1}{before}: {reason}")

    def update(self) -> None:
        """The optimiser's step: at the rate that is left, and masked where the flag has not been read."""
        masked = self._every > 1
        if masked:
            self.optimizer.found_inf = self._sticky  # type: ignore[attr-defined]
        rates = [group["lr"] for group in self.optimizer.param_groups] if self.rate < 1.0 else []
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate * self.rate
        try:
            self.optimizer.step()
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
                group["lr"] = rate
            if masked:
                del self.optimizer.found_inf  # type: ignore[attr-defined]

    def all_is_well(self) -> None:
        """Keep what "restore" goes back to."""
        if self.mode == "restore":
            self._good = self.bound.snapshot(), copy.deepcopy(self.optimizer.state_dict())

    def totals(self) -> dict[str, int]:
        """What the history counts in the modes that go on: steps left out, or restores, which undo many each."""
        return {"skip": {"skipped": self.skipped}, "restore": {"restores": self.restores}}.get(self.mode, {})

    def state(self) -> dict[str, Any]:
        """How far the rate has come down, what was skipped, and what "restore" goes back to."""
        good = None if self._good is None else {"tensors": self._good[0], "optimizer": self._good[1]}
        return {
            "good": good,
            "rate": self.rate,
            "restores": self.restores,
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.rate, self.restores = state["rate"], state["restores"]
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._buffers.start_anew()
        good = state.get("good")
        if good is None:
            self.all_is_well()
        elif self.mode == "restore":
            self._good = good["tensors"], good["optimizer"]

    def goes_back(self) -> bool:
        """In the mode "restore", put the last good state back and halve the rate, unless that was done too often."""
        if self.mode != "restore" or self.restores >= self.most:
            return False
        assert self._good is not None, "there is a good state from the beginning"
        snapshot, optimizer = self._good
        self.bound.load(snapshot)
        self._buffers.start_anew()
        self.optimizer.load_state_dict(copy.deepcopy(optimizer))
        self.rate, self.restores = self.rate / 2, self.restores + 1
        return True


def _put_back(kept: _Kept) -> None:
    """Make the buffers of all modules what they were before a step."""
    for buffer in kept.buffers:
        buffer.put_back()


def require_on_nonfinite(on_nonfinite: Any) -> tuple[str, int]:
    """The mode, and how often it may go back.

    Raises:
        ValueError: if it is not known, or the number is not positive.
        TypeError: if the number is none.
    """
    if on_nonfinite in ("raise", "skip", "restore"):
        return on_nonfinite, RESTORES
    if isinstance(on_nonfinite, tuple) and len(on_nonfinite) == 2 and on_nonfinite[0] == "restore":
        require_counts(**{"the number in on_nonfinite": on_nonfinite[1]})
        return "restore", on_nonfinite[1]
    raise ValueError(f"on_nonfinite={on_nonfinite!r} is not known: use 'raise', 'skip', 'restore', or ('restore', 3)")

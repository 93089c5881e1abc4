"""The SVI loop: steps, epoch after epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_lvm.capture.graph import CapturedStep, Level
from pyro_lvm.capture.guards import numbers_of
from pyro_lvm.capture.special_functions import bring_in_constants
from pyro_lvm.capture.step import Step
from pyro_lvm.data import Rows
from pyro_lvm.errors import NonFiniteError, ProgramError, ProgramWarning
from pyro_lvm.inference.alternate import Alternation
from pyro_lvm.inference.bound import validation_elbo
from pyro_lvm.inference.checkpoint import Checkpoints
from pyro_lvm.inference.early_stopping import EarlyStopping
from pyro_lvm.inference.epochs import Order
from pyro_lvm.inference.generators import generator_state, going_on_from
from pyro_lvm.inference.guard import Guard
from pyro_lvm.inference.history import HistoryRecorder, non_finite
from pyro_lvm.inference.optimisation import plateau_step
from pyro_lvm.inference.prepare import Prepared
from pyro_lvm.inference.progress import EpochEnd, Progress
from pyro_lvm.parameters import isolated
from pyro_lvm.program import restore_mode, training_mode

__all__ = ["Loop", "Watch"]

STEPS_BETWEEN_READOUTS = 50
"""Losses stay on the device for about so many steps; each read-out also keeps the parameters to fall back on."""


@dataclass(frozen=True)
class Watch:
    """Who looks on while the loop runs."""

    callbacks: tuple[Callable[[EpochEnd], Any], ...]
    stopping: EarlyStopping | None
    held_out: Rows | None
    seed: int
    progress: bool | None


class Loop:
    """Steps, epoch after epoch."""

    def __init__(
        self,
        prepared: Prepared,
        order: Order,
        optimizer: Optimizer,
        schedule: LRScheduler | ReduceLROnPlateau | None,
        parameters: list[nn.Parameter],
        grad_clip_norm: float | None,
        total_steps: int,
        level: tuple[Level, str],
        autocast: torch.dtype | None = None,
        alternation: Alternation | None = None,
        on_nonfinite: tuple[str, int] = ("raise", 0),
    ) -> None:
        bring_in_constants()
        self.prepared, self.order, self.alternation = prepared, order, alternation
        step = Step(prepared.bound, prepared.estimator, prepared.auxiliary_loss, parameters, len(order.rows), autocast)
        self.step = CapturedStep(step, *level)
        self.guard = Guard(step, optimizer, *on_nonfinite, order.rows.device)
        self.optimizer, self.schedule, self.parameters = optimizer, schedule, parameters
        self.grad_clip_norm, self.total_steps = grad_clip_norm, total_steps
        self.steps_done = self.epoch = self.batches_done = 0
        self.stopped: str | None = None
        self._generators: dict[str, Any] | None = None
        self.history = HistoryRecorder(len(order.rows))
        self.last_finite = prepared.bound.snapshot()

    def run(self, watch: Watch, checkpoints: Checkpoints | None = None) -> str:
        """Train, from the first step or from where `load_state` has put it; the outcome in words.

        Raises:
            NonFiniteError: if a loss or a parameter became NaN or infinite; the last finite parameters are back.
            ProgramError: if a parameter turned up that the first call did not declare.
            StorageError: if a checkpoint cannot be written, and that was to end the fit.
        """
        before = training_mode(self.prepared.bound.modules, True)
        try:
            with going_on_from(self._generators):
                if self.stopped is None:
                    self.stopped = self._train(watch, checkpoints)
                    if checkpoints is not None:
                        checkpoints.save(self.state())
        except KeyboardInterrupt:
            self.history.abandon_epoch()
            self.read_out()
            if watch.held_out is not None:
                self._validate(watch.held_out, watch.seed)
            return f"interrupted after {self.history.epochs} epochs"
        finally:
            restore_mode(before)
            self.optimizer.zero_grad(set_to_none=True)
        return self.stopped

    def _train(self, watch: Watch, checkpoints: Checkpoints | None) -> str:
        epochs = -(-self.total_steps // self.order.steps_per_epoch)
        every_epoch = bool(watch.stopping or watch.held_out or watch.callbacks) or isinstance(
            self.schedule, ReduceLROnPlateau
        )
        readout = 1 if every_epoch else max(1, STEPS_BETWEEN_READOUTS // self.order.steps_per_epoch)
        with Progress(epochs, watch.progress) as bar:
            while self.epoch < epochs:
                with warnings.catch_warnings():
                    # Pyro warns of each such loss; here the first one read out is an error
                    warnings.filterwarnings("ignore", r"Encountered (NaN|\+?inf)", UserWarning)
                    for epoch in range(self.epoch, min(self.epoch - self.epoch % readout + readout, epochs)):
                        self._epoch(epoch, checkpoints)
                self.read_out()
                stop = self._watched(watch, self.epoch - 1)
                bar.show(self.epoch, self.history.columns)
                if stop:
                    return f"early stopping after {self.epoch} epochs"
        return "finished"

    def _epoch(self, number: int, checkpoints: Checkpoints | None) -> None:
        left = self.total_steps - self.steps_done
        for batch, share in islice(self.order.epoch(number, self.batches_done), left):
            if self.alternation is not None:
                self._exact_e_step(self.alternation)
            self.prepared.estimator.advance(self.steps_done / max(self.total_steps - 1, 1))
            result = self.guard.take(self.steps_done, batch, self.step)
            if self.alternation is not None:
                self.alternation.hold()
            left_out = self.guard.look(result)
            if not left_out:
                if self.grad_clip_norm is not None:
                    clip_grad_norm_(self.parameters, self.grad_clip_norm)
                self.guard.update()
            if self.schedule is not None and not isinstance(self.schedule, ReduceLROnPlateau):
                self.schedule.step()
            self.steps_done += 1
            self.batches_done += 1
            if not left_out:
                self.history.add_step(result, share)
                if self.alternation is not None:
                    self.alternation.end_step(result)
            if checkpoints is not None and checkpoints.due(self.steps_done):
                self.guard.read()
                if self.guard.mode != "restore":  # where it would be another state to go back to
                    self._read_out_parameters()
                checkpoints.save(self.state())
        self.end_epoch()

    def end_epoch(self) -> None:
        """Close the running epoch."""
        self.history.end_epoch(self.guard.totals())
        self.epoch, self.batches_done = self.epoch + 1, 0

    def state(self) -> dict[str, Any]:
        """All that decides how training goes on, as plain values and tensors."""
        return {
            "steps": self.steps_done,
            "epoch": self.epoch,
            "batches": self.batches_done,
            "stopped": self.stopped,
            "tensors": dict(self.prepared.bound.tensors()),
            "estimator": list(self.prepared.estimator.tensors()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "order": self.order.state(),
            "generators": generator_state(),
            "history": self.history.state(),
            "alternation": None if self.alternation is None else self.alternation.state(),
            "level": (self.step.level, self.step.reason),
            "numbers": self._numbers(),
            "guard": self.guard.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, in this or in another process."""
        self.steps_done, self.epoch, self.batches_done = state["steps"], state["epoch"], state["batches"]
        self.stopped, self._generators = state["stopped"], state["generators"]
        device = self.order.rows.device
        self.prepared.bound.load(state["tensors"])
        with torch.no_grad():
            for tensor, value in zip(self.prepared.estimator.tensors(), state["estimator"], strict=True):
                tensor.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.order.load_state(state["order"])
        self.history.load_state(state["history"], device)
        if self.alternation is not None:
            self.alternation.load_state(state["alternation"], device)
        # what was refused once would be refused on other rows or not at all: the level is that of the first step
        self.step.level, self.step.reason = state["level"]
        self.last_finite = self.prepared.bound.snapshot()
        self.guard.load_state(state["guard"])
        numbers = self._numbers()
        for path, value in state["numbers"].items():
            if repr(numbers.get(path)) != repr(value):
                warnings.warn(
                    f"{path} was {value} when the checkpoint was written and is {numbers.get(path)} now: set it before "
                    "the fit, unless the program does not depend on it",
                    ProgramWarning,
                    stacklevel=3,
                )

    def _numbers(self) -> dict[str, float]:
        return numbers_of(self.prepared.bound.program, self.prepared.auxiliary_loss)

    def _exact_e_step(self, alternation: Alternation) -> None:
        self.guard.read()  # it moves parameters past the mask
        try:
            alternation.begin_step()
        except RuntimeError as error:  # a decomposition refuses what the read-out would have found
            wrong = self._not_finite()
            if not wrong:
                raise
            self.prepared.bound.load(self.last_finite)
            raise non_finite(self.history.epochs + 1, f"parameter {', '.join(wrong)}") from error

    def _not_finite(self) -> list[str]:
        """Names of the parameters that are not finite."""
        finite = [(name, torch.isfinite(p).all()) for name, p in self.prepared.bound.trainable().items()]
        if bool(torch.stack([flag for _, flag in finite]).all()):
            return []
        return [name for name, flag in finite if not bool(flag)]

    def read_out(self) -> None:
        """Read the losses; see that all is finite and that nothing is left untrained."""
        self.guard.read()
        try:
            self.history.flush()
        except NonFiniteError:
            self.prepared.bound.load(self.last_finite)
            raise
        self._read_out_parameters()

    def _read_out_parameters(self) -> None:
        """See that all parameters are finite and none is left untrained; keep them to fall back on."""
        bound = self.prepared.bound
        snapshot = bound.snapshot()
        wrong = self._not_finite()
        if wrong and self.guard.goes_back():
            return
        if wrong:  # a finite gradient, times a rate that is too large
            bound.load(self.last_finite)
            raise non_finite(self.history.epochs, f"parameter {', '.join(wrong)}")
        late = [name for name in bound.trainable() if name not in self.last_finite]
        if late:
            raise ProgramError(
                f"parameter {', '.join(late)} turned up after the first step and would never be trained: declare every "
                "parameter in every call of model or guide"
            )
        self.last_finite = snapshot
        self.guard.all_is_well()

    def _watched(self, watch: Watch, epoch: int) -> bool:
        """Validate, tell the callbacks, and say whether to stop; none of it touches the noise of the steps."""
        columns = self.history.columns
        if watch.held_out is not None:
            self._validate(watch.held_out, watch.seed)
        if isinstance(self.schedule, ReduceLROnPlateau):
            plateau_step(self.schedule, columns.get("validation_elbo", columns["elbo"])[-1])
        stop = watch.stopping is not None and watch.stopping.should_stop(
            columns[watch.stopping.monitor][self._epochs_under_way :]
        )
        for callback in watch.callbacks:
            with isolated(None):
                stop = callback(EpochEnd(epoch + 1, columns, self.prepared.bound.program.source)) is True or stop
        if watch.callbacks:
            self.step.program_may_have_changed()
        return stop

    @property
    def _epochs_under_way(self) -> int:
        """Epochs in which the objective still changes: a bound that stands still there may move again."""
        steps = math.ceil(self.prepared.estimator.arrival * (self.total_steps - 1))
        return -(-steps // self.order.steps_per_epoch)

    def _validate(self, held_out: Rows, seed: int) -> None:
        """The validation ELBO of the last epoch, unless it is known."""
        values = self.history.columns.setdefault("validation_elbo", [])
        if len(values) < len(self.history.columns["elbo"]):
            values.append(validation_elbo(self.prepared.bound, self.prepared.structure, held_out, seed))

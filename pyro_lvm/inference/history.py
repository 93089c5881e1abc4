"""What happened in each epoch, gathered on the device and read out now and then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lvm.capture.step import Column, StepResult
from pyro_lvm.errors import NonFiniteError

__all__ = ["HistoryRecorder"]


class HistoryRecorder:
    """Collects losses and terms without asking the device for a number until `flush`.

    `columns` is what users see as ``fit.history``: lists with one entry per epoch under ``loss`` (the estimator's
    own, nats of the whole data set), ``elbo`` (the plain bound, nats per datum), ``auxiliary_loss`` (nats per datum,
    where there is one), ``validation_elbo``, and dictionaries ``reconstruction`` and ``kl`` of such lists by site
    (nats per datum); ``skipped`` counts steps left out because they were not finite, and
    ``restores`` how often training went back for that reason, in the modes that do so. ``elbo`` equals the sum of
    ``reconstruction`` minus the sum of ``kl``.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.columns: dict[str, Any] = {"loss": [], "elbo": [], "reconstruction": {}, "kl": {}}
        self._running: dict[tuple[Column, ...], Tensor] = {}
        self._shares = 0.0
        self._pending: list[dict[tuple[Column, ...], Tensor]] = []

    def add_step(self, result: StepResult, share: float) -> None:
        """Add one step; ``share`` is its part of the epoch's mean, relative to the other steps'."""
        self._shares += share
        # graphs may have the parts in another order: each order has its own sum
        before = self._running.get(result.columns)
        part = result.values * share  # a copy: the next step of a CUDA graph writes over what this one tells
        self._running[result.columns] = part if before is None else before + part

    def end_epoch(self, totals: Mapping[str, int] | None = None) -> None:
        """Close the running epoch.

        Args:
            totals: what happened since the fit began, by name, such as steps "skipped"; the history holds what
                happened in each epoch. An epoch without a step is NaN in every other column.
        """
        for name, total in (totals or {}).items():
            counts = self.columns.setdefault(name, [])
            counts.append(total - sum(counts))
        # the last epoch of `steps` may be cut short, and a loader may drop rows: the mean is of what was seen
        whole = self._shares == 1.0
        means = {columns: values if whole else values / self._shares for columns, values in self._running.items()}
        self._pending.append(means)
        self.abandon_epoch()

    def abandon_epoch(self) -> None:
        """Forget the running epoch: it was interrupted."""
        self._running, self._shares = {}, 0.0

    @property
    def epochs(self) -> int:
        """Epochs that are closed."""
        return len(self.columns["loss"]) + len(self._pending)

    def state(self) -> dict[str, Any]:
        """All of it, the running epoch included, as plain values and tensors."""
        return {
            "columns": self.columns,
            "running": list(self._running.items()),
            "shares": self._shares,
            "pending": [list(sums.items()) for sums in self._pending],
        }

    def load_state(self, state: dict[str, Any], device: torch.device | None) -> None:
        """Go on from what `state` gave; the record that others hold of the columns is filled in place."""
        self.columns.clear()
        self.columns.update(state["columns"])
        self._running, self._shares = _sums(state["running"], device), state["shares"]
        self._pending = [_sums(items, device) for items in state["pending"]]

    def flush(self) -> None:
        """Read the closed epochs out of the device, in one transfer.

        Raises:
            NonFiniteError: if a loss was NaN or infinite, naming the epoch and the terms that were.
        """
        kept = [values for sums in self._pending for values in sums.values()]
        numbers = torch.cat(kept).cpu().numpy() if kept else np.empty(0)
        epochs, self._pending, read = self._pending, [], 0
        for keys, alike in groupby(epochs, tuple):  # epochs of the same columns are one block of numbers
            count = len(list(alike))
            if not keys:
                self._leave_out(count)
                continue
            names = [column for columns in keys for column in columns]
            end = read + count * len(names)
            self._add(names, numbers[read:end].reshape(count, len(names)))
            read = end

    def _add(self, names: list[Column], block: np.ndarray) -> None:
        """Add epochs, shape (epochs, numbers), in which a column may have a number for each order of the parts."""
        values: dict[Column, np.ndarray] = {}
        for column, numbers in zip(names, block.T, strict=True):
            part = numbers / self.size if column[0] in ("reconstruction", "kl") else numbers
            values[column] = values[column] + part if column in values else part
        finite = np.isfinite(np.stack(list(values.values()))).all(0)
        count = len(finite) if finite.all() else int(finite.argmin())
        elbo = np.zeros(count)
        for (group, site), numbers in values.items():
            before = [math.nan] * len(self.columns["elbo"]) if site else []  # epochs without a step
            found = numbers[:count]
            elbo = elbo + found if group == "reconstruction" else elbo - found if group == "kl" else elbo
            told = self.columns[group].setdefault(site, before) if site else self.columns.setdefault(group, [])
            told.extend(found.tolist())
        self.columns["elbo"].extend(elbo.tolist())
        if count < len(finite):
            self._refuse({column: float(numbers[count]) for column, numbers in values.items()})

    def _leave_out(self, count: int) -> None:
        """Note epochs of which no step was taken."""
        sites = [values for group in ("reconstruction", "kl") for values in self.columns[group].values()]
        named = ("loss", "elbo", "auxiliary_loss")
        for values in [*sites, *(self.columns[name] for name in named if name in self.columns)]:
            values.extend([math.nan] * count)

    def _refuse(self, values: Mapping[Column, float]) -> None:
        wrong = [
            f"{group} of {site!r}" if site else group for (group, site), v in values.items() if not math.isfinite(v)
        ]
        raise non_finite(len(self.columns["loss"]) + 1, ", ".join(wrong))


def _sums(items: Any, device: torch.device | None) -> dict[tuple[Column, ...], Tensor]:
    return {columns: values.to(device) for columns, values in items}


def non_finite(epoch: int, what: str) -> NonFiniteError:
    """The error for ``what`` became NaN or infinite in ``epoch``."""
    return NonFiniteError(
        f"epoch {epoch}: {what} became NaN or infinite. The last finite parameters have been restored; try a smaller "
        "rate (lr=...), grad_clip_norm=..., or a floor on scales"
    )

"""What the outside sees of a running fit: a bar, and a record for callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

__all__ = ["EpochEnd", "Progress"]


@dataclass(frozen=True)
class EpochEnd:
    """What a callback is given after an epoch.

    Attributes:
        epoch: epochs done.
        history: as in `Fit`, up to this epoch.
        program: what the user handed to `fit`.
    """

    epoch: int
    history: Mapping[str, Any]
    program: Any


class Progress:
    """A progress bar over epochs with the ELBO in nats per datum; silent off a terminal unless asked for."""

    def __init__(self, epochs: int, shown: bool | None) -> None:
        self._bar = tqdm(total=epochs, unit="epoch", disable=None if shown is None else not shown, leave=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, epoch: int, history: Mapping[str, Any]) -> None:
        """Move to ``epoch``."""
        if self._bar.disable:
            return
        shown = {"ELBO": f"{history['elbo'][-1]:.3f} nats/datum"}
        if history.get("validation_elbo"):
            shown["validation"] = f"{history['validation_elbo'][-1]:.3f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(epoch - self._bar.n)

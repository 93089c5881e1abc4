"""Checkpoints of a running fit: a folder with the last two, each a file that is whole or not there.

A file holds all that decides how training goes on (parameters, optimiser, schedule, place in the data's order, every
generator, history), so that a resumed run ends where the undisturbed one ends, to the bit. What the fit was made with
is written beside it: another fit does not go on from it.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from pyro_lvm.errors import ProgramWarning, StorageError
from pyro_lvm.storage.files import read_tree, write_tree

__all__ = ["Checkpoints", "Resume", "checkpoints_of"]

Resume = Literal["auto"] | bool

KEPT = 2
"""Files kept: should the last one be damaged, there is one before it."""

MOST = 100
"""Checkpoints in a run, about, where nobody says how often: epochs may be as short as a step."""


class Checkpoints:
    """A folder of checkpoints that belongs to one fit at a time.

    Args:
        folder: where; it is made when the first file is.
        every: steps from one checkpoint to the next; None for each epoch, or each hundredth of the run if that is
            longer.
        resume: "auto" goes on from the last checkpoint if there is one; True asks for one; False asks for none.
        on_error: whether a checkpoint that cannot be written ends the fit ("raise") or is told of ("warn").
    """

    def __init__(self, folder: Path, every: int | None, resume: Resume, on_error: Literal["warn", "raise"]) -> None:
        self.folder, self.every, self.resume, self.on_error = folder, every, resume, on_error
        self._lock = FileLock(folder / "lock")
        self._made: dict[str, Any] = {}
        self._good: list[Path] = []
        self._terminated = False
        self._before: Any = None

    def latest(self) -> dict[str, Any] | None:
        """The last checkpoint that can be read, or None where there is none.

        Raises:
            StorageError: if there is one and ``resume`` is False, none and it is True, or none can be read.
        """
        files = self._files()
        if files and self.resume is False:
            raise StorageError(
                f"{self.folder} holds checkpoints, the last of step {_step(files[-1])}, and resume=False would write "
                "over them: name another folder, or delete this one"
            )
        if not files and self.resume is True:
            raise StorageError(
                f"{self.folder} holds no checkpoint to go on from: check the path, or begin anew with resume='auto'"
            )
        damaged: list[str] = []
        for number in reversed(range(len(files))):
            try:
                found: dict[str, Any] = read_tree(files[number])
            except StorageError as error:
                damaged.append(str(error))
                continue
            self._good = files[: number + 1]
            for words in damaged:
                warnings.warn(
                    f"{words}. The fit goes on from step {_step(files[number])}", RuntimeWarning, stacklevel=3
                )
            return found
        if damaged:
            raise StorageError(f"no checkpoint in {self.folder} can be read: {damaged[0]}")
        return None

    def begin(self, made: Mapping[str, Any], total_steps: int, steps_per_epoch: int) -> None:
        """Take the folder for this fit.

        Args:
            made: what the fit is made with; another fit will not go on from its checkpoints.
            total_steps: the length of the run.
            steps_per_epoch: the length of an epoch.

        Raises:
            StorageError: if another process has it, or the system refuses.
        """
        self._made = dict(made)
        if self.every is None:
            self.every = max(steps_per_epoch, math.ceil(total_steps / MOST))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StorageError(
                f"{self.folder} belongs to a fit that is running, in another process or in this one: name another "
                "folder, or wait for its end"
            ) from None
        except OSError as error:
            raise StorageError(
                f"{self.folder} cannot be written to ({error.strerror or error}): name a folder that can"
            ) from error
        for unfinished in self.folder.glob("*.part"):  # whoever was writing it is dead
            unfinished.unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the fit runs: SIGTERM is heard between steps. The folder is given up at the end."""
        self._terminated = False
        in_main_thread = threading.current_thread() is threading.main_thread()  # the only one that may listen
        if in_main_thread:
            self._before = signal.signal(signal.SIGTERM, self._hear)
        try:
            yield
        finally:
            if in_main_thread:
                signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
            self.give_up()

    def give_up(self) -> None:
        """Let another fit have the folder."""
        self._lock.release()

    def due(self, steps_done: int) -> bool:
        """Whether a checkpoint is to be written after so many steps."""
        assert self.every is not None, "begin comes first"
        return self._terminated or steps_done % self.every == 0

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint; then, if SIGTERM has come, leave.

        Raises:
            StorageError: if it cannot be written and ``on_error`` is "raise".
            SystemExit: after SIGTERM, with the status 143 that a shell knows it by; a handler that was there before
                the fit is called instead.
        """
        path = self.folder / f"step-{state['steps']:012d}.safetensors"
        try:
            write_tree(path, {"made": self._made, **state})
        except StorageError as error:
            if self.on_error == "raise" and not self._terminated:
                raise
            warnings.warn(f"no checkpoint of step {state['steps']}: {error}", RuntimeWarning, stacklevel=2)
        else:
            self._good = [*(file for file in self._good if file != path), path][-KEPT:]
            for file in self._files():
                if file not in self._good:
                    file.unlink(missing_ok=True)
        if self._terminated:
            self._leave()

    def _hear(self, number: int, frame: Any) -> None:
        self._terminated = True

    def _leave(self) -> None:
        self._terminated = False
        if callable(self._before):
            self._before(signal.SIGTERM, None)
            return
        raise SystemExit(128 + signal.SIGTERM)

    def _files(self) -> list[Path]:
        try:
            return sorted(self.folder.glob("step-*.safetensors"), key=_step)
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be read ({error.strerror or error}): check the path") from error


def _step(file: Path) -> int:
    digits = file.name.removeprefix("step-").removesuffix(".safetensors")
    return int(digits) if digits.isdigit() else -1


def require_same(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint was made by the same fit; other versions of libraries are warned of.

    Raises:
        StorageError: naming what differs, there and here.
    """
    names = [name for name in {**there, **here} if name != "surroundings"]
    differing = [name for name in names if repr(there.get(name)) != repr(here.get(name))]
    if differing:
        shown = "; ".join(_difference(name, there.get(name), here.get(name)) for name in differing[:4])
        raise StorageError(
            f"{folder} holds checkpoints of another fit ({shown}): repeat the call that made them, or name another "
            "folder"
        )
    before, now = there["surroundings"], here["surroundings"]
    moved = [f"{name} {before.get(name)} there, {now[name]} here" for name in now if before.get(name) != now[name]]
    if moved:
        warnings.warn(
            f"the checkpoint in {folder} was written with {', '.join(moved)}: the fit goes on, and may end in other "
            "digits than it would have there",
            ProgramWarning,
            stacklevel=3,
        )


def _difference(name: str, there: Any, here: Any) -> str:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        inner = next(key for key in {**there, **here} if repr(there.get(key)) != repr(here.get(key)))
        return _difference(f"{name} {inner!r}", there.get(inner, "nothing"), here.get(inner, "nothing"))
    return f"{name} is {there} there and {here} here"


def checkpoints_of(
    checkpoint: str | os.PathLike[str] | None, every: int | None, resume: Any, on_error: Any
) -> Checkpoints | None:
    """The folder that the arguments of `fit` ask for, or None.

    Raises:
        TypeError: if ``checkpoint`` is no path.
        ValueError: if an argument is not known, or says something of checkpoints where there are none.
    """
    if resume not in ("auto", True, False):
        raise ValueError(f"resume={resume!r} is not known: use 'auto', True or False")
    if on_error not in ("warn", "raise"):
        raise ValueError(f"on_checkpoint_error={on_error!r} is not known: use 'warn' or 'raise'")
    if checkpoint is None:
        named = "checkpoint_every" if every is not None else "resume" if resume is True else None
        if named:
            raise ValueError(f"{named} is given, but no folder for checkpoints: pass checkpoint='a/folder'")
        return None
    if not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(f"checkpoint is {checkpoint!r}: it must be the path of a folder")
    folder = Path(checkpoint)
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file: name a folder for the checkpoints")
    return Checkpoints(folder, every, resume, on_error)

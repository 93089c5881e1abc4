"""Where in the user's own code a statement stands, for messages that send the reader to a line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType, TracebackType

__all__ = ["declared_at", "first_line", "raised_at", "what_and_where"]

_MACHINERY = ("pyro", "torch", "contextlib", "functools")
"""Packages whose frames stand between a statement and the line that its author wrote."""

_OWN_MACHINERY = (
    "declaration",
    "structure",
    "function_parameters",
    "parameters",
    "preflight",
    "elbo",
    "evaluation",
    "capture",
    "inference",
    "guides",
)
"""Our own modules that call programs; a built-in model's lines are shown like a user's."""


def declared_at() -> str | None:
    """The line that is executing the current Pyro statement, as "file.py:12"; None where no program wrote it."""
    frame: FrameType | None = sys._getframe(1)
    entered = False  # an autoguide's site is written by nobody: what called the autoguide is not its line
    while frame is not None:
        package = _package(frame)
        if not _is_machinery(package):
            return _shown(frame.f_code, frame.f_lineno)
        if entered and package[:2] == ("pyro_lvm", "structure"):
            return None
        entered = entered or package[0] == "pyro"
        frame = frame.f_back
    return None


def raised_at(error: BaseException) -> str | None:
    """The innermost line of a program through which ``error`` came, as "file.py:12"."""
    where = None
    step: TracebackType | None = error.__traceback__
    while step is not None:
        written = not step.tb_frame.f_code.co_filename.startswith("<")
        if written and not _is_machinery(_package(step.tb_frame)):
            where = _shown(step.tb_frame.f_code, step.tb_lineno)
        step = step.tb_next
    return where


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def what_and_where(error: BaseException) -> str:
    """The first line of what an error says, and the line of a program through which it came, if it came through one."""
    where = raised_at(error)
    return first_line(error) + (f", at {where}" if where else "")


def _package(frame: FrameType) -> tuple[str, ...]:
    return tuple(str(frame.f_globals.get("__name__", "")).split("."))


def _is_machinery(package: tuple[str, ...]) -> bool:
    if package[0] == "pyro_lvm":
        return package[1:2] != () and package[1] in _OWN_MACHINERY
    return package[0] in _MACHINERY


def _shown(code: CodeType, line: int) -> str:
    return f"{Path(code.co_filename).name}:{line}"

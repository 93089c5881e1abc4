"""What can go wrong, by name.

Bad arguments are plain `ValueError` or `TypeError`; the classes here are the situations a caller may want to tell
apart from them.
"""

from __future__ import annotations

__all__ = ["NonFiniteError", "NotEnoughMemoryError", "ProgramError", "ProgramWarning", "StorageError"]


class ProgramError(ValueError):
    """A model/guide pair that cannot mean what its author meant.

    The message names the site, its line, the numbers that disagree, and one edit that mends it. It is raised before
    the first step, so no parameter has moved.
    """


class ProgramWarning(UserWarning):
    """A model/guide pair that may mean what it says, but seldom does; the message says what it means."""


class NonFiniteError(RuntimeError):
    """The loss became NaN or infinite during a fit; the last finite parameters are back in the modules."""


class NotEnoughMemoryError(MemoryError):
    """A result would not fit in memory; the message says how much it takes, how much there is, and an edit."""


class StorageError(RuntimeError):
    """Something on disk cannot be written, cannot be read, or is not what it says; the message names the file."""

"""Attributes of modules and classes that are others for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["replaced"]

_ABSENT = object()


@contextmanager
def replaced(attributes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Put others in place of attributes, each an (owner, name, value); whatever happens, all is put back.

    Example:
        >>> import math
        >>> with replaced([(math, "tau", 6)]):
        ...     math.tau
        6
        >>> math.tau > 6
        True
    """
    before: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, value in attributes:
            before.append((owner, name, vars(owner).get(name, _ABSENT)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            if value is _ABSENT:
                delattr(owner, name)  # it is inherited
            else:
                setattr(owner, name, value)

"""What is read from a file, taken only as what it has to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_lvm.errors import StorageError
from pyro_lvm.storage.folder import CONFIG

__all__ = ["entry", "of_kind", "tensors_of"]


def entry(tree: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value under a key.

    Raises:
        StorageError: if there is none, or it is of another kind.
    """
    if name not in tree:
        raise StorageError(f"{CONFIG} lacks {name!r}: take a copy of it")
    return of_kind(tree[name], kind, name)


def of_kind(value: Any, kind: type, name: str) -> Any:
    """The value.

    Raises:
        StorageError: if it is of another kind.
    """
    if not isinstance(value, kind):
        raise StorageError(f"{name} is {type(value).__name__} where {kind.__name__} is expected: take a copy of it")
    return value


def tensors_of(tree: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors by name under a key.

    Raises:
        StorageError: if they are not.
    """
    found: dict[str, Tensor] = of_kind(tree.get(name), dict, name)
    for key, value in found.items():
        of_kind(key, str, name)
        of_kind(value, Tensor, f"{name}[{key!r:.80}]")
    return found

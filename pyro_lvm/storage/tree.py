"""Trees of plain values and tensors as JSON beside named tensors: what is written is data, and never code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lvm.errors import StorageError

__all__ = ["is_plain", "pack", "unpack"]


def is_plain(value: Any) -> bool:
    """Whether JSON has a word for the value by itself: None, a truth value, a number, a string."""
    return isinstance(value, bool | int | float | str | None)


def pack(tree: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into what JSON can say and the tensors in it.

    Args:
        tree: None, numbers, strings, tensors; lists, tuples, mappings and counters of such.
        name: what the tree is called, in the names of its tensors and in errors.

    Returns:
        The tree with ``{"$tensor": name}`` in the place of each tensor, and copies of the tensors by these names.

    Raises:
        StorageError: if something else is in it, naming the place.

    Example:
        >>> import torch
        >>> plain, tensors = pack({"rate": 0.1, "weights": (torch.ones(2),)}, "state")
        >>> plain
        {'rate': 0.1, 'weights': {'$tuple': [{'$tensor': 'state.weights.0'}]}}
        >>> unpack(plain, tensors)
        {'rate': 0.1, 'weights': (tensor([1., 1.]),)}
    """
    tensors: dict[str, Tensor] = {}
    return _packed(tree, name, tensors), tensors


def _packed(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, np.generic):
        tree = tree.item()
    if is_plain(tree):
        return tree
    if isinstance(tree, Tensor):
        while path in tensors:  # a dotted key beside a nested one
            path += "'"
        # a copy: files of safetensors hold no views, and training goes on while they are written
        tensors[path] = torch.empty(tree.shape, dtype=tree.dtype).copy_(tree.detach())
        return {"$tensor": path}
    if isinstance(tree, Mapping):
        items = [
            [_packed(key, f"{path}.keys()", tensors), _packed(v, f"{path}.{key}", tensors)] for key, v in tree.items()
        ]
        if isinstance(tree, Counter):
            return {"$counter": items}
        if all(isinstance(key, str) and not key.startswith("$") for key in tree):
            return dict(items)
        return {"$items": items}
    if isinstance(tree, list | tuple):
        values = [_packed(value, f"{path}.{i}", tensors) for i, value in enumerate(tree)]
        return values if isinstance(tree, list) else {"$tuple": values}
    raise StorageError(
        f"{path} is a {type(tree).__name__}: only numbers, strings, tensors, and lists and dictionaries of them can be "
        "written without code in the file"
    )


def unpack(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `pack` split; tuples come back as tuples.

    Raises:
        StorageError: if a tensor is missing, or a mark is not known.
    """
    if isinstance(plain, list):
        return [unpack(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    marks = [key for key in plain if key.startswith("$")]
    if not marks:
        return {key: unpack(value, tensors) for key, value in plain.items()}
    kind, content = next(iter(plain.items()))
    if len(plain) == 1 and kind == "$tensor":
        if not isinstance(content, str) or content not in tensors:
            raise StorageError(f"tensor {content!r} is missing")
        return tensors[content]
    if len(plain) == 1 and kind == "$tuple" and isinstance(content, list):
        return tuple(unpack(value, tensors) for value in content)
    if len(plain) == 1 and kind in ("$items", "$counter") and isinstance(content, list):
        try:
            items = {unpack(key, tensors): unpack(value, tensors) for key, value in content}
        except (TypeError, ValueError) as error:
            raise StorageError(f"{kind} holds something other than pairs of a key and a value") from error
        return Counter(items) if kind == "$counter" else items
    raise StorageError(f"{marks[0]!r} with {sorted(plain)} is no mark that a file has")

"""Objects of this package as the arguments they were made with, and back: a table of classes, and no other."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_lvm.errors import StorageError
from pyro_lvm.storage.tree import is_plain

__all__ = ["built", "described", "storable"]

_Class = TypeVar("_Class", bound=type)

_ALLOWED: dict[str, type] = {}
"""The classes that a file may name. Each of the package's adds itself where it is defined."""

_ACTIVATIONS: dict[str, type] = {
    kind.__name__: kind
    for kind in (nn.ReLU, nn.Tanh, nn.Softplus, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.LeakyReLU, nn.Identity)
}


def storable(kind: _Class) -> _Class:
    """Let files name this class.

    The arguments of its constructor must be found again: as attributes of the same names, or in ``_given`` by name.
    """
    _ALLOWED[kind.__name__] = kind
    return kind


def described(thing: Any, name: str) -> Any:
    """An object as a tree of plain values and tensors: the name of its class, and its constructor's arguments.

    Args:
        thing: an object of a `storable` class, a plain value, a tensor, or lists and tuples of such.
        name: what it is called, in errors.

    Raises:
        StorageError: if it is or holds something else, naming the place.
    """
    if is_plain(thing) or isinstance(thing, Tensor):
        return thing
    if isinstance(thing, list | tuple):
        return [described(value, f"{name}[{i}]") for i, value in enumerate(thing)]
    if isinstance(thing, type) and _ACTIVATIONS.get(thing.__name__) is thing:
        return {"activation": thing.__name__}
    kind = type(thing)
    if _ALLOWED.get(kind.__name__) is not kind:
        shown = thing.__name__ if isinstance(thing, type) else kind.__name__
        raise StorageError(f"{name} is {shown}, which is no class of pyro_lvm that a file may name")
    given = vars(thing).get("_given", {})
    arguments = {}
    for argument in inspect.signature(kind).parameters:
        value = given[argument] if argument in given else getattr(thing, argument)
        arguments[argument] = described(value, f"{name}.{argument}")
    return {"class": kind.__name__, "arguments": arguments}


def built(tree: Any, room: int) -> Any:
    """The object that `described` described, made anew.

    Args:
        tree: the description.
        room: numbers that a tensor made on the way may have: a file cannot ask for more memory than it fills.

    Raises:
        StorageError: if a class is not in the table, or does not take its arguments.
    """
    if isinstance(tree, list):
        return [built(value, room) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {"activation"} and isinstance(tree["activation"], str) and tree["activation"] in _ACTIVATIONS:
        return _ACTIVATIONS[tree["activation"]]
    kind, arguments = tree.get("class"), tree.get("arguments")
    if set(tree) != {"class", "arguments"} or not isinstance(kind, str) or kind not in _ALLOWED:
        raise StorageError(f"{kind!r} is no class of pyro_lvm that a file may name")
    if not isinstance(arguments, dict):
        raise StorageError(f"the arguments of {kind} are no dictionary")
    values = {name: built(value, room) for name, value in arguments.items()}
    try:
        with _Room(room):
            return _ALLOWED[kind](**values)
    except Exception as error:  # what a constructor says of arguments that nobody gave it is of any kind
        raise StorageError(f"{kind} cannot be made with the arguments in the file ({error})") from error


class _Room(TorchDispatchMode):
    """Refuse tensors of more than so many numbers."""

    def __init__(self, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() > self.most:
            raise StorageError(f"a tensor of {result.numel()} numbers is more than the file holds")
        return result

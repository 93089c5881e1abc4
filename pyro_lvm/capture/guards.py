"""What a captured graph has baked in: plain Python values that the program can see."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_lvm.program import Program
from pyro_lvm.storage.tree import is_plain

__all__ = ["left_as_found", "numbers_of", "python_state", "state_of_calls"]

DEPTH = 4
"""How far attributes of attributes are followed."""


class _Length(int):
    """How many things a list or dictionary holds."""


def python_state(program: Program, auxiliary_loss: Any = None) -> dict[str, Any]:
    """Plain values in the attributes, closures and globals that a program uses; of tensors, which and what version.

    A graph holds them as constants: where one has changed, the graph is another program's.
    """
    return {
        path: value for path, value in state_of_calls(program, auxiliary_loss).items() if type(value) is not _Length
    }


def state_of_calls(program: Program, auxiliary_loss: Any = None) -> dict[str, Any]:
    """`python_state`, and how many things are in lists and dictionaries: a program may note something in every call."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name, part in (("model", program.model), ("guide", program.guide), ("auxiliary_loss", auxiliary_loss)):
        for path, value in _values(name, part, seen, DEPTH):
            found[path] = value
    return found


def numbers_of(program: Program, auxiliary_loss: Any = None) -> dict[str, float]:
    """The Python numbers among these values, which mean the same in another process; not who is in training mode."""
    found = python_state(program, auxiliary_loss)
    return {path: value for path, value in found.items() if isinstance(value, int | float) and path[-9:] != ".training"}


@contextmanager
def left_as_found(program: Program, auxiliary_loss: Any = None) -> Iterator[None]:
    """Give back what calls of a program may move besides tensors: plain values, and generators torch does not seed."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    seen: set[int] = set()
    parts = (program.model, program.guide, auxiliary_loss)
    restorers = [restore for part in parts for restore in _restorers(part, seen, DEPTH)]
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        for restore in restorers:
            restore()


def _restorers(thing: Any, seen: set[int], depth: int) -> Iterator[Callable[[], Any]]:
    if depth == 0 or is_plain(thing) or isinstance(thing, Tensor | type | ModuleType) or id(thing) in seen:
        return
    seen.add(id(thing))
    function = inspect.unwrap(thing.__func__ if inspect.ismethod(thing) else thing)
    if isinstance(function, FunctionType):
        for cell in function.__closure__ or ():
            for value in _held(cell):
                if is_plain(value):
                    yield functools.partial(setattr, cell, "cell_contents", value)
        used = {name: function.__globals__.get(name, thing) for name in function.__code__.co_names}
        yield _keeping(function.__globals__, used)
    elif isinstance(thing, dict):
        yield _keeping(thing, thing)
    elif isinstance(thing, list):
        yield functools.partial(thing.__setitem__, slice(None), thing.copy())
    elif isinstance(thing, nn.Module) or _is_the_users(thing):
        yield _keeping(vars(thing), vars(thing))
    for _, part in _parts(thing):
        yield from _restorers(part, seen, depth - 1)


def _keeping(holder: dict[Any, Any], values: Mapping[Any, Any]) -> Callable[[], Any]:
    return functools.partial(holder.update, {name: value for name, value in values.items() if is_plain(value)})


def _values(path: str, thing: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    if is_plain(thing):
        yield path, thing
        return
    if isinstance(thing, Tensor):
        yield path, _known(path, thing)
        return
    if depth == 0 or isinstance(thing, type | ModuleType) or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, list | dict):
        yield path, _Length(len(thing))
    for name, part in _parts(thing):
        yield from _values(f"{path}.{name}", part, seen, depth - 1)


def _known(path: str, tensor: Tensor) -> tuple[Any, ...]:
    """What shows that a tensor is another; its parameters and buffers are inputs of a graph, which may move."""
    if "._buffers." in path and tensor.dtype is torch.bool:  # a mask is none
        return id(tensor), tensor.cpu().numpy().tobytes()
    if "._buffers." in path or isinstance(tensor, nn.Parameter):
        return (id(tensor),)
    return id(tensor), tensor._version  # a value may have been read


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    if inspect.ismethod(thing):
        yield "self", thing.__self__
        yield from _of_function(thing.__func__)
    elif isinstance(thing, FunctionType):
        yield from _of_function(thing)
    elif isinstance(thing, functools.partial):
        yield "func", thing.func
        yield from ((str(i), part) for i, part in enumerate(thing.args))
        yield from thing.keywords.items()
    elif isinstance(thing, nn.Module):
        yield from ((name, value) for name, value in vars(thing).items() if name[0] != "_" or name == "_buffers")
        yield from thing.named_children()
    elif isinstance(thing, Mapping):
        yield from ((str(name), value) for name, value in list(thing.items())[:100])
    elif isinstance(thing, list | tuple):
        yield from ((str(i), value) for i, value in enumerate(thing[:100]))
    elif _is_the_users(thing):
        yield from vars(thing).items()


def _is_the_users(thing: Any) -> bool:
    return hasattr(thing, "__dict__") and not type(thing).__module__.startswith(("torch", "pyro."))


def _of_function(function: Any) -> Iterator[tuple[str, Any]]:
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType):  # what `torch.compile` makes of a module wraps the module
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        for value in _held(cell):
            yield name, value
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _held(cell: Any) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a name that has no value yet
        return []

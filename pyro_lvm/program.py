"""What a program is: two callables with one signature, and the modules whose parameters they use."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_lvm.errors import ProgramError

__all__ = ["Program", "as_program"]

ROW_KEYWORDS = ("size", "index", "weight")
"""Keywords that describe a batch; each is passed only to callables whose signature names it."""


@dataclass(frozen=True)
class Program:
    """A generative model and its guide, resolved from whatever the user wrote.

    A user never makes one: `pyro_lvm.fit` and its friends accept a ``(model, guide)`` tuple, an object with
    ``.model`` and ``.guide``, or a lone ``model``, and call `as_program`.

    Attributes:
        model: the generative story, a callable holding Pyro statements.
        guide: the variational distribution, or None when one has still to be built from the model.
        source: what the user handed over; ``fit.program`` is this object.
        modules: the `torch.nn.Module`s of the pair by the prefix that their parameters get.
        keywords: which of ``size``, ``index`` and ``weight`` each callable names.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    source: Any
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    keywords: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def names(self, keyword: str) -> bool:
        """Whether the model's signature names ``keyword``."""
        return keyword in self.keywords["model"]

    def hook(self, name: str) -> Callable[..., Any] | None:
        """The optional method ``name`` of the user's object (`initialize`, `auxiliary_loss`, ...), or None."""
        candidates = self.source if isinstance(self.source, tuple) else (self.source,)
        for candidate in candidates:
            method = getattr(candidate, name, None)
            if callable(method):
                return method  # type: ignore[no-any-return]
        return None

    @property
    def name(self) -> str:
        """A short name for tables and error messages."""
        if isinstance(self.source, tuple):
            return f"({_callable_name(self.model)}, {_callable_name(self.guide)})"
        if callable(self.source) and not isinstance(self.source, nn.Module):
            return _callable_name(self.source)
        return type(self.source).__name__

    def with_guide(self, guide: Callable[..., Any]) -> Program:
        """The same program with another guide."""
        return _resolved(self.source, self.model, guide)

    def has_network(self) -> bool:
        """Whether the pair holds a neural network: two or more weight matrices applied one after another."""
        linear = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)
        return any(isinstance(layer, linear) for module in self.modules.values() for layer in module.modules())


def as_program(program: Any, guide: Callable[..., Any] | None = None) -> Program:
    """Resolve what a user hands over to a `Program`.

    Args:
        program: a ``(model, guide)`` tuple, an object with ``.model`` and ``.guide``, or a lone model.
        guide: takes the place of the program's own guide when given.

    Raises:
        TypeError: if ``program`` is none of the three, naming what it is.
    """
    if isinstance(program, Program):
        return program if guide is None else program.with_guide(guide)
    if isinstance(program, tuple):
        if len(program) != 2 or not all(callable(part) for part in program):
            kinds = ", ".join(type(part).__name__ for part in program)
            raise TypeError(f"a program given as a tuple must be (model, guide), two callables; got ({kinds})")
        return _resolved(program, program[0], guide or program[1])
    if callable(getattr(program, "model", None)):
        return _resolved(program, program.model, guide or getattr(program, "guide", None))
    if callable(program):
        return _resolved(program, program, guide)
    raise TypeError(
        f"program must be a (model, guide) tuple, an object with .model and .guide, or a model; got {program!r}"
    )


def _resolved(source: Any, model: Callable[..., Any], guide: Callable[..., Any] | None) -> Program:
    of_model = _row_keywords(model)
    # an autoguide hands everything on to the model it was made from
    of_guide = of_model if guide is None or isinstance(guide, AutoGuide) else _row_keywords(guide)
    return Program(model, guide, source, _modules(source, model, guide), {"model": of_model, "guide": of_guide})


def _row_keywords(function: Callable[..., Any]) -> frozenset[str]:
    target = function.forward if isinstance(function, nn.Module) else function
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return frozenset(ROW_KEYWORDS)
    return frozenset(parameter.name for parameter in parameters) & frozenset(ROW_KEYWORDS)


def _modules(source: Any, model: Any, guide: Any) -> dict[str, nn.Module]:
    """The outermost modules of the pair; a lone one needs no prefix, several are told apart by one."""
    found: dict[str, nn.Module] = {}

    def add(prefix: str, candidate: Any) -> None:
        if isinstance(candidate, nn.Module) and not any(candidate is known for known in _all_modules(found.values())):
            found[prefix] = candidate

    add("", source)
    for prefix, part in (("model", model), ("guide", guide)):
        owner = getattr(part, "__self__", part)
        add(prefix, owner)
        if not isinstance(owner, nn.Module):
            for name, value in vars(owner).items() if hasattr(owner, "__dict__") else ():
                add(name, value)
    if "" not in found and len(found) == 1 and "guide" not in found:
        return {"": next(iter(found.values()))}
    return found


def _all_modules(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    return (inner for module in modules for inner in module.modules())


def _callable_name(function: Any) -> str:
    if function is None:
        return "None"
    return getattr(function, "__name__", type(function).__name__)


def batch_arguments(
    keywords: frozenset[str], size: int | None, index: Tensor | None, weight: Tensor | None
) -> dict[str, Any]:
    """The row keywords that a callable names, with their values for one batch."""
    values = {"size": size, "index": index, "weight": weight}
    return {name: value for name, value in values.items() if name in keywords}


def require_named(program: Program, keyword: str, why: str) -> None:
    """Raise a `ProgramError` unless the model names ``keyword``."""
    if not program.names(keyword):
        raise ProgramError(f"{program.name}: {why}: add `{keyword}=None` to the signature of model and guide")


def training_mode(modules: Iterable[nn.Module], training: bool) -> list[tuple[nn.Module, bool]]:
    """Set every module's training flag and return what it was, for `restore_mode`."""
    before = [(inner, inner.training) for module in modules for inner in module.modules()]
    for inner, _ in before:
        inner.training = training
    return before


def restore_mode(before: Iterable[tuple[nn.Module, bool]]) -> None:
    """Undo `training_mode`."""
    for inner, training in before:
        inner.training = training


def floating_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The dtype of the first floating tensor, or None when there is none."""
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)

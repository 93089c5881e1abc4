"""What a program is: two callables with one signature, and the modules whose parameters they use."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.reparam_messenger import ReparamHandler
from pyro.poutine.trace_messenger import TraceHandler
from torch import Tensor, nn

from pyro_lvm.errors import ProgramError

__all__ = ["Program", "as_program"]

ROW_KEYWORDS = ("size", "index", "weight", "strata")
"""Keywords that describe a batch; each is passed only to callables whose signature names it."""

AGREED = frozenset({"strata"})
"""Those that both model and guide must name outright: what the one leaves out for it, the other must leave out too."""


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
        keywords: which of ``size``, ``index``, ``weight`` and ``strata`` each callable is passed.
        missing: what it does about missing values in the data; None where they are an error.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    source: Any
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    keywords: Mapping[str, frozenset[str]] = field(default_factory=dict)
    missing: Any = None

    def names(self, keyword: str) -> bool:
        """Whether the model's signature names ``keyword``."""
        return keyword in self.keywords["model"]

    def hook(self, name: str) -> Callable[..., Any] | None:
        """The optional method ``name`` of the user's object (`initialize`, `auxiliary_loss`, ...), or None.

        In a tuple, or for a lone bound method, it is looked for in the objects that model and guide are methods of.
        """
        parts = self.source if isinstance(self.source, tuple) else (self.source,)
        for candidate in (owner for part in parts for owner in (part, _owner(part))):
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
        return replace(_resolved(self.source, self.model, guide), missing=self.missing)

    def require_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise `TypeError` unless model and guide take the data ``args`` and ``kwargs``."""
        taken = [name for name in kwargs if name in ROW_KEYWORDS]
        if taken:
            raise TypeError(
                f"the data have the name {taken[0]!r}, by which a program is told of its batch, as by any of "
                f"{', '.join(ROW_KEYWORDS)}: give them another name, there and in the signatures of model and guide"
            )
        for role, function in (("model", self.model), ("guide", self.guide)):
            # an autoguide takes anything and hands it to its model
            if function is None or isinstance(function, _HANDS_ON):
                continue
            signature = _signature(function)
            try:
                signature.bind(*args, **kwargs, **dict.fromkeys(self.keywords[role]))
            except TypeError as error:
                named = f" and the names {', '.join(map(repr, kwargs))}" if kwargs else ""
                raise TypeError(
                    f"the data give {len(args)} arguments by position{named}, but {role} "
                    f"{_callable_name(function)}{signature} cannot be called with them ({error}): change the "
                    "signature, or the tuple or dict that is passed as data"
                ) from None


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
    if guide is not None and not callable(guide):
        raise TypeError(f"guide must be a callable, a Pyro autoguide class or one of its words; got {guide!r}")
    if isinstance(program, type):
        raise TypeError(f"program is the class {program.__name__}: make an object of it, {program.__name__}(...)")
    if isinstance(program, tuple):
        if len(program) != 2 or not all(callable(part) for part in program):
            kinds = ", ".join(type(part).__name__ for part in program)
            raise TypeError(f"a program given as a tuple must be (model, guide), two callables; got ({kinds})")
        return _resolved(program, program[0], program[1] if guide is None else guide)
    if callable(getattr(program, "model", None)):
        return _resolved(program, program.model, getattr(program, "guide", None) if guide is None else guide)
    if callable(program):
        return _resolved(program, program, guide)
    raise TypeError(
        f"program must be a (model, guide) tuple, an object with .model and .guide, or a model; got {program!r}"
    )


_HANDS_ON = (AutoGuide, EasyGuide)
"""Guides that take anything and hand it on to the model they were made from."""


def _resolved(source: Any, model: Callable[..., Any], guide: Callable[..., Any] | None) -> Program:
    if isinstance(guide, GuideMessenger):
        raise TypeError(
            f"guide is a {type(guide).__name__}, which runs the model by itself and hides its rows: use "
            "pyro.infer.autoguide.AutoNormal, or guide='mean_field'"
        )
    of_model = row_keywords(model)
    if guide is None:
        keywords = {"model": of_model, "guide": of_model}
    else:
        of_guide = of_model - AGREED if isinstance(guide, _HANDS_ON) else row_keywords(guide)
        apart = AGREED - (of_model & of_guide)
        keywords = {"model": of_model - apart, "guide": of_guide - apart}
    return Program(model, guide, source, _modules(source, model, guide), keywords)


def row_keywords(function: Callable[..., Any]) -> frozenset[str]:
    """Which of ``size``, ``index``, ``weight`` and ``strata`` a callable takes."""
    parameters = _signature(function).parameters.values()
    named = frozenset(parameter.name for parameter in parameters) & frozenset(ROW_KEYWORDS)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return named | frozenset(ROW_KEYWORDS) - AGREED
    return named


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    function = _innermost(function)
    return inspect.signature(function.forward if isinstance(function, nn.Module) else function)


def _innermost(function: Any) -> Any:
    """What stands inside Pyro's handlers, such as ``config_enumerate(model)``; their own signature says nothing."""
    while True:
        if hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif isinstance(function, partial) and function.args and isinstance(function.args[0], Messenger):
            function = function.args[1]
        elif isinstance(function, partial) and isinstance(function.func, partial):
            function = function.func
        elif isinstance(function, ReparamHandler | TraceHandler):
            function = function.fn
        else:
            return function


def _owner(function: Any) -> Any:
    """The object that a callable is a method of, else the callable itself."""
    function = _innermost(function)
    if isinstance(function, partial):
        function = function.func
    return getattr(function, "__self__", function)


def _modules(source: Any, model: Any, guide: Any) -> dict[str, nn.Module]:
    """The outermost modules of the pair; a lone one needs no prefix, several are told apart by one."""
    found: dict[str, nn.Module] = {}

    def add(role: str, name: str, candidate: Any) -> None:
        if isinstance(candidate, nn.Module) and not any(candidate is known for known in _all_modules(found.values())):
            # two objects may call their networks by one name: both are trained
            found[name if name not in found else f"{role}.{name}"] = candidate

    add("program", "", source)
    for role, part in (("model", model), ("guide", guide), ("program", source)):
        owner = _owner(part)
        add(role, role, owner)
        if not isinstance(owner, nn.Module) and hasattr(owner, "__dict__"):
            replaced = ("model", "guide") if owner is source else ()
            for name, value in vars(owner).items():
                if name not in replaced:
                    add(role, name, value)
    if "" not in found and len(found) == 1 and "guide" not in found:
        return {"": next(iter(found.values()))}
    return found


def _all_modules(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    return (inner for module in modules for inner in module.modules())


def _callable_name(function: Any) -> str:
    if function is None:
        return "None"
    return getattr(function, "__name__", type(function).__name__)


def batch_arguments(keywords: frozenset[str], **values: Any) -> dict[str, Any]:
    """Of the row keywords with their values for one batch, those that a callable names."""
    return {name: value for name, value in values.items() if name in keywords}


def require_named(program: Program, keyword: str, why: str) -> None:
    """Raise a `ProgramError` unless model and guide both name ``keyword``."""
    for role in ("model", "guide"):
        if keyword not in program.keywords[role]:
            raise ProgramError(f"{program.name}: {why}: add `{keyword}=None` to the signature of its {role}")


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
    return next((t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()), None)

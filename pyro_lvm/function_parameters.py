"""The parameters that plain functions declare: `pyro.param` answered from one fit instead of the process's store."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Container
from types import FrameType
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pyro_lvm.declaration import declared_at
from pyro_lvm.errors import ProgramError
from pyro_lvm.program import batch_arguments

__all__ = ["FunctionParameters", "bind", "free"]

_BETWEEN = ("pyro", "pyro_lvm", "contextlib", "functools")
"""Packages whose frames may stand between a parameter's messenger and the module that asks for it."""


class _ParameterMessenger(Messenger):
    """Answers every `pyro.param` from the parameters of one fit, before the global store is asked."""

    def __init__(self, parameters: FunctionParameters) -> None:
        super().__init__()
        self.parameters = parameters

    def _pyro_param(self, msg: Any) -> None:
        store = pyro.get_param_store()
        if getattr(msg["fn"], "__self__", None) is not store:
            return  # a PyroModule with local parameters answers for itself
        name = msg["name"]
        if name in store:  # a PyroModule has just put its own parameter there
            parameter = store._params[name]
            if not self.parameters.knows(parameter):
                self.parameters.adopt(name, parameter, store._constraints[name], _asking_module())
            return
        start = msg["args"][1] if len(msg["args"]) > 1 else msg["kwargs"].get("init_tensor")
        msg["value"] = self.parameters.value(name, start, msg["kwargs"].get("constraint", constraints.real))
        msg["done"] = True


def _asking_module() -> nn.Module | None:
    """The module on whose behalf `pyro.param` is being called, by `pyro.module` or by a `PyroModule`, if one is."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        for code, local in ((pyro.module.__code__, "nn_module"), (pyro.nn.PyroModule.__getattr__.__code__, "self")):
            if frame.f_code is code:
                module: nn.Module = frame.f_locals[local]
                return module
        frame = frame.f_back
    return None


class FunctionParameters:
    """The parameters that plain functions declare with `pyro.param`, created on first use.

    Modules that functions register (`pyro.module`, or a `PyroModule` they call) are trained in place.

    Attributes:
        unconstrained: the parameters by name.
        constraints: their constraints.
        modules: the modules met.
        meet: called with every module when it is first met, before its parameters are used.
        saved: called with name and initial value of what is new; the unconstrained value to give it instead, or None.
    """

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        meet: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.unconstrained: dict[str, nn.Parameter] = {}
        self.constraints: dict[str, Any] = {}
        self.modules: list[nn.Module] = []
        self.meet = meet
        self.saved: Callable[[str, Any], Tensor | None] | None = None
        self.dtype = dtype
        self.device = device
        self._known: set[int] = set()

    def knows(self, parameter: Any) -> bool:
        """Whether ``parameter`` is one of these."""
        return id(parameter) in self._known

    def value(self, name: str, start: Any, constraint: Any) -> Tensor:
        """The constrained value of parameter ``name``, created from ``start`` when it is new."""
        if isinstance(start, nn.Parameter) and constraint is constraints.real:
            if self.knows(start):
                return start
            module = _asking_module()
            # a function that makes a new nn.Parameter in every call means the first one, as in plain Pyro
            if module is not None or name not in self.unconstrained:
                saved = None if module is not None else self._saved(name, start)
                if saved is not None:
                    start.data = saved
                self.adopt(name, start, constraint, module)
                return start
        if name not in self.unconstrained:
            if start is None:
                raise ProgramError(f"{_statement(name)} has no initial value: write pyro.param({name!r}, tensor)")
            saved = self._saved(name, start)
            if saved is not None:
                self.unconstrained[name] = nn.Parameter(saved)
            else:
                start = start() if callable(start) and not isinstance(start, Tensor) else start
                self.unconstrained[name] = self._unconstrain(name, start, constraint)
            self.constraints[name] = constraint
        unconstrained = self.unconstrained[name]
        value: Tensor = transform_to(self.constraints[name])(unconstrained)
        value.unconstrained = weakref.ref(unconstrained)  # type: ignore[attr-defined]
        return value

    def adopt(self, name: str, parameter: Any, constraint: Any, module: nn.Module | None) -> None:
        """Take a module's own parameter under ``name`` (or a name beside it): it is trained in place."""
        # two networks registered under one name are two networks: plain Pyro would train only the first
        name = free(name, self.unconstrained)
        self.unconstrained[name] = parameter
        self.constraints[name] = constraint
        self._known.add(id(parameter))
        if module is not None and not any(module is inner for known in self.modules for inner in known.modules()):
            self.modules.append(module)
            if self.meet is not None:
                self.meet(module)

    def _saved(self, name: str, start: Any) -> Tensor | None:
        return None if self.saved is None else self.saved(name, start)

    def _unconstrain(self, name: str, start: Any, constraint: Any) -> nn.Parameter:
        start = torch.as_tensor(start).detach()
        if not start.is_floating_point():
            raise ProgramError(
                f"{_statement(name)} starts at a tensor of {start.dtype}: only floating parameters can be trained, "
                "write its initial value with a decimal point"
            )
        start = start.to(dtype=self.dtype, device=self.device)
        unconstrained = transform_to(constraint).inv(start) if bool(constraint.check(start).all()) else None
        if unconstrained is None or not bool(torch.isfinite(unconstrained).all()):
            raise ProgramError(
                f"{_statement(name)} starts at {start.flatten()[:3].tolist()}, outside its constraint {constraint} "
                "or on its boundary: change the initial value"
            )
        return nn.Parameter(unconstrained.clone().contiguous())


def _statement(name: str) -> str:
    where = declared_at()
    return f"pyro.param({name!r})" + (f" ({where})" if where else "")


def bind(function: Callable[..., Any], keywords: frozenset[str], parameters: FunctionParameters) -> Callable[..., Any]:
    """Wrap ``function`` so that its parameters are ``parameters`` and only row keywords it names reach it."""
    messenger = _ParameterMessenger(parameters)
    empty: Any = {"params": {}, "constraints": {}}

    def bound(
        *args: Any,
        size: int | None = None,
        index: Tensor | None = None,
        weight: Tensor | None = None,
        strata: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> Any:
        # the store is only a place where PyroModules leave their own parameters: it starts and ends empty
        with pyro.get_param_store().scope(empty.copy()), messenger:
            named = batch_arguments(keywords, size=size, index=index, weight=weight, strata=strata)
            return function(*args, **kwargs, **named)

    return bound


def free(name: str, taken: Container[str]) -> str:
    """``name``, with as many primes as it takes to be nobody else's."""
    while name in taken:
        name += "'"
    return name

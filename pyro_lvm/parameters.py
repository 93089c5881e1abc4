"""Parameters that belong to a fit, and calls that leave the process as they found it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pyro_lvm.errors import ProgramError
from pyro_lvm.program import Program, batch_arguments, restore_mode, training_mode

__all__ = ["BoundProgram", "Snapshot", "isolated"]

Snapshot = Mapping[str, Tensor]
"""Cloned unconstrained parameters and buffers by name; see `BoundProgram.snapshot`."""


@contextmanager
def isolated(seed: int | None, *, validate: bool | None = None) -> Iterator[None]:
    """Run under a random state of one's own; give the process back its RNG, validation flag and param store.

    Args:
        seed: where the random state starts; None continues from the state the process is in.
        validate: Pyro's validation flag inside; None keeps the process's.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    flag = pyro.settings.get("validate_infer") if validate is None else validate
    empty: Any = {"params": {}, "constraints": {}}
    with (
        torch.random.fork_rng(devices=devices),
        pyro.validation_enabled(bool(flag)),
        pyro.get_param_store().scope(empty),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        yield


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
            self.parameters.adopt(name, store[name].unconstrained(), store._constraints[name])
            return
        start = msg["args"][1] if len(msg["args"]) > 1 else msg["kwargs"].get("init_tensor")
        msg["value"] = self.parameters.value(name, start, msg["kwargs"].get("constraint", constraints.real))
        msg["done"] = True


class FunctionParameters:
    """The parameters that plain functions declare with `pyro.param`, created on first use."""

    def __init__(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        self.unconstrained: dict[str, nn.Parameter] = {}
        self.constraints: dict[str, Any] = {}
        self.dtype = dtype
        self.device = device

    def value(self, name: str, start: Any, constraint: Any) -> Tensor:
        """The constrained value of parameter ``name``, created from ``start`` when it is new."""
        if isinstance(start, nn.Parameter) and constraint is constraints.real:  # pyro.module(...)
            self.adopt(name, start, constraint)
            return start
        if name not in self.unconstrained:
            if start is None:
                raise ProgramError(f"pyro.param({name!r}) has no initial value: write pyro.param({name!r}, tensor)")
            start = start() if callable(start) and not isinstance(start, Tensor) else start
            self.unconstrained[name] = self._unconstrain(name, start, constraint)
            self.constraints[name] = constraint
        unconstrained = self.unconstrained[name]
        value: Tensor = transform_to(self.constraints[name])(unconstrained)
        value.unconstrained = weakref.ref(unconstrained)  # type: ignore[attr-defined]
        return value

    def adopt(self, name: str, parameter: Any, constraint: Any) -> None:
        """Take a module's own parameter under ``name`` (or a name beside it): it is trained in place."""
        if any(parameter is known for known in self.unconstrained.values()):
            return
        # two networks registered under one name are two networks: plain Pyro would train only the first
        while name in self.unconstrained:
            name += "'"
        self.unconstrained[name] = parameter
        self.constraints[name] = constraint

    def _unconstrain(self, name: str, start: Any, constraint: Any) -> nn.Parameter:
        start = torch.as_tensor(start).detach()
        if not start.is_floating_point():
            raise ProgramError(
                f"pyro.param({name!r}) starts at a tensor of {start.dtype}: only floating parameters can be trained, "
                "write its initial value with a decimal point"
            )
        start = start.to(dtype=self.dtype if start.dim() else None, device=self.device)
        if not bool(constraint.check(start).all()):
            raise ProgramError(
                f"pyro.param({name!r}) starts at {start.flatten()[:3].tolist()}, outside its constraint {constraint}: "
                "change the initial value"
            )
        return nn.Parameter(transform_to(constraint).inv(start).clone().contiguous())


class BoundProgram:
    """A program together with the parameters it uses in one fit.

    `model` and `guide` take the data positionally (or by keyword) with ``size``, ``index`` and ``weight``; each
    reaches only a callable that names it. `pyro.param` statements are answered by this object.
    """

    def __init__(
        self,
        program: Program,
        make_guide: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.functions = FunctionParameters(dtype, device)
        self.model = bind(program.model, program.keywords["model"], self.functions)
        if make_guide is not None:
            program = program.with_guide(make_guide(self.model))
        if program.guide is None:
            raise ProgramError(f"{program.name} has no guide: pass guide=..., or let fit build one")
        self.program = program
        self.guide = bind(program.guide, program.keywords["guide"], self.functions)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that asks for a gradient, by name, each tensor once."""
        return {name: p for name, p in self._parameters() if p.requires_grad}

    def snapshot(self) -> dict[str, Tensor]:
        """Clones of all parameters (unconstrained) and buffers."""
        return {name: tensor.detach().clone() for name, tensor in self._tensors()}

    @contextmanager
    def holding(self, snapshot: Snapshot | None) -> Iterator[None]:
        """Evaluate with the values of ``snapshot``, in eval mode; the live values come back afterwards."""
        live = {name: (tensor, tensor.data) for name, tensor in self._tensors()}
        before = training_mode(self.program.modules.values(), False)
        try:
            for name, (tensor, _) in live.items():
                if snapshot is not None and name in snapshot:
                    tensor.data = snapshot[name]
            yield
        finally:
            for tensor, value in live.values():
                tensor.data = value
            restore_mode(before)

    def load(self, snapshot: Snapshot) -> None:
        """Write the values of ``snapshot`` into the live tensors."""
        with torch.no_grad():
            for name, tensor in self._tensors():
                tensor.copy_(snapshot[name])

    def constrained(self) -> dict[str, Tensor]:
        """Every parameter in its natural, constrained form, cloned."""
        values: dict[str, Tensor] = {}
        for prefix, module in self.program.modules.items():
            natural = getattr(module, "constrained", None)
            named = natural() if callable(natural) else _constrained_parameters(module)
            values.update({_join(prefix, name): value for name, value in named.items()})
        owned = {id(p) for module in self.program.modules.values() for p in module.parameters()}
        for name, unconstrained in self.functions.unconstrained.items():
            if id(unconstrained) not in owned:
                values[name] = transform_to(self.functions.constraints[name])(unconstrained)
        return {name: value.detach().clone() for name, value in values.items()}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        seen: set[int] = set()
        named = [
            (_join(prefix, name), parameter)
            for prefix, module in self.program.modules.items()
            for name, parameter in nn.Module.named_parameters(module)
        ]
        for name, parameter in [*named, *self.functions.unconstrained.items()]:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._parameters()
        for prefix, module in self.program.modules.items():
            for name, buffer in module.named_buffers():
                yield _join(prefix, name), buffer


def bind(
    function: Callable[..., Any], keywords: frozenset[str], parameters: FunctionParameters
) -> Callable[..., Any]:
    """Wrap ``function`` so that its parameters are ``parameters`` and only row keywords it names reach it."""
    messenger = _ParameterMessenger(parameters)
    empty: Any = {"params": {}, "constraints": {}}

    def bound(
        *args: Any,
        size: int | None = None,
        index: Tensor | None = None,
        weight: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # the store is only a place where PyroModules leave their own parameters: it starts and ends empty
        with pyro.get_param_store().scope(dict(empty)), messenger:
            return function(*args, **kwargs, **batch_arguments(keywords, size, index, weight))

    return bound


def _constrained_parameters(module: nn.Module) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for name, parameter in nn.Module.named_parameters(module):
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        declared = getattr(owner, "_pyro_params", {})
        plain = leaf.removesuffix("_unconstrained")
        if plain != leaf and plain in declared:
            values[_join(path, plain)] = transform_to(declared[plain][0])(parameter)
        else:
            values[name] = parameter
    return values


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name

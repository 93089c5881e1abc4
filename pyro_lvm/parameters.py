"""Parameters that belong to a fit, and calls that leave the process as they found it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import transform_to

from pyro_lvm.errors import ProgramError
from pyro_lvm.function_parameters import FunctionParameters, bind, free
from pyro_lvm.program import Program, restore_mode, training_mode

__all__ = ["BoundProgram", "Declared", "Snapshot", "Untouched", "generator_for", "isolated"]

Snapshot = Mapping[str, Tensor]
"""Cloned unconstrained parameters and buffers by name; see `BoundProgram.snapshot`."""


def generator_for(seed: int | None, device: torch.device) -> torch.Generator:
    """A generator of its own, seeded, or with the system's entropy."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


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
            # torch.manual_seed would also leave a seed behind for a CUDA that has not started yet
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
        yield


class Untouched:
    """What modules were before a call: `restore` puts back values, dtypes, devices, and lazily made submodules."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._attributes: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
        self._values: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._gradients: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        for module in modules:
            self.remember(module)

    def remember(self, module: nn.Module) -> None:
        """Take ``module``, as it is now, into what `restore` puts back; a module that is known is left as it was."""
        for inner in module.modules():
            if id(inner) not in self._attributes:
                # an autoguide builds itself on first use: its dictionaries must lose what came later
                kept = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(inner).items()}
                self._attributes[id(inner)] = (inner, kept)
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in self._values:
                self._values[id(tensor)] = (tensor, tensor.data, tensor.detach().clone())
                gradient = tensor.grad
                self._gradients[id(tensor)] = (tensor, gradient, None if gradient is None else gradient.data.clone())

    def restore(self) -> None:
        """Put everything back."""
        for inner, attributes in self._attributes.values():
            vars(inner).clear()
            # dictionaries of its own, so that what happens to them later is no part of what is kept
            vars(inner).update({k: v.copy() if isinstance(v, dict) else v for k, v in attributes.items()})
        for tensor, storage, value in self._values.values():
            tensor.grad = None
            tensor.data = storage.copy_(value)
        for tensor, gradient, storage_of_gradient in self._gradients.values():
            if gradient is not None and storage_of_gradient is not None:
                gradient.data = storage_of_gradient.clone()
            tensor.grad = gradient


class Declared(NamedTuple):
    """A parameter that a statement declares.

    Attributes:
        name: in `pyro.param`; None for a `PyroParam` of a module.
        tensor: its name in `BoundProgram.snapshot`.
        constraint: the values that it may have.
    """

    name: str | None
    tensor: str
    constraint: Any


class BoundProgram:
    """A program together with the parameters it uses in one fit.

    `model` and `guide` take the data positionally (or by keyword) with ``size``, ``index``, ``weight`` and
    ``strata``; each reaches only a callable that names it. `pyro.param` statements are answered by this object.

    Attributes:
        first_rows: what a program from a file has still to do with the first data it sees, or None.
    """

    def __init__(
        self,
        program: Program,
        make_guide: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        meet: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.functions = FunctionParameters(dtype, device, meet)
        self.first_rows: Callable[[BoundProgram, Any], None] | None = None
        self.model = bind(program.model, program.keywords["model"], self.functions)
        if make_guide is not None:
            program = program.with_guide(make_guide(self.model))
        if program.guide is None:
            raise ProgramError(f"{program.name} has no guide: pass guide=..., or let fit build one")
        self.program = program
        self.guide = bind(program.guide, program.keywords["guide"], self.functions)

    def with_guide(self, guide: Callable[..., Any]) -> BoundProgram:
        """The same parameters, with a guide that has none."""
        other = copy.copy(self)
        other.program = replace(self.program, guide=guide)
        other.guide = guide
        return other

    @property
    def modules(self) -> list[nn.Module]:
        """The program's own modules, and those that its functions register."""
        own = list(self.program.modules.values())
        known = {id(inner) for module in own for inner in module.modules()}
        return own + [module for module in self.functions.modules if id(module) not in known]

    def has_network(self) -> bool:
        """Whether the pair holds a neural network: a linear, convolutional or recurrent layer."""
        kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)
        return any(isinstance(layer, kinds) for module in self.modules for layer in module.modules())

    def reference(self, snapshot: Snapshot | None) -> Tensor | None:
        """A floating tensor whose dtype and device the data must have: of ``snapshot``, else of the live parameters."""
        values = snapshot.values() if snapshot is not None else (tensor for _, tensor in self.tensors())
        return next((value for value in values if value.is_floating_point()), None)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that asks for a gradient, by name, each tensor once."""
        return {name: p for name, p in self._parameters() if p.requires_grad}

    def snapshot(self) -> dict[str, Tensor]:
        """Clones of all parameters (unconstrained) and buffers."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors()}

    @contextmanager
    def holding(self, snapshot: Snapshot | None) -> Iterator[None]:
        """Evaluate with the values of ``snapshot``, in eval mode; the live values come back afterwards."""
        live = {name: (tensor, tensor.data) for name, tensor in self.tensors()}
        before = training_mode(self.modules, False)
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
            for name, tensor in self.tensors():
                if name in snapshot:
                    tensor.copy_(snapshot[name])

    def constrained(self) -> dict[str, Tensor]:
        """Every parameter in its natural, constrained form, cloned."""
        values: dict[str, Tensor] = {}
        for prefix, module in self.program.modules.items():
            natural = getattr(module, "constrained", None)
            named = natural() if callable(natural) else _constrained_parameters(module)
            values.update({_join(prefix, name): value for name, value in named.items()})
        for name, parameter in self._of_functions():
            values[free(name, values)] = transform_to(self.functions.constraints[name])(parameter)
        return {name: value.detach().clone() for name, value in values.items()}

    def declared(self) -> dict[str, Declared]:
        """What `pyro.param` and `PyroParam` statements declare, by name in `constrained`."""
        found: dict[str, Declared] = {}
        taken: set[str] = set()
        for prefix, module in self.program.modules.items():
            natural = getattr(module, "constrained", None)
            if callable(natural):
                taken |= {_join(prefix, name) for name in natural()}
                continue
            for name, _ in nn.Module.named_parameters(module):
                plain, constraint = _natural_name(module, name)
                taken.add(_join(prefix, plain))
                if constraint is not None:
                    found[_join(prefix, plain)] = Declared(None, _join(prefix, name), constraint)
        tensors = {id(parameter): name for name, parameter in self._parameters()}
        for name, parameter in self._of_functions():
            param = free(name, taken)
            taken.add(param)
            found[param] = Declared(name, tensors[id(parameter)], self.functions.constraints[name])
        return found

    def _of_modules(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, module in self.program.modules.items():
            for name, parameter in nn.Module.named_parameters(module):
                yield _join(prefix, name), parameter

    def _of_functions(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of functions that are not the program's modules' own."""
        owned = {id(parameter) for _, parameter in self._of_modules()}
        for name, parameter in self.functions.unconstrained.items():
            if id(parameter) not in owned:
                yield name, parameter

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, under a name of its own."""
        seen: set[int] = set()
        names: set[str] = set()
        for name, parameter in (*self._of_modules(), *self._of_functions()):
            if id(parameter) not in seen:
                name = free(name, names)
                seen.add(id(parameter))
                names.add(name)
                yield name, parameter

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer by name, each parameter once."""
        yield from self._parameters()
        for prefix, module in self.program.modules.items():
            for name, buffer in module.named_buffers():
                yield _join(prefix, name), buffer
        for number, module in enumerate(self.modules[len(self.program.modules) :]):
            for name, buffer in module.named_buffers():
                yield f"pyro.module({number}).{name}", buffer


def _constrained_parameters(module: nn.Module) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for name, parameter in nn.Module.named_parameters(module):
        plain, constraint = _natural_name(module, name)
        values[plain] = parameter if constraint is None else transform_to(constraint)(parameter)
    return values


def _natural_name(module: nn.Module, name: str) -> tuple[str, Any]:
    """The name that a module's parameter has in its natural form, and the constraint that a `PyroParam` gives it."""
    path, _, leaf = name.rpartition(".")
    declared = getattr(module.get_submodule(path), "_pyro_params", {})
    plain = leaf.removesuffix("_unconstrained")
    if plain != leaf and plain in declared:
        return _join(path, plain), declared[plain][0]
    return name, None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name

"""A saved fit, read again: nothing is run that a file names beyond classes of this package."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lvm.data import Rows
from pyro_lvm.errors import StorageError
from pyro_lvm.evaluation import batch_to_trace
from pyro_lvm.guides import WORDS, make_guide
from pyro_lvm.inference.record import Fit
from pyro_lvm.inference.saving import room_for, what_it_is
from pyro_lvm.missing import MissingValues
from pyro_lvm.parameters import BoundProgram, Snapshot, Untouched, isolated
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import Program, as_program, floating_dtype
from pyro_lvm.storage.classes import built
from pyro_lvm.storage.folder import CONFIG, read_folder
from pyro_lvm.storage.tree import unpack

__all__ = ["load"]

_SHOWN = ("program", "guide", "estimator", "n", "steps", "stopped")
"""What a record says of itself."""


def load(path: str | os.PathLike[str], program: Any = None, device: torch.device | str | None = None) -> Fit:
    """Read a fit that `Fit.save` wrote; it needs neither the data nor a step of training.

    The digests in the folder notice accidents, not forgery. A forged folder may say what it likes, but runs no code:
    there is no pickle in it, and it can name no class but those of this package.

    Args:
        path: the folder.
        program: what was fitted, as it was handed to `fit`: needed unless that was a built-in program that holds
            nothing of yours. If `fit` was also given a guide that is no recipe: the tuple (program, guide). Its
            modules get the saved values; parameters that functions make with `pyro.param` get them at the first
            evaluation.
        device: where to; None is the CPU.

    Returns:
        The `Fit`, which evaluates as the saved one did. A ``program`` that was not passed is made anew.

    Raises:
        StorageError: if the folder cannot be read, is damaged, is none of ours, or holds another program's
            parameters. ``program`` is then as it was. Parameters that are made at the first evaluation are compared
            there.

    Example:
        >>> import tempfile, torch, pyro_lvm as lvm
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> fit = lvm.fit(lvm.PPCA(num_features=3, latent_dim=1), x, steps=20, seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fit.save(f"{folder}/ppca")
        ...     loaded = lvm.load(f"{folder}/ppca")
        >>> bool((loaded.log_prob(x) == fit.log_prob(x)).all())
        True
    """
    folder = Path(path)
    where = torch.device("cpu" if device is None else device)
    try:
        config, tree = _read(folder)
        return _fit(config, tree, program, where, folder)
    except StorageError as error:
        text = str(error)
        raise error if str(folder) in text else StorageError(f"{folder}: {text}") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the text says, its tensors in their places, and the tree beside it."""
    config, tree = read_folder(folder)
    tree = _of(tree, dict, "the file of tensors")
    try:
        content = _of(unpack(config, _tensors(tree, "config")), dict, CONFIG)
    except RecursionError as error:
        raise StorageError(f"{CONFIG} is damaged ({error}): take a copy of it") from error
    return content, tree


def _fit(config: dict[str, Any], tree: dict[str, Any], program: Any, where: torch.device, folder: Path) -> Fit:
    snapshot = {name: value.to(where) for name, value in _tensors(tree, "snapshot").items()}
    params = {name: value.to(where) for name, value in _tensors(tree, "params").items()}
    info, history = _of(config.get("info"), dict, "info"), _of(config.get("history"), dict, "history")
    lacking = [name for name in _SHOWN if name not in info]
    if lacking:
        raise StorageError(f"{CONFIG} lacks {lacking[0]!r} in its info: take a copy of it")
    elbo = _of(config.get("elbo"), float, "elbo")
    made = _of(config.get("program"), dict, "program")
    guide = _of(config.get("guide"), dict, "guide")
    source = _source(made, program, guide, snapshot)
    resolved = _resolved(source, guide, _missing(tree.get("missing"), where))
    if program is not None and resolved.name != made.get("name") and guide["kind"] != "beside":
        raise StorageError(f"it holds a fit of {made.get('name')!r:.80}, and program is {resolved.name}: pass that one")
    if program is not None:
        _require_same_arguments(made, what_it_is(resolved, guide, snapshot))
    recipe = guide.get("recipe")
    first = _First(resolved, recipe, snapshot, floating_dtype(snapshot.values()), where, folder)
    bound = first.at_once()
    shown = source[0] if guide["kind"] == "beside" else source
    return Fit(shown, params, history, elbo, info, bound, snapshot)


def _require_same_arguments(made: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a built-in program that was made with other arguments: its parameters may fit all the same."""
    if made.get("class") is None or here.get("class") is None:
        return
    there, now = _of(made.get("arguments"), dict, "arguments"), here["arguments"]
    for name in {**there, **now}:
        if repr(there.get(name)) != repr(now.get(name)):
            raise StorageError(
                f"it holds a fit of {made['class']} with {name}={there.get(name)!r:.80}, and program has "
                f"{name}={now.get(name)!r:.80}: pass what was fitted"
            )


def _source(made: dict[str, Any], program: Any, guide: Mapping[str, Any], snapshot: Snapshot) -> Any:
    """What was handed to `fit`: what is handed in now, or made anew."""
    beside = guide.get("kind") == "beside"
    if program is not None:
        if beside and not (isinstance(program, tuple) and len(program) == 2):
            raise StorageError("the fit was given a guide beside its program: pass program=(program, guide)")
        return program
    if made.get("class") is None:
        text = "program=(program, guide), as fit was given them" if beside else "program=..., as fit was given it"
        raise StorageError(
            f"{made.get('name')!r:.80} (from {made.get('from')!r:.200}) is code, which no file holds: pass {text}"
        )
    with isolated(0):
        source = built({"class": made["class"], "arguments": made.get("arguments")}, room_for(snapshot))
    if not isinstance(source, nn.Module) or not callable(getattr(source, "model", None)):
        raise StorageError(f"{made['class']} is no program")
    return source


def _resolved(source: Any, guide: Mapping[str, Any], missing: MissingValues | None) -> Program:
    kind, recipe = guide.get("kind"), guide.get("recipe")
    if kind not in ("own", "recipe", "conjugate", "beside") or (kind == "recipe") != (recipe in WORDS):
        raise StorageError(f"a guide {kind!r:.40} of {recipe!r:.40} is not known")
    if kind == "beside":
        program = as_program(*source)
    elif kind == "conjugate":
        program = as_program(source)
        hook = program.hook("conjugate_guide")
        if hook is None:
            raise StorageError(f"the fit has a conjugate guide, and {program.name} has no method conjugate_guide()")
        try:
            program = program.with_guide(hook())
        except ValueError as error:
            raise StorageError(f"{program.name} gives no conjugate guide ({error})") from error
    else:
        program = as_program(source)
        if kind == "recipe":
            program = replace(program, guide=None)
        elif program.guide is None:
            raise StorageError(f"the fit has its program's guide, and {program.name} has none: pass (model, guide)")
    if missing is None:
        return program
    wrapped = None if program.guide is None else missing.guide(program.guide)
    return replace(program, model=missing.model(program.model), guide=wrapped, missing=missing)


def _missing(tree: Any, where: torch.device) -> MissingValues | None:
    if tree is None:
        return None
    tree = _of(tree, dict, "missing")
    args, kwargs = _of(tree.get("args"), tuple, "missing"), _of(tree.get("kwargs"), dict, "missing")
    for value in (*args, *kwargs.values()):
        if value is not None:
            _of(value, Tensor, "missing")
    placed = tuple(None if value is None else value.to(where) for value in args)
    return MissingValues(placed, {k: None if v is None else v.to(where) for k, v in kwargs.items()}, active=False)


@dataclass(frozen=True)
class _First:
    """Gives a program its saved values: at once, or where it makes parameters on the way, at its first evaluation."""

    program: Program
    recipe: str | None
    snapshot: Snapshot
    dtype: torch.dtype | None
    device: torch.device
    folder: Path

    def at_once(self) -> BoundProgram:
        """The program with its values, or one that waits for data."""
        alone = self.program if self.program.guide is not None else self.program.with_guide(_waiting)
        untouched = Untouched(alone.modules.values())
        bound = BoundProgram(alone, None, self.dtype, self.device)
        try:
            for module in alone.modules.values():
                self._place(module)
            tensors = dict(bound.tensors())
            self._compare(tensors)
            if self.recipe is None and tensors.keys() == self.snapshot.keys():
                bound.load(self.snapshot)
            else:
                bound.first_rows = self
                untouched.restore()
        except BaseException:
            untouched.restore()
            raise
        return bound

    def __call__(self, bound: BoundProgram, rows: Rows) -> None:
        """Make what is made on the way, compare it, and only then give everything its values."""
        program = self.program
        untouched = Untouched(bound.program.modules.values())

        def meet(module: nn.Module) -> None:
            untouched.remember(module)
            self._place(module)

        try:
            for module in program.modules.values():
                self._place(module)
            batch = rows.first(batch_to_trace(program, rows))
            made = BoundProgram(program, self._maker(rows, meet), self.dtype, self.device, meet)
            traced(made.model, made.guide, batch)
            tensors = dict(made.tensors())
            self._compare(tensors)
            lacking = [name for name in self.snapshot if name not in tensors]
            if lacking:
                raise StorageError(f"{self.folder} holds {lacking[0]!r}, and {program.name} makes no such parameter")
            made.load(self.snapshot)
        except BaseException:
            untouched.restore()
            raise
        made.functions.meet = None
        vars(bound).update(vars(made))

    def _maker(self, rows: Rows, meet: Callable[[nn.Module], None]) -> Callable[..., Any] | None:
        if self.recipe is None:
            return None
        program, recipe = self.program, self.recipe
        alone = BoundProgram(program.with_guide(_waiting), None, self.dtype, self.device, meet)
        structure = traced(alone.model, None, rows.first(batch_to_trace(program, rows)))
        index = program.names("index")

        def build(model: Callable[..., Any]) -> Callable[..., Any]:
            return make_guide(model, structure, recipe, names_index=index, minibatches=False)  # type: ignore[arg-type]

        return build

    def _place(self, module: nn.Module) -> None:
        module.to(device=self.device, dtype=self.dtype)

    def _compare(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            saved = self.snapshot.get(name)
            if saved is None:
                raise StorageError(f"{self.program.name} has a tensor {name!r} that {self.folder} does not hold")
            if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                raise StorageError(
                    f"{name!r} of {self.program.name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and in "
                    f"{self.folder} {saved.dtype} of shape {tuple(saved.shape)}: pass the program, and evaluate on "
                    "data, that the fit was made with"
                )


def _waiting(*args: Any, **kwargs: Any) -> None:
    """Stands where a guide will be, once there are data to make it from."""


def _tensors(tree: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = _of(tree.get(name), dict, name)
    for key, value in found.items():
        _of(key, str, name)
        _of(value, Tensor, f"{name}[{key!r:.80}]")
    return found


def _of(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise StorageError(f"{name} is {type(value).__name__} where {kind.__name__} is expected: take a copy of it")
    return value

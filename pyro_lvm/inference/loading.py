"""A saved fit, read again: nothing is run that a file names beyond classes of this package."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lvm.errors import ProgramWarning, StorageError
from pyro_lvm.guides import WORDS
from pyro_lvm.inference.first_evaluation import FirstEvaluation, SavedValues
from pyro_lvm.inference.record import Fit
from pyro_lvm.inference.saving import OF_EVERY_RECORD, origins, room_for, what_it_is
from pyro_lvm.inference.sites import SiteTable
from pyro_lvm.missing import MissingValues
from pyro_lvm.parameters import Declared, Snapshot, isolated
from pyro_lvm.program import Program, as_program
from pyro_lvm.storage.classes import built
from pyro_lvm.storage.folder import CONFIG, read_folder
from pyro_lvm.storage.tree import unpack

__all__ = ["load"]

_SHOWN = {"program": str, "guide": str, "estimator": str, "n": int, "steps": int, "stopped": str, "versions": dict}
"""What a record says of itself."""


def load(path: str | os.PathLike[str], program: Any = None, device: torch.device | str | None = None) -> Fit:
    """Read a fit that `Fit.save` wrote; it needs neither the data nor a step of training.

    The digests in the folder notice accidents, not forgery. A forged folder may say what it likes, but runs no code:
    there is no pickle in it, and it can name no class but those of this package.

    Code of one's own is known again by its name, its parameters with their constraints, and its sites with their
    distributions: where one is another, loading or the first evaluation refuses. Where it stands is no such mark: a
    script that is run is ``__main__``, and what is imported from it later is not; code is moved between modules, and
    the fit is still its fit. So what comes from ``__main__`` is taken as it is, and another module is warned of.

    Args:
        path: the folder.
        program: what was fitted, as it was handed to `fit`: needed unless that was a built-in program that holds
            nothing of yours. If `fit` was also given a guide that is no recipe: the tuple (program, guide). Its
            modules get the saved values now; parameters that functions make with `pyro.param`, networks that they
            register and guides made from the model get them when they are first made, by an evaluation.
        device: where to; None is the CPU.

    Returns:
        The `Fit`, which evaluates as the saved one did. A ``program`` that was not passed is made anew.

    Raises:
        StorageError: if the folder cannot be read, is damaged, is none of ours, or holds another program's
            parameters. ``program`` is then as it was. Parameters that are made at the first evaluation are compared
            there.

    Warns:
        ProgramWarning: if ``program`` stands in another module than what was fitted.

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
    info, sites = _info(config), _sites(config)
    history, elbo = _key(config, "history", dict), _key(config, "elbo", float)
    made, guide = _key(config, "program", dict), _key(config, "guide", dict)
    source = _source(made, program, guide, snapshot)
    resolved = _resolved(source, guide, _missing(tree.get("missing"), where))
    if program is not None and resolved.name != made.get("name") and guide["kind"] != "beside":
        raise StorageError(f"it holds a fit of {made.get('name')!r:.80}, and program is {resolved.name}: pass that one")
    if program is not None:
        _require_same_arguments(made, what_it_is(resolved, guide, snapshot))
        _warn_of_others(made, guide, program)
    declared = (
        _declared_in_format_1(snapshot, params)
        if config["format"] == 1
        else _declared(_key(config, "declared", dict), snapshot, params)
    )
    saved = SavedValues(str(folder), resolved.name, snapshot, params, declared, sites, info["n"])
    bound = FirstEvaluation(resolved, guide.get("recipe"), saved, where).at_once()
    shown = source[0] if guide["kind"] == "beside" else source
    return Fit(shown, params, history, elbo, info, sites, bound, snapshot)


def _info(config: dict[str, Any]) -> dict[str, Any]:
    """The record of how it was made; what stands by itself in the file comes back into it."""
    kept = _key(config, "info", dict)
    apart = {} if config["format"] == 1 else {key: _key(config, key, object) for key in OF_EVERY_RECORD}
    info = {**kept, **apart}
    for name, kind in _SHOWN.items():
        if name not in info:
            raise StorageError(f"{CONFIG} lacks {name!r}: take a copy of it")
        _of(info[name], kind, name)
    return info


def _sites(config: dict[str, Any]) -> SiteTable:
    if config["format"] == 1:  # which does not say
        return {}
    sites: dict[str, Any] = _key(config, "sites", dict)
    for part in ("model", "guide") if sites else ():
        for entry in _key(sites, part, list):
            for key in ("name", "kind", "distribution", "plates", "event_shape"):
                _key(_of(entry, dict, f"a site of the {part}"), key, object)
    return sites


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


def _warn_of_others(made: Mapping[str, Any], guide: Mapping[str, Any], program: Any) -> None:
    """Say so where the code stands elsewhere than when it was fitted."""
    if made.get("class") is not None:
        return
    there = [*_of(made.get("from"), list, "from"), *_of(guide.get("from", []), list, "from")]
    handed = program if guide["kind"] == "beside" else (program,)
    here = [named for part in handed for named in origins(part)]
    moved = [
        f"{before} there, {module}.{name} here"
        for before, (module, name) in zip(there, here, strict=False)
        if before != f"{module}.{name}" and before != f"__main__.{name}"
        if module != "__main__" or not str(before).endswith(f".{name}")
    ]
    if moved:
        warnings.warn(
            f"the fit is of code that stands elsewhere ({moved[0]:.300}): if it has only been moved, all is well; save "
            "the loaded fit to be rid of this warning. Else pass what was fitted",
            ProgramWarning,
            stacklevel=4,
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


def _declared(tree: dict[str, Any], snapshot: Snapshot, params: Mapping[str, Tensor]) -> dict[str, Declared]:
    """What the file says of parameters that have a constraint."""
    found: dict[str, Declared] = {}
    for param, entry in tree.items():
        fields = _of(entry, dict, f"declared[{param!r:.80}]")
        name, tensor, constraint = (fields.get(key) for key in ("name", "tensor", "constraint"))
        known = isinstance(tensor, str) and tensor in snapshot and param in params
        if not known or not all(isinstance(words, str | None) for words in (name, constraint)):
            raise StorageError(f"{CONFIG} declares {param!r:.80} as {entry!r:.80}, which is no parameter of the fit")
        found[param] = Declared(name, tensor, constraint)
    return found


def _declared_in_format_1(snapshot: Snapshot, params: Mapping[str, Tensor]) -> dict[str, Declared]:
    """The same where the file does not say: names in `pyro.param` are those of tensors, but for primes."""
    tensors = {name.rstrip("'"): name for name in snapshot if name in params}  # a function's come after a module's
    return {tensor: Declared(name, tensor, None) for name, tensor in tensors.items()}


def _tensors(tree: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = _of(tree.get(name), dict, name)
    for key, value in found.items():
        _of(key, str, name)
        _of(value, Tensor, f"{name}[{key!r:.80}]")
    return found


def _key(config: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in config:
        raise StorageError(f"{CONFIG} lacks {name!r}: take a copy of it")
    return _of(config[name], kind, name)


def _of(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise StorageError(f"{name} is {type(value).__name__} where {kind.__name__} is expected: take a copy of it")
    return value

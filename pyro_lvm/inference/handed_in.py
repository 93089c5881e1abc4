"""The program of a saved fit: handed in by the caller and known again, or made of classes of this package."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lvm.errors import ProgramWarning, StorageError
from pyro_lvm.guides import AUTOGUIDES, WORDS, nothing_to_approximate
from pyro_lvm.inference.expected import of_kind
from pyro_lvm.inference.saving import origins, room_for
from pyro_lvm.missing import MissingValues
from pyro_lvm.parameters import Snapshot, isolated
from pyro_lvm.per_datum import from_description
from pyro_lvm.program import Program, as_program
from pyro_lvm.storage.classes import built
from pyro_lvm.storage.folder import CONFIG

__all__ = ["missing_of", "recipe_of", "require_same", "resolved", "source_of", "warn_of_others"]


def source_of(made: dict[str, Any], program: Any, guide: Mapping[str, Any], snapshot: Snapshot) -> Any:
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


def resolved(
    source: Any, guide: Mapping[str, Any], missing: MissingValues | None, values: Mapping[str, Tensor]
) -> Program:
    """The program that was fitted, with its guide, or without where one is built at the first evaluation.

    Args:
        source: what was handed to `fit`.
        guide: what the file says of the guide.
        missing: what it does about missing values.
        values: constrained values by name in `pyro.param`.

    Raises:
        StorageError: if the guide is not to be had.
    """
    kind, recipe, each = guide.get("kind"), guide.get("recipe"), guide.get("per datum")
    known = kind in ("own", "recipe", "conjugate", "beside", "draws", "nowhere")
    if not known or (kind == "recipe") != (recipe_of(guide) is not None) or (kind == "nowhere" and each is None):
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
        if kind in ("recipe", "draws"):
            program = replace(program, guide=None)
        elif kind == "nowhere":
            program = program.with_guide(nothing_to_approximate)
        elif program.guide is None:
            raise StorageError(f"the fit has its program's guide, and {program.name} has none: pass (model, guide)")
    if missing is not None:
        wrapped = None if program.guide is None else missing.guide(program.guide)
        program = replace(program, model=missing.model(program.model), guide=wrapped, missing=missing)
    if each is None:
        return program
    shared = None if kind == "nowhere" else program.guide
    try:
        tree = of_kind(each, dict, "the guide of each datum")
        return program.with_guide(from_description(tree, values, shared, program.keywords["guide"]))
    except ValueError as error:
        raise StorageError(f"the guide of each datum cannot be made ({error}): take a copy of {CONFIG}") from error


def recipe_of(guide: Mapping[str, Any]) -> Any:
    """What builds the guide, as `make_guide` takes it; None where nothing does, or the word is not known."""
    word = guide.get("recipe")
    if not isinstance(word, str):
        return None
    return word if word in WORDS else AUTOGUIDES.get(word)


def missing_of(tree: Any, where: torch.device) -> MissingValues | None:
    """What the program does about missing values, or None."""
    if tree is None:
        return None
    tree = of_kind(tree, dict, "missing")
    args, kwargs = of_kind(tree.get("args"), tuple, "missing"), of_kind(tree.get("kwargs"), dict, "missing")
    for value in (*args, *kwargs.values()):
        if value is not None:
            of_kind(value, Tensor, "missing")
    placed = tuple(None if value is None else value.to(where) for value in args)
    return MissingValues(placed, {k: None if v is None else v.to(where) for k, v in kwargs.items()}, active=False)


def require_same(made: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a built-in program that was made with other arguments: its parameters may fit all the same."""
    if made.get("class") is None or here.get("class") is None:
        return
    there, now = of_kind(made.get("arguments"), dict, "arguments"), here["arguments"]
    for name in {**there, **now}:
        if repr(there.get(name)) != repr(now.get(name)):
            raise StorageError(
                f"it holds a fit of {made['class']} with {name}={there.get(name)!r:.80}, and program has "
                f"{name}={now.get(name)!r:.80}: pass what was fitted"
            )


def warn_of_others(made: Mapping[str, Any], guide: Mapping[str, Any], program: Any) -> None:
    """Say so where the code stands elsewhere than when it was fitted."""
    if made.get("class") is not None:
        return
    there = [*of_kind(made.get("from"), list, "from"), *of_kind(guide.get("from", []), list, "from")]
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

"""A fit written to a folder: what it is in JSON that can be read, its tensors beside it, and no pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lvm.errors import StorageError
from pyro_lvm.guides import WORDS, nothing_to_approximate
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.program import Program, as_program
from pyro_lvm.storage.classes import built, described
from pyro_lvm.storage.folder import write_folder
from pyro_lvm.storage.tree import pack

__all__ = ["OF_EVERY_RECORD", "origins", "room_for", "what_it_is", "write_fit"]

OF_EVERY_RECORD = ("estimator", "seed", "n", "versions")
"""Entries of ``info`` that stand by themselves in the file."""


def write_fit(fit: Any, path: str | os.PathLike[str]) -> None:
    """Write a `Fit` to the folder ``path``; `pyro_lvm.load` reads it.

    Raises:
        StorageError: if the fit cannot be written without code, the folder holds something else, or the system refuses.
    """
    bound: BoundProgram = fit._bound
    missing = bound.program.missing
    guide = _guide(fit)
    content = {
        "program": what_it_is(bound.program, guide, fit._snapshot),
        "guide": guide,
        "declared": _declared(bound),
        **{key: fit.info[key] for key in OF_EVERY_RECORD},
        "sites": dict(fit.sites),
        "elbo": fit.elbo,
        "info": {key: value for key, value in fit.info.items() if key not in OF_EVERY_RECORD},
        "history": dict(fit.history),
    }
    plain, tensors = pack(content, "config")
    tree = {
        "params": dict(fit.params),
        "snapshot": dict(fit._snapshot),
        "missing": None if missing is None else {"args": missing.args, "kwargs": dict(missing.kwargs)},
        "config": tensors,
    }
    write_folder(Path(path), plain, tree)


def room_for(snapshot: Mapping[str, Tensor]) -> int:
    """How many numbers a tensor of a program with these parameters may have."""
    return 4096 + sum(tensor.numel() for tensor in snapshot.values())


def _declared(bound: BoundProgram) -> dict[str, Any]:
    """What is made again by statements of the program; of what has not been made yet since it was loaded, as it was."""
    saved = getattr(bound.functions.saved, "declared", {})
    return {
        param: {
            "name": entry.name,
            "tensor": entry.tensor,
            "constraint": None if entry.constraint is None else str(entry.constraint),
        }
        for param, entry in {**saved, **bound.declared()}.items()
    }


def _guide(fit: Any) -> dict[str, Any]:
    """How the guide is to be had again."""
    program: Program = fit._bound.program
    word = fit.info["guide"]
    if word == "per datum":
        raise StorageError(
            "this fit has a guide with parameters for each datum (amortized=False), which cannot be made without the "
            "data: save the fit that it started from"
        )
    guide = program.guide
    own = as_program(program.source).guide
    if program.missing is not None:
        guide = getattr(guide, "__wrapped__", guide)
    if own is not None and guide == own:
        return {"kind": "own"}
    waiting = fit._bound.first_rows is not None  # loaded, and not asked anything yet
    made = waiting or guide is nothing_to_approximate or isinstance(guide, AutoGuide)
    if made and word in WORDS:
        return {"kind": "recipe", "recipe": word}
    if made and word != "given":
        words = ", ".join(map(repr, WORDS))
        raise StorageError(
            f"the guide {word} was made from a class that a file may not name: fit with one of {words}, or pass an "
            "object, guide=AutoGuideClass(model)"
        )
    if word == "conjugate":
        if program.hook("conjugate_guide") is None:
            raise StorageError(
                f"{program.name} gives its guide only together with its updates: give it a method conjugate_guide() "
                "that returns a new one"
            )
        return {"kind": "conjugate"}
    return {"kind": "beside", "from": _dotted(guide)}


def what_it_is(program: Program, guide: Mapping[str, Any], snapshot: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the program is made of, if that is ours alone; else what it is called."""
    source = program.source
    named = {"class": None, "name": program.name, "from": _dotted(source)}
    if guide["kind"] == "beside":
        return named
    try:
        tree = described(source, program.name)
        with isolated(0):
            again = built(tree, room_for(snapshot))
    except StorageError:
        return named
    # who has put another network into it must bring it along
    same = isinstance(tree, dict) and "class" in tree and repr(again) == repr(source)
    return {**named, **tree} if same else named


def _dotted(source: Any) -> list[str]:
    return [".".join(names) for names in origins(source)]


def origins(source: Any) -> list[tuple[str, str]]:
    """Module and qualified name of what was handed over; of an object those of its class."""
    parts = source if isinstance(source, tuple) else (source,)
    named = (part if hasattr(part, "__qualname__") else type(part) for part in parts)
    return [(part.__module__, part.__qualname__) for part in named]

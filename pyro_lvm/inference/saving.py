"""A fit written to a folder: what it is in JSON that can be read, its tensors beside it, and no pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_lvm.errors import StorageError
from pyro_lvm.guides import AUTOGUIDES, WORDS, nothing_to_approximate
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.per_datum import PerDatumGuide
from pyro_lvm.per_datum import described as of_each
from pyro_lvm.program import Program, as_program
from pyro_lvm.storage.classes import built, described
from pyro_lvm.storage.folder import write_folder
from pyro_lvm.storage.tree import pack

__all__ = ["OF_EVERY_RECORD", "origins", "room_for", "what_it_is", "write_chains", "write_fit"]

OF_EVERY_RECORD = ("estimator", "seed", "n", "versions")
"""Entries of ``info`` that stand by themselves in the file."""


def write_fit(fit: Any, path: str | os.PathLike[str]) -> None:
    """Write a `Fit` to the folder ``path``; `pyro_lvm.load` reads it.

    Raises:
        StorageError: if the fit cannot be written without code, the folder holds something else, or the system refuses.
    """
    missing = fit._bound.program.missing
    content = {"record": "fit", "elbo": fit.elbo, "history": dict(fit.history)}
    means = None if missing is None else {"args": missing.args, "kwargs": dict(missing.kwargs)}
    _write(path, fit, _guide(fit), content, {"params": dict(fit.params), "missing": means})


def write_chains(chains: Any, path: str | os.PathLike[str]) -> None:
    """Write `Chains` to the folder ``path``; `pyro_lvm.load` reads it.

    Raises:
        StorageError: if the folder holds something else, or the system refuses.
    """
    bound: BoundProgram = chains._bound
    with bound.holding(chains._snapshot):
        params = {**getattr(bound.functions.saved, "params", {}), **bound.constrained()}
    drawn = {"draws": dict(chains.draws), "statistics": dict(chains.statistics), "params": params}
    _write(path, chains, {"kind": "draws"}, {"record": "chains", "data": chains._data}, drawn)


def _write(
    path: str | os.PathLike[str], record: Any, guide: dict[str, Any], content: dict[str, Any], tree: dict[str, Any]
) -> None:
    """What all records have in common, and ``content`` and ``tree`` of their own."""
    bound: BoundProgram = record._bound
    whole = {
        "program": what_it_is(as_program(bound.program.source), guide, record._snapshot),
        "guide": guide,
        "declared": _declared(bound),
        **{key: record.info[key] for key in OF_EVERY_RECORD},
        "sites": dict(record.sites),
        "info": {key: value for key, value in record.info.items() if key not in OF_EVERY_RECORD},
        **content,
    }
    plain, tensors = pack(whole, "config")
    write_folder(Path(path), plain, {**tree, "snapshot": dict(record._snapshot), "config": tensors})


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
    """How the guide is to be had again.

    ``kind`` says where it comes from: the program's own, handed in beside it, built by a recipe, or given by a method
    of the program. A guide with parameters for each datum is described, and ``kind`` says where that comes from which
    it runs for what all data share, "nowhere" if there is no such thing.
    """
    program: Program = fit._bound.program
    guide, word = program.guide, fit.info["guide"]
    if isinstance(guide, PerDatumGuide):
        each = {"per datum": of_each(guide)}
        return {"kind": "nowhere", **each} if guide.shared is None else {**_from(guide.shared, program), **each}
    came = _from(guide, program)
    if came["kind"] == "own":
        return came
    waiting = fit._bound.first_rows is not None  # loaded, and not asked anything yet
    made = waiting or guide is nothing_to_approximate or isinstance(guide, AutoGuide)
    of_pyro = waiting or not isinstance(guide, AutoGuide) or type(guide).__module__.startswith("pyro.infer.autoguide")
    if made and (word in WORDS or (word in AUTOGUIDES and of_pyro)):
        return {"kind": "recipe", "recipe": word}
    if made and word not in ("given", "conjugate"):
        words = ", ".join((*map(repr, WORDS), *AUTOGUIDES))
        raise StorageError(
            f"the guide {word} was made from a class that a file may not name: fit with one of {words}, or pass an "
            f"object, guide={word}(model), which is handed to lvm.load again"
        )
    if word == "conjugate":
        if program.hook("conjugate_guide") is None:
            raise StorageError(
                f"{program.name} gives its guide only together with its updates: give it a method conjugate_guide() "
                "that returns a new one"
            )
        return {"kind": "conjugate"}
    return came


def _from(guide: Any, program: Program) -> dict[str, Any]:
    """Where a guide comes from that nobody made for the fit."""
    own = as_program(program.source).guide
    if program.missing is not None:
        guide = getattr(guide, "__wrapped__", guide)
    return {"kind": "own"} if own is not None and guide == own else {"kind": "beside", "from": _dotted(guide)}


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

"""A saved fit, read again: nothing is run that a file names beyond classes of this package and Pyro's autoguides."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.errors import StorageError
from pyro_lvm.inference.chains import Chains
from pyro_lvm.inference.expected import entry, of_kind, tensors_of
from pyro_lvm.inference.first_evaluation import FirstEvaluation, SavedValues
from pyro_lvm.inference.handed_in import missing_of, recipe_of, require_same, resolved, source_of, warn_of_others
from pyro_lvm.inference.record import Fit
from pyro_lvm.inference.saving import OF_EVERY_RECORD, what_it_is
from pyro_lvm.inference.sites import SiteTable
from pyro_lvm.inference.walkable import walked
from pyro_lvm.parameters import Declared, Snapshot
from pyro_lvm.program import Program, as_program
from pyro_lvm.storage.folder import CONFIG, read_folder
from pyro_lvm.storage.tree import unpack
from pyro_lvm.structure import Structure

__all__ = ["load"]

_OF_EVERY: dict[str, type] = {"program": str, "estimator": str, "n": int, "versions": dict}
_COUNTS = ("num_chains", "num_draws", "num_warmup")
_SHOWN: dict[str, dict[str, type]] = {
    "fit": {**_OF_EVERY, "guide": str, "steps": int, "stopped": str},
    "chains": {
        **_OF_EVERY,
        **dict.fromkeys(_COUNTS, int),
        "divergences": list,
        "seconds": float,
        "data_plate": object,
    },
}
"""What a record says of itself, by its kind."""


_OF_A_SITE = {"name": str, "kind": str, "distribution": str, "plates": dict, "event_shape": list}
"""What is said of a site."""


def load(path: str | os.PathLike[str], program: Any = None, device: torch.device | str | None = None) -> Fit | Chains:
    """Read what `Fit.save` or `Chains.save` wrote; it needs neither the data nor a step of training.

    The digests in the folder notice accidents, not forgery. A forged folder may say what it likes, but runs no code:
    there is no pickle in it, and it can name no class but those of this package and Pyro's autoguides.

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
        The `Fit` or the `Chains`, which evaluate as the saved ones did. A ``program`` that was not passed is made
        anew. Chains bring no data along: their methods take ``x``.

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
        opened = _opened(config, tree, program, where, folder)
        return _fit(config, opened, where) if _record(config) == "fit" else _chains(config, tree, opened, where)
    except StorageError as error:
        text = str(error)
        raise error if str(folder) in text else StorageError(f"{folder}: {text}") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the text says, its tensors in their places, and the tree beside it."""
    config, tree = read_folder(folder)
    tree = of_kind(tree, dict, "the file of tensors")
    try:
        content = of_kind(unpack(config, tensors_of(tree, "config")), dict, CONFIG)
    except RecursionError as error:
        raise StorageError(f"{CONFIG} is damaged ({error}): take a copy of it") from error
    return content, tree


@dataclass(frozen=True)
class _Opened:
    """What every record has.

    Attributes:
        shown: what was handed to `fit` or `mcmc`.
        program: the program; without a guide where one has still to be made.
        guide: what the file says of the guide.
        saved: the values.
        info: how it was made.
    """

    shown: Any
    program: Program
    guide: Mapping[str, Any]
    saved: SavedValues
    info: dict[str, Any]


def _opened(config: dict[str, Any], tree: dict[str, Any], program: Any, where: torch.device, folder: Path) -> _Opened:
    snapshot = {name: value.to(where) for name, value in tensors_of(tree, "snapshot").items()}
    params = {name: value.to(where) for name, value in tensors_of(tree, "params").items()}
    info, sites = _info(config), _sites(config)
    made, guide = entry(config, "program", dict), entry(config, "guide", dict)
    declared = (
        _declared_in_format_1(snapshot, params)
        if config["format"] == 1
        else _declared(entry(config, "declared", dict), snapshot, params)
    )
    values = {each.name: params[param] for param, each in declared.items() if each.name is not None}
    source = source_of(made, program, guide, snapshot)
    whole = resolved(source, guide, missing_of(tree.get("missing"), where), values)
    shown = source[0] if guide["kind"] == "beside" else source
    if program is not None:
        alone = as_program(shown)
        # the names in format 1 are also of guides that were made
        named = config["format"] > 1 or guide["kind"] == "own" or not isinstance(shown, tuple)
        if named and alone.name != made.get("name"):
            raise StorageError(
                f"it holds a fit of {made.get('name')!r:.80}, and program is {alone.name}: pass that one"
            )
        require_same(made, what_it_is(alone, guide, snapshot))
        warn_of_others(made, guide, program)
    saved = SavedValues(str(folder), whole.name, snapshot, params, declared, sites, info["n"])
    return _Opened(shown, whole, guide, saved, info)


def _fit(config: dict[str, Any], opened: _Opened, where: torch.device) -> Fit:
    if opened.guide["kind"] == "draws":
        raise StorageError(f"{CONFIG} is of a fit and says of its guide that it is draws: take a copy of it")
    history, elbo = entry(config, "history", dict), entry(config, "elbo", float)
    saved, info = opened.saved, opened.info
    bound = FirstEvaluation(opened.program, recipe_of(opened.guide), saved, where).at_once()
    return Fit(opened.shown, saved.params, history, elbo, info, saved.sites, bound, saved.snapshot)


def _chains(config: dict[str, Any], tree: dict[str, Any], opened: _Opened, where: torch.device) -> Chains:
    if opened.guide["kind"] != "draws":
        raise StorageError(f"{CONFIG} is of chains and says nothing of draws in its guide: take a copy of it")
    saved, info = opened.saved, opened.info
    draws = {name: value.to(where) for name, value in tensors_of(tree, "draws").items()}
    statistics = {name: value.to(where) for name, value in tensors_of(tree, "statistics").items()}
    shape = (info["num_chains"], info["num_draws"])
    for name, value in {**draws, **statistics}.items():
        if tuple(value.shape[:2]) != shape:
            raise StorageError(
                f"{name!r} has shape {tuple(value.shape)}, and there are {shape[0]} chains of {shape[1]} draws: take a "
                f"copy of {CONFIG} and its tensors"
            )
    for number in info["divergences"]:
        of_kind(number, int, "a number of divergences")
    entry(saved.sites, "model", list)
    data = entry(config, "data", str)
    program, given = walked(opened.program)

    def fill(structure: Structure) -> None:
        sites = []
        for name, value in draws.items():
            site = structure.model.get(name)
            if site is None or site.value.shape != value.shape[2:]:
                now = "no such site" if site is None else f"shape {tuple(site.value.shape)}"
                raise StorageError(
                    f"{saved.folder} holds draws of {name!r} of shape {tuple(value.shape[2:])}, and {saved.name} has "
                    f"{now}: pass the program and the data that the chains were run on"
                )
            sites.append(site)
        given.sites, given.draws = tuple(sites), {name: value.flatten(0, 1) for name, value in draws.items()}

    bound = FirstEvaluation(program, None, saved, where, fill).at_once()
    return Chains(opened.shown, draws, statistics, info, saved.sites, bound, saved.snapshot, None, data)


def _info(config: dict[str, Any]) -> dict[str, Any]:
    """The record of how it was made; what stands by itself in the file comes back into it."""
    kept = entry(config, "info", dict)
    apart = {} if config["format"] == 1 else {key: entry(config, key, object) for key in OF_EVERY_RECORD}
    info = {**kept, **apart}
    for name, kind in _SHOWN[_record(config)].items():
        entry(info, name, kind)
    return info


def _record(config: dict[str, Any]) -> str:
    record: str = "fit" if config["format"] == 1 else entry(config, "record", str)
    if record not in _SHOWN:
        raise StorageError(f"{CONFIG} is of a {record:.40}, which this version does not know: update pyro_lvm")
    return record


def _sites(config: dict[str, Any]) -> SiteTable:
    if config["format"] == 1:  # which does not say
        return {}
    sites: dict[str, Any] = entry(config, "sites", dict)
    for part in ("model", "guide") if sites else ():
        for site in entry(sites, part, list):
            for key, kind in _OF_A_SITE.items():
                entry(of_kind(site, dict, f"a site of the {part}"), key, kind)
    return sites


def _declared(tree: dict[str, Any], snapshot: Snapshot, params: Mapping[str, Tensor]) -> dict[str, Declared]:
    """What the file says of parameters that have a constraint."""
    found: dict[str, Declared] = {}
    for param, said in tree.items():
        fields = of_kind(said, dict, f"declared[{param!r:.80}]")
        name, tensor, constraint = (fields.get(key) for key in ("name", "tensor", "constraint"))
        known = isinstance(tensor, str) and tensor in snapshot and param in params
        if not known or not all(isinstance(words, str | None) for words in (name, constraint)):
            raise StorageError(f"{CONFIG} declares {param!r:.80} as {said!r:.80}, which is no parameter of the fit")
        found[param] = Declared(name, tensor, constraint)
    return found


def _declared_in_format_1(snapshot: Snapshot, params: Mapping[str, Tensor]) -> dict[str, Declared]:
    """The same where the file does not say: names in `pyro.param` are those of tensors, but for primes."""
    tensors = {name.rstrip("'"): name for name in snapshot if name in params}  # a function's come after a module's
    return {tensor: Declared(name, tensor, None) for name, tensor in tensors.items()}

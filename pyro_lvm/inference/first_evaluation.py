"""What a program from a file gets its values by: what is there at once, the rest when it is first made.

Modules that are handed in, or made anew, have theirs as soon as they are loaded. What plain functions declare with
`pyro.param`, networks that they register, and guides that are built from the model are there from the first evaluation
on: they get their values as they come, and nothing that has its values gets them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import transform_to

from pyro_lvm.data import Batch, Rows
from pyro_lvm.errors import StorageError
from pyro_lvm.evaluation import batch_to_trace
from pyro_lvm.guides import make_guide, nothing_to_approximate
from pyro_lvm.inference.sites import SiteTable
from pyro_lvm.parameters import BoundProgram, Declared, Snapshot, Untouched
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import Program, floating_dtype
from pyro_lvm.structure import Structure

__all__ = ["FirstEvaluation", "SavedValues"]


@dataclass
class SavedValues:
    """The values in a file; called by `pyro.param` for what is made first, in the place of its initial value.

    Attributes:
        folder: where, for errors.
        name: the program's, for errors.
        snapshot: values by name, as `BoundProgram.snapshot` gives them.
        params: the same in their natural form.
        declared: what the file says of parameters that have a constraint, by name in ``params``.
        sites: what the file says of the sites.
        size: rows that were fitted.
        rows: numbers of rows in the batch at hand: where an initial value has so many entries, the saved one may have
            ``size``.
    """

    folder: str
    name: str
    snapshot: Snapshot
    params: Mapping[str, Tensor]
    declared: Mapping[str, Declared]
    sites: SiteTable
    size: int
    rows: frozenset[int] = field(default_factory=frozenset)

    def __call__(self, name: str, start: Any) -> Tensor | None:
        """A copy of the unconstrained value of ``pyro.param(name, start)``; None where the file has none.

        Raises:
            StorageError: if it is of another shape than ``start``, rows aside.
        """
        tensor = next((entry.tensor for entry in self.declared.values() if entry.name == name), None)
        if tensor is None:
            return None
        saved = self.snapshot[tensor]
        natural = next(self.params[param] for param, entry in self.declared.items() if entry.tensor == tensor)
        shape = _shape(start)
        if shape is not None and not self._fits(shape, natural.shape):
            self._refuse_shape(name, f"shape {tuple(shape)}", f"shape {tuple(natural.shape)}")
        return saved.clone()

    def compare(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise unless these live tensors can take the saved values.

        Raises:
            StorageError: naming one that cannot.
        """
        for name, tensor in tensors.items():
            saved = self.snapshot.get(name)
            if saved is None:
                raise StorageError(f"{self.name} has a tensor {name!r} that {self.folder} does not hold")
            if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                self._refuse_shape(
                    name,
                    f"{tensor.dtype} of shape {tuple(tensor.shape)}",
                    f"{saved.dtype} of shape {tuple(saved.shape)}",
                )

    def compare_constraints(self, bound: BoundProgram) -> None:
        """Raise unless the constraints make of the saved values what they made of them before.

        Raises:
            StorageError: naming a parameter, its constraint here and there.
        """
        for param, here in bound.declared().items():
            there = self.declared.get(param)
            if there is None or there.tensor != here.tensor:
                continue
            saved, words = self.params[param], str(here.constraint)
            found = _natural(self.snapshot[there.tensor], here.constraint)
            # under other words the same numbers may be meant, greater than 0 and positive; then they are the same
            precision = torch.finfo(saved.dtype).eps
            near = 16 * precision if there.constraint not in (None, words) else precision**0.5
            if found is None or found.shape != saved.shape or not torch.allclose(found, saved, near, near, True):
                before = "another" if there.constraint is None else f"{there.constraint:.200}"
                raise StorageError(
                    f"parameter {param!r} of {self.name} has constraint {words} now, and had {before} when "
                    f"{self.folder} was written: its value would be another; give it the constraint that it had"
                )

    def compare_sites(self, structure: Structure) -> None:
        """Raise unless the program has the latent sites that it had, and every site the distribution that it had.

        Other data may leave out a site that was observed, or observe one that was latent.

        Raises:
            StorageError: naming a site.
        """
        now = {"model": structure.model, "guide": structure.guide}
        for part, entries in self.sites.items():
            for entry in entries:
                name, before = entry["name"], entry["distribution"]
                site = now[part].get(name)
                if site is None and part == "model" and entry["kind"] == "latent":
                    here = "has no such site now"
                elif site is not None and before != site.kind and "Masked" not in (before, site.kind):
                    here = f"is {site.kind} now"
                else:
                    continue
                raise StorageError(
                    f"site {name!r} of the {part} was {before!s:.80} when {self.folder} was written, and {self.name} "
                    f"{here if site is None else f'has {site}, which {here}'}: pass what was fitted"
                )

    def _fits(self, start: torch.Size, saved: torch.Size) -> bool:
        return len(start) == len(saved) and all(
            a == b or (a in self.rows and b == self.size) for a, b in zip(start, saved, strict=True)
        )

    def _refuse_shape(self, name: str, here: str, there: str) -> None:
        raise StorageError(
            f"{name!r} of {self.name} is {here}, and in {self.folder} {there}: pass the program, and evaluate on "
            "data, that the fit was made with"
        )


def _shape(start: Any) -> torch.Size | None:
    """Of an initial value; None where a function cannot make one of these rows, whose value is not needed either."""
    if callable(start) and not isinstance(start, Tensor):
        try:
            start = start()
        except Exception:  # it is the user's, and what it says of too few rows is of any kind
            return None
    return torch.as_tensor(start).shape


def _natural(value: Tensor, constraint: Any) -> Tensor | None:
    """The value under a constraint; None where it cannot have that."""
    try:
        natural: Tensor = transform_to(constraint)(value)
    except (ValueError, RuntimeError, NotImplementedError, IndexError):
        return None
    return natural


@dataclass(frozen=True)
class FirstEvaluation:
    """Makes what a program from a file has still to make, once it sees data.

    Attributes:
        program: the program; its guide is None where ``recipe`` says how to build it.
        recipe: as `make_guide` takes it, or None.
        saved: the values.
        device: where they are.
        then: called with the structure that was seen, before anything has moved; or None.
    """

    program: Program
    recipe: Any
    saved: SavedValues
    device: torch.device
    then: Callable[[Structure], None] | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating dtype of the values."""
        return floating_dtype(self.saved.snapshot.values())

    def at_once(self) -> BoundProgram:
        """The program; what is there of it has its values, and what is not comes with the first data.

        Raises:
            StorageError: if what is there cannot take its values; it is then as it was.
        """
        program = self.program if self.program.guide is not None else self.program.with_guide(self._stand_in())
        untouched = Untouched(program.modules.values())
        bound = BoundProgram(program, None, self.dtype, self.device)
        bound.functions.saved = self.saved
        try:
            for module in program.modules.values():
                self._place(module)
            self.saved.compare(dict(bound.tensors()))
            bound.load(self.saved.snapshot)
            self.saved.compare_constraints(bound)
        except BaseException:
            untouched.restore()
            raise
        bound.first_rows = self
        return bound

    def __call__(self, bound: BoundProgram, rows: Rows) -> None:
        """Make what is made on the way, compare it, and give it its values.

        Raises:
            StorageError: if it cannot take them; everything is then as it was.
        """
        saved, program = self.saved, self.program
        untouched = Untouched(bound.program.modules.values())
        there = {name for name, _ in bound.tensors()}

        def meet(module: nn.Module) -> None:
            untouched.remember(module)
            self._place(module)

        try:
            with bound.holding(saved.snapshot):
                batch = rows.first(batch_to_trace(program, rows))
                saved.rows = frozenset((len(batch), batch.size))
                made = BoundProgram(program, self._maker(batch, meet), self.dtype, self.device, meet)
                made.functions.saved = saved
                structure = traced(made.model, made.guide, batch)
            tensors = dict(made.tensors())
            saved.compare(tensors)
            # the loss beside the bound, which is not evaluated, may have parameters of its own
            lacking = [name for name in saved.snapshot if name not in tensors]
            if lacking and program.hook("auxiliary_loss") is None:
                raise StorageError(f"{saved.folder} holds {lacking[0]!r}, and {program.name} makes no such parameter")
            saved.compare_sites(structure)
            if self.then is not None:
                self.then(structure)
            made.load({name: value for name, value in saved.snapshot.items() if name not in there})
            with made.holding(saved.snapshot):
                saved.compare_constraints(made)
        except BaseException:
            untouched.restore()
            raise
        made.functions.meet = None
        vars(bound).update(vars(made))

    def _stand_in(self) -> Callable[..., Any]:
        """In the place of the guide that will be built, so that the other modules have their names."""
        has_parameters = any(name.startswith("guide.") for name in self.saved.snapshot)
        return nn.Module() if has_parameters else nothing_to_approximate

    def _maker(self, batch: Batch, meet: Callable[[nn.Module], None]) -> Callable[..., Any] | None:
        if self.recipe is None:
            return None
        program = self.program
        alone = BoundProgram(program.with_guide(nothing_to_approximate), None, self.dtype, self.device, meet)
        alone.functions.saved = self.saved
        structure = traced(alone.model, None, batch)

        def build(model: Callable[..., Any]) -> Callable[..., Any]:
            return make_guide(model, structure, self.recipe, names_index=program.names("index"), minibatches=False)

        return build

    def _place(self, module: nn.Module) -> None:
        module.to(device=self.device, dtype=self.dtype)

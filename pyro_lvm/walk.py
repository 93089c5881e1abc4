"""Walks over data that need not fit in memory: a part of the rows at a time, and what is found in one piece.

Whatever looks at rows one by one walks them here: the evaluations of a fit, and the closed forms of built-in programs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, repeat
from typing import Any, TypeVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_lvm.data import Batch, Rows, as_rows
from pyro_lvm.memory import require_room
from pyro_lvm.parameters import generator_for
from pyro_lvm.per_datum import FAMILIES
from pyro_lvm.program import ROW_KEYWORDS
from pyro_lvm.structure import base_of

__all__ = ["FEWER", "FEWER_DRAWS", "Joined", "by_rows", "parts_of", "rows_at_a_time", "seeds_of_parts", "walked"]

ROWS_AT_A_TIME, BYTES_AT_A_TIME = 16_384, 2**21
"""The most in one part; other draws come out if they are changed, where there is more."""

FEWER = "ask for some of the rows at a time"
FEWER_DRAWS = "ask for fewer draws (num_draws=), or for some of the rows at a time"

Method = TypeVar("Method", bound=Callable[..., Any])
Found = Tensor | TorchDistribution


def rows_at_a_time(rows: Rows) -> int:
    """Rows in one part."""
    return min(ROWS_AT_A_TIME, max(BYTES_AT_A_TIME // max(rows.bytes_per_row, 1), 1))


def parts_of(rows: Rows) -> Iterator[Batch]:
    """All rows, a part at a time; a loader's batches are as large as it makes them."""
    return rows.batches(None if rows.loader is not None else rows_at_a_time(rows))


def seeds_of_parts(seed: int | None) -> Iterator[int | None]:
    """A seed for each part: what a seed gives for the first part is what it gives for data of one."""
    if seed is None:
        return repeat(None)
    generator = generator_for(seed, torch.device("cpu"))
    return chain([seed], (int(torch.randint(2**62, (), generator=generator)) for _ in repeat(None)))


class Joined:
    """Tensors of parts of the rows, put together in ones that are made for all rows when the first part is known.

    A tensor whose rows are one and the same (an expanded one) stays one row for as long as every part has that row.

    Args:
        rows: how many there are; a loader may give others.
        what: is made, for the refusal.
        edit: what the caller can change.
    """

    def __init__(self, rows: int, what: str, edit: str = FEWER) -> None:
        self.rows, self.what, self.edit = rows, what, edit
        self._values: dict[str, Tensor] = {}
        self._same: dict[str, Tensor] = {}
        self._dims: Mapping[str, int] = {}
        self._start = 0

    def add(self, part: Mapping[str, Tensor], dims: Mapping[str, int]) -> None:
        """Put the next rows in their place.

        Args:
            part: tensors of these rows, by name; every part has the same names.
            dims: by name, the dim in which the rows are.

        Raises:
            NotEnoughMemoryError: if the tensors of all rows would not fit in memory.
        """
        count = next(value.shape[dims[name]] for name, value in part.items())
        if count == self.rows and not self._start:
            self._values, self._dims, self._start = dict(part), dims, count
            return
        if not self._start:
            self._dims = dims
            self._same = {
                name: _row(value, dims[name]) for name, value in part.items() if _is_one_row(value, dims[name])
            }
            self._make({name: value for name, value in part.items() if name not in self._same})
        changed = {
            name: part[name] for name, row in self._same.items() if not _repeats(part[name], row, self._dims[name])
        }
        if changed:
            before = {name: self._same.pop(name) for name in changed}
            self._make(changed)
            for name, row in before.items():
                self._place(name, row.expand(_with_rows(row, dims[name], self._start)), 0)
        for name in self._values:
            self._place(name, part[name], self._start)
        self._start += count

    def result(self) -> dict[str, Tensor]:
        """Each tensor, of all rows."""
        whole = {name: value.narrow(self._dims[name], 0, self._start) for name, value in self._values.items()}
        same = {name: row.expand(_with_rows(row, self._dims[name], self._start)) for name, row in self._same.items()}
        return whole | same

    def _make(self, like: Mapping[str, Tensor]) -> None:
        shapes = {name: _with_rows(value, self._dims[name], self.rows) for name, value in like.items()}
        needed = sum(shape.numel() * like[name].element_size() for name, shape in shapes.items())
        require_room(needed, f"{self.what} for {self.rows} rows", self.edit)
        self._values |= {name: torch.empty(shape, dtype=like[name].dtype) for name, shape in shapes.items()}

    def _place(self, name: str, part: Tensor, start: int) -> None:
        dim, whole = self._dims[name], self._values[name]
        lacking = start + part.shape[dim] - whole.shape[dim]
        if lacking > 0:  # a loader's sampler gives rows more than once
            whole = torch.cat([whole, whole.new_empty(_with_rows(whole, dim, lacking))], dim)
            self._values[name] = whole
        whole.narrow(dim, start, part.shape[dim]).copy_(part)


def _with_rows(value: Tensor, dim: int, rows: int) -> torch.Size:
    shape = list(value.shape)
    shape[dim] = rows
    return torch.Size(shape)


def _is_one_row(value: Tensor, dim: int) -> bool:
    return value.shape[dim] > 1 and value.stride(dim) == 0


def _row(value: Tensor, dim: int) -> Tensor:
    return value.narrow(dim, 0, 1).cpu()


def _repeats(value: Tensor, row: Tensor, dim: int) -> bool:
    one = value.shape[dim] == 1 or _is_one_row(value, dim)
    return one and torch.equal(_row(value, dim), row)


@torch.no_grad()
def walked(rows: Rows, find: Callable[[Batch], Found], what: str, dim: int = 0, num_draws: int | None = None) -> Any:
    """What ``find`` gives for all rows, from what it gives for parts of them; without gradients, in the CPU's memory.

    Args:
        rows: the data.
        find: gives a tensor, or a distribution with the rows in its leftmost batch dim.
        what: it is, for the refusal.
        dim: of a tensor, where the rows are.
        num_draws: where the result holds draws of the data themselves, how many of each row.

    Raises:
        NotEnoughMemoryError: if the result would not fit in memory.
    """
    if num_draws is not None and rows.loader is None:
        require_room(num_draws * len(rows) * rows.bytes_per_row, f"{num_draws} draws of {len(rows)} rows", FEWER_DRAWS)
    joined = Joined(len(rows), what, FEWER if num_draws is None else FEWER_DRAWS)
    family: Any = None
    event_dims = 0
    for batch in parts_of(rows):
        found = find(batch)
        if isinstance(found, Tensor):
            joined.add({"value": found}, {"value": dim})
            continue
        base = base_of(found)
        family, event_dims = type(base), len(found.event_shape) - len(base.event_shape)
        values = {name: getattr(base, name) for name in FAMILIES[family]}
        joined.add(values, dict.fromkeys(values, 0))
    result = {name: value.cpu() for name, value in joined.result().items()}
    return result["value"] if family is None else family(**result).to_event(event_dims)


def by_rows(dim: int = 0, missing: bool = False) -> Callable[[Method], Method]:
    """Let a method that finds something for each row of a tensor take any data that `fit` takes.

    A tensor is handed on as it is. Other data are walked in parts, in the module's dtype and on its device; the arrays
    go to the arguments that have the names of the model's.

    Args:
        dim: of the method's result, where the rows are.
        missing: whether values may be NaN although the method does not ask.
    """

    def decorate(method: Method) -> Method:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def walking(self: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(x, Tensor) or x is None:
                return method(self, x, *args, **kwargs)
            bound = signature.bind(self, x, *args, **kwargs)
            bound.apply_defaults()
            return _of_any_data(bound.arguments.pop("self"), method, bound.arguments, dim, missing)

        return walking  # type: ignore[return-value]

    return decorate


def _of_any_data(module: Any, method: Callable[..., Found], given: dict[str, Any], dim: int, missing: bool) -> Any:
    columns = [name for name in inspect.signature(module.model).parameters if name not in ROW_KEYWORDS]
    taken = [name for name in columns if name in inspect.signature(method).parameters]
    arrays = {name: value for name in taken if (value := given.pop(name)) is not None}
    data = arrays if len(arrays) > 1 else arrays["x"]
    rows = as_rows(data, "x", missing=missing or given.get("missing") is not None).like(_reference(module))
    drawn, seeds = "seed" in given, seeds_of_parts(given.pop("seed", None))

    def find(batch: Batch) -> Found:
        if len(batch.args) > len(columns) or not set(batch.kwargs) <= set(columns):
            raise ValueError(
                f"the data have {len(batch.tensors())} arrays ({', '.join(batch.tensors())}), but the model of "
                f"{type(module).__name__} takes {', '.join(columns)}: pass these, or a Dataset that gives them"
            )
        named = {**dict(zip(columns, batch.args, strict=False)), **batch.kwargs}
        wanted = {name: value for name, value in named.items() if name in taken}
        if drawn:
            wanted["seed"] = next(seeds)
        return method(module, **wanted, **given)

    return walked(rows, find, f"{method.__name__}()", dim, given.get("num_draws"))


def _reference(module: nn.Module) -> Tensor | None:
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)

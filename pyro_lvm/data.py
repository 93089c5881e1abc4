"""Rows: whatever holds the data, seen as batches of the arguments that a program takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from pyro_lvm.arrays import is_lazy, length_of, may_be_read_ahead, part_of, refuse_non_finite, rows_of
from pyro_lvm.memory import require_room
from pyro_lvm.prefetch import Asked, Read, read_ahead

__all__ = ["Batch", "Rows", "as_rows"]


@dataclass(frozen=True)
class Batch:
    """The arguments of one call: data by position and by name, and what the batch is of the whole.

    Attributes:
        args: data arguments by position, each with ``len(self)`` rows.
        kwargs: data arguments by name.
        size: rows in the whole data set.
        index: row numbers, shape (batch,); None where a `DataLoader` hides them.
        weight: row weights of a stratified batch, shape (batch,), or None.
        strata: how many rows of each stratum it holds, which stand together, stratum after stratum; None where
            they are in any order.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    size: int
    index: Tensor | None
    weight: Tensor | None = None
    strata: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(next(iter((*self.args, *self.kwargs.values()))))

    def named(self) -> dict[str, Any]:
        """All keywords of the call: the data's and the batch's own."""
        own = {"size": self.size, "index": self.index, "weight": self.weight, "strata": self.strata}
        return {**self.kwargs, **own}

    def data(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The data by position and by name, without the batch's own keywords."""
        return self.args, self.kwargs

    def copied(self) -> Batch:
        """The same rows in tensors of their own."""
        return self._each(torch.clone)

    def turned(self) -> Batch:
        """The same rows in the opposite order, each stratum's within their places."""
        return self._with_rows(lambda places: places.flip(0))

    def other(self) -> Batch:
        """The last half of the rows, the last first and each twice, each stratum's within their places.

        No sum over the rows, and no number of rows of some kind, need be what it is here.
        """
        return self._with_rows(lambda places: places.flip(0)[torch.arange(len(places)) // 2])

    def _with_rows(self, order: Callable[[Tensor], Tensor]) -> Batch:
        """For the places of each stratum, the rows at the places that ``order`` gives."""
        counts = [len(self)] if self.strata is None else list(self.strata)
        places = torch.cat([order(part) for part in torch.arange(len(self)).split(counts)])
        return self._each(lambda value: value[places.to(value.device)])

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        def of(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) else value

        return replace(
            self,
            args=tuple(of(value) for value in self.args),
            kwargs={name: of(value) for name, value in self.kwargs.items()},
            index=of(self.index),
            weight=of(self.weight),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The data arguments by name; positional ones are called ``data[0]``, ``data[1]``, ..."""
        positional = {_position(i, len(self.args)): value for i, value in enumerate(self.args)}
        return {**positional, **self.kwargs}


def _position(i: int, count: int) -> str:
    return "data" if count == 1 else f"data[{i}]"


@dataclass(frozen=True)
class Rows:
    """Data seen as rows. Arrays are indexed; a `Dataset` is collated; a `DataLoader` is walked as it is.

    Attributes:
        args: arrays (tensor, ndarray, memmap, or any object with ``len`` and ``x[rows] -> tensor``) by position.
        kwargs: arrays by name.
        dataset: a map-style dataset, instead of arrays.
        loader: a loader, instead of arrays.
        size: number of rows.
        dtype: floating data are cast to it; None keeps each array's own.
        device: where batches are sent.
        missing: whether floating values may be NaN.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dataset: Dataset[Any] | None = None
    loader: DataLoader[Any] | None = None
    size: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    missing: bool = False

    def __len__(self) -> int:
        return self.size

    def take(self, index: Tensor, weight: Tensor | None = None, strata: tuple[int, ...] | None = None) -> Batch:
        """The batch of the rows ``index``, shape (batch,); weight and strata as in `Batch`."""
        if self.loader is not None:
            raise ValueError("a DataLoader cannot be asked for rows: pass its dataset, or the arrays themselves")
        if self.dataset is not None:
            args, kwargs = _split(default_collate([self.dataset[int(i)] for i in index]))
        else:
            args = tuple(rows_of(array, index) for array in self.args)
            kwargs = {name: rows_of(array, index) for name, array in self.kwargs.items()}
        return self._batch(args, kwargs, index, weight, strata)

    def reading(self, asked: Iterable[Asked], read: Callable[[Asked], Read]) -> Iterator[Read]:
        """What ``read`` takes of these rows for each of ``asked``; from disk the next are read in the background."""
        return read_ahead(asked, read) if self.on_disk else map(read, asked)

    def batches(self, batch_size: int | None) -> Iterator[Batch]:
        """All rows in their own order, ``batch_size`` at a time (None: all at once)."""
        if self.loader is not None:
            seen = 0
            for item in self.loader:
                batch = self.collated(item)
                seen += len(batch)
                self._require_size(seen, at_the_end=False)
                yield batch
            self._require_size(seen, at_the_end=True)
            return
        if batch_size is None or batch_size >= self.size:
            yield self.whole()
            return
        starts = range(0, self.size, batch_size)
        yield from self.reading(
            (torch.arange(start, min(start + batch_size, self.size)) for start in starts), self.take
        )

    @property
    def batches_of_loader(self) -> int:
        """Batches in one walk over the loader."""
        assert self.loader is not None, "asked where there is a loader"
        try:
            return len(self.loader)
        except TypeError:  # a stream whose length the caller has said
            per_batch = self.loader.batch_size or 1
            return self.size // per_batch if self.loader.drop_last else -(-self.size // per_batch)

    @property
    def on_disk(self) -> bool:
        """Whether some rows lie on disk, and all may be read by another thread: nothing of a user's runs there."""
        arrays = (*self.args, *self.kwargs.values())
        lazy = [array for array in arrays if is_lazy(array)]
        return bool(lazy) and all(map(may_be_read_ahead, lazy))

    @property
    def bytes_per_row(self) -> int:
        """What a row takes in memory; a dataset that draws its values is left where it was."""
        with torch.random.fork_rng(devices=[]):
            return _bytes_of(self.first(1))

    def _require_size(self, seen: int, *, at_the_end: bool) -> None:
        """Refuse a stream that gives other rows than its size says: every scale would be wrong."""
        if self.loader is None or not isinstance(self.loader.dataset, IterableDataset):
            return  # a sampler may leave rows out of a map-style dataset
        left_out = (self.loader.batch_size or 1) * max(self.loader.num_workers, 1) - 1 if self.loader.drop_last else 0
        if seen > self.size or (at_the_end and seen + left_out < self.size):
            came = f"gave {seen} rows" if at_the_end else f"gave {seen} rows and goes on"
            raise ValueError(
                f"the stream {came}, but its size is {self.size}, by which the bound is scaled: pass size= (or let its "
                "__len__ say) the number of rows that one walk over it gives"
            )

    def collated(self, item: Any) -> Batch:
        """The batch that ``item`` of a loader is."""
        return self._batch(*_split(item))

    def first(self, count: int) -> Batch:
        """The first batch: ``count`` rows, or what a loader's first batch holds."""
        if self.loader is not None:
            return next(self.batches(None))
        return self.take(torch.arange(min(count, self.size)))

    def whole(self) -> Batch:
        """Every row in one batch.

        Raises:
            NotEnoughMemoryError: if the rows are not in memory yet and would not fit.
        """
        if self.on_disk or self.dataset is not None:
            require_room(
                self.size * self.bytes_per_row,
                f"all {self.size} rows at once",
                "pass fewer rows, or name `size` in the program's signature, so that it can be given a part of them",
            )
        return self.take(torch.arange(self.size)) if self.loader is None else self._joined(list(self.batches(None)))

    def at_most(self, limit: int, seed: int) -> Batch:
        """All rows, or a sample of those not in memory that takes ``limit`` bytes; a loader gives its first."""
        if self.loader is not None:
            parts: list[Batch] = []
            for part in self.batches(None):
                parts.append(part)
                if sum(map(_bytes_of, parts)) >= limit:
                    break
            return self._joined(parts)
        if not self.on_disk and self.dataset is None:
            return self.whole()
        count = max(limit // max(self.bytes_per_row, 1), 1)
        if count >= self.size:
            return self.whole()
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
        return self.take(order[:count].sort().values)

    def _joined(self, parts: list[Batch]) -> Batch:
        args = tuple(torch.cat(column) for column in zip(*(part.args for part in parts), strict=True))
        kwargs = {name: torch.cat([part.kwargs[name] for part in parts]) for name in parts[0].kwargs}
        return Batch(args, kwargs, self.size, None)

    def like(self, reference: Tensor | None) -> Rows:
        """The same rows, sent to the device and cast to the floating dtype of ``reference``."""
        if reference is None or not reference.is_floating_point():
            return self
        return replace(self, dtype=reference.dtype, device=reference.device)

    def redrawn(self, epoch: int, seed: int) -> Rows:
        """The rows as epoch ``epoch`` sees them: arrays with a ``redraw(epoch, seed)`` method are redrawn."""
        if not any(hasattr(array, "redraw") for array in (*self.args, *self.kwargs.values())):
            return self

        def draw(array: Any) -> Any:
            return array.redraw(epoch, seed) if hasattr(array, "redraw") else array

        args = tuple(draw(array) for array in self.args)
        return replace(self, args=args, kwargs={name: draw(array) for name, array in self.kwargs.items()})

    def split(self, fraction: float, generator: torch.Generator) -> tuple[Rows, Rows]:
        """Two parts at random, the second with ``fraction`` of the rows."""
        if self.loader is not None:
            raise ValueError("validation=<fraction> needs rows that can be indexed: pass the DataLoader's dataset")
        held_out = round(self.size * fraction)
        if not 0 < held_out < self.size:
            raise ValueError(
                f"validation={fraction} of {self.size} rows leaves {held_out} to validate on and "
                f"{self.size - held_out} to train on: choose a fraction that gives both some"
            )
        order = torch.randperm(self.size, generator=generator)
        return self._subset(order[held_out:]), self._subset(order[:held_out])

    def refuse_non_finite(self, argument: str) -> None:
        """Raise `ValueError` where the first rows of what is not an array (those are checked whole) are not finite."""
        arrays = (*self.args, *self.kwargs.values())
        if not arrays or not all(isinstance(array, Tensor | np.ndarray) for array in arrays):
            for name, value in self.first(1024).tensors().items():
                refuse_non_finite(value, name if argument == "data" else f"{argument}: {name}", self.missing)

    def _subset(self, index: Tensor) -> Rows:
        if self.dataset is not None:
            return replace(self, dataset=Subset(self.dataset, index.tolist()), size=len(index))

        args = tuple(part_of(array, index) for array in self.args)
        kwargs = {name: part_of(array, index) for name, array in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs, size=len(index))

    def _batch(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        index: Tensor | None = None,
        weight: Tensor | None = None,
        strata: tuple[int, ...] | None = None,
    ) -> Batch:
        place = self._placed
        return Batch(
            tuple(place(value) for value in args),
            {name: place(value) for name, value in kwargs.items()},
            self.size,
            None if index is None else index.to(self.device),
            None if weight is None else place(weight),
            strata,
        )

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device=self.device, dtype=self.dtype if value.is_floating_point() else None)


def _bytes_of(batch: Batch) -> int:
    return sum(value.nbytes for value in batch.tensors().values() if isinstance(value, Tensor))


def _split(item: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(item, Mapping):
        return (), item
    if isinstance(item, Sequence) and not isinstance(item, str):
        return tuple(item), {}
    return (item,), {}


def as_rows(
    data: Any, argument: str = "data", *, missing: bool = False, size: int | None = None, batch_size: int | None = None
) -> Rows:
    """See ``data`` as rows.

    Args:
        data: a tensor, ndarray or memmap; a tuple (positional arguments) or dict (keyword arguments) of them;
            a `Dataset`, map-style or iterable; a `DataLoader`; any object with ``len`` and ``x[rows]`` giving tensors.
        argument: what the caller calls it, for error messages.
        missing: whether NaN marks a missing value; it is an error otherwise.
        size: rows of the whole data set, where the data cannot say: a stream without ``__len__``.
        batch_size: rows in a batch of an iterable dataset; None for 512.

    Raises:
        TypeError: if it is none of these.
        ValueError: if there are no rows, the arrays disagree about their number, or a value is NaN or infinite.
    """
    if isinstance(data, Rows):
        return data
    if isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=batch_size or 512)
    if isinstance(data, DataLoader):
        rows = Rows(loader=data, size=_length_of_dataset(data, argument, size), missing=missing)
        if rows.batches_of_loader == 0:
            raise ValueError(f"{argument} is a DataLoader without a batch: use a smaller batch_size or drop_last=False")
        return rows
    rows = _indexed_rows(data, argument, missing)
    _require_same_size(len(rows), argument, size)
    return rows


def _indexed_rows(data: Any, argument: str, missing: bool) -> Rows:
    """Data that can be asked for rows by number."""
    if isinstance(data, Dataset):
        if not hasattr(data, "__len__"):
            raise TypeError(f"{argument} is a Dataset without a length: wrap it in a map-style Dataset with __len__")
        return Rows(dataset=data, size=_at_least_one(len(data), argument), missing=missing)
    args: tuple[Any, ...] = data if isinstance(data, tuple) else () if isinstance(data, Mapping) else (data,)
    kwargs: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
    named = {f"{argument}[{i}]" if len(args) > 1 else argument: array for i, array in enumerate(args)}
    named |= {f"{argument}[{name!r}]": array for name, array in kwargs.items()}
    if not named:
        raise ValueError(f"{argument} holds no arrays: pass at least one tensor with the data in its rows")
    lengths = {name: length_of(array, name) for name, array in named.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"all arrays of {argument} must have the same number of rows, but {counts}")
    # rows that are given only when asked for may hold anything
    lazy = missing and not all(isinstance(array, Tensor | np.ndarray) for array in named.values())
    some = [refuse_non_finite(array, name, missing) for name, array in named.items()]
    return Rows(args, kwargs, size=_at_least_one(next(iter(lengths.values())), argument), missing=any(some) or lazy)


def _length_of_dataset(loader: DataLoader[Any], argument: str, size: int | None) -> int:
    try:
        length = len(loader.dataset)  # type: ignore[arg-type]
    except TypeError:
        if size is not None and isinstance(loader.dataset, IterableDataset) and loader.batch_size is not None:
            return _at_least_one(size, argument)
        edit = "give it a __len__" + (", or pass size=, the rows of one walk" if argument == "data" else "")
        raise TypeError(
            f"the dataset of {argument} has no length, so that nothing says how many rows there are: {edit}"
        ) from None
    _require_same_size(length, argument, size)
    return _at_least_one(length, argument)


def _require_same_size(length: int, argument: str, size: int | None) -> None:
    if size is not None and size != length:
        raise ValueError(
            f"size={size}, but {argument} has {length} rows: drop size=, which is for data without a length"
        )


def _at_least_one(size: int, argument: str) -> int:
    if size < 1:
        raise ValueError(f"{argument} has no rows: pass at least one datum")
    return size

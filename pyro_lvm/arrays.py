"""One array of rows, wherever it lies: measured, looked through, and read by row number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["is_lazy", "length_of", "may_be_read_ahead", "part_of", "refuse_non_finite", "rows_of"]


def is_lazy(array: Any) -> bool:
    """Whether the array lies on disk, or gives its rows only when asked."""
    return not isinstance(array, Tensor | np.ndarray) or isinstance(array, np.memmap)


def may_be_read_ahead(array: Any) -> bool:
    """Whether another thread may read a lazy array: nothing of a user's runs there."""
    return isinstance(array, np.ndarray) or bool(getattr(array, "read_ahead", False))


def part_of(array: Any, index: Tensor) -> Any:
    """The rows ``index`` as an array of their own; of a lazy one they are read when they are asked for."""
    if not is_lazy(array) or (isinstance(array, np.ndarray) and array.ndim == 1):  # a column fits in memory
        return rows_of(array, index)
    return _RedrawnPart(array, index) if hasattr(array, "redraw") else _Part(array, index)


def rows_of(array: Any, index: Tensor) -> Tensor:
    """The rows ``index``, shape (batch,), of a tensor, ndarray, memmap, or whatever gives tensors for row numbers."""
    if isinstance(array, Tensor):
        return array.index_select(0, index.to(array.device))  # in half the time of array[index], to the bit
    if isinstance(array, np.ndarray):
        # in the order asked for: sorted and put back, they come no faster from a cold disk, and slower from memory
        rows_of_array = np.ascontiguousarray(array[index.numpy()])
        # torch knows only the byte order of the machine
        return torch.from_numpy(rows_of_array.astype(array.dtype.newbyteorder("="), copy=False))
    rows: Tensor = array[index]
    return rows


class _Part:
    """Some rows of an array that lies on disk, or gives its rows only when asked."""

    def __init__(self, array: Any, index: Tensor) -> None:
        self.array, self.index = array, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Any) -> Tensor:
        return rows_of(self.array, self.index[rows])

    @property
    def read_ahead(self) -> bool:
        """Whether another thread may read it."""
        return may_be_read_ahead(self.array)


class _RedrawnPart(_Part):
    """The same, of an array that draws its values anew."""

    def redraw(self, epoch: int, seed: int) -> _RedrawnPart:
        return _RedrawnPart(self.array.redraw(epoch, seed), self.index)


def length_of(array: Any, name: str) -> int:
    """Rows of one array; raises where it is none that a program can be given."""
    if not isinstance(array, Tensor | np.ndarray):
        return _length_of_rows_on_demand(array, name)
    if array.ndim == 0:
        raise ValueError(f"{name} is a single number of shape (): pass an array with one row per datum")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost: drop or impute the masked rows")
    numeric = not array.is_complex() if isinstance(array, Tensor) else array.dtype.kind in "fiub"
    if not numeric or array.dtype.itemsize > 8:
        raise TypeError(f"{name} has dtype {array.dtype}: pass real numbers of at most 64 bits, such as float32")
    return len(array)


def _length_of_rows_on_demand(array: Any, name: str) -> int:
    cause: Exception | None = None
    try:
        size = len(array)
        if isinstance(array[torch.arange(min(size, 1))], Tensor):
            return size
    except Exception as error:  # whatever a stranger's object raises, it is not rows
        cause = error
    raise TypeError(
        f"{name} is a {type(array).__name__}: pass a tensor or an array (a tuple or dict of them where the program "
        "takes several), or an object with len() and x[rows] giving tensors"
    ) from cause


def refuse_non_finite(array: Any, name: str, missing: bool = False, rows_at_once: int = 4096) -> bool:
    """Raise at an infinite value, and at NaN unless it may be ``missing``; whether there is any."""
    dtype = getattr(array, "dtype", None)
    floating = dtype.kind == "f" if isinstance(dtype, np.dtype) else _is_floating_tensor(array)
    if not floating:
        return False
    found = False
    for start in range(0, len(array), rows_at_once):
        block = array[start : start + rows_at_once]
        finite = torch.from_numpy(np.isfinite(block)) if isinstance(block, np.ndarray) else torch.isfinite(block)
        if bool(finite.all()):
            continue
        if missing:
            finite = finite | torch.as_tensor(block != block)
            found = True
            if bool(finite.all()):
                continue
        row = int((~finite.flatten(1).all(-1) if finite.dim() > 1 else ~finite).nonzero()[0])
        nan = not missing and (block != block).any()
        edit = "drop or impute those rows"
        edit += ", or let fit or em integrate them out with missing='marginalize'" if nan else " before fitting"
        raise ValueError(
            f"{name} holds {'NaN' if nan else 'infinite'} values ({int((~finite).sum())} in rows {start} to "
            f"{start + len(block) - 1}, the first in row {start + row}): {edit}"
        )
    return found


def _is_floating_tensor(array: Any) -> bool:
    return isinstance(array, Tensor) and array.is_floating_point()

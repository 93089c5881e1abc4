"""One array of data, walked in blocks of rows in double precision: what closed-form steps sum over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_lvm.data import Rows

__all__ = ["Blocks", "require_one_array"]


def require_one_array(rows: Rows, edit: str) -> Tensor:
    """The first row, shape (1, ...), of data that are one array.

    Raises:
        ValueError: if they are several.
    """
    arrays = rows.first(1).tensors()
    if len(arrays) != 1:
        raise ValueError(f"x holds {len(arrays)} arrays ({', '.join(arrays)}): {edit}")
    (first,) = arrays.values()
    return first


@dataclass(frozen=True)
class Blocks:
    """The rows of one array, a few at a time, as float64; each walk over them reads the data once more.

    Attributes:
        rows: the data, with exactly one array in it.
        rows_at_once: rows in a block, no power of two, whose columns would fall on one another in the cache; a loader's
            batches are as large as it makes them.

    Example:
        >>> import torch
        >>> from pyro_lvm.data import as_rows
        >>> [len(block) for block in Blocks(as_rows(torch.zeros(5, 2)), rows_at_once=2)]
        [2, 2, 1]
    """

    rows: Rows
    rows_at_once: int = 4000

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        array = self.rows.args[0] if self.rows.args else None
        if isinstance(array, Tensor):
            yield from array.detach().to(self.rows.device).double().split(self.rows_at_once)
        elif isinstance(array, np.ndarray):
            for start in range(0, len(array), self.rows_at_once):
                block = np.array(array[start : start + self.rows_at_once], dtype=np.float64)  # a copy: torch may write
                yield torch.from_numpy(block).to(self.rows.device)
        else:
            for batch in self.rows.batches(self.rows_at_once):
                yield next(iter(batch.tensors().values())).detach().double()

    def total(self, parts: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The sums over all blocks of what ``parts`` gives for each."""
        sums: tuple[Tensor, ...] = ()
        for block in self:
            found = parts(block)
            sums = tuple(a + b for a, b in zip(sums, found, strict=True)) if sums else found
        return sums

    def sample(self, count: int, seed: int) -> Tensor:
        """At most ``count`` rows, drawn without replacement and in their own order; a loader gives its first."""
        if len(self) <= count:
            return torch.cat(list(self))
        if self.rows.loader is None:
            generator = np.random.default_rng(seed)
            index = torch.from_numpy(np.sort(generator.choice(len(self), count, replace=False)))
            return next(iter(self.rows.take(index).tensors().values())).detach().double()
        taken: list[Tensor] = []
        for block in self:
            taken.append(block)
            if sum(map(len, taken)) >= count:
                break
        return torch.cat(taken)[:count]

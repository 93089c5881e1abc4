"""What a comparison returns: rows, in the order in which their subjects were given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["RowTable"]

Row = TypeVar("Row")


@dataclass(frozen=True, repr=False)
class RowTable(Sequence[Row], Generic[Row]):
    """A sequence of rows; a subclass says how it prints."""

    rows: tuple[Row, ...]

    def __getitem__(self, i: Any) -> Any:
        return self.rows[i]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

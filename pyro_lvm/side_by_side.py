"""Rows of one distribution beside rows of another, where some of a batch can be had for less than the others."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["SideBySide"]


class SideBySide(TorchDistribution):
    r"""The first m rows from one distribution and the rest from another, side by side along the rightmost plate.

    .. math:: p(x_1, \dots, x_n) = \prod_{i \le m} p_1(x_i) \prod_{i > m} p_2(x_i)

    Batch dims on the left of the rows broadcast: with ``first`` of batch shape (m,) and ``rest`` of batch shape
    (C, n - m), as when C labels are enumerated for the last rows alone, the whole has batch shape (C, n), each of the
    first rows has one draw, and its log density stands C times in the table.

    Args:
        first: of the rows 0, ..., m - 1; batch shape (..., m).
        rest: of the others; batch shape (..., n - m) and the same event shape.

    Raises:
        ValueError: if one of them has no batch dim, or the event shapes differ.

    Example:
        >>> import pyro.distributions as dist, torch
        >>> known, unknown = dist.Normal(torch.zeros(1), 1.0), dist.Normal(torch.zeros(3, 2), 1.0)
        >>> SideBySide(known, unknown).log_prob(torch.zeros(3)).shape
        torch.Size([3, 3])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, first: Any, rest: Any) -> None:
        if not first.batch_shape or not rest.batch_shape or first.event_shape != rest.event_shape:
            raise ValueError(
                f"batch shapes {tuple(first.batch_shape)} and {tuple(rest.batch_shape)} with event shapes "
                f"{tuple(first.event_shape)} and {tuple(rest.event_shape)} cannot stand side by side: give both a "
                "batch dim for their rows, and the same event shape"
            )
        self.first, self.rest = first, rest
        left = torch.broadcast_shapes(first.batch_shape[:-1], rest.batch_shape[:-1])
        rows = first.batch_shape[-1] + rest.batch_shape[-1]
        super().__init__(torch.Size((*left, rows)), first.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether both have."""
        return bool(self.first.has_rsample and self.rest.has_rsample)

    @property
    def support(self) -> Any:
        """That of the rest; the first rows are of the same kind."""
        return self.rest.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> SideBySide:
        """Expand the batch shape; to what it is already, as every plate does, leaves first rows that broadcast."""
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        *left, rows = batch_shape
        if rows != self.batch_shape[-1]:
            raise ValueError(f"{self.batch_shape[-1]} rows side by side cannot be expanded to {rows}")
        first, rest = (part.expand((*left, part.batch_shape[-1])) for part in (self.first, self.rest))
        return SideBySide(first, rest)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of all rows."""
        return self._joined(self.first.sample(sample_shape), self.rest.sample(sample_shape), sample_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of all rows, reparameterised."""
        return self._joined(self.first.rsample(sample_shape), self.rest.rsample(sample_shape), sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of each row, shape (..., n)."""
        counts = (self.first.batch_shape[-1], self.rest.batch_shape[-1])
        first, rest = value.split(counts, value.dim() - 1 - self.event_dim)
        return _table(self.first.log_prob(first), self.rest.log_prob(rest))

    def entropy(self) -> Tensor:
        """Entropy of each row, nats, shape (..., n)."""
        return _table(self.first.entropy(), self.rest.entropy())

    def _joined(self, first: Tensor, rest: Tensor, sample_shape: Any) -> Tensor:
        """What has the shape of a draw, batch dims on the left of the rows broadcast."""

        def whole(part: Any, drawn: Tensor) -> Tensor:
            left, count = self.batch_shape[:-1], part.batch_shape[-1]
            missing = (1,) * (len(left) + 1 - len(part.batch_shape))
            drawn = drawn.reshape((*sample_shape, *missing, *part.batch_shape, *self.event_shape))
            return drawn.expand((*sample_shape, *left, count, *self.event_shape))

        return torch.cat([whole(self.first, first), whole(self.rest, rest)], -1 - self.event_dim)


def _table(first: Tensor, rest: Tensor) -> Tensor:
    """A number for each row, dims on the left of the rows broadcast."""
    left = torch.broadcast_shapes(first.shape[:-1], rest.shape[:-1])
    return torch.cat([first.expand(*left, -1), rest.expand(*left, -1)], -1)

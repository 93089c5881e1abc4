r"""Mean and spread of the columns of a table, of any data; the rows need not fit in memory.

.. math:: \bar x = \frac{1}{n} \sum_n x_n, \qquad R^\top R = \sum_n (x_n - \bar x)(x_n - \bar x)^\top

The triangle R comes from QR decompositions, block by block (one of R so far above the next block), so that the small
axes keep the digits that the sum of squares would lose. Source: Demmel et al. (2012), https://arxiv.org/abs/0808.2664.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.blocks import Blocks, require_one_array
from pyro_lvm.data import as_rows

__all__ = ["Columns", "columns_of"]


@dataclass(frozen=True, eq=False)
class Columns:
    """What the columns of a table are like.

    Attributes:
        size: n, rows.
        mean: shape (D,), float64.
        triangle: R, shape (min(n, D), D), float64.
        reference: no rows of the table, shape (0, D): its dtype and its device.
    """

    size: int
    mean: Tensor
    triangle: Tensor
    reference: Tensor

    @property
    def covariance(self) -> Tensor:
        """With the denominator n - 1, shape (D, D), float64."""
        return self.triangle.mT @ self.triangle / (self.size - 1)


@torch.no_grad()
def columns_of(x: Any) -> Columns:
    """Walk over the table twice; one that is in memory as a tensor is taken whole.

    Args:
        x: one array of rows, shape (n, D), in any form that `fit` takes.

    Raises:
        TypeError: if x is no data.
        ValueError: if x is not one array of rows and columns, or holds values that are not finite.
    """
    rows = as_rows(x, "x")
    first = require_one_array(rows, "pass one, of shape (n, D)")
    if first.ndim != 2:
        raise ValueError(f"x has shape {(len(rows), *first.shape[1:])}: pass rows and columns, (n, D)")
    blocks = Blocks(rows, len(rows) if isinstance(x, Tensor) else max(Blocks.rows_at_once, 4 * first.shape[1]))
    total, size = blocks.total(lambda block: (block.sum(0), torch.tensor(len(block))))  # a sampler may leave rows out
    mean, triangle = total / size, total.new_empty(0, len(total))
    for block in blocks:
        triangle = torch.linalg.qr(torch.cat([triangle, block - mean]), mode="r").R
    return Columns(int(size), mean, triangle, first[:0])

"""The rows that a diagnosis looks at, and the weights of their latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lvm.criticism.weights import Draw, draw_latent, draw_local, local_log_weight
from pyro_lvm.data import Batch
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.memory import require_room

__all__ = ["JudgedRows", "judged_rows", "row_log_weights"]

ROWS_AT_A_TIME = 512
"""Rows in one pass; memory only."""


@dataclass(frozen=True)
class JudgedRows:
    """Some rows of the data, or all.

    Attributes:
        batches: the rows, in parts that memory holds.
        index: their numbers in the data, shape (rows,).
        whole: one batch of all of them.
    """

    batches: tuple[Batch, ...]
    index: Tensor
    whole: Batch

    def __len__(self) -> int:
        return len(self.index)


def judged_rows(evaluation: Evaluation, num_rows: int | None, seed: int) -> JudgedRows:
    """``num_rows`` rows at random (None: all), or all where the program cannot take a part."""
    size = evaluation.rows.size
    if evaluation.rows.loader is not None or not evaluation.takes_parts:
        whole = evaluation.rows.whole()
        return JudgedRows((whole,), torch.arange(size), whole)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    index = order[: size if num_rows is None else num_rows].sort().values
    if evaluation.rows.on_disk:
        require_room(
            2 * len(index) * evaluation.rows.bytes_per_row,
            f"{len(index)} rows to judge, twice",
            "look at fewer of them, num_rows=1000",
        )
    parts = tuple(evaluation.rows.take(part) for part in index.split(ROWS_AT_A_TIME))
    return JudgedRows(parts, index, parts[0] if len(parts) == 1 else evaluation.rows.take(index))


def row_log_weights(evaluation: Evaluation, batch: Batch, num_samples: int, shared: Draw | None) -> Tensor:
    """Log w of each datum, shape (num_samples, rows), nats; what all data share is held as in ``shared``."""
    bound, structure = evaluation.bound, evaluation.structure
    weights = []
    for _ in range(num_samples):
        draw = draw_latent(bound, structure, batch) if shared is None else draw_local(bound, structure, batch, shared)
        weights.append(local_log_weight(draw, structure.data_plate).cpu())
    return torch.stack(weights)

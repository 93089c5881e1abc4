"""Fully labelled data made into semi-supervised data."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hide_labels"]


def hide_labels(y: Tensor, keep: int, seed: int = 0) -> Tensor:
    r"""Hide all labels but a few, the few balanced over the classes.

    .. math:: y'_n = y_n \text{ for } n \in K, \quad y'_n = -1 \text{ otherwise}, \quad |K| = \text{keep}

    The kept labels are shared out as evenly as possible: every class keeps keep // num_classes; a class with fewer
    rows than its share keeps all of them, and the rest of its share goes to the others in equal parts; what then
    cannot be divided goes, one label each, to classes drawn at random. Which rows of a class stay labelled is drawn at
    random too. Rows that come with -1 are hidden already and stay so.

    Args:
        y: integer labels from 0, shape (n,); not changed.
        keep: number of labels to keep; with fewer than there are classes, some classes keep none.
        seed: seed of the choice.

    Returns:
        A copy of y, same dtype, shape (n,), with -1 where the label is hidden.

    Raises:
        TypeError: y holds no signed integers.
        ValueError: y is not one-dimensional, or keep is negative or more than the number of labels.

    Example:
        >>> hidden = hide_labels(torch.tensor([0, 0, 0, 0, 0, 1, 1, 2]), keep=6, seed=0)
        >>> [int((hidden == label).sum()) for label in (0, 1, 2, -1)]
        [3, 2, 1, 2]
    """
    if y.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"y must hold signed integers, for -1 means hidden, but its dtype is {y.dtype}. Use y.long().")
    if y.ndim != 1:
        raise ValueError(f"y must have shape (n,), one label per row, but got shape {tuple(y.shape)}.")
    classes, counts = y[y >= 0].unique(return_counts=True)
    available = int(counts.sum())
    if not 0 <= keep <= available:
        raise ValueError(f"keep must lie between 0 and the {available} labels that y has, but got {keep}.")
    generator = torch.Generator().manual_seed(seed)
    quotas = _shares(counts.tolist(), keep, torch.randperm(len(classes), generator=generator).tolist())
    hidden = torch.full_like(y, -1)
    for label, quota in zip(classes, quotas, strict=True):
        (rows,) = torch.where(y == label)
        kept = rows[torch.randperm(len(rows), generator=generator)[:quota]]
        hidden[kept] = label
    return hidden


def _shares(room: list[int], total: int, order: list[int]) -> list[int]:
    """Split total over places with limited room as evenly as possible; `order` decides who gets the odd ones."""
    shares = [0] * len(room)
    while total:
        not_full = [place for place in order if shares[place] < room[place]]
        each = max(total // len(not_full), 1)
        for place in not_full[:total]:
            given = min(each, room[place] - shares[place])
            shares[place] += given
            total -= given
    return shares

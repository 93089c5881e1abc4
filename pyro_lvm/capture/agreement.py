"""When the numbers of two ways to take a step count as the same."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SAME_AFTER_FUSION", "SAME_IN_ANOTHER_ORDER_OF_SUMS", "equal"]

SAME_IN_ANOTHER_ORDER_OF_SUMS = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Relative; for enumerated sites, whose terms of probability nought the graph adds as noughts and Pyro leaves out."""

SAME_AFTER_FUSION = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Relative to the largest gradient, beside `ROUNDINGS`: a fused loop of C++ sums in an order of its own."""

ROUNDINGS = 8
"""Units in the last place of the loss per datum that a gradient may be off by: near an optimum it is a difference."""


def equal(
    found: list[Tensor | None], right: list[Tensor | None], tolerance: dict[torch.dtype, float] | None, size: int = 1
) -> bool:
    """Whether numbers and gradients agree: to the bit, or within a part of the largest number and gradient."""
    if [a is None for a in found] != [b is None for b in right]:
        return False
    pairs = [(a, b) for a, b in zip(found, right, strict=True) if a is not None and b is not None]
    if tolerance is None:
        return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    share = tolerance.get(pairs[-1][1].dtype, 0.0)
    # a gradient that is nought but for rounding has only that of the others to be measured by
    largest = max((float(b.abs().max()) for _, b in pairs[1:] if b.numel()), default=0.0)
    rounding = ROUNDINGS * torch.finfo(pairs[-1][1].dtype).eps * float(pairs[0][1][0].abs()) / size
    allowed = [share * float(pairs[0][1].abs().max()), *(share * largest + rounding for _ in pairs[1:])]
    return all(bool(((a - b).abs() <= most).all()) for (a, b), most in zip(pairs, allowed, strict=True))

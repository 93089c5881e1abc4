"""What a good engineer writes without Pyro: a loss, fused Adam, slices of data in memory, losses left on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.stock import Batches
from benchmarks.timing import Burst


def by_hand(
    loss: Callable[..., Tensor],
    parameters: Iterable[Tensor],
    batches: Batches,
    *,
    lr: float = 1e-3,
    compiled: bool = False,
) -> Burst:
    """A burst of training on ``loss(*batch)`` over ``batches()``; compiled, inductor does the loss and its gradient."""
    optimizer = torch.optim.Adam(list(parameters), lr=lr, fused=True)
    function = torch.compile(loss, dynamic=False) if compiled else loss

    def run() -> float:
        total = torch.zeros(())
        for batch in batches():
            optimizer.zero_grad(set_to_none=True)
            value = function(*batch)
            value.backward()
            optimizer.step()
            total += value.detach()
        return total.item()

    return run

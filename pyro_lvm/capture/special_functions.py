"""What torch's special functions read, brought into memory before the first step.

On processors with AVX-512 torch's ``log1p`` and ``expm1`` of float32 (the likelihood of a Bernoulli, every softplus)
end with a load of a constant under a mask, which selects it for the argument -0 and hardly any other. As long as
nothing has touched the page of torch's library where the constant lies, it is missing from the process's tables of
memory, and the processor takes a slow path to find that the mask forbids the fault: a ``log1p`` takes ten times its
time.
"""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["bring_in_constants"]

MORE_THAN_A_REGISTER = 64
"""Of each argument so many, since what does not fill a register is computed otherwise."""


@cache
def bring_in_constants() -> None:
    """Touch the pages, once in a process: evaluate at the arguments that select the constants."""
    for dtype in (torch.float32, torch.float64):
        for argument in (-0.0, -1.0, -200.0, -2000.0, 200.0, 2000.0, float("inf")):
            numbers = torch.full((MORE_THAN_A_REGISTER,), argument, dtype=dtype, device="cpu")
            numbers.log1p()
            numbers.expm1()

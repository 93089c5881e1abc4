"""Options that hang on the machine: they say no where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["multiplied_in", "require_autocast", "require_cuda_graph"]


def require_autocast(dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Refuse an autocast that this machine would only emulate.

    Raises:
        ValueError: if ``dtype`` is not bfloat16, or the device has no instructions for it.
    """
    if dtype is None:
        return
    if dtype is not torch.bfloat16:
        raise ValueError(
            f"autocast={dtype} is not offered: use torch.bfloat16, whose range is that of float32 (float16 needs its "
            "gradients scaled)"
        )
    kind = "cpu" if device is None else device.type
    able = torch.cuda.is_bf16_supported() if kind == "cuda" else kind == "cpu" and _cpu_multiplies_bfloat16()
    if not able:
        raise ValueError(
            f"autocast=torch.bfloat16 needs a processor that multiplies bfloat16 (AVX512-BF16, AMX, CUDA 8.0); this "
            f"{kind} does not, and would only be slower: leave autocast out"
        )


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def require_cuda_graph(capture: bool | str, device: torch.device | None) -> None:
    """Refuse a CUDA graph where there is no CUDA.

    Raises:
        ValueError: if the data are not on a CUDA device.
    """
    kind = "cpu" if device is None else device.type
    if capture == "cuda_graph" and kind != "cuda":
        raise ValueError(
            f'capture="cuda_graph" replays a graph of CUDA kernels, and the data are on {kind}: pass device="cuda", or '
            'use capture="compiled"'
        )


@contextmanager
def multiplied_in(dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Multiply matrices in ``dtype`` inside; None leaves everything as it is."""
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
        yield

"""What the fits without gradients share: arguments, and what their records say of the surroundings."""

from __future__ import annotations

import operator
import platform
from importlib.metadata import version
from typing import Any

from pyro_lvm.data import Rows

__all__ = ["check_iterations", "require_counts", "surroundings"]


def require_counts(**counts: Any) -> None:
    """Raise unless each, by the name of its argument, is a whole number of at least one."""
    for name, count in counts.items():
        try:
            operator.index(count)
        except TypeError:
            raise TypeError(f"{name} is {count!r}: it must be a whole number") from None
        if count < 1:
            raise ValueError(f"{name} is {count}: it must be at least 1")


def check_iterations(max_iter: int, tol: float, n_init: int, init: Any) -> None:
    """Raise where the length or the number of the runs makes no sense."""
    require_counts(max_iter=max_iter, n_init=n_init)
    if not tol >= 0:
        raise ValueError(f"tol is {tol}: it must be a gain in nats per datum, 0 or more, for example 1e-6")
    if init is not None and n_init > 1:
        raise ValueError(f"n_init={n_init} starts from one init would all be the same: drop init, or pass n_init=1")


def surroundings(rows: Rows, cast: list[str]) -> dict[str, Any]:
    """Where and with what it was computed, as every record says it."""
    return {
        "cast": ", ".join(cast) or None,
        "dtype": str(rows.dtype),
        "device": str(rows.device),
        "versions": {name: version(name) for name in ("torch", "pyro-ppl", "pyro-lvm")}
        | {"python": platform.python_version()},
    }

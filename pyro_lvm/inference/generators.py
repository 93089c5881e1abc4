"""The random generators that a program may draw from in training, all of them, as one state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["generator_state", "going_on_from"]


def generator_state() -> dict[str, Any]:
    """Where torch's, Python's and NumPy's global generators stand, as plain values and tensors."""
    of_numpy: Any = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (of_numpy[0], of_numpy[1].tolist(), *of_numpy[2:]),
    }


@contextmanager
def going_on_from(state: dict[str, Any] | None) -> Iterator[None]:
    """Draw on from ``state``, where there is one; Python's and NumPy's generators are given back afterwards.

    Torch's are for the caller to keep (`pyro_lvm.parameters.isolated`).
    """
    if state is None:
        yield
        return
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002

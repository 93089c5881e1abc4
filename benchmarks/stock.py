"""Plain Pyro: `pyro.infer.SVI` and `pyro.optim.Adam`, as in its tutorials."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, SVI
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.timing import Burst

Batches = Callable[[], Iterable[tuple[Any, ...]]]


def stock(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    elbo: ELBO,
    batches: Batches,
    *,
    lr: float = 1e-3,
    validate: bool = True,
) -> Burst:
    """A burst of ``svi.step`` over ``batches()``; the losses are summed in Python, as the tutorials do.

    Parameters live in a store of their own. Validation is on by default, as it is in Pyro.
    """
    state: Any = {"params": {}, "constraints": {}}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), loss=elbo)

    def run() -> float:
        total = 0.0
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            pyro.get_param_store().scope(state),
            pyro.validation_enabled(validate),
        ):
            warnings.simplefilter("ignore")  # torch.jit has many
            for batch in batches():
                total += svi.step(*batch)
        return total

    return run


def slices(batch_size: int, *arrays: Tensor) -> Batches:
    """Slices of one permutation of data that lie in memory, an epoch of them."""
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterable[tuple[Tensor, ...]]:
        for index in torch.randperm(len(arrays[0]), generator=generator).split(batch_size):
            yield tuple(array[index] for array in arrays)

    return batches


def loaded(batch_size: int, *arrays: Tensor) -> Batches:
    """The same through a `DataLoader`, row by row."""
    loader = DataLoader(TensorDataset(*arrays), batch_size=batch_size, shuffle=True)
    return lambda: (tuple(batch) for batch in loader)


def repeated(steps: int, *arrays: Any) -> Batches:
    """All data in every step."""
    return lambda: (arrays for _ in range(steps))

"""What a sound program is listed with, the estimators by name, and the data that the programs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

ESTIMATORS = {
    "default": None,
    "trace": Trace_ELBO(),
    "trace-particles": Trace_ELBO(num_particles=3),
    "trace-vectorised": Trace_ELBO(num_particles=3, vectorize_particles=True),
    "mean-field": TraceMeanField_ELBO(),
    "mean-field-vectorised": TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    "enum": TraceEnum_ELBO(),
    "enum-nesting-given": TraceEnum_ELBO(max_plate_nesting=2),
    "enum-vectorised": TraceEnum_ELBO(num_particles=3, vectorize_particles=True),
    "graph": TraceGraph_ELBO(),
    "graph-vectorised": TraceGraph_ELBO(num_particles=3, vectorize_particles=True),
    "renyi": RenyiELBO(alpha=0.5, num_particles=3),
    "renyi-vectorised": RenyiELBO(alpha=0.0, num_particles=3, vectorize_particles=True),
}

REPARAMETERISED = (
    "default",
    "trace",
    "trace-vectorised",
    "mean-field",
    "mean-field-vectorised",
    "graph",
    "renyi",
    "renyi-vectorised",
)
"""Estimators for a pair whose sites are all drawn with gradients, the model's and the guide's in one order."""


@dataclass(frozen=True)
class Sound:
    """A program, its data, and everything that they are to be checked and fitted with."""

    name: str
    make: Callable[[], tuple[Any, Any]]
    estimators: tuple[str, ...]
    batch_sizes: tuple[int | None, ...]
    guide: Any

    def combinations(self) -> Iterator[tuple[str, int | None]]:
        """Estimators and batch sizes; several particles of a Rényi bound mean nothing on a part of the rows."""
        for estimator in self.estimators:
            for batch_size in self.batch_sizes:
                if batch_size is None or not estimator.startswith("renyi"):
                    yield estimator, batch_size


PROGRAMS: list[Sound] = []


def sound(*estimators: str, batch_sizes: tuple[int | None, ...] = (None,), guide: Any = None) -> Any:
    """List a function that makes ``(program, data)``, new at every call."""

    def listed(make: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
        PROGRAMS.append(Sound(make.__name__, make, estimators, batch_sizes, guide))
        return make

    return listed


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def binary(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(*shape, generator=generator(seed)) < 0.4).float()


def integers(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=generator(seed))


def nothing(*args: Any, **kwargs: Any) -> None:
    """The guide of a model in which every latent site is summed out."""

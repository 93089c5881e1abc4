"""One chain of Pyro's NUTS, and what every draw of it tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import NUTS
from torch import Tensor

from pyro_lvm.capture.potential import Potential
from pyro_lvm.inference.density import Density

__all__ = ["Chain", "Settings", "run_chain"]


@dataclass(frozen=True)
class Settings:
    """How long to walk, and how carefully.

    Attributes:
        num_draws: draws that are kept.
        num_warmup: steps before, which find step size and mass matrix.
        target_accept_prob: the mean acceptance probability that the step size is tuned to.
        max_tree_depth: the trajectory is doubled so many times at most.
        full_mass: whether the mass matrix is dense.
    """

    num_draws: int
    num_warmup: int
    target_accept_prob: float
    max_tree_depth: int
    full_mass: bool


@dataclass(frozen=True)
class Chain:
    """The draws of one chain.

    Attributes:
        draws: by site, on the site's own scale, shape (num_draws, *value).
        statistics: by ArviZ's names, shape (num_draws,).
        step_size: after warm-up.
    """

    draws: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    step_size: float


_Sampler: Any = NUTS  # it has no types


class _RecordingNUTS(_Sampler):  # type: ignore[misc]
    """Pyro's sampler, which also remembers what the leaves of its last tree were."""

    def __init__(self, potential: Potential, settings: Settings) -> None:
        super().__init__(
            potential_fn=potential,
            target_accept_prob=settings.target_accept_prob,
            max_tree_depth=settings.max_tree_depth,
            full_mass=settings.full_mass,
        )
        self.forget()

    def forget(self) -> None:
        """Start a new tree."""
        self.leaves = 0
        self.accepted: Any = 0.0
        self.energy: Any = math.nan
        self.diverged = False

    def _build_basetree(self, z: Any, r: Any, z_grads: Any, log_slice: Any, direction: Any, energy_current: Any) -> Any:
        leaf = super()._build_basetree(z, r, z_grads, log_slice, direction, energy_current)
        self.leaves += 1
        self.accepted = self.accepted + leaf.sum_accept_probs
        self.energy = energy_current
        self.diverged = self.diverged or bool(leaf.diverging)
        return leaf


def run_chain(density: Density, potential: Potential, settings: Settings, tick: Callable[[], None]) -> Chain:
    """Walk one chain in the random state of the caller.

    Args:
        density: coordinates and starting points.
        potential: what to evaluate; the density's own, or one that gives the same numbers.
        settings: how long, and how carefully.
        tick: called after every step.

    Raises:
        ProgramError: if there is no place to start.
    """
    sampler: Any = _RecordingNUTS(potential, settings)
    sampler.initial_params = density.start()
    sampler.setup(settings.num_warmup)
    position = sampler.initial_params
    for _ in range(settings.num_warmup):
        position = sampler.sample(position)
        tick()
    draws: dict[str, list[Tensor]] = {site.name: [] for site in density.sites}
    rows: list[tuple[bool, float, float, int, int, float]] = []
    with torch.no_grad():
        for _ in range(settings.num_draws):
            sampler.forget()
            with torch.enable_grad():
                position = sampler.sample(position)
            for name, value in density.constrained(position).items():
                draws[name].append(value.detach())
            rate, count = float(sampler.accepted) / sampler.leaves, sampler.leaves
            # a tree of d doublings has between 2^(d-1) and 2^d - 1 leaves besides the start
            rows.append(
                (sampler.diverged, float(sampler.energy), rate, count.bit_length(), count, float(sampler.step_size))
            )
            tick()
    names = ("diverging", "energy", "acceptance_rate", "tree_depth", "n_steps", "step_size")
    statistics = {name: torch.tensor(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    for name, column in statistics.items():
        statistics[name] = column.double() if column.is_floating_point() else column
    return Chain({name: torch.stack(values) for name, values in draws.items()}, statistics, float(sampler.step_size))

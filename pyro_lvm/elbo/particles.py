"""Several draws of one guide: one vectorised pair of traces or many pairs, seen alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.elbo.terms import is_random

__all__ = ["PARTICLES", "Particles", "common_frames", "plates_of", "put_at", "subsampling"]

PARTICLES = "num_particles_vectorized"
"""The name that Pyro gives the plate over particles."""


@dataclass(frozen=True)
class Particles:
    """K draws.

    Attributes:
        traces: (model trace, guide trace): one pair that holds all draws on the left of every plate, or K pairs.
        count: K.
        nesting: dims that the program's own plates take.
    """

    traces: list[tuple[Any, Any]]
    count: int
    nesting: int

    @staticmethod
    def of(elbo: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> Particles:
        """Draw as ``elbo`` says how; log-probabilities stand in the traces."""
        traces = list(elbo._get_traces(model, guide, args, kwargs))
        nesting = elbo.max_plate_nesting
        if nesting == float("inf"):
            dims = [f.dim for pair in traces for t in pair for n in t.nodes.values() for f in _vectorized(n)]
            nesting = -min(dims, default=0)
        elif elbo.vectorize_particles and elbo.num_particles > 1:
            nesting -= 1
        return Particles(traces, elbo.num_particles, int(nesting))

    def of_model(self) -> list[Any]:
        """The model's sample sites in order, as the first trace has them."""
        return [node for node in self.traces[0][0].nodes.values() if is_random(node)]

    def of_guide(self) -> list[Any]:
        """The guide's sample sites in order, as the first trace has them."""
        return [node for node in self.traces[0][1].nodes.values() if is_random(node)]

    def read(self, node: Any, what: Callable[[Any], Tensor]) -> Tensor:
        """A tensor over the plates of a site in every draw: shape (K, *plates at their own dims), 1 where none is."""
        role = int(self.traces[0][1].nodes.get(node["name"]) is node)
        tensors = [what(pair[role].nodes[node["name"]]) for pair in self.traces]
        if len(tensors) == 1:
            (only,) = tensors
            dims = self.nesting + 1
            return only.reshape((1,) * (dims - only.dim()) + only.shape).expand(self.count, *[-1] * (dims - 1))
        return torch.stack([each.reshape((1,) * (self.nesting - each.dim()) + each.shape) for each in tensors])


def plates_of(node: Any) -> dict[str, Any]:
    """The frames of the vectorised plates around a trace's node, by name; that over particles is none of them."""
    return {frame.name: frame for frame in _vectorized(node) if frame.name != PARTICLES}


def common_frames(nodes: Iterable[Any]) -> dict[str, Any]:
    """The plates that are around all of ``nodes``: given nothing else, their rows are independent of each other."""
    stacks = [plates_of(node) for node in nodes]
    return {name: frame for name, frame in stacks[0].items() if all(name in stack for stack in stacks)}


def subsampling(frames: Iterable[Any]) -> float:
    """What plates scale a log-probability by: all rows over the rows at hand."""
    scale = 1.0
    for frame in frames:
        scale *= (frame.full_size or frame.size) / frame.size
    return scale


def put_at(rows: Tensor, frame: Any) -> Tensor:
    """A vector over the rows of a plate, at the plate's dim."""
    return rows.reshape(-1, *[1] * (-frame.dim - 1))


def _vectorized(node: Any) -> list[Any]:
    return [frame for frame in node.get("cond_indep_stack", ()) if frame.vectorized]

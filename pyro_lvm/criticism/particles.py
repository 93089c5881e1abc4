"""Several draws of every row in one pass, where the program broadcasts on the left; one at a time where it does not.

A pass costs a program of small tensors the same whether it holds one draw or hundreds, so that few rows are drawn many
at a time, in a plate left of all others. Not every program bears that: one that reshapes its draws, averages over a dim
counted from the left, or makes noise of its own, either fails or mixes the draws **without failing**. So the first pass
of every shape is checked: its first, middle and last draws are weighed again, each by itself, and unless all weights
agree the program is run one draw at a time from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.criticism.weights import Draw, Source, is_listed
from pyro_lvm.data import Batch
from pyro_lvm.elbo.terms import is_random

__all__ = ["Passes"]

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""How far, relative to its size if that exceeds one, a weight computed in another order may come out elsewhere."""


class Passes:
    """Draws of a source in passes of bounded size.

    Args:
        source: what to draw with.
        weigh: log weights of a draw, shape (particles, ...) or (...) of a single one.
        rows_per_pass: how many rows, counting a row once for each draw, one pass may hold; at least one draw of all
            rows of a batch is made in each.
        one_at_a_time: never several draws in a pass.
    """

    def __init__(
        self,
        source: Source,
        weigh: Callable[[Draw], Tensor],
        rows_per_pass: int,
        *,
        one_at_a_time: bool = False,
    ) -> None:
        self.source, self.weigh, self.rows_per_pass = source, weigh, rows_per_pass
        self.broadcasts = not one_at_a_time
        self._tried: set[tuple[int, int]] = set()

    def draws(self, batch: Batch, num_samples: int) -> Iterator[tuple[Draw, Tensor]]:
        """Draws and their log weights, shape (particles, ...), until there are ``num_samples``."""
        left = num_samples
        while left:
            particles = min(left, max(1, self.rows_per_pass // len(batch))) if self.broadcasts else 1
            found = self._several(batch, particles) if particles > 1 else None
            if found is None:
                draw = self.source.draw(batch)
                found = draw, self.weigh(draw).unsqueeze(0)
            left -= len(found[1])
            yield found

    def _several(self, batch: Batch, particles: int) -> tuple[Draw, Tensor] | None:
        """Some draws and their weights; None, from then on, if the program does not bear it."""
        shape = len(batch), particles
        if shape in self._tried:
            draw = self.source.draw(batch, particles)
            return draw, self.weigh(draw)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # what warns of another dim does not expect one
                draw = self.source.draw(batch, particles)
                log_weights = self.weigh(draw)
                self.broadcasts = self._agree(batch, draw, log_weights)
        except Exception:  # whatever a program does to a dim it did not expect; by itself it fails again, or does not
            self.broadcasts = False
        self._tried.add(shape)
        return (draw, log_weights) if self.broadcasts else None

    def _agree(self, batch: Batch, draw: Draw, log_weights: Tensor) -> bool:
        """Whether some draws have the same weights by themselves, and are not all one."""
        numbers = sorted({0, draw.particles // 2, draw.particles - 1})
        nesting = self.source.structure.max_plate_nesting
        nodes = {**draw.model_trace.nodes, **draw.guide_trace.nodes}
        held = [_one(nodes, number, nesting) for number in numbers]
        if any(torch.equal(value, held[-1][name]) for name, value in held[0].items()):
            return False  # perhaps by chance, perhaps the noise comes from elsewhere and is the same in all
        alone = torch.stack([self.weigh(self.source.holding(nodes, values).draw(batch)) for values in held])
        together = log_weights[numbers]
        near = TOLERANCE.get(together.dtype, 1e-2)
        finite = alone.isfinite() & together.isfinite()
        difference = torch.where(finite, together - alone, 0.0).abs()
        same = torch.where(finite, difference <= near * alone.abs().clamp(min=1.0), together == alone)
        return alone.shape == together.shape and bool(same.all())


def _one(nodes: Mapping[str, Any], number: int, nesting: int) -> dict[str, Tensor]:
    """The values of the latent sites that were drawn, at draw ``number`` alone."""
    return {
        name: node["value"].select(-1 - nesting - node["fn"].event_dim, number)
        for name, node in nodes.items()
        if is_random(node) and not node["is_observed"] and not is_listed(node)
    }

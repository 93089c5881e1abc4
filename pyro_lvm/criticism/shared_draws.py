"""Draws of what all data share, made with the first part of the rows and held while the others are walked.

Given the draws of what is shared the rows are independent, so that a walk over parts of them finds what one look at all
of them would find, each part with latents of its own. It takes a guide whose density of what is shared is the same
whichever rows it is shown; `RowsMatter` says that it was not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_lvm.elbo.factors import in_plate
from pyro_lvm.elbo.terms import is_random

__all__ = ["RowsMatter", "SharedDraws", "log_prob_of"]


class RowsMatter(Exception):
    """The density of what all data share depends on the rows that are shown."""


class SharedDraws:
    """What all data share, by number of the draw.

    Args:
        plate: the plate over the rows; what lies outside is shared.
    """

    def __init__(self, plate: str | None) -> None:
        self.plate = plate
        self._held: dict[int, Any] = {}
        self._densities: dict[tuple[int, str], Tensor] = {}

    def held(self, number: int) -> Any | None:
        """A trace with the values of draw ``number``; None while it has not been made."""
        return self._held.get(number)

    def keep(self, number: int, guide_trace: Any) -> None:
        """Keep what a draw with the first rows gave."""
        if number not in self._held:
            kept = self._held[number] = poutine.Trace()
            for name, node in guide_trace.nodes.items():
                if is_random(node) and not in_plate(node, self.plate):  # its values: a distribution may be large
                    value = {key: node[key] for key in ("type", "name", "value", "is_observed", "infer")}
                    kept.add_node(name, **value)

    def counted(self, number: int, trace: Any, whose: str) -> Tensor:
        """What the first part has counted of the trace's log-probability already: nought there, else what is shared.

        Args:
            number: of the draw.
            trace: of model or guide.
            whose: which of the two.

        Raises:
            RowsMatter: if the rows of this part change it.
        """
        shared = log_prob_of(trace, lambda node: not in_plate(node, self.plate))
        first = self._densities.setdefault((number, whose), shared)
        if first is shared:
            return torch.zeros_like(shared)
        if not torch.allclose(first, shared, rtol=1e-5, atol=1e-5):
            raise RowsMatter
        return shared


def log_prob_of(trace: Any, wanted: Callable[[Any], bool] = lambda node: True) -> Tensor:
    """The trace's log-probability at some sites, masked but without the plates' scale, shape ()."""
    trace.compute_log_prob(site_filter=lambda name, node: is_random(node) and wanted(node))
    nodes = [node for node in trace.nodes.values() if is_random(node) and wanted(node)]
    parts = [scale_and_mask(node["unscaled_log_prob"], mask=node["mask"]).sum() for node in nodes]
    return torch.as_tensor(sum(parts, torch.zeros(())))

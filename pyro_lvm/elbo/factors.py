r"""The log-factors of a pair of traces, and their sum over enumerated dims.

.. math:: \log w = \log \sum_k \frac{p(x, k, z)}{q(z)}
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from torch import Tensor

from pyro_lvm.elbo.terms import is_random

__all__ = ["Factors", "in_plate", "log_factors"]


@dataclass(frozen=True)
class Factors:
    """Log-factors by the plates around them, ready to be summed over enumerated dims.

    Attributes:
        tree: packed tensors by their plates' symbols.
        summed: symbols of the enumerated dims.
        dims: the dim of each plate's symbol.
        sizes: its rows.
    """

    tree: OrderedDict[frozenset[str], list[Tensor]]
    summed: set[str]
    dims: dict[str, int]
    sizes: dict[str, int]

    def contract(self, plates: frozenset[str] = frozenset(), keep: frozenset[str] = frozenset()) -> Tensor:
        """All factors in one packed tensor over ``plates`` and the enumerated dims ``keep``."""
        ring = LogRing(dim_to_size=self.sizes)
        term: Tensor = contract_to_tensor(
            self.tree, set(self.summed), target_ordinal=plates, target_dims=set(keep), ring=ring
        )
        return term

    def conditional(self, node: Any) -> tuple[Tensor, str]:
        """Unnormalised log p(k | the rest), shape (*plates, K), and the plates' symbols."""
        symbol = node["infer"]["_enumerate_symbol"]
        names = node["infer"]["_dim_to_symbol"]
        plates = [names[dim] for dim in sorted(f.dim for f in node["cond_indep_stack"] if f.vectorized)]
        if symbol not in self.summed:  # one value only: its dim has been squeezed away
            return torch.zeros(*(self.sizes[plate] for plate in plates), 1), "".join(plates)
        term: Any = self.contract(frozenset(plates), frozenset(symbol))
        return term.permute([term._pyro_dims.index(name) for name in (*plates, symbol)]), "".join(plates)

    def fix(self, node: Any, choice: Tensor) -> None:
        """Put the drawn values of an enumerated site into every factor."""
        symbol = node["infer"]["_enumerate_symbol"]
        for terms in self.tree.values():
            for i, term in enumerate(terms):
                if symbol in term._pyro_dims:  # type: ignore[attr-defined]
                    terms[i] = packed.gather(term, choice, symbol)
        self.summed.discard(symbol)


def log_factors(model_trace: Any, guide_trace: Any | None, data_plate: str | None = None) -> Factors:
    """Log p and, with a guide, -log q, without the plates' scale; with a data plate only what lies inside it."""
    symbols = model_trace.plate_to_symbol
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    found = Factors(tree, set(), {}, {})
    for trace in (model_trace, guide_trace):
        for name, node in trace.nodes.items() if trace is not None else ():
            if not is_random(node) or (data_plate is not None and not in_plate(node, data_plate)):
                continue
            if guide_trace is not None and trace is model_trace and _from_prior(name, node, guide_trace):
                continue
            parts = node["packed"]
            listed = node["infer"].get("_enumerate_dim") is not None
            # a masked row's label still has a prior, whose sum is one
            mask = None if listed and trace is model_trace else parts["mask"]
            factor = packed.scale_and_mask(parts["unscaled_log_prob"], mask=mask)
            names = factor._pyro_dims
            if trace is guide_trace:
                # what the guide lists is summed over, within the guide's support
                factor = torch.where(factor == -torch.inf, factor, 0.0) if listed else -factor
            factor = factor + 0.0  # two terms must never be one tensor: the contraction tells them apart by identity
            factor._pyro_dims = names
            frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
            tree.setdefault(frozenset(symbols[frame.name] for frame in frames), []).append(factor)
            found.summed.update(names)
            found.dims.update({symbols[frame.name]: frame.dim for frame in frames})
            found.sizes.update({symbols[frame.name]: int(frame.size) for frame in frames})
    found.summed.difference_update(symbols.values())
    return found


def _from_prior(name: str, node: Any, guide_trace: Any) -> bool:
    return not node["is_observed"] and name not in guide_trace and node["infer"].get("_enumerate_dim") is None


def in_plate(node: Any, plate: str | None) -> bool:
    """Whether a trace's node lies in the plate of that name."""
    return any(frame.name == plate for frame in node["cond_indep_stack"])

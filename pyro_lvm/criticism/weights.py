r"""Importance weights of one draw from the guide, with enumerated sites summed out exactly.

.. math:: w_i = \frac{\sum_k p(x_i, k, z_i \mid \theta)}{q(z_i \mid x_i)}, \qquad E_q[w_i] = p(x_i \mid \theta)

A site that the guide enumerates is summed over too, not weighted by q: its sum is exact whatever q says.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.traceenum_elbo import BackwardSampleMessenger
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from torch import Tensor

from pyro_lvm.data import Batch
from pyro_lvm.elbo.terms import is_random
from pyro_lvm.errors import ProgramError
from pyro_lvm.parameters import BoundProgram
from pyro_lvm.structure import Structure

__all__ = ["Draw", "draw_latent", "local_log_weight", "log_weight", "only_global"]


@dataclass(frozen=True)
class Draw:
    """One draw of the guide, the model enumerated against it, and plate symbols shared by both.

    Attributes:
        model_trace: the model's trace, tensors packed.
        guide_trace: the guide's trace, tensors packed.
    """

    model_trace: Any
    guide_trace: Any


def draw_latent(bound: BoundProgram, structure: Structure, batch: Batch, fixed: Any | None = None) -> Draw:
    """Draw the sampled latents from the guide and enumerate the others.

    Args:
        bound: the program with its parameters.
        structure: its structure.
        batch: the data.
        fixed: a guide trace whose values are used instead of fresh draws, or None.

    Raises:
        ProgramError: if a guide site is enumerated one value at a time.
    """
    for site in structure.enumerated_in_guide:
        if site.enumerated == "sequential":
            raise ProgramError(f"guide site {site.name!r} is enumerated sequentially: mark it 'parallel'")
    estimator = TraceEnum_ELBO(max_plate_nesting=structure.max_plate_nesting, strict_enumeration_warning=False)
    guide = bound.guide if fixed is None else poutine.replay(bound.guide, trace=fixed)
    with torch.no_grad(), poutine.block():
        pairs = estimator._get_traces(bound.model, guide, batch.args, batch.named())
        return Draw(*next(pairs))


def only_global(draw: Draw, data_plate: str | None) -> Any:
    """A trace of the guide's draws outside the data plate, to be held `fixed` in further draws."""
    kept = poutine.Trace()
    for name, node in draw.guide_trace.nodes.items():
        if is_random(node) and not _in_plate(node, data_plate):
            kept.add_node(name, **node)
    return kept


def local_log_weight(draw: Draw, data_plate: str | None) -> Tensor:
    """log w for each datum given the global draws, shape (batch,); sites outside the data plate stay out of it."""
    if data_plate is None:
        raise ProgramError(
            "the program has no plate over its rows, so nothing can be said per datum: write "
            'with pyro.plate("data", size or len(x), subsample=x) around what belongs to one datum'
        )
    symbol = draw.model_trace.plate_to_symbol[data_plate]
    factors, summed = _factors(draw, data_plate, local=True)
    weight = contract_to_tensor(factors, summed, target_ordinal=frozenset({symbol}))
    return weight.reshape(-1)


def log_weight(draw: Draw, data_plate: str | None = None) -> Tensor:
    """log p(x, everything drawn) - log q(everything drawn) of the whole batch, enumerated sites summed out; shape ()."""
    factors, summed = _factors(draw, data_plate, local=False)
    return contract_to_tensor(factors, summed).reshape(())


def log_joint(draw: Draw) -> Tensor:
    """log p(x, everything drawn) of the whole batch, enumerated sites summed out; shape ()."""
    factors, summed = _factors(Draw(draw.model_trace, poutine.Trace()), None, local=False)
    return contract_to_tensor(factors, summed).reshape(())


def draw_enumerated(bound: BoundProgram, draw: Draw, batch: Batch) -> Any:
    """A trace of the model with the enumerated sites drawn from their exact conditional given the rest of ``draw``."""
    with torch.no_grad(), poutine.block(), BackwardSampleMessenger(draw.model_trace, draw.guide_trace):
        replayed = poutine.replay(bound.model, trace=draw.guide_trace)
        return poutine.trace(replayed).get_trace(*batch.args, **batch.named())


def _in_plate(node: Any, plate: str | None) -> bool:
    return any(frame.name == plate for frame in node["cond_indep_stack"])


def _factors(draw: Draw, data_plate: str | None, *, local: bool) -> tuple[OrderedDict[frozenset[str], list[Tensor]], set[str]]:
    """log p and -log q by plates, without the plates' scale, and the symbols of enumerated dims."""
    symbols = draw.model_trace.plate_to_symbol
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    dims: set[str] = set()
    for sign, trace in ((1.0, draw.model_trace), (-1.0, draw.guide_trace)):
        for node in trace.nodes.values():
            if not is_random(node) or (local and not _in_plate(node, data_plate)):
                continue
            parts = node["packed"]
            factor = packed.scale_and_mask(parts["unscaled_log_prob"], mask=parts["mask"])
            names = factor._pyro_dims
            if sign < 0:
                # what the guide lists is summed over, within the guide's support
                listed = node["infer"].get("_enumerate_dim") is not None
                factor = torch.where(factor == -torch.inf, factor, 0.0) if listed else -factor
            factor = factor + 0.0  # two terms must never be one tensor: the contraction tells them apart by identity
            factor._pyro_dims = names  # type: ignore[attr-defined]
            ordinal = frozenset(symbols[f.name] for f in node["cond_indep_stack"] if f.vectorized)
            factors.setdefault(ordinal, []).append(factor)
            dims |= set(names)
    return factors, dims - set(symbols.values())

r"""What enumeration sums out, summed by hand.

.. math:: -\sum_i \sum_a q(a \mid x_i) \left[\log \sum_k p(x_i, z_i, a, k) - \log q(a \mid x_i)
          - \log q(z_i \mid x_i, a)\right]

with a the sites that the guide lists, k those that the model sums out, and every other site held at one draw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_lvm.elbo.terms import is_random
from pyro_lvm.structure import Site
from pyro_lvm.testing.record import Law, broken, does_not_apply, holds, running
from pyro_lvm.testing.setting import Held, Setting, relative

__all__ = ["enumeration"]

MOST_ASSIGNMENTS = 64
"""Joint assignments of a datum that are tried one after another."""


def enumeration(at: Setting) -> Law:
    """The enumerated loss is the sum over assignments that a loop would take."""
    reason = _why_not(at)
    if reason is not None:
        return does_not_apply("enumeration", reason)
    sites = (*at.structure.enumerated_in_model, *at.structure.enumerated_in_guide)
    names = ", ".join(repr(site.name) for site in sites)
    with at.measuring():
        loss, size = at.loss(at.whole, at.held())
        by_hand = _by_hand(at)
    if by_hand is None:
        return does_not_apply("enumeration", "sites are weighted (poutine.scale) beside their plates")
    deviation = relative(loss, by_hand, size)
    if not deviation <= at.tolerance:
        raise broken(
            "enumeration",
            f"summed out by enumeration {names} gives the loss {loss:.10g} nats, summed by hand, one value at a time, "
            f"{by_hand:.10g} nats (relative difference {deviation:.1e}, tolerance {at.tolerance:.1e})",
            _VECTORISED,
        )
    count = math.prod(site.num_values or 1 for site in sites)
    return holds("enumeration", f"{names}: {count} assignments summed by hand", deviation, at.tolerance)


_VECTORISED = (
    "an enumerated site has its values along a new leftmost dim: index with Vindex(parameter)[..., site, :], reduce "
    "only dims counted from the right (mean(-1), not mean(0) or mean()), and branch on no values"
)


def _why_not(at: Setting) -> str | None:
    sites = (*at.structure.enumerated_in_model, *at.structure.enumerated_in_guide)
    if not sites:
        return "no site is summed out"
    if at.noise is not None:
        return at.noise
    for site in sites:
        if site.markov:
            return f"site {site.name!r} stands in pyro.markov: its assignments are chains"
        if [plate.name for plate in site.plates] != [at.structure.data_plate]:
            around = ", ".join(repr(plate.name) for plate in site.plates) or "no plate"
            return f"site {site.name!r} stands in {around}, and not in the plate over the rows alone"
        if site.num_values is None:
            return f"the values of site {site.name!r} cannot be listed"
    count = math.prod(site.num_values or 1 for site in sites)
    if count > MOST_ASSIGNMENTS:
        return f"{count} assignments of a datum are more than the {MOST_ASSIGNMENTS} that are summed by hand"
    return None


def _by_hand(at: Setting) -> float | None:
    """The loss, nats of the whole data set; None where something is scaled."""
    plate = at.structure.data_plate
    listed = {site.name for site in at.structure.enumerated_in_guide}
    of_rows = torch.zeros((), dtype=torch.float64)
    shared = 0.0
    with torch.no_grad(), poutine.block():
        for chosen in _assignments(at.structure.enumerated_in_guide):
            guide = Held({**at.draw, **chosen})(at.bound.guide)
            guide_nodes, guide_trace = _traced(guide, at, chosen)
            joint = []
            for summed in _assignments(at.structure.enumerated_in_model):
                model = poutine.replay(Held(summed)(at.bound.model), trace=guide_trace)
                model_nodes, _ = _traced(model, at, {**chosen, **summed})
                if _weighted(at, model_nodes, guide_nodes):
                    return None
                joint.append(_by_row(model_nodes, plate))
            log_q = _by_row({name: node for name, node in guide_nodes.items() if name in listed}, plate)
            log_rest = _by_row({name: node for name, node in guide_nodes.items() if name not in listed}, plate)
            bound = torch.stack(torch.broadcast_tensors(*joint)).logsumexp(0) - log_rest - log_q
            # a label that the guide rules out has log q = -inf and says nothing
            term = torch.where(log_q == -math.inf, 0.0, log_q.exp() * bound)
            of_rows = of_rows + term.sum()
            shared = _outside(model_nodes, plate) - _outside(guide_nodes, plate)
    return -(of_rows.item() + shared)


def _assignments(sites: list[Site]) -> Iterator[dict[str, Tensor]]:
    """Every joint value of ``sites``, each the same for all rows."""
    for values in itertools.product(*(site.fn.enumerate_support(expand=False) for site in sites)):
        yield {
            site.name: value.expand(site.fn.batch_shape + site.fn.event_shape)
            for site, value in zip(sites, values, strict=True)
        }


def _traced(function: Any, at: Setting, chosen: Mapping[str, Tensor]) -> tuple[dict[str, Any], Any]:
    values = ", ".join(f"{name!r} = {value.flatten()[0].item():g}" for name, value in chosen.items())
    with running("enumeration", f"a run with {values} in all rows" if values else "a run", _VECTORISED):
        trace = poutine.trace(function).get_trace(*at.whole.args, **at.whole.named())
        trace.compute_log_prob(site_filter=lambda name, node: is_random(node))
    return {name: node for name, node in trace.nodes.items() if is_random(node)}, trace


def _weighted(at: Setting, *traces: Mapping[str, Any]) -> bool:
    return any(bool((torch.as_tensor(node["scale"]) != 1).any()) for nodes in traces for node in nodes.values())


def _by_row(nodes: Mapping[str, Any], plate: str | None) -> Tensor:
    """The log-probabilities inside the data plate, summed to one number a row, shape (n,), float64."""
    total = torch.zeros(1, dtype=torch.float64)
    for node in nodes.values():
        dim = _dim(node, plate)
        if dim is not None:
            log_prob = scale_and_mask(node["unscaled_log_prob"], mask=node["mask"]).double().cpu()
            total = total + log_prob.movedim(dim, 0).reshape(log_prob.shape[dim], -1).sum(1)
    return total


def _outside(nodes: Mapping[str, Any], plate: str | None) -> float:
    """The log-probability of what all rows share."""
    shared = [node for node in nodes.values() if _dim(node, plate) is None]
    parts = [scale_and_mask(node["unscaled_log_prob"], mask=node["mask"]).double().sum().item() for node in shared]
    return float(sum(parts))


def _dim(node: Any, plate: str | None) -> int | None:
    return next((frame.dim for frame in node["cond_indep_stack"] if frame.name == plate), None)

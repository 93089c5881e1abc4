"""Capture of a potential: its value and gradient, taken once through Pyro, become a graph of tensor operations.

A chain evaluates the same potential hundreds of thousands of times, and nothing moves but the position: data and
parameters are constants of the graph. It is compared with Pyro's at given positions before it is used, to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.capture.operations import remove_unused, writes
from pyro_lvm.capture.recorder import graph_of
from pyro_lvm.declaration import what_and_where

__all__ = ["Position", "Potential", "capture_potential"]

Position = Mapping[str, Tensor]
"""Latent sites on their unconstrained scale."""

Potential = Callable[[Position], Tensor]
"""-log p(x, latents) on that scale, shape (); it keeps gradients."""

_log = logging.getLogger("pyro_lvm")


def capture_potential(potential: Potential, positions: Sequence[Position], name: str) -> tuple[Potential, str]:
    """The potential as a graph, if that gives the same numbers; else ``potential`` itself.

    Args:
        potential: what Pyro evaluates.
        positions: where both are compared, value and gradients to the bit; the first is where it is captured.
        name: the program's, for the log.

    Returns:
        What to evaluate, and "graph" or the reason why it is not one.
    """
    names = tuple(positions[0])

    def function(*values: Tensor) -> list[Tensor]:
        energy, gradients = with_gradients(potential, dict(zip(names, values, strict=True)))
        return [energy, *gradients.values()]

    try:
        graph = graph_of(function, *positions[0].values())
        _fold(graph, list(positions[0].values()))
        captured = _in_one_step(graph.forward, names)
        for position in positions:
            right, found = with_gradients(potential, position), with_gradients(captured, position)
            same = torch.equal(right[0], found[0]) and all(torch.equal(right[1][k], found[1][k]) for k in names)
            if not same:
                return potential, _said(name, "the graph gives another potential or other gradients than Pyro")
    except Exception as error:  # whatever stands in the way of a graph, Pyro's own potential is at hand
        return potential, _said(name, what_and_where(error))
    return captured, "graph"


def with_gradients(potential: Potential, position: Position) -> tuple[Tensor, dict[str, Tensor]]:
    """The potential at a position, and its gradients by site; both detached."""
    free = {name: value.detach().requires_grad_() for name, value in position.items()}
    energy = potential(free)
    gradients = torch.autograd.grad(energy, list(free.values()))
    return energy.detach(), dict(zip(free, gradients, strict=True))


def _said(name: str, why: str) -> str:
    _log.info("%s: potential not captured: %s", name, why)
    return f"not captured: {why}"


class _Known(torch.autograd.Function):
    """A number whose gradients came with it."""

    @staticmethod
    def forward(ctx: Any, graph: Callable[..., Any], *values: Tensor) -> Tensor:
        energy, *gradients = graph(*values)
        ctx.save_for_backward(*gradients)
        return energy  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *of_energy: Any) -> Any:
        return (None, *(gradient * of_energy[0] for gradient in ctx.saved_tensors))


def _in_one_step(graph: Callable[..., Any], names: tuple[str, ...]) -> Potential:
    def captured(position: Position) -> Tensor:
        energy: Tensor = _Known.apply(graph, *(position[name] for name in names))
        return energy

    return captured


def _fold(graph: torch.fx.GraphModule, example: list[Tensor]) -> None:
    """Compute once what does not depend on the position, and leave out what only passes a tensor on."""
    values = _Values(graph)
    with torch.no_grad():
        values.run(*example)
    known: set[torch.fx.Node] = set()
    for node in graph.graph.nodes:
        inputs = node.all_input_nodes
        if writes(node.target) and set(inputs[:1]) <= known:
            break  # what is written into must be made anew in every call
        if node.op == "get_attr" or (node.op == "call_function" and (set(inputs) <= known or _of_shape_only(node))):
            known.add(node)
    else:
        for number, node in enumerate([n for n in known if not set(n.users) <= known]):
            graph.register_buffer(f"known_{number}", values.values[node])
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(f"known_{number}"))
        for node in list(graph.graph.nodes):
            if node.op == "call_function" and node.target is torch.ops.aten.alias.default:
                node.replace_all_uses_with(node.args[0])
    remove_unused(graph.graph)
    graph.recompile()


def _of_shape_only(node: torch.fx.Node) -> bool:
    name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""
    return name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")


class _Values(torch.fx.Interpreter):
    """Remembers what every node gave."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.values: dict[torch.fx.Node, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]

"""What torch tells of the operations in a graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

__all__ = ["is_pointwise", "remove_unused", "writes"]


def writes(target: Any) -> bool:
    """Whether an operation writes into its arguments."""
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def is_pointwise(target: Any) -> bool:
    """Whether an operation gives one tensor, each number of it from the numbers at its place, and always the same."""
    if not _only_computes(target) or torch.Tag.pointwise not in target.tags:
        return False
    return [str(given.type) for given in target._schema.returns] == ["Tensor"]


def remove_unused(graph: fx.Graph) -> None:
    """Take out what nobody uses: but neither writes nor draws, which move a generator on.

    The method that graphs have for it, `eliminate_dead_code`, takes out both in torch 2.4.
    """
    for node in reversed(graph.nodes):
        computes = node.target is operator.getitem or _only_computes(node.target)
        if not node.users and (node.op == "get_attr" or (node.op == "call_function" and computes)):
            graph.erase_node(node)


def _only_computes(target: Any) -> bool:
    """Whether an operation gives something, always the same, and does nothing else."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and not writes(target)
        and torch.Tag.nondeterministic_seeded not in target.tags
        and len(target._schema.returns) > 0
    )

"""What torch tells of an operation in a graph."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_pointwise", "writes"]


def writes(target: Any) -> bool:
    """Whether an operation writes into its arguments."""
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def is_pointwise(target: Any) -> bool:
    """Whether an operation gives one tensor, each number of it from the numbers at its place, and always the same."""
    if not isinstance(target, torch._ops.OpOverload) or writes(target):
        return False
    gives_a_tensor = [str(given.type) for given in target._schema.returns] == ["Tensor"]
    return (
        gives_a_tensor and torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags
    )

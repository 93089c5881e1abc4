"""Tensors that are filled by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["copy_by_name"]


def copy_by_name(
    values: Mapping[str, Tensor], own: Mapping[str, Tensor], optional: Mapping[str, Tensor], whose: str, strict: bool
) -> None:
    """Write ``values`` into the tensors of the same names.

    Args:
        values: what is written.
        own: tensors that have to be there.
        optional: tensors that may be absent.
        whose: for the words of the error.
        strict: whether all of ``own`` must be there, and nothing else.

    Raises:
        RuntimeError: if a name is missing, unknown, or of another shape; nothing is written then.
    """
    targets = {**own, **optional}
    missing = sorted(own.keys() - values.keys()) if strict else []
    unknown = sorted(values.keys() - targets.keys()) if strict else []
    reshaped = [
        f"{name} {tuple(value.shape)} for {tuple(targets[name].shape)}"
        for name, value in values.items()
        if name in targets and value.shape != targets[name].shape
    ]
    if missing or unknown or reshaped:
        raise RuntimeError(
            f"these are not the parameters of {whose}: missing {missing or 'none'}, unknown {unknown or 'none'}, "
            f"of another shape {reshaped or 'none'}: load what the same program left"
        )
    with torch.no_grad():
        for name, value in values.items():
            if name in targets:
                targets[name].copy_(value)

"""Which parameters are the model's and which the guide's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_lvm.data import Batch
from pyro_lvm.elbo.terms import is_random
from pyro_lvm.parameters import BoundProgram, isolated

__all__ = ["Owners", "owners_of"]


@dataclass(frozen=True)
class Owners:
    """Which trainable parameters are the model's and which the guide's, by name.

    Attributes:
        theta: those that the log joint depends on; what the guide uses too is among them.
        phi: the others that the guide (or the auxiliary loss) depends on.
    """

    theta: tuple[str, ...]
    phi: tuple[str, ...]


def owners_of(bound: BoundProgram, batch: Batch, auxiliary_loss: Callable[..., Tensor] | None = None) -> Owners:
    """Run guide and model on ``batch`` and let autograd say what each depends on; nothing moves.

    The model runs against the guide's values, detached, so that what it depends on is its own.
    """
    trainable = bound.trainable()
    with isolated(0, validate=False), poutine.block(), torch.enable_grad():
        guide_trace = poutine.trace(bound.guide).get_trace(*batch.args, **batch.named())
        of_guide = [part for node in _sampled(guide_trace) for part in (node["value"], _log_prob(node))]
        if auxiliary_loss is not None:
            of_guide.append(auxiliary_loss(*batch.args, **batch.named()))
        held = guide_trace.copy()
        for node in _sampled(held):
            node["value"] = node["value"].detach()
        model = poutine.replay(bound.model, trace=held)
        model_trace = poutine.trace(model).get_trace(*batch.args, **batch.named())
        of_model = [_log_prob(node) for node in _sampled(model_trace)]
    theta = _reached(of_model, trainable)
    phi = [name for name in _reached(of_guide, trainable) if name not in theta]
    return Owners(tuple(theta), tuple(phi))


def _sampled(trace: Any) -> list[Any]:
    return [node for node in trace.nodes.values() if is_random(node)]


def _log_prob(node: Any) -> Any:
    return node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"])


def _reached(outputs: Iterable[Any], trainable: dict[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that the outputs hang on."""
    sums = [output.sum() for output in outputs if isinstance(output, Tensor) and output.requires_grad]
    if not sums or not trainable:
        return []
    gradients = torch.autograd.grad(sums, list(trainable.values()), allow_unused=True)
    return [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is not None]

"""What a forward pass changes besides its result: the buffers of a program's modules, and how to undo it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Buffers", "Remembered", "remember_all"]


@dataclass(frozen=True)
class Remembered:
    """A buffer as it was before a step.

    Attributes:
        layer: whose it is.
        name: under which.
        buffer: the tensor that stood there.
        values: a copy of it.
        version: how often the tensor had been written to; None where a copy was made whatever that says.
    """

    layer: nn.Module
    name: str
    buffer: Tensor
    values: Tensor
    version: int | None

    def changed(self) -> bool:
        """Whether the buffer was written to, or another tensor was put in its place."""
        return self.layer._buffers.get(self.name) is not self.buffer or self.buffer._version != self.version

    def put_back(self) -> None:
        """Make it what it was."""
        if self.changed():
            with torch.no_grad():
                self.buffer.copy_(self.values)
            self.layer._buffers[self.name] = self.buffer


class Buffers:
    """The buffers of some modules, remembered before every step.

    One that no step has changed costs a look at its counter of writes: the copy made at the beginning is still what it
    holds. One that a step has changed is copied before each step from then on; so are batch norms' from the first.
    Writes through ``.data`` are not counted: who makes them in the first step is found by comparing.

    Args:
        modules: whose buffers.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> buffers = Buffers([norm])
        >>> before = buffers.remember()
        >>> _ = norm(torch.randn(5, 2))
        >>> for buffer in before:
        ...     buffer.put_back()
        >>> norm.running_mean.tolist(), int(norm.num_batches_tracked)
        ([0.0, 0.0], 0)
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._now = [_at_rest(*place) for place in _places(modules)]
        norms = nn.modules.batchnorm._NormBase
        self._moving = [number for number, known in enumerate(self._now) if isinstance(known.layer, norms)]
        self._resting = [number for number in range(len(self._now)) if number not in self._moving]
        self._steps = 0

    def remember(self) -> list[Remembered]:
        """All of them as they are now; call it before every step."""
        if not self._now:
            return []
        self._steps += 1
        compare = self._steps == 2
        woken = []
        for number in self._resting:
            known = self._now[number]
            if known.changed() or (compare and not torch.equal(known.buffer, known.values)):
                woken.append(number)
        if woken:
            self._moving += woken
            self._resting = [number for number in self._resting if number not in woken]
        for number in self._moving:
            known = self._now[number]
            now = known.layer._buffers.get(known.name)
            if now is not None:
                self._now[number] = Remembered(known.layer, known.name, now, now.detach().clone(), None)
        return list(self._now)

    def start_anew(self) -> None:
        """Remember what others have written into them, which no step has changed."""
        for number in self._resting:
            known = self._now[number]
            self._now[number] = _at_rest(known.layer, known.name, known.buffer)


def remember_all(modules: Iterable[nn.Module]) -> list[Remembered]:
    """All buffers of some modules as they are now, to be put back whoever has written to them."""
    return [Remembered(layer, name, buffer, buffer.detach().clone(), None) for layer, name, buffer in _places(modules)]


def _places(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    layers = {id(layer): layer for module in modules for layer in module.modules()}.values()
    return [(layer, name, buffer) for layer in layers for name, buffer in layer._buffers.items() if buffer is not None]


def _at_rest(layer: nn.Module, name: str, buffer: Tensor) -> Remembered:
    return Remembered(layer, name, buffer, buffer.detach().clone(), buffer._version)

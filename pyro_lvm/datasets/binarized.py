"""Grey levels seen as random bits that are drawn anew in every epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Binarized"]


class Binarized:
    r"""An array of bits, each drawn with its grey level as the probability of a one.

    .. math:: b_{nd} = [\, u_{nd} < g_{nd} \,], \quad u_{nd} \text{ uniform on } \{0, \dots, 254\}, \quad
        P(b_{nd} = 1) = g_{nd} / 255 \text{ exactly}

    The protocol, which any object with these methods may follow: `len(x)`, `x.shape`, `x.dtype`, `x[rows]` gives a
    plain tensor, and `x.redraw(epoch, seed)` **returns** a new array that holds the draw of that epoch. Nothing is
    mutated: an array stands for one draw for ever, so two readers of one array see the same bits, in whatever order
    and batches they read. A new object starts with its evaluation draw, a fixed function of `seed`;
    `x.evaluation` leads back to it from any redrawn array.

    A draw takes one byte per bit, the grey levels one more, which all draws share; drawing 60 000 images of 784
    pixels takes some tenths of a second. What `redraw` gives is fixed by the grey levels' shape, the two seeds and the
    epoch.

    Args:
        grey: grey levels, uint8, shape (n, ...).
        seed: seed of the evaluation draw.
        dtype: floating dtype of the bits that `x[rows]` returns.

    Raises:
        TypeError: grey is no uint8 tensor.
        ValueError: grey is a single number, or a seed or an epoch is negative.

    Source: Salakhutdinov and Murray (2008), https://doi.org/10.1145/1390156.1390266, and Burda, Grosse and
    Salakhutdinov (2016), https://arxiv.org/abs/1509.00519, who draw anew in every epoch.

    Example:
        >>> x = Binarized(torch.tensor([[0, 128, 255], [0, 128, 255]], dtype=torch.uint8))
        >>> x[:, [0, 2]]
        tensor([[0., 1.],
                [0., 1.]])
        >>> epoch_3 = x.redraw(epoch=3, seed=0)
        >>> bool((x.redraw(epoch=3, seed=0)[:] == epoch_3[:]).all()), epoch_3.evaluation is x
        (True, True)
    """

    def __init__(self, grey: Tensor, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        if not isinstance(grey, Tensor) or grey.dtype != torch.uint8:
            came = grey.dtype if isinstance(grey, Tensor) else type(grey).__name__
            raise TypeError(
                f"grey must be a tensor of dtype torch.uint8, but got {came}. "
                f"Turn grey levels in [0, 1] into bytes with (grey * 255).round().to(torch.uint8)."
            )
        if grey.ndim == 0:
            raise ValueError("grey must have rows, but its shape is (). Give an array of shape (n, ...).")
        self._grey = grey
        self._seed = seed
        self._dtype = dtype
        self._epoch: int | None = None
        self._evaluation = self
        self._bits = _draw(grey, 0, seed)

    def redraw(self, epoch: int, seed: int) -> Binarized:
        """A new array with the draw of that epoch; this one stays as it is.

        Args:
            epoch: number of the epoch, from 0.
            seed: seed of the run; with another seed all epochs are drawn otherwise.
        """
        redrawn = object.__new__(Binarized)
        redrawn._grey, redrawn._seed, redrawn._dtype = self._grey, self._seed, self._dtype
        redrawn._epoch = epoch
        redrawn._evaluation = self._evaluation
        # with its own seed among the numbers, two arrays of one shape get unrelated draws in the same epoch
        redrawn._bits = _draw(self._grey, 1, self._seed, seed, epoch)
        return redrawn

    @property
    def evaluation(self) -> Binarized:
        """The array with the fixed draw for evaluation; the object itself where it holds that draw."""
        return self._evaluation

    @property
    def epoch(self) -> int | None:
        """The epoch this draw belongs to; None for the evaluation draw."""
        return self._epoch

    @property
    def grey(self) -> Tensor:
        """The grey levels, uint8 from 0 to 255, shape (n, ...); shared by all draws and not copied."""
        return self._grey

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole array, (n, ...)."""
        return self._bits.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self._bits.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what indexing returns."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the grey levels and the bits lie."""
        return self._bits.device

    def __len__(self) -> int:
        return len(self._bits)

    def __getitem__(self, rows: Any) -> Tensor:
        """Zeros and ones of the rows: an int, a slice, a mask, an array of row numbers, or a tuple of these."""
        return self._bits[rows].to(self._dtype)

    def __repr__(self) -> str:
        draw = "evaluation draw" if self._epoch is None else f"draw of epoch {self._epoch}"
        return f"Binarized(shape={tuple(self.shape)}, dtype={self._dtype}, {draw})"


def _draw(grey: Tensor, *seeds: int) -> Tensor:
    """Bits, dtype bool, shape of grey, drawn from a generator of their own."""
    if min(seeds) < 0:
        raise ValueError(f"seeds and epochs must not be negative, but got {', '.join(map(str, seeds[1:]))}.")
    # numpy rejects what would make the 255 values unequally likely, where torch takes a remainder
    thresholds = np.random.default_rng(seeds).integers(0, 255, size=tuple(grey.shape), dtype=np.uint8)
    return torch.from_numpy(thresholds).to(grey.device) < grey

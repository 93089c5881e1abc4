r"""From nats per datum to bits per dimension, with the constant of the dequantisation by name.

.. math:: \text{bits per dimension} = -\frac{1}{\ln 2} \Bigl( \frac{\log p(x)}{D} - \log \Delta^{-1} \Bigr)

with :math:`\Delta` the width of one grey level in the units of the density.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

from torch import Tensor

__all__ = ["Dequantization", "bits_per_dimension"]

Dequantization = Literal["none", "levels", "unit"]

Number = TypeVar("Number", float, Tensor)


def bits_per_dimension(
    nats_per_datum: Number,
    num_dimensions: int,
    dequantization: Dequantization,
    num_levels: int = 256,
) -> Number:
    r"""Bits per dimension (smaller is better) from a log density in nats per datum (bigger is better).

    .. math::
        -\frac{\log p(x)}{D \ln 2} +
        \begin{cases} 0 & \text{"none", "levels"} \\ \log_2 L & \text{"unit"} \end{cases}

    A density has the unit 1 / x, so that stretching the data changes it. With pixels divided by L = 256 every dimension
    gains :math:`\log 256 = 5.545` nats, 8 bits, that say nothing about the model; there is no default, the scale of the
    data must be said:

    - ``"none"``: x are counts, bits or grey levels and the model gives their **probability**. Nothing to add.
    - ``"levels"``: x + u on [0, L), u uniform on [0, 1): a density per grey level. Its mean over u is at most the log
      probability of the level that the model implies (Jensen), so the bits are not too few. Nothing to add.
    - ``"unit"``: (x + u) / L on [0, 1]: the same, after division by L. :math:`\log_2 L` is added.

    Args:
        nats_per_datum: such as ``fit.elbo`` or ``log_evidence(...)``; a number or a tensor of any shape.
        num_dimensions: D, numbers of one datum, such as 3 · 32 · 32.
        dequantization: which of the three.
        num_levels: L, grey levels.

    Returns:
        As ``nats_per_datum``.

    Raises:
        ValueError: if ``num_dimensions`` or ``num_levels`` is not positive, or ``dequantization`` is not known.

    When it is wrong: grey levels that were scaled to [0, 1] **without** noise have no density: a continuous likelihood
    may rise without bound on the lattice, and the bits fall without bound. The same goes for "unit" with pixels divided
    by 255.

    Source: Theis, van den Oord and Bethge (2016), A note on the evaluation of generative models,
    https://arxiv.org/abs/1511.01844.

    Example:
        >>> uniform = 0.0  # log density of the uniform distribution on [0, 1]^3072
        >>> bits_per_dimension(uniform, 3 * 32 * 32, "unit")
        8.0
    """
    for name, value in (("num_dimensions", num_dimensions), ("num_levels", num_levels)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if dequantization not in ("none", "levels", "unit"):
        raise ValueError(
            f"dequantization={dequantization!r} is not known: use 'none' for probabilities of discrete data, 'levels' "
            f"for densities on [0, {num_levels}), 'unit' for densities on [0, 1]"
        )
    bits = -nats_per_datum / (num_dimensions * math.log(2))
    return bits + math.log2(num_levels) if dequantization == "unit" else bits

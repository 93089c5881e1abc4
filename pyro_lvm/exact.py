r"""What a program offers that can be fitted without gradients.

Expectation maximisation climbs the same bound as gradients do, in two moves that each have a closed form:

.. math::
    \text{E: } q \leftarrow p(z \mid x, \theta), \qquad
    \text{M: } \theta \leftarrow \arg\max_\theta\; \mathbb{E}_q \log p(x, z \mid \theta) + \log p(\theta)

After the E-step the bound touches :math:`\log p(x \mid \theta)`; the M-step raises the bound, and the evidence rises by
at least as much, because :math:`\log p = \mathrm{ELBO} + \mathrm{KL}(q \,\|\, p(z \mid x))` and the KL, which was
nought, can only grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from pyro_lvm.blocks import Blocks

__all__ = ["Expectation", "ExpectationMaximisation", "OffersExpectationMaximisation", "Parameters"]

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Expectation:
    """What an E-step leaves.

    Attributes:
        objective: log p(x | theta) + log p(theta), nats of the data set; with hard assignments minus the inertia.
        statistics: expected sufficient statistics, whatever the M-step needs.
    """

    objective: float
    statistics: Any


class ExpectationMaximisation(Protocol):
    """The two steps of EM for one program and one data set."""

    def start(self, init: Any, seed: int) -> Parameters:
        """Parameters to start from."""
        ...

    def expectation(self, parameters: Parameters) -> Expectation:
        """The E-step, over all rows."""
        ...

    def maximisation(self, parameters: Parameters, statistics: Any) -> tuple[Parameters, float]:
        """The M-step: new parameters, and by how many nats they raise the expected log joint density."""
        ...

    def apply(self, parameters: Parameters) -> None:
        """Write the parameters into the program."""
        ...


class OffersExpectationMaximisation(Protocol):
    """A program with the hook that `pyro_lvm.em` asks for."""

    def expectation_maximisation(self, data: Blocks, *, hard: bool) -> ExpectationMaximisation:
        """The steps for these data; ``hard`` asks for assignments of nought and one."""
        ...

"""What our own estimators share: a Pyro ELBO that also says what the plain bound is."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import pyro
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor, nn

from pyro_lvm.data import Batch
from pyro_lvm.elbo.terms import Terms
from pyro_lvm.structure import Structure

__all__ = ["Estimate", "Objective"]


@dataclass(frozen=True)
class Estimate:
    """One evaluation of an objective on a batch.

    Attributes:
        loss: minus the objective, shape (), nats of the whole data set; may carry a graph or not.
        surrogate: a tensor of shape () whose gradient is the estimator's; its value means nothing.
        terms: the plain bound of the same draws, whatever is optimised.
    """

    loss: Tensor
    surrogate: Tensor
    terms: Terms


class Objective(ELBO):
    """A Pyro ELBO, for `pyro.infer.SVI` and for `pyro_lvm.fit`, of which only `estimate` is left to write.

    A subclass that is a schedule's, or trains something of its own, overrides `tensors`, `advance` or `modules`.
    """

    enumerates = False
    """Whether it sums out the sites that the model marks ``infer={"enumerate": "parallel"}``."""

    enumerates_guide = False
    """Whether it sums over the sites that the guide marks so."""

    samples_discrete = False
    """Whether a discrete site may be drawn in the guide, because its gradient is known without a path."""

    analytic = False
    """Whether a KL stands in closed form where there is one."""

    def __init__(
        self,
        num_particles: int = 1,
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        retain_graph: bool | None = None,
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles is {num_particles}: it must be at least 1")
        untyped: Any = super()
        untyped.__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
            retain_graph=retain_graph,
        )

    @abstractmethod
    def estimate(self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Estimate:
        """Evaluate the objective once, with gradients enabled."""

    def check(self, structure: Structure, batch: Batch) -> None:
        """Raise a `ProgramError` where the value, or the gradient, would not be what the objective promises.

        Args:
            structure: the pair.
            batch: the first rows of the fit.
        """
        del structure, batch

    def prepared(self, max_plate_nesting: int) -> Self:
        """A copy for one program, with state of its own."""
        own = copy.copy(self)  # an ELBO caches what it learns about its first program
        vectorized = bool(self.vectorize_particles and self.num_particles > 1)
        own.max_plate_nesting = max_plate_nesting + int(vectorized)
        return own

    def advance(self, progress: float) -> None:
        """Hear how far training is, from 0 at the first step to 1 at the last; called before every step."""
        del progress

    def arrival(self) -> float:
        """The fraction of training from which on the objective stays the same; until then nobody may stop early."""
        return 0.0

    def tensors(self) -> tuple[Tensor, ...]:
        """What changes between steps (a schedule's value, a running mean), each always the same tensor object."""
        return ()

    def modules(self) -> tuple[nn.Module, ...]:
        """Modules that are trained with the program, such as a learned baseline."""
        return ()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the objective, nats of the whole data set."""
        return float(self.estimate(model, guide, args, kwargs).loss.detach())

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the objective, nats of the whole data set, with the estimator's gradient."""
        found = self.estimate(model, guide, args, kwargs)
        return found.loss.detach() + (found.surrogate - found.surrogate.detach())

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the objective, with its gradient added to the parameters'."""
        for number, module in enumerate(self.modules()):  # by this Pyro's SVI hears of them
            pyro.module(f"{type(self).__name__}.{number}", module)
        found = self.estimate(model, guide, args, kwargs)
        if found.surrogate.requires_grad:
            found.surrogate.backward(retain_graph=self.retain_graph)
        return float(found.loss.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

"""What estimators share that rest on a Pyro ELBO and weigh the parts of its bound anew."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_lvm.data import Batch
from pyro_lvm.elbo.objective import Estimate, Objective
from pyro_lvm.elbo.parts import Parts, read_parts, why_no_path
from pyro_lvm.errors import ProgramError
from pyro_lvm.schedules import Scheduled
from pyro_lvm.structure import Structure

__all__ = ["Reweighted"]

BASES = (Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO)


class Reweighted(Objective):
    """An objective of reconstruction and KL, drawn and taken apart by a base.

    A subclass writes `objective`.

    Args:
        base: `TraceMeanField_ELBO` (a KL stands in closed form where there is one), `Trace_ELBO` (every KL at the
            draw) or `TraceEnum_ELBO` (sites marked for enumeration are summed over); an instance or its class, copied.
        sites: names of the latent sites whose KL is weighed; None for all that can be.

    Raises:
        TypeError: if ``base`` is none of these.
    """

    base: ELBO

    def __init__(self, base: ELBO | type[ELBO], sites: Sequence[str] | None = None) -> None:
        if (base if inspect.isclass(base) else type(base)) not in BASES:
            allowed = ", ".join(f"{kind.__name__}()" for kind in BASES)
            numbered = f"; a number has a name, {self._numbered(base)}" if isinstance(base, int | float) else ""
            raise TypeError(f"{type(self).__name__} rests on {base!r}: base must be one of {allowed}{numbered}")
        if isinstance(sites, str):
            raise TypeError(f"sites is {sites!r}: name the sites in a list, [{sites!r}]")
        made = base() if isinstance(base, type) else copy.copy(base)
        super().__init__(
            num_particles=made.num_particles,
            vectorize_particles=made.vectorize_particles,
            retain_graph=made.retain_graph,
        )
        self.base, self.sites = made, None if sites is None else tuple(sites)
        self.analytic = isinstance(made, TraceMeanField_ELBO)
        self.enumerates = self.enumerates_guide = isinstance(made, TraceEnum_ELBO)

    def __repr__(self) -> str:
        particles = f"num_particles={self.num_particles}" if self.num_particles > 1 else ""
        shown = [f"{type(self.base).__name__}({particles})", *(f"{s.name}={s!r}" for s in self.schedules())]
        shown += self.options()
        shown += [f"sites={list(self.sites)}"] if self.sites is not None else []
        return f"{type(self).__name__}({', '.join(shown)})"

    def objective(self, parts: Parts) -> Tensor:
        """The objective, shape (), nats of the whole data set, with its graph."""
        raise NotImplementedError

    def schedules(self) -> tuple[Scheduled, ...]:
        """The numbers that may change during training."""
        return ()

    def options(self) -> list[str]:
        """What else differs from the defaults, for its representation."""
        return []

    def read(self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Parts:
        """Draw, and take the bound apart."""
        return read_parts(self.base, model, guide, args, kwargs)

    def estimate(self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Estimate:
        """Evaluate the objective once."""
        # the parts of an enumerated bound are gradients, also where none of the parameters' is wanted
        with torch.set_grad_enabled(self.enumerates or torch.is_grad_enabled()):
            parts = self.read(model, guide, args, kwargs)
            loss = -self.objective(parts)
        return Estimate(loss, loss, parts.terms)

    def check(self, structure: Structure, batch: Batch) -> None:
        """Raise where a draw of the guide has no path for gradients, or nothing is there to weigh."""
        del batch
        for site in structure.guide.values():
            if site.enumerated == "sequential":
                raise ProgramError(f'{site} is enumerated "sequential"; {self!r} cannot weigh it: mark it "parallel"')
            if not site.enumerated and not site.fn.has_rsample:
                raise ProgramError(why_no_path(str(site), site.kind, site.enumerable))
        names = [site.name for site in structure.latent if site not in structure.enumerated_in_model]
        if not names:
            summed = ", ".join(repr(site.name) for site in structure.enumerated_in_model)
            why = f"{summed} is summed out exactly and has no KL" if summed else "nothing is latent"
            raise ProgramError(f"{why}, so {self!r} has nothing to weigh: use elbo=None")

    def prepared(self, max_plate_nesting: int) -> Self:
        """A copy for one program, with base and schedules of its own."""
        own = super().prepared(max_plate_nesting)
        own.base = copy.copy(self.base)
        own.base.max_plate_nesting = own.max_plate_nesting
        own.base.strict_enumeration_warning = False  # the pre-flight knows which discrete site is meant
        for name, value in vars(self).items():
            if isinstance(value, Scheduled):
                setattr(own, name, value.fresh())
        return own

    def advance(self, progress: float) -> None:
        """Let every schedule take its value at ``progress``."""
        for schedule in self.schedules():
            schedule.advance(progress)

    def tensors(self) -> tuple[Tensor, ...]:
        """The present values of the schedules."""
        return tuple(schedule.tensor for schedule in self.schedules())

    def arrival(self) -> float:
        """The fraction of training from which on no schedule moves."""
        return max((schedule.arrival() for schedule in self.schedules()), default=0.0)

    def chosen(self, parts: Parts, *, per_datum: bool = False) -> list[str]:
        """Names in ``parts.kl`` that are weighed: all, or those of ``sites``; of each datum only, if so wished.

        Raises:
            ProgramError: if one of ``sites`` has no KL of its own, or is shared by all data where each needs its own.
        """
        local = [name for name in parts.kl if not per_datum or parts.lies_in(name, parts.data_plate())]
        if self.sites is None:
            if not local:
                raise ProgramError(f"{self!r} weighs nats per datum, and {', '.join(parts.kl)} is shared by all data")
            return local
        wrong = [name for name in self.sites if name not in local]
        if wrong:
            whose = "of each datum's own" if per_datum else "of its own"
            raise ProgramError(f"site {wrong[0]!r} has no KL {whose}; those that have are {local}: correct sites=")
        return list(dict.fromkeys(self.sites))

    def _numbered(self, value: float) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if name not in ("base", "sites")]
        return f"{type(self).__name__}({names[0]}={value:g})" if names else f"{type(self).__name__}()"

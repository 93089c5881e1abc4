"""Any Pyro ELBO as the estimator of one fit: a fresh copy, one way to take a step, and the choice of a default."""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

import torch
from pyro.infer import (
    ELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

from pyro_lvm.data import Batch
from pyro_lvm.elbo.objective import Objective
from pyro_lvm.elbo.terms import Terms, closed_form_kl, read_terms, watch_factors
from pyro_lvm.parameters import BoundProgram
from pyro_lvm.structure import Structure

__all__ = ["Estimator", "make_estimator", "plain_estimator"]


class Estimator:
    """A Pyro ELBO made ready for one program: its own copy, its plate nesting set, its traces kept for the parts.

    Attributes:
        elbo: the copy.
        reason: why this estimator; says so when it was chosen and not given.
    """

    def __init__(self, elbo: ELBO, structure: Structure, reason: str) -> None:
        self._traces: list[tuple[Any, Any]] = []
        self.elbo: Any
        if isinstance(elbo, Objective):
            self.elbo, self.reason = elbo.prepared(structure.max_plate_nesting), reason
            self.elbo.advance(1.0)  # whoever evaluates it outside of training means what training ends with
            return
        self.elbo = cast("Any", copy.copy(elbo))  # an ELBO caches what it learns about its first program
        self.elbo.strict_enumeration_warning = False  # the pre-flight knows which discrete site is meant
        self.reason = reason
        vectorized = bool(self.elbo.vectorize_particles and self.elbo.num_particles > 1)
        self.elbo.max_plate_nesting = structure.max_plate_nesting + int(vectorized)
        self._trace_once = self.elbo._get_trace
        self.elbo._get_trace = self._keep_trace

    def __repr__(self) -> str:
        if isinstance(self.elbo, Objective):
            return repr(self.elbo)
        shown = [f"num_particles={self.elbo.num_particles}"] if self.elbo.num_particles > 1 else []
        shown += [f"alpha={self.elbo.alpha}"] if hasattr(self.elbo, "alpha") else []
        return f"{type(self.elbo).__name__}({', '.join(shown)})"

    @property
    def enumerates(self) -> bool:
        """Whether sites that the model enumerates are summed out."""
        return self._says("enumerates", TraceEnum_ELBO)

    @property
    def enumerates_guide(self) -> bool:
        """Whether sites that the guide enumerates are summed over."""
        return isinstance(self.elbo, TraceEnum_ELBO) or (
            isinstance(self.elbo, Objective) and self.elbo.enumerates_guide
        )

    @property
    def samples_discrete(self) -> bool:
        """Whether a discrete site may be drawn in the guide on purpose."""
        return isinstance(self.elbo, TraceGraph_ELBO) or (
            isinstance(self.elbo, Objective) and self.elbo.samples_discrete
        )

    @property
    def analytic(self) -> bool:
        """Whether a KL stands in closed form where there is one."""
        return self._says("analytic", TraceMeanField_ELBO)

    def _says(self, what: str, kind: type[ELBO]) -> bool:
        """What an objective says of itself; of Pyro's own, the kind says it."""
        return bool(getattr(self.elbo, what)) if isinstance(self.elbo, Objective) else isinstance(self.elbo, kind)

    @property
    def argument(self) -> str:
        """The argument that names the Pyro ELBO at work: "base" of an estimator that rests on one, else "elbo"."""
        return "base" if isinstance(getattr(self.elbo, "base", None), ELBO) else "elbo"

    @property
    def arrival(self) -> float:
        """The fraction of training from which on the estimator's objective stays the same."""
        return self.elbo.arrival() if isinstance(self.elbo, Objective) else 0.0

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Modules of the estimator's own that are trained with the program."""
        return self.elbo.modules() if isinstance(self.elbo, Objective) else ()

    def tensors(self) -> tuple[Tensor, ...]:
        """What the estimator itself carries from step to step, its modules' parameters and buffers included."""
        if not isinstance(self.elbo, Objective):
            return ()
        return (*self.elbo.tensors(), *(t for m in self.modules for t in (*m.parameters(), *m.buffers())))

    def advance(self, progress: float) -> None:
        """Say how far training is, from 0 at the first step to 1 at the last."""
        if isinstance(self.elbo, Objective):
            self.elbo.advance(progress)

    def _keep_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        pair: tuple[Any, Any] = self._trace_once(model, guide, args, kwargs)
        if isinstance(self.elbo, TraceEnum_ELBO):
            watch_factors(*pair)
        self._traces.append(pair)
        return pair

    def step(
        self, bound: BoundProgram, batch: Batch, parameters: list[nn.Parameter], extra: Tensor | None, size: int
    ) -> tuple[Tensor, Terms]:
        """Leave the gradient of the loss per datum (plus ``extra``) in the parameters.

        Args:
            bound: the program and its parameters.
            batch: the data.
            parameters: what is trained.
            extra: a further loss, nats per datum, or None.
            size: rows in the whole data set.

        Returns:
            The estimator's own loss, nats of the whole data set, and the plain bound's parts.
        """
        if self.differentiable:
            objective, loss, terms = self.objective(bound, batch, extra, size)
            if objective.requires_grad:
                objective.backward()
            return loss, terms
        # RenyiELBO takes its own gradients, where its traces show a parameter
        self._traces.clear()
        value = self.elbo.loss_and_grads(_marked(bound.model), bound.guide, *batch.args, **batch.named())
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(size)
        terms = read_terms(self.elbo, self._traces, None)
        if extra is not None and extra.requires_grad:
            extra.backward()
        self._traces.clear()
        return _as_tensor(value, terms), terms.map(Tensor.detach)

    @property
    def differentiable(self) -> bool:
        """Whether there is an `objective` to differentiate; `RenyiELBO` takes its own gradients."""
        return isinstance(self.elbo, Objective | TraceGraph_ELBO) or hasattr(self.elbo, "differentiable_loss")

    def objective(
        self, bound: BoundProgram, batch: Batch, extra: Tensor | None, size: int
    ) -> tuple[Tensor, Tensor, Terms]:
        """What `step` differentiates, for whoever calls backward himself; only where `differentiable`.

        Args:
            bound: the program and its parameters.
            batch: the data.
            extra: a further loss, nats per datum, or None.
            size: rows in the whole data set.

        Returns:
            A tensor of shape () whose gradient is that of the loss per datum plus ``extra`` (its value may mean
            nothing), the estimator's own loss, nats of the whole data set, and the plain bound's parts.
        """
        model, guide, arguments = bound.model, bound.guide, batch.named()
        self._traces.clear()
        terms: Terms | None = None
        if isinstance(self.elbo, Objective):
            found = self.elbo.estimate(model, guide, batch.args, arguments)
            loss, surrogate, terms = found.loss, found.surrogate, found.terms
        elif isinstance(self.elbo, TraceGraph_ELBO):
            value, surrogate = self.elbo._loss_and_surrogate_loss(model, guide, batch.args, arguments)
            loss = -value  # despite its name Pyro's function gives the bound
        else:
            loss = surrogate = self.elbo.differentiable_loss(model, guide, *batch.args, **arguments)
        terms = terms or read_terms(self.elbo, self._traces, surrogate)
        self._traces.clear()
        per_datum = surrogate / size
        return per_datum if extra is None else per_datum + extra, _as_tensor(loss, terms), terms.map(Tensor.detach)

    def evaluate(self, bound: BoundProgram, batch: Batch) -> tuple[Tensor, Terms]:
        """The loss (nats of the whole data set) and the plain bound's parts on ``batch``; gradients are left alone."""
        loss, terms = self._evaluated(bound, batch)
        return _as_tensor(loss, terms), terms

    def evaluate_terms(self, bound: BoundProgram, batch: Batch) -> Terms:
        """The plain bound's parts alone: Pyro's loss may be a number, which no graph can hold."""
        return self._evaluated(bound, batch)[1]

    def _evaluated(self, bound: BoundProgram, batch: Batch) -> tuple[Tensor | float, Terms]:
        self._traces.clear()
        if isinstance(self.elbo, Objective):
            found = self.elbo.estimate(bound.model, bound.guide, batch.args, batch.named())
            return found.loss.detach(), found.terms.map(Tensor.detach)
        enumerated = isinstance(self.elbo, TraceEnum_ELBO)
        evaluate = self.elbo.differentiable_loss if enumerated else self.elbo.loss
        # the parts of an enumerated bound are gradients, but none with respect to parameters
        model, guide = torch.no_grad()(bound.model), torch.no_grad()(bound.guide)
        with torch.set_grad_enabled(enumerated):
            loss = evaluate(model, guide, *batch.args, **batch.named())
        terms = read_terms(self.elbo, self._traces, loss if enumerated else None)
        self._traces.clear()
        return loss, terms.map(Tensor.detach)

    def evaluate_rows(self, bound: BoundProgram, batch: Batch, plate: str) -> Tensor:
        """What each row adds to the plain bound, nats, shape (rows,); what lies outside ``plate`` adds to none.

        The bound is linear in the scale of each row's sites, so that what a row adds is the bound's gradient with
        respect to it. Only for bounds without score functions, and without sites that the model enumerates: Pyro
        sums those over a scale that all rows share.
        """
        scale = torch.ones(len(batch), dtype=torch.float64, device=_device_of(batch), requires_grad=True)
        scaled = _ScaledRows(plate, scale)
        model, guide = scaled(torch.no_grad()(bound.model)), scaled(torch.no_grad()(bound.guide))
        self._traces.clear()
        with torch.enable_grad():
            loss = self.elbo.differentiable_loss(model, guide, *batch.args, **batch.named())
        self._traces.clear()
        (gradient,) = torch.autograd.grad(loss, scale)
        return -gradient * len(batch) / batch.size


class _ScaledRows(Messenger):
    """Scales every site in the plate by its row's scale."""

    def __init__(self, plate: str, scale: Tensor) -> None:
        super().__init__()
        self.plate, self.scale = plate, scale

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name != self.plate or not frame.vectorized:
                continue
            with torch.enable_grad():  # the program itself runs without
                msg["scale"] = msg["scale"] * self.scale.reshape(-1, *[1] * (-frame.dim - 1))


def _device_of(batch: Batch) -> torch.device | None:
    return next((value.device for value in batch.tensors().values() if isinstance(value, Tensor)), None)


def _as_tensor(loss: Tensor | float, terms: Terms) -> Tensor:
    """Where Pyro gives a number, a tensor beside the terms that keeps all its digits."""
    if isinstance(loss, Tensor):
        return loss.detach()
    return torch.tensor(loss, dtype=torch.float64, device=terms.elbo.device)


def _marked(model: Any) -> Any:
    """``model`` with one parameter statement, the sign by which Pyro decides whether there is anything to train."""

    def marked(*args: Any, **kwargs: Any) -> Any:
        effectful(lambda *_, **__: torch.zeros(()), type="param")("_pyro_lvm", name="_pyro_lvm")
        return model(*args, **kwargs)

    return marked


_NO_BOUNDS = (TraceTailAdaptive_ELBO, ReweightedWakeSleep, Trace_MMD)
"""Pyro calls these ELBOs, but their losses are not numbers of one bound."""


def make_estimator(elbo: ELBO | type[ELBO] | None, structure: Structure) -> Estimator:
    """The estimator that ``elbo`` asks for, or the one that suits ``structure`` when it is None.

    Raises:
        TypeError: if ``elbo`` is not a Pyro ELBO, an ELBO class, or None; or is one whose steps cannot be read.
    """
    if elbo is None:
        return plain_estimator(structure)
    kind = elbo if inspect.isclass(elbo) else type(elbo)
    if not issubclass(kind, ELBO):
        raise TypeError(f"elbo must be a Pyro ELBO such as Trace_ELBO(), a class of them, or None; got {elbo!r}")
    name = kind.__name__
    if name.startswith("Jit"):
        raise TypeError(f"{name} replays the graph of its first batch, and no part can be read: use {name[3:]}()")
    if issubclass(kind, _NO_BOUNDS):
        raise TypeError(f"{name} has no bound for its loss: use Trace_ELBO(), or RenyiELBO() for a tighter one")
    return Estimator(elbo if isinstance(elbo, ELBO) else elbo(), structure, "given")


def plain_estimator(structure: Structure) -> Estimator:
    """The estimator of the plain bound with the least noise that ``structure`` allows; its `reason` says why."""
    enumerated = [s.name for s in (*structure.enumerated_in_model, *structure.enumerated_in_guide)]
    if enumerated:
        why = f"chosen because {', '.join(enumerated)} is discrete and enumerated"
        return Estimator(TraceEnum_ELBO(), structure, why)
    if not structure.latent:
        return Estimator(Trace_ELBO(), structure, "chosen because nothing is latent")
    sampled = [site.name for site in structure.latent if not _has_closed_form(structure, site.name)]
    sampled += [name for name in structure.guide if name not in structure.model]
    if sampled:
        return Estimator(Trace_ELBO(), structure, f"chosen because {', '.join(sampled)} has no closed-form KL")
    names = [site.name for site in structure.latent]
    if names != [name for name in structure.guide if name in structure.model]:
        return Estimator(Trace_ELBO(), structure, "chosen because model and guide sample their sites in another order")
    return Estimator(TraceMeanField_ELBO(), structure, f"chosen because {', '.join(names)} has a closed-form KL")


def _has_closed_form(structure: Structure, name: str) -> bool:
    guide = structure.guide.get(name)
    if guide is None or not guide.fn.has_rsample:
        return False
    with torch.no_grad():  # the trace holds views of parameters that may have moved since
        return closed_form_kl(guide.fn, structure.model[name].fn) is not None

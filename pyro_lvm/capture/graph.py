"""Capture: one step, taken once through Pyro, becomes a graph of plain tensor operations that every later step runs.

What is captured is checked before it is used. On the first batch of every shape Pyro takes the step twice and the graph
takes it once, under one seed; and once more each on other rows, at other parameters, under another seed. Where losses,
parts of the bound or gradients differ, where the program draws from a generator that torch does not seed, keeps a count
of its calls, or asks for the value of a tensor, every step goes through Pyro as before, and `CapturedStep.reason` says
why.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pyro.infer import RenyiELBO
from torch import Tensor, fx

from pyro_lvm.capture.agreement import SAME_AFTER_FUSION, SAME_IN_ANOTHER_ORDER_OF_SUMS, equal
from pyro_lvm.capture.broadcasts import narrowed
from pyro_lvm.capture.guards import left_as_found, python_state, state_of_calls
from pyro_lvm.capture.readouts import put_aside
from pyro_lvm.capture.recorder import graph_of
from pyro_lvm.capture.step import Column, Step, StepResult
from pyro_lvm.data import Batch
from pyro_lvm.declaration import first_line, what_and_where
from pyro_lvm.parameters import isolated

__all__ = ["CapturedStep", "Level", "choose_level"]

Level = Literal["eager", "graph", "compiled", "cuda_graph"]

STEPS_THAT_REPAY_A_GRAPH = 200
"""A capture costs about as much as so many steps save."""

STEPS_THAT_REPAY_A_COMPILER = 4_000
"""A compilation takes up to twenty seconds, and saves one to twenty milliseconds a step."""

OPERATIONS_THAT_COMPILE_SOON = 1_500
"""Unrolled loops make graphs of thousands of operations, over which a compiler sits for minutes."""

ASKED = "capture="
"""How the reason for a level begins that was asked for."""

A_STEP_AWAY = 1 + 2**-10
"""What parameters are multiplied by for a comparison elsewhere than where they were captured."""

_Expected = tuple[Batch, bool, list[Tensor | None]]
"""A batch, whether the parameters are to be elsewhere, and what Pyro gives there."""

_log = logging.getLogger("pyro_lvm")


def choose_level(capture: bool | str, total_steps: int) -> tuple[Level, str]:
    """The level that a fit asks for, and why; it depends on the number of steps, never on a clock.

    Raises:
        ValueError: if ``capture`` is none of "auto", "graph", "compiled", "cuda_graph" and False.
    """
    if capture is False:
        return "eager", "capture=False"
    if capture == "graph":
        return "graph", f'{ASKED}"graph"'
    if capture == "compiled":
        if _compiler() is None:
            return "graph", f'{ASKED}"compiled", but there is no C++ compiler (g++ or clang++)'
        return "compiled", f'{ASKED}"compiled"'
    if capture == "cuda_graph":
        return "cuda_graph", f'{ASKED}"cuda_graph"'
    if capture != "auto":
        raise ValueError(f"capture={capture!r} is not known: use 'auto', 'graph', 'compiled', 'cuda_graph' or False")
    if total_steps < STEPS_THAT_REPAY_A_GRAPH:
        return "eager", f"{total_steps} steps do not repay a capture ({STEPS_THAT_REPAY_A_GRAPH} do)"
    if total_steps < STEPS_THAT_REPAY_A_COMPILER:
        return "graph", f"{total_steps} steps do not repay a compilation ({STEPS_THAT_REPAY_A_COMPILER} do)"
    if _compiler() is None:
        return "graph", f"{total_steps} steps would repay a compilation, but there is no C++ compiler"
    return "compiled", f"{total_steps} steps repay a compilation"


def _compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


class Uncapturable(Exception):
    """Why a step cannot be captured."""


@dataclass(frozen=True)
class _Graph:
    """A captured step: the batch's tensors and `state` in; numbers, then gradients out.

    Parameters and buffers are inputs, as the batch is, so that a program that asks for the value of one is found out.
    """

    function: Callable[..., Any]
    state: tuple[Tensor, ...]
    columns: tuple[Column, ...]
    has_gradient: tuple[bool, ...]


class CapturedStep:
    """A `Step` that runs as a graph wherever that gives what Pyro gives.

    Attributes:
        level: the level at work; "eager" once capture has been refused.
        reason: why this level.
    """

    def __init__(self, step: Step, level: Level, reason: str) -> None:
        self.step, self.level, self.reason = step, level, reason
        self._graphs: dict[Any, _Graph] = {}
        self._last: tuple[Batch, _Graph, dict[str, Tensor]] | None = None  # where all rows are a batch, it stays
        self._state: dict[str, Any] | None = None
        if level != "eager" and isinstance(step.estimator.elbo, RenyiELBO):
            self._refuse("RenyiELBO reads its bound back to Python in every step")

    def __call__(self, batch: Batch) -> StepResult:
        """Take the step on ``batch``; gradients of the loss per datum are left in the parameters."""
        if self.level == "eager":
            return self.step(batch)
        if self._last is not None and self._last[0] is batch:
            return self._run(*self._last[1:])
        try:
            tensors = _tensors(batch)
            shapes = ((name, t.shape, t.stride(), t.dtype, t.device) for name, t in tensors.items())
            key = (batch.strata, *shapes)
            graph = self._graphs.get(key)
            if graph is None:
                with left_as_found(self.step.bound.program, self.step.auxiliary_loss):
                    graph = self._graphs[key] = self._captured(batch)
        except Uncapturable as why:
            self._refuse(str(why))
            return self.step(batch)
        self._last = batch, graph, tensors
        return self._run(graph, tensors)

    def program_may_have_changed(self) -> None:
        """Look whether what the graphs have baked in is still so; where it is not, capture again."""
        if self._state is not None and self._python_state() != self._state:
            self._forget()
            self._state = None

    def _refuse(self, why: str) -> None:
        self.level, self.reason = "eager", f"not captured: {why}"
        self._forget()
        _log.info("%s: %s", self.step.bound.program.name, self.reason)

    def _forget(self) -> None:
        self._graphs.clear()
        self._last = None

    def _run(self, graph: _Graph, tensors: dict[str, Tensor]) -> StepResult:
        with torch.no_grad():
            values, *gradients = graph.function(*tensors.values(), *graph.state)
        remaining = iter(gradients)
        for parameter, has in zip(self.step.parameters, graph.has_gradient, strict=True):
            parameter.grad = next(remaining) if has else None
        return StepResult(graph.columns, values)

    def _python_state(self) -> dict[str, Any]:
        return python_state(self.step.bound.program, self.step.auxiliary_loss)

    def _state_of_calls(self) -> dict[str, Any]:
        return state_of_calls(self.step.bound.program, self.step.auxiliary_loss)

    def _captured(self, batch: Batch) -> _Graph:
        """Capture the step on the shapes of ``batch``, and compare. Nothing that is random or remembered moves."""
        bound = self.step.bound
        snapshot = bound.snapshot()
        own = [(tensor, tensor.detach().clone()) for tensor in self.step.estimator.tensors()]
        before = self._python_state()

        def fresh(function: Callable[[], Any], elsewhere: bool = False) -> Any:
            try:
                if elsewhere:
                    with torch.no_grad():
                        for parameter in bound.trainable().values():
                            parameter.mul_(A_STEP_AWAY)
                with isolated(int(elsewhere), validate=False):
                    return function()
            finally:
                bound.load(snapshot)
                with torch.no_grad():
                    for tensor, value in own:
                        tensor.copy_(value)

        try:
            # transforms of Pyro know a tensor again that they have seen: every call has its own
            once = fresh(lambda: self._taken(self.step, batch.copied()))
            between = self._state_of_calls()  # what is made in a first call alone, and kept, is no change
            again = fresh(lambda: self._taken(self.step, batch.copied()))
            if not equal(once, again, None):
                raise Uncapturable("two steps under one seed differ: the program has a source of change of its own")
            changed = [path for path, value in self._state_of_calls().items() if between.get(path, value) != value]
            if changed:
                raise Uncapturable(f"the program changes {changed[0]} in every call")
            graph = fresh(lambda: self._traced(batch.copied()))
            other, away = self._elsewhere(batch, fresh)
            graph = self._compared(graph, fresh, [(batch, False, once), (other, True, away)])
        finally:
            for parameter in self.step.parameters:
                parameter.grad = None
        self._state = before
        return graph

    def _elsewhere(self, batch: Batch, fresh: Any) -> tuple[Batch, list[Tensor | None]]:
        """Other rows, and what Pyro gives on them at other parameters, under another seed."""
        why = ""
        for rows in (batch.other, batch.turned):  # some programs cannot bear to see a row twice
            other = rows()
            try:
                return other, fresh(lambda b=other: self._taken(self.step, b), elsewhere=True)
            except Exception as error:
                why = first_line(error)
        raise Uncapturable(f"no step for comparison on other rows, at other parameters: {why}")

    def _taken(self, step: Callable[[Batch], StepResult], batch: Batch) -> list[Tensor | None]:
        result = step(batch)
        return [result.values, *(None if p.grad is None else p.grad.clone() for p in self.step.parameters)]

    def _traced(self, batch: Batch) -> _Graph:
        names = list(_tensors(batch))
        inputs = (*(tensor for _, tensor in self.step.bound.tensors()), *self.step.estimator.tensors())
        state = tuple(tensor for tensor in inputs if tensor.dtype is not torch.bool)  # masks may decide a shape
        told: dict[str, Any] = {}

        def function(*tensors: Tensor) -> list[Tensor]:
            result = self.step(_with(batch, dict(zip(names, tensors[: len(names)], strict=True))))
            gradients = [parameter.grad for parameter in self.step.parameters]
            told["columns"], told["has"] = result.columns, tuple(g is not None for g in gradients)
            return [result.values, *(g for g in gradients if g is not None)]

        try:
            with put_aside():
                graph = graph_of(function, *_tensors(batch).values(), *state)
        except Exception as error:  # whatever stands in the way of a graph, Pyro's own step is at hand
            raise Uncapturable(what_and_where(error)) from error
        return _Graph(graph.forward, state, told["columns"], told["has"])

    def _compared(self, graph: _Graph, fresh: Any, expected: list[_Expected]) -> _Graph:
        """The graph at its level, once it gives what Pyro gave."""
        tolerance = SAME_IN_ANOTHER_ORDER_OF_SUMS if self.step.estimator.enumerates else None
        try:
            agrees = self._agrees(graph, fresh, expected, tolerance)
        except Exception as error:
            raise Uncapturable(f"the graph cannot be run: {first_line(error)}") from error
        if not agrees:
            raise Uncapturable("the graph gives another loss or other gradients than Pyro")
        if self.level == "graph":
            return graph
        operations = len(_owner(graph.function).graph.nodes)
        if not self.reason.startswith(ASKED) and operations > OPERATIONS_THAT_COMPILE_SOON:
            self.level, self.reason = "graph", f"{operations} operations would take long to compile"
            return graph
        return self._compiled(graph, fresh, expected)

    def _agrees(
        self, graph: _Graph, fresh: Any, expected: list[_Expected], tolerance: dict[torch.dtype, float] | None
    ) -> bool:
        """Whether a graph gives what Pyro gave."""

        def taken(batch: Batch) -> list[Tensor | None]:
            return self._taken(lambda rows: self._run(graph, _tensors(rows)), batch)

        return all(
            equal(fresh(lambda b=batch: taken(b), elsewhere), right, tolerance, self.step.size)
            for batch, elsewhere, right in expected
        )

    def _compiled(self, graph: _Graph, fresh: Any, expected: list[_Expected]) -> _Graph:
        """The graph, narrowed and compiled; compiled as it is, or left as it is, where that does not give the same."""
        owner, inputs = _owner(graph.function), (*_tensors(expected[0][0]).values(), *graph.state)

        why = ""
        for make in (lambda: narrowed(owner, inputs), lambda: owner):
            try:
                compiled = replace(graph, function=fresh(lambda make=make: _inductor(make(), inputs, self.level)))
                if not self._agrees(compiled, fresh, expected, SAME_AFTER_FUSION):
                    raise Uncapturable("the compiled graph gives another loss or other gradients than Pyro")
                return compiled
            except Exception as error:
                why = first_line(error)
        self.level, self.reason = "graph", f"not compiled: {why}"
        _log.info("%s: %s", self.step.bound.program.name, self.reason)
        return graph


def _inductor(module: fx.GraphModule, inputs: tuple[Tensor, ...], level: Level) -> Callable[..., Any]:
    """The graph compiled, for inputs of these shapes.

    Without ``torch.compile``, which would look at every input before every call whether it still is what it was: for a
    small program that takes as long as the step. Here a graph is called with nothing else.
    """
    options = {"fallback_random": True, "triton.cudagraphs": level == "cuda_graph"}
    of_its_own = fx.GraphModule(module, copy.deepcopy(module.graph))  # passes of the compiler change it
    with torch.no_grad():
        compiled: Callable[..., Any] = torch._inductor.compile(of_its_own, list(inputs), options=options)
    return compiled


def _owner(forward: Any) -> Any:
    return forward.__self__


def _tensors(batch: Batch) -> dict[str, Tensor]:
    named: dict[str, Any] = {**batch.tensors(), "index": batch.index, "weight": batch.weight}
    if not all(isinstance(value, Tensor) for value in (*batch.args, *batch.kwargs.values())):
        raise Uncapturable("the data hold something that is not a tensor")
    return {name: value for name, value in named.items() if value is not None}


def _with(batch: Batch, tensors: dict[str, Tensor]) -> Batch:
    names = list(batch.tensors())
    count = len(batch.args)
    return replace(
        batch,
        args=tuple(tensors[name] for name in names[:count]),
        kwargs={name: tensors[name] for name in names[count:]},
        index=tensors.get("index"),
        weight=tensors.get("weight"),
    )

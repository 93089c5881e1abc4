"""The library's own loop at each level of capture: what `pyro_lvm.fit` does, with the loop handed out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.timing import Burst, Contender, Skip
from pyro_lvm.data import as_rows
from pyro_lvm.inference.epochs import Order
from pyro_lvm.inference.loop import Loop, Watch
from pyro_lvm.inference.optimisation import make_optimizer
from pyro_lvm.inference.prepare import Request, placed, prepare, resolve
from pyro_lvm.parameters import Untouched, isolated

LEVELS = ("eager", "graph", "compiled")


def ours(
    make_program: Callable[[], Any],
    data: Any,
    steps: int,
    *,
    label: str = "ours",
    levels: tuple[str, ...] = LEVELS,
    **options: Any,
) -> list[Contender]:
    """A contender at each level, each with a program of its own; options are those of `make_loop`."""

    def contender(level: str) -> Contender:
        def make() -> Burst:
            return burst(make_loop(make_program(), data, level, **options), level, steps)

        return Contender(f"{label}, {level}", make, steps, needs=("compiler",) if level == "compiled" else ())

    return [contender(level) for level in levels]


def make_loop(
    program: Any,
    data: Any,
    level: Any,
    *,
    batch_size: int | None = None,
    guide: Any = None,
    elbo: Any = None,
    lr: float = 1e-3,
) -> Loop:
    """All that `fit` does before its first step."""
    resolved, recipe = resolve(program, guide)
    rows = as_rows(data)
    untouched = Untouched(resolved.modules.values())
    with isolated(0, validate=True):
        rows, held_out, cast = placed(resolved, rows, None, None)
        prepared = prepare(Request(resolved, rows, held_out, recipe, elbo, batch_size, 0, True, False), untouched, cast)
        order = Order(rows, batch_size, prepared.strata, 0)
        parameters = list(prepared.bound.trainable().values())
        optimizer, schedule, _ = make_optimizer(
            parameters,
            optimizer=None,
            scheduler=None,
            lr=lr,
            total_steps=1,
            has_network=prepared.bound.has_network(),
        )
    return Loop(prepared, order, optimizer, schedule, parameters, None, 0, (level, "asked for by the benchmark"))


def burst(loop: Loop, level: str, steps: int) -> Burst:
    """``steps`` steps of the loop, with its read-outs; `Skip` where they do not run at ``level``."""
    watch = Watch((), None, None, 0, progress=False)

    def run() -> None:
        loop.steps_done, loop.epoch, loop.batches_done, loop.stopped = 0, 0, 0, None
        loop.total_steps = steps
        with isolated(0, validate=False):
            loop.run(watch)
        if loop.step.level != level:
            raise Skip(f"runs at level {loop.step.level!r}: {loop.step.reason}")

    return run

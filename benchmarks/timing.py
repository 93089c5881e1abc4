"""Contenders take turns in one process: whatever slows the machine down for a while slows all of them alike.

A contender's burst is a number of training steps that ends when they are done. The first burst of each, with whatever
it compiles, is timed apart; then come the rounds, in each of which every contender has one burst.
"""

from __future__ import annotations

import gc
import importlib.util
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

Burst = Callable[[], Any]

REST = 0.2
"""Seconds before a burst: threads of the last contender's linear algebra wait busily, and then go to sleep."""


class Skip(Exception):
    """Why a contender cannot run here."""


@dataclass
class Contender:
    """One way to take the steps.

    Attributes:
        name: what the table calls it.
        make: builds everything and returns the burst; it may raise `Skip`.
        steps: steps in a burst (epochs, where the comparison's unit is the epoch).
        needs: packages, or "compiler", without which it is skipped.
        size: what the time grows with, in a comparison of growth.
    """

    name: str
    make: Callable[[], Burst]
    steps: int
    needs: tuple[str, ...] = ()
    size: float | None = None
    build_seconds: float = 0.0
    first_seconds: float = 0.0
    milliseconds: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    burst: Burst | None = None

    def prepare(self) -> None:
        """Build, take the first burst, and a second to warm up."""
        missing = [name for name in self.needs if not available(name)]
        if missing:
            raise Skip(f"needs {', '.join(missing)}")
        start = time.perf_counter()
        self.burst = self.make()
        built = time.perf_counter()
        self.burst()
        self.build_seconds, self.first_seconds = built - start, time.perf_counter() - built
        self.burst()

    def run(self) -> None:
        """Take one burst, timed per step."""
        assert self.burst is not None, "prepare comes first"
        time.sleep(REST)
        start, cpu = time.perf_counter(), time.process_time()
        self.burst()
        self.cpu_seconds += time.process_time() - cpu
        self.milliseconds.append(1e3 * (time.perf_counter() - start) / self.steps)


@dataclass(frozen=True)
class Comparison:
    """Contenders for one task; ratios are to the one called ``reference``."""

    title: str
    reference: str
    contenders: list[Contender]
    unit: str = "step"


@dataclass(frozen=True)
class Line:
    """What was measured of one contender: milliseconds per step, quartiles, seconds that starting took.

    ``busy`` is processor time over time: how many threads were at work (or, with OpenMP, waiting busily).
    """

    name: str
    median_ms: float
    lower_ms: float
    upper_ms: float
    ratio: float | None
    busy: float
    start_seconds: float
    build_seconds: float
    rounds_ms: list[float]
    size: float | None


@dataclass(frozen=True)
class Outcome:
    """A comparison, measured."""

    title: str
    reference: str
    unit: str
    lines: list[Line]
    skipped: dict[str, str]


def available(name: str) -> bool:
    """Whether the package is installed, or for "compiler" whether there is one for C++."""
    if name == "compiler":
        return bool(shutil.which("g++") or shutil.which("clang++"))
    return importlib.util.find_spec(name) is not None


def measure(comparison: Comparison, rounds: int) -> Outcome:
    """Prepare all contenders, then let them take turns, in another order every round."""
    skipped: dict[str, str] = {}
    running = list(_prepared(comparison, skipped))
    gc.collect()
    order = random.Random(0)
    for _ in range(rounds):
        for contender in order.sample(running, len(running)):
            contender.run()
    reference = next((median(c.milliseconds) for c in running if c.name == comparison.reference), None)
    lines = [_line(contender, reference) for contender in running]
    for contender in comparison.contenders:
        contender.burst = None  # models and data of one comparison do not weigh on the next
    gc.collect()
    return Outcome(comparison.title, comparison.reference, comparison.unit, lines, skipped)


def _prepared(comparison: Comparison, skipped: dict[str, str]) -> Iterator[Contender]:
    for contender in comparison.contenders:
        try:
            contender.prepare()
        except Skip as why:
            skipped[contender.name] = str(why)
            print(f"skipped: {contender.name}: {why}")
            continue
        print(f"  ready: {contender.name} ({contender.first_seconds:.2f} s)", flush=True)
        yield contender


def _line(contender: Contender, reference: float | None) -> Line:
    times = contender.milliseconds
    middle = median(times)
    lower, _, upper = quantiles(times, n=4, method="inclusive") if len(times) > 1 else (middle, middle, middle)
    return Line(
        name=contender.name,
        median_ms=middle,
        lower_ms=lower,
        upper_ms=upper,
        ratio=None if reference is None else middle / reference,
        busy=1e3 * contender.cpu_seconds / (sum(times) * contender.steps),
        start_seconds=max(0.0, contender.first_seconds - middle * contender.steps / 1e3),
        build_seconds=contender.build_seconds,
        rounds_ms=times,
        size=contender.size,
    )

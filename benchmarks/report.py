"""A table to read, a JSON file to keep, and a picture."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import Line, Outcome
from pyro_lvm.figures import new_figure

PACKAGES = ("torch", "pyro-ppl", "pyro-lvm", "numpy", "numpyro", "jax", "jaxlib", "pythae")


def surroundings() -> dict[str, Any]:
    """Versions, machine and threads."""
    versions = {name: found for name in PACKAGES if (found := _version(name))}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "XLA_FLAGS", "TORCHINDUCTOR_FORCE_DISABLE_CACHES")
    return {
        "versions": versions | {"python": platform.python_version()},
        "machine": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in names if name in os.environ},
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def table(outcome: Outcome) -> str:
    """The outcome as text; the spread is the interquartile range."""
    width = max((len(line.name) for line in outcome.lines), default=10)
    rows = [
        f"\n{outcome.title}",
        f"{'':{width}}  ms/{outcome.unit:<6} {'quartiles':>19}  {'ratio':>6}  {'busy':>4} {'start s':>8}",
    ]
    for line in outcome.lines:
        quartiles = f"{line.lower_ms:.3f} to {line.upper_ms:.3f}"
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
        seconds = f"{line.busy:4.1f} {line.start_seconds:8.2f}"
        rows.append(f"{line.name:{width}}  {line.median_ms:9.3f} {quartiles:>19}  {ratio:>6}  {seconds}")
    if (exponent := growth_exponent(outcome)) is not None:
        sizes = [line.size for line in _sized(outcome) if line.size is not None]
        rows.append(f"time grows as size^{exponent:.2f} from {min(sizes):g} to {max(sizes):g}")
    return "\n".join(rows + [f"skipped: {name}: {why}" for name, why in outcome.skipped.items()])


def growth_exponent(outcome: Outcome) -> float | None:
    """The slope of log time against log size; None where the contenders do not differ in size."""
    lines = _sized(outcome)
    if len(lines) < 2:
        return None
    sizes, times = zip(*((line.size, line.median_ms) for line in lines), strict=True)
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def write(outcomes: list[Outcome], folder: Path, rounds: int, memory: list[dict[str, Any]]) -> list[Path]:
    """Write ``benchmarks.json`` and ``benchmarks.png`` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    comparisons = [{**dataclasses.asdict(o), "growth_exponent": growth_exponent(o)} for o in outcomes]
    content = {"surroundings": surroundings(), "rounds": rounds, "comparisons": comparisons, "memory": memory}
    written = [folder / "benchmarks.json"]
    written[0].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if any(outcome.lines for outcome in outcomes):
        written.append(folder / "benchmarks.png")
        _picture([o for o in outcomes if o.lines]).savefig(written[-1])
    return written


def _picture(outcomes: list[Outcome]) -> Any:
    columns = min(2, len(outcomes))
    rows = math.ceil(len(outcomes) / columns)
    tallest = max(len(outcome.lines) for outcome in outcomes)
    figure = new_figure(7.5 * columns, rows * (0.9 + 0.27 * tallest))
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for ax in axes[len(outcomes) :]:
        ax.set_axis_off()
    for ax, outcome in zip(axes, outcomes, strict=False):
        if growth_exponent(outcome) is not None:
            _growth(ax, outcome)
        else:
            _bars(ax, outcome)
        ax.set_title(outcome.title, fontsize=9)
    return figure


def _bars(ax: Any, outcome: Outcome) -> None:
    lines = outcome.lines[::-1]
    medians = np.array([line.median_ms for line in lines])
    spread = [medians - [line.lower_ms for line in lines], [line.upper_ms for line in lines] - medians]
    colours = ["#c44e52" if line.name.startswith("ours") else "#8c8c8c" for line in lines]
    ax.barh([line.name for line in lines], medians, xerr=spread, color=colours, error_kw={"elinewidth": 1})
    if (reference := next((line for line in lines if line.name == outcome.reference), None)) is not None:
        ax.axvline(reference.median_ms, color="black", linewidth=0.8, linestyle=":")
    if medians.max() > 8 * medians.min():
        ax.set_xscale("log")
    ax.set_xlabel(f"ms per {outcome.unit}, median and quartiles", fontsize=8)
    ax.tick_params(labelsize=7)


def _growth(ax: Any, outcome: Outcome) -> None:
    lines = _sized(outcome)
    sizes = [line.size for line in lines]
    ax.loglog(sizes, [line.median_ms for line in lines], "o-", color="#c44e52")
    ax.fill_between(sizes, [line.lower_ms for line in lines], [line.upper_ms for line in lines], alpha=0.3)
    ax.set_xlabel(f"size; time grows as size^{growth_exponent(outcome):.2f}", fontsize=8)
    ax.set_ylabel(f"ms per {outcome.unit}", fontsize=8)
    ax.tick_params(labelsize=7)


def _sized(outcome: Outcome) -> list[Line]:
    return [line for line in outcome.lines if line.size is not None]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")

"""Run comparisons: ``python -m benchmarks vae mixture --rounds 15 --out runs/benchmarks``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any


def main() -> None:
    """Parse the command line, measure, print, write."""
    arguments = _arguments()
    _same_threads_for_all(arguments.threads)
    if not arguments.keep_cache:  # else the seconds of compilation would be those of a look into a folder
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    from benchmarks import memory, report
    from benchmarks.timing import measure

    outcomes: list[Any] = []
    remembered: list[dict[str, Any]] = []
    known = comparisons()
    names = arguments.names or [*known, "memory"]
    print(report.surroundings())
    for name in names:
        if name == "memory":
            remembered = memory.measure(arguments.tiny)
            print(memory.table(remembered))
            continue
        for comparison in known[name](tiny=arguments.tiny, everything=arguments.everything):
            kept = [c for c in comparison.contenders if _wanted(c.name, arguments.only, arguments.without)]
            print(f"\n{comparison.title}", flush=True)
            outcomes.append(measure(replace(comparison, contenders=kept), arguments.rounds))
            print(report.table(outcomes[-1]), flush=True)
            # what is known by now, should the rest be broken off
            report.write(outcomes, arguments.out, arguments.rounds, remembered)
    for path in report.write(outcomes, arguments.out, arguments.rounds, remembered):
        print(f"wrote {path}")


def comparisons() -> dict[str, Callable[..., Iterator[Any]]]:
    """The comparisons by name."""
    from benchmarks import checkpoints, eight_schools, em, growth, mixture, ppca, semi_supervised, vae

    modules = (vae, semi_supervised, mixture, ppca, eight_schools, em, growth, checkpoints)
    return {module.__name__.rpartition(".")[2]: module.comparisons for module in modules}


NAMES = ("vae", "semi_supervised", "mixture", "ppca", "eight_schools", "em", "growth", "checkpoints", "memory")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="name", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--rounds", type=int, default=15, help="bursts of each contender (15)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for JSON and picture")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="contenders whose name holds a text")
    parser.add_argument("--without", nargs="+", default=[], metavar="TEXT", help="leave out such contenders")
    parser.add_argument("--threads", type=int, help="for torch and JAX alike; default: what torch takes")
    parser.add_argument("--everything", action="store_true", help="also K=50 and full covariance in the mixture")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--keep-cache", action="store_true", help="let inductor reuse what it compiled before")
    return parser.parse_args()


def _same_threads_for_all(threads: int | None) -> None:
    """Let torch and JAX, which is imported later, have as many threads as torch takes, or as asked for.

    JAX takes a thread for every processor that it may run on, whatever XLA_FLAGS say: so it may run on fewer.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: torch.get_num_threads()])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _wanted(name: str, only: list[str], without: list[str]) -> bool:
    return (not only or any(text in name for text in only)) and not any(text in name for text in without)


if __name__ == "__main__":
    main()

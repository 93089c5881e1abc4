"""Kill fits with SIGKILL, resume them, and compare their ends: ``python -m benchmarks.kills --kills 200``.

A mixture on all rows and a VAE in minibatches are fitted by child processes that write a checkpoint every few steps.
Half of the kills come at a random moment, half inside a write that is drawn out: with half of the bytes in the
temporary file, before the disk is waited for, or between renaming the new file and deleting the oldest. What a run ends
with, after however many kills, has to equal the end of an undisturbed one to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import pyro_lvm as lvm
from pyro_lvm.storage import files
from pyro_lvm.storage.tree import pack

STAGES = ("half written", "before the disk", "renamed")


def fit_mixture(**options: Any) -> lvm.Fit:
    """Two clusters, all rows in a step."""
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    x += torch.tensor([[3.0, 0.0], [-3.0, 0.0]]).repeat(150, 1)
    return lvm.fit(lvm.GaussianMixture(2, 2), x, steps=250, seed=1, **options)


def fit_vae(**options: Any) -> lvm.Fit:
    """A small VAE in minibatches, with a plateau schedule and validation: all that has a state."""
    x = torch.bernoulli(torch.full((500, 20), 0.3), generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        vae = lvm.VAE(20, 2, (16,))
    return lvm.fit(
        vae,
        x,
        epochs=32,
        batch_size=64,
        seed=1,
        lr=0.01,
        validation=0.1,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3),
        **options,
    )


PROGRAMS = {"mixture": fit_mixture, "vae": fit_vae}


def main() -> None:
    """Parse the command line, kill, count, compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="in all (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads do not outlive a fork
    moments = random.Random(arguments.seed)
    told: dict[str, Any] = {}
    for name in PROGRAMS:
        told[name] = _killed(name, arguments.kills // len(PROGRAMS), moments)
        print(f"{name}: {told[name]}", flush=True)
    print(json.dumps(told))
    sys.exit(any(each["different"] for each in told.values()))


def _killed(name: str, kills: int, moments: random.Random) -> dict[str, Any]:
    """Kill runs of one program so many times; count the kills by their moment, and the runs that ended differently."""
    counts: Counter[str] = Counter()
    runs = different = 0
    with tempfile.TemporaryDirectory() as place:
        undisturbed = Path(place) / "undisturbed"
        started = time.perf_counter()
        _wait(_child(name, None, undisturbed, None))
        seconds = time.perf_counter() - started
        while counts.total() < kills:
            folder, end = Path(place) / f"run{runs}", Path(place) / f"end{runs}"
            while not end.exists():
                in_write = counts.total() < kills and counts.total() % 2 == 0
                reader, writer = os.pipe()
                process = _child(name, folder, end, writer if in_write else None)
                os.close(writer)
                moment = "done"
                if in_write:
                    moment = _in_write(process, reader, moments)
                elif counts.total() < kills:
                    moment = _at_random(process, moments.uniform(0.0, seconds))
                os.close(reader)
                _wait(process)
                if moment != "done":
                    counts[moment] += 1
            runs += 1
            different += end.read_bytes() != undisturbed.read_bytes()
    return {"kills": counts.total(), "moments": dict(counts), "runs": runs, "different": different}


def _child(name: str, folder: Path | None, end: Path, writes: int | None) -> int:
    """A process that fits, or goes on fitting, and writes what the fit ends with."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        if writes is not None:
            _draw_out_writes(writes)
        fit = PROGRAMS[name](**({} if folder is None else {"checkpoint": folder, "checkpoint_every": 9}))
        plain, tensors = pack([dict(fit.params), dict(fit.history), fit.elbo], "end")
        files.write_file(end, files.digest(json.dumps(plain), tensors).encode())
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _draw_out_writes(tell: int) -> None:
    """Make every stage of a write last, and say through a pipe that it has begun."""

    def linger(stage: int) -> None:
        os.write(tell, bytes([stage]))
        time.sleep(0.004)

    class Slow:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            linger(0)
            self.file.write(content[len(content) // 2 :])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    opened, synced, renamed = Path.open, os.fsync, Path.replace

    def open_slowly(self: Path, *args: Any, **kwargs: Any) -> Any:
        file = opened(self, *args, **kwargs)
        return Slow(file) if self.suffix == ".part" else file

    def sync_slowly(descriptor: int) -> None:
        linger(1)
        synced(descriptor)

    def rename_slowly(self: Path, target: Path) -> Path:
        moved = renamed(self, target)
        linger(2)
        return moved

    Path.open, os.fsync, Path.replace = open_slowly, sync_slowly, rename_slowly  # type: ignore[method-assign,assignment]


def _in_write(process: int, reader: int, moments: random.Random) -> str:
    """Kill in one of the stages of one of the next writes; the moment in words, "done" where there was none."""
    for _ in range(moments.randrange(1, 30)):
        stage = os.read(reader, 1)
        if not stage:
            return "done"
    time.sleep(moments.uniform(0.0, 0.003))
    os.kill(process, signal.SIGKILL)
    return STAGES[stage[0]]


def _at_random(process: int, seconds: float) -> str:
    """Kill after so many seconds, unless it is done by then."""
    descriptor = os.pidfd_open(process)
    try:
        done, _, _ = select.select([descriptor], [], [], seconds)
    finally:
        os.close(descriptor)
    if done:
        return "done"
    os.kill(process, signal.SIGKILL)
    return "at random"


def _wait(process: int) -> None:
    _, status = os.waitpid(process, 0)
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"a fit ended by itself, with status {status}")


if __name__ == "__main__":
    main()

"""Peak memory of a fit against its length and its sizes, each in a process of its own: a peak never comes down."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

_SIZES: dict[str, tuple[int, ...]] = {
    "epochs": (1, 10, 100),
    "components": (2, 20, 200),
    "latent": (2, 20, 200),
    "rows": (10**5, 10**6, 10**7),
}
_BASE = {"epochs": 5, "components": 5, "latent": 10, "rows": 10_000}


def measure(tiny: bool = False) -> list[dict[str, Any]]:
    """Megabytes by which a fit raises the peak, for every setting."""
    found = []
    grown = [("mixture", "epochs"), ("mixture", "components"), ("vae", "epochs"), ("vae", "latent"), ("em", "rows")]
    for program, grows in grown:
        for value in _SIZES[grows][: 1 if tiny else None]:
            setting = {**_BASE, "program": program, grows: value} | ({"rows": 500} if tiny else {})
            command = [sys.executable, "-m", "benchmarks.memory", json.dumps(setting)]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.append({"program": program, "grows": grows, "value": value, **json.loads(told.splitlines()[-1])})
            print(f"  memory: {found[-1]}", flush=True)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The megabytes as text."""
    rows = ["\npeak memory of a fit above that of imports and data, MB"]
    rows += [f"{f['program']:8} {f['grows']:>10} = {f['value']:<6} {f['fit_mb']:8.1f}" for f in found]
    return "\n".join(rows)


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands ru_maxrss down from the process that started this one
        return float(re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))[1]) / 1024  # type: ignore[index]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)  # bytes there, kilobytes elsewhere


def _em(setting: dict[str, Any]) -> dict[str, float]:
    """EM of a mixture, K=8, over a memmap of eight columns: five iterations; the memory that is the process's own."""
    import tempfile

    import numpy as np
    import torch

    import pyro_lvm as lvm

    warnings.simplefilter("ignore", lvm.ProgramWarning)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        x = np.memmap(f"{folder}/x", dtype=np.float32, mode="w+", shape=(setting["rows"], 8))
        for start in range(0, len(x), 10**5):
            x[start : start + 10**5] = generator.normal(size=x[start : start + 10**5].shape)
        x.flush()
        init = torch.from_numpy(np.array(x[:8]))
        lvm.em(lvm.GaussianMixture(8, 8), np.array(x[:2000]), init=init, max_iter=1, seed=0)  # what loads on first use
        before, found = _own_mb(), [0.0]
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.01):
                found[0] = max(found[0], _own_mb() - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        lvm.em(lvm.GaussianMixture(8, 8), x, init=init, max_iter=5, tol=0.0, seed=0)
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    return {"before_mb": before, "fit_mb": found[0], "seconds": seconds}


def _own_mb() -> float:
    """Memory that is no file's: pages of a memmap count as the process's while nobody else wants the room."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return float(re.search(r"RssAnon:\s*(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def _fit(setting: dict[str, Any]) -> dict[str, float]:
    import torch

    import pyro_lvm as lvm

    if setting["program"] == "em":
        return _em(setting)
    generator = torch.Generator().manual_seed(0)
    rows = setting["rows"]
    program: Any
    if setting["program"] == "mixture":
        x = torch.randn(rows, 2, generator=generator)
        program, batch_size = lvm.GaussianMixture(setting["components"], 2, "diag"), None
        program.set_parameters(
            torch.full((setting["components"],), 1 / setting["components"]),
            x[: setting["components"]],
            torch.ones(setting["components"], 2),
        )
    else:
        x = torch.bernoulli(torch.full((rows, 100), 0.3), generator=generator)
        program, batch_size = lvm.VAE(100, setting["latent"], (50,)), 100
    lvm.fit(program, x[:200], steps=2, batch_size=batch_size, seed=0, capture="graph")  # what loads on first use
    before = _peak_mb()
    lvm.fit(program, x, epochs=setting["epochs"], batch_size=batch_size, seed=0, capture="graph")
    return {"before_mb": before, "fit_mb": _peak_mb() - before}


if __name__ == "__main__":
    print(json.dumps(_fit(json.loads(sys.argv[1]))))

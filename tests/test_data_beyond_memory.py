"""Data ten times as large as the memory that the process may take: the same numbers as from memory, to the bit."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import pyro_lvm as lvm

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are those of Linux")

COLUMNS, MARGIN = 256, 32 * 2**20  # a part takes 512 rows of 1 kB twenty to thirty times
ROWS = 10 * MARGIN // (4 * COLUMNS)

SCRIPT = """
import hashlib, json, resource, sys
import numpy as np, torch
import pyro_lvm as lvm
from pyro_lvm import walk
from pyro_lvm.inference import bound
torch.set_num_threads(1)
walk.BYTES_AT_A_TIME = 2**19  # no process is as small as this one: a pass of draws shrinks with it
bound.MAX_PASSES = 2  # what three steps leave is far from its bound: a thousand passes would not know it
x = np.load(sys.argv[1], mmap_mode="r")
margin = int(sys.argv[2])

def train(rows):
    torch.manual_seed(0)
    vae = lvm.VAE(x.shape[1], 2, hidden=(8,), likelihood="normal")
    return lvm.fit(vae, rows, epochs=1, batch_size=512, seed=0, validation=rows[:2000], capture=False)

small = lvm.VAE(x.shape[1], 2, hidden=(8,), likelihood="normal")
lvm.fit(small, x[:4000], steps=3, batch_size=256, seed=0, capture=False)  # what libraries allocate once
shared = lvm.fit(lvm.BayesianPPCA(x.shape[1], 2), torch.tensor(x[:2000]), steps=3, seed=0, capture=False)
if margin:
    used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + margin, resource.RLIM_INFINITY))
    try:
        np.array(x)
    except MemoryError:
        pass
    else:
        raise AssertionError("the limit does not hold")
else:
    x = np.array(x)
fit = train(x)
found = {"elbo": fit.elbo, "n": fit.info["n"]}
digest = hashlib.sha256()
for name in sorted(fit.params):
    digest.update(fit.params[name].numpy().tobytes())
found["params"] = digest.hexdigest()
found["evidence"] = lvm.log_evidence(fit, x, 1, seed=0).double().sum().item()
draws = fit.posterior(x, num_draws=1, seed=0)
found["draws"] = hashlib.sha256(draws["z"].numpy().tobytes()).hexdigest()
found["log_p"] = draws.log_p.tolist()
found["encoded"] = hashlib.sha256(fit.program.encode(x).mean.numpy().tobytes()).hexdigest()
found["shared"] = shared.posterior(x, num_draws=1, seed=0).log_p.tolist()
some = x[: len(x) // 4]  # the slowest: more than the limit will do
found["decomposed"] = lvm.decompose(fit, some, num_samples=2, seed=0)["reconstruction"]
if margin:
    everything = lambda: lvm.diagnose(fit, x, num_samples=25, num_rows=None)
    for refused in (lambda: fit.posterior(x, num_draws=100), everything, lambda: fit.program.reconstruct(x)):
        try:
            refused()
        except lvm.NotEnoughMemoryError as error:
            found.setdefault("refused", []).append(str(error))
print(json.dumps(found))
"""


def ran(path: pathlib.Path, margin: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(margin)],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parent.parent,
        env={"OMP_NUM_THREADS": "1", "PATH": "", "MALLOC_ARENA_MAX": "2"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_memmap_of_ten_times_the_limit_gives_what_memory_gives(tmp_path):
    path = tmp_path / "x.npy"
    x = np.lib.format.open_memmap(path, "w+", np.float32, (ROWS, COLUMNS))
    generator = np.random.default_rng(0)
    for start in range(0, ROWS, 8192):
        x[start : start + 8192] = generator.standard_normal((len(x[start : start + 8192]), COLUMNS), np.float32)
    x.flush()
    del x
    limited = ran(path, MARGIN)
    refused = limited.pop("refused")
    assert limited == ran(path, 0)
    assert limited["n"] == ROWS
    assert "draws of z" in refused[0]
    assert "rows to judge" in refused[1]
    assert f"reconstruct() for {ROWS} rows would take {4 * COLUMNS * ROWS / 1e6:.0f} MB" in refused[2]


@pytest.mark.parametrize("batch_size", [4, 25])
def test_an_evaluation_takes_no_more_of_large_rows_than_a_part_or_a_step(monkeypatch, batch_size):
    seen = {True: set(), False: set()}

    class Watched(lvm.PPCA):
        def model(self, x, size=None):
            seen[torch.is_grad_enabled()].add(len(x))
            super().model(x, size=size)

    monkeypatch.setattr("pyro_lvm.walk.BYTES_AT_A_TIME", 10 * 8 * 6)  # ten rows
    x = np.random.default_rng(0).normal(size=(200, 6))
    lvm.fit(Watched(6, 1), x, epochs=1, batch_size=batch_size, validation=x[:60], check=False, capture=False, seed=0)
    assert max(seen[True]) == batch_size
    assert max(seen[False]) == max(10, batch_size)


def test_a_start_sees_a_sample_of_what_is_too_large(tmp_path, monkeypatch):
    seen = []

    class Watched(lvm.PPCA):
        def initialize(self, x, *, seed):
            seen.append(x)
            super().initialize(x, seed=seed)

    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(1000, 2)))
    on_disk = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr("pyro_lvm.inference.prepare.BYTES_TO_START_FROM", 100 * 16)
    for x in (on_disk, on_disk, torch.tensor(on_disk)):
        lvm.fit(Watched(2, 1), x, steps=1, batch_size=50, seed=0)
    assert [len(x) for x in seen] == [100, 100, 1000]
    assert torch.equal(seen[0], seen[1])
    numbers = [int((seen[2] == row).all(1).nonzero()) for row in seen[0]]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 800  # from everywhere, not the first


def test_draws_of_parts_are_draws_of_all(monkeypatch):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    fit = lvm.em(lvm.PPCA(3, 2), x, seed=0)
    together = fit.posterior(x, 500, seed=0)
    monkeypatch.setattr("pyro_lvm.walk.BYTES_AT_A_TIME", 7 * 24)
    apart = fit.posterior(x, 500, seed=0)
    assert apart["z"].shape == together["z"].shape
    assert apart.dims == together.dims
    exact = fit.program.posterior(x)
    error = exact.variance.sqrt() / 500**0.5
    assert ((apart.mean("z") - exact.mean) / error).abs().max() < 4.5
    # log p - log q is the evidence, whatever is drawn: the guide is the exact posterior
    assert torch.allclose(apart.log_p - apart.log_q, fit.program.log_prob(x).sum().expand(500))


def test_responsibilities_of_parts_are_those_of_all(monkeypatch):
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    fit = lvm.em(lvm.GaussianMixture(3, 2), x, max_iter=5, seed=0)
    together = fit.responsibilities(x)
    monkeypatch.setattr("pyro_lvm.walk.ROWS_AT_A_TIME", 7)
    assert torch.allclose(fit.responsibilities(x), together, rtol=1e-12)
    assert fit.posterior(x, 10, seed=0)["component"].shape == (10, 50)

"""What does not fit is refused before it is made, with both numbers and an edit."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from small_programs import rows

import pyro_lvm as lvm
from pyro_lvm import memory
from pyro_lvm.data import as_rows


@pytest.fixture
def little(monkeypatch):
    def leave(count):
        monkeypatch.setattr(memory, "available", lambda: count)

    return leave


def test_the_least_of_what_is_left_counts(tmp_path, monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n",
        "/proc/self/status": "Name:\tpython\nVmData:\t100 kB\nVmSize:\t400 kB\n",
        "/proc/self/cgroup": "0::/mine/inner\n",
        "/sys/fs/cgroup/mine/memory.max": f"{4000 * 1024}\n",
        "/sys/fs/cgroup/mine/memory.current": f"{1500 * 1024}\n",
        "/sys/fs/cgroup/mine/memory.stat": f"anon 7\nfile {500 * 1024}\n",
        "/sys/fs/cgroup/mine/inner/memory.max": "max\n",
        "/sys/fs/cgroup/mine/inner/memory.current": "5\n",
    }
    monkeypatch.setattr(memory, "_text", lambda path: files.get(str(path), ""))
    resource = pytest.importorskip("resource")
    limits = {resource.RLIMIT_DATA: resource.RLIM_INFINITY, resource.RLIMIT_AS: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], limits[which]))
    monkeypatch.setattr(memory, "_free_in_heap", lambda: 50 * 1024)
    assert memory.available() == 3000 * 1024  # what files hold of the group's memory can be given back
    limits[resource.RLIMIT_AS] = 2400 * 1024
    assert memory.available() == 2050 * 1024  # what malloc holds free need not be asked for
    limits[resource.RLIMIT_DATA] = 1100 * 1024
    assert memory.available() == 1050 * 1024
    files["/proc/self/cgroup"] = "4:memory:/old\n2:cpu:/old\n"
    old = "/sys/fs/cgroup/memory/old/memory"
    files |= {f"{old}.limit_in_bytes": "900", f"{old}.usage_in_bytes": "1000", f"{old}.stat": "total_cache 50\n"}
    assert memory.available() == 0


def test_what_malloc_holds_free_is_known_on_linux():
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("this libc has no mallinfo2")
    before = memory._free_in_heap()
    blocks = [bytearray(100_000) for _ in range(200)]  # less than malloc would map from the system for each
    last = bytearray(100_000)  # holds the top of the heap where it is
    taken = memory._free_in_heap()
    blocks.clear()
    freed = memory._free_in_heap()
    assert freed - taken > 10_000_000
    assert before >= 0
    assert len(last) == 100_000


def test_a_system_that_says_nothing_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "_of_machine", lambda: None)
    monkeypatch.setattr(memory, "_of_containers", list)
    monkeypatch.setattr(memory, "_of_limits", list)
    assert memory.available() is None
    memory.require_room(10**18, "everything", "ask for less")


def test_both_numbers_and_an_edit(little):
    little(2_000_000)
    with pytest.raises(lvm.NotEnoughMemoryError, match=r"^a table would take 3.5 GB, and 2 MB are free: take less$"):
        memory.require_room(3_500_000_000, "a table", "take less")
    memory.require_room(2_000_000, "a table", "take less")


def test_too_many_draws_are_refused_before_the_first(little):
    x = rows(20, 2, dtype=torch.float32)
    fit = lvm.fit(lvm.PPCA(2, 1), x, steps=2, seed=0)
    little(2 * 300 * 20 * 4)
    assert fit.posterior(x, num_draws=300, seed=0)["z"].shape == (300, 20, 1)
    with pytest.raises(lvm.NotEnoughMemoryError, match=r"301 draws of z for 20 rows would take .*fewer draws"):
        fit.posterior(x, num_draws=301, seed=0)


def test_all_rows_at_once_are_refused_where_they_are_not_in_memory(little, tmp_path):
    np.save(tmp_path / "x.npy", rows(20, 2, dtype=torch.float32).numpy())
    data = as_rows(np.load(tmp_path / "x.npy", mmap_mode="r"))
    little(20 * 2 * 4 - 1)
    with pytest.raises(lvm.NotEnoughMemoryError, match=r"all 20 rows at once would take .*name `size`"):
        data.whole()
    assert as_rows(rows(20, 2, dtype=torch.float32)).whole().args[0].shape == (20, 2)  # it is there already
    dataset = torch.utils.data.TensorDataset(rows(20, 2, dtype=torch.float32))
    with pytest.raises(lvm.NotEnoughMemoryError, match="all 20 rows at once"):
        as_rows(dataset).whole()


def test_rows_to_judge_are_refused_where_they_would_not_fit(little, tmp_path):
    x = rows(600, 2, dtype=torch.float32)
    np.save(tmp_path / "x.npy", x.numpy())
    fit = lvm.fit(lvm.PPCA(2, 1), x, steps=2, seed=0)
    little(600 * 8 * 2 - 1)
    with pytest.raises(lvm.NotEnoughMemoryError, match=r"600 rows to judge, twice would take .*num_rows=1000"):
        lvm.diagnose(fit, np.load(tmp_path / "x.npy", mmap_mode="r"), num_samples=25, num_simulations=0, seed=0)

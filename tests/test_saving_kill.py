"""A process that dies while it saves: whoever reads then finds the old fit or the new one, whole."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from small_programs import rows

import pyro_lvm as lvm
from pyro_lvm.storage import folder as storage

DIES = """
import os, pathlib, shutil, sys
import pyro_lvm as lvm


new, place, stage = lvm.load(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
STEPS = [
    *((pathlib.Path, name) for name in ("mkdir", "open", "write_bytes", "replace", "rename", "unlink", "rmdir")),
    (os, "fsync"), (shutil, "rmtree"),
]

def save_and_die_at(stage):
    passed = 0

    def watched(step):
        def call(*args, **kwargs):
            nonlocal passed
            for before in (True, False):
                passed += 1
                if passed == stage:
                    os._exit(77)
                if before:
                    result = step(*args, **kwargs)
            return result
        return call

    for owner, name in STEPS:
        setattr(owner, name, watched(getattr(owner, name)))
    new.save(place)
    os._exit(0)

child = os.fork()
if child == 0:
    save_and_die_at(stage)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

ALL_STAGES = """
import json, pathlib, runpy, shutil, sys, os
import pyro_lvm as lvm


saved, start, work = sys.argv[1:]
found = []
for stage in range(1, 100):
    place = pathlib.Path(work) / f"{stage}" / "fit"
    place.parent.mkdir()
    if start:
        shutil.copytree(start, place)
    sys.argv = ["dies", saved, str(place), str(stage)]
    try:
        runpy.run_path(sys.argv_script, run_name="__main__")
    except SystemExit as left:
        code = left.code
    found.append(code)
    if code == 0:
        break
print(json.dumps(found))
"""


SAVED = pathlib.Path(__file__).parent / "saved" / "gaussian_mixture"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    old, new = (lvm.fit(lvm.PPCA(3, 1), rows(seed=seed), steps=2, seed=seed) for seed in (0, 1))
    old.save(folder / "old")
    new.save(folder / "new")
    return folder, old, new


def killed_at_every_stage(folder, start, work):
    """Copies of ``start`` (None: nothing) in which a process died that was saving over it, a stage later in each."""
    (work / "dies.py").write_text(DIES)
    script = ALL_STAGES.replace("sys.argv_script", repr(str(work / "dies.py")))
    arguments = [str(folder / "new"), str(start or ""), str(work)]
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    codes = json.loads(run.stdout)
    assert codes == [77] * (len(codes) - 1) + [0]
    assert len(codes) > 10
    return [work / f"{stage}" / "fit" for stage in range(1, 1 + len(codes))]


def which(place, *fits):
    """The number of the fit that lies there."""
    found = lvm.load(place)
    for number, fit in enumerate(fits):
        if fit.elbo == found.elbo:
            assert all(torch.equal(value, fit._snapshot[name]) for name, value in found._snapshot.items())
            return number
    pytest.fail("neither of the two")


def names(folder):
    return sorted(entry.name.split("-")[0] for entry in folder.iterdir())


@pytest.mark.parametrize("of_format", [1, 2])
def test_killed_while_saving_over_a_fit(two, of_format, tmp_path):
    folder, old, new = two
    start = folder / "old"
    if of_format == 1:
        start = SAVED
        old = lvm.load(SAVED)
    places = killed_at_every_stage(folder, start, tmp_path)
    there = [which(place, old, new) for place in places]
    assert there == sorted(there)  # the old one up to a moment, the new one from then on
    assert set(there) == {0, 1}
    for place in places:
        new.save(place)
        assert which(place, new) == 0
        assert names(place) == ["config.json", "tensors"]
        assert names(place.parent) == ["fit"]


def test_killed_while_saving_to_a_new_place(two, tmp_path):
    folder, _, new = two
    places = killed_at_every_stage(folder, None, tmp_path)
    whole = []
    for place in places:
        whole.append((place / "config.json").exists())
        if whole[-1]:
            assert which(place, new) == 0
        else:
            with pytest.raises(lvm.StorageError, match=r"config\.json cannot be read"):
                lvm.load(place)
        new.save(place)
        assert which(place, new) == 0
        assert names(place) == ["config.json", "tensors"]
    assert whole == sorted(whole)
    assert not whole[0]
    assert whole[-1]


def test_a_reader_meets_one_fit_or_the_other_while_they_are_saved_over_each_other(two, tmp_path):
    folder, old, new = two
    shutil.copytree(folder / "old", tmp_path / "fit")
    stop = threading.Event()

    def write():
        while not stop.is_set():
            new.save(tmp_path / "fit")
            old.save(tmp_path / "fit")

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        met = {which(tmp_path / "fit", old, new) for _ in range(100)}
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert met == {0, 1}
    assert names(tmp_path / "fit") == ["config.json", "tensors"]


def test_a_reader_who_is_overtaken_reads_again(two, tmp_path, monkeypatch):
    folder, old, new = two
    shutil.copytree(folder / "old", tmp_path / "fit")
    read, overtaken = storage.read_file, []

    def slowly(path):
        if path.name != "config.json" and not overtaken:
            overtaken.append(path)
            new.save(tmp_path / "fit")
        return read(path)

    monkeypatch.setattr(storage, "read_file", slowly)
    assert which(tmp_path / "fit", old, new) == 1
    assert not overtaken[0].exists()


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_system_that_refuses_leaves_the_old_fit_or_the_new_one(two, step, tmp_path, monkeypatch):
    folder, old, new = two
    shutil.copytree(folder / "old", tmp_path / "fit")
    waited = os.fsync
    calls = []

    def refuses(descriptor):
        calls.append(descriptor)
        if len(calls) == step:
            raise OSError(28, "No space left on device")
        waited(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    with pytest.raises(lvm.StorageError, match=r"cannot be written \(No space left on device\): see to room"):
        new.save(tmp_path / "fit")
    # from the fourth on, the name of the new text is there, and only the wait for the disk has failed
    assert which(tmp_path / "fit", old, new) == (step == 4)
    assert not list(tmp_path.glob("**/*.part"))
    monkeypatch.setattr(os, "fsync", waited)
    new.save(tmp_path / "fit")
    assert names(tmp_path / "fit") == ["config.json", "tensors"]

"""Reading ahead changes nothing but the time: same order, same errors, and no thread left."""

from __future__ import annotations

import threading
import time
import traceback

import numpy as np
import pytest
import torch
from small_programs import rows

import pyro_lvm as lvm
from pyro_lvm.data import as_rows
from pyro_lvm.prefetch import read_ahead


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "pyro_lvm reads ahead"]


@pytest.fixture
def on_disk(tmp_path):
    np.save(tmp_path / "x.npy", rows(50, 2, dtype=torch.float32).numpy())
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def test_the_order_is_that_of_what_was_asked():
    late = threading.Event()

    def read(number):
        if number == 0:
            assert late.wait(10.0)  # the first is ready after the others
        elif number == 2:
            late.set()
        return number

    assert list(read_ahead(range(9), read)) == list(range(9))


def test_the_next_are_read_before_they_are_asked_for():
    done = [threading.Event() for _ in range(3)]
    found = read_ahead(range(3), lambda number: done[number].set(), depth=2)
    next(found)
    assert all(each.wait(10.0) for each in done)


def test_no_more_than_depth_are_read_ahead():
    asked = []

    def ask():
        for number in range(10):
            asked.append(number)
            yield number

    found = read_ahead(ask(), lambda number: number, depth=2)
    next(found)
    assert asked == [0, 1, 2]


def test_an_error_comes_where_its_turn_is_with_its_traceback():
    def read(number):
        if number == 2:
            raise OSError("the disk is gone")
        return number

    found = read_ahead(range(5), read)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone") as raised:
        next(found)
    assert "in read" in "".join(traceback.format_tb(raised.value.__traceback__))
    assert not readers()


def test_who_breaks_off_leaves_no_thread():
    found = read_ahead(range(100), lambda number: time.sleep(0.2 if number else 0.0))
    next(found)
    assert readers()
    found.close()
    assert not readers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_fit_that_is_broken_off_leaves_no_thread(on_disk, error):
    def stop(end):
        raise error

    arguments = {"epochs": 5, "batch_size": 7, "seed": 0, "callbacks": [stop]}
    if error is KeyboardInterrupt:
        assert "interrupted" in lvm.fit(lvm.PPCA(2, 1), on_disk, **arguments).info["stopped"]
    else:
        with pytest.raises(ZeroDivisionError):
            lvm.fit(lvm.PPCA(2, 1), on_disk, **arguments)
    assert not readers()


def test_a_fit_from_disk_is_that_from_memory_to_the_bit(on_disk):
    fits = [lvm.fit(lvm.PPCA(2, 1), x, epochs=3, batch_size=7, seed=0) for x in (on_disk, torch.tensor(on_disk))]
    assert fits[0].elbo == fits[1].elbo
    for name, value in fits[0].params.items():
        assert torch.equal(value, fits[1].params[name])


def test_only_what_no_user_wrote_is_read_by_another_thread(on_disk, tmp_path):
    class Mine:
        def __len__(self):
            return 50

        def __getitem__(self, index):
            assert threading.current_thread() is threading.main_thread()
            return torch.rand(50, 2)[index]

    assert as_rows(on_disk).on_disk
    assert as_rows((on_disk, torch.zeros(50))).on_disk
    assert as_rows(lvm.datasets.folder(tmp_path)).on_disk
    assert as_rows(on_disk).split(0.5, torch.Generator().manual_seed(0))[0].on_disk
    assert not as_rows(torch.zeros(50, 2)).on_disk
    assert not as_rows(Mine()).on_disk
    assert not as_rows((on_disk, Mine())).on_disk
    lvm.fit(lvm.PPCA(2, 1), Mine(), epochs=1, batch_size=7, seed=0)

"""Streams: iterable datasets, whose size is said by them or by the caller, and held against what they give."""

from __future__ import annotations

import pytest
import torch
from small_programs import rows
from torch.utils.data import DataLoader, IterableDataset

import pyro_lvm as lvm
from pyro_lvm.data import as_rows

X = rows(10, 2)


class Stream(IterableDataset):
    def __init__(self, count=10):
        self.count = count

    def __iter__(self):
        return iter(X[: self.count])


class WithLength(Stream):
    def __len__(self):
        return 10


def test_a_stream_trains_like_a_loader_in_the_same_order():
    arguments = {"epochs": 3, "seed": 0}
    streamed = lvm.fit(lvm.PPCA(2, 1), Stream(), size=10, batch_size=4, **arguments)
    loaded = lvm.fit(lvm.PPCA(2, 1), DataLoader(torch.utils.data.StackDataset(X), batch_size=4), **arguments)
    assert streamed.info["n"] == 10
    assert streamed.info["steps"] == 9
    assert streamed.elbo == loaded.elbo
    assert all(torch.equal(value, loaded.params[name]) for name, value in streamed.params.items())


@pytest.mark.parametrize(
    "stream",
    [WithLength(), DataLoader(WithLength(), batch_size=4), DataLoader(Stream(), batch_size=4)],
    ids=["length", "loader", "loader without length"],
)
def test_who_says_the_size(stream):
    size = 10 if isinstance(stream, DataLoader) and not isinstance(stream.dataset, WithLength) else None
    seen = as_rows(stream, size=size, batch_size=4)
    assert len(seen) == 10
    assert seen.batches_of_loader == 3
    assert torch.equal(seen.whole().args[0], X)


@pytest.mark.parametrize(
    ("size", "words"),
    [(11, "gave 10 rows, but its size is 11.*pass size="), (7, "gave 8 rows and goes on, but its size is 7")],
)
def test_another_number_of_rows_than_was_said_is_an_error(size, words):
    with pytest.raises(ValueError, match=words):
        lvm.fit(lvm.PPCA(2, 1), Stream(), size=size, batch_size=4, epochs=2, seed=0)


def test_a_last_batch_that_is_dropped_is_no_error():
    loader = DataLoader(Stream(), batch_size=4, drop_last=True)
    fit = lvm.fit(lvm.PPCA(2, 1), loader, size=10, epochs=2, seed=0)
    assert fit.info["steps"] == 4


def test_a_size_that_the_data_contradict():
    for data in (X, WithLength(), DataLoader(WithLength(), batch_size=4)):
        with pytest.raises(ValueError, match=r"size=11, but data has 10 rows: drop size="):
            lvm.fit(lvm.PPCA(2, 1), data, size=11, epochs=1)
    with pytest.raises(ValueError, match=r"size is 0: it must be positive"):
        lvm.fit(lvm.PPCA(2, 1), Stream(), size=0, epochs=1)


def test_a_stream_with_a_length_is_evaluated():
    program = lvm.PPCA(2, 1).double()
    assert torch.allclose(lvm.log_evidence(program, WithLength()), program.log_prob(X))
    fit = lvm.fit(program, WithLength(), epochs=1, batch_size=4, seed=0)
    assert fit.posterior(WithLength(), 3, seed=0)["z"].shape == (3, 10, 1)


def test_a_start_looks_at_the_first_rows_of_a_stream():
    assert len(as_rows(WithLength(), batch_size=4).at_most(5 * 16, seed=0)) == 8
    assert len(as_rows(WithLength(), batch_size=4).at_most(1000, seed=0)) == 10

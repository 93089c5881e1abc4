"""Whatever holds the data is seen as rows, or refused before anything moves, with words that say how to mend it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_programs import Hooked, mixture, nothing, process_left_alone, rows, same_state, state_of
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.data import Rows, as_rows
from pyro_lvm.datasets.binarized import Binarized

X = rows(10)


class Redrawn:
    """The least that the protocol of arrays drawn anew asks for; what epoch and seed it got shows in its values."""

    def __init__(self, value=0.0):
        self.value = value

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.full((6, 1), self.value)[index] + torch.arange(6.0)[index].unsqueeze(-1) / 100

    def redraw(self, epoch, seed):
        return Redrawn(epoch + seed)


class Named(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"x": X[i]}


class Single(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return X[i]


def everything(data):
    batch = as_rows(data).whole()
    return batch.args, dict(batch.kwargs)


@pytest.mark.parametrize(
    "data",
    [X, X.numpy(), TensorDataset(X), Single(), DataLoader(TensorDataset(X), batch_size=3)],
    ids=lambda d: type(d).__name__,
)
def test_positional_containers(data):
    args, kwargs = everything(data)
    assert len(args) == 1
    assert kwargs == {}
    assert torch.equal(args[0], X)
    assert len(as_rows(data)) == 10


def test_tuples_dicts_and_named_datasets():
    args, _ = everything((X, X.numpy()[:, 0]))
    assert [tuple(a.shape) for a in args] == [(10, 3), (10,)]
    for data in ({"x": X}, Named(), DataLoader(Named(), batch_size=4)):
        args, kwargs = everything(data)
        assert args == ()
        assert torch.equal(kwargs["x"], X)
    loaded = as_rows(X)
    assert as_rows(loaded) is loaded


def test_memory_maps_are_read_where_they_lie(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, X.numpy())
    for mode in ("r", "c", "r+"):
        mapped = np.load(path, mmap_mode=mode)
        data = as_rows(mapped)
        assert data.args[0] is mapped
        assert torch.equal(data.take(torch.tensor([3, 1])).args[0], X[[3, 1]])
    train, held_out = as_rows((mapped, np.load(path, mmap_mode="r")[:, 0])).split(0.3, torch.Generator().manual_seed(0))
    both = torch.cat([train.whole().args[0], held_out.whole().args[0]])
    assert sorted(both[:, 0].tolist()) == sorted(X[:, 0].tolist())
    assert torch.equal(train.whole().args[0][:, 0], train.whole().args[1])
    assert train.redrawn(1, 0) is train  # nothing is drawn: nothing is read again
    assert lvm.fit(lvm.PPCA(3, 1), np.load(path, mmap_mode="r"), steps=2, seed=0).info["n"] == 10


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f8", ">f4", "int64", "uint8", "bool"])
def test_arrays_keep_their_dtype(dtype):
    array = (np.abs(X.numpy()) > 0.5).astype(dtype)
    (taken,), _ = everything(array)
    native = np.dtype(dtype).newbyteorder("=")
    assert taken.numpy().dtype == native
    assert np.array_equal(taken.numpy(), array)


def test_read_only_and_reversed_arrays():
    array = X.numpy()[::-1]
    array.flags.writeable = False
    (taken,), _ = everything(array)
    assert torch.equal(taken, X.flip(0))


def test_a_batch_is_turned_within_its_strata():
    rows = as_rows({"y": torch.arange(5)})
    weight = torch.arange(5.0)
    cases = ((None, [4, 3, 2, 1, 0], [4, 4, 3, 3, 2]), ((2, 0, 3), [1, 0, 4, 3, 2], [1, 1, 4, 4, 3]))
    for strata, order, others in cases:
        turned = rows.take(torch.arange(5), weight, strata).turned()
        assert turned.kwargs["y"].tolist() == turned.index.tolist() == turned.weight.tolist() == order
        assert turned.strata == strata
        other = rows.take(torch.arange(5), weight, strata).other()
        assert other.kwargs["y"].tolist() == other.index.tolist() == other.weight.tolist() == others
    names = ["a", "b", "c", "d", "e"]  # no tensor stays as it is
    assert replace(rows.whole(), args=(names,)).turned().args == (names,)


def test_batches_know_their_rows():
    batches = list(as_rows((X, torch.arange(10))).batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [batch.size for batch in batches] == [10, 10, 10]
    assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(10))
    assert all(torch.equal(batch.args[1], batch.index) for batch in batches)
    assert list(batches[0].tensors()) == ["data[0]", "data[1]"]
    assert batches[0].named().keys() == {"size", "index", "weight", "strata"}
    assert as_rows(X).take(torch.arange(4), strata=(1, 3)).named()["strata"] == (1, 3)
    assert list(as_rows({"y": X}).first(2).tensors()) == ["y"]
    assert as_rows(DataLoader(TensorDataset(X), batch_size=4)).first(100).index is None


def test_floats_are_cast_and_integers_are_not():
    data = Rows((X, torch.arange(10)), size=10, dtype=torch.float32, device=torch.device("cpu"))
    batch = data.take(torch.arange(2), torch.ones(2, dtype=torch.float64))
    assert [a.dtype for a in batch.args] == [torch.float32, torch.int64]
    assert batch.weight.dtype is torch.float32
    assert as_rows(X).like(torch.zeros(1)).whole().args[0].dtype is torch.float32
    assert as_rows(X).like(None).dtype is None
    assert as_rows(X).like(torch.arange(2)).dtype is None


def test_splits_are_disjoint_and_complete():
    for data in (X, X.numpy(), TensorDataset(X), {"x": X}, (Binarized((X.abs() * 50).to(torch.uint8)),)):
        train, held_out = as_rows(data).split(0.25, torch.Generator().manual_seed(1))
        assert (len(train), len(held_out)) == (8, 2)
        whole = as_rows(data).whole().tensors()
        parts = train.whole().tensors(), held_out.whole().tensors()
        for name, before in whole.items():
            after = torch.cat([part[name] for part in parts])
            assert torch.equal(before.double().sort(0).values, after.double().sort(0).values)


@pytest.mark.parametrize("fraction", [0, 1, 0.0, 1.0, -0.5, 1.5, 0.01, True, False])
def test_validation_fractions_that_leave_nothing(fraction):
    with pytest.raises(ValueError, match=r"of 10 rows leaves .*: choose a fraction that gives both some"):
        lvm.fit(lvm.PPCA(3, 1), X, steps=1, validation=fraction)


def test_a_loader_cannot_be_split_nor_asked_for_rows():
    loader = as_rows(DataLoader(TensorDataset(X), batch_size=4))
    with pytest.raises(ValueError, match="pass the DataLoader's dataset"):
        loader.split(0.5, torch.Generator())
    with pytest.raises(ValueError, match="cannot be asked for rows"):
        loader.take(torch.arange(2))


def test_arrays_that_draw_anew():
    data = as_rows((Redrawn(), torch.arange(6.0)))
    again = data.redrawn(3, seed=20)
    assert again.whole().args[0][0].item() == 23.0
    assert torch.equal(again.whole().args[1], torch.arange(6.0))
    assert data.whole().args[0][0].item() == 0.0
    train, _ = data.split(0.5, torch.Generator().manual_seed(0))
    redrawn = train.redrawn(1, seed=1).whole()
    expected = 2.0 + redrawn.args[1] / 100
    torch.testing.assert_close(redrawn.args[0][:, 0], expected)
    assert as_rows(X).redrawn(0, 0).args[0] is X


WRONG = {
    "strings": (np.array(["a", "b"]), TypeError, "data has dtype <U1: pass real numbers"),
    "objects": (np.array([1.0, None], dtype=object), TypeError, "data has dtype object"),
    "complex": (torch.zeros(3, dtype=torch.complex64), TypeError, "dtype torch.complex64: pass real numbers"),
    "long double": (np.zeros(3, dtype=np.longdouble), TypeError, "at most 64 bits"),
    "masked": (np.ma.masked_array(np.zeros(3), [0, 1, 0]), TypeError, "masked array, whose mask would be lost"),
    "list": ([[1.0, 2.0]], TypeError, "data is a list: pass a tensor or an array"),
    "text": ("rows", TypeError, "data is a str"),
    "number": (3, TypeError, "data is a int"),
    "inside a tuple": ((X, [1.0] * 10), TypeError, r"data\[1\] is a list"),
    "inside a dict": ({"x": X, "y": range(10)}, TypeError, r"data\['y'\] is a range"),
    "no arrays": ((), ValueError, "data holds no arrays"),
    "no rows": (torch.zeros(0, 3), ValueError, "data has no rows"),
    "empty dataset": (TensorDataset(torch.zeros(0, 3)), ValueError, "data has no rows"),
    "0-dim": (torch.tensor(3.0), ValueError, r"single number of shape \(\)"),
    "0-dim array": (np.array(3.0), ValueError, r"single number of shape \(\)"),
    "lengths": ((X, X[:4]), ValueError, r"same number of rows, but data\[0\] has 10, data\[1\] has 4"),
    "NaN": (torch.tensor([[0.0], [float("nan")]]), ValueError, r"NaN values \(1 in rows 0 to 1, the first in row 1\)"),
    "inf": (np.array([0.0, 1.0, np.inf, -np.inf]), ValueError, r"infinite values \(2 in rows 0 to 3, .* row 2\)"),
    "late": (torch.cat([torch.zeros(5000), torch.tensor([float("inf")])]), ValueError, "first in row 5000"),
    "NaN in a dataset": (TensorDataset(torch.full((4, 3), torch.nan)), ValueError, "data holds NaN values"),
    "NaN in a loader": (DataLoader(TensorDataset(torch.full((4, 3), torch.nan))), ValueError, "data holds NaN values"),
    "no batches": (DataLoader(TensorDataset(X), batch_size=11, drop_last=True), ValueError, "without a batch"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_are_refused_before_anything_moves(name):
    data, kind, words = WRONG[name]
    module = Hooked()
    before = state_of(module)
    with process_left_alone(), pytest.raises(kind, match=words):
        lvm.fit(module, data, steps=1)
    assert same_state(module, before)


def test_pandas_frames_are_no_arrays():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match="data is a DataFrame: pass a tensor"):
        as_rows(pandas.DataFrame({"a": [1.0, 2.0]}))


def test_datasets_without_a_length_are_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            yield X[0]

    with pytest.raises(TypeError, match=r"the dataset of data has no length.*: give it a __len__, or pass size="):
        as_rows(Endless())
    with pytest.raises(TypeError, match="the dataset of data has no length"):
        as_rows(DataLoader(Endless()))
    with pytest.raises(TypeError, match=r"the dataset of x has no length.*: give it a __len__$"):
        lvm.log_evidence(lvm.PPCA(3, 1), Endless())


def test_a_loader_does_not_touch_the_process_and_may_shuffle():
    loader = DataLoader(TensorDataset(X[:, 0]), batch_size=4, shuffle=True)
    with process_left_alone():
        first = lvm.fit((mixture, nothing), loader, epochs=2, seed=0, validation=loader)
    second = lvm.fit((mixture, nothing), loader, epochs=2, seed=0)
    assert all(torch.equal(first.params[name], second.params[name]) for name in first.params)
    assert first.info["steps"] == 6


def test_a_batch_size_beside_a_loader():
    with pytest.raises(ValueError, match="batch_size=2 says nothing to a DataLoader"):
        lvm.fit((mixture, nothing), DataLoader(TensorDataset(X[:, 0])), epochs=1, batch_size=2)

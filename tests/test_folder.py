"""A folder of arrays is one array."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_programs import rows

import pyro_lvm as lvm
from pyro_lvm.data import as_rows

X = rows(30, 2, dtype=torch.float32).numpy()


@pytest.fixture
def where(tmp_path):
    for name, part in (("b", X[12:12]), ("c", X[12:]), ("a", X[:12])):  # saved in another order than their names'
        np.save(tmp_path / f"{name}.npy", part)
    (tmp_path / "notes.txt").write_text("no array")
    return tmp_path


@pytest.mark.parametrize(
    "index",
    [slice(None), slice(10, 15), slice(None, None, -3), torch.tensor([29, 0, 12, 11, 12]), torch.tensor([], dtype=int)],
    ids=str,
)
def test_rows_are_those_of_all_files_in_order(where, index):
    wanted = X[index.numpy() if isinstance(index, torch.Tensor) else index]
    assert np.array_equal(lvm.datasets.folder(where)[index].numpy(), wanted)


def test_one_row_and_what_it_says_of_itself(where):
    x = lvm.datasets.folder(where)
    assert np.array_equal(x[13].numpy(), X[13])
    assert (len(x), x.shape, x.dtype) == (30, (30, 2), np.float32)
    assert repr(x) == "FolderOfArrays of 3 files, shape (30, 2), dtype float32"


def test_a_fit_to_a_folder_is_that_to_the_array(where):
    fits = [lvm.fit(lvm.PPCA(2, 1), x, epochs=2, batch_size=7, seed=0) for x in (lvm.datasets.folder(where), X)]
    assert fits[0].elbo == fits[1].elbo
    assert all(torch.equal(value, fits[1].params[name]) for name, value in fits[0].params.items())


def test_columns_of_one_number_and_other_byte_orders(tmp_path):
    np.save(tmp_path / "a.npy", X[:, 0].astype(">f4"))
    assert np.array_equal(lvm.datasets.folder(tmp_path)[2:4].numpy(), X[2:4, 0])


def test_every_row_is_looked_at_for_values_that_are_not_finite(where):
    broken = X[12:].copy()
    broken[17, 1] = np.nan
    np.save(where / "c.npy", broken)
    with pytest.raises(ValueError, match=r"data holds NaN values .*the first in row 29"):
        lvm.fit(lvm.PPCA(2, 1), lvm.datasets.folder(where), epochs=1)
    assert as_rows(lvm.datasets.folder(where), missing=True).missing


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no .npy file: save arrays there"):
        lvm.datasets.folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder"):
        lvm.datasets.folder(tmp_path / "nowhere")


@pytest.mark.parametrize("other", [X[:3, :1], X[:3].astype(np.float64)], ids=["width", "dtype"])
def test_files_that_disagree(where, other):
    np.save(where / "d.npy", other)
    with pytest.raises(ValueError, match=r"a.npy has rows of shape \(2,\) and dtype float32, but .*d.npy has rows of"):
        lvm.datasets.folder(where)


def test_a_file_without_rows(tmp_path):
    np.save(tmp_path / "a.npy", np.float32(1.0))
    with pytest.raises(ValueError, match=r"a.npy holds a single number"):
        lvm.datasets.folder(tmp_path)

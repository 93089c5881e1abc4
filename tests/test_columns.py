"""Mean and spread of the columns of data of any form: numpy's are the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.blocks import Blocks
from pyro_lvm.columns import columns_of

N, D = 9_001, 5


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.normal(size=(N, D)) @ generator.normal(size=(D, D)) + 100.0


class OneArray(torch.utils.data.Dataset):
    def __init__(self, table: np.ndarray) -> None:
        self.table = torch.from_numpy(table)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.table[row]


def on_disk(table, folder):
    array = np.memmap(folder / "x.bin", mode="w+", dtype=table.dtype, shape=table.shape)
    array[:] = table
    return array


FORMS = {
    "tensor": lambda table, folder: torch.from_numpy(table),
    "ndarray": lambda table, folder: table,
    "memmap": on_disk,
    "dataset": lambda table, folder: OneArray(table),
    "loader": lambda table, folder: DataLoader(OneArray(table), batch_size=700, shuffle=True),
}


@pytest.fixture(params=FORMS)
def x(request, table, tmp_path):
    return FORMS[request.param](table, tmp_path)


def test_they_are_numpys(x, table):
    columns = columns_of(x)
    assert columns.size == N
    np.testing.assert_allclose(columns.mean, table.mean(0), rtol=1e-13)
    np.testing.assert_allclose(columns.covariance, np.cov(table.T), rtol=1e-10)
    assert columns.reference.dtype is torch.float64


def test_rows_that_a_loader_leaves_out_do_not_count(table):
    columns = columns_of(DataLoader(OneArray(table), batch_size=700, drop_last=True))
    assert columns.size == 8_400
    np.testing.assert_allclose(columns.mean, table[:8_400].mean(0), rtol=1e-13)


def test_small_axes_keep_the_digits_that_a_sum_of_squares_loses():
    generator = np.random.default_rng(1)
    table = generator.normal(size=(10_000, 1)) * np.array([1.0, 1.0]) + generator.normal(size=(10_000, 2)) * 1e-9
    found = torch.linalg.svdvals(columns_of(table).triangle)
    right = np.linalg.svd(table - table.mean(0), compute_uv=False)
    np.testing.assert_allclose(found, right, rtol=1e-6)
    from_squares = np.sqrt(np.abs(np.linalg.eigvalsh((table - table.mean(0)).T @ (table - table.mean(0)))))
    assert abs(from_squares[0] / right[1] - 1) > 1e-2


def test_a_table_with_more_columns_than_a_block_has_rows(monkeypatch):
    monkeypatch.setattr(Blocks, "rows_at_once", 3)
    table = np.random.default_rng(2).normal(size=(50, 7))
    np.testing.assert_allclose(columns_of(table).covariance, np.cov(table.T), rtol=1e-12)


def test_ppca_in_closed_form_is_that_of_the_tensor(x, table):
    found, right = (lvm.PPCA.closed_form(data, 2) for data in (x, torch.from_numpy(table)))
    for name in ("loadings", "mean", "noise_scale"):
        mine, theirs = getattr(found, name), getattr(right, name)
        assert mine.dtype is torch.float64
        if name == "loadings":  # an axis has no sign
            mine, theirs = mine @ mine.mT, theirs @ theirs.mT
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_weakly_informative_prior_is_that_of_the_tensor(x, table):
    prior = lvm.priors.weakly_informative(x, num_components=3)
    np.testing.assert_allclose(prior.mean, table.mean(0), rtol=1e-13)
    np.testing.assert_allclose(prior.scale_matrix, np.cov(table.T) / 3 ** (2 / D), rtol=2e-5)  # 1e-5 is lent


@pytest.mark.parametrize("of", [lambda x: lvm.PPCA.closed_form(x, 1), lvm.priors.weakly_informative])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4), r"x has shape \(4,\): pass rows and columns, \(n, D\)"),
        (torch.zeros(4, 2, 2), r"x has shape \(4, 2, 2\): pass rows and columns"),
        ((torch.zeros(4, 2), torch.zeros(4)), r"x holds 2 arrays \(.*\): pass one, of shape \(n, D\)"),
        (TensorDataset(torch.zeros(4, 2), torch.zeros(4)), r"x holds 2 arrays \(.*\): pass one"),
        (torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [1.0, 1.0]]), r"x holds NaN values \(1 in rows 0 to 2"),
        (np.array([[1.0, 2.0], [np.inf, 0.0]]), r"x holds infinite values \(1 in rows 0 to 1"),
    ],
)
def test_what_is_no_table_is_refused(of, x, message):
    with pytest.raises(ValueError, match=message):
        of(x)

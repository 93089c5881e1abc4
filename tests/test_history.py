"""What the history tells, against sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pyro_lvm as lvm
from pyro_lvm.capture.step import StepResult
from pyro_lvm.inference.history import HistoryRecorder

ROWS = 10
LOSS, TERM, DIVERGENCE = ("loss", ""), ("reconstruction", "x"), ("kl", "z")
ORDER, TURNED = (LOSS, TERM, DIVERGENCE), (LOSS, DIVERGENCE, TERM)


def step(columns, *numbers):
    return StepResult(columns, torch.tensor(numbers, dtype=torch.float64))


def test_an_epoch_without_a_step_is_nan_and_every_column_is_as_long():
    history = HistoryRecorder(ROWS)
    for left_out in (1, 1, 3):
        if left_out == 1 and history.epochs:
            history.add_step(step(ORDER, 5.0, -40.0, 10.0), 1.0)
        history.end_epoch({"skipped": left_out})
    history.flush()
    assert history.columns["skipped"] == [1, 0, 2]
    assert [math.isnan(value) for value in history.columns["elbo"]] == [True, False, True]
    assert history.columns["elbo"][1] == -5.0
    assert [len(history.columns[group][site]) for group, site in ORDER[1:]] == [3, 3]


def test_many_epochs_read_at_once_are_the_means_of_their_steps():
    # one order, another, both, none, the first again: graphs of other shapes may tell their parts in another order
    epochs = [[ORDER], [ORDER], [TURNED], [ORDER, TURNED, ORDER], [], [ORDER], [TURNED, TURNED]]
    generator = np.random.default_rng(0)
    history, expected = HistoryRecorder(ROWS), {column: [] for column in ORDER}
    for orders in epochs:
        steps = [dict(zip(ORDER, generator.normal(size=3), strict=True)) for _ in orders]
        shares = generator.uniform(size=len(orders))
        for columns, numbers, share in zip(orders, steps, shares, strict=True):
            history.add_step(step(columns, *(numbers[column] for column in columns)), share)
        history.end_epoch()
        for column in ORDER:
            mean = np.average([numbers[column] for numbers in steps], weights=shares) if steps else math.nan
            expected[column].append(mean / (1 if column is LOSS else ROWS))
    history.flush()
    found = history.columns
    np.testing.assert_allclose(found["loss"], expected[LOSS], rtol=1e-12)
    np.testing.assert_allclose(found["reconstruction"]["x"], expected[TERM], rtol=1e-12)
    np.testing.assert_allclose(found["kl"]["z"], expected[DIVERGENCE], rtol=1e-12)
    np.testing.assert_allclose(found["elbo"], np.subtract(expected[TERM], expected[DIVERGENCE]), rtol=1e-12)


def test_epochs_before_one_that_is_not_finite_are_kept():
    history = HistoryRecorder(ROWS)
    for divergence in (1.0, 2.0, math.nan, 4.0):
        history.add_step(step(ORDER, 5.0, -40.0, divergence), 1.0)
        history.end_epoch()
    with pytest.raises(lvm.NonFiniteError, match=r"epoch 3: kl of 'z' became NaN"):
        history.flush()
    assert history.columns["kl"]["z"] == [0.1, 0.2]
    assert history.columns["elbo"] == [-4.1, -4.2]


def test_what_a_step_tells_may_be_written_over_by_the_next():
    history = HistoryRecorder(ROWS)
    buffer = step(ORDER, 5.0, -40.0, 10.0)
    for number in (1.0, 2.0):
        buffer.values.copy_(torch.tensor([number, -10.0 * number, 10.0 * number]))
        history.add_step(buffer, 1.0)
        history.end_epoch()
    history.flush()
    assert history.columns["loss"] == [1.0, 2.0]
    assert history.columns["elbo"] == [-2.0, -4.0]

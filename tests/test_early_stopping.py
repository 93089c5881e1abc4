"""Noise alone does not stop a run that still rises, and a run that has arrived is stopped."""

from __future__ import annotations

import numpy as np
import pytest
from small_programs import data, mixture, nothing

import pyro_lvm as lvm
from pyro_lvm.inference.early_stopping import EarlyStopping


def stops_at(rule, values):
    return next((k for k in range(1, len(values) + 1) if rule.should_stop(values[:k])), None)


@pytest.mark.parametrize(("patience", "noise"), [(5, 0.3), (20, 0.05)])
def test_noise_around_a_slow_slope_does_not_stop(patience, noise):
    """The slope is worth twice `min_delta` in `patience` epochs; 150 epochs are as many occasions to err."""
    rule = EarlyStopping(patience=patience)
    slope = 2 * rule.min_delta / patience
    stopped = 0
    for seed in range(100):
        trace = slope * np.arange(150) + noise * np.random.default_rng(seed).standard_normal(150)
        stopped += stops_at(rule, trace.tolist()) is not None
    assert stopped <= 5


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05])
def test_a_noisy_trace_that_has_arrived_stops(noise):
    for seed in range(5):
        rising = -5 * np.exp(-np.arange(400) / 10)
        trace = rising + noise * np.random.default_rng(seed).standard_normal(400)
        stop = stops_at(EarlyStopping(), trace.tolist())
        assert stop is not None
        assert stop > 50  # at epoch 50 a gain of 0.03 is still to come


def test_fewer_epochs_than_the_patience_never_stop():
    assert not EarlyStopping(patience=10).should_stop([0.0] * 9)
    assert EarlyStopping(patience=10).should_stop([0.0] * 10)
    assert EarlyStopping(patience=10).should_stop([-float(i) for i in range(10)])


def test_a_trace_that_is_no_number_does_not_stop():
    assert not EarlyStopping(patience=5).should_stop([float("nan")] * 20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patience": 4}, "patience is 4: .* at least 5 epochs"),
        ({"min_delta": 0.0}, "min_delta is 0.0"),
        ({"monitor": "loss"}, "monitor='loss' is not known"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        EarlyStopping(**options)


def test_a_fit_stops_and_says_so():
    fit = lvm.fit((mixture, nothing), data(), epochs=2000, lr=0.1, seed=0, early_stopping=True)
    assert 20 < fit.info["epochs"] < 600
    assert fit.info["stopped"] == f"early stopping after {fit.info['epochs']} epochs"
    assert len(fit.history["elbo"]) == fit.info["epochs"] == fit.info["steps"]


def test_validation_data_are_watched_where_there_are_any():
    far = data() + 100  # whatever the training gains, this only gets worse or better as the locations move
    watched = lvm.fit(
        (mixture, nothing), data(), epochs=25, lr=1e-5, seed=0, validation=far, early_stopping=EarlyStopping(patience=5)
    )
    slope = np.diff(watched.history["validation_elbo"])
    assert (len(slope) == 24) == bool(slope.mean() * 5 > 0.01)
    alone = lvm.fit((mixture, nothing), data(), epochs=25, lr=1e-5, seed=0, early_stopping=EarlyStopping(patience=5))
    assert alone.info["epochs"] == 5


def test_a_monitor_without_data_and_a_rule_that_is_none():
    with pytest.raises(ValueError, match="no validation data: pass validation="):
        lvm.fit((mixture, nothing), data(), epochs=1, early_stopping=EarlyStopping(monitor="validation_elbo"))
    with pytest.raises(TypeError, match=r"early_stopping must be True or an EarlyStopping\(...\); got 5"):
        lvm.fit((mixture, nothing), data(), epochs=1, early_stopping=5)

"""The bound at the end of a fit: the same numbers through Pyro and through a graph, where it takes many passes."""

from __future__ import annotations

import logging
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_programs import Amortised, process_left_alone, rows

import pyro_lvm as lvm
from pyro_lvm.evaluation import Evaluation
from pyro_lvm.inference import bound

PASSES = 30


class Counting(Amortised):
    """Counts the rows of calls without gradients: evaluations. The list is no state of a program, and no obstacle."""

    calls: ClassVar[list[int]] = []

    def model(self, x, size=None):
        if not torch.is_grad_enabled():
            self.calls.append(len(x))
        return super().model(x, size)


class Reading(Counting):
    def guide(self, x, size=None):
        if float(self.log_scale[0].detach()) > 100:
            raise AssertionError("it never is")
        return super().guide(x, size)


class Labelled(torch.nn.Module):
    """A label that the guide enumerates, and a latent below it: both kinds of randomness."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.logits = torch.nn.Linear(2, 3, dtype=dtype)
        self.locs = torch.nn.Parameter(torch.arange(6, dtype=dtype).reshape(3, 2))

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", dist.Categorical(x.new_ones(3)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.locs[y] + z, 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", dist.Categorical(logits=self.logits(x)), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(self.locs[y] * 0.1 + x * 0.3, 0.7).to_event(1))


@pytest.fixture(autouse=True)
def many_passes(monkeypatch):
    Counting.calls.clear()
    monkeypatch.setattr(bound, "TOLERANCE", 1e-9)
    monkeypatch.setattr(bound, "MAX_PASSES", PASSES)
    monkeypatch.setattr(bound, "EVALUATIONS_THAT_REPAY_A_GRAPH", 3)


def bounds(program, x):
    """The bound and its error, without and with a graph, at parameters that one step has moved."""
    found = []
    for capture in (False, "auto"):
        torch.manual_seed(0)
        fit = lvm.fit(program(), x, steps=1, seed=0, capture=capture)
        assert fit.info["elbo_passes"] == PASSES
        found.append((fit.elbo, fit.info["elbo_se"]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "program", [lambda: lvm.VAE(3, 2, hidden=(4,), likelihood="normal"), lambda: lvm.BayesianPPCA(3, 2)]
)
def test_a_graph_gives_the_same_bound_to_the_bit(caplog, dtype, program):
    with caplog.at_level(logging.INFO, logger="pyro_lvm"):
        through_pyro, through_graph = bounds(program, rows(40).to(dtype))
    assert through_pyro == through_graph
    assert not caplog.records  # it was captured


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_where_labels_are_enumerated_sums_are_in_another_order(caplog, dtype, rel):
    x = rows(40).to(dtype)[:, :2]
    with caplog.at_level(logging.INFO, logger="pyro_lvm"):
        through_pyro, through_graph = bounds(lambda: Labelled(dtype), x)
    assert through_pyro == pytest.approx(through_graph, rel=rel)
    assert not caplog.records


@pytest.mark.parametrize("batch_size", [None, 15])
def test_after_some_passes_the_program_rests(monkeypatch, batch_size):
    monkeypatch.setattr(bound, "EVALUATION_BATCH", 15)  # 15, 15 and 10 rows
    program = Counting()
    with process_left_alone():
        lvm.fit(program, rows(40), steps=1, seed=0, batch_size=batch_size)
    captured = len(program.calls)
    lvm.fit(program, rows(40), steps=1, seed=0, batch_size=batch_size, capture=False)
    assert len(program.calls) - captured >= 3 * PASSES
    assert captured < 40  # three of either size, and what a capture and its comparison take
    assert program.calls.count(10) > 3


def test_a_program_that_no_graph_can_hold_is_evaluated_through_pyro(caplog):
    with caplog.at_level(logging.INFO, logger="pyro_lvm"):
        through_pyro, refused = bounds(Reading, rows(40))
    assert through_pyro == refused
    assert ["Reading: not captured:" in record.message for record in caplog.records] == [True]


def test_what_no_step_could_be_captured_of_is_not_tried_again(caplog):
    with caplog.at_level(logging.INFO, logger="pyro_lvm"):
        fit = lvm.fit(Reading(), rows(40), steps=2, seed=0, capture="graph")
    assert fit.info["capture_reason"].startswith("not captured:")
    assert len(caplog.records) == 1


def test_gradients_are_left_alone():
    program = Counting()
    fit = lvm.fit(program, rows(40), steps=1, seed=0)
    for parameter in program.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    evaluation = Evaluation.of(fit, rows(40))
    bound.mean_elbo(evaluation.bound, evaluation.structure, evaluation.rows, None, 0)
    assert all(bool((parameter.grad == 7.0).all()) for parameter in program.parameters())

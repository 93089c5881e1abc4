"""What every evaluation shares: the right parameters, dtype and rows, and a process left alone."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from small_programs import Amortised, data, mixture, nothing, process_left_alone, rows

import pyro_lvm as lvm
from pyro_lvm.data import as_rows
from pyro_lvm.evaluation import Evaluation, batch_to_trace, fresh_seed
from pyro_lvm.program import as_program


def test_rows_are_sent_to_what_the_program_computes_in():
    module = Amortised()
    with process_left_alone():
        evaluation = Evaluation.of(module, rows())
    assert evaluation.snapshot is None
    assert evaluation.rows.whole().args[0].dtype is torch.float32
    assert Evaluation.of((mixture, nothing), data()).bound.functions.dtype is torch.float64


def test_a_function_program_is_evaluated_in_the_dtype_of_its_data():
    def model(x, size=None):
        weight = pyro.param("weight", torch.ones(3, 1))  # float32, as one writes it
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(x @ weight, 1.0).to_event(1), obs=x[:, :1])

    assert lvm.log_evidence((model, nothing), rows()).dtype is torch.float64


def test_a_fit_is_evaluated_with_its_snapshot_in_eval_mode():
    module = Amortised()
    fit = lvm.fit(module, rows(), steps=2, seed=0)
    kept = fit.params["encoder.bias"]
    with torch.no_grad():
        module.encoder.bias.fill_(9.0)
    evaluation = Evaluation.of(fit, rows())
    with process_left_alone(), evaluation.running(None):
        assert torch.equal(module.encoder.bias, kept)
        assert not module.training
        batch, structure = evaluation.whole()
    assert (len(batch), structure.data_plate) == (40, "data")
    assert module.encoder.bias.tolist() == [9.0, 9.0]
    assert module.training


def test_a_program_without_a_guide_and_data_that_do_not_fit():
    with pytest.raises(lvm.ProgramError, match="mixture has no guide to evaluate with: fit it"):
        Evaluation.of(mixture, data())
    with pytest.raises(TypeError, match="the data give 2 arguments"):
        Evaluation.of((mixture, nothing), (data(), data()))


def test_an_autoguide_is_traced_on_all_rows():
    x = as_rows(torch.zeros(300))
    assert batch_to_trace(as_program((mixture, nothing)), x) == 256
    assert batch_to_trace(as_program((mixture, AutoNormal(mixture))), x) == 300
    assert batch_to_trace(as_program(mixture), x) == 300
    assert batch_to_trace(as_program((lambda x: None, nothing)), x) == 300


def test_fresh_seeds_come_from_entropy():
    with process_left_alone():
        seeds = {fresh_seed() for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**32 for seed in seeds)

"""Sound programs, a third of them, captured: the same numbers, and each that no graph holds is known by name."""

from __future__ import annotations

import pyro
import pytest
import torch
from sound import ESTIMATORS, PROGRAMS

import pyro_lvm as lvm
from pyro_lvm.inference import bound

NOT_CAPTURED = {
    "bayesian_layer_of_a_lone_module",
    "bayesian_layer_with_an_autoguide",
    "data_plate_that_is_walked",
    "density_of_a_flow",
    "fairness_of_a_coin_in_a_loop",
    "topics_by_a_network",
}
"""Each reads a tensor's value in Python; a plate that is walked does so too, and a spline of Pyro's chooses rows."""

SUMMED_OUT = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Relative to the largest: what is enumerated is summed in an order of the graph's own."""


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    """How well the bound is known in the end is another test's affair."""
    monkeypatch.setattr(bound, "MAX_PASSES", 2)


VIEWED = [
    program
    for program in PROGRAMS[1::3] + PROGRAMS[2::3]
    if program.name in ("plate_opened_twice", "factors_beside_sites")
]
"""Their guides' locations are views of parameters, which a capture has written to."""


@pytest.mark.parametrize("program", PROGRAMS[::3] + VIEWED, ids=lambda program: program.name)
def test_a_sound_program_gives_the_same_captured(program):
    def run(capture):
        pyro.set_rng_seed(0)
        made, x = program.make()
        options = {"guide": program.guide, "elbo": ESTIMATORS[program.estimators[0]], "seed": 0, "progress": False}
        return lvm.fit(made, x, steps=3, batch_size=program.batch_sizes[-1], capture=capture, **options)

    eager, captured = run(False), run("graph")
    level = "eager" if program.name in NOT_CAPTURED else "graph"
    assert captured.info["capture"] == level, captured.info["capture_reason"]
    if captured.info["estimator"].startswith("TraceEnum_ELBO") and level == "graph":
        for name, value in eager.params.items():
            share = SUMMED_OUT[value.dtype]
            torch.testing.assert_close(captured.params[name], value, rtol=share, atol=share)
        assert captured.elbo == pytest.approx(eager.elbo, rel=1e-5)
        assert captured.history["loss"] == pytest.approx(eager.history["loss"], rel=1e-5)
    else:
        assert all(torch.equal(value, captured.params[name]) for name, value in eager.params.items())
        assert captured.history == eager.history
        assert captured.elbo == eager.elbo


def test_the_names_are_those_of_programs():
    assert {program.name for program in PROGRAMS} >= NOT_CAPTURED

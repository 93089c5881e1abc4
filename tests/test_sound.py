"""No false alarm: what is sound passes the pre-flight and is fitted without a warning, under all that suits it."""

from __future__ import annotations

import math

import pytest
import torch
from sound import ESTIMATORS, PROGRAMS, Sound

import pyro_lvm as lvm
from pyro_lvm.inference import bound

CASES = [
    pytest.param(program, estimator, batch_size, id=f"{program.name}-{estimator}-{batch_size or 'all'}")
    for program in PROGRAMS
    for estimator, batch_size in program.combinations()
]


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    """How well the bound is known in the end is another test's affair."""
    monkeypatch.setattr(bound, "MAX_PASSES", 2)


@pytest.mark.parametrize(("program", "estimator", "batch_size"), CASES)
def test_a_sound_program_raises_no_alarm(program: Sound, estimator, batch_size):
    pair, data = program.make()
    report = lvm.check(pair, data, ESTIMATORS[estimator], guide=program.guide, batch_size=batch_size)
    assert not report.warnings
    fit = lvm.fit(
        pair,
        data,
        guide=program.guide,
        elbo=ESTIMATORS[estimator],
        steps=2,
        batch_size=batch_size,
        seed=0,
        progress=False,
    )
    assert math.isfinite(fit.elbo)
    assert fit.params
    assert all(bool(torch.isfinite(value).all()) for value in fit.params.values())


def test_the_corpus_is_large_enough_to_claim_anything():
    assert len(PROGRAMS) >= 25
    assert len({program.name for program in PROGRAMS}) == len(PROGRAMS)
    assert {estimator for _, estimator, _ in (case.values for case in CASES)} == set(ESTIMATORS)
    assert sum(batch_size is not None for _, _, batch_size in (case.values for case in CASES)) >= 25

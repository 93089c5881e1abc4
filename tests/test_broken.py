"""Every broken program is caught before a parameter moves; what plain Pyro does with it is measured beside it."""

from __future__ import annotations

import warnings

import pytest
from broken import mistake as corpus
from broken import pairing, plates  # noqa: F401
from broken.mistake import BROKEN, plain_pyro

import pyro_lvm as lvm

NAMES = list(BROKEN)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_caught_before_a_parameter_moves(name):
    mistake = BROKEN[name]()
    moved = []
    with pytest.raises((lvm.ProgramError, lvm.ProgramWarning)) as caught:
        lvm.fit(
            (mistake.model, mistake.guide) if mistake.guide is not None else mistake.model,
            mistake.data,
            elbo=mistake.elbo,
            batch_size=mistake.batch_size,
            epochs=1,
            seed=0,
            callbacks=[moved.append],
        )
    assert not moved
    assert isinstance(caught.value, lvm.ProgramWarning) == mistake.warned
    assert mistake.message.search(str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_what_plain_pyro_does(name):
    assert plain_pyro(BROKEN[name]()) == BROKEN[name]().pyro

"""Every broken program is caught before a parameter moves; what plain Pyro does with it is measured beside it."""

from __future__ import annotations

import pytest
from broken.mistake import BROKEN, plain_pyro
from broken.page import table, written

import pyro_lvm as lvm

NAMES = list(BROKEN)


def test_the_corpus_is_large_enough():
    assert len(NAMES) >= 50


@pytest.mark.parametrize("name", NAMES)
def test_it_is_caught_before_a_parameter_moves(name):
    mistake = BROKEN[name]()
    moved = []
    program = mistake.model if mistake.guide is None else (mistake.model, mistake.guide)
    with pytest.raises((ValueError, lvm.ProgramWarning)) as caught:
        lvm.fit(
            program,
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


def test_the_page_says_what_was_measured():
    assert written() == table().strip(), "run `python tests/broken/page.py`"

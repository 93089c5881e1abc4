"""The line of a statement: the user's, a built-in model's, nobody's for an autoguide."""

from __future__ import annotations

import pathlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample

import pyro_lvm as lvm
from pyro_lvm.data import as_rows
from pyro_lvm.declaration import raised_at
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.program import as_program
from pyro_lvm.structure import trace_structure

X = torch.zeros(5, 2)


def structure(program):
    bound = BoundProgram(as_program(program))
    with isolated(0):
        return trace_structure(bound.model, bound.guide, as_rows(X).first(5))


def shared(x, size=None):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(m, torch.ones(2)).to_event(1), obs=x)


def line_of(text):
    lines = pathlib.Path(__file__).read_text(encoding="utf-8").splitlines()
    return f"{pathlib.Path(__file__).name}:{next(i for i, line in enumerate(lines, 1) if text in line)}"


def test_lines_of_functions_modules_and_built_in_models():
    found = structure((shared, AutoNormal(shared)))
    assert found.model["m"].declared == line_of('m = pyro.sample("m"')
    assert str(found.model["m"]) == f"site 'm' ({found.model['m'].declared})"
    assert found.guide["m"].declared is None
    assert str(found.guide["m"]) == "site 'm'"
    built_in = structure(lvm.PPCA(2, 1))
    assert built_in.model["z"].declared.startswith("ppca.py:")


def test_the_prior_of_a_module_is_declared_where_it_is_used():
    class Shared(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x, size=None):
            m = self.loc
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample("x", dist.Normal(m, torch.ones(2)).to_event(1), obs=x)

    module = Shared()
    assert structure((module, AutoNormal(module))).model["loc"].declared == line_of("m = self." + "loc")


def test_where_an_error_came_through():
    def failing():
        return torch.zeros(2) @ torch.zeros(3)  # the line

    with pytest.raises(RuntimeError) as caught:
        failing()
    assert raised_at(caught.value) == line_of("# the " + "line")
    assert raised_at(ValueError()) is None

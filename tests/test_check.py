"""`lvm.check`: the report of a sound program, and a look that moves nothing."""

from __future__ import annotations

import pathlib
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from small_programs import (
    Amortised,
    Hooked,
    data,
    guide_of_mean,
    mixture,
    model_of_mean,
    nothing,
    process_left_alone,
    rows,
    same_state,
    state_of,
)
from torch import nn

import pyro_lvm as lvm


def site(report, name):
    return next(found for found in report.sites if found.name == name)


def test_the_table_of_a_mixture():
    report = lvm.check((mixture, nothing), data(), batch_size=10)
    component, x = report.sites
    assert (component.name, component.role, component.distribution) == ("component", "latent", "Bernoulli")
    assert [(p.name, p.dim, p.rows, p.size) for p in component.plates] == [("data", -1, 10, 40)]
    assert (component.batch_shape, component.event_shape, component.support) == ((10,), (), "Boolean")
    assert (component.enumeration, component.guide, component.kl) == ("2 values, parallel", "summed out", "summed out")
    assert (x.role, x.scale, x.guide, x.kl, x.enumeration) == ("observed", "4", "observed", "", "")
    assert report.rows == (10, 40)
    assert report.cost == "2 values of 'component' = 2×"
    assert report.parents == {"component": frozenset(), "x": {"component"}}
    assert component.declared.startswith("small_programs.py:")
    line = int(component.declared.split(":")[1])
    source = pathlib.Path(mixture.__code__.co_filename).read_text(encoding="utf-8").splitlines()
    assert "component = pyro.sample" in source[line - 1]


def test_how_the_kl_is_computed_is_a_matter_of_the_estimator():
    for elbo, kl in ((TraceMeanField_ELBO(), "closed form"), (Trace_ELBO(), "sampled"), (None, "closed form")):
        report = lvm.check((model_of_mean, guide_of_mean), data(), elbo)
        assert site(report, "loc").kl == kl
        assert site(report, "loc").guide == "Normal, reparameterised"
        assert report.cost is None


def test_describe_prints_the_table_and_nested_plates(capsys):
    def nested(x, size=None):
        loc = pyro.param("loc", torch.zeros(4, 1))
        with pyro.plate("data", size or len(x), subsample=x):
            a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
            with pyro.plate("views", 4):
                pyro.sample("x", dist.Normal(loc + a, 1.0), obs=x.T)

    lvm.check(nested, rows(6, 4), guide="mean_field").describe()
    printed = capsys.readouterr().out
    assert printed.startswith("site")
    assert "estimator: Trace" in printed
    diagram = printed[printed.index("┌") :]
    assert diagram.splitlines() == [
        "┌─ data: 6 ──────────────────────┐",
        "│ a ~ Normal                     │",
        "│ ┌─ views: 4 ─────────────────┐ │",
        "│ │ x | a ~ Normal  (observed) │ │",
        "│ └────────────────────────────┘ │",
        "└────────────────────────────────┘",
    ]


def test_nothing_moves():
    module = Hooked()
    before = state_of(module)
    with process_left_alone():
        lvm.check(module, rows(), batch_size=7)
    assert same_state(module, before)
    assert module.training


def test_a_cast_is_taken_back():
    module = Amortised()
    lvm.check(module, rows(dtype=torch.float64))
    assert next(module.parameters()).dtype is torch.float32


def test_what_a_batch_normalised_guide_remembers_is_left_alone():
    class Normalised(Amortised):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    module = Normalised().double()
    before = state_of(module)
    lvm.check(module, rows(), batch_size=7)
    assert same_state(module, before)


def test_an_error_leaves_the_module_as_it_was():
    module = Amortised()
    before = state_of(module)
    with pytest.raises(lvm.ProgramError, match="'z'"):
        lvm.check((module.model, nothing), rows())
    assert same_state(module, before)


def test_check_false_is_respected_and_so_is_validate_args():
    def grey(x, size=None):
        logit = pyro.param("logit", torch.tensor(0.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Bernoulli(logits=logit, validate_args=self_validating), obs=x)

    x = torch.linspace(0.0, 1.0, 8)
    self_validating = None
    with pytest.raises(lvm.ProgramError, match="Bernoulli"):
        lvm.fit((grey, nothing), x, steps=1)
    assert lvm.fit((grey, nothing), x, steps=1, check=False, seed=0).info["steps"] == 1
    self_validating = False
    lvm.check((grey, nothing), x)


def test_a_warning_stands_in_the_report_and_comes_from_fit():
    def inside(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def one_for_all(x, size=None):
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("loc", dist.Normal(m, 1.0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (doubt,) = lvm.check((inside, one_for_all), data()).warnings
    assert "'loc'" in doubt
    with pytest.warns(lvm.ProgramWarning, match="each of 40 rows has a value of its own") as caught:
        lvm.fit((inside, one_for_all), data(), steps=1, seed=0)
    assert caught[0].filename == __file__


def test_any_name_of_the_plate_will_do_if_its_size_is_that_of_the_data():
    def flowers(x, size=None):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("flowers", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    assert site(lvm.check((flowers, nothing), data(), batch_size=10), "x").plates[0].name == "flowers"


def test_an_estimator_that_lists_nothing_is_no_mistake():
    report = lvm.check((model_of_mean, guide_of_mean), data(), TraceEnum_ELBO())
    assert report.cost is None
    assert lvm.fit((model_of_mean, guide_of_mean), data(), elbo=TraceEnum_ELBO(), steps=1, seed=0).info["steps"] == 1

"""What a user may hand over as a program, and what is read off it."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoGuideList, AutoNormal, AutoNormalMessenger
from small_programs import Amortised, guide_of_mean, mixture, model_of_mean, nothing, rows
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.program import (
    Program,
    as_program,
    batch_arguments,
    floating_dtype,
    require_named,
    restore_mode,
    training_mode,
)


class Plain:
    """No nn.Module, but it has some."""

    def __init__(self):
        self.net = nn.Linear(2, 2)
        self.model = lambda x, size=None: None

    def guide(self, x, size=None, index=None):
        """Nothing."""


class Other:
    def __init__(self):
        self.net = nn.Linear(2, 2)

    def guide(self, x):
        """Nothing."""


def test_three_forms_and_their_names():
    pair = as_program((mixture, nothing))
    assert (pair.model, pair.guide, pair.name) == (mixture, nothing, "(mixture, nothing)")
    lone = as_program(mixture)
    assert lone.guide is None
    assert lone.name == "mixture"
    module = Amortised()
    program = as_program(module)
    assert program.source is module
    assert program.name == "Amortised"
    assert dict(program.modules) == {"": module}
    assert as_program(program) is program
    assert as_program(program, nothing).guide is nothing
    assert as_program((mixture, None or nothing), guide_of_mean).guide is guide_of_mean


def test_a_guide_that_is_empty_is_still_a_guide():
    empty = AutoGuideList(mixture)
    assert len(empty) == 0
    assert as_program((mixture, nothing), empty).guide is empty


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ((mixture,), r"\(model, guide\), two callables; got \(function\)"),
        ((mixture, None), r"got \(function, NoneType\)"),
        (3, r"\(model, guide\) tuple, an object .* got 3"),
        (Amortised, r"the class Amortised: make an object of it"),
    ],
)
def test_what_is_no_program_is_refused(wrong, words):
    with pytest.raises(TypeError, match=words):
        as_program(wrong)


def test_a_guide_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match=r"guide must be a callable.* got 5"):
        as_program(mixture, 5)


@pytest.mark.parametrize("name", ["size", "index", "weight", "strata"])
def test_data_cannot_have_a_name_that_says_what_a_batch_is(name):
    def model(x, **kwargs):
        """Takes all."""

    with pytest.raises(TypeError, match=f"the data have the name '{name}', by which .* give them another name"):
        as_program((model, model)).require_arguments((torch.zeros(2),), {name: torch.zeros(2)})


def test_keywords_are_those_that_a_signature_names():
    def with_index(x, index=None, size=None):
        """Names two."""

    def anything(x, **kwargs):
        """Takes all."""

    program = as_program((with_index, anything))
    assert program.keywords == {"model": {"index", "size"}, "guide": {"size", "index", "weight"}}
    assert program.names("index")
    assert not program.names("weight")
    assert as_program((with_index, AutoNormal(with_index))).keywords["guide"] == {"index", "size"}
    assert as_program(partial(with_index, index=None)).keywords["model"] == {"index", "size"}

    def sorted_rows(x, size=None, strata=None):
        """Counts on the order of the rows."""

    def also(x, strata=None, **kwargs):
        """Counts on it too, and takes all others."""

    together = as_program((sorted_rows, also)).keywords
    assert together == {"model": {"size", "strata"}, "guide": {"size", "index", "weight", "strata"}}
    for other in (anything, with_index, AutoNormal(sorted_rows)):  # what the one leaves out the other would not
        alone = as_program((sorted_rows, other)).keywords
        assert alone["model"] == {"size"}
        assert "strata" not in alone["guide"]
    assert "strata" not in as_program((anything, sorted_rows)).keywords["guide"]
    assert batch_arguments(frozenset({"size"}), size=5, index=torch.arange(2)) == {"size": 5}


@pytest.mark.parametrize("wrap", [config_enumerate, poutine.scale(scale=1.0), lambda f: poutine.block(f, hide=["q"])])
def test_pyro_handlers_do_not_hide_a_signature(wrap):
    assert as_program((wrap(mixture), nothing)).keywords["model"] == {"size"}
    module = Amortised()
    assert as_program((wrap(module.model), module.guide)).modules[""] is module

    class Forward(nn.Module):
        def forward(self, x, index=None):
            """Names one."""

    forward = Forward()
    wrapped = as_program((wrap(forward), nothing))
    assert wrapped.keywords["model"] == {"index"}
    assert dict(wrapped.modules) == {"": forward}


def test_modules_of_plain_objects_are_found_and_none_hides_another():
    plain, other = Plain(), Other()
    assert dict(as_program(plain).modules) == {"": plain.net}
    both = as_program((partial(Plain.guide, plain), other.guide))
    assert list(both.modules.values()) == [other.net]
    mixed = as_program((plain.guide, other.guide)).modules
    assert mixed == {"net": plain.net, "guide.net": other.net}
    module = Amortised()
    assert as_program((module.model, module.guide)).modules == {"": module}
    pair = as_program((module.decoder, module.encoder)).modules
    assert pair == {"model": module.decoder, "guide": module.encoder}
    assert as_program((nothing, module.encoder)).modules == {"guide": module.encoder}


def test_a_replaced_guide_of_a_plain_object_is_no_part_of_the_program():
    plain = Plain()
    plain.guide = nn.Linear(1, 1)
    assert dict(as_program(plain).modules) == {"net": plain.net, "guide": plain.guide}
    assert dict(as_program(plain, nothing).modules) == {"": plain.net}


def test_hooks_belong_to_the_object_in_whatever_form_it_is_given():
    class Hooked(Amortised):
        def initialize(self, x, *, seed):
            """Nothing."""

    module = Hooked()
    for form in (module, (module.model, module.guide), module.model, config_enumerate(module.model)):
        assert as_program(form).hook("initialize").__self__ is module
        assert as_program(form).hook("strata") is None
    assert as_program((mixture, nothing)).hook("initialize") is None


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (mixture, (rows(5), rows(5)), r"2 arguments by position, but model mixture\(x, size=None\) .*multiple values"),
        (mixture, {"y": rows(5)}, r"the names 'y', but model mixture\(x, size=None\) cannot be called"),
        (lambda x, y, size=None: None, rows(5), r"1 arguments by position, but model <lambda>.*'y'"),
    ],
)
def test_data_that_the_signature_does_not_take(model, data, words):
    with pytest.raises(TypeError, match=words):
        lvm.fit((model, nothing), data, steps=1)


def test_a_guide_with_another_signature_than_the_model():
    with pytest.raises(TypeError, match=r"but guide <lambda>\(y\)"):
        lvm.fit((mixture, lambda y: None), {"x": rows(5)[:, 0]}, steps=1)


def test_require_named():
    program = as_program((mixture, lambda x: None))
    with pytest.raises(lvm.ProgramError, match=r"because so: add `size=None` to the signature of its guide"):
        require_named(program, "size", "because so")
    require_named(as_program((mixture, nothing)), "size", "because so")


def test_training_mode_comes_back_as_it_was():
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    module[1].eval()
    before = training_mode([module], False)
    assert not any(inner.training for inner in module.modules())
    restore_mode(before)
    assert [inner.training for inner in module.modules()] == [True, True, False]


def test_floating_dtype_is_the_first_ones():
    tensors = [torch.arange(2), rows(2), rows(2, dtype=torch.float32)]
    assert floating_dtype(tensors) is torch.float64
    assert floating_dtype(["a", torch.arange(2)]) is None


def test_a_decorated_pair_fits():
    @config_enumerate
    def model(x, size=None):
        locs = pyro.param("locs", torch.tensor([-1.0, 2.0]))
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("component", dist.Bernoulli(torch.tensor(0.5, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(locs[k.long()], 1.0), obs=x)

    fit = lvm.fit((model, nothing), rows(20)[:, 0], steps=2, seed=0)
    assert "TraceEnum_ELBO" in fit.info["estimator"]
    assert isinstance(fit._bound.program, Program)


def test_model_of_mean_is_a_program():
    assert as_program((model_of_mean, guide_of_mean)).keywords == {"model": {"size"}, "guide": {"size"}}


def test_a_guide_that_runs_the_model_by_itself_is_refused():
    with pytest.raises(TypeError, match=r"AutoNormalMessenger, which runs the model by itself.*use .*AutoNormal"):
        as_program((model_of_mean, AutoNormalMessenger(model_of_mean)))

"""What a graph cannot hold goes through Pyro, says why, and has moved nothing; and the level of a fit."""

from __future__ import annotations

import inspect
import logging
import random
import re
import shutil

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import affine_autoregressive, affine_coupling
from pyro.infer import RenyiELBO, trace_elbo, trace_mean_field_elbo, traceenum_elbo, tracegraph_elbo
from pyro.infer.util import Dice
from small_programs import Amortised, data, guide_of_mean, mixture, model_of_mean, nothing, rows, same_state, state_of
from torch import nn
from torch.utils.data import DataLoader

import pyro_lvm as lvm
from pyro_lvm.capture import graph as graphs
from pyro_lvm.capture import hardware, readouts
from pyro_lvm.capture.graph import (
    SAME_AFTER_FUSION,
    STEPS_THAT_REPAY_A_COMPILER,
    STEPS_THAT_REPAY_A_GRAPH,
    choose_level,
)
from pyro_lvm.inference import bound

NO_COMPILER = shutil.which("g++") is None


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    """How well the bound is known in the end is another test's affair."""
    monkeypatch.setattr(bound, "MAX_PASSES", 2)


def fitted(capture, make, x, **options):
    """A fit of the program that ``make`` makes, everything under one seed, and the program."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    program = make()
    options = {"steps": 8, "batch_size": 10, "seed": 3, "progress": False} | options
    return lvm.fit(program, x, capture=capture, **options), program


def refused(make, x, words, **options):
    """The captured fit, which fell back for the reason ``words`` and gives what the eager fit gives."""
    eager, program = fitted(False, make, x, **options)
    captured, other = fitted("graph", make, x, **options)
    assert captured.info["capture"] == "eager"
    assert captured.info["capture_reason"].startswith("not captured: ")
    assert words in captured.info["capture_reason"]
    assert eager.history == captured.history
    assert eager.elbo == captured.elbo
    assert all(torch.equal(value, captured.params[name]) for name, value in eager.params.items())
    if isinstance(program, nn.Module):
        assert same_state(other, state_of(program))
    return captured


class Reading(Amortised):
    """Amortised, with something in its guide that a graph cannot hold."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.calls, self.notes, self.sizes = 0, [], {}

    def guide(self, x, size=None):
        super().guide(x * self.read(self, x), size)


def by_item(module, x):
    return x.sum().item() * 0.0 + 1.0


def by_branch(module, x):
    if x.sum() > 0:
        return 1.0
    return 2.0


def by_list(module, x):
    return 1.0 + sum(value > 0 for value in x[:, 0].tolist())


def by_number_of_rows(module, x):
    return 1.0 + len(x[x[:, 0] > 0])


def by_array_of_a_parameter(module, x):
    return 1.0 + float(module.log_scale.detach().numpy().sum())


def by_python(module, x):
    return 1.0 + random.random()


def by_numpy(module, x):
    return 1.0 + np.random.rand()  # noqa: NPY002


def by_count(module, x):
    module.calls += 1
    return 1.0


def by_note(module, x):
    module.notes.append(x.mean())
    return 1.0


def by_note_of_a_size(module, x):
    module.sizes.setdefault(len(x), torch.ones(len(x)))
    return 1.0


def by_count_that_matters(module, x):
    module.calls += 1
    return 1.0 + 0.01 * module.calls


def line_of(function, offset=1):
    return f"{function.__code__.co_filename.split('/')[-1]}:{inspect.getsourcelines(function)[1] + offset}"


def angle(x, size=None):
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.VonMises(torch.zeros(()), torch.tensor(2.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of_angle(x, size=None):
    shift = pyro.param("shift", torch.tensor(0.1))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.VonMises(torch.sin(x + shift), torch.tensor(2.0)))


DECIDES = "a tensor's value decides what happens next"

REFUSED = {
    "item": (lambda: Reading(by_item), rows(), DECIDES, {}),
    "branch": (lambda: Reading(by_branch), rows(), DECIDES, {}),
    "line of item": (lambda: Reading(by_item), rows(), line_of(by_item), {}),
    "line of branch": (lambda: Reading(by_branch), rows(), line_of(by_branch), {}),
    "list": (lambda: Reading(by_list), rows(), DECIDES, {}),
    "number of rows": (lambda: Reading(by_number_of_rows), rows(), "a tensor's value decides a shape", {}),
    "line of number": (lambda: Reading(by_number_of_rows), rows(), line_of(by_number_of_rows), {}),
    "array of a parameter": (lambda: Reading(by_array_of_a_parameter), rows(), DECIDES, {}),
    "python's random": (lambda: Reading(by_python), rows(), "source of change of its own", {}),
    "numpy's random": (lambda: Reading(by_numpy), rows(), "source of change of its own", {}),
    "count": (lambda: Reading(by_count), rows(), "calls in every call", {}),
    "note": (lambda: Reading(by_note), rows(), "notes in every call", {}),
    "count that matters": (lambda: Reading(by_count_that_matters), rows(), "source of change of its own", {}),
    "rejection": (lambda: (angle, guide_of_angle), data(), DECIDES, {}),
    "renyi": (Amortised, rows(), "RenyiELBO", {"elbo": RenyiELBO(num_particles=3), "batch_size": None}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_graph_holds_is_refused_and_trained_all_the_same(case):
    make, x, words, options = REFUSED[case]
    refused(make, x, words, **options)


def test_what_is_made_once_and_kept_is_no_change():
    eager, _ = fitted(False, lambda: Reading(by_note_of_a_size), rows())
    captured, _ = fitted("graph", lambda: Reading(by_note_of_a_size), rows())
    assert captured.info["capture"] == "graph"
    assert captured.history == eager.history


def test_a_refusal_is_told_once(caplog):
    with caplog.at_level(logging.INFO, "pyro_lvm"):
        fit = refused(lambda: Reading(by_item), rows(), DECIDES)
    said = [record.getMessage() for record in caplog.records if record.name == "pyro_lvm"]
    assert said == [f"Reading: {fit.info['capture_reason']}"]


def test_no_refusal_no_word(caplog):
    with caplog.at_level(logging.INFO, "pyro_lvm"):
        fit, _ = fitted("graph", Amortised, rows())
    assert (fit.info["capture"], fit.info["capture_reason"]) == ("graph", 'capture="graph"')
    assert not [record for record in caplog.records if record.name == "pyro_lvm"]


def test_a_pyro_that_is_not_known_is_not_patched(monkeypatch):
    monkeypatch.setattr(pyro, "__version__", "1.99.0")
    refused(Amortised, rows(), "Pyro 1.99.0 is not one of 1.9.1, 1.9.2")
    with pytest.raises(NotImplementedError, match=r"Pyro 1\.99\.0 is not one of"), readouts.put_aside():
        pass


def test_data_that_are_no_tensors_are_refused():
    class Named(Amortised):
        def model(self, x, name, size=None):
            super().model(x, size)

        def guide(self, x, name, size=None):
            super().guide(x, size)

    loader = DataLoader([{"x": row, "name": "a"} for row in rows()], batch_size=10)
    refused(Named, loader, "hold something that is not a tensor", batch_size=None)


def readout_symbols():
    modules = (trace_elbo, trace_mean_field_elbo, traceenum_elbo, tracegraph_elbo)
    names = [(module, name) for module in modules for name in ("torch_item", "warn_if_nan")]
    return [getattr(owner, name, None) for owner, name in (*names, (Dice, "compute_expectation"))]


def test_what_is_put_aside_comes_back_whatever_happens():
    before = readout_symbols()
    with readouts.put_aside():
        assert readout_symbols() != before
    assert readout_symbols() == before
    with pytest.raises(KeyError), readouts.put_aside():
        raise KeyError
    assert readout_symbols() == before
    refused(lambda: Reading(by_item), rows(), DECIDES)
    assert readout_symbols() == before


def test_a_number_of_a_graph_meets_numbers_and_tensors_as_pythons_do():
    half, tensor = readouts._detached(torch.tensor(0.1)), torch.tensor([1.0, 3.0])
    number = torch.tensor(0.1).item()
    for found, right in (
        (0 + half, number),
        (1.0 - half * 3, 1.0 - number * 3),
        (-half / 7 + half, -number / 7 + number),
        (2 * half - half - 1, 2 * number - number - 1),
    ):
        assert found.value.dtype is torch.float64
        assert found.value.item() == right
    for found, right in (
        (half + tensor, number + tensor),
        (tensor + half, tensor + number),
        (tensor - half, tensor - number),
        (half - tensor, number - tensor),
        (tensor[0] * half, tensor[0] * number),
        (half / tensor, number / tensor),
        (tensor / half, tensor / number),
        (torch.arange(3) + half, torch.arange(3) + number),
        (tensor.double() + half, tensor.double() + number),
    ):
        assert found.dtype is right.dtype
        assert torch.equal(found, right)


@pytest.mark.parametrize("wrong", [0, 1, -1], ids=["loss", "first gradient", "last gradient"])
@pytest.mark.parametrize("program", [Amortised, lambda: (mixture, nothing)], ids=["exact", "enumerated"])
def test_a_graph_that_gives_something_else_is_refused(monkeypatch, program, wrong):
    true = graphs.graph_of

    def planted(function, *example):
        made = true(function, *example)
        forward = made.forward

        def bent(*inputs):
            out = list(forward(*inputs))
            out[wrong] = out[wrong] * (1 + 1e-9)
            return out

        made.forward = bent
        return made

    monkeypatch.setattr(graphs, "graph_of", planted)
    x = data() if program is not Amortised else rows()
    refused(program, x, "another loss or other gradients than Pyro")


def test_a_graph_that_cannot_be_run_is_refused(monkeypatch):
    true = graphs.graph_of

    def planted(function, *example):
        made = true(function, *example)
        made.forward = lambda *inputs: torch.ones(3) + torch.ones(2)
        return made

    monkeypatch.setattr(graphs, "graph_of", planted)
    refused(Amortised, rows(), "the graph cannot be run: The size of tensor a (3) must match")


def test_a_gradient_that_the_graph_leaves_out_is_refused(monkeypatch):
    true = graphs.CapturedStep._run

    def forgetful(self, graph, tensors):
        result = true(self, graph, tensors)
        self.step.parameters[0].grad = None
        return result

    monkeypatch.setattr(graphs.CapturedStep, "_run", forgetful)
    refused(Amortised, rows(), "another loss or other gradients than Pyro")


def by_sum_unseen(module, x):
    return torch.Tensor([x.sum()]).to(x.dtype)  # torch tells nobody that this maker reads a tensor


def by_parameter_unseen(module, x):
    return torch.Tensor([module.encoder.weight.detach()[0, 0]]).to(x.dtype)


@pytest.mark.parametrize("read", [by_sum_unseen, by_parameter_unseen])
def test_a_constant_of_the_first_step_is_noticed(read):
    """What the graph baked in shows on other rows, whatever their order, and at other parameters."""
    refused(lambda: Reading(read), rows(), "another loss or other gradients than Pyro")


def test_a_program_that_bears_no_row_twice_is_compared_on_its_rows_in_another_order():
    def by_covariance(module, x):
        return torch.linalg.cholesky((-torch.cdist(x, x)).exp()).new_ones(())

    eager, _ = fitted(False, lambda: Reading(by_covariance), rows())
    captured, _ = fitted("graph", lambda: Reading(by_covariance), rows())
    assert captured.info["capture"] == "graph"
    assert captured.history == eager.history


def test_a_step_that_cannot_be_compared_elsewhere_is_refused():
    def by_weight(module, x):
        largest = module.encoder.weight.detach().abs().max()
        return torch.linalg.cholesky((module.largest * 1.0005 - largest).reshape(1, 1)).new_ones(())

    def make():
        program = Reading(by_weight)
        program.largest = program.encoder.weight.detach().abs().max()
        return program

    refused(make, rows(), "no step for comparison on other rows, at other parameters: linalg.cholesky", lr=1e-7)


def seeded_guide(x, size=None):
    torch.manual_seed(0)
    guide_of_mean(x, size)


def test_a_seed_in_the_program_is_noticed():
    """Under the seed that it sets itself, nothing would differ."""
    refused(lambda: (model_of_mean, seeded_guide), data(), "another loss or other gradients than Pyro", seed=5)


def density(x, size=None):
    flow = pyro.module("flow", FLOWS[0])
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.TransformedDistribution(dist.Normal(x.new_zeros(3), 1.0).to_event(1), [flow]), obs=x)


FLOWS = []


@pytest.mark.parametrize(("make", "level"), [(affine_autoregressive, "eager"), (affine_coupling, "graph")])
def test_transforms_that_know_their_tensors_again_are_called_twice(make, level):
    """Pyro's keep the last pair of tensors, and would go back a second time through the same graph."""
    ends = []
    for capture in (False, "graph"):
        pyro.set_rng_seed(1)
        FLOWS[:] = [make(3, hidden_dims=[4])]
        x = rows(dtype=torch.float32)
        ends.append(lvm.fit((density, nothing), x, steps=8, batch_size=10, seed=3, capture=capture))
    assert ends[1].info["capture"] == level, ends[1].info["capture_reason"]  # an order of columns is read in a loop
    assert ends[0].history == ends[1].history


def test_a_mask_that_is_a_buffer_may_choose():
    class Masked(Amortised):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.tensor([True, False, True]))

        def guide(self, x, size=None):
            super().guide(x * x[:, self.seen].shape[1], size)  # a number of the graph

    def end(capture):
        def callback(epoch):
            program.seen.copy_(torch.tensor([True, True, epoch.epoch % 2 == 0]))

        torch.manual_seed(7)
        program = Masked()
        return lvm.fit(program, rows(), steps=12, batch_size=10, seed=3, capture=capture, callbacks=[callback])

    eager, captured = end(False), end("graph")
    assert captured.info["capture"] == "graph"
    assert captured.history == eager.history


def test_a_compiled_module_is_no_obstacle():
    class Compiled(Amortised):
        def __init__(self):
            super().__init__()
            self.compiled = torch.compile(nn.Sequential(nn.Linear(3, 3)), backend="eager")

        def guide(self, x, size=None):
            super().guide(x + self.compiled(x), size)

    eager, _ = fitted(False, Compiled, rows())
    captured, _ = fitted("graph", Compiled, rows())
    assert captured.history == eager.history


LEVELS = [
    (False, 10**9, "g++", "eager", "capture=False"),
    ("graph", 1, None, "graph", 'capture="graph"'),
    ("compiled", 1, "g++", "compiled", 'capture="compiled"'),
    ("compiled", 1, "clang++", "compiled", 'capture="compiled"'),
    ("compiled", 1, None, "graph", r"there is no C\+\+ compiler"),
    ("auto", STEPS_THAT_REPAY_A_GRAPH - 1, "g++", "eager", "199 steps do not repay a capture"),
    ("auto", STEPS_THAT_REPAY_A_GRAPH, "g++", "graph", "200 steps do not repay a compilation"),
    ("auto", STEPS_THAT_REPAY_A_COMPILER - 1, "g++", "graph", "3999 steps do not repay a compilation"),
    ("auto", STEPS_THAT_REPAY_A_COMPILER, "g++", "compiled", "4000 steps repay a compilation"),
    ("auto", STEPS_THAT_REPAY_A_COMPILER, None, "graph", r"would repay a compilation, but there is no C\+\+ compiler"),
]


@pytest.mark.parametrize(("capture", "steps", "compiler", "level", "words"), LEVELS)
def test_the_level_depends_on_what_is_asked_the_steps_and_the_compiler(
    monkeypatch, capture, steps, compiler, level, words
):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == compiler else None)
    chosen, reason = choose_level(capture, steps)
    assert chosen == level
    assert re.search(words, reason)


@pytest.mark.parametrize("nonsense", [True, None, 1, "eager", "jit"])
def test_a_level_that_is_not_known_is_refused(nonsense):
    with pytest.raises(ValueError, match=r"is not known: use 'auto', 'graph', 'compiled', 'cuda_graph' or False"):
        choose_level(nonsense, 10)
    with pytest.raises(ValueError, match="is not known"):
        lvm.fit(Amortised(), rows(), steps=1, capture=nonsense)


def test_auto_leaves_a_short_fit_and_captures_a_long_one():
    short, _ = fitted("auto", lambda: (mixture, nothing), data(), steps=199, batch_size=None)
    long, _ = fitted("auto", lambda: (mixture, nothing), data(), steps=200, batch_size=None)
    assert (short.info["capture"], long.info["capture"]) == ("eager", "graph")


@pytest.mark.skipif(NO_COMPILER, reason="g++ is not installed")
def test_a_compiled_step_gives_the_same_within_rounding():
    make = lambda: (model_of_mean, guide_of_mean)  # noqa: E731
    eager, _ = fitted(False, make, data(), lr=0.05)
    compiled, _ = fitted("compiled", make, data(), lr=0.05)
    assert (compiled.info["capture"], compiled.info["capture_reason"]) == ("compiled", 'capture="compiled"')
    share = SAME_AFTER_FUSION[torch.float64]
    for name, value in eager.params.items():
        torch.testing.assert_close(compiled.params[name], value, rtol=10 * share, atol=10 * share)
    assert compiled.history["loss"] == pytest.approx(eager.history["loss"], rel=share)
    assert compiled.elbo == pytest.approx(eager.elbo, rel=share)


def test_without_a_compiler_the_graph_is_stepped_on(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    eager, _ = fitted(False, Amortised, rows())
    captured, _ = fitted("compiled", Amortised, rows())
    assert captured.info["capture"] == "graph"
    assert captured.info["capture_reason"].endswith("there is no C++ compiler (g++ or clang++)")
    assert captured.history == eager.history


def test_a_compiler_that_fails_leaves_the_graph(monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError("the compiler crashed\nin many lines")

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch._inductor, "compile", fails)
    eager, _ = fitted(False, Amortised, rows())
    with caplog.at_level(logging.INFO, "pyro_lvm"):
        captured, _ = fitted("compiled", Amortised, rows())
    assert captured.info["capture"] == "graph"
    assert captured.info["capture_reason"] == "not compiled: the compiler crashed"
    assert [record.getMessage() for record in caplog.records] == ["Amortised: not compiled: the compiler crashed"]
    assert captured.history == eager.history


def test_a_level_that_is_not_known_leaves_the_module_alone():
    module = Amortised()
    with pytest.raises(ValueError, match="capture='nonsense' is not known"):
        lvm.fit(module, rows(dtype=torch.float64), steps=1, capture="nonsense")
    assert next(module.parameters()).dtype is torch.float32


def test_options_of_the_hardware_say_no_without_it(monkeypatch):
    with pytest.raises(ValueError, match=r'capture="cuda_graph".*the data are on cpu.*use capture="compiled"'):
        lvm.fit(Amortised(), rows(), steps=1, capture="cuda_graph")
    with pytest.raises(ValueError, match=r"autocast=torch.float16 is not offered: use torch.bfloat16"):
        lvm.fit(Amortised(), rows(), steps=1, autocast=torch.float16)
    monkeypatch.setattr(hardware, "_cpu_multiplies_bfloat16", lambda: False)
    with pytest.raises(ValueError, match=r"needs a processor that multiplies bfloat16.*this cpu does not"):
        lvm.fit(Amortised(), rows(), steps=1, autocast=torch.bfloat16)
    assert graphs.choose_level("cuda_graph", 1) == ("cuda_graph", 'capture="cuda_graph"')


def test_bfloat16_where_the_processor_has_it(monkeypatch):
    """Whether it is fast is the processor's affair; that graph and Pyro agree, and the bound is near, is ours."""
    monkeypatch.setattr(hardware, "_cpu_multiplies_bfloat16", lambda: True)
    x = rows(dtype=torch.float32)

    def fitted_in(autocast, capture):
        torch.manual_seed(0)
        return lvm.fit(Amortised(), x, steps=20, lr=1e-2, seed=0, autocast=autocast, capture=capture)

    eager, graph = fitted_in(torch.bfloat16, False), fitted_in(torch.bfloat16, "graph")
    assert graph.info["capture"] == "graph"
    assert graph.info["autocast"] == "torch.bfloat16"
    assert all(torch.equal(eager.params[name], graph.params[name]) for name in eager.params)
    full = fitted_in(None, False)
    assert not torch.equal(full.params["encoder.weight"], eager.params["encoder.weight"])
    assert eager.elbo == pytest.approx(full.elbo, abs=0.05)


def test_a_long_graph_is_not_compiled_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(graphs, "STEPS_THAT_REPAY_A_GRAPH", 1)
    monkeypatch.setattr(graphs, "STEPS_THAT_REPAY_A_COMPILER", 2)
    monkeypatch.setattr(graphs, "OPERATIONS_THAT_COMPILE_SOON", 5)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    fit = lvm.fit((model_of_mean, guide_of_mean), data(), steps=3, seed=0)
    assert fit.info["capture"] == "graph"
    assert re.fullmatch(r"\d+ operations would take long to compile", fit.info["capture_reason"])


def test_the_value_of_a_parameter_is_not_baked_in():
    """It decides the other way only after some steps: no comparison on the first batch could show it."""

    def model(x, size=None):
        loc = pyro.param("loc", x.new_tensor(0.0))
        width = 1.0 if loc.item() < 0.5 else 2.0
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, width), obs=x)

    refused(lambda: (model, nothing), data(), "a tensor's value decides what happens next", lr=0.1)


def test_a_tensor_of_the_surroundings_that_a_callback_fills_is_read_anew():
    def pair():
        weight = torch.tensor(1.0, dtype=torch.float64)

        def model(x, size=None):
            loc = pyro.param("loc", x.new_tensor(0.0))
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample("x", dist.Normal(loc, weight.item()), obs=x)

        return weight, model

    fits = []
    for capture in (False, "graph"):
        weight, model = pair()
        fill = lambda end, weight=weight: weight.fill_(1.0 + end.epoch) and None  # noqa: E731
        fits.append(lvm.fit((model, nothing), data(), epochs=5, lr=0.1, seed=0, capture=capture, callbacks=[fill]))
    assert fits[0].history["loss"] == fits[1].history["loss"]

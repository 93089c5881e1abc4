"""Parameters belong to a fit: created once, named apart, trained in place, kept, and never in the global store."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from small_programs import (
    Amortised,
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
from torch.distributions import constraints

import pyro_lvm as lvm
from pyro_lvm.errors import ProgramError
from pyro_lvm.function_parameters import FunctionParameters
from pyro_lvm.parameters import BoundProgram, Untouched, isolated
from pyro_lvm.program import as_program


def params_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_isolated_gives_everything_back_also_when_it_raises():
    def raising():
        pyro.param("logit", torch.zeros(2))
        torch.randn(3)
        raise ZeroDivisionError

    with process_left_alone(), pytest.raises(ZeroDivisionError), isolated(3, validate=True):
        raising()
    with process_left_alone(), isolated(3, validate=False):
        first = torch.randn(3)
    torch.manual_seed(3)
    assert torch.equal(first, torch.randn(3))


def test_isolated_without_a_seed_continues_the_process_stream():
    expected = torch.Generator()
    expected.set_state(torch.get_rng_state())
    with isolated(None):
        assert torch.equal(torch.randn(2), torch.randn(2, generator=expected))


def test_two_fits_with_equal_names_and_other_shapes_never_meet():
    def other_model(x, size=None):
        locs = pyro.param("locs", torch.zeros(3, 2))
        logit = pyro.param("logit", torch.zeros(3))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(locs.sum() + logit.sum(), 1.0), obs=x)

    x = data()
    alone = lvm.fit((mixture, nothing), x, steps=6, seed=0)
    inner: list[lvm.Fit] = []
    with process_left_alone():
        outer = lvm.fit(
            (mixture, nothing),
            x,
            steps=6,
            seed=0,
            callbacks=[lambda end: inner.append(lvm.fit((other_model, nothing), x, steps=2, seed=end.epoch))],
        )
    assert len(inner) == 6
    assert {name: tuple(value.shape) for name, value in inner[0].params.items()} == {"locs": (3, 2), "logit": (3,)}
    assert params_equal(alone.params, outer.params)
    assert alone.history == outer.history


def test_evaluations_of_interleaved_fits_keep_apart():
    x = data()
    first = lvm.fit((model_of_mean, guide_of_mean), x, steps=20, seed=0)
    draws = first.posterior(x, num_draws=5, seed=1)["loc"]
    second = lvm.fit((model_of_mean, guide_of_mean), x + 50, steps=200, lr=0.5, seed=0)
    with process_left_alone():
        assert torch.equal(first.posterior(x, num_draws=5, seed=1)["loc"], draws)
        assert not torch.equal(second.posterior(x, num_draws=5, seed=1)["loc"], draws)


def test_param_values_are_constrained_created_once_and_cast():
    parameters = FunctionParameters(torch.float64)
    scale = parameters.value("scale", torch.tensor(2.0), constraints.positive)
    torch.testing.assert_close(scale.detach(), torch.tensor(2.0, dtype=torch.float64), rtol=1e-12, atol=0)
    assert scale.unconstrained() is parameters.unconstrained["scale"]
    again = parameters.value("scale", lambda: pytest.fail("made anew"), constraints.real)
    assert torch.equal(again, scale)
    assert parameters.value("lazy", lambda: torch.ones(2), constraints.real).dtype is torch.float64
    assert parameters.value("number", 1.5, constraints.real).item() == 1.5


@pytest.mark.parametrize(
    ("start", "constraint", "words"),
    [
        (None, constraints.real, r"pyro.param\('p'\) .*has no initial value"),
        (torch.tensor(3), constraints.real, "torch.int64: only floating parameters"),
        (torch.tensor(-1.0), constraints.positive, r"starts at \[-1.0\], outside its constraint GreaterThan"),
        (torch.tensor([1.0, 0.0, 0.0]), constraints.simplex, "outside its constraint Simplex.* or on its boundary"),
        (torch.tensor(float("nan")), constraints.real, "outside its constraint Real"),
    ],
)
def test_params_that_cannot_start(start, constraint, words):
    with pytest.raises(ProgramError, match=words):
        FunctionParameters().value("p", start, constraint)


def test_a_new_nn_parameter_in_every_call_is_the_first_one():
    def model(x, size=None):
        loc = pyro.param("loc", nn.Parameter(torch.zeros((), dtype=x.dtype)))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = data()
    fit = lvm.fit((model, nothing), x, steps=300, lr=0.05, seed=0)
    assert fit.params.keys() == {"loc"}
    torch.testing.assert_close(fit.params["loc"], x.mean(), rtol=0, atol=1e-4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.linear(x))


def with_net(net):
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(x.shape), 1.0).to_event(1), obs=x)

    def guide(x, size=None):
        pyro.module("net", net)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    return model, guide


def test_pyro_module_is_cast_trained_in_place_and_snapshotted_with_its_buffers():
    net, x = Net(), rows()
    before = state_of(net)
    with process_left_alone():
        fit = lvm.fit(with_net(net), x, steps=5, seed=0)
    assert net.linear.weight.dtype is torch.float64
    assert fit.info["cast"] == "parameters torch.float32 -> torch.float64"
    assert "Adam(lr=" in fit.info["optimizer"]
    assert fit.params.keys() == {f"net$$${name}" for name, _ in net.named_parameters()}
    assert not torch.allclose(net.linear.weight, before["linear.weight"].double())
    assert net.norm.running_mean.any()
    assert net.training
    draws = fit.posterior(x, num_draws=3, seed=0)["z"]
    lvm.fit(with_net(net), x + 3, steps=5, seed=1)
    torch.testing.assert_close(fit.posterior(x, num_draws=3, seed=0)["z"], draws, rtol=0, atol=0)
    assert net.training


def test_two_networks_registered_under_one_name_are_both_trained():
    first, second = nn.Linear(3, 2).double(), nn.Linear(2, 3).double()

    def model(x, size=None):
        pyro.module("net", second)
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(second(z), 1.0).to_event(1), obs=x)

    def guide(x, size=None):
        pyro.module("net", first)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(first(x), 1.0).to_event(1))

    before = state_of(first), state_of(second)
    fit = lvm.fit((model, guide), rows(), steps=3, seed=0)
    assert not same_state(first, before[0])
    assert not same_state(second, before[1])
    assert fit.params.keys() == {"net$$$weight", "net$$$bias", "net$$$weight'", "net$$$bias'"}


class Located(PyroModule):
    """A PyroModule with a constrained, a plain and a nested parameter."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(1.5), constraint=constraints.positive)
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.net = PyroModule[nn.Linear](3, 3)
        self.plain = nn.Linear(3, 3)

    def forward(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(self.plain(self.net(x)) + self.loc, self.scale).to_event(1), obs=x)


@pytest.mark.parametrize("local", [False, True])
def test_pyro_modules(local):
    with pyro.settings.context(module_local_params=local):
        module, x = Located(), rows()
        start = state_of(module)
        with process_left_alone():
            fit = lvm.fit((module, nothing), x, steps=4, seed=0)
        names = {"scale", "loc", "net.weight", "net.bias", "plain.weight", "plain.bias"}
        assert fit.params.keys() == names
        assert fit.params["scale"] > 0
        torch.testing.assert_close(fit.params["scale"], module.scale.detach(), rtol=0, atol=0)
        moved = [name for name, value in module.state_dict().items() if not torch.equal(value, start[name].double())]
        assert len(moved) == len(names)


def test_a_pyro_module_inside_a_function_is_trained_in_place():
    net = PyroModule[nn.Linear](3, 3)

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(net(x), 1.0).to_event(1), obs=x)

    fit = lvm.fit((model, nothing), rows(), steps=2, lr=0.1, seed=0)
    torch.testing.assert_close(fit.params["weight"], net.weight.detach(), rtol=0, atol=0)
    assert net.weight.dtype is torch.float64


def test_a_function_parameter_named_like_a_modules_keeps_apart():
    class Loc(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))
            self.register_buffer("shift", torch.ones(2))

        def model(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample("x", dist.Normal(self.loc + pyro.param("loc", torch.tensor(0.5)), 1.0).to_event(1), obs=x)

        def guide(self, x, size=None):
            """Nothing is latent."""

    module, x = Loc(), rows(columns=2)
    fit = lvm.fit(module, x, steps=3, seed=0)
    assert {name: tuple(value.shape) for name, value in fit.params.items()} == {"loc": (2,), "loc'": ()}
    snapshot = dict(fit._snapshot)
    assert snapshot.keys() == {"loc", "loc'", "shift"}
    lvm.fit(module, x, steps=3, seed=0)
    fit.posterior(x, num_draws=1)
    assert module.loc.shape == (2,)


def test_bound_program_holds_a_snapshot_and_gives_the_live_values_back():
    module = Amortised().double()
    module.decoder.eval()
    bound = BoundProgram(as_program(module))
    snapshot = bound.snapshot()
    live = module.decoder.bias
    with torch.no_grad():
        live.fill_(5.0)

    def raising():
        assert not module.training
        assert torch.equal(live, snapshot["decoder.bias"])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), bound.holding(snapshot):
        raising()
    assert live.tolist() == [5.0] * 3
    assert [module.training, module.decoder.training] == [True, False]
    bound.load(snapshot)
    assert torch.equal(live, snapshot["decoder.bias"])
    assert snapshot["decoder.bias"].data_ptr() != live.data_ptr()
    assert bound.reference(None) is not None
    assert bound.has_network()
    module.decoder.weight.requires_grad_(False)
    assert "decoder.weight" not in bound.trainable()


def test_tied_parameters_are_one():
    module = Amortised(columns=2, latent=2)
    module.decoder.weight = module.encoder.weight
    assert "decoder.weight" not in BoundProgram(as_program(module)).trainable()


def test_a_bound_program_needs_a_guide():
    with pytest.raises(ProgramError, match="mixture has no guide: pass guide="):
        BoundProgram(as_program(mixture))


def test_a_module_may_say_what_its_natural_parameters_are():
    class Natural(Amortised):
        def constrained(self):
            return {"noise": self.log_scale.exp()}

    module = Natural()
    values = BoundProgram(as_program(module)).constrained()
    assert values.keys() == {"noise"}
    assert not values["noise"].requires_grad


def test_untouched_restores_values_dtypes_gradients_and_structure():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weight, gradient = module[0].weight, torch.ones(2, 2)
    weight.grad = gradient
    before = state_of(module)
    untouched = Untouched([module])
    with torch.no_grad():
        weight.add_(1.0)
    module.double()
    module.late = nn.Linear(1, 1)
    module.register_buffer("also", torch.zeros(1))
    untouched.restore()
    assert same_state(module, before)
    assert module[0].weight is weight
    assert weight.grad.dtype is torch.float32
    assert not hasattr(module, "late")


def test_per_datum_parameters_follow_their_rows():
    """`event_dim=0` in a plate on `index` trains the parameters of the rows of the batch, and no others'."""

    def model(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            m = pyro.param("m", torch.zeros(size), event_dim=0)
            pyro.sample("z", dist.Normal(m, 0.7))

    x = 3 * data(30)
    # a constant rate leaves noise of its own order: let it fall
    falling = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.98)
    fit = lvm.fit((model, guide), x, epochs=100, batch_size=10, lr=0.3, scheduler=falling, seed=0)
    torch.testing.assert_close(fit.params["m"], x / 2, rtol=0, atol=0.2)

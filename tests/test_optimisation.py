"""One torch optimiser over all parameters, whichever the user likes, and its schedule."""

from __future__ import annotations

from functools import partial

import pyro.optim
import pytest
import torch
from small_programs import Amortised, Hooked, data, mixture, nothing, rows, same_state, state_of
from torch import nn
from torch.optim import lr_scheduler

import pyro_lvm as lvm
from pyro_lvm.inference.optimisation import make_optimizer, plateau_step


def parameters():
    return [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(3.0))]


def made(**options):
    defaults = {"optimizer": None, "scheduler": None, "lr": None, "total_steps": 100, "has_network": False}
    return make_optimizer(parameters(), **{**defaults, **options})


@pytest.mark.parametrize(("has_network", "peak"), [(False, 1e-2), (True, 2e-3)])
def test_the_default_is_one_cycle_adam(has_network, peak):
    optimizer, schedule, described = made(has_network=has_network)
    assert described == f"Adam(lr={peak:g}), OneCycleLR over 100 steps"
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(peak)
    assert rates[0] == pytest.approx(peak / 25)
    assert rates[-1] < peak / 1e4


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10])
def test_one_cycle_takes_any_number_of_steps(steps):
    assert lvm.fit((mixture, nothing), data(), steps=steps, seed=0).info["steps"] == steps


def test_the_default_peak_knows_networks_wherever_they_are():
    net = nn.Linear(1, 1)

    def model(x, size=None):
        pyro.module("net", net)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", pyro.distributions.Normal(net(x[:, :1])[:, 0], 1.0), obs=x[:, 0])

    assert "lr=0.002" in lvm.fit((model, nothing), rows(), steps=2, seed=0).info["optimizer"]
    assert "lr=0.002" in lvm.fit(Amortised(), rows(), steps=2, seed=0).info["optimizer"]
    assert "lr=0.01" in lvm.fit((mixture, nothing), data(), steps=2, seed=0).info["optimizer"]


def test_a_rate_alone_is_constant():
    optimizer, schedule, described = made(lr=0.05)
    assert schedule is None
    assert described == "Adam(lr=0.05), constant"
    assert optimizer.defaults["fused"]


def test_any_torch_optimiser_or_factory():
    optimizer, schedule, described = made(optimizer=torch.optim.SGD, lr=0.5)
    assert isinstance(optimizer, torch.optim.SGD)
    assert (schedule, described) == (None, "SGD(lr=0.5), constant")
    factory = partial(torch.optim.AdamW, lr=0.3, weight_decay=0.1)
    assert made(optimizer=factory)[0].param_groups[0]["weight_decay"] == 0.1
    x = data()
    fit = lvm.fit((mixture, nothing), x, steps=1, optimizer=torch.optim.SGD, lr=0.5, seed=0)
    before = lvm.fit((mixture, nothing), x, steps=1, optimizer=torch.optim.SGD, lr=1e-12, seed=0)
    assert not torch.equal(fit.params["locs"], before.params["locs"])


SCHEDULERS = {
    "StepLR": partial(lr_scheduler.StepLR, step_size=2),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[2]),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=5),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, cycle_momentum=False),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=6),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1e9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_steps_as_it_should(name):
    seen = []

    def factory(optimizer):
        schedule = SCHEDULERS[name](optimizer)
        seen.append(optimizer)
        return schedule

    rates = []
    lvm.fit(
        (mixture, nothing),
        data(),
        steps=6,
        lr=0.1,
        scheduler=factory,
        seed=0,
        callbacks=[lambda end: rates.append(seen[0].param_groups[0]["lr"])],
    )
    oracle = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = SCHEDULERS[name](oracle)
    expected = []
    for _ in range(6):
        oracle.step()
        schedule.step(1.0) if name == "ReduceLROnPlateau" else schedule.step()
        expected.append(oracle.param_groups[0]["lr"])
    if name == "ReduceLROnPlateau":
        assert rates[-1] < 0.1
        assert rates == sorted(rates, reverse=True)
    else:
        assert rates == pytest.approx(expected)


def test_a_plateau_watches_the_bound_in_its_own_direction():
    for mode, drops in (("min", False), ("max", False)):
        optimizer = torch.optim.SGD(parameters(), lr=1.0)
        schedule = lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, patience=1)
        for elbo in (-9.0, -7.0, -5.0, -3.0, -1.0):
            plateau_step(schedule, elbo)
        assert (optimizer.param_groups[0]["lr"] < 1.0) is drops
        for _ in range(4):
            plateau_step(schedule, -50.0)
        assert optimizer.param_groups[0]["lr"] < 1.0


WRONG = {
    "rate of nought": ({"lr": 0.0}, ValueError, "lr is 0.0: the rate must be positive"),
    "negative rate": ({"lr": -1.0}, ValueError, "lr is -1.0"),
    "no rate": ({"lr": float("nan")}, ValueError, "lr is nan"),
    "pyro optimiser": ({"optimizer": pyro.optim.Adam({"lr": 0.1})}, TypeError, "optimizer is one of pyro.optim"),
    "pyro factory": ({"optimizer": pyro.optim.Adam}, TypeError, "optimizer is one of pyro.optim"),
    "optimiser made": ({"optimizer": torch.optim.SGD(parameters())}, TypeError, "must be a class or factory"),
    "no optimiser": ({"optimizer": lambda p: 5}, TypeError, "must make a torch.optim.Optimizer; it made 5"),
    "second order": ({"optimizer": torch.optim.LBFGS}, TypeError, "LBFGS evaluates the loss several times a step"),
    "scheduler made": (
        {"scheduler": lr_scheduler.ConstantLR(torch.optim.SGD(parameters()))},
        TypeError,
        "scheduler must be a factory",
    ),
    "no scheduler": ({"scheduler": lambda o: None}, TypeError, "scheduler must make a torch.optim.lr_scheduler"),
    "scheduler lacks an argument": ({"scheduler": lr_scheduler.StepLR}, TypeError, "step_size"),
    "clip": ({"grad_clip_norm": 0.0}, ValueError, "grad_clip_norm is 0.0: it must be positive"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused_and_nothing_has_moved(name):
    options, kind, words = WRONG[name]
    module = Hooked()
    before = state_of(module)
    with pytest.raises(kind, match=words):
        lvm.fit(module, rows(), steps=3, **options)
    assert same_state(module, before)


def test_clipping_is_of_the_joint_norm_and_keeps_the_direction():
    norms = {}

    def recording(name):
        class Recorded(torch.optim.SGD):
            def step(self, closure=None):
                norms[name] = torch.cat([p.grad.flatten().double() for p in self.param_groups[0]["params"]])
                return super().step(closure)

        return Recorded

    x = data() * 5
    for name, clip in (("free", None), ("clipped", 0.1), ("loose", 1e6)):
        lvm.fit((mixture, nothing), x, steps=1, optimizer=recording(name), lr=0.1, grad_clip_norm=clip, seed=0)
    free, clipped = norms["free"], norms["clipped"]
    assert len(free) == 3  # two parameters
    assert free.norm() > 0.5
    assert clipped.norm().item() == pytest.approx(0.1, rel=1e-4)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-6, atol=1e-9)
    assert torch.equal(norms["loose"], free)

"""The fused Adam: torch's own is its oracle, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from pyro_lvm.inference.adam import FusedAdam


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(3, 2), (5,), ()]]


def give_gradients(groups, step, without=()):
    for position, (mine, torchs) in enumerate(zip(*groups, strict=True)):
        gradient = torch.randn(mine.shape, generator=torch.Generator().manual_seed(100 * step + position))
        mine.grad, torchs.grad = (None, None) if position in without else (gradient, gradient.clone())


def pair():
    mine, torchs = parameters(), parameters()
    return (mine, torchs), FusedAdam(mine, lr=0.1), torch.optim.Adam(torchs, lr=0.1, fused=True)


def same(groups):
    return all(torch.equal(a, b) for a, b in zip(*groups, strict=True))


def counters(optimizer):
    return [float(state["step"]) for state in optimizer.state.values()]


def test_it_is_torchs_adam_to_the_bit_under_a_schedule_that_also_moves_its_momentum():
    groups, *optimizers = pair()
    schedules = [OneCycleLR(optimizer, max_lr=0.3, total_steps=30) for optimizer in optimizers]
    for step in range(30):
        give_gradients(groups, step)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert same(groups)
    assert counters(optimizers[0]) == counters(optimizers[1]) == [30.0] * 3


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 1_600), (torch.float64, 8_000)])
def test_means_of_a_unit_that_has_died_do_not_stay_denormal_and_parameters_are_torchs(dtype, steps):
    mine, torchs = ([nn.Parameter(torch.full((8,), 0.3, dtype=dtype))] for _ in range(2))
    optimizers = FusedAdam(mine, lr=0.01), torch.optim.Adam(torchs, lr=0.01, fused=True)
    for step in range(steps):
        for parameter, optimizer in zip((*mine, *torchs), optimizers, strict=True):
            alive = torch.linspace(-1, 1, 8, dtype=dtype) * (1 + step % 7)
            parameter.grad = torch.where(torch.arange(8) < (8 if step < 20 else 4), alive, 0.0)
            optimizer.step()
    assert same((mine, torchs))

    def denormal(optimizer):
        mean = optimizer.state_dict()["state"][0]["exp_avg"]
        return ((mean.abs() < torch.finfo(dtype).tiny) & (mean != 0)).tolist()

    assert denormal(optimizers[0]) == [False] * 8
    assert denormal(optimizers[1]) == [False] * 4 + [True] * 4


@pytest.mark.parametrize("without", [(0,), (1, 2)])
def test_a_parameter_without_a_gradient_rests_and_keeps_its_own_count(without):
    groups, *optimizers = pair()
    for step in range(12):
        give_gradients(groups, step, without if step % 4 == 3 else ())
        for optimizer in optimizers:
            optimizer.step()
    assert same(groups)
    assert counters(optimizers[0]) == counters(optimizers[1])
    assert len(set(counters(optimizers[0]))) == 2


def test_its_state_goes_out_and_in_as_torchs_does():
    groups, *optimizers = pair()
    for step in range(5):
        give_gradients(groups, step)
        for optimizer in optimizers:
            optimizer.step()
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    for step in (5, 6):
        give_gradients(groups, step)
        for optimizer in optimizers:
            optimizer.step()
    optimizers[0].load_state_dict(states[1])
    optimizers[1].load_state_dict(states[0])
    for step in range(7, 12):
        give_gradients(groups, step)
        for optimizer in optimizers:
            optimizer.step()
    assert same(groups)
    assert counters(optimizers[0]) == counters(optimizers[1]) == [10.0] * 3


def test_a_closure_and_a_second_group_of_parameters_are_left_to_torch():
    groups, *optimizers = pair()
    extra = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for step in range(6):
        if step == 3:
            for optimizer, more in zip(optimizers, extra, strict=True):
                optimizer.add_param_group({"params": [more], "lr": 0.5})
        give_gradients((groups[0] + extra[:1], groups[1] + extra[1:]), step)
        for optimizer in optimizers:
            assert optimizer.step(lambda: 1.5) == 1.5 if step == 1 else optimizer.step() is None
    assert same(groups)
    assert torch.equal(*extra)

"""Schedules arrive, their values reach every step (captured or not), and nobody stops before they have arrived."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from small_programs import Amortised, guide_of_mean, model_of_mean, rows, same_state, state_of

import pyro_lvm as lvm
from pyro_lvm import schedules
from pyro_lvm.errors import ProgramError
from pyro_lvm.schedules import Scheduled


def scheduled(value):
    return Scheduled(value, "beta", lambda beta: beta >= 0, "0 or more")


def test_linear_is_the_line():
    rise = schedules.linear(2.0, -1.0, until=0.25)
    assert [rise(t) for t in (0.0, 0.125, 0.25, 0.7, 1.0)] == [2.0, 0.5, -1.0, -1.0, -1.0]


def test_exponential_has_one_factor():
    cooling = schedules.exponential(4.0, 0.25, until=0.5)
    values = [cooling(t) for t in (0.0, 0.125, 0.25, 0.375, 0.5, 0.9)]
    assert values == pytest.approx([4.0, 2.0, 1.0, 0.5, 0.25, 0.25])


def test_cycles_rise_and_stay_and_the_last_step_is_at_the_end():
    weight = schedules.cyclic(0.0, 3.0, cycles=4, rising=0.8)
    for cycle in range(4):
        start = cycle / 4
        assert [weight(start), weight(start + 0.1), weight(start + 0.225)] == pytest.approx([0.0, 1.5, 3.0])
    assert weight(1.0) == 3.0


@pytest.mark.parametrize("until", [0.0, -0.5, 1.5, math.nan])
def test_a_schedule_that_would_never_arrive_is_refused(until):
    for make in (schedules.linear, schedules.exponential):
        with pytest.raises(ValueError, match=r"until is .*fraction at which the schedule arrives.*until=0\.5"):
            make(1.0, 2.0, until=until)
    with pytest.raises(ValueError, match="rising is"):
        schedules.cyclic(0.0, 1.0, rising=until)


def test_other_arguments_out_of_range():
    with pytest.raises(ValueError, match="cycles is 0"):
        schedules.cyclic(0.0, 1.0, cycles=0)
    for ends in ((0.0, 1.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="no constant factor"):
            schedules.exponential(*ends)


def test_a_value_is_looked_at_before_training():
    with pytest.raises(TypeError, match="beta is 'warm': it must be a number"):
        scheduled("warm")
    with pytest.raises(ValueError, match=r"beta is -1: it must be 0 or more"):
        scheduled(-1)
    with pytest.raises(ValueError, match=r"beta is nan"):
        scheduled(math.nan)
    with pytest.raises(ValueError, match=r"beta is -2 at 1 of training: it must be 0 or more"):
        scheduled(lambda t: -2.0 if t == 1 else 1.0)
    with pytest.raises(ValueError, match=r"beta is inf at 0\.5 of training"):
        scheduled(lambda t: math.inf if t == 0.5 else 1.0)


def test_a_number_needs_no_telling_and_a_schedule_does():
    assert scheduled(2).now().item() == 2.0
    told = scheduled(schedules.linear(0.0, 1.0))
    with pytest.raises(ProgramError, match=r"beta is a schedule.*elbo\.advance\(step / total_steps\)"):
        told.now()
    told.advance(0.25)
    assert told.now().item() == 0.25
    assert told.now() is told.tensor  # one tensor, updated in place: captured graphs read it


def test_a_fresh_one_shares_nothing():
    first = scheduled(schedules.linear(0.0, 1.0))
    first.advance(0.5)
    second = first.fresh()
    second.advance(1.0)
    assert (first.now().item(), second.now().item()) == (0.5, 1.0)
    with pytest.raises(ProgramError):
        first.fresh().now()


def test_what_it_looks_like():
    made = [schedules.linear(0, 1, 0.5), schedules.exponential(1, 0.5), schedules.cyclic(0, 1), math.cos, 0.25]
    shown = ["linear(0, 1, until=0.5)", "exponential(1, 0.5, until=1)", "cyclic(0, 1, cycles=4, rising=0.5)"]
    assert [repr(scheduled(each)) for each in made] == [*shown, "cos", "0.25"]


@pytest.mark.parametrize(
    ("value", "arrival"),
    [
        (3.0, 0.0),
        (schedules.linear(0, 1, until=0.3), 0.3),
        (schedules.linear(0, 1), 1.0),
        (schedules.exponential(1, 0.5, until=0.75), 0.75),
        (schedules.cyclic(0, 1, cycles=4, rising=0.5), 0.875),
        (lambda t: 0.0 if t < 0.2 else 1.0, 0.2),
        (schedules.linear(1.0, 1.0), 0.0),
    ],
)
def test_arrival_is_where_the_value_stops_moving(value, arrival):
    assert scheduled(value).arrival() == pytest.approx(arrival, abs=1.01e-3)
    assert scheduled(value).arrival() >= arrival - 1e-12  # never said too early


# --- in a fit


def fitted(beta, capture=False, seen=None, **options):
    torch.manual_seed(3)
    program = Amortised()
    options = {"steps": 30, "batch_size": 16, "lr": 0.02, "seed": 1, "progress": False} | options
    fit = lvm.fit(program, rows(), elbo=lvm.elbo.KLWeighted(beta=beta), capture=capture, **options)
    return fit, program


def test_a_fit_tells_progress_from_nought_to_one():
    told = []

    def remember(progress):
        told.append(progress)
        return 1.0

    elbo = lvm.elbo.KLWeighted(beta=remember)
    told.clear()
    lvm.fit(Amortised(), rows(), elbo=elbo, steps=11, lr=0.01, seed=0)
    assert told[-11:] == pytest.approx([step / 10 for step in range(11)])


def test_a_captured_fit_follows_the_schedule_to_the_bit():
    warm_up = schedules.linear(0.0, 4.0, until=0.8)
    eager, program = fitted(warm_up)
    captured, other = fitted(warm_up, "graph")
    assert captured.info["capture"] == "graph", captured.info["capture_reason"]
    assert same_state(other, state_of(program))
    assert eager.history == captured.history
    _, constant = fitted(4.0)
    assert not same_state(constant, state_of(program))  # the weight does something


def test_each_step_has_the_weight_of_its_time():
    weights = [0.0, 1.0, 7.0, 2.0]
    fit, _ = fitted(lambda t: weights[round(3 * t)], steps=4, batch_size=None)
    history = fit.history
    beta = [
        (-loss / 40 - recon) / -kl
        for loss, recon, kl in zip(history["loss"], history["reconstruction"]["x"], history["kl"]["z"], strict=True)
    ]
    assert beta == pytest.approx(weights, abs=1e-12)


def test_an_estimator_is_used_twice_and_stays_as_it_was():
    elbo = lvm.elbo.KLWeighted(beta=schedules.linear(0.0, 1.0))
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        ends.append(lvm.fit(Amortised(), rows(), elbo=elbo, steps=10, lr=0.01, seed=0).history)
    assert ends[0] == ends[1]
    with pytest.raises(ProgramError):
        elbo.beta.now()


def test_plain_svi_is_told_by_its_user():
    x = rows(columns=1)[:, 0]
    elbo = lvm.elbo.KLWeighted(beta=schedules.linear(0.0, 1.0))
    with pyro.get_param_store().scope():
        svi = pyro.infer.SVI(model_of_mean, guide_of_mean, pyro.optim.SGD({"lr": 1e-4}), elbo)
        with pytest.raises(ProgramError, match="nobody said how far training is"):
            svi.step(x)
        losses = []
        for step in range(3):
            elbo.advance(step / 2)
            pyro.set_rng_seed(0)
            losses.append(svi.evaluate_loss(x))
    # KL(N(0, 1) || N(0, 10)), the same every time, costs half more with every step
    kl = 0.5 * (0.01 - 1 - math.log(0.01))
    assert [losses[1] - losses[0], losses[2] - losses[1]] == pytest.approx([kl / 2, kl / 2], rel=1e-5)


# --- early stopping


def test_early_stopping_waits_until_the_schedule_has_arrived():
    flat = lvm.EarlyStopping(patience=5, min_delta=1e6)  # would stop as soon as it may
    options = {"steps": None, "epochs": 40, "batch_size": None, "early_stopping": flat}
    at_once, _ = fitted(1.0, **options)
    assert at_once.info["stopped"] == "early stopping after 5 epochs"
    late, _ = fitted(schedules.linear(0.0, 1.0, until=0.5), **options)
    # steps 0..39; at step 20 progress is 20 / 39, the first beyond a half: 20 epochs, and 5 more to look at
    assert late.info["stopped"] == "early stopping after 25 epochs"


def test_early_stopping_is_refused_where_the_schedule_arrives_with_the_last_step():
    program = Amortised()
    before = state_of(program)
    elbo = lvm.elbo.KLWeighted(beta=schedules.linear(0.0, 1.0))
    with pytest.raises(ValueError, match=r"waits until KLWeighted\(.*linear\(0, 1, until=1\)\).*until=0\.5"):
        lvm.fit(program, rows(), elbo=elbo, epochs=40, early_stopping=True, seed=0)
    assert same_state(program, before)

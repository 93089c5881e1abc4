"""A fit: right numbers, reproducible, continued, alone with its parameters, and usable however it ends."""

from __future__ import annotations

import copy
import re

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
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

import pyro_lvm as lvm


def params_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_fit_takes_the_steps_that_adam_by_hand_takes():
    x = data(37)
    fit = lvm.fit((mixture, nothing), x, steps=60, lr=0.05, seed=0)
    start = np.array([float(torch.tensor(0.3)), -1.0, 2.0])  # the program writes 0.3 in float32
    losses, theta = oracles.adam_on_two_normals(x.numpy(), start, 0.05, 60)
    np.testing.assert_allclose(np.array(fit.history["loss"]) / 37, losses, rtol=0, atol=1e-10)
    np.testing.assert_allclose(fit.params["logit"].item(), theta[0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(fit.params["locs"].numpy(), theta[1:], rtol=0, atol=1e-10)
    final, _ = oracles.two_normals(x.numpy(), theta[0], theta[1:])
    assert fit.elbo == pytest.approx(-final, abs=1e-10)
    assert (fit.info["elbo_se"], fit.info["elbo_passes"]) == (0.0, 1)


def test_the_same_with_an_svi_loop_by_hand():
    """Trace_ELBO's noise is the fit's own stream: the loop by hand, started there, sees the same losses."""
    x = data(20)
    fit = lvm.fit((model_of_mean, guide_of_mean), x, elbo=Trace_ELBO(), steps=10, lr=0.02, seed=5)
    seeds = torch.randint(2**31, (4,), generator=torch.Generator().manual_seed(5))
    with pyro.get_param_store().scope() as store:
        pyro.param("scale", torch.tensor(1.5, dtype=x.dtype), constraint=dist.constraints.positive)
        pyro.param("m", torch.tensor(0.0, dtype=x.dtype))
        pyro.param("s", torch.tensor(1.0, dtype=x.dtype), constraint=dist.constraints.positive)
        parameters = [value for _, value in pyro.get_param_store().named_parameters()]
        adam = torch.optim.Adam(parameters, lr=0.02)
        torch.manual_seed(int(seeds[2]))
        losses = []
        for _ in range(10):
            adam.zero_grad()
            loss = Trace_ELBO().differentiable_loss(model_of_mean, guide_of_mean, x)
            (loss / len(x)).backward()
            adam.step()
            losses.append(loss.item())
    assert store
    torch.testing.assert_close(torch.tensor(fit.history["loss"]), torch.tensor(losses), rtol=1e-6, atol=1e-6)


def test_history_holds_the_bound_and_its_parts():
    x = rows(30)
    fit = lvm.fit(
        Amortised(), x, epochs=4, batch_size=8, seed=0, validation=rows(7, seed=1), elbo=TraceMeanField_ELBO()
    )
    history = fit.history
    assert history.keys() == {"loss", "elbo", "reconstruction", "kl", "validation_elbo"}
    assert (list(history["reconstruction"]), list(history["kl"])) == (["x"], ["z"])
    columns = [history["loss"], history["elbo"], history["validation_elbo"], history["kl"]["z"]]
    assert [len(column) for column in columns] == [4] * 4
    for epoch in range(4):
        difference = history["reconstruction"]["x"][epoch] - history["kl"]["z"][epoch]
        assert history["elbo"][epoch] == pytest.approx(difference, abs=1e-6)
        assert history["loss"][epoch] == pytest.approx(-30 * history["elbo"][epoch], abs=1e-6)
    assert (fit.info["epochs"], fit.info["steps"], fit.info["n"]) == (4, 16, 30)


def test_an_epoch_cut_short_is_the_mean_of_what_was_seen():
    x = torch.zeros(40, dtype=torch.float64)  # every batch has the same loss per datum
    fit = lvm.fit((mixture, nothing), x, steps=5, batch_size=10, lr=1e-12, seed=0)
    assert fit.info["steps"] == 5
    assert fit.info["epochs"] == 2
    assert fit.history["elbo"][1] == pytest.approx(fit.history["elbo"][0], abs=1e-9)
    assert fit.elbo == pytest.approx(fit.history["elbo"][0], abs=1e-9)


def test_a_loader_that_drops_rows_gives_means_of_what_it_gives():
    x = torch.zeros(11, dtype=torch.float64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4, drop_last=True)
    fit = lvm.fit((mixture, nothing), loader, epochs=1, lr=1e-12, seed=0)
    full = lvm.fit((mixture, nothing), x, epochs=1, lr=1e-12, seed=0)
    assert fit.history["elbo"][0] == pytest.approx(full.history["elbo"][0], abs=1e-9)
    assert fit.elbo == pytest.approx(full.elbo, abs=1e-9)


def test_the_bound_is_below_the_evidence_and_close():
    x = data(30)
    fit = lvm.fit((model_of_mean, guide_of_mean), x, steps=600, lr=0.05, seed=0)
    evidence = oracles.normal_normal_evidence(x.numpy(), 10.0, fit.params["scale"].item()) / 30
    assert fit.info["elbo_se"] <= 0.01
    assert -0.05 < fit.elbo - evidence < 4 * fit.info["elbo_se"] + 1e-4


def test_one_seed_one_history_to_the_bit():
    x = rows(25)

    def run(seed):
        torch.manual_seed(7)  # the module's own start
        return lvm.fit(Amortised(), x, epochs=3, batch_size=10, seed=seed)

    first, same, other = run(3), run(3), run(4)
    assert first.history == same.history
    assert params_equal(first.params, same.params)
    assert first.elbo == same.elbo
    assert first.history != other.history
    torch.manual_seed(7)
    fresh = lvm.fit(Amortised(), x, epochs=3, batch_size=10)
    again = run(fresh.info["seed"])
    assert isinstance(fresh.info["seed"], int)
    assert again.history == fresh.history


def test_who_looks_on_changes_no_weight(capsys):
    x = rows(25)

    def run(**looking):
        torch.manual_seed(7)
        return lvm.fit(Amortised(), x, epochs=6, batch_size=10, seed=3, **looking)

    def draws(end):
        torch.randn(5)
        pyro.param("mine", torch.zeros(1))

    alone = run()
    ends = []
    watched = run(
        validation=rows(9, seed=8),
        callbacks=iter([draws, lambda end: ends.append((end.epoch, len(end.history["elbo"]), type(end.program)))]),
        progress=True,
        early_stopping=lvm.EarlyStopping(min_delta=1e-12),
    )
    assert params_equal(alone.params, watched.params)
    assert alone.history["loss"] == watched.history["loss"]
    assert ends == [(i, i, Amortised) for i in range(1, 7)]
    shown = capsys.readouterr().err
    assert "nats/datum" in shown
    assert "validation" in shown
    run()
    assert capsys.readouterr().err == ""  # silent off a terminal


def test_modules_are_trained_in_place_and_the_record_is_a_clone():
    module, x = Amortised().double(), rows()
    weight = module.encoder.weight
    fit = lvm.fit(module, x, steps=5, seed=0)
    assert fit.program is module
    assert module.encoder.weight is weight
    assert torch.equal(fit.params["encoder.weight"], weight)
    with torch.no_grad():
        weight.fill_(0.0)
    assert fit.params["encoder.weight"].any()
    assert weight.grad is None
    assert module.training


class Resettable(Amortised):
    def reset_parameters(self):
        self.encoder.reset_parameters()
        self.decoder.reset_parameters()
        nn.init.zeros_(self.log_scale)


def test_a_second_fit_continues_and_leaves_the_first_untouched():
    module, x = Resettable(), rows()
    first = lvm.fit(module, x, steps=30, lr=0.02, seed=0)
    kept = {name: value.clone() for name, value in first.params.items()}
    drawn = first.posterior(x, num_draws=3, seed=1)["z"]
    evidence = first.log_prob(x, num_samples=10, seed=2)
    second = lvm.fit(module, x, steps=30, lr=0.02, seed=1)
    assert second.history["elbo"][0] > first.history["elbo"][0] + 0.05
    assert params_equal(first.params, kept)
    live = state_of(module)
    with process_left_alone():
        assert torch.equal(first.posterior(x, num_draws=3, seed=1)["z"], drawn)
        assert torch.equal(first.log_prob(x, num_samples=10, seed=2), evidence)
        first.to_arviz(x, num_draws=2, num_samples=2, seed=0)
    assert same_state(module, live)
    again = lvm.fit(module, x, steps=1, lr=1e-9, seed=0, fresh=True)
    assert again.history["elbo"][0] < second.history["elbo"][-1]


def test_the_first_fit_outlives_a_change_of_dtype():
    module, x = Amortised(), rows(dtype=torch.float32)
    first = lvm.fit(module, x, steps=3, seed=0)
    drawn = first.posterior(x, num_draws=3, seed=1)["z"]
    second = lvm.fit(module, x.double(), steps=3, seed=0)
    assert second.info["cast"] == "parameters torch.float32 -> torch.float64"
    assert second.info["dtype"] == "torch.float64"
    assert torch.equal(first.posterior(x, num_draws=3, seed=1)["z"], drawn)
    assert torch.equal(first.posterior(x.double(), num_draws=3, seed=1)["z"], drawn)
    assert module.encoder.weight.dtype is torch.float64


def test_fresh_initialises_what_functions_register_too():
    net = nn.Linear(3, 2)

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(pyro.module("net", net)(x).sum(-1), 1.0), obs=x[:, 0])

    x = rows()
    first = lvm.fit((model, nothing), x, steps=3, lr=0.5, seed=0, fresh=True)
    again = lvm.fit((model, nothing), x, steps=3, lr=0.5, seed=0, fresh=True)
    assert params_equal(first.params, again.params)
    assert not params_equal(first.params, lvm.fit((model, nothing), x, steps=3, lr=0.5, seed=0).params)


def test_an_autoguide_of_ones_own_is_used_and_continued():
    x = data(300)  # more rows than a trace of a program with `size` would otherwise look at

    def local(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(local)
    with process_left_alone():
        fit = lvm.fit((local, guide), x, steps=30, lr=0.05, seed=0)
    assert guide.locs.z.shape == (300,)
    torch.testing.assert_close(fit.params["guide.locs.z"], guide.locs.z.detach())
    before = guide.locs.z.detach().clone()
    lvm.fit((local, guide), x, steps=100, lr=0.05, seed=0)
    assert not torch.equal(guide.locs.z, before)
    torch.testing.assert_close(guide.locs.z.detach(), x / 2, rtol=0, atol=0.5)


def test_keyboard_interrupt_leaves_a_usable_fit():
    def stop(end):
        if end.epoch == 3:
            raise KeyboardInterrupt

    module, x = Amortised(), rows()
    with process_left_alone():
        fit = lvm.fit(module, x, epochs=50, batch_size=20, seed=0, callbacks=[stop], validation=rows(5))
    assert fit.info["stopped"] == "interrupted after 3 epochs"
    assert (fit.info["epochs"], fit.info["steps"]) == (3, 6)
    assert len(fit.history["elbo"]) == len(fit.history["validation_elbo"]) == 3
    assert fit.posterior(x, num_draws=2, seed=0)["z"].shape == (2, 40, 2)
    assert module.training


def test_an_interrupt_in_the_middle_of_an_epoch_or_of_the_last_evaluation():
    calls = []

    class Interrupting(Amortised):
        def model(self, x, size=None):
            calls.append(len(x))
            if len(calls) == self.at:
                raise KeyboardInterrupt
            return super().model(x, size)

    module = Interrupting()
    module.at = 8
    fit = lvm.fit(module, rows(), epochs=50, batch_size=20, seed=0, validation=rows(5))
    assert fit.info["stopped"].startswith("interrupted after")
    assert len(fit.history["loss"]) == len(fit.history["validation_elbo"]) == fit.info["epochs"]
    last = Interrupting()
    last.at, calls[:] = -1, []
    lvm.fit(last, rows(), steps=1, seed=0)
    last.at, calls[:] = 5, []
    assert lvm.fit(last, rows(), steps=1, seed=0).info["elbo_passes"] >= 1


@pytest.mark.parametrize("error", [RuntimeError("no memory:\nmany lines"), OSError("gone"), KeyboardInterrupt()])
def test_an_evaluation_that_fails_costs_no_trained_parameters(tmp_path, error):
    class Failing(Amortised):
        def model(self, x, size=None):
            if not torch.is_grad_enabled() and self.trained:
                raise error
            return super().model(x, size)

    def note(end):
        module.trained = True

    module = Failing()
    module.trained = False
    other = copy.deepcopy(module)
    told = re.escape((str(error).splitlines() or ["KeyboardInterrupt"])[0])
    with pytest.warns(lvm.ProgramWarning, match=rf"is trained.*fit\.elbo is nan: {type(error).__name__}: {told}\. Ask"):
        fit = lvm.fit(module, rows(), epochs=2, batch_size=20, seed=0, callbacks=[note])
    assert np.isnan(fit.elbo)
    assert np.isnan(fit.info["elbo_se"])
    assert fit.info["elbo_passes"] == 0
    assert params_equal(fit.params, lvm.fit(other, rows(), epochs=2, batch_size=20, seed=0).params)
    module.trained = False
    assert lvm.log_evidence(fit, rows(), 10, seed=0).isfinite().all()
    fit.save(tmp_path / "fit")
    assert np.isnan(lvm.load(tmp_path / "fit", program=module).elbo)


def test_a_callback_that_raises_is_not_swallowed():
    def broken(end):
        raise ZeroDivisionError

    with process_left_alone(), pytest.raises(ZeroDivisionError):
        lvm.fit((mixture, nothing), data(), epochs=3, callbacks=[broken])
    assert lvm.fit((mixture, nothing), data(), epochs=9, callbacks=[lambda end: end.epoch == 2]).info["epochs"] == 2


class Exploding(nn.Module):
    """The likelihood's scale falls through nought when the parameter has moved far enough."""

    def __init__(self, bad=lambda self, x: torch.where(self.loc > 0.5, torch.nan, 1.0)):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
        self.bad = bad

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(self.loc * self.bad(self, x), 1.0), obs=x)

    def guide(self, x, size=None):
        """Nothing is latent."""


@pytest.mark.parametrize("watch", [{}, {"callbacks": [lambda end: None]}])
def test_a_loss_that_is_no_number_stops_the_fit_and_gives_the_last_parameters_back(watch):
    module = Exploding()
    with process_left_alone(), pytest.raises(lvm.NonFiniteError, match=r"step 7: loss became NaN.*smaller rate \(lr="):
        lvm.fit(module, data() + 3, steps=200, lr=0.1, seed=0, **watch)
    assert torch.isfinite(module.loc)
    assert module.training
    if watch:
        assert module.loc.item() > 0.4


def test_a_gradient_that_is_no_number_is_seen_though_the_loss_is_finite():
    """sqrt(0) has a value and no slope: the step would leave NaN where nobody looks."""
    module = Exploding(lambda self, x: 1.0 + torch.sqrt(torch.zeros_like(self.loc) * self.loc))
    with pytest.raises(lvm.NonFiniteError, match="step 1: the gradient of parameter loc became NaN"):
        lvm.fit(module, data(), steps=1, seed=0)
    assert module.loc.item() == 0.0


def test_a_parameter_that_turns_up_late_is_refused():
    calls = []

    def model(x, size=None):
        calls.append(0)
        loc = pyro.param("loc", torch.tensor(0.0))
        if len(calls) > 3:
            loc = loc + pyro.param("late", torch.tensor(0.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(lvm.ProgramError, match="late turned up after the first step and would never be trained"):
        lvm.fit((model, nothing), data(), steps=5, seed=0)

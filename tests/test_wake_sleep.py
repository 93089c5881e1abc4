"""Wake-sleep: a guide that covers, dreams that take the data's place, weights for every datum."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from draws_of_gradients import NOISE, NORMAL, off, prepared, repeated
from oracles import posterior_moments, slopes
from pyro.infer import SVI, Trace_ELBO
from small_programs import Amortised, data, guide_of_mean, model_of_mean, rows
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.elbo import WakeSleep
from pyro_lvm.parameters import isolated


class TwoModes(nn.Module):
    """z ~ N(0, 1), x ~ N(z^2, 0.3): z and -z are as likely. The guide is one Normal for all rows."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(-0.5))

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.3), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))


class Linear(nn.Module):
    """z ~ N(0, 1), x ~ N(w z, NOISE), q = N(a x + b, exp(log_scale)); every row has parameters of its own."""

    def __init__(self, n, a, b, log_scale):
        super().__init__()
        self.a, self.b, self.log_scale = repeated(a, n), repeated(b, n), repeated(log_scale, n)

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(NORMAL["w"] * z, NOISE), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(self.a * x + self.b, self.log_scale.exp()))


def gradients(elbo, program, *batch, size=None):
    with isolated(0, validate=False):
        estimator, bound, rows = prepared(elbo, program, *batch, size=size)
        program.zero_grad()
        loss, terms = estimator.step(bound, rows, list(program.parameters()), None, 1)
    return {name: p.grad for name, p in program.named_parameters()}, loss, terms


def test_exclusive_takes_one_mode_and_inclusive_both():
    x = torch.full((50,), 2.0)
    mean, sd = posterior_moments(lambda z: -0.5 * z**2 - 0.5 * (2.0 - z**2) ** 2 / 0.09, -4, 4)
    assert (mean, sd) == (pytest.approx(0.0, abs=1e-9), pytest.approx(1.40, abs=0.02))
    exclusive = lvm.fit(TwoModes(), x, elbo=Trace_ELBO(), steps=600, lr=0.02, seed=0).params
    inclusive = lvm.fit(TwoModes(), x, elbo=WakeSleep(100, 1.0, 0.0), steps=400, lr=0.02, seed=0).params
    assert abs(exclusive["loc"].item()) == pytest.approx(1.4, abs=0.1)
    assert exclusive["log_scale"].exp() < 0.2
    assert inclusive["loc"].item() == pytest.approx(mean, abs=0.15)
    assert inclusive["log_scale"].exp().item() == pytest.approx(sd, abs=0.15)


def test_sleep_is_unbiased_for_the_inclusive_divergence_over_dreams():
    """E_{p(x, z)}[-log q(z | x)] of a linear guide is a quadratic form."""
    at = {"a": 0.9, "b": -0.2, "log_scale": -0.3}
    w = NORMAL["w"]

    def expected(a, b, log_scale):
        square = (1 - a * w) ** 2 + (a * NOISE) ** 2 + b**2
        return log_scale + 0.5 * square * float(np.exp(-2 * log_scale))

    found, _, _ = gradients(WakeSleep(1, 0.0, 1.0), Linear(20_000, **at), torch.zeros(20_000).double())
    for name, right in slopes(expected, at).items():
        assert off(found[name], right) < 4
    # what comes of a guide that sees the data instead of the dreams is caught
    blind = slopes(lambda **q: expected(**{**q, "a": 0.0 * q["a"]}), at)
    assert off(found["log_scale"], blind["log_scale"]) > 4


def test_sleep_stands_still_at_the_exact_posterior():
    precision = 1 + NORMAL["w"] ** 2 / NOISE**2
    exact = {"a": NORMAL["w"] / NOISE**2 / precision, "b": 0.0, "log_scale": -0.5 * float(np.log(precision))}
    found, _, _ = gradients(WakeSleep(1, 0.0, 1.0), Linear(20_000, **exact), torch.zeros(20_000).double())
    assert all(off(gradient, 0.0) < 4 for gradient in found.values())


def test_with_the_exact_posterior_all_weights_are_equal_and_the_loss_is_the_evidence():
    precision = 1 + NORMAL["w"] ** 2 / NOISE**2
    exact = {"a": NORMAL["w"] / NOISE**2 / precision, "b": 0.0, "log_scale": -0.5 * float(np.log(precision))}
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)
    evidence = dist.Normal(torch.zeros(()).double(), (NORMAL["w"] ** 2 + NOISE**2) ** 0.5).log_prob(x).sum()
    for vectorize in (True, False):
        elbo = WakeSleep(3, 1.0, 0.0, vectorize_particles=vectorize)
        _, loss, terms = gradients(elbo, Linear(7, **exact), x)
        assert loss.item() == pytest.approx(-evidence.item(), abs=1e-10)
        assert terms.elbo.item() == pytest.approx(evidence.item(), abs=1e-10)


def test_no_phase_reaches_parameters_that_are_not_its_own():
    x = rows(dtype=torch.float64)
    program = Amortised().double()
    of_guide = {"encoder.weight", "encoder.bias", "log_scale"}
    sleeping, _, _ = gradients(WakeSleep(2, 0.0, 1.0), program, x)
    assert all(gradient is not None for gradient in sleeping.values())
    waking, _, _ = gradients(WakeSleep(2, 1.0, 0.0), program, x)
    both, _, _ = gradients(WakeSleep(2, 1.0, 0.0), program, x)
    assert all(torch.equal(waking[name], both[name]) for name in of_guide)
    elbo = WakeSleep(2, 2.0, 0.0)
    twice, _, _ = gradients(elbo, program, x)
    for name in twice:  # the weight of wake-phi is the guide's alone
        factor = 2.0 if name in of_guide else 1.0
        assert torch.allclose(twice[name], factor * waking[name])


def test_a_minibatch_is_scaled_to_all_rows():
    x = rows(dtype=torch.float64)
    program = Amortised().double()
    part, loss, _ = gradients(WakeSleep(3, 1.0, 1.0), program, x[:10])
    part = {name: gradient.clone() for name, gradient in part.items()}
    scaled, scaled_loss, _ = gradients(WakeSleep(3, 1.0, 1.0), program, x[:10], size=40)
    assert scaled_loss.item() == pytest.approx(4 * loss.item(), rel=1e-12)
    assert all(torch.allclose(scaled[name], 4 * part[name], rtol=1e-10) for name in part)


def test_discrete_latents_need_no_path():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("x", dist.Normal(torch.tensor([-2.0, 0.0, 2.0])[y], 1.0), obs=x)

    def guide(x, size=None):
        weights, bias = pyro.param("weights", torch.zeros(3)), pyro.param("bias", torch.zeros(3))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("y", dist.Categorical(logits=x[:, None] * weights + bias))

    x = torch.linspace(-3, 3, 60)
    fit = lvm.fit((model, guide), x, elbo=WakeSleep(5), steps=800, lr=0.02, seed=0)
    # the exact posterior is in the guide's family: its log-odds are linear in x with slope 2
    weights, bias = fit.params["weights"], fit.params["bias"]
    assert (weights[2] - weights[1]).item() == pytest.approx(2.0, abs=0.3)
    assert (weights[1] - weights[0]).item() == pytest.approx(2.0, abs=0.3)
    right = np.log([0.2, 0.3, 0.5]) + np.array([-2.0, 0.0, -2.0])
    assert (bias[2] - bias[1]).item() == pytest.approx(right[2] - right[1], abs=0.4)


def test_dreams_take_the_place_of_the_argument_they_are_dreams_of():
    """Of two arguments one is a covariate: it stays; the other may be given by name."""
    seen = []

    def model(t, y, size=None):
        with pyro.plate("data", size or len(t), subsample=t):
            z = pyro.sample("z", dist.Normal(t, 1.0))
            pyro.sample("y", dist.Normal(z + 100.0, 0.1), obs=y)

    def guide(t, y, size=None):
        seen.append((t.detach(), y.detach()))
        m = pyro.param("m", torch.tensor(0.5))
        with pyro.plate("data", size or len(t), subsample=t):
            pyro.sample("z", dist.Normal(m * y, 1.0))

    t, y = torch.arange(5.0), torch.linspace(-1.0, 1.0, 5)
    for given in ((t, y), {"t": t, "y": y}):
        seen.clear()
        lvm.fit((model, guide), given, elbo=WakeSleep(2), steps=3, lr=0.01, seed=0, capture=False)
        assert all(torch.equal(of_t, t) for of_t, _ in seen)
        assert any(of_y.min() > 90 for _, of_y in seen)
        assert any(torch.equal(of_y, y) for _, of_y in seen)


@pytest.mark.parametrize("elbo", [WakeSleep(3), WakeSleep(1, 0.0, 1.0), WakeSleep(3, 1.0, 0.0)], ids=repr)
def test_captured_steps_train_to_the_same_bits(elbo):
    def trained(capture):
        torch.manual_seed(0)
        fit = lvm.fit(Amortised(), rows(), elbo=elbo, steps=30, batch_size=20, lr=0.01, seed=0, capture=capture)
        assert fit.info["capture"] == (capture or "eager")
        return fit.params

    captured, eager = trained("graph"), trained(False)
    assert all(torch.equal(captured[name], eager[name]) for name in eager)


def test_it_trains_in_plain_svi():
    program = Amortised()
    x = rows(dtype=torch.float32)

    def model(x):
        pyro.module("program", program)
        program.model(x)

    def guide(x):
        program.guide(x)

    with pyro.get_param_store().scope():
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), WakeSleep(5))
        losses = [svi.step(x) for _ in range(150)]
    assert sum(losses[-10:]) < sum(losses[:10])


# --- refusals ------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="num_particles is 0"):
        WakeSleep(0)
    with pytest.raises(ValueError, match=r"sleep is -1\.0: it must be 0 or more"):
        WakeSleep(2, 1.0, -1.0)
    with pytest.raises(ValueError, match="both 0: nothing would train the guide"):
        WakeSleep(2, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"the guide would learn itself: use at least 2, or wake_phi=0"):
        WakeSleep(1)


def test_a_weight_of_all_data_together_is_refused_in_minibatches_and_right_without():
    x = data(dtype=torch.float64)
    with pytest.raises(lvm.ProgramError, match=r"'loc' is outside plate 'data', .* fit with batch_size=None"):
        lvm.fit((model_of_mean, guide_of_mean), x, elbo=WakeSleep(5, 1.0, 0.0), steps=1, batch_size=10)
    fit = lvm.fit((model_of_mean, guide_of_mean), x, elbo=WakeSleep(50, 1.0, 0.0), steps=400, lr=0.02, seed=0)
    assert fit.params["m"].item() == pytest.approx(x.mean().item(), abs=0.1)


def test_a_guide_that_does_not_look_at_the_data_may_not_dream():
    with pytest.raises(lvm.ProgramError, match=r"same density whatever the data are.*use sleep=0"):
        lvm.fit(TwoModes(), torch.full((5,), 2.0), elbo=WakeSleep(2), steps=1)


def test_an_observation_that_is_no_argument_may_not_be_dreamt():
    class Halved(Amortised):
        def model(self, x, size=None):
            super().model(x / 2, size)

    with pytest.raises(lvm.ProgramError, match=r"'x' observes a value of shape \(40, 3\) that is none of the data"):
        lvm.fit(Halved(), rows(), elbo=WakeSleep(2), steps=1)


def test_two_sites_that_observe_one_argument_may_not_dream():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=x)
            pyro.sample("b", dist.Normal(z, 2.0), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(x * pyro.param("a", torch.tensor(0.5)), 1.0))

    with pytest.raises(lvm.ProgramError, match=r"'a', 'b' observe one and the same argument"):
        lvm.fit((model, guide), data(), elbo=WakeSleep(2), steps=1)


def test_auxiliary_sites_of_the_guide_are_refused():
    def guide(x, size=None):
        m = pyro.param("m", torch.tensor(0.0))
        pyro.sample("noise", dist.Normal(m, 1.0), infer={"is_auxiliary": True})
        pyro.sample("loc", dist.Normal(m, 1.0))

    with pytest.raises(lvm.ProgramError, match=r"'noise'.*: the model has no such site"):
        lvm.fit((model_of_mean, guide), data(), elbo=WakeSleep(2, 1.0, 0.0), steps=1)

"""What `fit` accepts and refuses: each refusal before anything has moved, with words that say how to mend it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
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
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm

OPTIONS = {
    "neither": ({}, ValueError, "either epochs=... or steps=...; neither was given"),
    "both": ({"epochs": 1, "steps": 1}, ValueError, "both was given"),
    "no epochs": ({"epochs": 0}, ValueError, "epochs is 0: it must be positive"),
    "no steps": ({"steps": -3}, ValueError, "steps is -3: it must be positive"),
    "half an epoch": ({"epochs": 0.5}, TypeError, "epochs is 0.5: it must be a whole number"),
    "no batch": ({"steps": 1, "batch_size": 0}, ValueError, "batch_size is 0: it must be positive"),
    "words": ({"steps": 1, "batch_size": "all"}, TypeError, "batch_size is 'all': it must be a whole number"),
    "guide's name": ({"steps": 1, "guide": "meanfield"}, ValueError, "guide='meanfield' is not known"),
    "no guide": ({"steps": 1, "guide": 5}, TypeError, "guide must be a callable"),
    "estimator": ({"steps": 1, "elbo": "trace"}, TypeError, "elbo must be a Pyro ELBO"),
    "one callback": ({"steps": 1, "callbacks": print}, TypeError, r"sequence of functions, such as \[function\]"),
    "no callback": ({"steps": 1, "callbacks": [5]}, TypeError, "functions of an EpochEnd; 5 cannot be called"),
    "validation columns": ({"steps": 1, "validation": rows(5, 4)}, ValueError, "validation does not fit the program"),
    "validation NaN": ({"steps": 1, "validation": rows(5) * torch.nan}, ValueError, "validation holds NaN"),
    "validation kind": ({"steps": 1, "validation": "x"}, TypeError, "validation is a str"),
    "validation arrays": ({"steps": 1, "validation": (rows(5), rows(5))}, TypeError, "data give 2 arguments"),
    "cannot reset": ({"steps": 1, "fresh": True}, ValueError, "cannot initialise log_scale of Hooked again"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options_are_refused_and_nothing_has_moved(name):
    options, kind, words = OPTIONS[name]
    module = Hooked()
    before = state_of(module)
    with process_left_alone(), pytest.raises(kind, match=words):
        lvm.fit(module, rows(), **options)
    assert same_state(module, before)
    assert module.training


def test_what_initialize_did_is_undone_when_a_later_check_fails():
    class Raising(Hooked):
        def initialize(self, x, *, seed):
            super().initialize(x, seed=seed)
            raise ValueError("more components than rows")

    for module, options in ((Raising(), {}), (Hooked(), {"optimizer": 5}), (Hooked(), {"guide": "map", "lr": -1.0})):
        before = state_of(module)
        with process_left_alone(), pytest.raises((ValueError, TypeError)):
            lvm.fit(module, rows(), steps=1, **options)
        assert same_state(module, before)


def test_a_reset_is_undone_when_a_later_check_fails():
    class Resettable(Amortised):
        def reset_parameters(self):
            nn.init.zeros_(self.encoder.weight)

    module = Resettable()
    before = state_of(module)
    with pytest.raises(ValueError, match="lr is -1"):
        lvm.fit(module, rows(), steps=1, fresh=True, lr=-1.0)
    assert same_state(module, before)


def test_networks_that_functions_register_are_as_they_were_after_an_error():
    net = nn.Linear(3, 1)

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(pyro.module("net", net)(x)[:, 0], 1.0), obs=x[:, 0])

    before = state_of(net)
    with pytest.raises(ValueError, match="lr is -1"):
        lvm.fit((model, nothing), rows(), steps=1, fresh=True, lr=-1.0)
    assert same_state(net, before)
    assert net.weight.dtype is torch.float32


def test_an_autoguide_that_an_error_left_half_made_can_be_used_again():
    guide, x = AutoNormal(model_of_mean), data()
    with pytest.raises(ValueError, match="lr is -1"):
        lvm.fit((model_of_mean, guide), x, steps=1, lr=-1.0)
    assert guide.prototype_trace is None
    assert list(guide.parameters()) == []
    assert lvm.fit((model_of_mean, guide), x, steps=2, seed=0).params["guide.locs.loc"].shape == ()


def test_an_error_of_the_check_is_not_hidden_by_the_autoguide_it_made():
    def local(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = AutoNormal(local), data()
    with pytest.raises(lvm.ProgramError, match=r"'data' draws rows of its own \(10 of 40\)"):
        lvm.fit((local, guide), x, epochs=1, batch_size=10)
    with pytest.raises(
        lvm.ProgramError, match=r"'z' has parameters for each datum.*knows nothing of the 20 rows of validation"
    ):
        lvm.fit((local, guide), x, epochs=1, validation=0.5)
    with pytest.raises(lvm.ProgramError, match="a DataLoader hides the row numbers"):
        lvm.fit((local, guide), DataLoader(TensorDataset(x), batch_size=10), epochs=1)
    followed = AutoNormal(local, create_plates=lambda x, size, index: pyro.plate("data", size, subsample=index))
    assert lvm.fit((local, followed), x, epochs=2, batch_size=10, seed=0).params["guide.locs.z"].shape == (40,)
    assert lvm.fit((local, guide), x, epochs=2, seed=0).params["guide.locs.z"].shape == (40,)


def test_parameters_by_row_know_nothing_of_validation_data():
    def model(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(size), event_dim=0), 1.0))

    with pytest.raises(lvm.ProgramError, match="'m' has a value for each of the 30 rows"):
        lvm.fit((model, guide), data(), epochs=1, validation=0.25)
    assert lvm.fit((model, guide), data(), epochs=1, seed=0).params["m"].shape == (40,)


def test_minibatches_need_the_size_in_model_and_guide():
    def no_size(x):
        with pyro.plate("data", len(x), subsample=x):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    words = r"10 rows at a time out of 40, but its signature does not name `size`"
    with pytest.raises(lvm.ProgramError, match=words):
        lvm.fit((no_size, lambda x: None), data(), epochs=1, batch_size=10)
    with pytest.raises(lvm.ProgramError, match="some rows at a time"):
        lvm.fit((no_size, lambda x: None), DataLoader(TensorDataset(data()), batch_size=10), epochs=1)
    assert lvm.fit((no_size, lambda x: None), data(), epochs=1, batch_size=40, seed=0).info["steps"] == 1

    class Unscaled(Amortised):
        def guide(self, x):
            super().guide(x)

    with pytest.raises(
        lvm.ProgramError, match=r"has size 10, but the data set has 40 rows.*in the signatures of model and guide"
    ):
        lvm.fit(Unscaled(), rows(), epochs=1, batch_size=10)


def test_a_program_without_a_parameter():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(lvm.ProgramError, match=r"has no parameter to train: declare one with pyro\.param"):
        lvm.fit((model, nothing), data(), epochs=1)


def test_dtypes_and_devices_are_those_of_the_data():
    module = Amortised()
    fit = lvm.fit(module, rows(), steps=1, seed=0, device="cpu")
    assert (fit.info["cast"], fit.info["dtype"], fit.info["device"]) == (
        "parameters torch.float32 -> torch.float64",
        "torch.float64",
        "cpu",
    )
    assert lvm.fit(module, rows(), steps=1, seed=0).info["cast"] is None
    assert lvm.fit(module, rows().numpy().astype("float32"), steps=1, seed=0).info["dtype"] == "torch.float32"
    assert lvm.fit((mixture, nothing), data(), steps=1, seed=0).params["logit"].dtype is torch.float64


def test_integer_data_leave_the_dtype_alone():
    def counts(x, size=None):
        rate = pyro.param("rate", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    fit = lvm.fit((counts, nothing), torch.arange(6), steps=200, lr=0.1, seed=0)
    assert fit.info["dtype"] == "None"
    assert fit.params["rate"].item() == pytest.approx(2.5, abs=0.01)


class Pulled(nn.Module):
    """Its auxiliary loss pulls the location to 100, and uses a parameter of its own."""

    def __init__(self, loss=None):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))
        self.loss = loss

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(self.loc, 1.0), obs=x)

    def guide(self, x, size=None):
        """Nothing is latent."""

    def auxiliary_loss(self, x, size=None):
        assert size == 40
        pull = pyro.param("pull", torch.tensor(0.5), constraint=dist.constraints.positive)
        return 10 * (self.loc - 100).square() + pull if self.loss is None else self.loss


def test_the_auxiliary_loss_is_optimised_and_never_in_the_bound():
    module, x = Pulled(), data()
    fit = lvm.fit(module, x, epochs=300, batch_size=20, lr=2.0, seed=0)
    best = (x.mean() + 20 * 100) / 21  # of (loc - mean)^2 / 2 + 10 (loc - 100)^2
    assert module.loc.item() == pytest.approx(best.item(), abs=0.5)
    assert fit.params["pull"].item() < 0.1
    log_likelihood = dist.Normal(module.loc, 1.0).log_prob(x).mean().item()
    assert fit.elbo == pytest.approx(log_likelihood, rel=1e-9)
    assert len(fit.history["auxiliary_loss"]) == 300
    assert fit.history["auxiliary_loss"][0] > 5e4
    assert fit.history["elbo"][0] == pytest.approx(-fit.history["loss"][0] / 40)


@pytest.mark.parametrize("loss", [1.0, torch.zeros(3)])
def test_an_auxiliary_loss_that_is_no_number(loss):
    with pytest.raises(lvm.ProgramError, match=r"auxiliary_loss must give one number, a tensor of shape \(\)"):
        lvm.fit(Pulled(loss), data(), steps=1)


def test_guides_in_a_word_and_what_the_record_says():
    x = data()
    assert lvm.fit(model_of_mean, x, steps=2, seed=0).info["guide"] == "mean_field"
    assert lvm.fit((model_of_mean, guide_of_mean), x, steps=2, seed=0).info["guide"] == "given"
    assert lvm.fit((model_of_mean, guide_of_mean), x, steps=2, seed=0, guide="map").info["guide"] == "map"
    fit = lvm.fit(model_of_mean, x, steps=2, seed=0, guide=AutoNormal, elbo=Trace_ELBO(num_particles=2))
    assert fit.info["guide"] == "AutoNormal"
    assert fit.info["estimator"] == "Trace_ELBO(num_particles=2)"
    assert (fit.info["estimator_reason"], fit.info["stopped"], fit.info["batch_size"]) == ("given", "finished", None)
    assert {"torch", "pyro-ppl", "pyro-lvm", "python"} == set(fit.info["versions"])


def test_a_split_holds_rows_out():
    fit = lvm.fit((mixture, nothing), data(), epochs=3, validation=0.25, seed=0)
    assert fit.info["n"] == 30
    assert len(fit.history["validation_elbo"]) == 3
    with process_left_alone():
        lvm.fit((mixture, nothing), data(), epochs=1, validation=data(5), check=False)

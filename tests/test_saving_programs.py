"""Programs of one's own on disk: they are handed in again, known again, and have their values where they are made."""

from __future__ import annotations

import pathlib
import re

import pyro
import pyro.distributions as dist
import pytest
import saved_programs
import torch
from saved_programs import NETS, deep, deep_guide
from small_programs import data, guide_of_mean, mixture, model_of_mean, nothing, rows, same_tensors
from torch import nn

import pyro_lvm as lvm

SAVED = pathlib.Path(__file__).parent / "saved"
TRAIN = {"steps": 4, "seed": 1}


class User(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.locs = nn.Parameter(torch.zeros(width))

    def model(self, x, size=None):
        loc = pyro.sample("loc", dist.Normal(self.locs.new_zeros(()), 3.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc + self.locs.sum(), 1.0), obs=x)


GIVEN = {
    "a pair": (lambda: (model_of_mean, guide_of_mean), {}),
    "a pair without a latent": (lambda: (mixture, nothing), {}),
    "a lone model": (lambda: model_of_mean, {}),
    "a lone model, full rank": (lambda: model_of_mean, {"guide": "full_rank"}),
    "an object": (User, {}),
    "pyro.module": (lambda: (deep, deep_guide), {}),
    "another guide, gaps": (lambda: (model_of_mean, guide_of_mean), {"missing": "marginalize"}),
}


@pytest.mark.parametrize("name", GIVEN)
def test_programs_that_are_handed_in_again(name, tmp_path):
    make, options = GIVEN[name]
    NETS["live"] = nn.Linear(1, 1)
    x = data()
    if "missing" in options:
        x[3] = torch.nan
    fit = lvm.fit(make(), x, **TRAIN, **options)
    posterior = name != "a pair without a latent"
    expected = fit.posterior(x, 3, seed=1)["z" if name == "pyro.module" else "loc"] if posterior else None
    expected_log_prob = fit.log_prob(x, 3, seed=2)
    fit.save(tmp_path / "fit")
    with pytest.raises(lvm.StorageError, match=r"is code, which no file holds: pass program="):
        lvm.load(tmp_path / "fit")
    torch.manual_seed(99)
    NETS["live"] = nn.Linear(1, 1)
    loaded = lvm.load(tmp_path / "fit", make())
    same_tensors(dict(loaded.params), dict(fit.params))
    assert torch.equal(loaded.log_prob(x, 3, seed=2), expected_log_prob)
    if posterior:
        assert torch.equal(loaded.posterior(x, 3, seed=1)["z" if name == "pyro.module" else "loc"], expected)


class Half(nn.Module):
    """A module that also declares parameters by name, and registers a network that it does not hold."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def model(self, x, size=None):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        net = pyro.module("net", NETS["live"])
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(net(z[..., None])[..., 0], scale), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(self.weight * x, 0.7))


@pytest.mark.parametrize("make", [User, Half, lambda: User().model], ids=["recipe", "pyro.param", "a lone method"])
def test_live_modules_get_the_values_at_once_and_keep_what_is_trained_since(make, tmp_path):
    def tensor(program):
        module = getattr(program, "__self__", program)
        return module.weight if isinstance(module, Half) else module.locs

    NETS["live"] = nn.Linear(1, 1)
    trained, fresh, x = make(), make(), data()
    fit = lvm.fit(trained, x, **TRAIN)
    fit.save(tmp_path / "fit")
    loaded = lvm.load(tmp_path / "fit", fresh)
    assert torch.equal(tensor(fresh), tensor(trained))
    with torch.no_grad():
        tensor(fresh).add_(1.0)
    for _ in range(2):
        assert torch.equal(loaded.log_prob(x, 3, seed=1), fit.log_prob(x, 3, seed=1))
        assert torch.equal(tensor(fresh), tensor(trained) + 1.0)
    same_tensors(dict(loaded.params), dict(fit.params))


def test_networks_that_functions_register_get_the_values_when_they_are_met(tmp_path):
    NETS["live"] = trained = nn.Linear(1, 1)
    x = data()
    fit = lvm.fit((deep, deep_guide), x, **TRAIN)
    fit.save(tmp_path / "fit")
    expected = fit.log_prob(x, 3, seed=1)
    NETS["live"] = fresh = nn.Linear(1, 1)
    loaded = lvm.load(tmp_path / "fit", (deep, deep_guide))
    assert torch.equal(loaded.log_prob(x, 3, seed=1), expected)
    assert torch.equal(fresh.weight, trained.weight)
    with torch.no_grad():
        fresh.weight.add_(1.0)
    assert torch.equal(loaded.log_prob(x, 3, seed=1), expected)
    assert torch.equal(fresh.weight, trained.weight + 1.0)


def test_an_evaluation_that_fails_leaves_the_live_values(tmp_path):
    NETS["live"] = nn.Linear(1, 1)
    fit = lvm.fit(Half(), data(), **TRAIN)
    fit.save(tmp_path / "fit")
    fresh = Half()
    loaded = lvm.load(tmp_path / "fit", fresh)
    with torch.no_grad():
        fresh.weight.fill_(7.0)
    NETS["live"] = nn.Linear(1, 2)
    with pytest.raises(lvm.StorageError, match=r"'net\$\$\$weight' of Half is torch.float64 of shape \(2, 1\)"):
        loaded.log_prob(data(), 3)
    assert fresh.weight.item() == 7.0
    assert NETS["live"].weight.dtype == torch.float32
    NETS["live"] = nn.Linear(1, 1)
    assert torch.equal(loaded.log_prob(data(), 3, seed=1), fit.log_prob(data(), 3, seed=1))


def rows_of(kind, size):
    return {"a tensor": torch.zeros(size), "a function": lambda: torch.zeros(size)}.get(
        kind, nn.Parameter(torch.zeros(size))
    )


def guide_by_row(x, size=None, index=None):
    locs = pyro.param("locs", rows_of(WIDTH["kind"], size or len(x)))
    with pyro.plate("data", size or len(x), subsample=index):
        pyro.sample("z", dist.Normal(locs[index], 0.7))


@pytest.mark.parametrize("kind", ["a tensor", "a function", "an nn.Parameter"])
def test_the_first_evaluation_may_be_of_fewer_rows_than_a_parameter_has(kind, tmp_path):
    WIDTH["kind"] = kind
    x = data(400)
    fit = lvm.fit((saved_programs.by_row, guide_by_row), x, **TRAIN)
    fit.save(tmp_path / "fit")
    for number in (3, 300, 400):
        loaded = lvm.load(tmp_path / "fit", (saved_programs.by_row, guide_by_row))
        drawn = loaded.posterior(x[:number], 3, seed=1)["z"]
        assert torch.equal(drawn, fit.posterior(x[:number], 3, seed=1)["z"])
        same_tensors(dict(loaded.params), dict(fit.params))
        loaded.save(tmp_path / "again")
        again = lvm.load(tmp_path / "again", (saved_programs.by_row, guide_by_row))
        assert torch.equal(again.posterior(x, 3, seed=1)["z"], fit.posterior(x, 3, seed=1)["z"])


def test_a_guide_that_was_given_beside_the_program(tmp_path):
    x = data()
    fit = lvm.fit(User(), x, guide=guide_of_mean, **TRAIN)
    fit.save(tmp_path / "fit")
    with pytest.raises(lvm.StorageError, match=r"pass program=\(program, guide\)"):
        lvm.load(tmp_path / "fit", User())
    loaded = lvm.load(tmp_path / "fit", (User(), guide_of_mean))
    assert torch.equal(loaded.log_prob(x, 3, seed=2), fit.log_prob(x, 3, seed=2))


class Helped(Half):
    """A loss beside the bound, with a parameter of its own."""

    def auxiliary_loss(self, x, size=None):
        return (pyro.param("wish", torch.tensor(1.0), constraint=dist.constraints.positive) - 2.0) ** 2


def test_parameters_of_the_loss_beside_the_bound_are_kept(tmp_path):
    NETS["live"] = nn.Linear(1, 1)
    x = data()
    fit = lvm.fit(Helped(), x, **TRAIN)
    fit.save(tmp_path / "fit")
    for _ in range(2):
        loaded = lvm.load(tmp_path / "fit", Helped())
        assert torch.equal(loaded.log_prob(x, 3, seed=1), fit.log_prob(x, 3, seed=1))
        loaded.save(tmp_path / "fit")
    same_tensors(dict(loaded.params), dict(fit.params))
    assert "wish" in loaded.params


# ------------------------------------------------------------------------------------------------------------- refusals


def test_shapes_are_compared_before_anything_moves(tmp_path):
    lvm.fit(User(), data(), **TRAIN).save(tmp_path / "fit")
    wrong = User(3)
    with pytest.raises(lvm.StorageError, match=r"'locs' of User is torch.float64 of shape \(3,\).* of shape \(2,\)"):
        lvm.load(tmp_path / "fit", wrong)
    assert torch.equal(wrong.locs, torch.zeros(3))
    assert wrong.locs.dtype == torch.float32


CONSTRAINT: dict[str, object] = {}


def constrained(x, size=None):
    scale = pyro.param("scale", torch.full((2,), 0.5), constraint=CONSTRAINT["now"])
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(0.0, scale.abs().sum() + 0.1), obs=x)


class Declares(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = pyro.nn.PyroParam(torch.full((2,), 0.5), CONSTRAINT["now"])

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(0.0, self.scale.abs().sum() + 0.1), obs=x)

    def guide(self, x, size=None):
        """Nothing is latent."""


OTHER_CONSTRAINTS = [
    dist.constraints.unit_interval,
    dist.constraints.real,
    dist.constraints.greater_than(1e-4),
    dist.constraints.softplus_positive,
    dist.constraints.interval(0.0, 2.0),
    dist.constraints.simplex,
    dist.constraints.ordered_vector,
]


@pytest.mark.parametrize("make", [lambda: (constrained, nothing), Declares], ids=["pyro.param", "PyroParam"])
@pytest.mark.parametrize("other", OTHER_CONSTRAINTS, ids=str)
def test_a_parameter_under_another_constraint_is_refused(make, other, tmp_path):
    x = data()
    CONSTRAINT["now"] = dist.constraints.positive
    fit = lvm.fit(make(), x, **TRAIN)
    fit.save(tmp_path / "fit")
    CONSTRAINT["now"] = other
    words = (
        rf"parameter 'scale' of .* has constraint {re.escape(str(other))} now, and had "
        r"GreaterThan\(lower_bound=0.0\) when .*fit was written: .*; give it the constraint that it had"
    )
    program = make()
    with pytest.raises(lvm.StorageError, match=words):
        lvm.load(tmp_path / "fit", program).log_prob(x)
    for alike in (dist.constraints.greater_than(0), dist.constraints.nonnegative):
        CONSTRAINT["now"] = alike
        assert torch.equal(lvm.load(tmp_path / "fit", make()).log_prob(x), fit.log_prob(x))


def test_a_parameter_under_another_constraint_is_refused_in_files_of_format_1(monkeypatch):
    NETS["live"] = nn.Linear(1, 1)
    loaded = lvm.load(SAVED / "pair", (deep, deep_guide))
    monkeypatch.setattr(dist.constraints, "positive", dist.constraints.unit_interval)
    with pytest.raises(lvm.StorageError, match=r"'scale' of .* has constraint Interval.* now, and had another when"):
        loaded.log_prob(data(12, dtype=torch.float32), 3)
    monkeypatch.undo()
    loaded.log_prob(data(12, dtype=torch.float32), 3)


def alike(module, distribution=dist.Normal, latent="loc"):
    """A pair that is called like another, in a module of that name."""

    def model(x, size=None):
        loc = pyro.sample(latent, dist.Normal(0.0, 10.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", distribution(loc, 1.0), obs=x)

    def guide(x, size=None):
        m = pyro.param("m", torch.tensor(0.0))
        pyro.sample(latent, dist.Normal(m, 0.1))

    for part in (model, guide):
        part.__module__, part.__qualname__ = module, part.__name__
    return model, guide


@pytest.mark.parametrize(("there", "here"), [("mine", "mine"), ("__main__", "mine"), ("mine", "__main__")])
def test_a_script_that_is_run_and_one_that_is_imported_are_the_same(there, here, tmp_path):
    x = data()
    fit = lvm.fit(alike(there), x, **TRAIN)
    fit.save(tmp_path / "fit")
    assert torch.equal(lvm.load(tmp_path / "fit", alike(here)).log_prob(x, 3, seed=1), fit.log_prob(x, 3, seed=1))


def test_code_that_stands_elsewhere_is_warned_of(tmp_path):
    x = data()
    fit = lvm.fit(alike("mine"), x, **TRAIN)
    fit.save(tmp_path / "fit")
    with pytest.warns(lvm.ProgramWarning, match=r"elsewhere \(mine\.model there, others\.model here\): if") as caught:
        loaded = lvm.load(tmp_path / "fit", alike("others"))
    assert caught[0].filename == __file__
    assert torch.equal(loaded.log_prob(x, 3, seed=1), fit.log_prob(x, 3, seed=1))
    loaded.save(tmp_path / "fit")
    lvm.load(tmp_path / "fit", alike("others"))
    model, guide = alike("mine")
    fit = lvm.fit(model, x, guide=guide, **TRAIN)
    fit.save(tmp_path / "fit")
    lvm.load(tmp_path / "fit", (model, guide))
    with pytest.warns(lvm.ProgramWarning, match=r"elsewhere \(mine\.guide there, others\.guide here\)"):
        lvm.load(tmp_path / "fit", (model, alike("others")[1]))
    lvm.fit((model, guide), x, guide=alike("mine")[1], **TRAIN).save(tmp_path / "fit")
    lvm.load(tmp_path / "fit", ((model, guide), guide))


def test_a_pair_of_the_same_names_with_other_sites_is_refused(tmp_path):
    x = data()
    lvm.fit(alike("mine"), x, **TRAIN).save(tmp_path / "fit")
    loaded = lvm.load(tmp_path / "fit", alike("mine", dist.Laplace))
    for _ in range(2):
        words = r"site 'x' of the model was Normal when .*fit was written, and .* has site 'x' \(test_sav.*is Laplace"
        with pytest.raises(lvm.StorageError, match=words):
            loaded.log_prob(x, 3)
    loaded = lvm.load(tmp_path / "fit", alike("mine", latent="mu"))
    with pytest.raises(
        lvm.StorageError, match=r"site 'loc' of the model was Normal .* \(model, guide\) has no such site"
    ):
        loaded.log_prob(x, 3)


class Sometimes(nn.Module):
    """A label that is observed, latent, or left out, as the data are."""

    def __init__(self):
        super().__init__()
        self.locs = nn.Parameter(torch.tensor([-1.0, 1.0]))

    def model(self, x, y=None, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            if y is not None:
                pyro.sample("y", dist.Bernoulli(logits=self.locs[1] * z), obs=y)
            pyro.sample("x", dist.Normal(self.locs[0] * z, 1.0), obs=x)

    def guide(self, x, y=None, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(0.5 * x, 0.7))


def test_other_data_may_leave_out_what_was_observed(tmp_path):
    x = data()
    fit = lvm.fit(Sometimes(), (x, (x > 1).double()), **TRAIN)
    fit.save(tmp_path / "fit")
    loaded = lvm.load(tmp_path / "fit", Sometimes())
    assert torch.equal(loaded.log_prob(x, 3, seed=1), fit.log_prob(x, 3, seed=1))


def test_another_program_is_refused_by_name(tmp_path):
    lvm.fit(lvm.PPCA(3, 1), rows(), **TRAIN).save(tmp_path / "fit")
    with pytest.raises(lvm.StorageError, match=r"holds a fit of 'PPCA', and program is FactorAnalysis"):
        lvm.load(tmp_path / "fit", lvm.FactorAnalysis(3, 1))


def test_parameters_made_on_the_way_are_compared_at_the_first_evaluation(tmp_path):
    def model(x, size=None):
        loc = pyro.param("loc", torch.zeros(WIDTH["now"]))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc.sum(), 1.0), obs=x)

    WIDTH["now"] = 2
    x = data()
    fit = lvm.fit((model, nothing), x, **TRAIN)
    fit.save(tmp_path / "fit")
    loaded = lvm.load(tmp_path / "fit", (model, nothing))
    WIDTH["now"] = 3
    with pytest.raises(lvm.StorageError, match=r"'loc' of \(model, nothing\).*\(3,\).*\(2,\)"):
        loaded.log_prob(x)
    WIDTH["now"] = 2
    assert torch.equal(loaded.log_prob(x), fit.log_prob(x))


WIDTH: dict[str, object] = {}

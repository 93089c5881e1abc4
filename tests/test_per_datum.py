"""Parameters for each datum: where they start, that they follow their rows, and which guides cannot be replaced."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
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
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.data import as_rows
from pyro_lvm.inference import bound
from pyro_lvm.inference.prepare import Request, prepare, resolve
from pyro_lvm.parameters import Untouched, isolated


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    """How well the bound is known in the end is another test's affair."""
    monkeypatch.setattr(bound, "MAX_PASSES", 2)


def made(kind=Amortised, *arguments):
    torch.manual_seed(7)
    return kind(*arguments).double()


class Family(nn.Module):
    """A guide of any family in a plate, whose parameters hang on x; a prior of the same support."""

    PRIORS = {  # noqa: RUF012
        "Normal": lambda: dist.Normal(0.0, 1.0),
        "Normals": lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
        "LogNormal": lambda: dist.LogNormal(0.0, 1.0),
        "MultivariateNormal": lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
        "Bernoulli": lambda: dist.Bernoulli(0.4),
        "Bernoullis": lambda: dist.Bernoulli(torch.full((2,), 0.4)).to_event(1),
        "Categorical": lambda: dist.Categorical(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)),
    }

    def __init__(self, family, enumerate_as=None):
        super().__init__()
        self.family, self.enumerate_as = family, enumerate_as
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.noise = nn.Parameter(torch.tensor(0.1))

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", self.PRIORS[self.family]())
            z = z if z.dim() < 2 or self.family not in ("Normals", "MultivariateNormal", "Bernoullis") else z.sum(-1)
            pyro.sample("x", dist.Normal(z.to(x.dtype), self.noise.exp()), obs=x)

    def q(self, x):
        a = self.weight * x
        both = torch.stack([a, -a], -1)
        tril = torch.stack([torch.stack([a.exp(), 0 * a], -1), torch.stack([a, (-a).exp()], -1)], -2)
        return {
            "Normal": lambda: dist.Normal(a, 0.5 * a.exp()),
            "Normals": lambda: dist.Normal(both, torch.tensor([0.5, 2.0])).to_event(1),
            "LogNormal": lambda: dist.LogNormal(a, 0.5),
            "MultivariateNormal": lambda: dist.MultivariateNormal(both, scale_tril=tril),
            "Bernoulli": lambda: dist.Bernoulli(a.sigmoid()),
            "Bernoullis": lambda: dist.Bernoulli(logits=both).to_event(1),
            "Categorical": lambda: dist.Categorical(logits=torch.stack([a, -a, 2 * a], -1)),
        }[self.family]()

    def guide(self, x, size=None):
        infer = {"enumerate": self.enumerate_as} if self.enumerate_as else {}
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", self.q(x), infer=infer)


CASES = [
    *((family, None) for family in Family.PRIORS if family not in ("Bernoulli", "Categorical")),
    ("Bernoulli", "parallel"),
    ("Categorical", "parallel"),
    ("Bernoulli", "sequential"),
]


def prepared(program, x, batch_size=None, amortized=False, **options):
    """The program as a fit would train it."""
    resolved, recipe = resolve(program, options.pop("guide", None))
    with isolated(0, validate=True):
        request = Request(resolved, as_rows(x), None, recipe, None, batch_size, 0, True, False, amortized)
        return prepare(request, Untouched(resolved.modules.values()), [])


# ------------------------------------------------------------------------------------------------ where they start


@pytest.mark.parametrize(("family", "enumerated"), CASES)
@pytest.mark.parametrize("batch_size", [None, 16])
def test_every_row_starts_at_what_the_guide_says_of_it(family, enumerated, batch_size, monkeypatch):
    monkeypatch.setattr("pyro_lvm.per_datum.ROWS_AT_A_TIME", 11)  # the last block is shorter
    program, x = made(Family, family, enumerated), data()
    pair = prepared(program, x, batch_size).bound
    index = torch.tensor([3, 39, 0, 17])
    with torch.no_grad(), isolated(0, validate=True):
        trace = poutine.trace(pair.guide).get_trace(x[index], size=40, index=index)
        found, right = trace.nodes["z"]["fn"], program.q(x[index])
        value = right.sample()
    assert type(found) is type(right)
    assert (found.batch_shape, found.event_shape) == (right.batch_shape, right.event_shape)
    torch.testing.assert_close(found.log_prob(value), right.log_prob(value), rtol=1e-9, atol=1e-9)
    assert trace.nodes["z"]["infer"].get("enumerate") == enumerated
    assert trace.nodes["z"]["scale"] == 10.0


@pytest.mark.parametrize(("family", "enumerated"), CASES)
@pytest.mark.parametrize("batch_size", [None, 16])
def test_they_train_and_the_amortised_ones_do_not(family, enumerated, batch_size):
    program = made(Family, family, enumerated)
    weight = program.weight.item()
    elbo = Trace_ELBO() if "Normal" not in family and not enumerated else None
    fit = lvm.fit(program, data(), epochs=4, batch_size=batch_size, seed=0, elbo=elbo, amortized=False, lr=0.01)
    assert fit.info["guide"] == "per datum"
    assert program.weight.item() == weight
    assert program.noise.item() != pytest.approx(0.1, abs=1e-6)
    own = {name: value for name, value in fit.params.items() if name.startswith("z.")}
    assert own
    assert all(len(value) == 40 for value in own.values())


def test_the_first_step_is_the_amortised_one():
    """Same family, same start, same noise: the losses of the first steps are one number."""
    x = rows()
    amortised = lvm.fit(made(), x, steps=1, lr=0.01, seed=3)
    freed = lvm.fit(made(), x, steps=1, lr=0.01, seed=3, amortized=False)
    assert freed.history["elbo"] == pytest.approx(amortised.history["elbo"], rel=1e-12)
    both = made()
    lvm.fit(both, x, steps=5, seed=3)
    again = made()
    lvm.fit(again, x, steps=5, seed=3, amortized=True)
    assert same_state(again, state_of(both))


def test_the_start_is_that_of_an_initialised_program():
    x = rows(60, 4) * 3.0 + 5.0
    ppca = lvm.PPCA(4, 2)
    fit = lvm.fit(ppca, x, steps=1, lr=1e-9, seed=0, amortized=False)
    assert bool(ppca.is_initialized)
    torch.testing.assert_close(fit.params["z.loc"], ppca.encode(x).mean.detach(), rtol=0, atol=1e-6)


def test_a_program_is_initialised_once():
    calls = []

    class Counting(Amortised):
        def initialize(self, x, *, seed):
            calls.append(len(x))

    lvm.fit(made(Counting), rows(), steps=1, seed=0, amortized=False)
    assert calls == [40]


# ------------------------------------------------------------------------------------------------ what it gains


def exact(x):
    return lvm.PPCA.closed_form(x, latent_dim=1)


def test_free_parameters_undo_a_wrong_guide():
    x = rows(60, 3) * torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64)
    wrong = exact(x)
    with torch.no_grad():
        wrong._standard_guide_weight.mul_(0.3)
    for parameter in (wrong._standard_mean, wrong._standard_loadings, wrong._unconstrained_noise):
        parameter.requires_grad_(False)
    fit = lvm.fit(wrong, x, steps=600, lr=0.02, seed=0, amortized=False)
    right = wrong.posterior(x)
    assert fit.params["z.loc"].flatten().sub(right.mean.flatten()).abs().max().item() < 0.35
    assert fit.elbo == pytest.approx(wrong.log_prob(x).mean().item(), abs=0.05)


@pytest.mark.parametrize("capture", [False, "graph"])
def test_minibatches_train_their_own_rows(capture):
    """With plain gradient descent a row that is not in the batch does not move."""
    program, x = made(), rows()
    start = made().encoder(x).detach()
    fit = lvm.fit(
        program, x, steps=2, batch_size=10, optimizer=torch.optim.SGD, lr=0.1, seed=0, amortized=False, capture=capture
    )
    moved = (fit.params["z.loc"] != start).any(-1)
    assert int(moved.sum()) == 20


def test_captured_steps_give_the_same_numbers():
    fits = [
        lvm.fit(made(), rows(), steps=30, batch_size=10, seed=3, amortized=False, capture=capture)
        for capture in (False, "graph")
    ]
    assert fits[1].info["capture"] == "graph"
    assert fits[0].history == fits[1].history
    assert torch.equal(fits[0].params["z.loc"], fits[1].params["z.loc"])


def test_with_turns():
    told = lvm.fit(made(), rows(), steps=4, seed=0, amortized=False, alternate=(1, 1)).info["alternate"]
    assert told["phi"] == ["z.loc", "z.scale"]
    assert told["theta"] == ["decoder.weight", "decoder.bias"]


def test_the_record_knows_its_rows_and_no_others():
    x = rows()
    fit = lvm.fit(made(), x, steps=5, seed=0, amortized=False)
    assert fit.posterior(x, num_draws=3, seed=0)["z"].shape == (3, 40, 2)
    assert torch.isfinite(lvm.log_evidence(fit, x, num_samples=5, seed=0)).all()
    with pytest.raises(lvm.ProgramError, match="each of the 40 rows it was fitted to and knows nothing of these 30"):
        fit.posterior(x[:30], num_draws=3)


class Shared(Amortised):
    """A location that all rows share, of a family that could not be freed."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(2.0))

    def model(self, x, size=None):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), scale).to_event(1), obs=x)

    def guide(self, x, size=None):
        spread = pyro.param("spread", torch.tensor(3.0), constraint=dist.constraints.positive)
        pyro.sample("scale", dist.Gamma(self.rate.exp(), spread))
        super().guide(x, size)


@pytest.mark.parametrize("batch_size", [None, 10])
def test_what_all_rows_share_keeps_its_own_parameters(batch_size):
    program = made(Shared)
    encoder, start = state_of(program.encoder), program.encoder(rows()).detach()
    fit = lvm.fit(program, rows(), epochs=10, batch_size=batch_size, lr=0.01, seed=0, amortized=False)
    assert same_state(program.encoder, encoder)
    assert bool((fit.params["z.loc"] != start).all())
    assert program.rate.item() != 2.0
    assert fit.params["spread"].item() != 3.0
    assert fit.params["z.loc"].shape == (40, 2)
    assert set(fit.posterior(rows(), num_draws=2, seed=0)) == {"scale", "z"}
    first = lvm.fit(made(Shared), rows(), steps=1, lr=0.01, seed=3, elbo=TraceMeanField_ELBO())
    freed = lvm.fit(made(Shared), rows(), steps=1, lr=0.01, seed=3, elbo=TraceMeanField_ELBO(), amortized=False)
    assert set(freed.history["kl"]) == set(first.history["kl"])
    assert freed.history["elbo"] == pytest.approx(first.history["elbo"], rel=1e-12)


# ------------------------------------------------------------------------------------------------ refusals


class Chained(Amortised):
    def __init__(self, listed):
        super().__init__()
        self.listed = listed

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", dist.Bernoulli(0.5) if self.listed else dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + y.to(x.dtype)[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        infer = {"enumerate": "parallel"} if self.listed else {}
        with pyro.plate("data", size or len(x), subsample=x):
            q = dist.Bernoulli(logits=x[:, 0]) if self.listed else dist.Normal(x[:, 0], 1.0)
            y = pyro.sample("y", q, infer=infer)
            pyro.sample("z", dist.Normal(self.encoder(x) + y.to(x.dtype)[..., None], 1.0).to_event(1))


class Inner(Amortised):
    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x, dim=-2), pyro.plate("latent", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("again", size or len(x), subsample=x, dim=-2):
            pyro.sample("x", dist.Normal(self.decoder(z)[..., None, :], 1.0).to_event(1), obs=x[:, None])

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x, dim=-2), pyro.plate("latent", 2, dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0))


class Odd(Amortised):
    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Gamma(x.new_ones(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Gamma(self.encoder(x).exp(), 1.0).to_event(1))


class Clamped(Family):
    def q(self, x):
        return dist.Bernoulli(logits=torch.where(x > 1, torch.inf, x))


class Masked(Amortised):
    def model(self, x, size=None):
        with poutine.mask(mask=torch.tensor(True)):
            super().model(x, size)

    def guide(self, x, size=None):
        with poutine.mask(mask=torch.tensor(True)):
            super().guide(x, size)


class Tempered(Amortised):
    def model(self, x, size=None):
        with poutine.scale(scale=0.5):
            super().model(x, size)

    def guide(self, x, size=None):
        with poutine.scale(scale=0.5):
            super().guide(x, size)


def with_index(x, size=None, index=None):
    with pyro.plate("data", size or len(x), subsample=index):
        loc = pyro.param("m", torch.zeros(size or len(x), 2))[index]
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


REFUSED = {
    "enumerated": (lambda: made(Chained, True), {}, r"'z' .* is Normal and depends on enumerated site 'y' of the"),
    "chained": (lambda: made(Chained, False), {}, r"'z' .* is Normal and depends on site 'y' of the guide"),
    "plate": (lambda: made(Inner), {}, r"'z' .* is Normal and lies in plate 'latent' besides 'data'"),
    "family": (lambda: made(Odd), {}, r"'z' .* is Gamma and not one of the families with known parameters \(Normal"),
    "infinite": (lambda: made(Clamped, "Bernoulli", "parallel"), {}, r"'z' .* is Bernoulli and its logits is infinite"),
    "masked": (lambda: made(Masked), {}, r"guide site 'z' .* is masked"),
    "scaled": (lambda: made(Tempered), {}, r"'z' .* has a scale beside its plate's"),
    "made": (lambda: made(), {"guide": "mean_field"}, r"its guide is made from the model.*drop amortized=False"),
    "autoguide": (lambda: (made().model, AutoNormal(made().model)), {}, r"AutoNormal is no function of the data"),
    "none": (lambda: made().model, {}, r"its guide is made from the model.*nothing amortised to replace"),
    "index": (lambda: (made().model, with_index), {}, r"the guide takes `index`: it has parameters for each datum al"),
    "own mistake": (lambda: made(Family, "Bernoulli"), {}, r"site 'z' \(test_per_datum.py:\d+\) .* nobody sums it out"),
    "validation": (lambda: made(), {"validation": 0.25}, r"'z.loc' has a value for each of the 30 rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replaced_is_refused_and_nothing_has_moved(name):
    make, options, words = REFUSED[name]
    program = make()
    x = data() if name in ("infinite", "own mistake") else rows()
    before = state_of(program) if isinstance(program, nn.Module) else None
    with process_left_alone(), pytest.raises(lvm.ProgramError, match=words):
        lvm.fit(program, x, steps=1, amortized=False, check=name != "scaled", **options)
    assert before is None or same_state(program, before)


@pytest.mark.parametrize("pair", [(mixture, nothing), (model_of_mean, guide_of_mean)])
def test_a_guide_without_a_site_for_each_datum(pair):
    with pytest.raises(lvm.ProgramError, match=r"no site inside the data plate, so there is nothing amortised"):
        lvm.fit(pair, data(), steps=1, amortized=False)


def test_a_loader_hides_the_row_numbers():
    loader = DataLoader(TensorDataset(rows()), batch_size=10)
    with pytest.raises(lvm.ProgramError, match="needs row numbers, which a DataLoader hides"):
        lvm.fit(made(), loader, epochs=1, amortized=False)


@pytest.mark.parametrize("value", ["no", 2, 0.5])
def test_other_values(value):
    with pytest.raises(TypeError, match=r"amortized is .*: it must be True, False or None"):
        lvm.fit(made(), rows(), steps=1, amortized=value)

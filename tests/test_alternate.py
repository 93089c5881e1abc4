"""Variational EM: whose turn it is stands still to the bit, the bound rises, and exact E-steps are known for exact."""

from __future__ import annotations

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import ppca_maximum
from pyro.infer import Trace_ELBO
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
from torch.distributions import constraints
from torch.optim.lr_scheduler import ReduceLROnPlateau

import pyro_lvm as lvm
from pyro_lvm.capture.step import StepResult
from pyro_lvm.inference import alternate, bound
from pyro_lvm.inference.alternate import Alternation
from pyro_lvm.owners import Owners

THETA = ["decoder.weight", "decoder.bias"]
PHI = ["log_scale", "encoder.weight", "encoder.bias"]


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    """How well the bound is known in the end is another test's affair."""
    monkeypatch.setattr(bound, "MAX_PASSES", 2)


def made(kind=Amortised):
    torch.manual_seed(7)
    return kind()


def factors(n=300, columns=5, latent=2, seed=0):
    """Data with factors that are plain to see, and unequal."""
    draw = np.random.default_rng(seed)
    loadings = draw.normal(size=(columns, latent)) * np.array([2.0, 1.0])[:latent]
    x = draw.normal(size=(n, latent)) @ loadings.T + 0.5 * draw.normal(size=(n, columns)) + 3.0
    return torch.as_tensor(x)


# ------------------------------------------------------------------------------------------------ whose is whose


def test_the_parameters_are_told_apart():
    fit = lvm.fit(made(), rows(), steps=4, alternate=(1, 1), seed=0)
    assert fit.info["alternate"] == {
        "schedule": (1, 1),
        "e_step": "E-step by gradient",
        "phi": PHI,
        "theta": THETA,
    }
    assert lvm.fit(made(), rows(), steps=4, seed=0).info["alternate"] is None


@pytest.mark.parametrize("guide", [guide_of_mean, "mean_field", "full_rank", "map", AutoNormal])
def test_the_parameters_of_functions_and_of_guides_that_are_made(guide):
    fit = lvm.fit(model_of_mean, data(), guide=guide, steps=4, alternate=(1, 1), seed=0)
    told = fit.info["alternate"]
    assert told["theta"] == ["scale"]
    assert {name.removesuffix("_unconstrained") for name in told["phi"]} == set(fit.params) - {"scale"}
    assert told["phi"]


def test_what_both_use_is_the_models():
    told = lvm.fit(lvm.PPCA(5, 2), factors(), steps=4, alternate=(1, 1), seed=0).info["alternate"]
    assert told["phi"] == ["_standard_guide_weight", "_unconstrained_guide_scale"]
    assert {"_standard_mean", "_turn", "_standard_loadings", "_unconstrained_noise"} == set(told["theta"])


def test_a_parameter_behind_a_latent_value_is_the_guides():
    """The model's density hangs on z, and z on the encoder; but z is given to the model."""

    class Shifted(Amortised):
        def guide(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample("z", dist.Delta(self.encoder(x) + self.log_scale).to_event(1))

    told = lvm.fit(made(Shifted), rows(), steps=2, alternate=(1, 1), elbo=Trace_ELBO(), seed=0).info["alternate"]
    assert told["phi"] == PHI


def test_a_parameter_of_the_auxiliary_loss_is_phi_and_one_of_nobody_is_neither():
    class Helped(Amortised):
        def __init__(self):
            super().__init__()
            self.aside, self.idle = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))

        def auxiliary_loss(self, x):
            return self.aside.square() + 0.0 * x.sum()

    program = made(Helped)
    told = lvm.fit(program, rows(), steps=4, alternate=(2, 2), lr=0.1, seed=0).info["alternate"]
    assert set(told["phi"]) == {*PHI, "aside"}
    assert told["theta"] == THETA
    assert program.idle.item() == 1.0
    assert program.aside.item() == pytest.approx(0.8, abs=0.01)  # two steps of Adam, and not four


# ------------------------------------------------------------------------------------------------ whose turn it is


def followed(program, x, **options):
    """State after each epoch, the first before all."""
    states = [state_of(program)]
    options = {"seed": 3, "progress": False, "lr": 0.01} | options
    fit = lvm.fit(program, x, callbacks=[lambda end: states.append(state_of(end.program))], **options)
    return fit, states


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("capture", [False, "graph"])
@pytest.mark.parametrize("turns", [(1, 1), (2, 3), (4, 1)])
def test_only_those_move_whose_turn_it_is(turns, capture):
    program = made().double()
    _, states = followed(program, rows(), epochs=12, alternate=turns, capture=capture)
    cycle = [PHI] * turns[0] + [THETA] * turns[1]
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        assert moved(before, after) == set(cycle[i % len(cycle)])


class Momentum(torch.optim.SGD):
    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("optimizer", [Momentum, torch.optim.AdamW])
def test_momentum_and_decay_wait_for_their_turn(optimizer):
    _, states = followed(made().double(), rows(), epochs=4, alternate=(2, 2), optimizer=optimizer)
    changes = [moved(before, after) for before, after in itertools.pairwise(states)]
    assert changes == [set(PHI), set(PHI), set(THETA), set(THETA)]


def test_every_step_counts_also_in_minibatches():
    fit, states = followed(made().double(), rows(), epochs=3, batch_size=10, alternate=(3, 1))
    assert (fit.info["steps"], fit.info["epochs"]) == (12, 3)
    assert all(moved(before, after) == {*PHI, *THETA} for before, after in itertools.pairwise(states))
    fit, states = followed(made().double(), rows(), steps=3, batch_size=10, alternate=(3, 1))
    assert moved(states[0], states[1]) == set(PHI)


@pytest.mark.parametrize("options", [{"alternate": (2, 3)}, {"alternate": "until-converged"}])
@pytest.mark.parametrize("batch_size", [None, 10])
def test_captured_steps_give_the_same_numbers(options, batch_size):
    fits = [
        lvm.fit(made(), rows(), steps=90, batch_size=batch_size, capture=capture, seed=3, grad_clip_norm=0.5, **options)
        for capture in (False, "graph")
    ]
    assert fits[1].info["capture"] == "graph"
    assert fits[0].history == fits[1].history
    for name, value in fits[0].params.items():
        assert torch.equal(value, fits[1].params[name])


def test_the_first_steps_of_phi_are_those_of_a_fit_of_both():
    """Whose turn it is takes no draw from the noise, and changes no gradient."""
    both = lvm.fit(made(), rows(), steps=1, lr=0.01, seed=3, capture=False)
    alone = lvm.fit(made(), rows(), steps=1, lr=0.01, seed=3, capture=False, alternate=(9, 1))
    assert both.history == alone.history
    assert torch.equal(both.params["encoder.weight"], alone.params["encoder.weight"])
    assert not torch.equal(both.params["decoder.weight"], alone.params["decoder.weight"])


# ------------------------------------------------------------------------------------------------ until converged


class Rated(nn.Module):
    """Two means in one Normal, far from the data: each parameter has an optimum given the other."""

    def __init__(self, theta=8.0, phi=-8.0):
        super().__init__()
        self.theta, self.phi = nn.Parameter(torch.tensor(theta)), nn.Parameter(torch.tensor(phi))

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(self.theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(x / 2 + self.phi, 0.5**0.5))


def results(losses, auxiliary=None):
    columns = (("loss", ""),) if auxiliary is None else (("loss", ""), ("auxiliary_loss", ""))
    rest = [] if auxiliary is None else [auxiliary]
    return [StepResult(columns, torch.tensor([loss, *rest], dtype=torch.float64)) for loss in losses]


def turns_of(losses, size=1, auxiliary=None):
    """After how many steps each turn ended."""
    program = Rated()
    parameters = type("Bound", (), {"trainable": lambda self: dict(program.named_parameters())})()
    turns = Alternation("until-converged", parameters, Owners(("theta",), ("phi",)), size)
    ends, whose = [], turns._is_theta
    for step, result in enumerate(results(losses, auxiliary), 1):
        turns.end_step(result)
        if turns._is_theta != whose:
            ends.append(step)
            whose = turns._is_theta
    return ends


def test_a_turn_ends_where_the_loss_stands_still():
    assert turns_of([5.0] * 120) == [40, 80, 120]
    falling = [5.0 - 0.01 * i for i in range(500)]
    assert turns_of(falling) == [200, 400]  # never, but for the longest turn
    assert turns_of([5.0 - 1e-6 * i for i in range(40)]) == [40]  # 2e-5 nats in a window
    assert turns_of([5.0 - 1e-5 * i for i in range(60)]) == []  # 2e-4
    assert turns_of([500.0 - 1e-3 * i for i in range(60)], size=100) == []
    assert turns_of([500.0 - 1e-4 * i for i in range(60)], size=100) == [40]
    assert turns_of([5.0 + 0.01 * i for i in range(60)]) == [40]  # a loss that rises is no reason to go on


def test_noise_neither_ends_a_turn_that_gains_nor_prolongs_one_that_does_not():
    noise = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert len(turns_of((5.0 + noise).tolist())) >= 6  # ten would be never to be deceived
    about = [(-1.0) ** i for i in range(20)]  # the error of a difference of two such windows is 0.32
    assert turns_of([5.0 + a for a in about] + [4.5 + a for a in about]) == [40]
    assert turns_of([5.0 + a for a in about] + [4.2 + a for a in about]) == []
    gaining = [5.0 - 0.2 * i + float(noise[i]) for i in range(200)]
    assert turns_of(gaining) == [200]


def test_the_auxiliary_loss_is_part_of_what_stands_still():
    falling = torch.linspace(5.0, 0.0, 60, dtype=torch.float64)
    program = Rated()
    parameters = type("Bound", (), {"trainable": lambda self: dict(program.named_parameters())})()
    turns = Alternation("until-converged", parameters, Owners(("theta",), ("phi",)), 10)
    for part in falling:
        turns.end_step(results([50.0], part)[0])
    assert not turns._is_theta


def test_each_turn_goes_to_its_own_optimum():
    """Given the other, both optima are known: the bound is a quadratic in theta and phi."""
    x = data(200)
    program = Rated()
    fit, states = followed(
        program, x, epochs=2000, alternate="until-converged", optimizer=torch.optim.SGD, lr=0.3, seed=0
    )
    changes = ["phi" if moved(b, a) == {"phi"} else "theta" for b, a in itertools.pairwise(states)]
    ends = [i for i in range(1, len(changes)) if changes[i] != changes[i - 1]]
    assert changes[0] == "phi"
    assert len(ends) > 4
    assert max(np.diff([0, *ends])) <= alternate.LONGEST_TURN
    at = states[ends[0]]
    assert at["phi"].item() == pytest.approx(at["theta"].item() / 2, abs=0.1)
    at = states[ends[1]]
    assert at["theta"].item() == pytest.approx(x.mean().item() / 2 + at["phi"].item(), abs=0.1)
    assert fit.info["alternate"]["schedule"] == "until-converged"
    assert program.theta.item() == pytest.approx(x.mean().item(), abs=0.1)


# ------------------------------------------------------------------------------------------------ the bound rises


class Sorted(nn.Module):
    """Two unit Normals, and a guide that says which a datum is of: summed over, so that the bound has no noise."""

    def __init__(self):
        super().__init__()
        self.locs, self.slope, self.offset = (nn.Parameter(torch.tensor(v)) for v in ([-0.5, 1.0], 0.1, -0.3))

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            component = pyro.sample("component", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(self.locs[component.long()], 1.0), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            logits = self.slope * x + self.offset
            pyro.sample("component", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})


@pytest.mark.parametrize("turns", [(3, 2), "until-converged"])
def test_the_bound_rises_over_every_turn_on_all_data(turns):
    """The bound has no noise, and a small step uphill is uphill whoever takes it."""
    fit, _ = followed(Sorted(), data(), epochs=150, alternate=turns, optimizer=torch.optim.SGD, lr=0.02)
    gains = np.diff(fit.history["elbo"])
    assert (gains > -1e-12).all()
    assert gains[:20].min() > 0


class Plain:
    """A program's guide without its hooks."""

    def __init__(self, program):
        self.program = program

    def guide(self, x, size=None):
        return self.program.guide(x, size)


def test_em_by_gradients_ends_where_gradients_end():
    x = factors()
    at_once = lvm.fit(lvm.FactorAnalysis(5, 1), x, steps=600, seed=0)
    program = lvm.FactorAnalysis(5, 1)
    in_turn = lvm.fit((program.model, Plain(program).guide), x, steps=900, seed=0, alternate=(1, 2))
    assert in_turn.info["alternate"]["e_step"] == "E-step by gradient"
    assert in_turn.elbo == pytest.approx(at_once.elbo, abs=0.03)


# ------------------------------------------------------------------------------------------------ exact E-steps


@pytest.mark.parametrize("turns", [(1, 1), (7, 2), "until-converged"])
def test_a_label_that_is_summed_out_leaves_nothing_to_alternate(turns):
    x = factors(columns=3)
    plain = lvm.fit(lvm.GaussianMixture(2, 3), x, steps=30, seed=0)
    fit = lvm.fit(lvm.GaussianMixture(2, 3), x, steps=30, seed=0, alternate=turns)
    assert fit.history == plain.history
    assert fit.elbo == plain.elbo
    for name, value in plain.params.items():
        assert torch.equal(value, fit.params[name])
    assert fit.info["alternate"]["e_step"] == "E-step exact: nothing in the guide to train"
    assert fit.info["alternate"]["phi"] == []
    fit = lvm.fit((mixture, nothing), data(), steps=3, seed=0, alternate=turns)
    assert fit.info["alternate"]["theta"] == ["logit", "locs"]


@pytest.mark.parametrize(
    ("turns", "guide_covariance"), [((1, 1), "full"), ((5, 5), "diag"), ("until-converged", "diag")]
)
def test_ppca_reaches_the_closed_form_maximum(turns, guide_covariance):
    x = factors()
    ppca = lvm.PPCA(5, 2, guide_covariance)
    fit = lvm.fit(ppca, x, steps=1500, alternate=turns, seed=0)
    assert fit.info["alternate"]["e_step"] == "E-step exact: the program's solve_guide()"
    maximum = ppca_maximum(x.numpy(), 2)[0] / len(x)
    assert ppca.log_prob(x).mean().item() == pytest.approx(maximum, abs=0.01)
    assert fit.elbo == pytest.approx(maximum, abs=0.011 + 4 * fit.info["elbo_se"])


@pytest.mark.parametrize("kind", [lvm.PPCA, lvm.FactorAnalysis])
@pytest.mark.parametrize("guide_covariance", ["diag", "full"])
def test_solve_guide_is_the_posterior_and_the_density_does_not_feel_it(kind, guide_covariance):
    x = factors()
    program = kind(5, 2, guide_covariance).double()
    program.initialize(x, seed=0)
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    density, loadings = program.log_prob(x).detach(), program.loadings.detach().clone()
    program.solve_guide()
    torch.testing.assert_close(program.log_prob(x), density, rtol=0, atol=1e-10)
    q, p = program.encode(x), program.posterior(x)
    torch.testing.assert_close(q.mean, p.mean, rtol=0, atol=1e-10)
    covariance = q.variance.diag_embed() if guide_covariance == "diag" else q.covariance_matrix
    torch.testing.assert_close(covariance.expand_as(p.covariance_matrix), p.covariance_matrix, rtol=0, atol=1e-10)
    if guide_covariance == "full":
        assert torch.equal(program.loadings, loadings)
    again = program.loadings.detach().clone()
    program.solve_guide()
    torch.testing.assert_close(program.loadings, again, rtol=0, atol=1e-10)  # nor does a second call turn anything


def test_a_solved_guide_takes_no_steps_of_its_own():
    """Every step counted is one of theta; between them the guide is put where it belongs, and once more at the end."""
    fit, states = followed(lvm.PPCA(5, 2, "full").double(), factors(), epochs=4, alternate=(9, 2), capture="graph")
    theta = set(fit.info["alternate"]["theta"])
    assert all(theta <= moved(before, after) for before, after in itertools.pairwise(states[1:]))
    ppca = fit.program
    torch.testing.assert_close(ppca.encode(factors()).mean, ppca.posterior(factors()).mean, rtol=0, atol=1e-8)


def test_a_guide_that_cannot_be_solved_for_what_is_not_finite():
    ppca = lvm.PPCA(5, 2)
    with pytest.raises(lvm.NonFiniteError, match=r"step 2: loss became NaN.*site 'x' .*smaller rate"):
        lvm.fit(ppca, factors(), epochs=20, alternate=(1, 1), optimizer=torch.optim.SGD, lr=1e200, seed=0)
    assert torch.isfinite(ppca.loadings).all()

    class Faulty(lvm.PPCA):
        def solve_guide(self):
            raise RuntimeError("a mistake of its own")

    with pytest.raises(RuntimeError, match="a mistake of its own"):
        lvm.fit(Faulty(5, 2), factors(), epochs=20, alternate=(1, 1), seed=0)


def test_another_guide_than_the_programs_is_not_solved():
    ppca = lvm.PPCA(5, 1)

    def guide(x, size=None):
        weight = pyro.param("weight", torch.zeros(5, 1))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal((x - 3.0) @ weight, 1.0).to_event(1))

    fit = lvm.fit(ppca, factors(), guide=guide, steps=4, alternate=(1, 1), seed=0)
    assert fit.info["alternate"]["e_step"] == "E-step by gradient"
    assert fit.info["alternate"]["phi"] == ["weight"]


# ------------------------------------------------------------------------------------------------ with the rest of fit


def test_a_vae_trains():
    x = factors(n=200).float()
    torch.manual_seed(0)
    vae = lvm.VAE(5, 2, hidden=(16,), likelihood="normal")
    fit = lvm.fit(vae, x, epochs=60, batch_size=50, lr=5e-3, seed=0, alternate=(2, 1), capture="graph")
    assert fit.info["alternate"]["phi"]
    assert all(name.startswith("encoder") for name in fit.info["alternate"]["phi"])
    assert fit.history["elbo"][-1] > fit.history["elbo"][0] + 3.0


def test_with_callbacks_validation_early_stopping_and_a_plateau():
    fit = lvm.fit(
        made(),
        rows(200),
        epochs=400,
        batch_size=50,
        alternate="until-converged",
        validation=0.25,
        early_stopping=lvm.EarlyStopping(patience=5),
        optimizer=torch.optim.Adam,
        lr=0.02,
        scheduler=ReduceLROnPlateau,
        callbacks=[lambda end: None],
        capture="graph",
        seed=0,
    )
    assert fit.info["stopped"].startswith("early stopping")
    assert len(fit.history["validation_elbo"]) == fit.info["epochs"]


def test_a_fit_that_is_interrupted_has_its_record():
    def interrupt(end):
        if end.epoch == 5:
            raise KeyboardInterrupt

    fit = lvm.fit(made(), rows(), epochs=50, alternate=(1, 1), callbacks=[interrupt], seed=0)
    assert fit.info["stopped"] == "interrupted after 5 epochs"
    assert fit.info["alternate"]["schedule"] == (1, 1)


# ------------------------------------------------------------------------------------------------ refusals

WRONG = {
    "no phi": ((0, 1), ValueError, "phi_steps of alternate is 0: each turn takes at least 1 step"),
    "no theta": ((1, 0), ValueError, "theta_steps of alternate is 0"),
    "negative": ((1, -2), ValueError, "theta_steps of alternate is -2"),
    "word": ("always", ValueError, r"alternate='always' is not known: use 'until-converged' or \(phi_steps"),
    "half": ((1, 0.5), TypeError, r"theta_steps of alternate is 0\.5: it must be a whole number"),
    "words": (("a", "b"), TypeError, "phi_steps of alternate is 'a'"),
    "one": ((1,), ValueError, "alternate has 1 entries"),
    "three": ((1, 2, 3), ValueError, "alternate has 3 entries"),
    "number": (3, TypeError, r"alternate is 3: it must be a pair \(phi_steps, theta_steps\)"),
    "true": (True, TypeError, "alternate is True: it must be a pair"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_and_nothing_has_moved(name):
    value, kind, words = WRONG[name]
    program = made()
    before = state_of(program)
    with process_left_alone(), pytest.raises(kind, match=words):
        lvm.fit(program, rows(), steps=1, alternate=value)
    assert same_state(program, before)


def test_a_model_with_nothing_to_train():
    def model(x, size=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with process_left_alone(), pytest.raises(lvm.ProgramError, match=r"nothing to alternate with.*drop alternate="):
        lvm.fit((model, guide_of_mean), data(), steps=1, alternate=(1, 1))


def test_finding_the_owners_leaves_the_process_and_the_noise_alone():
    program = made()
    with process_left_alone():
        lvm.fit(program, rows(), steps=2, alternate=(1, 1), seed=0)


def test_constrained_parameters_and_masked_gradients():
    """A parameter with a constraint, and one that the guide and the model declare under one name: theta."""

    def guide(x, size=None):
        scale = pyro.param("scale", torch.tensor(1.5), constraint=constraints.positive)
        m = pyro.param("m", torch.tensor(0.0))
        pyro.sample("loc", dist.Normal(m, 0.1 * scale))

    told = lvm.fit((model_of_mean, guide), data(), steps=2, alternate=(1, 1), seed=0).info["alternate"]
    assert (told["phi"], told["theta"]) == (["m"], ["scale"])

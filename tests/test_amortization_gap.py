"""The amortization gap, against KL divergences in closed form."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gaussian_kl
from pyro.infer import Trace_ELBO
from small_programs import Amortised, data, guide_of_mean, model_of_mean, process_left_alone, rows, same_state, state_of
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.data import as_rows
from pyro_lvm.elbo.estimator import plain_estimator
from pyro_lvm.evaluation import Evaluation


def factors(n=200, columns=4, latent=2, seed=0):
    draw = np.random.default_rng(seed)
    loadings = draw.normal(size=(columns, latent)) * np.array([2.0, 1.0])
    return torch.as_tensor(draw.normal(size=(n, latent)) @ loadings.T + 0.7 * draw.normal(size=(n, columns)))


def ppca(x, guide_covariance, *, weight=1.0, scale=1.0):
    """PPCA at its maximum, whose guide has its means and standard deviations multiplied."""
    program = lvm.PPCA.closed_form(x, 2, guide_covariance)
    with torch.no_grad():
        program._standard_guide_weight.mul_(weight)
        raw = program._unconstrained_guide_scale
        diagonal = raw if guide_covariance == "diag" else raw.diagonal()
        diagonal.copy_((scale * nn.functional.softplus(diagonal)).expm1().log())
    return program


def kl_to_posterior(program, x):
    """By row, KL(q || p(z | x)), from moments alone."""
    q, p = program.encode(x), program.posterior(x)
    covariance = q.variance.diag_embed() if program.guide_covariance == "diag" else q.covariance_matrix
    moments = (q.mean, covariance[0], p.mean, p.covariance_matrix[0])
    return gaussian_kl(*(moment.detach().numpy() for moment in moments))


@pytest.mark.parametrize("guide_covariance", ["diag", "full"])
@pytest.mark.parametrize("wrong", [{"weight": 0.6}, {"scale": 2.0}, {"weight": 1.3, "scale": 0.5}])
def test_the_gap_of_a_wrong_guide_is_its_mean_divergence(guide_covariance, wrong):
    """The family holds the posterior (its covariance is diagonal at the maximum), so that nothing else is lost."""
    x = factors()
    program = ppca(x, guide_covariance, **wrong)
    divergence = kl_to_posterior(program, x)
    found = lvm.amortization_gap(program, x, steps=250, num_samples=100, lr=0.03, seed=0)
    assert found.gap == pytest.approx(divergence.mean(), abs=4 * found.standard_error)
    noise = math.sqrt(max(found.standard_error**2 - divergence.var() / len(x), 0.0)) + 1e-3
    assert found.gap == pytest.approx(divergence.mean(), abs=5 * noise + 0.01)
    assert found.standard_error >= 0.9 * divergence.std() / math.sqrt(len(x))
    assert found.gap == pytest.approx(found.elbo_per_datum - found.elbo_amortized, abs=1e-9)
    assert found.steps == 250


def test_the_bounds_are_the_evidence_and_the_fits():
    x = factors()
    program = ppca(x, "full", weight=0.6)
    evidence = program.log_prob(x).mean().item()
    found = lvm.amortization_gap(program, x, steps=250, num_samples=300, lr=0.03, seed=0)
    assert found.elbo_per_datum == pytest.approx(evidence, abs=0.02)
    assert found.elbo_amortized == pytest.approx(evidence - kl_to_posterior(program, x).mean(), abs=0.03)


@pytest.mark.parametrize("guide_covariance", ["diag", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_exact_guide_has_no_gap(guide_covariance, dtype):
    x = factors().to(dtype)
    found = lvm.amortization_gap(lvm.PPCA.closed_form(x, 2, guide_covariance), x, steps=200, num_samples=20, seed=0)
    assert abs(found.gap) < 4 * found.standard_error + 1e-5
    assert found.standard_error < 1e-3


class Sorted(nn.Module):
    """Two Normals, and a guide, linear in x, that says which: the posterior for one slope and offset."""

    LOCS = torch.tensor([-1.0, 1.5], dtype=torch.float64)
    LOGIT = 0.4

    def __init__(self, slope, offset=0.0):
        super().__init__()
        self.slope, self.offset = (
            nn.Parameter(torch.tensor(slope).double()),
            nn.Parameter(torch.tensor(offset).double()),
        )

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            component = pyro.sample("component", dist.Bernoulli(logits=x.new_tensor(self.LOGIT)))
            pyro.sample("x", dist.Normal(self.LOCS[component.long()], 1.0), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            logits = self.slope * x + self.offset
            pyro.sample("component", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})

    def divergence(self, x):
        low, high = self.LOCS
        posterior = self.LOGIT + (x - low).square() / 2 - (x - high).square() / 2
        q, p = ((self.slope * x + self.offset).sigmoid(), posterior.sigmoid())
        kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        return kl.detach()


def test_a_guide_that_is_summed_over_has_no_noise():
    x, program = data(60), Sorted(0.3, 1.0)
    kl = program.divergence(x)
    found = lvm.amortization_gap(program, x, steps=400, lr=0.1, seed=0)
    assert found.gap == pytest.approx(kl.mean().item(), abs=1e-3)
    assert found.standard_error == pytest.approx(kl.std().item() / math.sqrt(60), rel=1e-2)
    assert found == lvm.amortization_gap(program, x, steps=400, lr=0.1, seed=1)
    right = Sorted(2.5, 0.4 + (1.0 - 1.5**2) / 2)
    assert right.divergence(x).max() < 1e-12
    assert abs(lvm.amortization_gap(right, x, steps=100, seed=0).gap) < 1e-7


class Summed(Amortised):
    """A label that the model sums out, beside a latent that the guide draws."""

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.3)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + y.unsqueeze(-1), 1.0).to_event(1), obs=x)


class BothListed(Summed):
    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5)))
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal((y + k).unsqueeze(-1) * x.new_ones(3), 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("k", dist.Bernoulli(logits=x[:, 0] + self.log_scale[0]), infer={"enumerate": "parallel"})


class Logs(Amortised):
    """Estimated by draws alone: its KL has no closed form; a location that all rows share."""

    def model(self, x, size=None):
        shift = pyro.sample("shift", dist.StudentT(4.0, 0.0, x.new_tensor(1.0)))
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0).expand([self.latent]).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + shift, 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        loc = pyro.param("m", torch.tensor(0.3))
        pyro.sample("shift", dist.Normal(loc, pyro.param("s", torch.tensor(0.1), constraint=constraints.positive)))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.LogNormal(self.encoder(x), self.log_scale.exp()).to_event(1))


def made(kind, *arguments):
    torch.manual_seed(3)
    return kind(*arguments).double()


@pytest.mark.parametrize("kind", [Summed, Logs, Amortised])
def test_free_parameters_gain_what_an_untrained_encoder_lacks(kind):
    found = lvm.amortization_gap(made(kind), rows(30), steps=200, lr=0.05, num_samples=30, seed=0)
    assert found.gap > 2 * found.standard_error > 0
    longer = lvm.amortization_gap(made(kind), rows(30), steps=400, lr=0.05, num_samples=30, seed=0)
    assert longer.gap == pytest.approx(found.gap, rel=0.03)
    assert longer.elbo_amortized == found.elbo_amortized  # judged by the same noise


def test_a_vae_with_a_tiny_encoder_has_a_gap():
    x = factors(columns=5).float()
    torch.manual_seed(0)
    vae = lvm.VAE(5, 2, hidden=(16,), likelihood="normal", encoder=nn.Linear(5, 4))
    fit = lvm.fit(vae, x, epochs=40, batch_size=50, lr=5e-3, seed=0)
    found = lvm.amortization_gap(fit, x, steps=300, num_samples=30, seed=0)
    assert found.gap > 4 * found.standard_error > 0
    assert found.elbo_amortized == pytest.approx(fit.elbo, abs=0.1)


@pytest.mark.parametrize("kind", [Amortised, Sorted])
def test_what_rows_add_is_the_bound(kind):
    program, x = (made(Amortised), rows()) if kind is Amortised else (Sorted(0.3), data())
    evaluation = Evaluation.of(program, x)
    estimator = plain_estimator(evaluation.structure)
    part = as_rows(x).take(torch.tensor([4, 1, 7]))
    with evaluation.running(0):
        _, terms = estimator.evaluate(evaluation.bound, part)
    with evaluation.running(0):
        by_row = estimator.evaluate_rows(evaluation.bound, part, "data")
    assert by_row.shape == (3,)
    assert by_row.sum().item() * 40 / 3 == pytest.approx(terms.elbo.item(), rel=1e-9)
    with evaluation.running(0):
        again = estimator.evaluate_rows(evaluation.bound, as_rows(x).take(torch.tensor([4, 1, 9])), "data")
    assert torch.equal(again[:2], by_row[:2])
    assert again[2] != by_row[2]


# ------------------------------------------------------------------------------------------------ leaves alone


def test_blocks_change_memory_alone():
    """Each row's parameters are its own; only the noise is another."""
    x, program = data(50), Sorted(0.3, 1.0)
    whole = lvm.amortization_gap(program, x, steps=100, seed=0)
    parts = lvm.amortization_gap(program, x, steps=100, seed=0, batch_size=20)
    assert parts.gap == pytest.approx(whole.gap, rel=1e-6)
    assert parts.standard_error == pytest.approx(whole.standard_error, rel=1e-6)
    x = factors(n=60)
    program = ppca(x, "full", weight=0.6)
    whole, parts = (lvm.amortization_gap(program, x, steps=150, seed=0, batch_size=size) for size in (None, 25))
    assert parts.gap == pytest.approx(whole.gap, abs=0.06)


def test_the_fit_and_its_modules_are_as_they_were():
    x = rows()
    program = made(Amortised)
    fit = lvm.fit(program, x, steps=20, seed=0)
    program.log_scale.requires_grad_(False)
    gradient = program.decoder.weight.grad = torch.ones_like(program.decoder.weight)
    with torch.no_grad():
        program.encoder.weight.add_(1.0)  # after the fit: what it keeps is judged, not this
    state, elbo, params = state_of(program), fit.elbo, {name: value.clone() for name, value in fit.params.items()}
    with process_left_alone():
        found = lvm.amortization_gap(fit, x, steps=20, num_samples=5, seed=0)
    assert same_state(program, state)
    assert program.decoder.weight.grad is gradient
    assert bool((gradient == 1).all())
    assert program.training
    assert [p.requires_grad for p in (program.log_scale, program.decoder.weight)] == [False, True]
    assert fit.elbo == elbo
    assert all(torch.equal(value, fit.params[name]) for name, value in params.items())
    assert set(fit._bound.trainable()) == {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
    assert found.elbo_amortized == pytest.approx(fit.elbo, abs=0.5)
    with pytest.raises(AttributeError):
        found.gap = 0.0


def test_parameters_of_functions_are_the_fits():
    """Model and guide are functions: their parameters live in the fit alone."""
    program = made(Logs)
    fit = lvm.fit((program.model, program.guide), rows(), steps=100, seed=0, elbo=Trace_ELBO())
    assert fit.params["m"].item() != pytest.approx(0.3, abs=1e-3)
    before = {name: value.clone() for name, value in fit._bound.snapshot().items()}
    standing = lvm.amortization_gap(fit, rows(), steps=1, lr=1e-12, num_samples=5, seed=0)
    assert standing.gap == pytest.approx(0.0, abs=1e-9)  # what all rows share is drawn with the fit's parameters
    after = fit._bound.snapshot()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_new_data():
    x = factors()
    program = ppca(x, "full", weight=0.6)
    fresh = factors(n=50, seed=4)
    found = lvm.amortization_gap(program, fresh, steps=250, lr=0.03, seed=0)
    assert found.gap == pytest.approx(kl_to_posterior(program, fresh).mean(), abs=0.1)


def test_the_same_seed_gives_the_same_numbers():
    first, again, other = (lvm.amortization_gap(made(Amortised), rows(), steps=5, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_one_row_has_the_error_of_its_draws():
    found = lvm.amortization_gap(made(Amortised), rows()[:1], steps=5, num_samples=10, seed=0)
    assert 0 < found.standard_error < 10


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("option", ["steps", "lr", "num_samples", "batch_size"])
def test_numbers_must_be_positive(option):
    with pytest.raises(ValueError, match=f"{option} is 0: it must be positive"):
        lvm.amortization_gap(made(Amortised), rows(), **{option: 0})


def test_guides_without_a_gap_and_sites_without_a_family():
    freed = lvm.fit(made(Amortised), rows(), steps=2, seed=0, amortized=False)
    with pytest.raises(lvm.ProgramError, match="it has parameters for each datum already"):
        lvm.amortization_gap(freed, rows())
    fit = lvm.fit(made(Amortised).model, rows(), steps=2, seed=0)
    with pytest.raises(lvm.ProgramError, match="AutoNormal is no function of the data"):
        lvm.amortization_gap(fit, rows())
    with pytest.raises(lvm.ProgramError, match="the guide has no site inside the data plate"):
        lvm.amortization_gap((model_of_mean, guide_of_mean), data())
    with pytest.raises(lvm.ProgramError, match="a DataLoader hides"):
        lvm.amortization_gap(made(Amortised), DataLoader(TensorDataset(rows()), batch_size=10))
    with pytest.raises(lvm.ProgramError, match="the guide enumerates site 'k' and the model site 'y'"):
        lvm.amortization_gap(made(BothListed), rows(), steps=2)

"""The importance-weighted bound: its value by quadrature and by hand, its gradients, and where it is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

import pyro_lvm as lvm
from pyro_lvm.data import as_rows
from pyro_lvm.elbo import ImportanceWeighted
from pyro_lvm.elbo.estimator import make_estimator
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import as_program

N = 5
X = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
START = {"theta": 0.3, "a": 0.4, "s": 0.6}


def normal_model(x: Tensor, size: int | None = None) -> None:
    theta = pyro.param("theta", lambda: x.new_tensor(START["theta"]))
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def normal_guide(x: Tensor, size: int | None = None) -> None:
    a = pyro.param("a", lambda: x.new_tensor(START["a"]))
    s = pyro.param("s", lambda: x.new_tensor(START["s"]), constraint=constraints.positive)
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(a * x, s))


def chain_model(x: Tensor, size: int | None = None) -> None:
    theta = pyro.param("theta", lambda: x.new_tensor(START["theta"]))
    with pyro.plate("data", size or len(x), subsample=x):
        first = pyro.sample("first", dist.Normal(theta, 1.0).expand([2]).to_event(1))
        second = pyro.sample("second", dist.Normal(theta * first.sum(-1), 0.7))
        pyro.sample("x", dist.Normal(second, 0.5), obs=x)


def chain_guide(x: Tensor, size: int | None = None) -> None:
    a = pyro.param("a", lambda: x.new_tensor(START["a"]))
    s = pyro.param("s", lambda: x.new_tensor(START["s"]))
    with pyro.plate("data", size or len(x), subsample=x):
        loc = torch.stack([a * x, x - a], -1)
        first = pyro.sample("first", dist.Normal(loc, s).to_event(1))
        pyro.sample("second", dist.Normal(a * x + s * first[..., 0] * first[..., 1], s))


def shared_model(x: Tensor, size: int | None = None) -> None:
    m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def shared_guide(x: Tensor, size: int | None = None) -> None:
    a = pyro.param("a", lambda: x.new_tensor(START["a"]))
    pyro.sample("m", dist.Normal(a, 0.5))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(a * x, 0.6))


def gradients_of(
    elbo: Any, program: Any, draws: int, seed: int = 0, copies: int = 1
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and every draw's gradient by parameter, on many copies of the data: so many draws at once."""
    bound = BoundProgram(as_program(program), None, torch.float64)
    batch = as_rows(X.repeat(copies)).whole()
    with isolated(seed):
        structure = traced(bound.model, bound.guide, batch)
        estimator = make_estimator(elbo, structure)
        parameters = bound.trainable()
        losses, found = [], {name: [] for name in parameters}
        for _ in range(draws):
            for parameter in parameters.values():
                parameter.grad = None
            loss, _ = estimator.step(bound, batch, list(parameters.values()), None, 1)
            losses.append(float(loss))
            for name, parameter in parameters.items():
                found[name].append(parameter.grad.clone() if parameter.grad is not None else torch.zeros(()))
    return losses, {name: torch.stack(values) for name, values in found.items()}


def quadrature(theta: float, a: float, s: float, num_particles: int) -> float:
    x = X.numpy()
    return float(oracles.importance_weighted_bound(x, theta, a * x, s, num_particles).sum())


@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_the_bound_is_that_of_quadrature(num_particles):
    copies = 4000
    elbo = ImportanceWeighted(num_particles)
    losses, _ = gradients_of(elbo, (normal_model, normal_guide), 10, copies=copies)
    values = -np.array(losses) / copies
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - quadrature(**START, num_particles=num_particles)) < 4 * error
    assert error < 3e-2


def test_the_bound_rises_with_every_particle_to_the_evidence():
    x = X.numpy()
    evidence = oracles.normal_logpdf(x, np.array(START["theta"]), np.array(math.sqrt(1.25))).sum()
    bounds = [quadrature(**START, num_particles=k) for k in (1, 2, 3)]
    losses, _ = gradients_of(ImportanceWeighted(2000), (normal_model, normal_guide), 100)
    assert bounds[0] < bounds[1] < bounds[2] < evidence
    assert abs(-np.mean(losses) - evidence) / N < 0.01


def exact_gradient(num_particles: int) -> dict[str, float]:
    """Of the bound, by differences of quadratures, in theta, a and log s."""

    def bound(at: np.ndarray) -> float:
        return quadrature(at[0], at[1], math.exp(at[2]), num_particles)

    at = np.array([START["theta"], START["a"], math.log(START["s"])])
    return dict(zip(("theta", "a", "s"), oracles.central_difference(bound, at), strict=True))


def off_by(gradient: str, num_particles: int) -> dict[str, float]:
    """How many standard errors the mean gradient is from that of the bound, by parameter."""
    copies = 2000
    elbo = ImportanceWeighted(num_particles, gradient)
    _, found = gradients_of(elbo, (normal_model, normal_guide), 40, copies=copies)
    right = exact_gradient(num_particles)
    deviations = {}
    for name, values in found.items():
        values = -values / copies
        error = values.std() / math.sqrt(len(values))
        deviations[name] = float((values.mean() - right[name]) / error)
    return deviations


@pytest.mark.parametrize(
    ("gradient", "num_particles"), [("reparam", 1), ("reparam", 2), ("stl", 1), ("dreg", 1), ("dreg", 2), ("dreg", 3)]
)
def test_unbiased_gradients_are_that_of_the_bound(gradient, num_particles):
    assert max(abs(z) for z in off_by(gradient, num_particles).values()) < 4


def test_leaving_the_score_out_is_biased_for_the_guide_beyond_one_particle():
    deviations = off_by("stl", 2)
    assert abs(deviations["theta"]) < 4
    assert abs(deviations["a"]) > 8


def by_hand(draw: dict[str, Tensor], values: dict[str, Tensor], gradient: str) -> dict[str, Tensor]:
    """Gradients for the two-stage pair from its noise, in plain torch: (K, n) particles; parameters as given."""
    p = {name: value.clone().requires_grad_() for name, value in values.items()}
    theta, a, s = p["theta"], p["a"], p["s"]
    loc = torch.stack([a * X, X - a], -1)
    first = loc + s * draw["first"]
    second = a * X + s * first[..., 0] * first[..., 1] + s * draw["second"]
    # the parameters of q where its density is taken
    b, t = (a, s) if gradient == "reparam" else (a.detach(), s.detach())
    log_q = dist.Normal(torch.stack([b * X, X - b], -1), t).log_prob(first).sum(-1)
    log_q = log_q + dist.Normal(b * X + t * first[..., 0] * first[..., 1], t).log_prob(second)
    log_p = dist.Normal(theta, 1.0).log_prob(first).sum(-1) + dist.Normal(theta * first.sum(-1), 0.7).log_prob(second)
    log_w = log_p + dist.Normal(second, 0.5).log_prob(X) - log_q
    weights = log_w.softmax(0).detach()
    of_paths = weights.square() if gradient == "dreg" else weights
    loss = -(weights * log_w).sum()
    found = dict(zip(p, torch.autograd.grad(loss, list(p.values()), retain_graph=True), strict=True))
    if gradient != "reparam":
        of_guide = torch.autograd.grad(-(of_paths * log_w).sum(), [a, s])
        found |= dict(zip(("a", "s"), of_guide, strict=True))
    return found


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_guide_of_two_stages_by_hand(gradient, num_particles, vectorize):
    elbo = ImportanceWeighted(num_particles, gradient, vectorize_particles=vectorize)
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in START.items()}
    with pyro.get_param_store().scope():
        for name, value in values.items():
            pyro.param(name, value)
        elbo.loss(chain_model, chain_guide, X)  # finds out how deep plates are
        pyro.set_rng_seed(3)
        found = elbo.differentiable_loss(chain_model, chain_guide, X)
        trained = {name: pyro.get_param_store()[name] for name in values}
        gradients = dict(zip(trained, torch.autograd.grad(found, list(trained.values())), strict=True))
    pyro.set_rng_seed(3)
    shapes = [(num_particles, N)] if vectorize else [(1, N)] * num_particles
    drawn = [(torch.randn(*s, 2, dtype=torch.float64), torch.randn(*s, dtype=torch.float64)) for s in shapes]
    noise = {"first": torch.cat([d[0] for d in drawn]), "second": torch.cat([d[1] for d in drawn])}
    right = by_hand(noise, values, gradient)
    for name, value in right.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-10, atol=1e-10)


def mixed_model(x: Tensor, size: int | None = None) -> None:
    theta = pyro.param("theta", lambda: x.new_tensor(START["theta"]))
    with pyro.plate("data", size or len(x), subsample=x):
        k = pyro.sample("k", dist.Categorical(x.new_tensor([0.2, 0.5, 0.3])), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(theta * k, 1.0))
        pyro.sample("x", dist.Normal(z + k, 0.5), obs=x)


def test_enumerated_sites_are_summed_out_in_every_weight():
    program = (mixed_model, normal_guide)
    losses, _ = gradients_of(ImportanceWeighted(4, "dreg"), program, 1, seed=7)
    with isolated(7):
        found = BoundProgram(as_program(program), None, torch.float64)
        estimator = make_estimator(ImportanceWeighted(4), traced(found.model, found.guide, as_rows(X).whole()))
        _, terms = estimator.evaluate(found, as_rows(X).whole())
    bound = BoundProgram(as_program(program), None, torch.float64)
    batch = as_rows(X).whole()
    with isolated(7):
        traced(bound.model, bound.guide, batch)
        noise = torch.randn(4, N, dtype=torch.float64).numpy()
    x, k = X.numpy(), np.arange(3)
    loc = START["a"] * x
    z = loc + START["s"] * noise
    joint = (
        np.log([0.2, 0.5, 0.3])
        + oracles.normal_logpdf(z[..., None], START["theta"] * k, np.array(1.0))
        + oracles.normal_logpdf(x[:, None], z[..., None] + k, np.array(0.5))
    )
    log_w = scipy.special.logsumexp(joint, -1) - oracles.normal_logpdf(z, loc, np.array(START["s"]))
    right = -(scipy.special.logsumexp(log_w, 0) - math.log(4)).sum()
    assert losses[0] == pytest.approx(right, abs=1e-10)
    assert float(terms.elbo) == pytest.approx(log_w.mean(0).sum(), abs=1e-10)


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
def test_minibatches_and_the_exact_guide_give_the_evidence_without_noise(gradient):
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ppca = lvm.PPCA.closed_form(x, latent_dim=1)
    rows, right = (
        as_rows(x),
        oracles.ppca_log_density(
            x.numpy(), ppca.loadings.detach().numpy(), ppca.mean.detach().numpy(), ppca.noise_scale.item()
        ),
    )
    bound = BoundProgram(as_program(ppca))
    total = 0.0
    with isolated(0):
        estimator = make_estimator(ImportanceWeighted(3, gradient), traced(bound.model, bound.guide, rows.first(8)))
        for batch in rows.batches(8):
            loss, terms = estimator.evaluate(bound, batch)
            total += float(loss) * len(batch) / len(x)
            assert float(terms.elbo) == pytest.approx(-float(loss), rel=1e-10)
    assert -total == pytest.approx(right.sum(), rel=1e-9)


def test_latents_that_all_data_share_have_one_weight():
    losses, _ = gradients_of(ImportanceWeighted(3, "stl"), (shared_model, shared_guide), 1, seed=5)
    bound = BoundProgram(as_program((shared_model, shared_guide)), None, torch.float64)
    with isolated(5):
        traced(bound.model, bound.guide, as_rows(X).whole())
        m = START["a"] + 0.5 * torch.randn(3, 1, dtype=torch.float64).numpy()
        z = START["a"] * X.numpy() + 0.6 * torch.randn(3, N, dtype=torch.float64).numpy()
    x, one = X.numpy(), np.array(1.0)
    log_w = (
        oracles.normal_logpdf(m[:, 0], np.array(0.0), one) - oracles.normal_logpdf(m[:, 0], START["a"], np.array(0.5))
    ) + (
        oracles.normal_logpdf(z, m, one)
        + oracles.normal_logpdf(x, z, np.array(0.5))
        - oracles.normal_logpdf(z, START["a"] * x, np.array(0.6))
    ).sum(-1)
    assert losses[0] == pytest.approx(-(scipy.special.logsumexp(log_w) - math.log(3)), abs=1e-10)


def test_what_is_reported_is_the_plain_bound():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fit = lvm.fit(lvm.PPCA(3, 1), x, elbo=ImportanceWeighted(20), steps=30, seed=0)
    with torch.no_grad():
        ppca, q = fit.program, fit.program.encode(x)
        model = (ppca.loadings.numpy(), ppca.mean.numpy(), np.array(ppca.noise_scale.item() ** 2))
        covariance = q.covariance_matrix[0] if hasattr(q, "covariance_matrix") else torch.diag(q.variance[0])
        exact = oracles.linear_gaussian_elbo(x.numpy(), *model, q.mean.numpy(), covariance.numpy()).mean()
    assert fit.elbo == pytest.approx(exact, abs=4 * fit.info["elbo_se"] + 1e-9)
    assert -fit.history["loss"][-1] / len(x) > fit.history["elbo"][-1]


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
def test_a_captured_step_trains_as_pyro_does(gradient):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).sigmoid().bernoulli()
    fits = []
    for capture in (False, "graph"):
        with isolated(0):
            vae = lvm.VAE(6, 2, hidden=(5,))
        elbo = ImportanceWeighted(3, gradient)
        fits.append(lvm.fit(vae, x, elbo=elbo, epochs=3, batch_size=20, capture=capture, seed=0))
    assert fits[1].info["capture"] == "graph", fits[1].info["capture_reason"]
    for name, value in fits[0].params.items():
        torch.testing.assert_close(fits[1].params[name], value, rtol=1e-5, atol=1e-6)


def test_it_runs_in_plain_pyro():
    with pyro.get_param_store().scope():
        svi = SVI(normal_model, normal_guide, pyro.optim.Adam({"lr": 0.02}), ImportanceWeighted(5, "dreg"))
        losses = [svi.step(X) for _ in range(300)]
    x = X.numpy()
    evidence = oracles.normal_logpdf(x, x.mean(), np.array(math.sqrt(1.25))).sum()
    assert np.mean(losses[-50:]) == pytest.approx(-evidence, abs=0.02)


@pytest.mark.parametrize(("gradient", "num_particles"), [("stl", 1), ("dreg", 2)])
def test_a_guide_of_pyros_own_has_paths_through_its_transforms(gradient, num_particles):
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(x.new_tensor(0.2), 1.0))
        m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, scale), obs=x)

    guide = AutoNormal(model, init_scale=0.3)
    with pyro.get_param_store().scope(), isolated(0):
        guide(X)
        guide.double()
        parameters = list(guide.parameters())
        found = {}
        for kind in ("reparam", gradient):
            elbo = ImportanceWeighted(num_particles, kind)
            draws = [torch.autograd.grad(elbo.differentiable_loss(model, guide, X), parameters) for _ in range(300)]
            found[kind] = torch.stack([torch.stack(draw) for draw in draws])
    difference = found[gradient].mean(0) - found["reparam"].mean(0)
    error = torch.sqrt((found[gradient].var(0) + found["reparam"].var(0)) / 300)
    assert float((difference / error).abs().max()) < 4
    assert not torch.allclose(found[gradient][0], found["reparam"][0])


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="num_particles is 0: it must be at least 1"):
        ImportanceWeighted(0)
    with pytest.raises(ValueError, match="gradient='score' is not known: use 'reparam', 'stl' or 'dreg'"):
        ImportanceWeighted(2, "score")

    def listed_guide(x: Tensor, size: int | None = None) -> None:
        a = pyro.param("a", lambda: x.new_tensor(0.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("k", dist.Categorical(logits=a * x.new_ones(3)), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(a, 1.0))

    with pytest.raises(lvm.ProgramError, match=r"site 'k'.*is enumerated, but ImportanceWeighted.*TraceEnum_ELBO"):
        lvm.fit((mixed_model, listed_guide), X, elbo=ImportanceWeighted(2), steps=1)
    with (
        pyro.get_param_store().scope(),
        pytest.raises(lvm.ProgramError, match=r"site 'k'.*would never hear of it: enumerate it in the model"),
    ):
        ImportanceWeighted(2).loss(mixed_model, listed_guide, X)

    def drawn_guide(x: Tensor, size: int | None = None) -> None:
        a = pyro.param("a", lambda: x.new_tensor(0.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("k", dist.Poisson(a.exp()))

    def counted_model(x: Tensor, size: int | None = None) -> None:
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Poisson(x.new_tensor(1.0)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(lvm.ProgramError, match=r"site 'k'.*cannot be reparameterised"):
        lvm.fit((counted_model, drawn_guide), X, elbo=ImportanceWeighted(2), steps=1)
    with pytest.raises(lvm.ProgramError, match=r"'m'.*scaled by 2.5 is no bound: fit with batch_size=None"):
        lvm.fit((shared_model, shared_guide), X, elbo=ImportanceWeighted(2), steps=1, batch_size=2)


def test_plain_pyro_hears_of_scales_that_leave_no_bound():
    half = poutine.scale(normal_guide, 0.5)
    with pyro.get_param_store().scope():
        with pytest.raises(lvm.ProgramError, match=r"'m' is scaled by 1 and site 'z' by 2.5: weights of such factors"):
            ImportanceWeighted(2).loss(shared_model, shared_guide, X[:2], size=5)
        with pytest.raises(lvm.ProgramError, match=r"is scaled by 1 and site 'z' by 0.5: weights of such factors"):
            ImportanceWeighted(2).loss(normal_model, half, X)


def test_weights_of_rows_scale_their_bounds():
    weight = torch.tensor([0.5, 2.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    losses = []
    for scale in (torch.ones(N, dtype=torch.float64), weight):
        pyro.set_rng_seed(0)
        scaled = [poutine.scale(function, scale) for function in (normal_model, normal_guide)]
        with pyro.get_param_store().scope():
            losses.append(ImportanceWeighted(3, max_plate_nesting=1).loss(*scaled, X))
    pyro.set_rng_seed(0)
    x = X.numpy()
    z = START["a"] * x + START["s"] * torch.randn(3, N, dtype=torch.float64).numpy()
    log_w = (
        oracles.normal_logpdf(z, START["theta"], np.array(1.0))
        + oracles.normal_logpdf(x, z, np.array(0.5))
        - oracles.normal_logpdf(z, START["a"] * x, np.array(START["s"]))
    )
    rows = scipy.special.logsumexp(log_w, 0) - math.log(3)
    assert losses[0] == pytest.approx(-rows.sum(), abs=1e-10)
    assert losses[1] == pytest.approx(-(weight.numpy() * rows).sum(), abs=1e-10)


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
def test_the_gradient_of_a_minibatch_is_scaled_to_all_data(gradient):
    found = {}
    for size in (N, 3 * N):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            loss = ImportanceWeighted(3, gradient, max_plate_nesting=1).differentiable_loss(
                normal_model, normal_guide, X, size=size
            )
            parameters = [pyro.get_param_store().get_param(name).unconstrained() for name in ("theta", "a", "s")]
        found[size] = torch.stack(torch.autograd.grad(loss, parameters))
    torch.testing.assert_close(found[3 * N], 3 * found[N], rtol=1e-12, atol=1e-12)


def test_the_estimator_given_is_not_changed():
    elbo = ImportanceWeighted(2, "dreg")
    before = copy.copy(vars(elbo))
    gradients_of(elbo, (normal_model, normal_guide), 2)
    assert vars(elbo) == before

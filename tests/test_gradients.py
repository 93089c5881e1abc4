"""Gradients of estimators against what they estimate: unbiased within 4 standard errors, or a measured bias."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from draws_of_gradients import (
    LOCS,
    LOGITS,
    NOISE,
    NORMAL,
    VALUE,
    Linear,
    Normal,
    OfTen,
    X,
    bias,
    draws,
    off,
    repeatedly,
    spread,
)
from oracles import categorical_bound, normal_bound, slopes, two_particle_bound
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_lvm.elbo import ImportanceWeighted, Relaxed, ScoreFunction, WakeSleep, score_function
from pyro_lvm.elbo.particles import plates_of

N = 20_000
_, BY_LOGITS, BY_LOCS = categorical_bound(LOGITS, LOCS, X)
BY_NORMAL = slopes(lambda **at: normal_bound(**at, x=X, noise=NOISE), NORMAL)
BY_TWO = slopes(lambda **at: two_particle_bound(**at, x=X, noise=NOISE), NORMAL)


def is_right(found, right):
    """No entry is more than 4 standard errors from minus the bound's gradient."""
    return all(off(found[name], -torch.as_tensor(value)) < 4 for name, value in right.items())


OF_TEN = {"logits": BY_LOGITS, "locs": BY_LOCS}


# --- a label of ten ------------------------------------------------------------------------------------------------


def test_the_oracle_agrees_with_itself():
    by_hand = slopes(lambda first: categorical_bound([first, *LOGITS[1:]], LOCS, X)[0], {"first": LOGITS[0]})
    assert by_hand["first"] == pytest.approx(BY_LOGITS[0], abs=1e-8)
    by_hand = slopes(lambda first: categorical_bound(LOGITS, [first, *LOCS[1:]], X)[0], {"first": LOCS[0]})
    assert by_hand["first"] == pytest.approx(BY_LOCS[0], abs=1e-8)


def test_enumeration_is_exact():
    found, loss = draws(TraceEnum_ELBO(), OfTen(5, mark="parallel"))
    assert loss == pytest.approx(-VALUE, abs=1e-12)
    for name, right in OF_TEN.items():
        assert torch.allclose(found[name], -torch.as_tensor(right).expand(5, 10), atol=1e-12)


@pytest.mark.parametrize(
    ("elbo", "warm_up"),
    [
        (ScoreFunction(), 0),
        (ScoreFunction(3), 0),
        (ScoreFunction(3, vectorize_particles=False), 0),
        (ScoreFunction(2, "rloo"), 0),
        (ScoreFunction(4, "rloo"), 0),
        (ScoreFunction(3, "rloo", vectorize_particles=False), 0),
        (ScoreFunction(1, "average"), 10),
        (ScoreFunction(2, "average", decay=0.0), 2),
        (ScoreFunction(2, Linear(0.5, 1.5)), 0),
        (TraceGraph_ELBO(), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, TraceGraph_ELBO) else repr(value),
)
@pytest.mark.parametrize("kind", [dist.OneHotCategorical, dist.Categorical])
def test_score_functions_are_unbiased(elbo, warm_up, kind):
    found, _ = draws(elbo, OfTen(N, kind=kind), warm_up=warm_up)
    assert is_right(found, OF_TEN)


def test_baselines_lower_the_variance_in_order():
    elbos = {
        "none": ScoreFunction(4),
        "average": ScoreFunction(4, "average"),
        "learned": ScoreFunction(4, Linear(0.0, -VALUE)),
        "rloo": ScoreFunction(4, "rloo"),
    }
    spreads = {name: spread(draws(elbo, OfTen(N), warm_up=10)[0]["logits"]) for name, elbo in elbos.items()}
    assert max(spreads["average"], spreads["learned"], spreads["rloo"]) < 0.8 * spreads["none"]


class OwnDraw(ScoreFunction):
    """The mean of all draws, one's own among them."""

    def _baseline_of(self, signal, args, kwargs):
        return signal.cost.mean(0)


class OwnRow(ScoreFunction):
    """Half of the very cost that it is to be taken from."""

    def _baseline_of(self, signal, args, kwargs):
        return 0.5 * signal.cost


@pytest.mark.parametrize("elbo", [OwnDraw(2), OwnDraw(4), OwnRow(1)], ids=["own draw of 2", "own draw of 4", "own row"])
def test_a_baseline_that_depends_on_its_own_draw_is_caught(elbo):
    found, _ = draws(elbo, OfTen(N))
    assert off(found["logits"], -BY_LOGITS) > 10
    assert not is_right(found, OF_TEN)


def test_a_missing_score_term_is_caught(monkeypatch):
    monkeypatch.setattr(score_function, "_unscaled", lambda node: node["unscaled_log_prob"].detach() * 1.0)
    found, _ = draws(ScoreFunction(), OfTen(N))
    assert not is_right(found, OF_TEN)
    monkeypatch.setattr(score_function, "_unscaled", lambda node: 0.9 * node["unscaled_log_prob"])
    found, _ = draws(ScoreFunction(2, "rloo"), OfTen(N))
    assert not is_right(found, OF_TEN)


def test_a_missing_entropy_is_caught(monkeypatch):
    whole = score_function._signal

    def without(node, model_sites, guide_sites, costs):
        return whole(node, model_sites, guide_sites, costs | {("guide", "y"): torch.zeros_like(costs["guide", "y"])})

    monkeypatch.setattr(score_function, "_signal", without)
    found, _ = draws(ScoreFunction(2, "rloo"), OfTen(N))
    assert not is_right(found, OF_TEN)


@pytest.mark.parametrize("straight_through", [False, True])
def test_relaxations_are_biased_less_the_colder_and_noisier_the_colder(straight_through):
    biases, spreads = [], []
    for temperature in (1.0, 0.5, 0.25):
        elbo = Relaxed(temperature, straight_through)
        found, _ = draws(elbo, OfTen(N))
        biases.append(bias(found["logits"], -BY_LOGITS))
        spreads.append(spread(found["logits"]))
        assert off(found["logits"], -BY_LOGITS) > 4
    assert spreads == sorted(spreads)
    if not straight_through:  # which follows no such order
        assert biases == sorted(biases, reverse=True)
        assert biases[-1] < 0.5 * biases[0]


def test_straight_through_is_unbiased_for_the_model():
    """The model sees draws of the label itself, so that its own parameters have the gradient of the plain bound."""
    found, loss = draws(Relaxed(0.5, straight_through=True), OfTen(N))
    assert off(found["locs"], -BY_LOCS) < 4
    assert off(draws(Relaxed(0.5), OfTen(N))[0]["locs"], -BY_LOCS) > 4
    assert loss == pytest.approx(-VALUE, abs=0.05)


# --- a Normal latent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "elbo",
    [Trace_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True), TraceMeanField_ELBO(), ScoreFunction(2)],
    ids=lambda elbo: type(elbo).__name__,
)
def test_reparameterised_gradients_are_unbiased(elbo):
    assert is_right(draws(elbo, Normal(N))[0], BY_NORMAL)


def test_a_site_with_a_path_keeps_it():
    """At such sites the score function estimator is the reparameterised one, draw for draw."""
    ours, _ = draws(ScoreFunction(3, "rloo"), Normal(50))
    pyros, _ = draws(Trace_ELBO(num_particles=3, vectorize_particles=True), Normal(50))
    assert all(torch.allclose(ours[name], pyros[name], rtol=1e-10, atol=1e-12) for name in ours)


@pytest.mark.parametrize("gradient", ["reparam", "dreg"])
def test_importance_weighted_gradients_are_unbiased(gradient):
    assert is_right(draws(ImportanceWeighted(2, gradient), Normal(N))[0], BY_TWO)


def test_sticking_the_landing_is_biased_beyond_one_particle():
    found, _ = draws(ImportanceWeighted(1, "stl"), Normal(N))
    assert is_right(found, BY_NORMAL)
    found, _ = draws(ImportanceWeighted(2, "stl"), Normal(N))
    assert off(found["log_scale"], -BY_TWO["log_scale"]) > 4
    assert off(found["w"], -BY_TWO["w"]) < 4  # the model's own gradient is that of the bound


def test_wake_theta_climbs_the_importance_weighted_bound():
    found, loss = draws(WakeSleep(2, wake_phi=1.0, sleep=0.0), Normal(N))
    assert off(found["w"], -BY_TWO["w"]) < 4
    assert loss == pytest.approx(-two_particle_bound(**NORMAL, x=X, noise=NOISE), abs=0.02)


def test_wake_phi_is_right_for_many_particles_and_biased_for_few():
    """The exact gradient: of -E log q under the posterior, which is Normal."""
    precision = 1 + NORMAL["w"] ** 2 / NOISE**2
    mean, variance = NORMAL["w"] * X / NOISE**2 / precision, 1 / precision

    def inclusive(m, log_scale):
        return log_scale + 0.5 * ((mean - m) ** 2 + variance) * torch.tensor(-2 * log_scale).exp().item()

    right = slopes(inclusive, {name: NORMAL[name] for name in ("m", "log_scale")})
    many, _ = draws(WakeSleep(1000, wake_phi=1.0, sleep=0.0), Normal(200))
    few, _ = draws(WakeSleep(2, wake_phi=1.0, sleep=0.0), Normal(N))
    for name, slope in right.items():
        assert off(many[name], slope) < 4
        assert off(few[name], slope) > 4


class Pathless(dist.Normal):
    """Says that its draws have a path, which they have not."""

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).detach()


def test_a_normal_draw_without_a_path_is_unbiased_by_its_score_and_not_without():
    scored = Normal(N, kind=NonreparameterizedNormal)
    assert is_right(draws(ScoreFunction(2, "rloo"), scored)[0], BY_NORMAL)
    assert not is_right(draws(ScoreFunction(2, "rloo"), Normal(N, kind=Pathless))[0], BY_NORMAL)


# --- programs with more than one site, plates in plates, minibatches -------------------------------------------------


class Deep(nn.Module):
    """A shared scale, a label for each row, a Normal that hangs on the label, and pixels in a plate of their own."""

    def __init__(self, mark=None):
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def start(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5)

        self.table, self.logits, self.locs, self.shared = start(3, 1), start(3), start(3), start(2)
        self.infer = {} if mark is None else {"enumerate": mark}

    def model(self, x, size=None):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", size or len(x), subsample=x, dim=-2):
            y = pyro.sample("y", dist.Categorical(x.new_tensor([0.2, 0.5, 0.3])))
            z = pyro.sample("z", dist.Normal(self.table[..., 0][y] + a, 1.0))
            with pyro.plate("pixels", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z + self.locs[y], 1.0), obs=x)

    def guide(self, x, size=None):
        pyro.sample("a", dist.Normal(self.shared[0], self.shared[1].exp()))
        with pyro.plate("data", size or len(x), subsample=x, dim=-2):
            y = pyro.sample(
                "y", dist.Categorical(logits=x.mean(1, keepdim=True)[..., None] * self.logits), infer=self.infer
            )
            pyro.sample("z", dist.Normal(0.5 * self.locs[y], 0.7))


PIXELS = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("elbo", [ScoreFunction(10, "rloo"), ScoreFunction(10), ScoreFunction(4, "rloo")], ids=repr)
def test_with_plates_in_plates_and_minibatches_the_gradient_is_that_of_enumeration(elbo):
    """Four of twelve rows; enumeration draws the two Normals as the score function does."""
    ours = repeatedly(elbo, Deep(), PIXELS, size=12, times=300)
    summed = repeatedly(TraceEnum_ELBO(num_particles=10, vectorize_particles=True), Deep("parallel"), PIXELS, size=12)
    error = (ours.var(0) / len(ours) + summed.var(0) / len(summed)).sqrt()
    assert ((ours.mean(0) - summed.mean(0)).abs() / error).max() < 4


class Carried(nn.Module):
    """A guide whose shared latent hangs on the rows' labels: a row's label has a say in every row's cost."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64))
        self.weight = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def model(self, x, size=None):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.4)))
            pyro.sample("x", dist.Normal(a + y, 1.0), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", dist.Bernoulli(logits=self.logits))
        pyro.sample("a", dist.Normal(self.weight * y.sum(-1, keepdim=y.dim() > 1), 0.5))

    def exact(self, x):
        """Minus the bound, summed over all eight labellings; the Normal's part in closed form."""
        total = 0.0
        for labels in torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3):
            q = dist.Bernoulli(logits=self.logits).log_prob(labels).sum()
            mean = self.weight * labels.sum()
            cost = q - dist.Bernoulli(0.4).log_prob(labels).sum()
            cost = cost + torch.distributions.kl_divergence(dist.Normal(mean, 0.5), dist.Normal(0.0, 1.0))
            cost = cost - (dist.Normal(mean + labels, 1.0).log_prob(x) - 0.5 * 0.25).sum()
            total = total + q.exp() * cost
        return total


def test_what_the_guide_draws_later_for_all_rows_may_carry_a_rows_draw_to_another(monkeypatch):
    x = torch.tensor([2.5, -1.0, 0.5], dtype=torch.float64)
    program = Carried()
    right = torch.cat([g.flatten() for g in torch.autograd.grad(program.exact(x), list(program.parameters()))])
    assert off(repeatedly(ScoreFunction(200, "rloo"), program, x), right) < 4
    monkeypatch.setattr(score_function, "plates_of", own_rows_only)
    assert off(repeatedly(ScoreFunction(200, "rloo"), program, x), right) > 4


def own_rows_only(node):
    """As though all sites stood in the data plate: other rows' costs are left out."""
    return plates_of(node) or {"data": type("Frame", (), {"name": "data", "dim": -1, "size": 3, "full_size": 3})}


def test_every_draw_is_the_formula():
    """Of one label k: the cost at k times the score at k, and nothing beside."""
    found, _ = draws(ScoreFunction(), OfTen(200))
    logits, locs, x = (torch.tensor(value, dtype=torch.float64) for value in (LOGITS, LOCS, X))
    q = logits.softmax(0)
    cost = (10 * q).log() - dist.Normal(locs, 1.0).log_prob(x)
    possible = cost[:, None] * (torch.eye(10, dtype=torch.float64) - q)
    distance = (found["logits"][:, None] - possible).abs().amax(-1).amin(-1)
    assert distance.max() < 1e-12

"""The bound's parts: their sum is the bound, and each is the sum that one would write by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

from pyro_lvm.data import Batch
from pyro_lvm.elbo.estimator import make_estimator
from pyro_lvm.elbo.terms import Terms, closed_form_kl, read_terms
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import as_program

N, B, L, D = 12, 4, 2, 3  # rows in the data set, in the batch, latent coordinates, features
SCALE = N / B
X = torch.randn(B, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SEEN = torch.tensor([True, False, True, True])
LOADINGS = torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0]], dtype=torch.float64)


def run(
    program: Any, elbo: Any, *args: torch.Tensor, size: int = N, seed: int = 0
) -> tuple[float, Terms, float, Terms]:
    """Loss and terms of a step, and of an evaluation with the same noise."""
    bound = BoundProgram(as_program(program))
    batch = Batch(args, {}, size, torch.arange(len(args[0])))
    with isolated(seed, validate=True):
        structure = traced(bound.model, bound.guide, batch)
    estimator = make_estimator(elbo, structure)
    with isolated(seed, validate=True):
        loss, terms = estimator.step(bound, batch, list(bound.trainable().values()), None, size)
    with isolated(seed, validate=True):
        same_loss, same_terms = estimator.evaluate(bound, batch)
    return loss.item(), terms, same_loss.item(), same_terms


def numbers(terms: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in terms.items()}


def array(value: Any) -> np.ndarray:
    return torch.as_tensor(value).detach().numpy()


class Local:
    """A shared m, a factor z for each row, features x, one row of which is masked; remembers what it drew."""

    def __init__(self) -> None:
        self.drawn: list[tuple[torch.Tensor, torch.Tensor]] = []

    def model(self, x: torch.Tensor, size: int | None = None) -> None:
        m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 2.0))
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(L), 1.0).to_event(1))
            with poutine.mask(mask=SEEN):
                pyro.sample("x", dist.Normal(z @ LOADINGS + m.unsqueeze(-1), 0.7).to_event(1), obs=x)

    def guide(self, x: torch.Tensor, size: int | None = None) -> None:
        a = pyro.param("a", x.new_tensor(0.3))
        m = pyro.sample("m", dist.Normal(a, 0.5))
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(a * x @ LOADINGS.T, 0.4).to_event(1))
        self.drawn.append((m, z))

    def by_hand(self, analytic: bool) -> tuple[dict[str, float], dict[str, float]]:
        particles = [
            (array(m), array(z))
            for m, z in self.drawn
            for m, z in (zip(m.unbind(), z.unbind(), strict=True) if z.dim() == 3 else [(m, z)])
        ]
        loc = 0.3 * array(X) @ array(LOADINGS).T
        recon, kl_m, kl_z = 0.0, 0.0, 0.0
        for m, z in particles:
            density = oracles.normal_logpdf(array(X), z @ array(LOADINGS) + m, 0.7).sum(-1)
            recon += SCALE * density[array(SEEN)].sum() / len(particles)
            q_m, p_m = oracles.normal_logpdf(m, 0.3, 0.5), oracles.normal_logpdf(m, 0.0, 2.0)
            q_z, p_z = oracles.normal_logpdf(z, loc, 0.4), oracles.normal_logpdf(z, 0.0, 1.0)
            kl_m += (q_m - p_m).item() / len(particles)
            kl_z += SCALE * (q_z - p_z).sum() / len(particles)
        if analytic:
            kl_m = float(oracles.normal_kl(0.3, 0.5, 0.0, 2.0))
            kl_z = SCALE * oracles.normal_kl(loc, 0.4, 0.0, 1.0).sum()
        return {"x": recon}, {"m": kl_m, "z": kl_z}


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, RenyiELBO])
def test_sampled_parts_are_the_sums_by_hand(elbo, particles, vectorize):
    program = Local()
    options = {"strict_enumeration_warning": False} if elbo is TraceEnum_ELBO else {}
    made = elbo(num_particles=particles, vectorize_particles=vectorize, **options)
    loss, terms, same_loss, same_terms = run(program, made, X)
    steps = 1 if vectorize else particles
    assert len(program.drawn) == 1 + 2 * steps  # the trace, the step, the evaluation
    program.drawn = program.drawn[1 : 1 + steps]
    recon, kl = program.by_hand(analytic=elbo is TraceMeanField_ELBO)
    assert numbers(terms.reconstruction) == pytest.approx(recon, rel=1e-10)
    assert numbers(terms.kl) == pytest.approx(kl, rel=1e-10)
    assert numbers(same_terms.kl) == pytest.approx(kl, rel=1e-10)
    assert same_loss == pytest.approx(loss, rel=1e-12)
    if elbo is RenyiELBO and particles > 1:
        assert -loss > terms.elbo.item()  # a tighter bound than the plain one, which the parts are of
    else:
        assert -loss == pytest.approx(terms.elbo.item(), rel=1e-12)


class TwoLabels:
    """Labels j and k of every row summed out together, locations shared and sampled, a masked row."""

    weights_j = torch.tensor([0.2, 0.8], dtype=torch.float64)
    weights_k = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    scales = torch.tensor([0.5, 1.5], dtype=torch.float64)

    def __init__(self) -> None:
        self.drawn: list[torch.Tensor] = []

    def model(self, x: torch.Tensor, size: int | None = None) -> None:
        locs = pyro.sample("locs", dist.Normal(x.new_zeros(3), 3.0).to_event(1))
        with pyro.plate("data", size or len(x), subsample=x), poutine.mask(mask=SEEN):
            j = pyro.sample("j", dist.Categorical(self.weights_j), infer={"enumerate": "parallel"})
            k = pyro.sample("k", dist.Categorical(self.weights_k), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(Vindex(locs)[..., k], self.scales[j]), obs=x)

    def guide(self, x: torch.Tensor, size: int | None = None) -> None:
        loc = pyro.param("loc", torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
        self.drawn.append(pyro.sample("locs", dist.Normal(loc, 0.1).to_event(1)))

    def by_hand(self) -> tuple[float, float, float]:
        draws = [array(locs).reshape(-1, 3) for locs in self.drawn]
        particles = [row for rows in draws for row in rows]
        recon, kl_labels, kl_locs = 0.0, 0.0, 0.0
        prior = np.log(array(self.weights_j))[:, None] + np.log(array(self.weights_k))
        x = array(X[:, 0])[array(SEEN)]
        for locs in particles:
            density = oracles.normal_logpdf(x[:, None, None], locs, array(self.scales)[:, None])
            joint = prior + density
            posterior = joint - scipy.special.logsumexp(joint, axis=(1, 2), keepdims=True)
            recon += SCALE * (np.exp(posterior) * density).sum() / len(particles)
            kl_labels += SCALE * (np.exp(posterior) * (posterior - prior)).sum() / len(particles)
            q = oracles.normal_logpdf(locs, np.array([-1.0, 0.0, 1.0]), 0.1)
            kl_locs += (q - oracles.normal_logpdf(locs, 0.0, 3.0)).sum() / len(particles)
        return recon, kl_labels, kl_locs


@pytest.mark.parametrize(("particles", "vectorize"), [(1, False), (3, False), (3, True)])
def test_two_sites_enumerated_in_the_model(particles, vectorize):
    program = TwoLabels()
    made = TraceEnum_ELBO(num_particles=particles, vectorize_particles=vectorize)
    loss, terms, _, same_terms = run(program, made, X[:, 0])
    program.drawn = program.drawn[1 : 2 if vectorize else 1 + particles]
    recon, kl_labels, kl_locs = program.by_hand()
    assert numbers(terms.reconstruction) == pytest.approx({"x": recon}, rel=1e-10)
    assert numbers(terms.kl) == pytest.approx({"j+k": kl_labels, "locs": kl_locs}, rel=1e-10)
    assert numbers(same_terms.kl) == pytest.approx(numbers(terms.kl), rel=1e-12)
    assert -loss == pytest.approx(terms.elbo.item(), rel=1e-12)


class Labelled:
    """The label y is enumerated in the guide and clamped where it is known; z is drawn anew for each label."""

    logits = torch.tensor([[0.3, -0.4, 1.0]], dtype=torch.float64)

    def __init__(self, how: str = "parallel") -> None:
        self.how = how
        self.drawn: list[torch.Tensor] = []

    def model(self, x: torch.Tensor, y: torch.Tensor, size: int | None = None) -> None:
        with pyro.plate("data", size or len(x), subsample=x):
            label = pyro.sample("y", dist.Categorical(logits=x.new_zeros(3)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + label, 0.8), obs=x)

    def guide(self, x: torch.Tensor, y: torch.Tensor, size: int | None = None) -> None:
        a = pyro.param("a", x.new_tensor(0.3))
        chosen = torch.where(torch.arange(3) == y.unsqueeze(-1), 0.0, -torch.inf)
        logits = torch.where((y >= 0).unsqueeze(-1), chosen, self.logits + 0 * a)
        with pyro.plate("data", size or len(x), subsample=x):
            label = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": self.how})
            self.drawn.append(pyro.sample("z", dist.Normal(a * (x - label), 0.6)))


@pytest.mark.parametrize(("particles", "vectorize"), [(1, False), (2, False), (2, True)])
def test_a_site_enumerated_in_the_guide_and_clamped(particles, vectorize):
    program, y = Labelled(), torch.tensor([-1, 2, -1, 0])
    x = X[:, 0]
    made = TraceEnum_ELBO(num_particles=particles, vectorize_particles=vectorize)
    loss, terms, _, same_terms = run(program, made, x, y)
    draws = program.drawn[1 : 2 if vectorize else 1 + particles]
    q_known = np.where(array(y)[:, None] == np.arange(3), 1.0, 0.0)
    q = np.where(array(y)[:, None] >= 0, q_known, scipy.special.softmax(array(Labelled.logits), -1))
    recon, kl_y, kl_z = 0.0, 0.0, 0.0
    labels = np.arange(3)[:, None]
    for drawn in draws:
        for z in array(drawn).reshape(3, -1, B).swapaxes(0, 1):  # (labels, particles, rows) where vectorised
            recon += SCALE * (q.T * oracles.normal_logpdf(array(x), z + labels, 0.8)).sum() / particles
            q_z = oracles.normal_logpdf(z, 0.3 * (array(x) - labels), 0.6)
            kl_z += SCALE * (q.T * (q_z - oracles.normal_logpdf(z, 0.0, 1.0))).sum() / particles
            kl_y += SCALE * (scipy.special.xlogy(q, q) + q * np.log(3)).sum() / particles
    assert numbers(terms.reconstruction) == pytest.approx({"x": recon}, rel=1e-10)
    assert numbers(terms.kl) == pytest.approx({"z": kl_z, "y": kl_y}, rel=1e-10)
    assert numbers(same_terms.kl) == pytest.approx(numbers(terms.kl), rel=1e-12)
    assert -loss == pytest.approx(terms.elbo.item(), rel=1e-12)


def test_a_shared_site_enumerated_one_value_after_another():
    probabilities = torch.tensor([0.25, 0.75], dtype=torch.float64)

    def model(x, size=None):
        k = pyro.sample("k", dist.Categorical(x.new_tensor([0.5, 0.5])))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(k.to(x), 1.0), obs=x)

    def guide(x, size=None):
        q = pyro.param("q", probabilities, constraint=constraints.simplex)
        pyro.sample("k", dist.Categorical(q), infer={"enumerate": "sequential"})

    x = X[:, 0]
    loss, terms, _, _ = run((model, guide), TraceEnum_ELBO(), x)
    density = SCALE * oracles.normal_logpdf(array(x)[:, None], np.arange(2), 1.0).sum(0)
    q = array(probabilities)
    assert numbers(terms.reconstruction) == pytest.approx({"x": q @ density}, rel=1e-10)
    assert numbers(terms.kl) == pytest.approx({"k": q @ np.log(q / 0.5)}, rel=1e-10)
    assert -loss == pytest.approx(terms.elbo.item(), rel=1e-12)


def scaled(x: torch.Tensor, size: int | None = None) -> None:
    """A positive scale and a location shared by all, labels summed out."""
    s = pyro.sample("s", dist.LogNormal(x.new_tensor(0.0), 1.0))
    m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        k = pyro.sample("k", dist.Categorical(x.new_tensor([0.5, 0.5])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(m + k, s), obs=x)


def test_the_auxiliary_sites_of_an_autoguide_count_for_the_sites_they_transform():
    drawn: dict[str, torch.Tensor] = {}
    auto = AutoNormal(poutine.block(scaled, hide=["k"]), init_scale=0.2)

    def guide(x, size=None):
        drawn.update(auto(x, size=size))

    with isolated(0):
        auto(X[:, 0], size=N)
    loss, terms, _, _ = run((scaled, guide), TraceEnum_ELBO(), X[:, 0])
    s, m = drawn["s"].item(), drawn["m"].item()
    locs, scales = ([getattr(module, name).item() for name in "sm"] for module in (auto.locs, auto.scales))
    # on the real line q is normal; on the positive one its density has the factor 1 / s
    q_s = oracles.normal_logpdf(np.log(s), locs[0], scales[0]) - np.log(s)
    p_s = oracles.normal_logpdf(np.log(s), 0.0, 1.0) - np.log(s)
    q_m, p_m = oracles.normal_logpdf(m, locs[1], scales[1]), oracles.normal_logpdf(m, 0.0, 1.0)
    kl = numbers(terms.kl)
    joint = oracles.mixture_log_joint(array(X[:, 0]), np.array([0.5, 0.5]), m + np.arange(2), s)
    posterior = scipy.special.log_softmax(joint, -1)
    assert set(kl) == {"s", "m", "k"}
    assert kl["s"] == pytest.approx(q_s - p_s, rel=1e-9)
    assert kl["m"] == pytest.approx(q_m - p_m, rel=1e-9)
    assert kl["k"] == pytest.approx(SCALE * (np.exp(posterior) * (posterior + np.log(2))).sum(), rel=1e-9)
    assert -loss == pytest.approx(terms.elbo.item(), rel=1e-12)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceEnum_ELBO])
def test_a_guide_of_all_sites_jointly_has_one_term(elbo):
    model = scaled if elbo is TraceEnum_ELBO else poutine.condition(scaled, data={"k": torch.tensor(0)})
    auto = AutoMultivariateNormal(poutine.block(model, hide=["k"]))
    with isolated(0):
        auto(X[:, 0], size=N)
    loss, terms, _, _ = run((model, lambda x, size=None: auto(x, size=size)), elbo(), X[:, 0])
    assert [set(name.split("+")) for name in terms.kl if name != "k"] == [{"s", "m"}]
    assert -loss == pytest.approx(terms.elbo.item(), rel=1e-12)


def observed_only(x: torch.Tensor, size: int | None = None) -> None:
    loc = pyro.param("loc", lambda: x.new_tensor(0.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_a_guide_site_without_a_latent_site_keeps_its_term(elbo):
    def guide(x, size=None):
        pyro.sample("u", dist.Normal(pyro.param("loc_u", x.new_tensor(0.5)), 1.0), infer={"is_auxiliary": True})

    loss, terms, _, _ = run((observed_only, guide), elbo(), X[:, 0])
    assert set(terms.kl) == {"u"}
    assert -loss == pytest.approx(terms.elbo.item(), rel=1e-12)


def test_without_latents_the_bound_is_the_likelihood():
    loss, terms, _, _ = run((observed_only, lambda x, size=None: None), Trace_ELBO(), X[:, 0])
    assert terms.kl == {}
    assert -loss == pytest.approx(SCALE * oracles.normal_logpdf(array(X[:, 0]), 0.0, 1.0).sum(), rel=1e-12)
    assert terms.elbo.item() == pytest.approx(-loss, rel=1e-12)


def test_a_discrete_site_sampled_in_the_guide():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x, size=None):
        q = pyro.param("q", x.new_tensor(0.6), constraint=constraints.unit_interval)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("k", dist.Bernoulli(q))

    for elbo in (TraceGraph_ELBO(), Trace_ELBO(), TraceEnum_ELBO(strict_enumeration_warning=False)):
        loss, terms, _, _ = run((model, guide), elbo, X[:, 0])
        assert -loss == pytest.approx(terms.elbo.item(), rel=1e-12)
        # each label contributes plus or minus log(0.6 / 0.4), scaled
        assert (terms.kl["k"].item() / (SCALE * np.log(1.5))) == pytest.approx(
            round(terms.kl["k"].item() / (SCALE * np.log(1.5))), abs=1e-9
        )


def test_data_that_are_impossible_under_a_label_still_have_parts():
    """A label of weight nought contributes nothing, though its log-density is minus infinity."""
    low = torch.tensor([-5.0, 100.0], dtype=torch.float64)

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(x.new_tensor([0.25, 0.75])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Uniform(low[k], low[k] + 10.0, validate_args=False), obs=x)

    loss, terms, _, _ = run((model, lambda x, size=None: None), TraceEnum_ELBO(), X[:, 0])
    assert terms.reconstruction["x"].item() == pytest.approx(-N * np.log(10.0), rel=1e-12)
    assert terms.kl["k"].item() == pytest.approx(-N * np.log(0.25), rel=1e-12)
    assert -loss == pytest.approx(terms.elbo.item(), rel=1e-12)


def test_closed_forms_are_refused_where_they_would_be_wrong():
    normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    assert closed_form_kl(normal, normal).item() == 0.0
    assert closed_form_kl(dist.Delta(torch.zeros(3), event_dim=1), normal) is None
    assert closed_form_kl(dist.Delta(torch.zeros(3)).to_event(1), normal) is None
    assert closed_form_kl(normal, dist.StudentT(torch.ones(3), 0.0, 1.0).to_event(1)) is None


def test_terms_can_be_mapped_and_averaged():
    one = Terms({"x": torch.tensor(1.0)}, {"z": torch.tensor(2.0)})
    three = Terms({"x": torch.tensor(3.0)}, {"z": torch.tensor(4.0)})
    mean = Terms.mean([one, three], [0.25, 0.75])
    assert (mean.reconstruction["x"].item(), mean.kl["z"].item()) == (2.5, 3.5)
    assert mean.map(torch.neg).elbo.item() == 1.0
    halved: Callable[[torch.Tensor], torch.Tensor] = lambda value: value / 2  # noqa: E731
    assert one.map(halved).kl["z"].item() == 1.0


def test_an_enumerated_bound_needs_its_loss():
    with pytest.raises(TypeError, match="graph alive"):
        read_terms(TraceEnum_ELBO(), [], None)

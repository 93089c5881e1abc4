"""Any Pyro ELBO is an estimator: the same numbers and gradients as plain Pyro, on a copy, chosen with a reason."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch.distributions import constraints

import pyro_lvm as lvm
from pyro_lvm.data import Batch, as_rows
from pyro_lvm.elbo.estimator import Estimator, make_estimator, plain_estimator
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import as_program

N = 6
X = torch.randn(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def normal_model(x: torch.Tensor, size: int | None = None) -> None:
    b = pyro.param("b", lambda: x.new_tensor(0.2))
    m = pyro.sample("m", dist.Normal(b, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def normal_guide(x: torch.Tensor, size: int | None = None) -> None:
    a = pyro.param("a", lambda: x.new_tensor(0.4))
    s = pyro.param("s", lambda: x.new_tensor(0.3), constraint=constraints.positive)
    pyro.sample("m", dist.Normal(a, s))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(a * x, s))


def binary_model(x: torch.Tensor, size: int | None = None) -> None:
    b = pyro.param("b", lambda: x.new_tensor(0.2))
    with pyro.plate("data", size or len(x), subsample=x):
        k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(b + k, 1.0), obs=x)


def binary_guide(x: torch.Tensor, size: int | None = None) -> None:
    a = pyro.param("a", lambda: x.new_tensor(0.4))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("k", dist.Bernoulli(logits=a * x))


def listed_guide(x: torch.Tensor, size: int | None = None) -> None:
    a = pyro.param("a", lambda: x.new_tensor(0.4))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("k", dist.Bernoulli(logits=a * x), infer={"enumerate": "parallel"})


def no_guide(x: torch.Tensor, size: int | None = None) -> None:
    pass


def prepared(
    program: Any, elbo: Any, x: torch.Tensor = X, size: int | None = None
) -> tuple[Estimator, BoundProgram, Batch]:
    bound = BoundProgram(as_program(program))
    batch = Batch((x,), {}, size or len(x), torch.arange(len(x)))
    with isolated(0, validate=True):
        structure = traced(bound.model, bound.guide, batch)
    return make_estimator(elbo, structure), bound, batch


def stepped(program: Any, elbo: Any, seed: int, size: int = N) -> tuple[float, dict[str, float]]:
    estimator, bound, batch = prepared(program, elbo, size=size)
    with isolated(seed, validate=True):
        loss, _ = estimator.step(bound, batch, list(bound.trainable().values()), None, size)
    return loss.item(), {name: p.grad.item() * size for name, p in bound.trainable().items() if p.grad is not None}


def plain_pyro(program: Any, elbo: Any, seed: int, size: int = N) -> tuple[float, dict[str, float]]:
    with pyro.get_param_store().scope(), isolated(seed):
        model, guide = program
        pyro.set_rng_seed(seed)
        store = pyro.get_param_store()
        loss = elbo.loss_and_grads(model, guide, X, size=size)
        gradients = {name: store._params[name].grad for name in store}
        return float(loss), {name: grad.item() for name, grad in gradients.items() if grad is not None}


PAIRS = {"normal": (normal_model, normal_guide), "binary": (binary_model, binary_guide)}
# the nesting is given because Pyro's guess at it runs the pair once more, and draws
SAME_AS_PYRO = [
    ("normal", lambda: Trace_ELBO()),
    ("normal", lambda: Trace_ELBO(num_particles=3)),
    ("normal", lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)),
    ("normal", lambda: TraceMeanField_ELBO(num_particles=2)),
    ("normal", lambda: TraceGraph_ELBO(num_particles=2)),
    ("normal", lambda: RenyiELBO(alpha=0.0, num_particles=4)),
    ("normal", lambda: RenyiELBO(alpha=0.5, num_particles=4, vectorize_particles=True, max_plate_nesting=1)),
    ("binary", lambda: Trace_ELBO(num_particles=2)),
    ("binary", lambda: TraceGraph_ELBO(num_particles=2)),
    ("binary", lambda: TraceGraph_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)),
    ("binary", lambda: RenyiELBO(alpha=0.5, num_particles=4)),
    ("model enumerates", lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    ("guide enumerates", lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    ("guide enumerates", lambda: TraceEnum_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)),
]
PAIRS |= {"model enumerates": (binary_model, no_guide), "guide enumerates": (binary_model, listed_guide)}


@pytest.mark.parametrize(("pair", "elbo"), SAME_AS_PYRO)
@pytest.mark.parametrize("size", [N, 3 * N])
def test_loss_and_gradients_are_plain_pyros(pair, elbo, size):
    expected_loss, expected = plain_pyro(PAIRS[pair], elbo(), seed=5, size=size)
    loss, gradients = stepped(PAIRS[pair], elbo(), seed=5, size=size)
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    assert gradients == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_one_step_is_a_step_of_svi():
    rate = 0.01
    with pyro.get_param_store().scope(), isolated(7):
        svi = SVI(normal_model, normal_guide, pyro.optim.SGD({"lr": rate}), Trace_ELBO())
        loss = svi.step(X)
        expected = {name: pyro.param(name).item() for name in pyro.get_param_store()}
    estimator, bound, batch = prepared((normal_model, normal_guide), Trace_ELBO)
    optimizer = torch.optim.SGD(bound.trainable().values(), lr=rate * N)  # its gradient is of the loss per datum
    with isolated(7, validate=True):
        own_loss, _ = estimator.step(bound, batch, list(bound.trainable().values()), None, N)
    optimizer.step()
    assert own_loss.item() == pytest.approx(loss, rel=1e-10)
    assert {name: value.item() for name, value in bound.constrained().items()} == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("elbo", [Trace_ELBO, RenyiELBO])
def test_a_further_loss_adds_its_gradient(elbo):
    _, before = stepped((normal_model, normal_guide), elbo, seed=3)
    estimator, bound, batch = prepared((normal_model, normal_guide), elbo)
    parameters = bound.trainable()
    with isolated(3, validate=True):
        estimator.step(bound, batch, list(parameters.values()), 7 * parameters["a"], N)
    after = {name: p.grad.item() * N for name, p in parameters.items()}
    assert after == pytest.approx(before | {"a": before["a"] + 7 * N}, rel=1e-9)


def test_the_users_instance_is_never_changed():
    elbo = TraceEnum_ELBO(num_particles=2, vectorize_particles=True)
    before = dict(vars(elbo))
    estimator, bound, batch = prepared((binary_model, no_guide), elbo)
    with isolated(0):
        estimator.step(bound, batch, list(bound.trainable().values()), None, N)
    assert vars(elbo) == before
    assert estimator.elbo is not elbo


def test_a_used_instance_works_on_a_program_with_deeper_plates():
    """Pyro caches the plate nesting of the first program: its own instance fails on the second."""

    def deeper(x, size=None):
        b = pyro.param("b", lambda: x.new_tensor(0.2))
        with pyro.plate("data", size or len(x), subsample=x, dim=-1), pyro.plate("views", 3, dim=-2):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(b + k, 1.0), obs=x.expand(3, -1))

    used = TraceEnum_ELBO()
    with pyro.get_param_store().scope():
        used.loss(binary_model, no_guide, X)
        with pytest.raises(ValueError, match=r"Shape mismatch|plate stack overflow"):
            used.loss(deeper, no_guide, X)
    estimator, bound, batch = prepared((deeper, no_guide), used)
    with isolated(0):
        loss, terms = estimator.step(bound, batch, list(bound.trainable().values()), None, N)
    shallow, _ = stepped((binary_model, no_guide), used, seed=0)
    assert loss.item() == pytest.approx(3 * shallow, rel=1e-12)
    assert terms.elbo.item() == pytest.approx(-loss.item(), rel=1e-12)


def test_an_enumerated_bound_is_the_log_likelihood():
    joint = oracles.mixture_log_joint(X.numpy(), np.array([0.6, 0.4]), 0.2 + np.arange(2), np.ones(2))
    loss, _ = stepped((binary_model, no_guide), TraceEnum_ELBO, seed=0)
    assert -loss == pytest.approx(scipy.special.logsumexp(joint, -1).sum(), rel=1e-12)


def test_evaluation_leaves_gradients_alone_and_draws_as_a_step_does():
    for pair, elbo in [("normal", Trace_ELBO), ("guide enumerates", TraceEnum_ELBO), ("normal", RenyiELBO)]:
        estimator, bound, batch = prepared(PAIRS[pair], elbo)
        with isolated(4):
            loss, terms = estimator.evaluate(bound, batch)
        assert all(p.grad is None for p in bound.trainable().values())
        assert not loss.requires_grad
        assert not terms.elbo.requires_grad
        assert loss.item() == pytest.approx(stepped(PAIRS[pair], elbo, seed=4)[0], rel=1e-12)


def test_all_estimators_agree_in_expectation():
    truth, repeats = {}, 200
    for name, elbo in {
        "trace": Trace_ELBO(),
        "particles": Trace_ELBO(num_particles=4, vectorize_particles=True),
        "mean field": TraceMeanField_ELBO(),
        "graph": TraceGraph_ELBO(),
        "enum": TraceEnum_ELBO(strict_enumeration_warning=False),
    }.items():
        estimator, bound, batch = prepared((normal_model, normal_guide), elbo)
        with isolated(11):
            losses = torch.stack([estimator.evaluate(bound, batch)[0].double() for _ in range(repeats)])
        truth[name] = (losses.mean().item(), losses.std().item() / math.sqrt(repeats))
    reference, error = truth.pop("particles")
    for name, (mean, own) in truth.items():
        assert abs(mean - reference) < 4 * math.hypot(own, error), name


def test_an_alternative_to_enumeration_agrees_with_it():
    exact = stepped((binary_model, listed_guide), TraceEnum_ELBO, seed=0)[0]
    estimator, bound, batch = prepared(
        (binary_model, binary_guide), TraceGraph_ELBO(num_particles=20, vectorize_particles=True)
    )
    with isolated(1):
        losses = torch.stack([estimator.evaluate(bound, batch)[0].double() for _ in range(50)])
    assert abs(losses.mean().item() - exact) < 4 * losses.std().item() / math.sqrt(50)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_the_bound_of_ppca_lies_below_its_evidence_and_meets_it_where_the_guide_is_exact(covariance):
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = lvm.PPCA.closed_form(x, 2, guide_covariance=covariance)
    worse = lvm.PPCA.closed_form(x, 2, guide_covariance=covariance)
    with torch.no_grad():
        worse._standard_guide_weight *= 0.5
    for ppca, gap_expected in ((exact, False), (worse, True)):
        bound = BoundProgram(as_program(ppca))
        batch = as_rows(x).whole()
        with isolated(0):
            estimator = plain_estimator(traced(bound.model, bound.guide, batch))
            bounds = torch.stack([estimator.evaluate(bound, batch)[1].elbo for _ in range(200)])
        evidence, error = ppca.log_prob(x).sum().item(), bounds.std().item() / math.sqrt(200)
        gap = evidence - bounds.mean().item()
        assert (gap > 4 * error) if gap_expected else abs(gap) < 4 * error


def structure_of(model: Any, guide: Any) -> Any:
    bound = BoundProgram(as_program((model, guide)))
    with isolated(0, validate=True):
        return traced(bound.model, bound.guide, Batch((X,), {}, N, torch.arange(N)))


def reordered_guide(x: torch.Tensor, size: int | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(x, 1.0))
    pyro.sample("m", dist.Normal(z.mean(), 1.0))


def heavy_tailed_model(x: torch.Tensor, size: int | None = None) -> None:
    m = pyro.sample("m", dist.StudentT(x.new_tensor(3.0), 0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def m_guide(x: torch.Tensor, size: int | None = None) -> None:
    pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))


def observed_model(x: torch.Tensor, size: int | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(x.new_tensor(0.0), 1.0), obs=x)


def one_latent(x: torch.Tensor, size: int | None = None) -> None:
    m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "guide", "kind", "reason"),
    [
        (binary_model, no_guide, TraceEnum_ELBO, "k is discrete and enumerated"),
        (binary_model, listed_guide, TraceEnum_ELBO, "k is discrete and enumerated"),
        (binary_model, binary_guide, Trace_ELBO, "k has no closed-form KL"),
        (normal_model, normal_guide, TraceMeanField_ELBO, "m, z has a closed-form KL"),
        (normal_model, reordered_guide, Trace_ELBO, "another order"),
        (heavy_tailed_model, m_guide, Trace_ELBO, "m has no closed-form KL"),
        (one_latent, AutoNormal(one_latent), Trace_ELBO, "no closed-form KL"),
        (one_latent, AutoDelta(one_latent), Trace_ELBO, "no closed-form KL"),
        (observed_model, no_guide, Trace_ELBO, "nothing is latent"),
    ],
)
def test_the_default_and_its_reason(model, guide, kind, reason):
    structure = structure_of(model, guide)
    for estimator in (make_estimator(None, structure), plain_estimator(structure)):
        assert type(estimator.elbo) is kind
        assert reason in estimator.reason
        assert estimator.reason.startswith("chosen")


def test_a_given_estimator_says_so_and_shows_its_options():
    structure = structure_of(normal_model, normal_guide)
    assert make_estimator(Trace_ELBO, structure).reason == "given"
    assert repr(make_estimator(Trace_ELBO, structure)) == "Trace_ELBO()"
    assert repr(make_estimator(Trace_ELBO(num_particles=8), structure)) == "Trace_ELBO(num_particles=8)"
    shown = repr(make_estimator(RenyiELBO(alpha=0.5, num_particles=3), structure))
    assert shown == "RenyiELBO(num_particles=3, alpha=0.5)"


@pytest.mark.parametrize(
    ("elbo", "message"),
    [
        ("elbo", "must be a Pyro ELBO"),
        (torch.nn.Module, "must be a Pyro ELBO"),
        (JitTrace_ELBO(), r"use Trace_ELBO\(\)"),
        (JitTraceEnum_ELBO, r"use TraceEnum_ELBO\(\)"),
        (TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True), "no bound"),
        (ReweightedWakeSleep, "no bound"),
        (Trace_MMD, "no bound"),
    ],
)
def test_what_is_no_estimator_is_refused(elbo, message):
    structure = structure_of(normal_model, normal_guide)
    with pytest.raises(TypeError, match=message):
        make_estimator(elbo, structure)

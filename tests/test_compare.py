"""`compare_elbos`: value, noise of the gradient and time of each estimator, with nothing changed by the comparison."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyro_lvm as lvm

N, DRAWS = 5, 40
X = torch.randn(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
A, S = 0.4, 0.3


class Pair(torch.nn.Module):
    """x_i ~ N(m, 1), m ~ N(0, 1), q(m) = N(a, s), with everything about the gradient known by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(A, dtype=torch.float64))
        self.s = torch.nn.Parameter(torch.tensor(S, dtype=torch.float64))
        self.unused = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.drawn: list[float] = []

    def model(self, x: torch.Tensor, size: int | None = None) -> None:
        m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(self, x: torch.Tensor, size: int | None = None) -> None:
        self.drawn.append(pyro.sample("m", dist.Normal(self.a, self.s)).item())


def test_the_numbers_are_those_of_an_independent_computation():
    pair = Pair()
    table = lvm.compare_elbos(pair, X, [Trace_ELBO()], num_draws=DRAWS, seed=3)
    m = np.array(pair.drawn[-DRAWS:])
    x = X.numpy()
    bound = oracles.normal_logpdf(x, m[:, None], 1.0).sum(-1) + oracles.normal_logpdf(m, 0.0, 1.0)
    bound -= oracles.normal_logpdf(m, A, S)
    # pathwise: d loss / d m = sum(m - x) + m, m = a + s e; and the entropy gives -1 / s
    of_a = (m[:, None] - x).sum(-1) + m
    of_s = of_a * (m - A) / S - 1 / S
    assert table[0].value == pytest.approx(bound.mean() / N, rel=1e-10)
    assert table[0].standard_error == pytest.approx(bound.std(ddof=1) / math.sqrt(DRAWS) / N, rel=1e-10)
    assert table[0].gradient_std == pytest.approx(np.hypot(of_a.std(ddof=1), of_s.std(ddof=1)) / N, rel=1e-8)
    assert table[0].milliseconds > 0


def test_estimators_of_one_bound_agree_and_are_less_noisy_with_more_particles():
    rows = lvm.compare_elbos(
        Pair(),
        X,
        [Trace_ELBO, Trace_ELBO(num_particles=8), TraceMeanField_ELBO(), TraceGraph_ELBO(), RenyiELBO(alpha=0.0)],
        num_draws=100,
        seed=0,
    )
    trace, particles, mean_field, graph, renyi = rows
    for row in (particles, mean_field, graph):
        assert abs(row.value - trace.value) < 4 * math.hypot(row.standard_error, trace.standard_error)
    assert particles.gradient_std < 0.6 * trace.gradient_std
    assert graph.value == pytest.approx(trace.value)  # the same draws
    assert renyi.value > trace.value - 4 * math.hypot(renyi.standard_error, trace.standard_error)


def test_equal_estimators_give_equal_numbers_with_and_without_a_seed():
    for seed in (0, None):
        first, second = lvm.compare_elbos(Pair(), X, [Trace_ELBO(), Trace_ELBO], num_draws=3, seed=seed)
        assert (first.value, first.gradient_std) == (second.value, second.gradient_std)


def test_nothing_is_changed():
    pair = Pair()
    pair.a.grad = torch.tensor(7.0, dtype=torch.float64)
    pair.train()
    before, state = pair.a.detach().clone(), torch.get_rng_state()
    lvm.compare_elbos(pair, X, [Trace_ELBO()], num_draws=2, seed=0)
    assert pair.a.grad.item() == 7.0
    assert pair.s.grad is None
    assert torch.equal(pair.a, before)
    assert pair.training
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_come_back_also_when_a_step_fails():
    class Failing(Pair):
        def guide(self, x, size=None):
            super().guide(x, size)
            if len(self.drawn) > 3:
                raise RuntimeError("a step failed")

    pair = Failing()
    pair.a.grad = torch.tensor(7.0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="a step failed"):
        lvm.compare_elbos(pair, X, [Trace_ELBO()], num_draws=5, seed=0)
    assert pair.a.grad.item() == 7.0


def test_a_fit_is_compared_with_the_parameters_it_ended_with():
    pair = Pair()
    fit = lvm.fit(pair, X, steps=3, seed=0)
    at_end = lvm.compare_elbos(fit, X, [TraceMeanField_ELBO()], num_draws=4, seed=0)
    with torch.no_grad():
        pair.a.fill_(50.0)
    assert lvm.compare_elbos(fit, X, [TraceMeanField_ELBO()], num_draws=4, seed=0)[0].value == at_end[0].value
    assert pair.a.item() == 50.0


def test_the_table_prints():
    table = lvm.compare_elbos(Pair(), X, [Trace_ELBO(), RenyiELBO(alpha=0.5, num_particles=3)], num_draws=2, seed=0)
    head, first, second = str(table).splitlines()
    assert head.split() == ["estimator", "nats/datum", "±", "s.e.", "gradient", "sd", "ms/step"]
    assert first.startswith("Trace_ELBO()  ")
    assert f"{table[1].value:.4f} ±" in second
    assert len({len(line) for line in (head, first, second)}) == 1
    assert len(table) == 2
    assert table[:1] == (table[0],)


def test_a_program_without_parameters_has_no_gradient_noise():
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    table = lvm.compare_elbos((model, lambda x, size=None: None), X, [TraceEnum_ELBO()], num_draws=2)
    assert table[0].gradient_std == 0.0
    assert table[0].standard_error == 0.0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="num_draws is 1"):
        lvm.compare_elbos(Pair(), X, [Trace_ELBO()], num_draws=1)
    with pytest.raises(lvm.ProgramError, match="no guide"):
        lvm.compare_elbos(Pair().model, X, [Trace_ELBO()])
    with pytest.raises(TypeError, match="must be a Pyro ELBO"):
        lvm.compare_elbos(Pair(), X, ["trace"])

    def listed(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("k", dist.Bernoulli(x.new_tensor(0.4)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(x.new_tensor(0.0), 1.0), obs=x)

    with pytest.raises(lvm.ProgramError, match=r"(?s)'k'.*TraceEnum_ELBO"):
        lvm.compare_elbos((listed, lambda x, size=None: None), X, [Trace_ELBO()])

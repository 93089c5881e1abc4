"""`gradient_report`, against the mean and the variance of a gradient that are known by hand."""

from __future__ import annotations

import math

import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyro_lvm as lvm
from pyro_lvm.elbo.objective import Estimate, Objective
from pyro_lvm.elbo.terms import Terms

N = 6
X = torch.randn(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5
A, S = 0.4, 0.3


class Pair(torch.nn.Module):
    """x_i ~ N(z_i + b, 1), z_i ~ N(0, 1), q(z_i) = N(a, s): the gradient's distribution is known in closed form."""

    def __init__(self, a: float = A) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        self.unused = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def model(self, x: torch.Tensor, size: int | None = None) -> None:
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z + self.b, 1.0), obs=x)

    def guide(self, x: torch.Tensor, size: int | None = None) -> None:
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(self.a, S))


DRAWS = 600


@pytest.mark.parametrize(
    ("elbo", "kind"), [(Trace_ELBO(), "path"), (TraceMeanField_ELBO(), "closed"), (TraceGraph_ELBO(), "path")]
)
def test_mean_and_variance_are_the_analytic_ones(elbo, kind):
    report = lvm.gradient_report(Pair(), X, [elbo], num_draws=DRAWS, seed=1, groups="parameter")
    expected = oracles.shared_normal_gradient(X.numpy(), A, S, 0.2)
    assert [row.group for row in report] == ["a", "b", "unused"]
    for name in ("a", "b"):
        mean, variance = expected[name, kind]
        assert report.means[0][name].item() == pytest.approx(mean, abs=4 * math.sqrt(variance / DRAWS))
        # the gradient is normal, so that an estimated variance has the relative standard error sqrt(2 / (m - 1))
        assert report.variances[0][name].item() == pytest.approx(variance, rel=4 * math.sqrt(2 / (DRAWS - 1)))
        row = next(row for row in report if row.group == name)
        assert row.mean == pytest.approx(abs(report.means[0][name].item()))
        assert row.signal_to_noise == pytest.approx(abs(mean) / math.sqrt(variance), abs=5 / math.sqrt(DRAWS))
        assert row.cost == row.milliseconds * row.variance > 0
    assert (report[2].entries, report[2].variance, report[2].signal_to_noise) == (2, 0.0, 0.0)


def test_groups_are_owners_parameters_all_or_what_a_function_says():
    pair = Pair()

    def rows(groups):
        return {
            row.group: (row.entries, row.variance)
            for row in lvm.gradient_report(pair, X, [Trace_ELBO], num_draws=5, seed=0, groups=groups)
        }

    single, owners = rows("parameter"), rows("owner")
    assert list(owners) == ["theta", "phi", "neither"]
    assert (owners["theta"], owners["phi"], owners["neither"]) == (single["b"], single["a"], single["unused"])
    assert rows("all") == {"all": (4, pytest.approx(single["a"][1] + single["b"][1]))}
    assert rows(lambda name: "short" if len(name) == 1 else "long")["long"] == (2, 0.0)


def test_it_agrees_with_compare_elbos():
    elbos = [Trace_ELBO(), RenyiELBO(alpha=0.5, num_particles=3)]
    table = lvm.compare_elbos(Pair(), X, elbos, num_draws=10, seed=5)
    report = lvm.gradient_report(Pair(), X, elbos, num_draws=10, seed=5, groups="all")
    for one, other in zip(table, report, strict=True):
        assert one.estimator == other.estimator
        assert one.gradient_std == pytest.approx(math.sqrt(other.variance))


def test_at_the_optimum_there_is_no_signal_and_more_particles_halve_the_variance():
    few, many = lvm.gradient_report(
        Pair(a=((X - 0.2).mean() / 2).item()),
        X,
        [Trace_ELBO(), Trace_ELBO(num_particles=8, vectorize_particles=True)],
        num_draws=400,
        seed=0,
        groups=lambda name: "a" if name == "a" else "rest",
    )[::2]
    assert few.group == many.group == "a"
    assert few.signal_to_noise < 4 / math.sqrt(400)
    assert many.variance == pytest.approx(few.variance / 8, rel=0.5)


class Shifted(Objective):
    """The plain bound by its score, with a learned baseline, and a bias that a schedule takes away."""

    samples_discrete = True

    def __init__(self, learns=True):
        super().__init__()
        self.baseline = torch.nn.Linear(1, 1).double()
        self.bias = torch.ones((), dtype=torch.float64)
        self.learns = learns
        with torch.no_grad():
            self.baseline.weight.zero_()
            self.baseline.bias.fill_(0.0)

    def advance(self, progress):
        self.bias.fill_(1.0 - progress)

    def modules(self):
        return (self.baseline,) if self.learns else ()

    def estimate(self, model, guide, args, kwargs):
        model_trace, guide_trace = self._get_trace(model, guide, args, kwargs)
        node = guide_trace.nodes["z"]
        score = node["fn"].log_prob(node["value"].detach())
        with torch.no_grad():
            rows = sum(t.nodes[n]["log_prob"] for t, n in ((model_trace, "z"), (model_trace, "x")))
            rows = rows - guide_trace.nodes["z"]["log_prob"]
        centre = self.baseline(torch.ones(1, dtype=torch.float64))
        surrogate = -((rows - centre.detach()) * score).sum() + (rows - centre).square().sum()
        loss = -rows.sum() + self.bias
        terms = Terms({"x": model_trace.log_prob_sum(lambda name, _: name == "x").detach()}, {})
        return Estimate(loss, surrogate, terms)


def test_schedules_stand_at_their_end_and_a_baseline_is_learned_first():
    """A learned centre takes away most of the score function's noise, and none of its mean."""
    with_it, without = (
        lvm.gradient_report(Pair(), X, [Shifted(learns)], num_draws=300, seed=0, groups="parameter")
        for learns in (True, False)
    )
    assert with_it[0].variance < 0.5 * without[0].variance
    expected, _ = oracles.shared_normal_gradient(X.numpy(), A, S, 0.2)["a", "path"]
    for report in (with_it, without):
        error = math.sqrt(report.variances[0]["a"].item() / 300)
        assert report.means[0]["a"].item() == pytest.approx(expected, abs=4 * error)
    plain = lvm.compare_elbos(Pair(), X, [Trace_ELBO()], num_draws=300, seed=0)[0]
    shifted = lvm.compare_elbos(Pair(), X, [Shifted(learns=False)], num_draws=300, seed=0)[0]
    assert shifted.value == pytest.approx(plain.value)  # at its start the bias would be 1 / N


class Centre(torch.nn.Module):
    """A learned baseline, as users write it: float32."""

    def __init__(self):
        super().__init__()
        self.cost = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.cost.expand(len(x)) + 0.0 * x


def test_a_baseline_is_learned_on_a_copy_in_the_dtype_of_the_data():
    def model(x):
        rates = pyro.param("rates", lambda: x.new_tensor([1.0, 4.0]))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(x.new_ones(2)))
            pyro.sample("x", dist.Normal(rates[y], 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", lambda: x.new_zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits))

    baseline = Centre()
    table = lvm.compare_elbos((model, guide), X, [lvm.elbo.ScoreFunction(1, baseline)], num_draws=5, seed=0)
    assert math.isfinite(table[0].gradient_std)
    assert baseline.cost.dtype is torch.float32
    assert baseline.cost.item() == 0.0
    assert baseline.cost.grad is None


def test_nothing_is_changed_and_the_table_prints():
    pair = Pair()
    pair.a.grad = torch.tensor(7.0, dtype=torch.float64)
    state = torch.get_rng_state()
    report = lvm.gradient_report(pair, X, [Trace_ELBO()], num_draws=3)
    assert pair.a.grad.item() == 7.0
    assert pair.a.item() == A
    assert torch.equal(torch.get_rng_state(), state)
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "estimator",
        "group",
        "entries",
        "|mean|",
        "variance",
        "SNR",
        "ms/step",
        "ms",
        "x",
        "var",
    ]
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 1 + len(report)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="num_draws is 1"):
        lvm.gradient_report(Pair(), X, [Trace_ELBO()], num_draws=1)
    with pytest.raises(ValueError, match="groups='layer' is not known"):
        lvm.gradient_report(Pair(), X, [Trace_ELBO()], groups="layer")
    with pytest.raises(TypeError, match="must be a Pyro ELBO"):
        lvm.gradient_report(Pair(), X, ["trace"])

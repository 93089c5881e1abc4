"""The pre-flight: every mistake that Pyro lets pass is refused, naming the site, the numbers, and the edit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_lvm as lvm
from pyro_lvm.data import Batch, as_rows
from pyro_lvm.elbo.estimator import make_estimator
from pyro_lvm.errors import ProgramError
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.preflight.observations import check_observations, check_support
from pyro_lvm.preflight.pair import check_pair
from pyro_lvm.preflight.tracing import traced
from pyro_lvm.program import as_program
from pyro_lvm.structure import Structure

N = 6
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def prepared(model: Any, guide: Any, x: torch.Tensor = X, size: int | None = None) -> tuple[Structure, Batch]:
    bound = BoundProgram(as_program((model, guide)))
    batch = Batch((x,), {}, size or len(x), torch.arange(len(x)))
    with isolated(0, validate=True):
        return traced(bound.model, bound.guide, batch), batch


def check(model: Any, guide: Any, elbo: Any = None, x: torch.Tensor = X, size: int | None = None) -> None:
    bound = BoundProgram(as_program((model, guide)))
    batch = Batch((x,), {}, size or len(x), torch.arange(len(x)))
    with isolated(0, validate=True):
        structure = traced(bound.model, bound.guide, batch)
        check_pair(bound, structure, make_estimator(elbo, structure), batch)


def model(x: torch.Tensor, size: int | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), 3]).to_event(1), obs=x)


def guide(x: torch.Tensor, size: int | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))


def no_guide(x: torch.Tensor, size: int | None = None) -> None:
    pass


def labels(x: torch.Tensor, size: int | None = None, how: str | None = "parallel") -> None:
    with pyro.plate("data", size or len(x), subsample=x):
        k = pyro.sample("k", dist.Categorical(x.new_ones(2)), infer={"enumerate": how} if how else {})
        pyro.sample("x", dist.Normal(k.to(x).unsqueeze(-1), x.new_ones(3)).to_event(1), obs=x)


@pytest.mark.parametrize("size", [N, 3 * N])
def test_right_programs_pass(size):
    for elbo in (None, Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO(), RenyiELBO(num_particles=1)):
        check(model, guide, elbo, size=size)
    check(model, guide, RenyiELBO())
    check(labels, no_guide, TraceEnum_ELBO(), size=size)

    def shared(x, size=None):
        m = pyro.sample("m", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.factor("nudge", -m.square().sum())
        with pyro.plate("data", size or len(x), subsample=x, dim=-1):
            pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)
            with pyro.plate("views", 4, dim=-3):
                pyro.sample("v", dist.Normal(x.new_zeros(()), 1.0), obs=x.new_zeros(4, 1, len(x)))

    check(shared, AutoNormal(shared), Trace_ELBO(), size=size)


def refused(message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ProgramError, match=f"(?s){message}"):
        check(*args, **kwargs)


def test_rows_that_the_loader_hides_and_rows_that_a_plate_draws_itself():
    def by_index(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            pyro.sample("x", dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1), obs=x)

    bound = BoundProgram(as_program((by_index, lambda x, size=None, index=None: None)))
    with isolated(0, validate=True), pytest.raises(ProgramError, match="DataLoader hides the row numbers"):
        traced(bound.model, bound.guide, Batch((X[:2],), {}, N, None))

    def own_rows(x, size=None):
        with pyro.plate("data", size or len(x), subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    check(model, own_rows)
    with pytest.raises(ProgramError, match=r"plate 'data' draws rows of its own \(6 of 18\).*subsample=index"):
        prepared(model, own_rows, size=3 * N)


def test_an_autoguide_that_meets_other_rows_than_those_it_was_fitted_to():
    auto = AutoNormal(model)
    prepared(model, auto)
    with pytest.raises(ProgramError, match=r"(?s)6 rows, but the data have 4.*only the rows it was trained on"):
        prepared(model, auto, X[:4])

    def followed(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            loc = pyro.param("loc", x.new_zeros(N), event_dim=0)
            pyro.sample("x", dist.Normal(loc.unsqueeze(-1), x.new_ones(3)).to_event(1), obs=x)

    bound = BoundProgram(as_program((followed, lambda x, size=None, index=None: None)))
    with isolated(0, validate=True):
        traced(bound.model, bound.guide, Batch((X[:2],), {}, N, torch.tensor([4, 1])))
        with pytest.raises(ProgramError, match=r"invalid shape of pyro.param.*each row"):
            traced(bound.model, bound.guide, Batch((X[:4],), {}, 4, torch.arange(4)))


def test_other_errors_of_a_program_stay_what_they_are():
    def broken(x, size=None):
        raise ValueError("the author's own words")

    with pytest.raises(ValueError, match="the author's own words") as caught:
        prepared(broken, no_guide)
    assert not isinstance(caught.value, ProgramError)


def positive(x: torch.Tensor, size: int | None = None) -> None:
    s = pyro.sample("s", dist.LogNormal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(x.new_zeros(3), s).to_event(1), obs=x)


def test_mean_field_with_an_autoguides_transform_and_why():
    """Pyro's KL of a Delta forgets the log-density that the autoguide puts there: the bound would be off by it."""
    auto = AutoNormal(positive)
    with isolated(0):
        auto(X)
    refused(r"'s' is a transformed Normal.*TraceMeanField_ELBO\(\) leaves out.*Trace_ELBO\(\)", positive, auto,
            TraceMeanField_ELBO())  # fmt: skip
    check(positive, auto, Trace_ELBO())
    with pyro.get_param_store().scope(), isolated(1):
        trace = poutine.trace(auto).get_trace(X)
        held = poutine.replay(auto, trace=trace)
        right, wrong = Trace_ELBO().loss(positive, held, X), TraceMeanField_ELBO().loss(positive, held, X)
    node = trace.nodes["s"]
    missing = node["fn"].log_density.item()
    assert missing == pytest.approx(-node["value"].log().item(), rel=1e-9)  # the Jacobian of log
    assert right - wrong == pytest.approx(missing, rel=1e-9)
    # and Trace_ELBO's value is the one by hand
    loc, scale = auto.locs.s.item(), auto.scales.s.item()
    s = node["value"].item()
    log_q = float(oracles.normal_logpdf(torch.tensor(s).log().item(), loc, scale)) + missing
    log_p = float(oracles.normal_logpdf(torch.tensor(s).log().item(), 0.0, 1.0)) + missing
    by_hand = oracles.normal_logpdf(X.numpy(), 0.0, s).sum() + log_p - log_q
    assert -right == pytest.approx(by_hand, rel=1e-6)


def test_mean_field_without_transform_is_right_also_for_an_autoguide():
    def shared(x, size=None):
        m = pyro.sample("m", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)

    check(shared, AutoNormal(shared), TraceMeanField_ELBO())


def test_mean_field_asks_for_parents_drawn_first():
    def sampled(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("k", dist.Categorical(x.new_ones(2)))

    unmarked = lambda x, size=None: labels(x, size, None)  # noqa: E731
    check(unmarked, sampled, TraceGraph_ELBO())

    def two(x, size=None):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(b, x.new_ones(3)).to_event(1), obs=x)

    def turned(x, size=None):
        b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("a", dist.Normal(b, 1.0))

    refused(r"\['a', 'b'\].*\['b', 'a'\].*reorder", two, turned, TraceMeanField_ELBO())
    check(two, turned, Trace_ELBO())


def observing(make: Any) -> Any:
    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", make(x), obs=x)

    return model


def supported(make: Any, x: Any) -> None:
    rows = as_rows(x)
    bound = BoundProgram(as_program((observing(make), no_guide)))
    first = rows.first(min(4, len(rows)))
    with isolated(0, validate=True):
        check_support(bound, traced(bound.model, bound.guide, first), first, rows)


@pytest.mark.parametrize("rows_in_a_part", [1000, 5000])
def test_the_support_of_every_row_is_checked(monkeypatch, rows_in_a_part):
    """Rows 0, 1100 and the very last: not the first batch alone."""
    monkeypatch.setattr("pyro_lvm.walk.ROWS_AT_A_TIME", rows_in_a_part)
    bits = lambda x: dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1)  # noqa: E731
    good = torch.zeros(2100, 2)
    supported(bits, good)
    for row in (0, 1100, 2099):
        bad = good.clone()
        bad[row, 1] = 0.25
        with pytest.raises(
            ValueError, match=rf"(?s)Bernoulli.*data holds 1 values.*such as 0.25 in row {row}: make them 0 or 1"
        ):
            supported(bits, bad)


def test_supports_of_other_likelihoods():
    with pytest.raises(ValueError, match=r"Poisson.*-1 in row 2: pass counts"):
        supported(lambda x: dist.Poisson(x.new_tensor(2.0)), torch.tensor([0.0, 3.0, -1.0]))
    with pytest.raises(ValueError, match=r"Categorical.*3 in row 1: number the categories"):
        supported(lambda x: dist.Categorical(torch.ones(3)), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"Uniform.*2.5 in row 1: transform"):
        supported(lambda x: dist.Uniform(0.0, 2.0), torch.tensor([0.5, 2.5]))
    with pytest.raises(ValueError, match=r"Binomial.*4 in row 1: transform"):  # the plate copies the bound for each row
        supported(lambda x: dist.Binomial(3, x.new_tensor(0.5)), torch.tensor([1.0, 4.0]))
    simplex = torch.tensor([[0.5, 0.5], [0.7, 0.7]])
    with pytest.raises(ValueError, match=r"Dirichlet.*\[0.69.*\] in row 1"):
        supported(lambda x: dist.Dirichlet(torch.ones(2)), simplex)


def test_what_cannot_be_checked_is_let_through():
    other_for_each_row = lambda x: dist.Uniform(x - 1.0, x + 1.0)  # noqa: E731
    supported(other_for_each_row, torch.tensor([0.5, 2.5]))

    class Free(dist.Normal):
        support = None  # type: ignore[assignment]

        def expand(self, batch_shape, _instance=None):
            return super().expand(batch_shape, self._get_checked_instance(Free, _instance))

    supported(lambda x: Free(0.0, 1.0, validate_args=False), torch.tensor([0.5, 2.5]))

    class Dependent(Free):
        support = torch.distributions.constraints.dependent

        def expand(self, batch_shape, _instance=None):
            return super().expand(batch_shape, self._get_checked_instance(Dependent, _instance))

    supported(lambda x: Dependent(0.0, 1.0, validate_args=False), torch.tensor([0.5, 2.5]))
    # data that the program transforms itself are no longer the argument
    supported(lambda x: dist.Normal(0.0, 1.0), torch.tensor([0.5, 2.5]))


def test_only_the_first_batch_of_a_loader():
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.tensor([0.0, 0.5, 1.0, 0.25])), batch_size=2)
    with pytest.raises(ValueError, match=r"Bernoulli.*1 values.*0.5 in row 1"):
        supported(lambda x: dist.Bernoulli(x.new_tensor(0.5)), loader)


def test_a_value_on_another_device():
    structure, batch = prepared(model, guide)
    elsewhere = replace(structure.guide["z"], value=torch.zeros(N, 2, device="meta"))
    moved = replace(structure, guide={"z": elsewhere})
    with pytest.raises(ProgramError, match=r"'z' \(.*\) has a value on meta, but the data are on cpu.*device=x.device"):
        check_observations(moved, batch)
    check_observations(replace(structure, guide={"z": replace(elsewhere, value=torch.tensor(1.0))}), batch)


def test_a_trial_hands_on_what_it_does_not_know():
    def failing(x, size=None):
        if tried:  # the trace is behind
            raise ValueError("the author's own words")
        tried.append(1)
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    tried = []
    with pytest.raises(ValueError, match="the author's own words") as caught:
        lvm.check((failing, no_guide), X)
    assert not isinstance(caught.value, ProgramError)


def test_renyi_in_minibatches_is_no_bound():
    """What is refused: with the plate scaled by s, the value is that of weights to the power s, above the evidence."""
    x = torch.full((2,), 1.5, dtype=torch.float64)

    def latent(x, size=None):
        with pyro.plate("data", size, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.3), obs=x)

    def prior(x, size=None):
        with pyro.plate("data", size, subsample=x):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    scale = 20
    with isolated(0):
        elbo = RenyiELBO(alpha=0.0, num_particles=200, vectorize_particles=True, max_plate_nesting=1)
        value = -sum(elbo.loss(latent, prior, x, size=2 * scale) for _ in range(100)) / 100
    evidence = scale * 2 * float(oracles.normal_logpdf(1.5, 0.0, (1 + 0.3**2) ** 0.5))
    assert value > evidence + 1.0

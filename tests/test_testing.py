"""The conformance kit: sound programs break no law, and a program that breaks one is told which."""

from __future__ import annotations

import dataclasses
import pickle
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import small_programs
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from small_programs import Amortised, data, process_left_alone, rows, same_state, state_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.testing import Conformance, check_program

LAWS = ["pre-flight", "gradients", "prior draws", "rows", "batch scale", "enumeration", "seeds"]
N = 40
X, ROWS = data(N), rows(N)
INDEXED = {"enumerate": "parallel"}


def applying(conformance: Conformance) -> list[str]:
    assert [law.name for law in conformance.laws] == LAWS
    for law in conformance.laws:
        assert law.reason, f"{law.name} says nothing"
        assert law.outcome in ("holds", "does not apply")
        assert law.deviation is None or law.deviation <= law.tolerance
    return [law.name for law in conformance.laws if law.outcome == "holds"]


def without(*names):
    return [law for law in LAWS if law not in names]


def refused(message, *args, **kwargs):
    with pytest.raises(lvm.ProgramError, match=f"(?s){message}") as caught:
        check_program(*args, **kwargs)
    return caught.value


# ------------------------------------------------------------------------------------------------- sound programs


def mixture_with_views(x, size=None):
    """A label for each row, seen through two views of it in a plate of their own."""
    locs = pyro.param("locs", torch.tensor([-1.0, 0.5, 2.0]))
    scale = pyro.sample("scale", dist.LogNormal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", size or len(x), subsample=x, dim=-1):
        component = pyro.sample("component", dist.Categorical(x.new_ones(3)), infer=INDEXED)
        with pyro.plate("views", 2, dim=-2):
            pyro.sample("x", dist.Normal(locs[component], scale), obs=torch.stack([x, x + 0.1]))


def guide_of_scale(x, size=None):
    m = pyro.param("m", torch.tensor(0.0))
    pyro.sample("scale", dist.LogNormal(m, 0.3))


def two_labels(x, size=None, how=None):
    """One label listed by the guide, one summed out in the model, and a Normal between them."""
    locs = pyro.param("locs", torch.tensor([[-1.0, 0.0, 1.0], [0.5, 2.0, 3.0]]))
    with pyro.plate("data", size or len(x), subsample=x):
        y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.4)))
        z = pyro.sample("z", dist.Normal(y - 0.5, 1.0))
        k = pyro.sample("k", dist.Categorical(x.new_tensor([0.2, 0.3, 0.5])), infer=INDEXED)
        pyro.sample("x", dist.Normal(pyro.ops.indexing.Vindex(locs)[y.long(), k] + z, 1.0), obs=x)


def guide_of_two_labels(x, size=None, how="parallel"):
    w = pyro.param("w", torch.tensor(0.7))
    with pyro.plate("data", size or len(x), subsample=x):
        y = pyro.sample("y", dist.Bernoulli(logits=w * x), infer={"enumerate": how})
        pyro.sample("z", dist.Normal(w * x - y, 0.5))


def sequential_guide(x, size=None):
    guide_of_two_labels(x, size, "sequential")


def per_datum(x, size=None, index=None):
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def per_datum_by_place(x, size=None):
    per_datum(x, size, x)


def guide_by_plate(x, size=None, index=None):
    n = size or len(x)
    with pyro.plate("data", n, subsample=index):
        loc = pyro.param("loc", torch.linspace(-1, 1, n), event_dim=0)
        pyro.sample("z", dist.Normal(loc, 0.5))


def guide_by_number(x, size=None, index=None):
    loc = pyro.param("loc", torch.linspace(-1, 1, size or len(x)))
    with pyro.plate("data", size or len(x), subsample=index):
        pyro.sample("z", dist.Normal(loc[index], 0.5))


def labels():
    y = torch.arange(N) % 3
    y[N // 4 :] = -1
    return y


@pytest.mark.parametrize(
    ("program", "given", "options", "inapplicable"),
    [
        ((small_programs.mixture, small_programs.nothing), X, {}, ()),
        ((small_programs.model_of_mean, small_programs.guide_of_mean), X, {}, ("enumeration",)),
        ((mixture_with_views, guide_of_scale), X, {}, ()),
        ((two_labels, guide_of_two_labels), X, {}, ()),
        ((two_labels, sequential_guide), X, {}, ()),
        ((per_datum, guide_by_plate), X, {}, ("enumeration",)),
        ((per_datum, guide_by_number), X, {}, ("enumeration",)),
        (per_datum, X, {}, ("enumeration",)),
        (per_datum, X, {"guide": "map", "batch_size": 7}, ("enumeration",)),
        (per_datum, X, {"guide": "full_rank"}, ("rows", "batch scale", "enumeration")),
        (per_datum_by_place, X, {}, ("rows", "batch scale", "enumeration")),
        ((per_datum, AutoNormal(per_datum)), X, {}, ("rows", "batch scale", "enumeration")),
    ],
)
def test_sound_functions_break_no_law(program, given, options, inapplicable):
    with process_left_alone():
        assert applying(check_program(program, given, **options)) == without(*inapplicable)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("make", "batch_size", "inapplicable"),
    [
        (Amortised, None, ("enumeration",)),
        (small_programs.Hooked, 16, ("enumeration",)),
        (lambda: lvm.PPCA(3, 2), None, ("enumeration",)),
        (lambda: lvm.FactorAnalysis(3, 2), 16, ("enumeration",)),
        (lambda: lvm.VAE(3, 2, hidden=(8,), likelihood="normal"), None, ("enumeration",)),
        (lambda: lvm.GaussianMixture(3, 3, covariance="tied"), None, ()),
        (lambda: lvm.SemiSupervisedVAE(3, 3, 2, hidden=(8,), likelihood="normal"), None, ()),
        (lambda: lvm.SemiSupervisedVAE(3, 3, 2, (8,), "normal", encoder_sees_label=False), 12, ()),
    ],
)
def test_sound_modules_break_no_law_and_are_given_back(make, batch_size, inapplicable, dtype):
    program, x = make(), ROWS.to(dtype)
    before = state_of(program)
    modes = [(inner, inner.training) for inner in program.modules()]
    first = next(program.parameters())
    first.grad = torch.full_like(first, 3.0)
    given = (x, labels()) if isinstance(program, lvm.SemiSupervisedVAE) else x
    with process_left_alone():
        conformance = check_program(program, given, batch_size=batch_size)
    assert applying(conformance) == without(*inapplicable)
    assert same_state(program, before)
    assert all(inner.training == training for inner, training in modes)
    assert first.grad.eq(3.0).all()
    assert all(p.grad is None for p in program.parameters() if p is not first)


def test_a_mixture_with_a_prior():
    prior = lvm.priors.weakly_informative(ROWS)
    conformance = check_program(lvm.GaussianMixture(2, 3, covariance="diag", prior=prior), ROWS)
    assert applying(conformance) == LAWS
    assert "weights, scales, locs, component, x with 3 and 7 rows" in conformance["prior draws"].reason


def test_a_model_whose_network_is_registered_is_given_back():
    network = nn.Linear(1, 1)  # float32 among float64 data
    before = state_of(network)

    def model(x, size=None):
        pyro.module("network", network)
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(network(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    def guide(x, size=None):
        w = pyro.param("w", torch.tensor(0.5))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(w * x, 0.5))

    assert applying(check_program((model, guide), X)) == without("enumeration")
    assert same_state(network, before)


@pytest.mark.parametrize("elbo", [Trace_ELBO(num_particles=2), TraceGraph_ELBO, RenyiELBO(num_particles=2)])
def test_gradients_are_those_of_the_estimator_asked_for(elbo):
    conformance = check_program(Amortised(), ROWS, elbo)
    kind = elbo.__name__ if isinstance(elbo, type) else type(elbo).__name__
    assert f"5 parameters under {kind}" in conformance["gradients"].reason


def test_data_by_name_and_in_a_dataset():
    assert applying(check_program(Amortised(), {"x": ROWS})) == without("enumeration")
    dataset = TensorDataset(ROWS, labels())
    ssvae = lvm.SemiSupervisedVAE(3, 3, 2, hidden=(8,), likelihood="normal")
    assert applying(check_program(ssvae, dataset)) == LAWS


def test_a_loader_cannot_be_asked_for_rows():
    with pytest.raises(TypeError, match=r"DataLoader.*pass its dataset, or the arrays"):
        check_program(Amortised(), DataLoader(TensorDataset(ROWS), batch_size=8))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_few_rows(count):
    conformance = check_program(lvm.VAE(3, 2, hidden=(8,), likelihood="normal"), ROWS[:count])
    few = ("rows", "batch scale") if count == 1 else ()
    assert applying(conformance) == without("enumeration", *few)
    if count == 1:
        assert conformance["rows"].reason == "the data have one row"
    assert f"with {3 if count != 3 else 7} and" in conformance["prior draws"].reason


# --------------------------------------------------------------------------------------------- what says why it is not


def test_a_program_that_takes_all_rows_at_a_time():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def by_place(x):
        loc = pyro.param("loc", torch.linspace(-1, 1, len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    conformance = check_program((model, by_place), X)
    assert applying(conformance) == without("rows", "batch scale", "enumeration")
    assert "'loc' has an entry for each of 40 rows" in conformance["rows"].reason
    assert "does not name `size`" in conformance["batch scale"].reason
    assert f"with {N} rows" in conformance["prior draws"].reason

    def of_x(x):
        w = pyro.param("w", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(w * x, 1.0))

    assert applying(check_program((model, of_x), X)) == without("batch scale", "enumeration")


def test_enumeration_that_nobody_sums_by_hand():
    def reason(model, guide=small_programs.nothing, given=X):
        conformance = check_program((model, guide), given)
        assert conformance["enumeration"].outcome == "does not apply"
        return conformance["enumeration"].reason

    def chain(x, size=None):
        locs, k = pyro.param("locs", torch.tensor([-1.0, 1.0])), 0
        stay = x.new_tensor([[0.8, 0.2], [0.3, 0.7]])
        with pyro.plate("data", size or len(x), subsample=x):
            for t in pyro.markov(range(3)):
                k = pyro.sample(f"k{t}", dist.Categorical(stay[k]), infer=INDEXED)
                pyro.sample(f"x{t}", dist.Normal(locs[k], 1.0), obs=x[:, t])

    def many(x, size=None):
        locs = pyro.param("locs", torch.linspace(-1, 1, 65))
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(x.new_ones(65)), infer=INDEXED)
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    def in_features(x, size=None):
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", size or len(x), subsample=x, dim=-1), pyro.plate("feature", 3, dim=-2):
            k = pyro.sample("k", dist.Categorical(x.new_ones(2)), infer=INDEXED)
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x.T)

    def weighted(x, size=None):
        with poutine.scale(scale=0.5):
            small_programs.mixture(x, size)

    assert "pyro.markov" in reason(chain, given=ROWS)
    assert "65 assignments" in reason(many)
    assert "stands in 'feature', 'data'" in reason(in_features, given=ROWS)
    assert "poutine.scale" in reason(weighted)


def test_noise_that_is_no_sample_site_is_named():
    class Noisy(Changed):
        def seen(self, x):
            return x + 0.1 * torch.randn_like(x)

    conformance = check_program(Noisy(), ROWS)
    assert applying(conformance) == without("rows", "batch scale", "enumeration")
    assert "noise that is no sample site" in conformance["rows"].reason


def test_parameters_that_nothing_moves_are_a_note():
    class Idle(Amortised):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(2))
            self.cancelled = nn.Parameter(torch.zeros(()))

        def model(self, x, size=None):
            return super().model(x + 0.0 * self.cancelled, size)

    reason = check_program(Idle(), ROWS)["gradients"].reason
    assert "without a gradient: unused" in reason
    assert "gradient zero everywhere: cancelled" in reason


# ---------------------------------------------------------------------------------------------------- broken programs


def test_the_pre_flight_speaks_for_itself():
    refused("'loc' .*has no site in the guide", (small_programs.model_of_mean, small_programs.nothing), X)


def test_warnings_of_the_pre_flight_stand_in_the_record():
    def guide(x, size=None):
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(m, 1.0).expand([len(x), 2]).to_event(1))

    conformance = check_program((Amortised().model, guide), ROWS)
    assert "all 40 rows get one q(z)" in conformance["pre-flight"].reason
    assert conformance.report.warnings


class Changed(Amortised):
    """A sound program, of which each test below spoils one thing."""

    def model(self, x=None, size=None):
        rows = size if x is None else len(x)
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(self.log_scale.new_zeros(2), 1.0).expand([rows, 2]).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(self.encoder(self.seen(x)), self.log_scale.exp()).to_event(1))

    def seen(self, x):
        return x


def test_the_program_that_is_spoilt_is_sound():
    assert applying(check_program(Changed(), ROWS)) == without("enumeration")


def test_gradients_that_are_not_finite():
    class Root(Changed):
        def __init__(self):
            super().__init__()
            self.raw = nn.Parameter(torch.zeros(()))

        def model(self, x=None, size=None):
            pyro.factor("root", -self.raw.square().sqrt())
            return super().model(x, size)

    refused(
        r"law 'gradients' is broken: the loss is [\d.]+, finite, but 1 of 1 entries.*'raw'.*nan.*1e-12", Root(), ROWS
    )

    class Infinite(Changed):
        def model(self, x=None, size=None):
            pyro.factor("log", -self.log_scale.square().sum().log())
            return super().model(x, size)

    refused("law 'gradients' is broken: the loss of 40 rows is (-?inf|nan) at the start", Infinite(), ROWS)


def test_prior_draws_of_the_wrong_shape():
    class OneMore(Changed):
        def model(self, x=None, size=None):
            return super().model(x, size + 1 if x is None else size)

    refused(
        r"law 'prior draws' is broken: model\(x=None, size=3\) draws site 'z'.* \(4, 2\), where 3 rows.*\(3, 2\)",
        OneMore(),
        ROWS,
    )

    class Fixed(Changed):
        def model(self, x=None, size=None):
            return super().model(x, 10 if x is None else size)

    refused(r"size=3\) draws site 'z'.*shape \(10, 2\)", Fixed(), ROWS)


def test_prior_draws_that_lack_a_site_observe_or_raise():
    class Lacking(Changed):
        def model(self, x=None, size=None):
            if x is None:
                with pyro.plate("data", size):
                    return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return super().model(x, size)

    class Observing(Changed):
        def model(self, x=None, size=None):
            return super().model(ROWS[:size] if x is None else x, size)

    class Raising(Changed):
        def model(self, x=None, size=None):
            return super().model(x, size) if len(x) else None

    refused(r"law 'prior draws'.*size=3\) draws no site 'x'", Lacking(), ROWS)
    refused(r"law 'prior draws'.*size=3\) observes site 'x'.*obs=x", Observing(), ROWS)
    refused(r"law 'prior draws'.*size=3\) raised TypeError: object of type 'NoneType' has no len", Raising(), ROWS)


@pytest.mark.parametrize(
    "shift",
    [
        lambda x: torch.linspace(0, 1, len(x), dtype=x.dtype).unsqueeze(-1),
        lambda x: 0.1 * x.cumsum(0),
        lambda x: x[:1],
    ],
)
def test_rows_that_depend_on_their_place(shift):
    class Placed(Changed):
        def model(self, x, size=None):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x + shift(x)), 1.0).to_event(1))

    placed = Placed()
    whole_only = lambda x: placed.model(x)  # noqa: E731
    refused(r"law 'rows' is broken: 40 rows have loss [\d.]+ nats, and [\d.]+ nats", (whole_only, placed.guide), ROWS)


class Spoilt(Changed):
    """Parts of a batch that its rows see."""

    def seen(self, x):
        return x - x.mean(0)


def test_batches_whose_rows_see_each_other():
    refused(
        r"law 'batch scale' is broken: all 40 rows have loss [\d.]+ nats, but .* batches of 16, 16, 8 rows",
        Spoilt(),
        ROWS,
    )
    refused(r"law 'batch scale' is broken.* batches of 7, 7, \.\.\., 5 rows", Spoilt(), ROWS, batch_size=7)
    refused("law 'batch scale' is broken", Spoilt(), ROWS.float())


def test_a_dependence_that_the_start_hides():
    class Zero(Changed):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.encoder.weight)

        def seen(self, x):
            return x - x.mean(0)

    refused("law 'batch scale' is broken", Zero(), ROWS)


def test_terms_that_are_scaled_by_hand():
    class Penalised(Changed):
        def model(self, x=None, size=None):
            if x is not None:
                pyro.factor("penalty", -len(x) * self.decoder.weight.square().sum())
            return super().model(x, size)

    refused("law 'batch scale' is broken.*take nothing from the other rows", Penalised(), ROWS)

    class Divided(Changed):
        def model(self, x=None, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)
                pyro.factor("penalty", -self.decoder.weight.square().sum() / len(x))

    divided = Divided()
    refused("law 'batch scale' is broken", (lambda x, size=None: divided.model(x, size), divided.guide), ROWS)


def test_a_global_guide_that_sees_the_batch():
    def guide(x, size=None):
        s = pyro.param("s", torch.tensor(0.5))
        pyro.sample("loc", dist.Normal(x.mean(), s.exp()))

    refused("law 'batch scale' is broken", (small_programs.model_of_mean, guide), X)


def test_a_batch_that_the_pre_flight_does_not_take():
    def unscaled(x, size=None):
        locs = pyro.param("locs", torch.tensor([-1.0, 2.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(x.new_ones(2)), infer=INDEXED)
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    refused(
        "law 'batch scale' is broken: the pre-flight in batches of 16 of 40 rows raised ProgramError: .*drop `size`",
        (unscaled, small_programs.nothing),
        X,
    )


def spoilt_mixture(loc):
    def model(x, size=None):
        locs = pyro.param("locs", torch.tensor([-1.0, 2.0]))
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Categorical(x.new_tensor([0.3, 0.7])), infer=INDEXED)
            pyro.sample("x", dist.Normal(loc(locs, k), 1.0), obs=x)

    return model, small_programs.nothing


@pytest.mark.parametrize(
    "loc",
    [
        lambda locs, k: locs[k] - locs[k].mean(0),
        lambda locs, k: locs[k] * k.double().mean(),
        lambda locs, k: locs[k] if k.max() > 0 else locs[k] + 1.0,
    ],
)
def test_enumeration_that_mixes_values(loc):
    assert applying(check_program(spoilt_mixture(lambda locs, k: locs[k]), X)) == LAWS
    refused(
        r"law 'enumeration' is broken: summed out by enumeration 'k' gives the loss [\d.]+ nats, .* by hand.*Vindex",
        spoilt_mixture(loc),
        X,
    )


def test_enumeration_in_the_guide_that_mixes_values():
    def guide(x, size=None):
        w = pyro.param("w", torch.tensor(0.7))
        with pyro.plate("data", size or len(x), subsample=x):
            y = pyro.sample("y", dist.Bernoulli(logits=w * x), infer=INDEXED)
            pyro.sample("z", dist.Normal(w * x - y.mean(0), 0.5))

    refused("law 'enumeration' is broken.*'k', 'y'", (two_labels, guide), X)


def test_a_value_that_does_not_come_alone():
    refused(
        r"law 'enumeration' is broken: a run with 'k' = 1 in all rows raised IndexError",
        spoilt_mixture(lambda locs, k: locs[: len(k.unique())][k]),
        X,
    )


def global_states():
    return pickle.dumps((random.getstate(), np.random.get_state()))  # noqa: NPY002


def with_noise(noise):
    class Noisy(Changed):
        def seen(self, x):
            return x + noise()

    return Noisy()


def test_generators_that_no_seed_reaches():
    before = global_states()
    generator = torch.Generator().manual_seed(0)
    own = with_noise(lambda: torch.randn((), generator=generator, dtype=torch.float64))
    for program in (own, with_noise(random.random), with_noise(np.random.rand)):
        refused(r"law 'seeds' is broken: two evaluations from one random state .* pyro.sample", program, ROWS)
    assert global_states() == before


def test_generators_that_are_moved_although_nothing_depends_on_them():
    before = global_states()
    refused(
        r"law 'seeds'.*moves the process's random state \(Python's random\)",
        with_noise(lambda: 0 * random.random()),
        ROWS,
    )
    refused(r"law 'seeds'.*moves.*\(NumPy's global\)", with_noise(lambda: 0 * np.random.rand()), ROWS)  # noqa: NPY002
    assert global_states() == before


def test_a_program_that_seeds_torch():
    class Seeding(Changed):
        def seen(self, x):
            torch.manual_seed(1)
            return x

    refused(r"law 'seeds' is broken: from the seeds 0 and 1 .* Drop torch.manual_seed", Seeding(), ROWS)


def test_state_that_no_module_keeps():
    counted = []

    class Annealed(Changed):
        def auxiliary_loss(self, x):
            if torch.is_grad_enabled():
                counted.append(1)
            return len(counted) * self.decoder.weight.square().sum()

    refused(
        r"law 'seeds' is broken: two fits of 2 steps with seed 0 from one start .*'decoder|history", Annealed(), ROWS
    )


# --------------------------------------------------------------------------------------------------------- the record


def test_a_broken_program_is_given_back_as_well():
    program = Spoilt()
    before = state_of(program)
    with process_left_alone():
        refused("law 'batch scale'", program, ROWS)
    assert same_state(program, before)


def test_the_record_is_frozen_and_can_be_read():
    conformance = check_program((small_programs.mixture, small_programs.nothing), X)
    text = str(conformance).splitlines()
    assert text[0] == "(mixture, nothing)"
    assert text[1].split() == ["law", "outcome", "deviation", "measured"]
    assert len(text) == 2 + len(LAWS)
    assert "40 rows in batches of 16, 16, 8" in text[6]
    assert conformance["enumeration"].tolerance == 1e-8
    with pytest.raises(dataclasses.FrozenInstanceError):
        conformance.laws = ()
    with pytest.raises(KeyError, match="no law is called 'speed': the laws are pre-flight, gradients"):
        conformance["speed"]


def test_the_seed_decides():
    program = (small_programs.mixture, small_programs.nothing)
    one, other = (check_program(program, X, TraceEnum_ELBO(), seed=5) for _ in range(2))
    assert one.laws == other.laws

"""The score function estimator: what it refuses, what its baselines are, and that it runs wherever an ELBO runs."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from draws_of_gradients import VALUE, Linear, OfTen, X, draws, prepared
from pyro.infer import SVI
from small_programs import Labels, data, guide_of_mean, model_of_mean
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.elbo import ScoreFunction
from pyro_lvm.parameters import isolated


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def reset_parameters(self):
        self.layer.reset_parameters()

    def forward(self, x):
        return self.layer(x[:, None])[:, 0]


def clusters():
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.randn(40, generator=generator) * 0.5 + loc for loc in (-3.0, 0.0, 3.0)])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="num_particles is 0: it must be at least 1"):
        ScoreFunction(0)
    with pytest.raises(ValueError, match=r"num_particles is 1, but .* mean of the others: use at least 2"):
        ScoreFunction(1, "rloo")
    with pytest.raises(TypeError, match="baseline='mean' is not known: use None, 'rloo', 'average', or a"):
        ScoreFunction(1, "mean")
    with pytest.raises(ValueError, match=r"decay is 1.0: it must be at least 0 and below 1"):
        ScoreFunction(1, "average", decay=1.0)


@pytest.mark.parametrize("elbo", [ScoreFunction(4, "rloo"), ScoreFunction(2, "average"), ScoreFunction(2)], ids=repr)
def test_a_fit_reaches_what_enumeration_reaches(elbo):
    x = clusters()
    fit = lvm.fit(Labels(dist.Categorical), x, elbo=elbo, steps=600, lr=0.03, seed=0)
    evidence = exact_evidence(fit.params["locs"], x)
    assert evidence - 0.15 < fit.elbo <= evidence + 0.01


def exact_evidence(locs, x):
    return dist.Normal(locs, 1.0).log_prob(x[:, None]).sub(torch.tensor(3.0).log()).logsumexp(-1).mean().item()


def test_a_learned_baseline_is_trained_to_predict_the_cost():
    x = clusters()
    learned = Learned()
    lvm.fit(Labels(dist.Categorical), x, elbo=ScoreFunction(2, learned), steps=600, lr=0.03, seed=0)
    assert learned.layer.bias.item() == pytest.approx(2.0, abs=0.7)  # about minus the bound of a datum


def test_the_learned_baselines_own_gradient_reaches_nothing_else():
    """With a module that says nought, the program's gradient is that of no baseline at all, to the bit."""
    program, learned = OfTen(50), Linear(0.0, 0.0)
    with_module, _ = draws(ScoreFunction(2, learned), program)
    without, _ = draws(ScoreFunction(2), program)
    assert all(torch.equal(with_module[name], without[name]) for name in without)


def test_the_learned_baselines_gradient_is_that_of_its_squared_error():
    program, learned = OfTen(20_000), Linear(0.3, -0.2)
    draws(ScoreFunction(1, learned), program)
    predicted = 0.3 * X - 0.2
    # the mean of 2 (b - c) over draws of c, whose mean is minus the bound
    assert learned.offset.grad.item() / 20_000 == pytest.approx(2 * (predicted + VALUE), abs=0.05)
    assert learned.slope.grad.item() == pytest.approx(X * learned.offset.grad.item(), rel=1e-9)


def test_the_average_is_of_earlier_steps_and_starts_with_none():
    n = 2000
    x = torch.full((n,), X, dtype=torch.float64)
    with isolated(0, validate=False):
        estimator, bound, batch = prepared(ScoreFunction(1, "average", decay=0.5), OfTen(n), x)
        elbo, parameters = estimator.elbo, list(bound.trainable().values())
        assert elbo.tensors() == ()
        for step in range(3):
            estimator.step(bound, batch, parameters, None, 1)
            (average,) = elbo.tensors()
            assert average[1].item() == pytest.approx(1 - 0.5 ** (step + 1))
            assert (average[0] / average[1]).item() == pytest.approx(-VALUE, abs=0.15)
        estimator.advance(0.0)
        assert average.tolist() == [0.0, 0.0]


def test_two_fits_with_one_instance_do_not_share_an_average():
    x, elbo = clusters(), ScoreFunction(2, "average")
    first = lvm.fit(Labels(dist.Categorical), x, elbo=elbo, steps=10, lr=0.03, seed=0)
    torch.manual_seed(0)
    second = lvm.fit(first.program, x, elbo=elbo, steps=10, lr=0.03, seed=0)
    assert elbo.tensors() == ()
    assert second.info["estimator"] == "ScoreFunction(num_particles=2, baseline='average')"


def test_a_check_changes_nothing():
    def trained(check):
        torch.manual_seed(0)
        elbo = ScoreFunction(2, "average")
        return lvm.fit(Labels(dist.Categorical), clusters(), elbo=elbo, steps=20, lr=0.03, seed=0, check=check).params

    with_check, without = trained(True), trained(False)
    assert all(torch.equal(with_check[name], without[name]) for name in without)


@pytest.mark.parametrize("baseline", ["rloo", "average", "learned"])
def test_captured_steps_train_to_the_same_bits(baseline):
    def trained(capture):
        torch.manual_seed(0)
        program, module = Labels(dist.Categorical), Learned()
        elbo = ScoreFunction(2, module if baseline == "learned" else baseline)
        fit = lvm.fit(program, clusters(), elbo=elbo, steps=40, batch_size=40, lr=0.03, seed=0, capture=capture)
        assert fit.info["capture"] == (capture or "eager")
        return {**fit.params, **{name: p.detach() for name, p in module.named_parameters()}}

    captured, eager = trained("graph"), trained(False)
    assert all(torch.equal(captured[name], eager[name]) for name in eager)


@pytest.mark.parametrize("vectorize", [True, False])
def test_minibatches_of_all_rows_weigh_as_the_whole(vectorize):
    """The loss does not hang on how rows are dealt out: its mean over batches is the loss of all, in expectation."""
    x = clusters().double()
    program = Labels(dist.Categorical).double()

    def mean_loss(rows):
        with isolated(1, validate=False):
            estimator, bound, batch = prepared(
                ScoreFunction(500, vectorize_particles=vectorize), program, x[rows], size=len(x)
            )
            return estimator.evaluate(bound, batch)[0].item() / len(x)

    num = len(x) if vectorize else 12
    whole = mean_loss(slice(0, num))
    parts = [mean_loss(slice(start, start + num // 3)) for start in range(0, num, num // 3)]
    assert sum(parts) / 3 == pytest.approx(whole, abs=0.08)


def test_a_module_that_does_not_give_a_number_for_each_row_is_refused():
    class Flat(nn.Module):
        def forward(self, x):
            return x.new_zeros(len(x), 1)

    with pytest.raises(lvm.ProgramError, match=r"Flat gave shape \(120, 1\) for guide site 'y', whose plates have the"):
        lvm.fit(Labels(dist.Categorical), clusters(), elbo=ScoreFunction(1, Flat()), steps=1)


def test_a_module_is_no_baseline_of_a_site_that_all_data_share():
    def model(x, size=None):
        shared = pyro.sample("shared", dist.Bernoulli(0.5))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(shared, 1.0), obs=x)

    def guide(x, size=None):
        pyro.sample("shared", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))

    x = data(dtype=torch.float32)
    with pytest.raises(lvm.ProgramError, match=r"'shared' .*is shared by all data.*use baseline='rloo'"):
        lvm.fit((model, guide), x, elbo=ScoreFunction(1, Learned()), steps=1)
    fit = lvm.fit((model, guide), x, elbo=ScoreFunction(4, "rloo"), steps=200, lr=0.1, seed=0)
    assert fit.params["logit"] > 3  # the data lie around one


def test_a_site_that_is_marked_for_enumeration_is_refused():
    with pytest.raises(lvm.ProgramError, match=r"enumerated, but ScoreFunction.* cannot sum it out"):
        lvm.fit(OfTen(4, mark="parallel"), torch.ones(4, dtype=torch.float64), elbo=ScoreFunction(), steps=1)


def test_parts_of_the_bound_are_those_of_the_draws():
    n = 20_000
    with isolated(0, validate=False):
        estimator, bound, batch = prepared(ScoreFunction(2, "rloo"), OfTen(n), torch.full((n,), X).double())
        loss, terms = estimator.step(bound, batch, list(bound.trainable().values()), None, 1)
    assert set(terms.reconstruction) == {"x"}
    assert set(terms.kl) == {"y"}
    assert terms.elbo.item() == pytest.approx(-loss.item(), rel=1e-12)
    assert terms.elbo.item() / n == pytest.approx(VALUE, abs=0.02)


def test_it_trains_in_plain_svi_baseline_and_all():
    x, learned, program = clusters(), Learned(), Labels(dist.Categorical)

    def model(x):
        pyro.module("program", program)
        program.model(x)

    with pyro.get_param_store().scope():
        svi = SVI(model, program.guide, pyro.optim.Adam({"lr": 0.03}), ScoreFunction(2, learned))
        before = learned.layer.bias.item()
        losses = [svi.step(x) for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert learned.layer.bias.item() > before + 0.5


def test_with_nothing_to_score_it_is_the_plain_estimator():
    fit = lvm.fit((model_of_mean, guide_of_mean), data(), elbo=ScoreFunction(2, "rloo"), steps=300, lr=0.05, seed=0)
    assert fit.params["m"].item() == pytest.approx(data().mean().item(), abs=0.15)


def test_a_program_that_does_not_broadcast_is_told_how_to_go_on():
    class Stacked(Labels):
        def model(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                y = pyro.sample("y", dist.Categorical(x.new_ones(3)))
                pyro.sample("x", dist.Normal(torch.cat([self.locs[y]] * 2)[: len(x)], 1.0), obs=x)

    x = clusters()
    with pytest.raises(
        lvm.ProgramError, match=r"4 particles in one pass.*does not broadcast.*vectorize_particles=False"
    ):
        lvm.fit(Stacked(dist.Categorical), x, elbo=ScoreFunction(4), steps=1)
    lvm.fit(Stacked(dist.Categorical), x, elbo=ScoreFunction(4, vectorize_particles=False), steps=1, seed=0)

"""Simulation-based calibration: uniform ranks for an exact guide, and the alarm for every way to be wrong."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from small_programs import process_left_alone

import pyro_lvm as lvm
from pyro_lvm.criticism.calibration import rank_finding, ranks_of


class Line(torch.nn.Module):
    """z_i ~ N(0, I_2), x_i ~ N(z_i, 1), so that p(z | x) = N(x / 2, 1 / 2); the guide is moved and stretched."""

    def __init__(self, stretch=1.0, shift=0.0):
        super().__init__()
        self.stretch, self.shift = stretch, shift

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        scale = math.sqrt(0.5)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(x / 2 + self.shift * scale, self.stretch * scale).to_event(1))


X = torch.zeros(250, 2, dtype=torch.float64)  # only their number counts


def test_an_exact_guide_has_uniform_ranks():
    found = lvm.calibration(Line(), X, seed=0)
    assert found.verdict == "fine"
    assert found["ranks"].shape == (1000, 2)
    assert found["ranks"].min() == 0
    assert found["ranks"].max() == 99
    for column, p in zip(found["ranks"].T, found["p_values"], strict=True):
        assert scipy.stats.kstest((column.numpy() + 0.5) / 100, "uniform").pvalue > 1e-3
        counts = np.bincount(column.numpy() // 5, minlength=20)
        assert p.item() == pytest.approx(scipy.stats.chisquare(counts).pvalue)
    assert found["coverage_90"] == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / 2000))
    assert found["coverage_50"] == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 2000))


@pytest.mark.parametrize(("stretch", "words"), [(0.5, "too narrow"), (2.0, "too wide")])
def test_a_guide_with_another_scale_is_caught_with_the_coverage_that_theory_gives_it(stretch, words):
    found = lvm.calibration(Line(stretch), X, seed=0)
    assert found.verdict == "wrong"
    assert words in found.advice
    for level in (0.5, 0.9):
        expected = oracles.coverage_of_a_stretched_normal(level, stretch)
        assert found[f"coverage_{100 * level:.0f}"] == pytest.approx(expected, abs=0.03)


def test_a_guide_beside_the_posterior_is_caught():
    assert lvm.calibration(Line(shift=1.0), X, seed=0).verdict == "wrong"
    assert lvm.calibration(Line(shift=0.2), X, seed=0, num_simulations=4000).verdict in ("look", "wrong")


def test_diagnose_tells_the_same():
    sick = lvm.diagnose(Line(0.5), X + 0.1, num_samples=25, seed=0)
    assert sick["calibration"].verdict == "wrong"
    assert lvm.diagnose(Line(), X + 0.1, num_samples=25, seed=0)["calibration"].verdict == "fine"


def test_covariates_stay_and_several_arguments_are_told_apart():
    class Regression(torch.nn.Module):
        def model(self, c, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                z = pyro.sample("z", dist.Normal(c, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, c, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample("z", dist.Normal((c + x) / 2, math.sqrt(0.5)))

    c = torch.linspace(-20.0, 20.0, 300, dtype=torch.float64)
    assert lvm.calibration(Regression(), (c, torch.zeros(300).double()), seed=0).verdict == "fine"
    assert lvm.calibration(Regression(), {"x": torch.zeros(300).double(), "c": c}, seed=0).verdict == "fine"


def test_listed_labels_are_ranked_too():
    """p(k | x) is Bayes' rule, the guide of z given nothing but x is the mixture's posterior only where k is known."""

    def model(x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    def guide(x, size=None):
        logits = 2 * x - 2 + math.log(0.3 / 0.7)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("k", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})

    x = torch.zeros(300, dtype=torch.float64)
    assert lvm.calibration((model, guide), x, seed=0).verdict == "fine"


def model_of_location(x, size=None):
    m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 2.0))
    with pyro.plate("data", size or len(x), subsample=x):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def solved(x, stretch=1.0):
    """What a fit would end with: the exact posterior of the location, or one stretched."""
    loc, scale = oracles.conjugate_normal_posterior(x.numpy(), 0.0, 2.0, 1.0)
    return model_of_location, lambda x, size=None: pyro.sample("m", dist.Normal(x.new_tensor(loc), stretch * scale))


def test_what_all_data_share_is_ranked_after_refits():
    x = torch.zeros(20, dtype=torch.float64)
    fine = lvm.calibration(solved(x), x, refit=solved, num_simulations=100, num_draws=19, seed=1)
    assert fine.verdict == "fine"
    assert fine["ranks"].shape == (100, 1)
    narrow = lvm.calibration(
        solved(x), x, refit=lambda data: solved(data, 0.3), num_simulations=100, num_draws=19, seed=1
    )
    assert narrow.verdict == "wrong"
    assert "too narrow" in narrow.advice


def test_ties_are_broken_by_lot():
    truth, draws = torch.ones(4000, 1), torch.ones(9, 4000, 1)
    ranks = ranks_of(truth, draws, 4000, seed=0).flatten()
    assert scipy.stats.chisquare(np.bincount(ranks.numpy(), minlength=10)).pvalue > 1e-3
    below = ranks_of(truth, draws - 1, 4000, seed=0)
    assert below.eq(9).all()


def test_one_entry_of_many_is_enough_and_no_entry_is_too_many():
    draw = np.random.default_rng(1)
    sound = draw.integers(0, 100, size=(500, 300))
    found = rank_finding(torch.from_numpy(sound), 99)
    assert found.verdict == "fine"
    assert found["p_values"].min() < 0.01  # of three hundred entries one is unlikely, and that is likely
    sound[:, 7] = draw.integers(0, 40, size=500)
    assert rank_finding(torch.from_numpy(sound), 99).verdict == "wrong"


def test_ranks_that_are_off_by_little_are_looked_at_and_no_more():
    draw = np.random.default_rng(0)
    ranks = torch.from_numpy((100 * draw.beta(1.06, 1.06, size=(40_000, 1))).astype(int))
    assert rank_finding(ranks, 99).verdict == "look"


def test_a_seed_fixes_the_numbers_and_nothing_moves():
    with process_left_alone():
        first, second, third = (
            lvm.calibration(Line(), X, num_simulations=20, num_draws=19, seed=seed) for seed in (5, 5, 6)
        )
    assert torch.equal(first["ranks"], second["ranks"])
    assert not torch.equal(first["ranks"], third["ranks"])


def test_what_cannot_be_simulated_is_refused():
    x = torch.zeros(20, dtype=torch.float64)
    with pytest.raises(lvm.ProgramError, match=r"all data share m.*refit=lambda"):
        lvm.calibration(solved(x), x)
    with pytest.raises(ValueError, match="num_draws is 5"):
        lvm.calibration(Line(), X, num_draws=5)
    with pytest.raises(ValueError, match="num_simulations is 10"):
        lvm.calibration(Line(), X, num_simulations=10)

    class Squared(Line):
        def model(self, x, size=None):
            super().model(x.square() + 1.0, size)

    with pytest.raises(lvm.ProgramError, match=r"'x'.*none of the program's arguments"):
        lvm.calibration(Squared(), X)
    assert "none of the program's arguments" in lvm.diagnose(Squared(), X + 0.1, num_samples=25).skipped["calibration"]

    y = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(0))
    y[20:] = -1
    bits = (torch.rand(40, 6, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    with pytest.raises(lvm.ProgramError, match="the guide clamps y"):
        lvm.calibration(lvm.SemiSupervisedVAE(6, 3, 2, hidden=(4,)), (bits, y))

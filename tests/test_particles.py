"""Several draws in one pass give what single ones give, and a program that cannot take them is found out."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_lvm as lvm
from pyro_lvm.criticism.particles import Passes
from pyro_lvm.criticism.weights import from_guide, local_log_weight
from pyro_lvm.evaluation import Evaluation

N = 7
X = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class CountingPasses:
    """A model and guide that note how many draws each of their passes holds."""

    def __init__(self, sums: str = "row") -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.sums = sums

    def model(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            self.shapes.append(tuple(z.shape))
            if self.sums == "mixes" and z.dim() > 1:
                z = 0.5 * (z + z.flip(0))  # broadcasts, and every draw sees another's
            if self.sums == "needs one dim":
                (_,) = z.shape
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("z", dist.Normal(0.7 * x, 0.5))


TRUTH = oracles.normal_logpdf(X.numpy(), 0.0, math.sqrt(1.25))


def test_a_program_that_broadcasts_is_drawn_many_at_a_time():
    program = CountingPasses()
    found = lvm.log_evidence(program, X, 1000, seed=0, method="importance", batch_size=250 * N, return_diagnostics=True)
    passes = [shape for shape in program.shapes if len(shape) > 1]
    assert passes == [(250, N)] * 4
    assert len(program.shapes) < 12
    assert np.all(np.abs(found.log_evidence.numpy() - TRUTH) < 4.5 * found.standard_error.numpy())


@pytest.mark.parametrize("kind", ["mixes", "needs one dim"])
def test_a_program_that_does_not_is_drawn_one_at_a_time(kind):
    program = CountingPasses(kind)
    found = lvm.log_evidence(program, X, 300, seed=0, method="importance", return_diagnostics=True)
    assert sum(len(shape) > 1 for shape in program.shapes) == 1
    assert sum(len(shape) == 1 for shape in program.shapes) >= 300
    assert np.all(np.abs(found.log_evidence.numpy() - TRUTH) < 4.5 * found.standard_error.numpy())


def test_passes_hold_no_more_rows_than_they_may():
    program = CountingPasses()
    lvm.log_evidence(program, X, 50, seed=0, method="importance", batch_size=3)
    assert max(math.prod(shape) for shape in program.shapes[1:]) <= 3  # the first has all rows, to see the program
    program.shapes.clear()
    lvm.log_evidence(program, X, 50, seed=0, method="naive", batch_size=20)
    assert max(math.prod(shape) for shape in program.shapes) <= 20


def test_weights_together_are_the_weights_alone():
    """Of given draws, in every built-in program: the same to the last digits."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model = lvm.PPCA.closed_form(x, 2)
    with torch.no_grad():
        model._standard_guide_weight *= 0.7
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = lvm.VAE(4, 2, hidden=(5,), likelihood="normal").double()
        ssvae = lvm.SemiSupervisedVAE(4, 3, 2, hidden=(5,)).double()
    bits, labels = (x > 0).double(), torch.arange(12) % 4 - 1
    for program, data in ((model, x), (vae, x), (ssvae, (bits, labels))):
        evaluation = Evaluation.of(program, data)
        structure, batch = evaluation.structure, evaluation.rows.whole()
        passes = Passes(from_guide(evaluation.bound, structure), lambda draw: local_log_weight(draw, "data"), 100_000)
        with evaluation.running(0), torch.no_grad():
            ((_, weights),) = passes.draws(batch, 6)
        assert passes.broadcasts
        assert weights.shape == (6, 12)


class OneNoise(dist.Normal):
    """A normal distribution that gives all draws side by side one noise: every density is right, no draw is new."""

    def rsample(self, sample_shape=()):
        noise = torch.randn(self.batch_shape[-1], dtype=self.loc.dtype)
        return self.loc + self.scale * noise


def test_noise_that_all_draws_share_is_found_out():
    class Program(CountingPasses):
        def guide(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=x):
                pyro.sample("z", OneNoise(0.7 * x, 0.5))

    program = Program()
    found = lvm.log_evidence(program, X, 300, seed=0, method="importance", return_diagnostics=True)
    assert sum(len(shape) == 1 for shape in program.shapes) >= 300
    assert np.all(np.abs(found.log_evidence.numpy() - TRUTH) < 4.5 * found.standard_error.numpy())

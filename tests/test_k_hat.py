"""The Pareto tail index, against tails that are known and against ArviZ itself."""

from __future__ import annotations

import importlib

import arviz
import numpy as np
import oracles
import pytest
import torch

from pyro_lvm.criticism.k_hat import k_hat


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_ratio(guide_scale, draws, columns, seed=0):
    """log N(z; 0, 1) - log N(z; 0, s) for z from the second, up to a constant."""
    z = guide_scale * torch.randn(draws, columns, generator=generator(seed), dtype=torch.float64)
    return -0.5 * z.square() * (1 - guide_scale**-2)


@pytest.mark.parametrize("guide_scale", [0.3, 0.5, 0.7, 0.9])
def test_a_narrow_normal_guide_has_the_index_that_theory_gives_it(guide_scale):
    found = k_hat(log_ratio(guide_scale, 20_000, 20))
    # the tail is a Pareto tail times a slow logarithm, which the largest draws still feel
    assert found.mean().item() == pytest.approx(oracles.normal_tail_index(guide_scale, 1.0), abs=0.09)


def test_a_wide_guide_has_bounded_weights_and_a_negative_index():
    assert k_hat(log_ratio(1.2, 2_000, 5)).max() < 0.0
    assert k_hat(-log_ratio(1.2, 2_000, 5)).min() > 0.0  # the other tail: minus the weights is another question


@pytest.mark.parametrize("k", [0.2, 0.7, 1.5])
def test_a_generalised_pareto_sample_gives_its_shape(k):
    uniform = torch.rand(4_000, 50, generator=generator(1), dtype=torch.float64)
    found = k_hat(((uniform**-k - 1) / k).log())
    assert found.mean().item() == pytest.approx(k, abs=4 * found.std().item() / np.sqrt(50) + 0.03)


def test_it_is_arviz_s_number_whatever_the_shape_and_the_constant():
    log_weights = log_ratio(0.6, 500, 6)
    found = k_hat(log_weights.reshape(500, 2, 3) - 1234.5)
    columns = log_weights.T.numpy()
    psislw = vars(arviz).get("psislw")
    if psislw is None:
        stats = importlib.import_module("arviz_stats.base").array_stats
        smoothed, expected = stats.psislw(-columns, axis=-1)
    else:
        smoothed, expected = psislw(columns.copy())
    # the largest weight stays the largest: a sign the wrong way round would show here
    assert (np.argmax(np.asarray(smoothed), -1) == columns.argmax(-1)).all()
    np.testing.assert_allclose(found.flatten().numpy(), np.asarray(expected), rtol=1e-6)


def test_constant_weights_have_the_index_nought():
    assert k_hat(torch.zeros(100, 3)).tolist() == [0.0, 0.0, 0.0]
    assert k_hat(torch.full((100,), -1234.5, dtype=torch.float64)).item() == 0.0


def test_rounding_is_no_tail():
    noise = torch.randn(1000, 4, generator=generator(), dtype=torch.float64)
    assert k_hat(-700.0 + 1e-12 * noise).tolist() == [0.0] * 4
    assert k_hat(-700.0 + 1e-5 * noise).tolist() == [0.0] * 4
    assert k_hat((-50_000.0 + 0.03 * noise).float()).tolist() == [0.0] * 4  # the last digits of float32
    assert (k_hat(-700.0 + noise) != 0).all()


def test_weights_of_few_values_are_bounded():
    rare = (torch.rand(1000, 4, generator=generator()) < 0.01).double()
    assert k_hat(3.0 * rare).tolist() == [0.0] * 4


def test_draws_without_weight_are_counted_and_no_weight_at_all_is_infinite():
    log_weights = log_ratio(0.5, 1000, 3)
    log_weights[::4, 0] = -torch.inf
    log_weights[::4, 1] = torch.nan  # a density that could not be computed is none
    log_weights[:, 2] = -torch.inf
    found = k_hat(log_weights)
    assert found[:2].isfinite().all()
    assert found[0] > 0.3
    assert found[2] == torch.inf


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match=r"10 draws .* at least 25"):
        k_hat(torch.zeros(10, 2))

"""Rows of two distributions side by side: densities by scipy, draws by their moments, shapes by enumeration."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine

from pyro_lvm.side_by_side import SideBySide


def normal(*batch: int, event: int = 2, shift: float = 0.0) -> dist.TorchDistribution:
    loc = shift + torch.arange(float(np.prod([*batch, event])), dtype=torch.float64).reshape(*batch, event)
    return dist.Normal(loc, 0.5 + 0.1 * loc.abs()).to_event(1)


def density(fn: dist.TorchDistribution, value: torch.Tensor) -> np.ndarray:
    inner = fn.base_dist
    return scipy.stats.norm.logpdf(value.numpy(), inner.loc.numpy(), inner.scale.numpy()).sum(-1)


def test_each_row_has_the_density_of_its_own_distribution() -> None:
    first, rest = normal(2), normal(3, 4, shift=1.0)
    both = SideBySide(first, rest)
    assert (both.batch_shape, both.event_shape, both.has_rsample) == ((3, 6), (2,), True)
    values = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.concatenate([density(first, values[:, :2]), density(rest, values[:, 2:])], -1)
    np.testing.assert_allclose(both.log_prob(values), expected, rtol=1e-12)
    observed = values[0]  # one row of numbers for every datum, whatever the first dim enumerates
    expected = np.concatenate([np.tile(density(first, observed[:2]), (3, 1)), density(rest, observed[2:])], -1)
    np.testing.assert_allclose(both.log_prob(observed), expected, rtol=1e-12)
    entropies = [scipy.stats.norm.entropy(scale=part.base_dist.scale).sum(-1) for part in (first, rest)]
    np.testing.assert_allclose(both.entropy(), np.concatenate([np.tile(entropies[0], (3, 1)), entropies[1]], -1))
    one_for_all = SideBySide(normal(2, 1), normal(3))
    assert one_for_all.log_prob(torch.zeros(4, 2, dtype=torch.float64)).shape == (2, 4)


@pytest.mark.parametrize("sample_shape", [(), (5,), (5, 2)])
def test_first_rows_are_drawn_once_and_draws_carry_gradients(sample_shape: tuple[int, ...]) -> None:
    first, rest = normal(2), normal(3, 4)
    first.base_dist.loc.requires_grad_()
    both = SideBySide(first, rest)
    torch.manual_seed(0)
    drawn = both.rsample(sample_shape)
    assert drawn.shape == (*sample_shape, 3, 6, 2)
    assert bool((drawn[..., :2, :] == drawn[..., :1, :2, :]).all())
    assert not bool((drawn[..., 2:, :] == drawn[..., :1, 2:, :]).all())
    (gradient,) = torch.autograd.grad(drawn[..., :2, :].sum(), first.base_dist.loc)
    assert gradient.unique().tolist() == [3 * np.prod(sample_shape)]
    torch.manual_seed(0)
    assert torch.equal(both.sample(sample_shape), drawn)


def test_expanded_rows_are_drawn_independently_with_the_moments_they_should_have() -> None:
    both = SideBySide(normal(1, event=1), normal(2, event=1)).expand((20_000, 3))
    assert both.batch_shape == (20_000, 3)
    torch.manual_seed(0)
    drawn = both.sample().squeeze(-1).numpy()
    scale = np.array([0.5, 0.5, 0.6])
    assert np.all(np.abs(drawn.mean(0) - [0.0, 0.0, 1.0]) < 4 * scale / np.sqrt(20_000))
    assert np.all(np.abs(drawn.std(0) / scale - 1) < 4 / np.sqrt(2 * 20_000))
    assert np.all(np.abs(np.corrcoef(drawn.T) - np.eye(3)) < 4 / np.sqrt(20_000))


def test_in_plates() -> None:
    def program() -> None:
        with pyro.plate("data", 3, dim=-1):
            pyro.sample("once", SideBySide(normal(1), normal(7, 2)))
            with pyro.plate("particles", 7, dim=-2):
                pyro.sample("each", SideBySide(normal(1), normal(2)))

    nodes = poutine.trace(program).get_trace().nodes
    for name, distinct in (("once", 1), ("each", 7)):
        node = nodes[name]
        assert node["value"].shape == (7, 3, 2)
        assert len(node["value"][:, 0, 0].unique()) == distinct
        assert node["fn"].log_prob(node["value"]).shape == (7, 3)


def test_what_cannot_stand_side_by_side() -> None:
    with pytest.raises(ValueError, match=r"event shapes \(2,\) and \(3,\).*the same event shape"):
        SideBySide(normal(2), normal(2, event=3))
    with pytest.raises(ValueError, match=r"batch shapes \(\) and \(2,\).*give both a batch dim"):
        SideBySide(normal(), normal(2))
    with pytest.raises(ValueError, match="4 rows side by side cannot be expanded to 5"):
        SideBySide(normal(2), normal(2)).expand((3, 5))

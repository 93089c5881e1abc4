"""Bits per dimension, with the constant of the dequantisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pyro_lvm as lvm


def test_a_fair_coin_is_one_bit():
    assert lvm.bits_per_dimension(-10 * math.log(2), 10, "none") == pytest.approx(1.0, rel=1e-12)


def test_stretching_the_data_changes_no_bits():
    """A normal density of pixels on [0, 256), and of the same divided by 256."""
    x, d = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double() * 40 + 128, 12
    loc, scale = torch.tensor([128.0, 40.0]).double()
    levels = torch.distributions.Normal(loc, scale).log_prob(x).sum(-1)
    unit = torch.distributions.Normal(loc / 256, scale / 256).log_prob(x / 256).sum(-1)
    expected = 0.5 * np.log2(2 * np.pi * 40**2) + 0.5 * ((x - 128) / 40).square().mean(-1).numpy() / np.log(2)
    assert lvm.bits_per_dimension(levels, d, "levels").numpy() == pytest.approx(expected, rel=1e-10)
    assert lvm.bits_per_dimension(unit, d, "unit").numpy() == pytest.approx(expected, rel=1e-10)
    assert lvm.bits_per_dimension(0.0, d, "unit", num_levels=32) == 5.0


def test_what_means_nothing_is_refused():
    with pytest.raises(ValueError, match="num_dimensions is 0"):
        lvm.bits_per_dimension(-1.0, 0, "none")
    with pytest.raises(ValueError, match="dequantization='uniform' is not known: use 'none'"):
        lvm.bits_per_dimension(-1.0, 3, "uniform")

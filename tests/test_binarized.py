"""Bits drawn anew in every epoch: exactly as probable as their grey level, independent, fixed by the seeds alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from pyro_lvm.datasets import Binarized

pytestmark = pytest.mark.usefixtures("global_generators_stay")

GREY = torch.arange(256, dtype=torch.uint8).repeat(2000, 1)


def test_a_bit_is_one_with_probability_grey_over_255():
    draws = [Binarized(GREY)[:], Binarized(GREY).redraw(0, 0)[:], Binarized(GREY).redraw(1, 0)[:]]
    for bits in draws:
        assert set(bits.unique().tolist()) == {0.0, 1.0}
        probability = GREY[0].double() / 255
        standard_error = (probability * (1 - probability) / len(GREY)).sqrt()
        z = (bits.double().mean(0) - probability).abs()[1:255] / standard_error[1:255]
        assert z.max() < 4.5  # 254 levels
        assert 0.8 < z.square().mean() < 1.25  # 254 independent terms of mean 1 and standard deviation 1.4
        assert (bits[:, 0] == 0).all()
        assert (bits[:, 255] == 1).all()
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_black_and_white_are_certain():
    grey = torch.tensor([[0, 255]], dtype=torch.uint8).expand(200_000, 2)
    assert torch.equal(Binarized(grey).redraw(5, 5)[:], grey / 255)


def test_draws_are_independent():
    grey = torch.full((4000, 20), 128, dtype=torch.uint8)
    x = Binarized(grey)
    draws = torch.cat([x[:], x.redraw(0, 0)[:], x.redraw(1, 0)[:], x.redraw(0, 1)[:], Binarized(grey, seed=1)[:]], 1)
    # an array beside it of the same shape, in the same epoch of the same run
    draws = torch.cat([draws, Binarized(grey, seed=1).redraw(0, 0)[:]], 1)
    correlations = torch.corrcoef(draws.T.double()) - torch.eye(120)
    assert correlations.abs().max() < 5.5 / 4000**0.5  # 7140 pairs


def test_redraw_returns_and_mutates_nothing():
    x = Binarized(GREY)
    before = x[:].clone()
    third = x.redraw(epoch=3, seed=7)
    assert torch.equal(x[:], before)
    assert third is not x
    assert third.grey is x.grey
    assert (x.epoch, third.epoch) == (None, 3)
    assert x.evaluation is x
    assert third.evaluation is x
    assert third.redraw(4, 7).evaluation is x
    assert torch.equal(third.redraw(3, 7)[:], third[:])
    assert torch.equal(x.redraw(3, 7)[:], third[:])


def test_the_seed_alone_decides():
    one = Binarized(GREY, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        two = Binarized(GREY.clone(), seed=5)
        assert torch.equal(one.redraw(2, 3)[:], two.redraw(2, 3)[:])
    assert torch.equal(one[:], two[:])


def test_rows_do_not_depend_on_the_batch():
    x = Binarized(GREY).redraw(0, 0)
    everything = x[:]
    order = torch.tensor([5, 0, 1999, 7])
    assert torch.equal(x[order], everything[order])
    assert torch.equal(x[7], everything[7])
    assert torch.equal(x[-1], everything[-1])
    assert torch.equal(x[10:20:3], everything[10:20:3])
    assert torch.equal(x[order.numpy()], everything[order])
    assert torch.equal(x[order.tolist()], everything[order])
    assert torch.equal(x[torch.arange(2000) < 3], everything[:3])
    assert torch.equal(x[:2, 5], everything[:2, 5])
    assert all(torch.equal(a, b) for a, b in zip(x, everything, strict=True))


def test_it_looks_like_an_array():
    x = Binarized(GREY, dtype=torch.float64)
    assert len(x) == 2000
    assert x.shape == (2000, 256)
    assert x.ndim == 2
    assert x.device == torch.device("cpu")
    assert x.dtype is x[0].dtype is x.redraw(0, 0)[:2].dtype is torch.float64
    assert Binarized(GREY)[0].dtype is torch.float32
    assert repr(x) == "Binarized(shape=(2000, 256), dtype=torch.float64, evaluation draw)"
    assert "draw of epoch 4)" in repr(x.redraw(4, 0))
    for copied in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert torch.equal(copied.redraw(1, 1)[:], x.redraw(1, 1)[:])
        assert copied.evaluation is copied


def test_what_cannot_be_binarized_is_refused():
    with pytest.raises(TypeError, match=r"torch.uint8, but got torch.float32.*255"):
        Binarized(GREY / 255)
    with pytest.raises(TypeError, match="but got ndarray"):
        Binarized(GREY.numpy())
    with pytest.raises(ValueError, match="must have rows"):
        Binarized(GREY[0, 0])
    with pytest.raises(ValueError, match=r"must not be negative, but got -1"):
        Binarized(GREY, seed=-1)
    with pytest.raises(ValueError, match=r"must not be negative"):
        Binarized(GREY).redraw(-1, 0)

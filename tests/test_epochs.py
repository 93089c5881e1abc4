"""Every row in its turn: minibatches and strata leave the expected loss what it is on all rows."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from small_programs import data, mixture, nothing, process_left_alone, rows, same_state, state_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_lvm as lvm
from pyro_lvm.data import as_rows
from pyro_lvm.elbo.estimator import make_estimator
from pyro_lvm.inference.epochs import Order, strata_of
from pyro_lvm.parameters import BoundProgram, isolated
from pyro_lvm.program import as_program
from pyro_lvm.structure import trace_structure


def evaluator(program, x):
    """A function from a batch to the loss and the plain bound, nats of the whole data set."""
    bound = BoundProgram(as_program(program), None, torch.float64)
    whole = as_rows(x).whole()
    with isolated(0):
        estimator = make_estimator(None, trace_structure(bound.model, bound.guide, whole))

    def evaluate(batch):
        with isolated(0):
            loss, terms = estimator.evaluate(bound, batch)
        return loss.item(), terms.elbo.item()

    return evaluate, whole


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 13, 36, 37, 50])
def test_weighted_batch_losses_sum_to_the_full_loss(batch_size):
    x = data(37)
    evaluate, whole = evaluator((mixture, nothing), x)
    order = Order(as_rows(x), batch_size, None, seed=0)
    batches = list(order.epoch(0))
    assert len(batches) == order.steps_per_epoch == math.ceil(37 / batch_size)
    assert sum(share for _, share in batches) == pytest.approx(1)
    full = evaluate(whole)
    for which in (0, 1):
        mean = sum(share * evaluate(batch)[which] for batch, share in batches)
        assert mean == pytest.approx(full[which], rel=1e-12)
    if batch_size == 13:  # the short batch alone is scaled by 37/11
        assert evaluate(batches[-1][0])[0] != pytest.approx(full[0], rel=1e-3)


def test_every_row_once_in_an_order_of_its_own_each_epoch():
    x = torch.arange(10.0)
    order = Order(as_rows(x), 4, None, seed=1)
    epochs = [torch.cat([batch.index for batch, _ in order.epoch(number)]) for number in range(3)]
    for index in epochs:
        assert torch.equal(index.sort().values, torch.arange(10))
    assert not torch.equal(epochs[0], epochs[1])
    again = Order(as_rows(x), 4, None, seed=1)
    assert torch.equal(torch.cat([batch.index for batch, _ in again.epoch(0)]), epochs[0])
    for batch, _ in order.epoch(3):
        assert torch.equal(batch.args[0], x[batch.index])
        assert batch.size == 10
        assert batch.weight is None
        assert batch.strata is None


def test_all_rows_at_once_are_read_once():
    order = Order(as_rows(data(5)), None, None, seed=0)
    ((first, share),) = order.epoch(0)
    ((second, _),) = order.epoch(1)
    assert share == 1.0
    assert second is first
    assert torch.equal(first.index, torch.arange(5))


def test_loaders_are_walked_as_they_are():
    order = Order(as_rows(DataLoader(TensorDataset(data(10)), batch_size=4)), None, None, seed=0)
    assert order.steps_per_epoch == 3
    assert [share for _, share in order.epoch(0)] == [0.4, 0.4, 0.2]


def test_rows_are_redrawn_for_every_epoch():
    class Redrawn:
        def __init__(self, value=0.0):
            self.value = value

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.full((4,), self.value)[index]

        def redraw(self, epoch, seed):
            return Redrawn(100.0 * epoch + seed)

    for batch_size in (2, None):
        order = Order(as_rows(Redrawn()), batch_size, None, seed=7)
        for number in (0, 1, 5):
            assert {batch.args[0][0].item() for batch, _ in order.epoch(number)} == {100.0 * number + 7}


def weighted(x, y, size=None, weight=None):
    loc = pyro.param("loc", torch.tensor(0.3))
    with pyro.plate("data", size or len(x), subsample=x), poutine.scale(scale=1.0 if weight is None else weight):
        pyro.sample("x", dist.Normal(loc + 4 * y, 1.0), obs=x)


def no_guide(x, y, size=None, weight=None):
    """Nothing is left to approximate."""


def test_stratified_batches_are_unbiased():
    x, y = data(50), (torch.arange(50) < 6).double()
    evaluate, whole = evaluator((weighted, no_guide), (x, y))
    strata = [(torch.arange(6), 4), (torch.arange(6, 50), 8)]
    order = Order(as_rows((x, y)), 12, strata, seed=0)
    full, losses = evaluate(whole)[0], []
    for number in range(80):
        batches = list(order.epoch(number))
        assert len(batches) == 5
        assert sum(share for _, share in batches) == pytest.approx(1)
        for batch, _ in batches:
            assert len(batch) == 12
            assert int((batch.index[:4] < 6).sum()) == int((batch.index < 6).sum()) == 4
            assert batch.strata == (4, 8)
            losses.append(evaluate(batch)[0])
    sample = torch.tensor(losses, dtype=torch.float64)
    error = (sample.std() / len(sample) ** 0.5).item()
    assert abs(sample.mean().item() - full) < 4 * error
    assert error < 0.02 * abs(full)  # so that leaving the weights out would show:
    without = [
        evaluate(type(batch)(batch.args, {}, 50, batch.index))[0] for n in range(20) for batch, _ in order.epoch(n)
    ]
    assert abs(sum(without) / len(without) - full) > 10 * error


def test_strata_that_repeat_no_row_more_than_they_must():
    """Weights add up exactly, and a stratum smaller than its part of the batch comes round again."""
    order = Order(as_rows(data(20)), 6, [(torch.arange(2), 3), (torch.arange(2, 20), 3)], seed=0)
    seen = torch.zeros(20)
    for batch, _ in order.epoch(0):
        assert batch.weight.sum().item() == pytest.approx(6, rel=1e-6)
        seen += torch.bincount(batch.index, minlength=20)
    assert seen[:2].tolist() == [6.0, 6.0]
    assert set(seen[2:].tolist()) <= {0.0, 1.0}


class Stratified(nn.Module):
    """A program whose strata are what a test says."""

    def __init__(self, strata):
        super().__init__()
        self.given = strata
        self.loc = nn.Parameter(torch.zeros(()))

    def strata(self, x, *, batch_size):
        return self.given(len(x), batch_size)

    def model(self, x, size=None, weight=None):
        with pyro.plate("data", size or len(x), subsample=x), poutine.scale(scale=1.0 if weight is None else weight):
            pyro.sample("x", dist.Normal(self.loc, 1.0), obs=x)

    def guide(self, x, size=None, weight=None):
        """Nothing is latent."""


def halves(n, batch):
    return [(torch.arange(n // 2), batch - 1), (torch.arange(n // 2, n), 1)]


WRONG = {
    "a row is missing": (lambda n, b: [(torch.arange(n - 1), b - 1), (torch.arange(0), 1)], "holds 19 numbers, 19 of"),
    "a row is twice": (lambda n, b: [(torch.arange(n), b - 1), (torch.arange(1), 1)], "holds 21 numbers, 20 of them"),
    "nothing": (lambda n, b: [], "once; it holds 0 numbers"),
    "too few": (
        lambda n, b: [(torch.arange(5), 1), (torch.arange(5, n), 1)],
        r"fill a batch of 6 .* asks for \[1, 1\]",
    ),
    "nought": (lambda n, b: [(torch.arange(5), 0), (torch.arange(5, n), b)], r"at least one row each; .*\[0, 6\]"),
    "a mask": (lambda n, b: [(torch.ones(n, dtype=torch.bool), b)], "20 row numbers once"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_strata_are_refused_before_anything_moves(name):
    strata, words = WRONG[name]
    module = Stratified(strata)
    before = state_of(module)
    with process_left_alone(), pytest.raises(ValueError, match=words):
        lvm.fit(module, data(20), epochs=1, batch_size=6)
    assert same_state(module, before)


def test_strata_need_somebody_to_take_their_weights():
    class Deaf(Stratified):
        def guide(self, x, size=None):
            """Does not name weight."""

    with pytest.raises(lvm.ProgramError, match="add `weight=None` to the signature of its guide"):
        lvm.fit(Deaf(halves), data(20), epochs=1, batch_size=6)
    assert lvm.fit(Stratified(halves), data(20), epochs=1, batch_size=6, seed=0).info["steps"] == 4


def test_when_strata_are_not_asked_for():
    def unexpected(n, batch):
        pytest.fail("asked for strata")

    program, x = as_program(Stratified(unexpected)), data(20)
    assert strata_of(program, as_rows(x), None) is None
    assert strata_of(program, as_rows(x), 20) is None
    assert strata_of(program, as_rows(TensorDataset(x)), 5) is None
    assert strata_of(as_program((mixture, nothing)), as_rows(x), 5) is None
    lone = as_program(Stratified(lambda n, batch: [(torch.arange(n), 1), (torch.arange(0), 5)]))
    assert strata_of(lone, as_rows(x), 5) is None
    assert strata_of(as_program(Stratified(halves)), as_rows(x), 5) is not None


def test_a_fit_asks_for_strata_once():
    asked = []

    def counted(n, batch):
        asked.append((n, batch))
        return halves(n, batch)

    lvm.fit(Stratified(counted), data(20), epochs=2, batch_size=6, seed=0)
    assert asked == [(20, 6)]


def test_an_empty_stratum_keeps_its_place():
    x = data(20)

    def three(n, batch):
        return [(torch.arange(4), 2), (torch.arange(0), 3), (torch.arange(4, n), batch - 2)]

    strata = strata_of(as_program(Stratified(three)), as_rows(x), 6)
    for batch, _ in Order(as_rows(x), 6, strata, seed=0).epoch(0):
        assert batch.strata == (2, 0, 4)
        assert len(batch.weight) == len(batch.index) == 6
        assert bool((batch.index[:2] < 4).all())
        assert bool((batch.index[2:] >= 4).all())


def test_only_what_a_signature_names_is_passed():
    got = []

    def model(x, size=None, index=None):
        got.append((size, index))
        loc = pyro.param("loc", torch.zeros(x.shape[-1]))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    x = rows(10)
    lvm.fit((model, lambda x: None), x, epochs=1, batch_size=4, seed=0)
    steps = [index for size, index in got if len(index) in (2, 4) and size == 10]
    assert {size for size, _ in got} == {10}
    assert torch.equal(torch.cat(steps[-3:]).sort().values, torch.arange(10)) or len(steps) > 3

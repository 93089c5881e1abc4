"""What all rows share is computed once, and taken out of sums over the rows; what must not move does not."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from scipy.special import logsumexp
from small_programs import Amortised, data, mixture, nothing, rows
from torch.distributions import constraints

import pyro_lvm as lvm
from pyro_lvm.capture import broadcasts
from pyro_lvm.capture import graph as graphs
from pyro_lvm.capture.broadcasts import narrowed
from pyro_lvm.capture.operations import is_pointwise
from pyro_lvm.capture.recorder import graph_of
from pyro_lvm.inference import bound

aten = torch.ops.aten
N, K, D = 30, 4, 3


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    """How well the bound is known in the end is another test's affair."""
    monkeypatch.setattr(bound, "MAX_PASSES", 2)


@pytest.fixture(autouse=True)
def every_change_is_made(monkeypatch):
    """Whether it pays is one test's affair."""
    monkeypatch.setattr(broadcasts, "WORTH_A_CHANGE", math.inf)


def both(function, *inputs):
    """The function's graph, and the same with less to do."""
    graph = graph_of(function, *inputs)
    return graph, narrowed(graph, inputs)


def work(graph):
    """How many numbers the pointwise operations give, by the operation's name."""
    count = {}
    for node in graph.graph.nodes:
        if is_pointwise(node.target):
            name = node.target.overloadpacket.__name__
            count[name] = count.get(name, 0) + node.meta["shape"].numel()
    return count


def flat(result):
    return [*result] if isinstance(result, list | tuple) else [result]


def agree(function, *inputs, **tolerances):
    """Both graphs, once they give the same numbers in tensors of the same kind, here and for other inputs."""
    graph, less = both(function, *inputs)
    for given in (inputs, tuple(1.5 * x.abs() + 0.1 if x.is_floating_point() else x for x in inputs)):
        torch.manual_seed(1)
        right = flat(graph(*given))
        torch.manual_seed(1)
        for found, wanted in zip(flat(less(*given)), right, strict=True):
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            torch.testing.assert_close(found, wanted, **({"rtol": 1e-11, "atol": 1e-11} | tolerances))
    return graph, less


def positive(*shape, seed=0):
    return 0.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- what is done once


def log_density(x, locs, scales):
    """Of each component at each row, as `dist.Normal` has it: everything of the shape (K, N, D)."""
    loc, scale = (value[:, None].expand(K, len(x), D) for value in (locs, scales))
    return (-((x - loc) ** 2) / (2 * scale**2) - scale.log()).sum(-1)


def test_what_all_rows_share_is_computed_once():
    graph, less = agree(log_density, rows(N, D), rows(K, D), positive(K, D))
    assert (work(graph)["log"], work(less)["log"]) == (K * N * D, K * D)
    assert sum(work(graph).values()) == 8 * K * N * D
    assert sum(work(less).values()) == 5 * K * N * D + 3 * K * D  # for every row: -, square, neg, div, -
    assert not any(node.target is aten.expand.default for node in less.graph.nodes)


def test_operations_that_round_alike_give_the_same_to_the_bit():
    def scaled(x, scales):
        scale = scales[:, None].expand(K, len(x), D)
        return ((x * scale.sqrt() - 3.0) / (scale * scale)).transpose(0, 1)

    x, scales = rows(N, D), positive(K, D)
    graph, less = both(scaled, x, scales)
    assert torch.equal(graph(x, scales), less(x, scales))
    assert work(less)["sqrt"] == K * D


def test_what_is_spread_stays_so_through_views():
    def through_views(x, w):
        spread = w.expand(len(x), K).reshape(1, len(x), K).transpose(0, 2).squeeze(-1).unsqueeze(0)[None].exp()
        return x.sum(-1) * spread.permute(3, 0, 2, 1).squeeze()[:, : len(x)].mT.clone(), spread.view(1, 1, -1, 1, N)

    _, less = agree(through_views, rows(N, K), positive(K))
    assert work(less)["exp"] == K


def test_a_view_that_mixes_rows_and_columns_needs_all_numbers():
    _, less = agree(lambda x, w: (x.reshape(-1) * w.log().expand(N, K).reshape(-1)).exp(), rows(N, K), positive(K))
    assert work(less)["log"] == K
    assert work(less)["exp"] == N * K


def test_results_are_whole_and_have_memory_of_their_own():
    _, less = agree(lambda x, w: [w.exp().expand(N, K), x * w], rows(N, K), positive(K))
    result = less(rows(N, K), positive(K))[0]
    assert result.is_contiguous()
    assert result.untyped_storage().nbytes() == 8 * N * K


# ------------------------------------------------------------------------------------------------- what leaves sums


def test_what_the_rows_share_is_taken_out_of_a_sum_over_them():
    def gradient(x, g, scales):
        scale = scales[:, None].expand(K, N, D)
        weight = g[..., None].expand(K, N, D)
        return (-weight / scale + weight * (-(x**2) / scale / scale) * 2.0).sum(1, keepdim=True)

    x, g = rows(N, D), rows(K, N)
    graph, less = agree(gradient, x, g, positive(K, D))
    assert work(graph)["div"] == 3 * K * N * D
    assert work(less)["div"] == 3 * K * D
    sums = [node.args[0].meta["shape"] for node in less.graph.nodes if node.target is aten.sum.dim_IntList]
    assert sums == [(K, N, 1), (K, N, D)]


SUMS = {
    "all": lambda x, w: (x * w.exp()).sum(),
    "all of what is spread": lambda x, w: w.exp().expand(len(x), K).sum(),
    "rows of what is spread": lambda x, w: w.exp().expand(len(x), K).sum(0),
    "rows of a product that is spread": lambda x, w: (2.0 * w.expand(len(x), K) / (1.0 + w) * w).sum(0),
    "columns of what is spread": lambda x, w: w.exp().expand(len(x), K).sum(-1),
    "rows and columns": lambda x, w: (x[:, :1] * w.exp()).sum((0, 1), keepdim=True),
    "both factors vary": lambda x, w: ((x * w) * (x / w)).sum(0),
    "divided by what varies": lambda x, w: ((x * w) / (x * x + 1.0)).sum(0),
    "what is shared, divided by what varies": lambda x, w: (w / (x * x + 1.0)).sum(0),
    "shared first": lambda x, w: (w * (-x)).sum(0),
    "a difference": lambda x, w: (x * w - x.exp() / w).sum(0),
    "a mask that is shared": lambda x, w: torch.where(w > 1.0, x * w, 2.0).sum(0),
    "a mask that is shared, the other way": lambda x, w: torch.where(w > 1.0, w, x / w).sum(0),
    "a mask that varies": lambda x, w: torch.where(x > 0.0, x * w, w).sum(0),
    "whole numbers": lambda x, w: (w > 1.0).expand(len(x), K).sum(0) + (x > 0).sum(0),
    "another dtype": lambda x, w: (x.float() * w.float().double()).sum(0),
    "fewer dimensions": lambda x, w: (x[:, None] * (x + 1.0)[None] * w).sum((0, 1)),
    "no rows": lambda x, w: (x[:0] * w).sum(0) + w.expand(0, K).exp().sum(),
    "no dimensions": lambda x, w: w[0].exp().sum() + x.sum().sum(),
    "largest": lambda x, w: w.log().expand(len(x), K).amax(1) + w.expand(len(x), K).exp().max(1)[0],
    "the place of the largest": lambda x, w: w.expand(len(x), K).exp().max(1)[1] + x.max(0)[1].sum(),
    "a matrix": lambda x, w: x.mT @ w.exp().expand(len(x), K),
}


@pytest.mark.parametrize("function", SUMS.values(), ids=SUMS)
def test_sums(function):
    agree(function, rows(N, K), positive(K))


def test_a_small_difference_of_large_sums_is_not_made_of_one():
    """A number alone would not make up for it."""
    x = rows(N, D)
    _, less = agree(lambda x: (1.5 * x.exp() - 0.5 * (3.0 * x.exp() + 1e-9)).sum(0), x, rtol=1e-6, atol=1e-12)
    assert sum(node.target is aten.sum.dim_IntList for node in less.graph.nodes) == 1


@pytest.mark.parametrize(("left", "right"), [((1, K), (K, 1)), ((D, 1), (1, K)), ((1, 1), (1, K)), ((D, K), (K, D))])
@pytest.mark.parametrize("which", ["left", "right", "both", "neither"])
def test_products_of_matrices_in_a_batch(which, left, right):
    def product(a, b):
        a = a.exp().expand(N, *left) if which in ("left", "both") else a.new_ones(N, 1, 1) * a
        b = b.exp().expand(N, *right) if which in ("right", "both") else b.new_ones(N, 1, 1) * b
        return torch.bmm(a, b).squeeze(-1)

    _, less = agree(product, rows(*left), rows(*right))
    rewritten = which != "neither" and (left, right) != ((D, K), (K, D))
    assert rewritten != any(node.target is aten.bmm.default for node in less.graph.nodes)


# --------------------------------------------------------------------------------------------------- what must stay


def test_a_graph_that_writes_into_its_inputs_is_left_alone():
    graph, less = both(lambda x, w: x.mul_(w.exp().expand(N, K)).sum(), rows(N, K), positive(K))
    assert less is graph


def test_a_graph_that_looks_into_memory_is_left_alone():
    graph, less = both(lambda x, w: (x * w.exp().expand(N, K)).as_strided((N,), (K,)), rows(N, K), positive(K))
    assert less is graph


@pytest.mark.parametrize(("share", "changed"), [(0.9, False), (0.95, True)])
def test_a_graph_that_would_do_little_less_is_left_alone(monkeypatch, share, changed):
    """Of the eleven tensors of N * K numbers ten are left, and the exponential of w."""
    monkeypatch.setattr(broadcasts, "WORTH_A_CHANGE", share)

    def much(x, w):
        for _ in range(9):
            x = x.tanh()
        return x * w.expand(N, K).exp()

    graph, less = both(much, rows(N, K), positive(K))
    assert (less is not graph) == changed


def test_a_network_keeps_its_own_operations(compiled, monkeypatch):
    """Nothing in it is spread; taken apart, its cross-entropy would be more to do."""
    monkeypatch.setattr(broadcasts, "WORTH_A_CHANGE", 0.9)
    fitted(lambda: lvm.VAE(D, 2, (5,)), (rows(N, D) > 0).double(), "compiled")
    (graph, less), *_ = compiled
    assert less is graph


def written_into(x, w):
    spread = w.exp().expand(N, K).clone()
    before = (x * spread).sum(0)
    view = spread[1:3]
    view.mul_(2.0)
    spread[0].zero_()
    return before, (x * spread).sum(0), view.sum(), (spread + 0.0).logical_and_(x > 0).sum(0)


def bent(x, w):
    spread = w.exp().expand(N, K).clone()
    spread.transpose_(0, 1).unsqueeze_(0)
    return spread.sum(1).add_(x.sum(1))


def chosen(x, w):
    spread = w.exp().expand(N, K)
    return spread[torch.arange(N) % 2 == 0].sum(0), spread[:, 1:].sum(0), spread[torch.arange(3), 1]


@pytest.mark.parametrize("function", [written_into, bent, chosen])
def test_writing_and_choosing(function):
    agree(function, rows(N, K), positive(K))


DRAWS = {
    "normal": lambda w: torch.normal(w.expand(N, K), w.expand(N, K)),
    "normal in place": lambda w: w.expand(N, K).clone().normal_(),
    "like": lambda w: torch.randn_like(w.exp().expand(N, K)) * w,
    "bernoulli": lambda w: torch.bernoulli((w / 4.0).expand(N, K)),
    "gamma": lambda w: torch._standard_gamma(w.exp().expand(N, K)),
    "dropout": lambda w: torch.nn.functional.dropout(w.exp().expand(N, K), 0.5),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_every_row_has_a_draw_of_its_own(draw):
    _, less = agree(lambda x, w: x + draw(w), rows(N, K), positive(K), rtol=0.0, atol=0.0)
    values = less(torch.zeros(N, K, dtype=torch.float64), positive(K))
    assert len(values.unique(dim=0)) > 5


STEPS = (
    lambda a, b: a * b,
    lambda a, b: a + 0.5 * b,
    lambda a, b: a / (1.0 + b * b),
    lambda a, b: -2.0 * a,
    lambda a, b: torch.tanh(a),
    lambda a, b: torch.where(a > b, a, b.new_zeros(())),
    lambda a, b: a.sum(0, keepdim=True).expand(N, K) / N,
    lambda a, b: a.mT.reshape(1, K, N, 1).squeeze(0).squeeze(-1).mT - b,
    lambda a, b: ((a * b).sum(-1, keepdim=True) / (1.0 + b * b)).expand(N, K),
)


def random_function(seed):
    """A dozen operations, each on what some before it gave."""
    choose = np.random.default_rng(seed)

    def function(x, w, v):
        known = [x, w.expand(N, K), v.expand(N, K), w.expand(N, K).exp()]
        for _ in range(12):
            step, *of = choose.integers([len(STEPS), len(known), len(known)])
            known.append(STEPS[step](*(known[number] for number in of)))
        return [known[-1], *(value.sum(0) for value in known[4:]), *(value.sum() for value in known[4:])]

    return function


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_composed(seed):
    graph = graph_of(random_function(seed), rows(N, K), positive(K), positive(N, 1, seed=1))
    less = narrowed(graph, (rows(N, K), positive(K), positive(N, 1, seed=1)))
    inputs = rows(N, K, seed=2), positive(K, seed=3), positive(N, 1, seed=4)
    for found, wanted in zip(less(*inputs), graph(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------------- in a fit


def gaussians(x, size=None):
    """Gaussians along the axes, their label summed out, as in Pyro's tutorial."""
    weights = pyro.param("weights", torch.full((K,), 1 / K).double(), constraint=constraints.simplex)
    locs = pyro.param("locs", lambda: 2.0 * rows(K, D, seed=5))
    scales = pyro.param("scales", lambda: positive(K, D), constraint=constraints.positive)
    with pyro.plate("data", size or len(x), subsample=x):
        k = pyro.sample("component", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[k], scales[k]).to_event(1), obs=x)


@pytest.fixture
def compiled(monkeypatch):
    """Pairs of (captured graph, narrowed graph) of fits that stand at level "compiled" without a compiler."""
    pairs = []

    def recorded(graph, example):
        pairs.append((graph, narrowed(graph, example)))
        return pairs[-1][1]

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, **_: graph.forward)
    monkeypatch.setattr(graphs, "narrowed", recorded)
    return pairs


def fitted(program, x, capture, **options):
    torch.manual_seed(0)
    made = program if isinstance(program, tuple) else program()
    return lvm.fit(made, x, capture=capture, steps=5, lr=0.01, seed=0, **options)


@pytest.mark.parametrize("program", [(gaussians, nothing), (mixture, nothing), Amortised])
def test_a_fit_is_the_same(compiled, program):
    x = data() if program == (mixture, nothing) else rows(N, D)
    eager, less = (fitted(program, x, capture) for capture in (False, "compiled"))
    assert less.info["capture"] == "compiled"
    assert len(compiled) == 1
    for name, value in eager.params.items():
        torch.testing.assert_close(less.params[name], value, rtol=1e-9, atol=1e-9)
    assert less.history["loss"] == pytest.approx(eager.history["loss"], rel=1e-10)


def test_a_mixture_does_for_every_row_what_depends_on_it(compiled):
    fitted((gaussians, nothing), rows(N, D), "compiled")
    before, after = (work(graph) for graph in compiled[0])
    assert before["log"] > K * N * D + K * N  # of scales and of weights, for every row
    assert after["log"] < 2 * N + 3 * K * D  # of the sum over components
    assert before["div"] > 5 * K * N * D
    assert after["div"] < K * N * D + 2 * K * N  # of the squared distance
    assert sum(after.values()) < sum(before.values()) / 2


def test_gradients_of_a_mixture_against_their_formula():
    """By the locations: responsibilities times (x - loc) / scale²; by scales: times (x - loc)² / scale³ - 1 / scale."""
    x, locs, scales = rows(N, D).requires_grad_(False), 2.0 * rows(K, D, seed=5), positive(K, D)
    weights = positive(K, seed=6)
    weights = weights / weights.sum()

    def gradients(x, weights, locs, scales):
        leaves = [value.detach().requires_grad_() for value in (weights, locs, scales)]

        def model(x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("component", dist.Categorical(leaves[0]), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(leaves[1][k], leaves[2][k]).to_event(1), obs=x)

        loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, lambda x: None, x)
        return [-loss, *torch.autograd.grad(-loss, leaves[1:])]

    with pyro.validation_enabled(False), graphs.put_aside():
        graph, less = both(gradients, x, weights, locs, scales)
    assert sum(work(less).values()) < sum(work(graph).values()) / 2
    bound_, of_locs, of_scales = (value.numpy() for value in less(x, weights, locs, scales))
    y, w, m, s = (value.numpy() for value in (x, weights, locs, scales))
    apart = y[:, None] - m
    joint = np.log(w) + (-0.5 * (apart / s) ** 2 - np.log(s) - 0.5 * np.log(2 * np.pi)).sum(-1)
    evidence = logsumexp(joint, axis=1)
    responsible = np.exp(joint - evidence[:, None])[..., None]
    np.testing.assert_allclose(bound_, evidence.sum(), rtol=1e-12)
    np.testing.assert_allclose(of_locs, (responsible * apart / s**2).sum(0), rtol=1e-10)
    np.testing.assert_allclose(of_scales, (responsible * (apart**2 / s**3 - 1 / s)).sum(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["fails", "gives something else"])
def test_where_less_is_not_the_same_all_is_compiled(compiled, monkeypatch, how):
    seen = []

    def wrong(graph, example):
        if how == "fails":
            raise RuntimeError("no graph of this kind")
        return graph_of(lambda *inputs: [value + 1.0 for value in graph(*inputs)], *example)

    def compile_(graph, inputs, **_):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(graphs, "narrowed", wrong)
    monkeypatch.setattr(torch._inductor, "compile", compile_)
    eager, all_ = (fitted((gaussians, nothing), rows(N, D), capture) for capture in (False, "compiled"))
    assert all_.info["capture"] == "compiled"
    assert len(seen) == (1 if how == "fails" else 2)
    assert all_.history["loss"] == pytest.approx(eager.history["loss"], rel=1e-12)


def test_narrowing_leaves_generators_and_parameters_where_they_were(compiled, monkeypatch):
    module, x = Amortised(), rows(N, D)
    states = []

    def watched(graph, example):
        states.append([value.clone() for value in module.state_dict().values()])
        found = narrowed(graph, example)
        states.append([value.clone() for value in module.state_dict().values()])
        return found

    monkeypatch.setattr(graphs, "narrowed", watched)
    generator = torch.get_rng_state()
    lvm.fit(module, x, capture="compiled", steps=3, lr=0.01, seed=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))

"""Recorded graphs give what the function gives, and refuse what would be the first call's for ever."""

import copy

import numpy as np
import pytest
import torch

from pyro_lvm.capture.recorder import Unrecordable, graph_of

X = torch.tensor([[1.0, -2.0], [3.0, -4.0], [-5.0, 6.0]])
OTHER = torch.tensor([[-1.5, 2.5], [0.5, 3.5], [4.5, -0.5]])
OUTSIDE = torch.tensor([0.5, -0.5])


def with_gradient(x):
    free = x.detach().requires_grad_()
    with torch.enable_grad():
        energy = (free.softmax(-1) @ OUTSIDE).logsumexp(0) + torch.special.digamma(free.exp()).sum()
        return [energy.detach(), *torch.autograd.grad(energy, free)]


def written(x):
    sums = torch.zeros(2)
    row = sums[0]
    sums.add_(x.sum(0))
    start = torch.tensor(1.0)
    start += x[0, 0]
    return [sums, row, start, x.clone().clamp_(min=0.0)]


def in_lists(x):
    first, *_, last = x.unbind()
    values, places = x.max(0)
    return [first + last, values, places, torch.cat(x.split(2)), x.unbind()[1]]


def drawn(x):
    return [torch.normal(x, 1.0), torch.rand_like(x), torch.bernoulli(x.sigmoid()), torch.empty(3).exponential_()]


def of_shapes_only(x):
    return [torch.zeros(len(x)) + torch.arange(len(x)).sum().item() + sum(torch.ones(3).tolist()) + x[:, 0]]


@pytest.mark.parametrize("function", [with_gradient, written, in_lists, drawn, of_shapes_only])
def test_a_graph_gives_what_the_function_gives_to_the_bit(function):
    graph = graph_of(function, X.clone())
    for x in (X, OTHER, OTHER):  # twice: nothing is left over from a call
        torch.manual_seed(3)
        right = function(x)
        torch.manual_seed(3)
        found = graph(x)
        assert len(found) == len(right)
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_a_graph_knows_the_shape_of_every_result():
    graph = graph_of(lambda x: (x.max(0)[0] + 1).exp(), X)
    shapes = [tuple(node.meta["shape"]) for node in graph.graph.nodes if "shape" in node.meta]
    assert shapes == [(3, 2), (2,), (2,), (2,)]  # the input, the first of max, the sum, its exponential


def test_what_nobody_uses_is_taken_out_but_neither_writes_nor_draws():
    def function(count, x):
        count.add_(1)
        torch.empty_like(x).normal_()
        torch.bernoulli(x)
        x.exp().unbind()[0].log()
        return x * 2

    graph = graph_of(function, torch.zeros(()), torch.full((3,), 0.5))
    names = [node.target.overloadpacket.__name__ for node in graph.graph.nodes if node.op == "call_function"]
    assert names == ["add_", "empty_like", "normal_", "bernoulli", "mul"]


def test_what_is_cut_off_from_its_gradient_is_an_alias():
    graph = graph_of(lambda x: x.detach().exp(), X)
    targets = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert targets == {torch.ops.aten.alias.default, torch.ops.aten.exp.default}


VALUES = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: 1 if x.sum() > 0 else 2,
    "float": lambda x: float(x[0, 0]),
    "index": lambda x: [1, 2][(x[0, 0] > 0).long()],
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "forced numpy": lambda x: x.numpy(force=True),
    "np.asarray": lambda x: np.asarray(x),
    "np.array of a list": lambda x: np.array(list(x)),
    "dlpack": lambda x: np.from_dlpack(x),
    "repr": lambda x: repr(x),
    "format": lambda x: f"{x}",
    "copy": lambda x: copy.copy(x),
    "out=": lambda x: out_of_a_sum(x).tolist(),
    "deepcopy": lambda x: copy.deepcopy(x),
    "torch.tensor": lambda x: torch.tensor([x.sum(), 1.0]),
    "torch.tensor, nested": lambda x: torch.tensor([[x.sum(), 1.0]]),
    "torch.tensor by name": lambda x: torch.tensor(data=[x.sum(), 1.0]),
    "as_tensor": lambda x: torch.as_tensor([x.sum(), 1.0]),
    "asarray": lambda x: torch.asarray([x.sum(), 1.0]),
    "new_tensor": lambda x: x.new_tensor([x.sum(), 1.0]),
    "full": lambda x: torch.full((2,), x.sum()),
    "equal": lambda x: torch.equal(x, x.abs()),
    "allclose": lambda x: torch.allclose(x, x.abs()),
    "draws": lambda x: torch.rand(2).tolist(),
    "draws in place": lambda x: torch.zeros(2).uniform_().tolist(),
    "what it was added to": lambda x: torch.zeros(2).add_(x[0]).tolist(),
    "a view of what it was added to": lambda x: added_to_the_base(x).tolist(),
    "apply_": lambda x: x.clone().apply_(lambda value: min(value, 2.0)),
    "in a gradient": lambda x: ReadBackward.apply(x.detach().requires_grad_()).sum().backward(),
    "in a hook": lambda x: hooked(x.detach().requires_grad_()).sum().backward(),
}


class ReadBackward(torch.autograd.Function):
    """Reads its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float(gradient.numpy().sum())


def hooked(x):
    x.register_hook(lambda gradient: torch.tensor([[gradient[0, 0], 1.0]]).expand(3, 2))
    return x * 1


OTHERS = {
    "a count outside": (lambda x: COUNT.add_(1), "written into a tensor that is there before the step"),
    "a view of a count outside": (lambda x: COUNT.view(1).copy_(x[0, 0]), "written into a tensor that is there before"),
    "an array": (lambda x: shared_with_an_array(x), "written into a tensor that shares its memory with an array"),
    "takes sparse": (lambda x: torch.sparse.mm(torch.eye(3).to_sparse(), x), "torch.sparse_coo"),
    "sparse": (lambda x: x.to_sparse(), "a tensor of layout torch.sparse_coo is made"),
    "data": (lambda x: setattr(x.clone(), "data", x), "another tensor is put in place of .data"),
}


def shared_with_an_array(x):
    zeros = torch.zeros(2)
    array = zeros.numpy()
    zeros.copy_(x[0])
    return array


SHAPES = {
    "mask": lambda x: len(x[x > 0]),
    "bytes": lambda x: x[(x > 0).byte()].sum(),
    "mask of what is the same": lambda x: torch.arange(3)[x[:, 0] > 0].sum(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "argwhere": lambda x: torch.argwhere(x > 0),
    "unique": lambda x: x.unique(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "bincount": lambda x: torch.bincount((x > 0).flatten().long()),
    "repeat_interleave": lambda x: x.flatten().repeat_interleave((x > 0).flatten().long()),
}

COUNT = torch.zeros(())


def out_of_a_sum(x):
    zeros = torch.zeros(3, 2)
    row = zeros[0]
    torch.add(x, 1, out=zeros)
    return row


def added_to_the_base(x):
    base = torch.zeros(2)
    view = base[:1]
    base.add_(x[0])
    return view


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8 is now deprecated:UserWarning")
@pytest.mark.parametrize("case", [*VALUES, *SHAPES])
def test_what_would_be_the_first_batch_s_for_ever_is_refused(case):
    words = "a tensor's value decides what happens next" if case in VALUES else "a tensor's value decides a shape"
    function = {**VALUES, **SHAPES}[case]
    with pytest.raises(Unrecordable, match=words):
        graph_of(lambda x: (function(x), x + 1)[1], X.clone())


@pytest.mark.parametrize("case", OTHERS)
def test_what_happens_behind_the_operations_is_refused(case):
    function, words = OTHERS[case]
    with pytest.raises(Unrecordable, match=words):
        graph_of(lambda x: (function(x), x + 1)[1], X.clone())


def test_torch_is_left_as_it_was():
    names = ("numpy", "tolist", "__repr__", "data", "new_tensor")
    before = [torch.tensor, *(vars(torch.Tensor).get(name) for name in names)]
    graph_of(lambda x: x + 1, X)
    with pytest.raises(Unrecordable):
        graph_of(lambda x: x.tolist(), X)
    assert before == [torch.tensor, *(vars(torch.Tensor).get(name) for name in names)]


def after_others(x):
    """Tensors that lie where others were that had been written to."""
    for _ in range(20):
        x = x + torch.zeros(2).add_(x[0]).sum()
        ones = [torch.ones(2) for _ in range(20)]
        x = x + sum(one.tolist()[0] for one in ones)
    return x


WEIGHT = torch.nn.Parameter(torch.tensor([2.0, -1.0]))

FIXED = {
    "item": lambda x: x + torch.arange(5).sum().item(),
    "if": lambda x: x + 1 if torch.ones(2).sum() > 1 else x,
    "list of constants": lambda x: x + torch.tensor([torch.tensor(1.0), OUTSIDE[0]]),
    "outside": lambda x: x + float(OUTSIDE[0]) + sum(OUTSIDE.tolist()),
    "outside, as a list": lambda x: x + sum(OUTSIDE.tolist()),
    "outside, a parameter": lambda x: x * WEIGHT,
    "part": lambda x: x + torch.ones(4).split(2)[0].tolist()[0],
    "memory used again": lambda x: after_others(x),
    "numpy": lambda x: x + float(torch.eye(2).numpy().sum()),
    "mask": lambda x: x[torch.arange(3) % 2 == 0],
    "places": lambda x: x[torch.randint(3, (4,))],
    "write by mask": lambda x: x.clone().masked_fill_(x > 0, 0.0),
    "tensor of a tensor": lambda x: torch.as_tensor(x) + x.new_zeros(2),
    "written constants": lambda x: x + torch.zeros(2).add_(1.0).sum().item(),
}


@pytest.mark.parametrize("case", FIXED)
def test_what_is_the_same_in_every_call_may_be_asked_for_its_value(case):
    graph = graph_of(FIXED[case], X.clone())
    torch.manual_seed(0)
    right = FIXED[case](OTHER)
    torch.manual_seed(0)
    assert torch.equal(graph(OTHER), right)


def test_a_constant_is_the_tensor_itself():
    outside = torch.tensor([1.0, 2.0])
    graph = graph_of(lambda x: x * outside, X)
    outside.mul_(3)
    assert torch.equal(graph(X), X * outside)
    outside.data = torch.tensor([5.0, 7.0])
    assert torch.equal(graph(X), X * outside)


class Labelled(torch.Tensor):
    """A class of its own."""


def test_what_a_graph_cannot_hold_is_refused():
    labelled = OUTSIDE.as_subclass(Labelled)
    with pytest.raises(Unrecordable, match=r"takes a Labelled, which no graph can hold"):
        graph_of(lambda x: x * labelled, X)


def seeded():
    return torch.Generator().manual_seed(0)


def test_draws_of_a_generator_of_its_own_may_only_be_thrown_away():
    graph = graph_of(lambda x: (torch.randn(2, generator=seeded()) + x[0], x + 1)[1], X)
    assert torch.equal(graph(OTHER), OTHER + 1)
    for draw in (
        lambda x: x + torch.randn(2, generator=seeded()),
        lambda x: torch.bernoulli(x.sigmoid(), generator=seeded()),
        lambda x: x + torch.empty(2).uniform_(generator=seeded()),
    ):
        with pytest.raises(Unrecordable, match="a generator of its own draws: torch's own is the one"):
            graph_of(draw, X)


def test_casts_made_before_are_not_taken_for_constants():
    weight = torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        X @ weight  # leaves a cast of the weight in autocast's cache
        graph = graph_of(lambda x, w: x @ w, X, weight)
        assert torch.is_autocast_cache_enabled()
    with torch.no_grad():
        assert torch.equal(graph(X, 2 * weight), 2 * graph(X, weight))

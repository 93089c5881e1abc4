"""A graph in which what is the same for all rows is not computed for every row; for a compiler.

Programs spread over the rows what all rows share (the weights of a mixture, the scales of its components) before they
take logarithms and squares of it, and gradients with respect to it are summed over the rows at the very end. Here

- what is the same along a dimension is computed at size 1 along it, and spread for those who need all of it;
- what is the same along the dimensions of a sum is taken out of the sum: ``sum(a * b)`` becomes ``sum(a) * b``.

The numbers are those of the graph as it was, but for rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Size, Tensor, fx
from torch.func import functionalize
from torch.utils._pytree import tree_map

from pyro_lvm.capture.operations import is_pointwise, writes
from pyro_lvm.capture.recorder import graph_of

__all__ = ["narrowed"]

aten: Any = torch.ops.aten

_COPIES = (aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default)
_ORDERS = (aten.permute.default, aten.transpose.int, aten.t.default)
_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_LINEAR = (aten.neg.default, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor)

WORTH_A_CHANGE = 0.9
"""A graph that still computes more than this share of its numbers is left as it was."""


def narrowed(graph: fx.GraphModule, example: Sequence[Tensor]) -> fx.GraphModule:
    """The same function with less work; ``graph`` itself where that is not much less, or cannot be.

    It cannot where a graph writes into its inputs, or depends on where numbers lie in memory.

    Args:
        graph: operations on tensors, as `graph_of` gives them.
        example: inputs, for which the function is evaluated twice.
    """
    with torch.no_grad():
        pure = graph_of(functionalize(lambda *inputs: graph(*inputs)), *example)
        if any(writes(node.target) or node.target is aten.as_strided.default for node in pure.graph.nodes):
            return graph
        narrow = _Narrow(pure)
        found = graph_of(lambda *inputs: narrow.run(*inputs), *example)
    return found if _numbers(found) <= WORTH_A_CHANGE * _numbers(graph) else graph


def _numbers(graph: fx.GraphModule) -> int:
    """How many numbers its operations compute; views compute none."""
    nodes = (n for n in graph.graph.nodes if not getattr(n.target, "is_view", n.op != "call_function"))
    return sum(node.meta["shape"].numel() for node in nodes if "shape" in node.meta)


@dataclass(frozen=True, eq=False)
class _Value:
    """A tensor that may be the same along some of its dimensions.

    Attributes:
        core: its numbers, of size 1 along dimensions where they are the same.
        shape: its own shape, of as many dimensions.
        target: the pointwise operation that gave it, or None.
        args: what the operation was given.
    """

    core: Tensor
    shape: Size
    target: Any = None
    args: tuple[Any, ...] = ()

    @property
    def is_spread(self) -> bool:
        """Whether there are such dimensions."""
        return self.core.shape != self.shape


_Factored = tuple[_Value, list[tuple[Any, list[Any]]]]


def _value(x: Any) -> Any:
    return _Value(x, x.shape) if isinstance(x, Tensor) else x


def _core(x: Any) -> Any:
    return x.core if isinstance(x, _Value) else x


def _whole(x: Any) -> Any:
    return x.core.expand(x.shape) if isinstance(x, _Value) and x.is_spread else _core(x)


def _dense(x: Any) -> Any:
    return _whole(x).contiguous() if isinstance(x, _Value) and x.is_spread else _core(x)


class _Narrow(fx.Interpreter):
    """Runs a graph without side effects on `_Value`."""

    def run_node(self, n: fx.Node) -> Any:
        """Remember the node, whose shape and users decide."""
        self.node = n
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An input."""
        return _value(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A constant."""
        return _value(super().get_attr(target, args, kwargs))

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """All results, as tensors with memory of their own."""
        return tree_map(_dense, args[0])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operation, on as little as it needs."""
        if target is operator.getitem:
            return args[0][args[1]]
        if is_pointwise(target) or target in _COPIES:
            return _pointwise(target, *args, **kwargs)
        if target in _ORDERS:
            return _Value(target(args[0].core, *args[1:]), self.node.meta["shape"])
        if target in _VIEWS:
            return _viewed(args[0], self.node.meta["shape"])
        if target is aten.expand.default:
            return _expanded(args[0], self.node.meta["shape"])
        if target is aten.max.dim and args[0].is_spread and all(user.args[1] == 0 for user in self.node.users):
            return (_Value(args[0].core.amax(*args[1:]), next(iter(self.node.users)).meta["shape"]),)
        found = _RULES[target](*args) if target in _RULES and not kwargs else None
        return tree_map(_value, target(*tree_map(_whole, args), **tree_map(_whole, kwargs))) if found is None else found


def _pointwise(target: Any, *args: Any, **kwargs: Any) -> _Value:
    found = target(*map(_core, args), **{name: _core(x) for name, x in kwargs.items()})
    shapes = [x.shape for x in (*args, *kwargs.values()) if isinstance(x, _Value)]
    return _Value(found, torch.broadcast_shapes(*shapes), None if kwargs else target, args)


def _expanded(value: _Value, shape: Size) -> _Value:
    return _Value(value.core[(None,) * (len(shape) - value.core.dim())], shape)


def _viewed(value: _Value, shape: Size) -> _Value:
    if value.is_spread:
        like = torch.empty(value.core.shape, device="meta").expand(value.shape)
        try:
            strides = like.view(shape).stride()  # 0 where the view is the same
        except RuntimeError:  # what varies and what does not end up in one dimension
            strides = ()
        core = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=False)]
        if len(core) == len(shape) and prod(core) == value.core.numel():
            return _Value(value.core.reshape(core), shape)
    return _Value(_whole(value).reshape(shape), shape)


def _dot(a: _Value, b: _Value) -> _Value | None:
    return _sum(_pointwise(aten.mul.Tensor, a, b)) if a.is_spread or b.is_spread else None


def _bmm(a: _Value, b: _Value) -> _Value | None:
    """Products with a row or a column, where one is the same in the whole batch."""
    (batch, rows, inner), columns = a.shape, b.shape[2]
    if not (a.is_spread or b.is_spread) or min(rows, inner, columns) > 1:
        return None
    if inner == 1:
        return _pointwise(aten.mul.Tensor, a, b)
    left = _Value(a.core.unsqueeze(3), Size((batch, rows, inner, 1)))
    right = _Value(b.core.unsqueeze(1), Size((batch, 1, inner, columns)))
    return _sum(_pointwise(aten.mul.Tensor, left, right), [2])


def _sum(value: _Value, dims: Sequence[int] = (), keepdim: bool = False) -> _Value | None:
    """The sum over dimensions, or over all."""
    if not value.core.is_floating_point():
        return None
    rank = len(value.shape)
    sizes = {dim % rank - rank: value.shape[dim] for dim in dims or range(rank)}
    found = _Sum(sizes).of(value)
    found = found[(None,) * (rank - found.dim())]
    kept = {dim: 1 if dim in sizes else value.shape[dim] for dim in range(-rank, 0)}
    if not keepdim:
        found = found.squeeze(list(sizes))
        kept = {dim: size for dim, size in kept.items() if dim not in sizes}
    return _Value(found, Size(kept.values()))


class _Sum:
    """A sum over dimensions of given sizes, which are counted from the last (-1) and are kept, of size 1."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.sizes = sizes
        self.known: dict[_Value, _Factored] = {}

    def of(self, value: _Value) -> Tensor:
        """The sum; where the numbers lack leading dimensions, so does the sum."""
        target, args = value.target, value.args
        if target in (aten.add.Tensor, aten.sub.Tensor) and all(
            self.varies(x) and self.is_less_to_sum(x) for x in args
        ):
            return target(self.of(args[0]), self.of(args[1]))  # type: ignore[no-any-return]
        if target is aten.where.self and [self.varies(x) for x in args] in ([False, True, False], [False, False, True]):
            return target(args[0].core, self.of(args[1]), self.of(args[2]))  # type: ignore[no-any-return]
        rest, steps = self.factored(value)
        found = self.of(rest) if steps else self.as_it_is(value.core)
        for operation, others in steps:
            found = operation(found, *others)
        return found

    def as_it_is(self, core: Tensor) -> Tensor:
        """The sum of numbers, of each as often as it stands there."""
        summed = [dim for dim in self.sizes if -dim <= core.dim() and core.shape[dim] != 1]
        times = prod(size for dim, size in self.sizes.items() if dim not in summed)
        found = core.sum(summed, keepdim=True) if summed else core
        return found * times if times != 1 else found

    def varies(self, x: Any) -> bool:
        """Whether something differs along the sum's dimensions."""
        return isinstance(x, _Value) and any(-dim <= x.core.dim() and x.core.shape[dim] != 1 for dim in self.sizes)

    def is_less_to_sum(self, value: _Value) -> bool:
        """Whether a tensor can be taken out; a number alone would not make up for sums whose difference is small."""
        return any(isinstance(x, Tensor) for _, others in self.factored(value)[1] for x in others)

    def factored(self, value: _Value) -> _Factored:
        """What is left to sum once all that does not vary is taken out, and what to do with the sum, in order."""
        if value not in self.known:
            self.known[value] = self._factored(value)
        return self.known[value]

    def _factored(self, value: _Value) -> _Factored:
        target, args = value.target, value.args
        if target is aten.alias.default:
            return self.factored(args[0])
        same_dtype = all(x.core.dtype == value.core.dtype for x in args if isinstance(x, _Value))
        if target not in _LINEAR or not same_dtype:
            return value, []
        varied = [self.varies(x) for x in args]
        if not any(varied):
            return value, []
        if varied in ([True], [True, False]):
            rest, steps = self.factored(args[0])
            return rest, [*steps, (target, [_core(x) for x in args[1:]])]
        if target is aten.div.Tensor:
            rest, steps = self.factored(args[0])
            return (_pointwise(target, rest, args[1]), steps) if steps else (value, [])
        if varied == [False, True]:
            rest, steps = self.factored(args[1])
            return rest, [*steps, (target, [args[0].core])]
        (a, of_a), (b, of_b) = self.factored(args[0]), self.factored(args[1])
        return (_pointwise(target, a, b), [*of_a, *of_b]) if of_a or of_b else (value, [])


_RULES: dict[Any, Callable[..., _Value | None]] = {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.dot.default: _dot,
    aten.bmm.default: _bmm,
}
"""Operations that are not pointwise, done otherwise where that is less; None where it is not."""

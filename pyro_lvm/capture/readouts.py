"""Pyro's read-outs to the host, put aside while a step is captured.

Touched, and restored whatever happens, in the Pyro releases of `KNOWN`:

- ``torch_item`` and ``warn_if_nan`` as `pyro.infer.trace_elbo`, `trace_mean_field_elbo`, `traceenum_elbo` and
  `tracegraph_elbo` have imported them. The first gives a `_Number`, a detached 0-dim float64 tensor in which the same
  sums give the same digits as in Python numbers; the second does nothing.
- ``pyro.infer.util.Dice.compute_expectation``, which leaves out what has probability nought by selecting the rest,
  so that a shape depends on data. Here it takes a ``where``: the same terms, one of them a nought.
- ``torch.nn.functional.one_hot``, by which torch makes draws of a OneHotCategorical, and which reads the largest index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from opt_einsum import shared_intermediates
from pyro.infer import trace_elbo, trace_mean_field_elbo, traceenum_elbo, tracegraph_elbo
from pyro.infer.util import Dice
from pyro.ops import packed
from pyro.ops.einsum.adjoint import require_backward
from pyro.ops.rings import MarginalRing
from torch import Tensor

from pyro_lvm.capture.replaced import replaced

__all__ = ["KNOWN", "put_aside"]

KNOWN = ("1.9.1", "1.9.2")
"""Releases of Pyro in which the symbols below are what they are taken for."""

_MODULES = (trace_elbo, trace_mean_field_elbo, traceenum_elbo, tracegraph_elbo)


@contextmanager
def put_aside() -> Iterator[None]:
    """Run Pyro without its read-outs.

    Raises:
        NotImplementedError: in a Pyro that this file does not know.
    """
    if pyro.__version__ not in KNOWN:
        raise NotImplementedError(
            f"Pyro {pyro.__version__} is not one of {', '.join(KNOWN)}, whose read-outs can be put aside"
        )
    attributes: list[tuple[Any, str, Any]] = [
        (module, name, value)
        for module in _MODULES
        for name, value in (("torch_item", _detached), ("warn_if_nan", _unread))
        if hasattr(module, name)
    ]
    attributes.append((Dice, "compute_expectation", _compute_expectation))
    attributes.append((torch.nn.functional, "one_hot", _one_hot(torch.nn.functional.one_hot)))
    with replaced(attributes):
        yield


def _one_hot(of_torch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Torch's function without a look at the indices, where it is told the number of classes."""

    def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
        if num_classes < 0:
            return of_torch(tensor)
        return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).long()

    return one_hot


class _Number:
    """A number of a graph. Like Python's own, and unlike a tensor, it leaves a tensor that it meets its dtype."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _met(function, *args, **(kwargs or {}))

    def __neg__(self) -> _Number:
        return _Number(-self.value)

    def __add__(self, other: Any) -> Any:
        return _met(torch.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return _met(torch.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return _met(torch.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return _met(torch.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return _met(torch.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return _met(torch.mul, other, self)

    def __truediv__(self, other: Any) -> Any:
        return _met(torch.div, self, other)


def _met(function: Any, *args: Any, **kwargs: Any) -> Any:
    """``function`` of numbers, a number; of numbers and a tensor, a tensor of the dtype that Python numbers give."""
    tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
    dtype = torch.float64 if tensor is None else torch.result_type(tensor, 0.0)
    values = [arg.value.to(dtype) if isinstance(arg, _Number) else arg for arg in args]
    if tensor is None:  # torch.sub takes no Python number first
        values = [torch.as_tensor(value, dtype=dtype) for value in values]
    result = function(*values, **kwargs)
    return _Number(result) if tensor is None else result


def _detached(x: Any) -> Any:
    return _Number(x.detach().double()) if isinstance(x, Tensor) else x


def _unread(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def _compute_expectation(dice: Any, costs: Any) -> Any:
    """The expected cost: for every term, its probability times its cost, and nought where the probability is."""
    with shared_intermediates() as cache:
        ring = MarginalRing(cache=cache)
        expected: Any = 0.0
        for ordinal, terms in costs.items():
            factors = dice._get_log_factors(ordinal)
            scale = math.exp(sum(factor for factor in factors if not isinstance(factor, Tensor)))
            factors = [factor for factor in factors if isinstance(factor, Tensor)]
            queries = _queries(factors, terms)
            summed = set().union(*(factor._pyro_dims for factor in factors)) - ordinal
            for query in queries.values():
                require_backward(query)
            ring.sumproduct(factors, summed)._pyro_backward()
            for cost in terms:
                query = queries[frozenset(cost._pyro_dims)]
                probability = query._pyro_backward_result.exp()
                probability._pyro_dims = query._pyro_dims
                cost, probability = packed.broadcast_all(cost, probability)
                cost = torch.where(probability > 0, cost, torch.zeros_like(cost))
                product = probability * cost if cost.dim() == 0 else torch.tensordot(probability, cost, cost.dim())
                expected = expected + scale * product
    return expected


def _queries(factors: list[Any], terms: Any) -> dict[frozenset[str], Any]:
    """For each set of dims, the factor whose marginal probability is asked for; made where there is none."""
    queries: dict[frozenset[str], Any] = {frozenset(cost._pyro_dims): None for cost in terms}
    for factor in factors:
        key = frozenset(factor._pyro_dims)
        if key in queries and queries[key] is None:
            queries[key] = factor
    for cost in terms:
        key = frozenset(cost._pyro_dims)
        if queries[key] is None:
            query: Any = torch.zeros_like(cost)
            query._pyro_dims = cost._pyro_dims
            factors.append(query)
            queries[key] = query
    return queries

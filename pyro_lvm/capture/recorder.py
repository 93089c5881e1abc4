"""What a function does to tensors, recorded as a graph while it runs.

Every operation that reaches the kernels, of a program or of its gradients, becomes a node; the function runs as it
always does. What a graph cannot hold is refused: a value that leaves the tensors (``.item()``, ``if``, ``.numpy()``, a
list of tensors made one by ``torch.tensor``) and a shape that depends on values (``x[x > 0]``, ``unique``) would be the
first batch's for ever. Both may be asked of what is the same in every call, such as ``torch.arange(3)``.

`torch.fx.experimental.proxy_tensor.make_fx` is torch's own recorder. It takes a millisecond an operation, most of it
for stand-ins of values which nobody asks for here, and it lets pass in silence all of these but the first two.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_lvm.capture.operations import remove_unused, writes
from pyro_lvm.capture.replaced import replaced

__all__ = ["Unrecordable", "graph_of"]

aten: Any = torch.ops.aten

VALUE = "a tensor's value decides what happens next, or leaves the graph (.item(), if, bool, .numpy())"
SHAPE = "a tensor's value decides a shape (x[mask], nonzero, unique): torch.where and sums over a mask keep shapes"

OUTSIDE = "something is written into a tensor that is there before the step and is no buffer: register it as one"
SHARED = "something is written into a tensor that shares its memory with an array"
DATA = "another tensor is put in place of .data: copy_ writes into the one that is there"
GENERATOR = "a generator of its own draws: torch's own is the one that a fit seeds"

READ_OUTS = (
    "numpy",
    "tolist",
    "__dlpack__",
    "__repr__",
    "__deepcopy__",
    "__reduce_ex__",
    "apply_",
    "map_",
)
"""Methods of tensors that read values, or copy them, past the operations."""

MAKERS = ((torch, "tensor"), (torch, "as_tensor"), (torch, "asarray"), (Tensor, "new_tensor"))
"""Functions that do so with tensors in a list."""

MASKS = (torch.bool, torch.uint8)

PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))
"""Arguments that a graph writes down as they are."""


class Unrecordable(RuntimeError):
    """A function does what no graph can hold."""


def graph_of(function: Callable[..., Any], *example: Tensor) -> fx.GraphModule:
    """The operations that ``function`` does on tensors like ``example``; ``meta["shape"]`` holds each result's shape.

    Whatever else it uses is a constant of the graph: the tensor itself, not a copy. What nobody uses is left out, but
    neither writes nor draws.

    Raises:
        Unrecordable: if a value leaves the tensors, a shape depends on values, or an operation takes a tensor of a
            class of its own or another argument that no graph can hold.
    """
    recorder = _Recorder()
    for number, tensor in enumerate(example):
        recorder.is_given(tensor, number)
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it may hold casts of parameters, which would be constants
    try:
        with recorder, _watched(recorder):
            result = function(*example)
    finally:
        torch.set_autocast_cache_enabled(caches)
    return recorder.graph(result)


class _Recorder(TorchDispatchMode):
    """Runs every operation, and writes it down."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = fx.Graph()
        self._constants: dict[str, Tensor] = {}
        self._nodes: Any = WeakTensorKeyDictionary()  # weak: of what others hold, autograd makes copies
        self._fixed: set[fx.Node] = set()
        self._drawn: set[fx.Node] = set()
        self._outside: set[int] = set()
        self._shared: dict[int, StorageWeakRef] = {}  # as long as there is one, no other memory has that number
        self._changing: dict[int, StorageWeakRef] = {}

    def is_given(self, tensor: Tensor, number: int) -> None:
        """Take a tensor as the input of that number."""
        self._keep(tensor, self._graph.placeholder(f"input_{number}"))

    def graph(self, result: Any) -> fx.GraphModule:
        """The graph that gives ``result``."""
        self._graph.output(map_aggregate(result, lambda leaf: self._node(leaf) if isinstance(leaf, Tensor) else leaf))
        remove_unused(self._graph)
        if not self._drawn.isdisjoint(self._graph.nodes):
            raise Unrecordable(GENERATOR)
        return fx.GraphModule(self._constants, self._graph)

    def is_read(self, tensor: Tensor) -> None:
        """Refuse to let values leave the graph, unless they are the same in every call and stay what they are."""
        self.require_fixed([tensor], VALUE)
        self._shared[_memory(tensor)] = StorageWeakRef(tensor.untyped_storage())

    def require_fixed(self, tensors: list[Tensor], otherwise: str) -> None:
        """Refuse to ask for values, unless they are the same in every call."""
        if not all(map(self._is_fixed, tensors)):
            raise Unrecordable(otherwise)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and write it down."""
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        generators: list[torch.Generator] = []

        def noted(leaf: Any) -> Any:
            if type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided:
                tensors.append(leaf)
                return self._node(leaf)
            if isinstance(leaf, torch.Generator):
                generators.append(leaf)
            elif not isinstance(leaf, PLAIN):
                kind = f"{leaf.layout} tensor" if type(leaf) is Tensor else type(leaf).__name__
                raise Unrecordable(f"{operation} takes a {kind}, which no graph can hold")
            return leaf

        args_noted, kwargs_noted = map_aggregate((args, kwargs), noted)
        if torch.Tag.data_dependent_output in operation.tags:
            self.require_fixed(tensors, VALUE)
            return operation(*args, **kwargs)
        if torch.Tag.dynamic_output_shape in operation.tags:
            self.require_fixed(_deciding(operation, tensors), SHAPE)
        fixed = torch.Tag.nondeterministic_seeded not in operation.tags and all(map(self._is_fixed, tensors))
        if operation is aten.lift_fresh.default:
            operation = aten.lift_fresh_copy.default  # of `torch.tensor(1.0)`, which may be written to, in every call
        written = {_memory(tensor): tensor.untyped_storage() for tensor in _written(operation, args, kwargs)}
        if not written.keys().isdisjoint(self._outside):
            raise Unrecordable(OUTSIDE)
        if not written.keys().isdisjoint(self._shared):
            raise Unrecordable(SHARED)
        if not fixed:
            self._changing |= {number: StorageWeakRef(memory) for number, memory in written.items()}
        result = operation(*args, **kwargs)
        if generators:
            return self._of_another_generator(result)
        if operation is aten.detach.default:
            operation = aten.alias.default  # the same where nothing keeps gradients, and one name for it
        self._keep(result, self._graph.call_function(operation, args_noted, kwargs_noted), fixed)
        return result

    def _of_another_generator(self, result: Any) -> Any:
        """Draws that no graph repeats; a program may throw them away, such as where a parameter would start."""
        self._drawn.update(self._constant(tensor, fixed=False) for tensor in tree_leaves(result))
        return result

    def _keep(self, result: Any, node: fx.Node, fixed: bool = False) -> None:
        """Remember which node gave a tensor, or the tensors of a list."""
        if fixed:
            self._fixed.add(node)
        if isinstance(result, Tensor):
            if result.layout is not torch.strided:
                raise Unrecordable(f"a tensor of layout {result.layout} is made")
            self._nodes[result] = node
            node.meta["shape"] = result.shape
        elif isinstance(result, list | tuple):
            for number, part in enumerate(result):
                self._keep(part, self._graph.call_function(operator.getitem, (node, number)), fixed)

    def _node(self, tensor: Tensor) -> fx.Node:
        node: fx.Node | None = self._nodes.get(tensor)
        if node is not None:
            return node
        self._outside.add(_memory(tensor))
        return self._constant(tensor, fixed=True)

    def _constant(self, tensor: Tensor, fixed: bool) -> fx.Node:
        """A tensor that the graph holds: it itself, not a copy."""
        name = f"constant_{len(self._constants)}"
        self._constants[name] = tensor
        node = self._graph.get_attr(name)
        self._keep(tensor, node, fixed)
        return node

    def _is_fixed(self, tensor: Tensor) -> bool:
        """Whether a tensor is the same in every call."""
        node = self._nodes.get(tensor)
        return (node is None or node in self._fixed) and _memory(tensor) not in self._changing


def _watched(recorder: _Recorder) -> AbstractContextManager[None]:
    """Ask the recorder before values are taken from tensors by what is no operation.

    Torch's own way to see these calls, `TorchFunctionMode`, is not there in gradients and hooks.
    """

    def reading(method: Any) -> Any:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            recorder.is_read(self)
            return method(self, *args, **kwargs)

        return read

    def making(function: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            listed = tree_leaves([given for given in (*args, *kwargs.values()) if not isinstance(given, Tensor)])
            recorder.require_fixed([leaf for leaf in listed if isinstance(leaf, Tensor)], VALUE)
            return function(*args, **kwargs)

        return make

    def refuse(self: Tensor, value: Tensor) -> None:
        raise Unrecordable(DATA)

    data: Any = Tensor.data
    return replaced(
        [
            *((Tensor, name, reading(getattr(Tensor, name))) for name in READ_OUTS),
            *((owner, name, making(getattr(owner, name))) for owner, name in MAKERS),
            (Tensor, "data", property(data.__get__, refuse)),
        ]
    )


def _deciding(operation: Any, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors whose values decide the shape of what an operation gives."""
    return [mask for mask in tensors[1:] if mask.dtype in MASKS] if operation is aten.index.Tensor else tensors


def _written(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes into."""
    if not writes(operation):
        return []
    arguments = operation._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    written = [
        given.get(argument.name) for argument in arguments if argument.alias_info and argument.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """A number that no other memory has."""
    return int(tensor.untyped_storage()._cdata)

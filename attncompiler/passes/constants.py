"""Which tensors of a captured graph are constant, and what they hold.

What a graph makes of constants alone has one value for ever. A buffer, or a tensor of a closure or a module of Python, is an input
of Dynamo's graph: it is constant while it is the same tensor and nobody writes to it, which only the run can tell (`assumed.py`).
An argument of the call is never constant, however often it is the same.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import GlobalSource, LocalSource, NumpyTensorSource, UnspecializedNNModuleSource
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._python_dispatch import _disable_current_modes

from attncompiler.passes.memory import memory_root, writes, written_roots

_MOST_ELEMENTS = 1 << 28  # of one tensor: the mask of 16384 x 16384 pairs
_MOST_BYTES = 1 << 32  # of all that is made on the way to a constant


@dataclass(frozen=True)
class Recipe:
    """How a constant is made. `source`: the place of the one input that it is made of, None if it needs none."""

    module: GraphModule
    source: int | None

    def run(self, *source: Tensor) -> Tensor:
        """What the constant is if its input is `source`. Raises: what torch raises; TypeError where the result is of another type
        than in the trace."""
        with _disable_current_modes(), torch.no_grad():
            value: Tensor = _AsTraced(self.module).run(*source)
        return value


@dataclass(frozen=True)
class Constant:
    """What a node of the graph holds, and how it is made."""

    value: Tensor
    recipe: Recipe


class Constants:
    """The constants of one captured graph."""

    def __init__(self, captured: GraphModule, original: GraphModule, inputs: Sequence[object]) -> None:
        """`original`: Dynamo's graph, whose inputs those of `captured` are, one by one."""
        self.module = captured
        self.written = written_roots(captured.graph)
        # what Dynamo's graph holds as attributes may be a module's: no input shows when it is written
        self.theirs = {id(tensor) for tensor in [*original.parameters(), *original.buffers(), *vars(original).values()]}
        placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
        held = _held(original, inputs)
        changed = {_storage(inputs[i]) for i, node in enumerate(placeholders) if node in self.written}
        self.inputs: Mapping[Node, tuple[int, Tensor]] = {
            node: (i, held[i]) for i, node in enumerate(placeholders) if i in held and _storage(held[i]) not in changed
        }
        self.nodes: set[Node] = set()  # all that is constant
        for node in captured.graph.nodes:
            if self._is_constant(node) and self.nodes.issuperset(node.all_input_nodes):
                self.nodes.add(node)
        self.memo: dict[Node, Constant | None] = {}

    def of(self, node: Node) -> Constant | None:
        """What `node` holds; None where it is no constant, or one that is too large to make."""
        if node not in self.memo:
            self.memo[node] = self._evaluated(node)
        return self.memo[node]

    def is_last(self, node: Node) -> bool:
        """True for a constant that something else than a constant is made of."""
        return node in self.nodes and not self.nodes.issuperset(node.users)

    def _evaluated(self, node: Node) -> Constant | None:
        if node not in self.nodes:
            return None
        ancestors = self._ancestors(node)
        sources = [ancestor for ancestor in ancestors if ancestor in self.inputs]
        made = sum(_bytes(ancestor) for ancestor in ancestors if ancestor.op == "call_function")
        if len(sources) > 1 or made > _MOST_BYTES:
            return None
        graph = Graph()
        copies: dict[Node, Node] = {}
        for ancestor in ancestors:
            copies[ancestor] = graph.node_copy(ancestor, lambda n: copies[n])
        graph.output(copies[node])
        source, tensors = (self.inputs[sources[0]][0], [self.inputs[sources[0]][1]]) if sources else (None, [])
        recipe = Recipe(GraphModule(self.module, graph), source)
        try:
            return Constant(recipe.run(*tensors), recipe)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            return None  # no such device here, no memory: then it is read as any tensor is

    def _ancestors(self, node: Node) -> list[Node]:
        """All that `node` is made of, itself last."""
        seen: set[Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current not in seen:
                seen.add(current)
                stack.extend(current.all_input_nodes)
        return [n for n in self.module.graph.nodes if n in seen]

    def _is_constant(self, node: Node) -> bool:
        """Whether `node` is constant if what it is made of is."""
        if memory_root(node) in self.written:
            return False
        if node.op == "placeholder":
            return node in self.inputs
        if node.op == "get_attr":
            value = self.module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and id(value) not in self.theirs
        if node.target is operator.getitem:
            return True
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or writes(node):
            return False
        results = node.meta["val"] if isinstance(node.meta.get("val"), tuple | list) else (node.meta.get("val"),)
        sized = all(
            isinstance(r, Tensor) and all(isinstance(size, int) for size in r.shape) and r.numel() <= _MOST_ELEMENTS
            for r in results
        )
        return sized and torch.Tag.nondeterministic_seeded not in node.target.tags


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


class _AsTraced(Interpreter):
    """Runs a recipe. Raises: TypeError where a result is not of the type that it had in the trace (autocast, say)."""

    def run_node(self, n: Node) -> Any:
        value, traced = super().run_node(n), n.meta.get("val")
        if n.op == "call_function" and isinstance(traced, Tensor) and (value.dtype, value.shape) != (traced.dtype, traced.shape):
            raise TypeError(f"{n.name} is {value.dtype} {tuple(value.shape)}, not {traced.dtype} {tuple(traced.shape)}")
        return value


def _storage(tensor: object) -> int | None:
    return tensor.untyped_storage()._cdata if isinstance(tensor, Tensor) and is_plain(tensor) else None


def is_plain(tensor: object) -> bool:
    """True for a tensor whose writes torch counts: not for one of inference mode, or in memory that NumPy, a file or another
    process has too."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    assert isinstance(tensor, Tensor)
    if tensor.is_inference() or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return False
    return tensor.untyped_storage().resizable() and not (tensor.device.type == "cpu" and tensor.is_shared())


def _held(original: GraphModule, inputs: Sequence[object]) -> dict[int, Tensor]:
    """The inputs that are held by a module, a closure or a module of Python, and carry no gradient."""
    placeholders = [node for node in original.graph.nodes if node.op == "placeholder"]
    return {
        i: tensor
        for i, (node, tensor) in enumerate(zip(placeholders, inputs, strict=False))
        if is_plain(tensor) and isinstance(tensor, Tensor) and not tensor.requires_grad
        if _is_held(getattr(node, "_dynamo_source", None))
    }


def _is_held(source: Any) -> bool:
    """Whether Dynamo found a tensor elsewhere than among the arguments of the call; without Dynamo nothing is known."""
    while source is not None and not isinstance(source, NumpyTensorSource):
        if isinstance(source, UnspecializedNNModuleSource | GlobalSource):
            return True
        if isinstance(source, LocalSource) and source.is_derefed_cell_contents:
            return True
        source = getattr(source, "base", None)
    return False

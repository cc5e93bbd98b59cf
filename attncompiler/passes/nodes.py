"""What the passes ask of a node of the traced graph: shapes, dtypes, families of operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from attncompiler.ir.expr import (
    Axis,
    Expr,
)
from attncompiler.ir.program import Dtype
from attncompiler.passes.sizes import Extent

aten = torch.ops.aten
DTYPES: Mapping[torch.dtype, Dtype] = {
    torch.float64: Dtype.F64, torch.float32: Dtype.F32, torch.bfloat16: Dtype.BF16, torch.float16: Dtype.F16,
    torch.bool: Dtype.BOOL, torch.uint8: Dtype.U8, torch.int8: Dtype.I8, torch.int16: Dtype.I16, torch.int32: Dtype.I32,
    torch.int64: Dtype.I64,
}  # fmt: skip
Index = tuple[Expr, ...]
CHANNEL = Axis("channel")  # the summed letter of a dot product while its sides are read


@dataclass(frozen=True, slots=True)
class Weights(Expr):
    """softmax (or log_softmax) of a traced tensor over one dimension, at an index; seen only while recognising."""

    node: Node
    index: Index
    log: bool


@dataclass(frozen=True, slots=True)
class RowReduce(Expr):
    """A reduction of a traced tensor over one dimension; `index` is that of its input, with kv_idx at the reduced place."""

    op: str
    node: Node
    index: Index


@dataclass(frozen=True, slots=True)
class NanToZero(Expr):
    """torch.nan_to_num of weights."""

    inner: Expr

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.inner,)


KV = Axis("kv_idx")
CASTS = frozenset({"to", "_to_copy", "type_as", "float", "half", "bfloat16", "double", "int", "long", "bool"})
SAME_ELEMENT = frozenset({"contiguous", "clone", "alias", "lift_fresh", "lift_fresh_copy", "detach", "positive"})
RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"})
PERMUTES = frozenset({"transpose", "permute", "mT", "t", "numpy_T", "movedim", "swapaxes", "swapdims", "matrix_H", "mH", "T"})
EXPANDS = frozenset({"expand", "expand_as", "broadcast_to"})
INLINE_LIMIT = 96  # nodes of one side expression; a longer one is cheaper to read than to compute for every pair


def shape_of(node: Node) -> tuple[Extent, ...]:
    return tuple(node.meta["val"].shape)


def dtype_of(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def is_tensor(value: object) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


@dataclass(frozen=True)
class Made:
    """What an op of ours makes of nodes of the graph: `name` in torch.ops.attncompiler, and its arguments, and which of its
    results, where it has several."""

    name: str
    arguments: tuple[Node | int | float | bool, ...]
    result: int = -1

    @property
    def has_several(self) -> bool:
        return self.result >= 0

    @property
    def op(self) -> torch._ops.OpOverload:
        found: torch._ops.OpOverload = getattr(torch.ops.attncompiler, self.name).default
        return found


@dataclass(frozen=True)
class Operand:
    """How one operand of a program is made in the graph: a node, its channel moved last and cast if need be; a new seed; a table
    that the compiler made, on the node's device; or what an op makes of nodes, of which `node` is one."""

    node: Node
    channel_place: int | None = None
    dtype: torch.dtype | None = None
    is_seed: bool = False
    table: torch.Tensor | None = None
    made: Made | None = None

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that it is computed from."""
        if self.made is not None:
            return tuple(argument for argument in self.made.arguments if isinstance(argument, Node))
        return () if self.is_seed else (self.node,)

    @property
    def is_plain(self) -> bool:
        """True where the operand is what the node is."""
        return self == Operand(self.node)

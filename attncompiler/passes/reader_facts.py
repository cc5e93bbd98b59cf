"""What the graph tells of the tensors that a factor of scores reads: signs, running sums, numbers that are known, what is the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from attncompiler.ir.evaluate import box
from attncompiler.ir.expr import KV_IDX, Axis, Const, Dot, Expr, Read, Size, Uniform, apply, axes_of, transform, walk
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.nodes import CASTS
from attncompiler.passes.reader import Reader
from attncompiler.passes.signs import Sign, sign_of, sign_of_values
from attncompiler.passes.state_site import StateContext

_MOST_NUMBERS = 4096  # as many heads as anyone has


@dataclass(frozen=True)
class ReaderFacts:
    """Facts (separable.py) of what one reader has read."""

    context: StateContext
    reader: Reader

    def equal(self, element: Expr) -> Expr:
        """The element with one name for reads of nodes that compute the same."""

        def visit(expr: Expr) -> Expr | None:
            if isinstance(expr, Dot):
                return expr
            if isinstance(expr, Read) and self.reader.leaves[expr.tensor].is_plain:
                first = self.context.equal[self.reader.leaves[expr.tensor].node]
                return self.reader.leaf(first, tuple(transform(entry, visit) for entry in expr.index))
            return None

        return transform(element, visit)

    def sign(self, read: Read) -> Sign:
        operand = self.reader.leaves[read.tensor]
        if operand.table is not None:
            return Sign.NOT_NEGATIVE  # rates that `decay_matrix` found
        return sign_of(operand.node, self.context.masks.constants)

    def summand(self, read: Read) -> Expr | None:
        """What a running sum over the positions sums."""
        node, index = self.reader.leaves[read.tensor].node, read.index
        return self._summed(node, index)

    def _summed(self, node: Node, index: tuple[Expr, ...]) -> Expr | None:
        name = base_name(node.target)
        if name == "cumsum":
            source, dim = node.args[:2]
            assert isinstance(source, Node) and isinstance(dim, int)
            dim %= len(index)
            if index[dim] != KV_IDX or any("kv_idx" in axes_of(i) for place, i in enumerate(index) if place != dim):
                return None
            return self.reader.leaf(source, index)
        if not node.args or not isinstance(node.args[0], Node):
            return None
        if name in ("mul", "div") and isinstance(node.args[1], int | float) and "rounding_mode" not in node.kwargs:
            inner = self._summed(node.args[0], index)
            return None if inner is None else apply(name, inner, Const(float(node.args[1])))
        if name == "neg" or name in CASTS:
            inner = self._summed(node.args[0], index)
            return inner if inner is None or name != "neg" else apply("neg", inner)
        return None

    def sign_of_numbers(self, expr: Expr) -> Sign:
        """The sign of an expression of positions alone, where it has few values: they are looked at, in two precisions."""
        nodes = tuple(walk(expr))
        axes = [node for node in nodes if isinstance(node, Axis)]
        extents = [self.reader.space.extent(axis) for axis in axes]
        if any(isinstance(node, Read | Size | Uniform) for node in nodes) or not all(isinstance(e, int) and e for e in extents):
            return Sign.ANY
        known = {axis.name: int(extent) for axis, extent in zip(axes, extents, strict=True)}
        if math.prod(known.values()) > _MOST_NUMBERS:
            return Sign.ANY
        found = {sign_of_values(self._numbers(expr, known, dtype)) for dtype in (torch.float64, torch.float32)}
        return found.pop() if len(found) == 1 else Sign.ANY

    @staticmethod
    def _numbers(expr: Expr, extents: dict[str, int], dtype: torch.dtype) -> Tensor:
        return box({}, {}, extents, dtype, torch.device("cpu")).tensor(expr)

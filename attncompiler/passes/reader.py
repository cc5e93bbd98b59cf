"""What one element of a traced tensor is, as an expression over the axes of an attention.

`Reader.element(node, index)` looks through views, broadcasts, masks, position arithmetic and elementwise operators, down to dot
products and to tensors that the rest of the graph computes. Views thereby vanish: only index arithmetic remains.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import (
    ZERO,
    Apply,
    Const,
    Dot,
    Expr,
    Read,
    Uniform,
    add,
    apply,
    axes_of,
    mul,
    walk,
)
from attncompiler.passes.constant_masks import ConstantMasks
from attncompiler.passes.contraction import Contraction, argument, contraction_of
from attncompiler.passes.elementwise import BOOLEAN_ONLY, COMPOSED, ELEMENTWISE, base_name
from attncompiler.passes.memory import memory_root, written_roots
from attncompiler.passes.nodes import (
    CASTS,
    CHANNEL,
    EXPANDS,
    INLINE_LIMIT,
    KV,
    PERMUTES,
    RESHAPES,
    Index,
    NanToZero,
    Operand,
    RowReduce,
    Weights,
    dtype_of,
    is_tensor,
    shape_of,
)
from attncompiler.passes.operators import HANDLERS, MOVES, dim_of, rounds, shifted
from attncompiler.passes.sizes import Extent, IndexSpace, same, size_expr


def _is_choice(node: Node) -> bool:
    """True for a tensor that marks indices."""
    counted = node.args[0] if base_name(node.target) == "sum" else None
    return base_name(node.target) == "scatter" or (isinstance(counted, Node) and base_name(counted.target) == "one_hot")


class Reader:
    """Reads elements of the tensors of one graph in one index space."""

    def __init__(self, module: GraphModule, space: IndexSpace, trained: frozenset[Node], masks: ConstantMasks) -> None:
        self.module, self.space, self.trained, self.masks = module, space, trained, masks
        self.written = written_roots(module.graph)
        self.leaves: dict[str, Operand] = {}
        self.memo: dict[tuple[Node, Index], Expr] = {}

    # ------------------------------------------------------------------------------------------------ elements

    def element(self, node: Node, index: Index) -> Expr:
        """The element of `node` at `index`. Always succeeds: what is not understood is read as a tensor."""
        key = (node, index)
        if key not in self.memo:
            try:
                found = self._look_through(node, index)
            except Unrecognised:
                found = None
            if found is None or self._better_read(node, found) or self._has_rule(node, index, found):
                found = self.leaf(node, index)
            self.memo[key] = found
        return self.memo[key]

    def leaf(self, node: Node, index: Index) -> Read:
        self.leaves[node.name] = Operand(node)
        return Read(node.name, index)

    def _has_rule(self, node: Node, index: Index, expr: Expr) -> bool:
        """True for a constant that a rule explains better than `expr`, what it is computed from: tensors of pairs, or pieces that
        were assigned one by one. It is lifted as a whole when the program is finished."""
        if isinstance(expr, Read) or not self.masks.constants.is_last(node):
            return False
        nodes = list(walk(expr))
        of_pairs = any(
            isinstance(n, Read)
            and {"q_idx", "kv_idx"} <= axes_of(n)
            and not self.masks.explains(self.leaves[n.tensor].node, n.index)
            for n in nodes
        )
        pieces = sum(isinstance(n, Apply) and n.op == "where" for n in nodes)
        return (of_pairs or pieces > 1) and self.masks.explains(node, index)

    def _better_read(self, node: Node, expr: Expr) -> bool:
        """True for side inputs that are cheaper read than computed for every pair: one value a row, a column or a head."""
        nodes = list(walk(expr))
        if any(isinstance(n, Dot | Weights | RowReduce | Uniform | NanToZero) for n in nodes) or isinstance(expr, Read | Const):
            return False
        read = [n for n in nodes if isinstance(n, Read)]
        if dtype_of(node) is torch.bool and any(_is_choice(self.leaves[n.tensor].node) for n in read):
            return False  # keys that were chosen: a part of the mask, by which they may become a list
        if not read or (isinstance(expr, Apply) and expr.op == "not" and isinstance(expr.args[0], Read)):
            return False
        varies = axes_of(expr)
        if dtype_of(node) is torch.bool and not any({"q_idx", "kv_idx"} & axes_of(n) for n in nodes if isinstance(n, Read)):
            return False  # keys before a length: a run of keys, that plans and kernels take by its end
        return not {"q_idx", "kv_idx"} <= varies or len(nodes) > INLINE_LIMIT

    def _look_through(self, node: Node, index: Index) -> Expr | None:
        if node.op == "get_attr":
            return self._constant(node)
        if node.op != "call_function" or memory_root(node) in self.written:
            return None  # an input, or a tensor that is changed in place: only its memory knows its value
        if node.target is operator.getitem:
            return self._piece(node, index)
        name = base_name(node.target)
        handler = HANDLERS.get(name)
        if handler is not None:
            return handler(self, node, index)
        if name in ELEMENTWISE or (name in COMPOSED and self._is_of_pairs(index)):
            return self._elementwise(name, node, index)
        contraction = contraction_of(node)
        return self._dot(contraction, index) if contraction is not None else None

    def _is_of_pairs(self, index: Index) -> bool:
        """True for what there is one of for each pair: what there are fewer of is cheaper read, and hides no layer behind it."""
        return {"q_idx", "kv_idx"} <= {name for entry in index for name in axes_of(entry)}

    def operand(self, value: Any, out_shape: Sequence[Extent], index: Index) -> Expr:
        """An argument of an elementwise operator at the output's index: a number, or a tensor broadcast to the output."""
        if isinstance(value, bool | int | float):
            return Const(value)
        if not isinstance(value, Node):
            raise Unrecognised(f"an operand of type {type(value).__name__}")
        found = value.meta.get("val")
        if isinstance(found, torch.SymInt | int) and not isinstance(found, bool):
            return size_expr(found)
        if not isinstance(found, torch.Tensor):
            raise Unrecognised("an operand that is a run-time number")
        return self.element(value, self.broadcast(value, out_shape, index))

    def broadcast_letters(self, node: Node, letters: str, at: Mapping[str, Expr]) -> Index:
        """The index of `node` where each dimension stands for a letter; a dimension of size 1 is read at 0."""
        return tuple(
            ZERO if same(size, 1) and at[letter] != CHANNEL and not same(self.space.extent(at[letter]), 1) else at[letter]
            for letter, size in zip(letters, shape_of(node), strict=True)
        )

    def broadcast(self, node: Node, out_shape: Sequence[Extent], index: Index) -> Index:
        shape = shape_of(node)
        skipped = len(out_shape) - len(shape)
        return tuple(
            ZERO if same(size, 1) and not same(out, 1) else index[skipped + place]
            for place, (size, out) in enumerate(zip(shape, out_shape[skipped:], strict=True))
        )

    def _elementwise(self, name: str, node: Node, index: Index) -> Expr | None:
        if isinstance(node.meta["val"], tuple | list) or (name in ("max", "min") and len(node.args) < 2):
            return None
        if name in BOOLEAN_ONLY and dtype_of(node) is not torch.bool:
            return None
        if dtype_of(node) is torch.bool and name in BOOLEAN_FORMS:
            name = BOOLEAN_FORMS[name]
        shape = shape_of(node)
        arithmetic = name not in ("where", "masked_fill", "eq", "ne") and name not in BOOLEAN_ONLY

        def convert(value: Any) -> Any:
            if value is None or isinstance(value, str):
                return value
            expr = self.operand(value, shape, index)
            if dtype_of(node) is torch.bool and rounds(expr):
                raise Unrecognised("a comparison of rounded numbers", why="evaluated in another precision it could differ")
            boolean = is_tensor(value) and dtype_of(value) is torch.bool
            return apply("to_int", expr) if boolean and arithmetic and not name.startswith("logical") else expr

        named = {
            key: value if key in ("alpha", "rounding_mode") else convert(value)
            for key, value in node.kwargs.items()
            if key != "out"
        }
        args = [convert(arg) for arg in node.args]
        if name in ("fill", "masked_fill") and dtype_of(node) is torch.bool:
            args[-1] = apply("to_bool", args[-1])  # mask[a:b] = True is a fill with the number 1
        result = (ELEMENTWISE.get(name) or COMPOSED[name])(*args, **named)
        return self._rounded(node, result)

    @staticmethod
    def _rounded(node: Node, expr: Expr) -> Expr:
        """In float16 a finite mask such as finfo.min swallows a score only through rounding: keep that rounding."""
        if dtype_of(node) is torch.float16 and any(
            isinstance(n, Const) and isinstance(n.value, float) and -float("inf") < n.value <= -1e4 for n in walk(expr)
        ):
            return apply("round_f16", expr)
        return expr

    def _constant(self, node: Node) -> Expr | None:
        value = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.requires_grad:
            return Const(value.item())
        return None

    # ------------------------------------------------------------------------------------------- dot products

    def _dot(self, product: Contraction, index: Index) -> Expr | None:
        if len(product.summed) != 1:
            return None
        at = dict(zip(product.out_letters, index, strict=True))
        at[product.summed] = CHANNEL
        sides = [(product.left, product.left_letters), (product.right, product.right_letters)]
        first = axes_of(self.vector(*sides[0], at, "query", product.dtype)[0])
        if "kv_idx" in first or "q_idx" in axes_of(self.vector(*sides[1], at, "key", product.dtype)[0]):
            sides.reverse()
        (left, left_scale), (right, right_scale) = (
            self.vector(*side, at, role, product.dtype) for side, role in zip(sides, ("query", "key"), strict=True)
        )
        if "kv_idx" in axes_of(left) or "q_idx" in axes_of(right):
            return None  # the vectors themselves depend on the pair: read the product as a tensor
        result: Expr = Dot(left, right)
        scale = left_scale * right_scale * product.alpha
        if scale != 1.0:
            result = mul(result, Const(scale))
        if product.bias is not None:
            bias = self.operand(product.bias, [self.extent_of(product, c) for c in product.out_letters], index)
            result = add(result, bias if product.beta == 1.0 else mul(bias, Const(product.beta)))
        return result

    @staticmethod
    def extent_of(product: Contraction, letter: str) -> Extent:
        """The size of a letter: that of whichever side does not broadcast."""
        sizes = [
            shape_of(node)[letters.index(letter)]
            for node, letters in ((product.left, product.left_letters), (product.right, product.right_letters))
            if letter in letters
        ]
        return next((size for size in sizes if not same(size, 1)), sizes[0])

    def vector(
        self, node: Node, letters: str, at: Mapping[str, Expr], role: str, dtype: torch.dtype, widen: bool = True
    ) -> tuple[Read, float]:
        """One side of a product as a vector read, times a constant: looks through what would copy or rescale a whole operand.

        The channel is moved to the end by a view where it is not there already; an operand wider than the product's own `dtype`
        (autocast) is cast to it. `widen`: a cast to a wider dtype may be skipped, the products being exact either way."""
        index = self.broadcast_letters(node, letters, at)
        best, scale = (node, index, 1.0), 1.0
        current = node
        while (step := self._peel(current, index, widen)) is not None:
            current, index, factor, worthwhile = step
            scale *= factor
            if worthwhile:
                best = (current, index, scale)
        node, index, scale = best
        return self._vector_operand(node, index, role, dtype), scale

    def _vector_operand(self, node: Node, index: Index, role: str, dtype: torch.dtype) -> Read:
        place = index.index(CHANNEL)
        last = place == len(index) - 1
        narrowed = (dtype, dtype_of(node)) in WIDENING
        name = f"{node.name}.{role}.{place}"
        self.leaves[name] = Operand(node, None if last else place, dtype if narrowed else None)
        return Read(name, index[:place] + index[place + 1 :])

    def _peel(self, node: Node, index: Index, widen: bool) -> tuple[Node, Index, float, bool] | None:
        """The input of `node` where its vectors are the same up to a constant, and whether reading there saves a copy."""
        if node.op != "call_function" or not node.args or not is_tensor(node.args[0]):
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        name = base_name(node.target)
        if name in ("mul", "div") and isinstance(node.args[1], int | float) and dtype_of(source) == dtype_of(node):
            if not node.meta["val"].is_floating_point() or "rounding_mode" in node.kwargs:
                return None
            number = float(node.args[1])
            return source, index, number if name == "mul" else 1.0 / number, True
        if name in CASTS:
            widened = widen and (dtype_of(source), dtype_of(node)) in WIDENING
            return (source, index, 1.0, True) if widened else None
        if name in ("contiguous", "clone"):
            return source, index, 1.0, True
        if name in PERMUTES or name in EXPANDS or name in RESHAPES or name == "repeat_interleave":
            try:
                inner = MOVES[name](self, node, index)
            except Unrecognised:
                return None
            if inner.count(CHANNEL) != 1 or any(CHANNEL in set(walk(i)) and i != CHANNEL for i in inner):
                return None
            saves = name in EXPANDS or name in ("repeat_interleave", "unsqueeze")
            merges = name in RESHAPES and len(shape_of(source)) > len(shape_of(node))
            channel_moves_last = inner[-1] == CHANNEL and index[-1] != CHANNEL
            return source, inner, 1.0, saves or merges or channel_moves_last
        return None

    # ------------------------------------------------------------------------------------------------ pieces

    def _piece(self, node: Node, index: Index) -> Expr | None:
        source, which = node.args
        assert isinstance(source, Node) and isinstance(which, int)
        name = base_name(source.target)
        if name in ("max", "min") and which == 0 and len(source.args) >= 2:
            return self.row_reduce("max" if name == "max" else "min", source, index)
        tensor = source.args[0]
        if not isinstance(tensor, Node) or not is_tensor(tensor):
            return None
        dim = dim_of(source, 1 if name == "unbind" else 2, tensor)
        if name == "unbind":
            return self.element(tensor, (*index[:dim], Const(which), *index[dim:]))
        if name in ("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk"):
            start: Extent = 0
            for piece in source.meta["val"][:which]:
                start = start + piece.shape[dim]
            return self.element(tensor, shifted(index, dim, size_expr(start)))
        return None

    def row_reduce(self, op: str, node: Node, index: Index) -> Expr | None:
        """A reduction over one dimension, left symbolic; recognise decides whether it belongs to a normaliser."""
        source = node.args[0]
        assert isinstance(source, Node)
        dims = argument(node, 1, "dim")
        dims = list(dims) if isinstance(dims, Sequence) else [dims]
        if len(dims) != 1 or not isinstance(dims[0], int):
            return None
        dim = dims[0] % source.meta["val"].dim()
        keeps = bool(argument(node, 2, "keepdim", False))
        inner = (*index[:dim], KV, *index[dim + (1 if keeps else 0) :])
        body = self.element(source, inner)
        if not any(isinstance(n, Dot | Weights) for n in walk(body)):
            return None  # a sum of something that is no score
        return RowReduce(op, source, inner)


WIDENING = {
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.float64),
    (torch.float16, torch.float64), (torch.float32, torch.float64),
}  # fmt: skip
# What arithmetic on booleans means.
BOOLEAN_FORMS = {"mul": "bitwise_and", "add": "bitwise_or"}

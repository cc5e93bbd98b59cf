"""What one element of a traced tensor is, as an expression over the axes of an attention.

`Reader.element(node, index)` looks through views, broadcasts, masks, position arithmetic and elementwise operators, down to dot
products and to tensors that the rest of the graph computes. Views thereby vanish: only index arithmetic remains.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import (
    ONE,
    ZERO,
    Apply,
    Axis,
    Const,
    Dot,
    Expr,
    Read,
    Uniform,
    add,
    apply,
    axes_of,
    floordiv,
    mod,
    mul,
    sub,
    surely_int,
    walk,
)
from attncompiler.passes.contraction import Contraction, argument, contraction_of
from attncompiler.passes.elementwise import BOOLEAN_ONLY, ELEMENTWISE, base_name
from attncompiler.passes.memory import memory_root, written_roots
from attncompiler.passes.sizes import Extent, IndexSpace, same, size_expr

aten = torch.ops.aten
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
class Operand:
    """How one operand of a program is made in the graph: a node, its channel moved last and cast if need be, or a new seed."""

    node: Node
    channel_place: int | None = None
    dtype: torch.dtype | None = None
    is_seed: bool = False


class Reader:
    """Reads elements of the tensors of one graph in one index space."""

    def __init__(self, module: GraphModule, space: IndexSpace, trained: frozenset[Node]) -> None:
        self.module, self.space, self.trained = module, space, trained
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
            if found is None or self._better_read(node, found):
                found = self.leaf(node, index)
            self.memo[key] = found
        return self.memo[key]

    def leaf(self, node: Node, index: Index) -> Read:
        self.leaves[node.name] = Operand(node)
        return Read(node.name, index)

    def _better_read(self, node: Node, expr: Expr) -> bool:
        """True for side inputs that are cheaper read than computed for every pair: one value a row, a column or a head."""
        nodes = list(walk(expr))
        if any(isinstance(n, Dot | Weights | RowReduce | Uniform | NanToZero) for n in nodes) or isinstance(expr, Read | Const):
            return False
        if not any(isinstance(n, Read) for n in nodes) or (
            isinstance(expr, Apply) and expr.op == "not" and isinstance(expr.args[0], Read)
        ):
            return False
        varies = axes_of(expr)
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
        if name in ELEMENTWISE:
            return self._elementwise(name, node, index)
        contraction = contraction_of(node)
        return self._dot(contraction, index) if contraction is not None else None

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
            if dtype_of(node) is torch.bool and _rounds(expr):
                raise Unrecognised("a comparison of rounded numbers", why="evaluated in another precision it could differ")
            boolean = is_tensor(value) and dtype_of(value) is torch.bool
            return apply("to_int", expr) if boolean and arithmetic and not name.startswith("logical") else expr

        named = {
            key: value if key in ("alpha", "rounding_mode") else convert(value)
            for key, value in node.kwargs.items()
            if key != "out"
        }
        args = [convert(arg) for arg in node.args]
        result = ELEMENTWISE[name](*args, **named)
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
        dim = _dim(source, 1 if name == "unbind" else 2, tensor)
        if name == "unbind":
            return self.element(tensor, (*index[:dim], Const(which), *index[dim:]))
        if name in ("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk"):
            start: Extent = 0
            for piece in source.meta["val"][:which]:
                start = start + piece.shape[dim]
            return self.element(tensor, _shifted(index, dim, size_expr(start)))
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


def _rounds(expr: Expr) -> bool:
    """True for floating arithmetic on tensors: its value depends on the precision that it is computed in."""
    nodes = list(walk(expr))
    if not any(isinstance(n, Read | Dot | Weights | RowReduce) for n in nodes):
        return False
    return any(isinstance(n, Apply) and not surely_int(n) and n.op in _ROUNDING for n in nodes) or any(
        isinstance(n, Dot) for n in nodes
    )


_ROUNDING = frozenset({"add", "sub", "mul", "div", "pow", "exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "sin", "cos", "erf"})
Handler = Callable[[Reader, Node, Index], Expr | None]
Move = Callable[[Reader, Node, Index], Index]


def _dim(node: Node, place: int, tensor: Node) -> int:
    dim = argument(node, place, "dim", 0)
    assert isinstance(dim, int)
    return dim % int(tensor.meta["val"].dim())


def _shifted(index: Index, dim: int, start: Expr, step: Expr = ONE) -> Index:
    return (*index[:dim], add(mul(index[dim], step), start), *index[dim + 1 :])


# --------------------------------------------------------------------------------------- views: only the index changes


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _move_reshape(reader: Reader, node: Node, index: Index) -> Index:
    return reader.space.reshape(index, shape_of(node), shape_of(_source(node)))


def _move_permute(reader: Reader, node: Node, index: Index) -> Index:
    source = _source(node)
    order = list(range(len(index)))
    name, args = base_name(node.target), node.args[1:]
    if name == "permute":
        dims = [d % len(order) for d in args[0]]  # type: ignore[union-attr, operator]
        order = [dims.index(i) for i in range(len(dims))]
    elif name in ("transpose", "swapaxes", "swapdims"):
        a, b = (int(d) % len(order) for d in args[:2])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    elif name == "movedim":
        dims = list(torch.empty([0] * len(order)).movedim(*args).shape)  # type: ignore[arg-type]
        probe = torch.empty(tuple(range(1, len(order) + 1))).movedim(*args)  # type: ignore[arg-type]
        order = [list(probe.shape).index(i + 1) for i in range(len(dims))]
    elif name in ("numpy_T", "T"):
        order = order[::-1]
    elif len(order) > 1:
        order[-1], order[-2] = order[-2], order[-1]
    assert len(order) == len(shape_of(source))
    return tuple(index[place] for place in order)


def _move_expand(reader: Reader, node: Node, index: Index) -> Index:
    return reader.broadcast(_source(node), shape_of(node), index)


def _move_repeat_interleave(reader: Reader, node: Node, index: Index) -> Index:
    source = _source(node)
    if node.target is not aten.repeat_interleave.self_int or not isinstance(node.args[1], int):
        raise Unrecognised("repeat_interleave with a tensor of repeats")
    dim = argument(node, 2, "dim")
    if not isinstance(dim, int):
        raise Unrecognised("repeat_interleave of a flattened tensor")
    dim %= len(shape_of(source))
    return (*index[:dim], floordiv(index[dim], Const(node.args[1])), *index[dim + 1 :])


MOVES: Mapping[str, Move] = {
    **dict.fromkeys(RESHAPES, _move_reshape),
    **dict.fromkeys(PERMUTES, _move_permute),
    **dict.fromkeys(EXPANDS, _move_expand),
    "repeat_interleave": _move_repeat_interleave,
}


def _through(move: Move) -> Handler:
    return lambda reader, node, index: reader.element(_source(node), move(reader, node, index))


def _same_element(reader: Reader, node: Node, index: Index) -> Expr | None:
    if base_name(node.target) == "detach" and node.args[0] in reader.trained:
        return None  # cuts a gradient: what is behind it must not receive one
    return reader.element(_source(node), index)


def _slice(reader: Reader, node: Node, index: Index) -> Expr | None:
    source = _source(node)
    dim = _dim(node, 1, source)
    start = argument(node, 2) or 0
    step = argument(node, 4, default=1)
    begin = start.meta["val"] if isinstance(start, Node) else start
    if isinstance(begin, int) and begin < 0:
        begin = shape_of(source)[dim] + begin
    if not isinstance(step, int) or not isinstance(begin, int | torch.SymInt):
        return None
    if not isinstance(begin, int) and not _known_in_range(begin, shape_of(source)[dim]):
        if step != 1 or not _runs_to_end(node, source, dim):
            return None
        begin = shape_of(source)[dim] - shape_of(node)[dim]
    return reader.element(source, _shifted(index, dim, size_expr(begin), Const(step)))


def _known_in_range(begin: torch.SymInt, size: Extent) -> bool:
    return bool(statically_known_true(begin >= 0)) and bool(statically_known_true(begin <= size))


def _runs_to_end(node: Node, source: Node, dim: int) -> bool:
    end = argument(node, 3)
    value = end.meta["val"] if isinstance(end, Node) else end
    if value is None or (isinstance(value, int) and value >= 2**31):
        return True
    return same(value, shape_of(source)[dim])


def _slice_scatter(reader: Reader, node: Node, index: Index) -> Expr | None:
    """base with [start, end) along one dimension taken from another tensor."""
    base, source = node.args[:2]
    assert isinstance(base, Node) and isinstance(source, Node)
    dim = argument(node, 2, default=0) % len(index)
    start = argument(node, 3) or 0
    step = argument(node, 5, default=1)
    length = shape_of(source)[dim]
    if not isinstance(start, int) or start < 0 or step != 1:
        return None
    local = sub(index[dim], Const(start))
    inner = reader.element(source, (*index[:dim], local, *index[dim + 1 :]))
    if same(length, shape_of(base)[dim]) or reader.space.below(local, length):
        return inner
    inside = apply("lt", local, size_expr(length))
    if start > 0:
        inside = apply("and", apply("ge", local, ZERO), inside)
    return apply("where", inside, inner, reader.element(base, index))


def _select(reader: Reader, node: Node, index: Index) -> Expr | None:
    source = _source(node)
    dim = _dim(node, 1, source)
    which = argument(node, 2)
    value = which.meta["val"] if isinstance(which, Node) else which
    if isinstance(value, int) and value < 0:
        value = shape_of(source)[dim] + value
    return reader.element(source, (*index[:dim], size_expr(value), *index[dim:]))


def _repeat(reader: Reader, node: Node, index: Index) -> Expr | None:
    source = _source(node)
    shape = shape_of(source)
    inner = index[len(index) - len(shape) :]
    wrapped = tuple(
        ZERO if same(size, 1) else i if same(size, out) else mod(i, size_expr(size))
        for i, size, out in zip(inner, shape, shape_of(node)[len(index) - len(shape) :], strict=True)
    )
    return reader.element(source, wrapped)


def _flip(reader: Reader, node: Node, index: Index) -> Expr | None:
    source = _source(node)
    dims = [d % len(index) for d in node.args[1]]  # type: ignore[union-attr, operator]
    flipped = [
        sub(sub(size_expr(s), Const(1)), i) if d in dims else i
        for d, (i, s) in enumerate(zip(index, shape_of(source), strict=True))
    ]
    return reader.element(source, tuple(flipped))


def _cat(reader: Reader, node: Node, index: Index) -> Expr | None:
    parts = node.args[0]
    assert isinstance(parts, Sequence)
    first = parts[0]
    assert isinstance(first, Node)
    dim = _dim(node, 1, first)
    at = index[dim]
    start: Extent = 0
    pieces: list[tuple[Expr, Expr]] = []
    for part in parts:
        assert isinstance(part, Node)
        size = shape_of(part)[dim]
        local = sub(at, size_expr(start))
        if isinstance(local, Const) and int(local.value) < 0:
            break
        if reader.space.below(local, size):
            return reader.element(part, (*index[:dim], local, *index[dim + 1 :])) if not pieces else None
        if not _surely_past(local, size):
            pieces.append(
                (apply("lt", at, size_expr(start + size)), reader.element(part, (*index[:dim], local, *index[dim + 1 :])))
            )
        start = start + size
    if not pieces or any(isinstance(n, Weights | RowReduce | Dot) for _, e in pieces for n in walk(e)):
        return None
    result = pieces[-1][1]
    for condition, piece in reversed(pieces[:-1]):
        result = apply("where", condition, piece, result)
    return result


def _surely_past(local: Expr, size: Extent) -> bool:
    """`local` >= `size` for certain: both numbers, or the same symbol plus something that is not negative."""
    rest = sub(local, size_expr(size))
    return isinstance(rest, Const) and int(rest.value) >= 0


def _stack(reader: Reader, node: Node, index: Index) -> Expr | None:
    parts = node.args[0]
    assert isinstance(parts, Sequence)
    dim = argument(node, 1, default=0) % len(index)
    at = index[dim]
    if not isinstance(at, Const):
        return None
    part = parts[int(at.value)]
    assert isinstance(part, Node)
    return reader.element(part, index[:dim] + index[dim + 1 :])


def _pad(reader: Reader, node: Node, index: Index) -> Expr | None:
    source, widths = _source(node), node.args[1]
    assert isinstance(widths, Sequence)
    fill_place = 2 if base_name(node.target) == "constant_pad_nd" else 3
    if fill_place == 3 and len(node.args) > 2 and node.args[2] != "constant":
        return None
    fill = argument(node, fill_place, default=0)
    if not isinstance(fill, int | float) or not all(isinstance(w, int) for w in widths):
        return None
    inner, inside = list(index), None
    for pair in range(len(widths) // 2):
        place = len(index) - 1 - pair
        low, high = int(widths[2 * pair]), int(widths[2 * pair + 1])  # type: ignore[arg-type]
        at = sub(index[place], Const(low))
        inner[place] = at
        for test in ([apply("ge", at, ZERO)] if low > 0 else []) + (
            [apply("lt", at, size_expr(shape_of(source)[place]))] if high > 0 else []
        ):
            inside = test if inside is None else apply("and", inside, test)
    element = reader.element(source, tuple(inner))
    if inside is None:
        return element
    value = Const(bool(fill)) if dtype_of(node) is torch.bool else Const(fill)
    return apply("where", inside, element, value)


def _advanced_index(reader: Reader, node: Node, index: Index) -> Expr | None:
    """tensor[i, j, ...] with index tensors on the leading dimensions, as padding masks are read."""
    source, entries = node.args[:2]
    assert isinstance(source, Node) and isinstance(entries, Sequence)
    if source in reader.trained or any(e is None for e in entries):
        return None
    tensors = [e for e in entries if isinstance(e, Node)]
    if any(dtype_of(e) in (torch.bool, torch.uint8) for e in tensors):
        return None
    rank = max(len(shape_of(e)) for e in tensors)
    out_shape = shape_of(node)[:rank]
    picked = [reader.element(e, reader.broadcast(e, out_shape, index[:rank])) for e in tensors]
    if not all(_not_negative(p) for p in picked):
        return None
    return reader.element(source, tuple(picked) + index[rank:])


def _not_negative(expr: Expr) -> bool:
    if isinstance(expr, Axis):
        return True
    if isinstance(expr, Const):
        return expr.value >= 0
    return isinstance(expr, Apply) and expr.op in ("add", "mul", "floordiv", "mod") and all(_not_negative(a) for a in expr.args)


# ------------------------------------------------------------------------------------- casts, creation, normalisers


def _cast(reader: Reader, node: Node, index: Index) -> Expr | None:
    source = _source(node)
    inner = reader.element(source, index)
    before, after = dtype_of(source), dtype_of(node)
    if before == after:
        return inner
    if after is torch.bool:
        return apply("to_bool", inner)
    if after.is_floating_point:
        converted = inner if before.is_floating_point else apply("to_float", inner)
        return reader._rounded(node, converted)
    if before.is_floating_point or before is torch.bool:
        return None if _rounds(inner) else apply("to_int", inner)
    return inner


def _filled(value_of: Callable[[Node], Any]) -> Handler:
    def build(reader: Reader, node: Node, index: Index) -> Expr | None:
        value = value_of(node)
        if not isinstance(value, bool | int | float):
            return None
        dtype = dtype_of(node)
        if dtype is torch.bool:
            return Const(bool(value))
        return Const(float(value)) if dtype.is_floating_point else Const(int(value))

    return build


def _arange(reader: Reader, node: Node, index: Index) -> Expr | None:
    args = [a.meta["val"] if isinstance(a, Node) else a for a in node.args]
    start, step = (args[0], args[2] if len(args) > 2 else 1) if len(args) > 1 else (0, 1)
    if not isinstance(start, int | torch.SymInt) or not isinstance(step, int | torch.SymInt):
        if not isinstance(start, int | float) or not isinstance(step, int | float):
            return None
        return add(mul(apply("to_float", index[0]), Const(float(step))), Const(float(start)))
    value = add(mul(index[0], size_expr(step)), size_expr(start))
    return apply("to_float", value) if dtype_of(node).is_floating_point else value


def _triangle(reader: Reader, node: Node, index: Index) -> Expr | None:
    inner = reader.element(_source(node), index)
    diagonal = argument(node, 1, "diagonal", 0)
    value = diagonal.meta["val"] if isinstance(diagonal, Node) else diagonal
    offset = sub(index[-1], index[-2])
    inside = apply("le" if base_name(node.target) == "tril" else "ge", offset, size_expr(value))
    if dtype_of(node) is torch.bool:
        return apply("and", inside, inner)
    return apply("where", inside, inner, Const(0.0) if dtype_of(node).is_floating_point else ZERO)


def _eye(reader: Reader, node: Node, index: Index) -> Expr | None:
    same_place = apply("eq", index[0], index[1])
    if dtype_of(node) is torch.bool:
        return same_place
    return apply("to_float" if dtype_of(node).is_floating_point else "to_int", same_place)


def _softmax(log: bool) -> Handler:
    return lambda reader, node, index: Weights(node, index, log)


def _dropout(reader: Reader, node: Node, index: Index) -> Expr | None:
    source, p, train = node.args[:3]
    assert isinstance(source, Node) and isinstance(p, int | float)
    inner = reader.element(source, index)
    if not train or p == 0:
        return inner
    if p >= 1 or not any(isinstance(n, Weights | RowReduce) for n in walk(inner)):
        return None
    name = f"seed_{node.name}"
    reader.leaves[name] = Operand(node, is_seed=True)
    kept = apply("ge", Uniform(Read(name, (ZERO,))), Const(float(p)))
    return mul(inner, apply("where", kept, Const(1.0 / (1.0 - float(p))), Const(0.0)))


def _nan_to_num(reader: Reader, node: Node, index: Index) -> Expr | None:
    if len(node.args) > 1 and node.args[1] not in (None, 0, 0.0):
        return None
    inner = reader.element(_source(node), index)
    return NanToZero(inner) if any(isinstance(n, Weights | RowReduce) for n in walk(inner)) else None


def _reduce(op: str) -> Handler:
    return lambda reader, node, index: reader.row_reduce(op, node, index)


def _not_understood(reader: Reader, node: Node, index: Index) -> Expr | None:
    return None


HANDLERS: Mapping[str, Handler] = {
    **{name: _through(move) for name, move in MOVES.items()},
    **dict.fromkeys(SAME_ELEMENT, _same_element),
    **dict.fromkeys(CASTS, _cast),
    "slice": _slice, "narrow": _not_understood, "select": _select, "slice_scatter": _slice_scatter,
    "repeat": _repeat, "flip": _flip, "cat": _cat, "concat": _cat,
    "stack": _stack, "constant_pad_nd": _pad, "pad": _pad, "index": _advanced_index,
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(lambda n: 1)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(lambda n: 0)),
    **dict.fromkeys(("full", "full_like"), _filled(lambda n: n.args[1])),
    "new_full": _filled(lambda n: n.args[2]), "scalar_tensor": _filled(lambda n: n.args[0]),
    "arange": _arange, "tril": _triangle, "triu": _triangle, "eye": _eye,
    "softmax": _softmax(False), "_softmax": _softmax(False), "_safe_softmax": _softmax(False),
    "log_softmax": _softmax(True), "_log_softmax": _softmax(True),
    "dropout": _dropout, "dropout_": _dropout, "feature_dropout": _not_understood, "nan_to_num": _nan_to_num,
    "sum": _reduce("sum"), "amax": _reduce("max"), "logsumexp": _reduce("lse"),
}  # fmt: skip

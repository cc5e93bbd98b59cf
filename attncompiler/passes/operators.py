"""What each operator does to an index: the element of its result as an expression of the elements of its operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import (
    ONE,
    ZERO,
    Apply,
    Const,
    Dot,
    Expr,
    Read,
    Uniform,
    add,
    apply,
    floordiv,
    mod,
    mul,
    sub,
    surely_int,
    walk,
)
from attncompiler.ir.ranges import range_of
from attncompiler.ir.text import expr_text
from attncompiler.passes.contraction import argument
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.nodes import (
    CASTS,
    EXPANDS,
    PERMUTES,
    RESHAPES,
    SAME_ELEMENT,
    Index,
    NanToZero,
    Operand,
    RowReduce,
    Weights,
    aten,
    dtype_of,
    shape_of,
)
from attncompiler.passes.normalise import source_line
from attncompiler.passes.sizes import Extent, same, size_expr

if TYPE_CHECKING:
    from attncompiler.passes.reader import Reader

Handler = Callable[["Reader", Node, Index], Expr | None]
Move = Callable[["Reader", Node, Index], Index]


_ROUNDING = frozenset({"add", "sub", "mul", "div", "pow", "exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "sin", "cos", "erf"})


def rounds(expr: Expr) -> bool:
    """True for floating arithmetic on tensors: its value depends on the precision that it is computed in."""
    nodes = list(walk(expr))
    if not any(isinstance(n, Read | Dot | Weights | RowReduce) for n in nodes):
        return False
    return any(isinstance(n, Apply) and not surely_int(n) and n.op in _ROUNDING for n in nodes) or any(
        isinstance(n, Dot) for n in nodes
    )


def dim_of(node: Node, place: int, tensor: Node) -> int:
    dim = argument(node, place, "dim", 0)
    assert isinstance(dim, int)
    return dim % max(int(tensor.meta["val"].dim()), 1)


def shifted(index: Index, dim: int, start: Expr, step: Expr = ONE) -> Index:
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
    dim = dim_of(node, 1, source)
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
    return reader.element(source, shifted(index, dim, size_expr(begin), Const(step)))


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
    dim = dim_of(node, 1, source)
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
    dim = dim_of(node, 1, first)
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
    picked = [_from_the_start(entry, size) for entry, size in zip(picked, shape_of(source), strict=False)]
    known = {axis: size for axis, size in reader.space.extents.items() if isinstance(size, int)}
    for place, (entry, size) in enumerate(zip(picked, shape_of(source), strict=False)):
        first, last = range_of(entry, known)
        if first < 0 or (isinstance(size, int) and size <= last < math.inf):  # counts from the end, or is torch's to complain of
            reach = f"from {first:.0f} to {last:.0f}" if math.isfinite(last - first) else "wherever that is"
            raise Unrecognised(
                f"a tensor {list(shape_of(source))} is read at {expr_text(entry)}, {reach}",
                where=source_line(node),
                why=f"its dimension {place} has {size}, and places below 0 would count from the end",
                do="clamp the index, or give a tensor that holds all places",
            )
    return reader.element(source, tuple(picked) + index[rank:])


def _from_the_start(entry: Expr, size: int | torch.SymInt) -> Expr:
    """A number that counts from the end of a dimension as one that counts from its start."""
    if isinstance(entry, Const) and isinstance(size, int) and -size <= entry.value < 0:
        return Const(int(entry.value) + size)
    return entry


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
        return None if rounds(inner) else apply("to_int", inner)
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


def _uniform_at(reader: Reader, node: Node, index: Index) -> Expr | None:
    seed, *at = node.args
    assert isinstance(seed, Node)
    read = reader.element(seed, (ZERO,))
    places = tuple(reader.operand(place, shape_of(node), index) for place in at)
    return Uniform(read, places) if isinstance(read, Read) else None


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
    "uniform_at": _uniform_at,
    "sum": _reduce("sum"), "amax": _reduce("max"), "logsumexp": _reduce("lse"),
}  # fmt: skip

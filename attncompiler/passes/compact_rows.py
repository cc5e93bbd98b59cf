"""A program whose heads are switched for each query -> one over the rows that are left, without a route.

Of each batch and head the active queries are listed in `rows`, in their order, `count` of them. The program over places of that
list reads what it read of a query alone, vectors and single elements, from copies by that list (`q_rows[b, h, q_idx]`); what it read
of a query and a key lies where it lay, at `rows[b, h, q_idx]`. So positions stay those of tokens, and a tile past the end of a list
keeps nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from attncompiler.ir.expr import (
    KV_IDX,
    Q_IDX,
    Axis,
    B,
    Const,
    Dot,
    Expr,
    H,
    Read,
    Size,
    Uniform,
    add,
    apply,
    axes_of,
    conj,
    dots_of,
    mul,
    reads_of,
    transform,
)
from attncompiler.ir.program import Attention, Dtype, Empty, Keep, Route, TensorDecl, each_clause

LENGTH = "rows_length"  # how long the lists are: as the longest needs, or as there are queries


@dataclass(frozen=True)
class Compact:
    """`program` reads each of `copies` (its name there) where the routed program read vectors of queries, each of `elements` where it
    read one element of a query, and the lists `rows` and `count`. `gain`: ONE, or a read of one element."""

    program: Attention
    copies: tuple[tuple[str, Read], ...]
    elements: tuple[tuple[str, Read], ...]
    rows: str
    count: str
    gain: Expr


@functools.lru_cache(maxsize=4096)
def compact_rows(program: Attention, no_row_is_empty: bool) -> Compact:
    """Needs: a route. Ensures: none, and rows in place of queries. Keeps: O and lse of active queries, before the gain.

    A row that keeps no key gives 0 in what is left, whatever the program says of it: the caller puts it right. Where `no_row_is_empty`,
    and no score of no key gives empty rows weights, nothing reads such a row: those past the end of a list are all there are."""
    taken = {decl.name for decl in program.tensors}
    rows, count = (_fresh(name, taken) for name in ("rows", "rows_count"))
    position = Read(rows, (B, H, Q_IDX))
    lefts = dict.fromkeys(dot.left for e in (program.score, program.adjust) for dot in dots_of(e) if "q_idx" in axes_of(dot.left))
    copies = {read: _fresh(f"{read.tensor}_rows", taken) for read in lefts}
    elements = {read: _fresh(f"{read.tensor}_rows", taken) for read in _elements(program)}

    def visit(expr: Expr) -> Expr | None:
        if isinstance(expr, Dot) and expr.left in copies:
            return Dot(Read(copies[expr.left], (B, H, Q_IDX)), expr.right)
        if isinstance(expr, Read) and expr in elements:
            return Read(elements[expr], (B, H, Q_IDX))
        if isinstance(expr, Uniform) and not expr.at:  # the draws of a query stay its own
            row = add(mul(add(mul(B, program.axes.h), H), program.axes.q_idx), position)
            return Uniform(expr.seed, (row, KV_IDX))
        return position if expr == Q_IDX else None

    moved = each_clause(replace(program, route=Route()), lambda e: transform(e, visit))
    predicate = conj(apply("lt", Q_IDX, Read(count, (B, H))), moved.keep.predicate)
    if no_row_is_empty:
        empty = Empty.ZERO if program.weigh.extra else Empty.UNREAD
    else:
        empty = Empty.SCORE if program.keep.empty is Empty.SCORE else Empty.ZERO
    moved = replace(moved, axes=replace(program.axes, q_idx=Size(LENGTH)), keep=Keep(predicate, empty))
    b, h, length = program.axes.b, program.axes.h, Size(LENGTH)
    new = [
        TensorDecl(name, program.decls[read.tensor].dtype, (b, h, length, _channels(program, read)))
        for read, name in copies.items()
    ]
    new += [TensorDecl(name, _summed(program.decls[read.tensor].dtype), (b, h, length)) for read, name in elements.items()]
    new += [TensorDecl(rows, Dtype.I32, (b, h, length), ascending=True), TensorDecl(count, Dtype.I32, (b, h))]
    used = {read.tensor for root in moved.expressions for read in reads_of(root)}
    tensors = tuple(decl for decl in (*program.tensors, *new) if decl.name in used)
    vectors, singles = (tuple((name, read) for read, name in found.items()) for found in (copies, elements))
    return Compact(replace(moved, tensors=tensors), vectors, singles, rows, count, program.route.gain)


def _elements(program: Attention) -> list[Read]:
    """Single elements that are read of a query, and of no key: the outermost reads of such."""
    found: dict[Read, None] = {}

    def visit(expr: Expr) -> Expr | None:
        if isinstance(expr, Dot):
            return expr
        if isinstance(expr, Read) and "q_idx" in axes_of(expr) and "kv_idx" not in axes_of(expr):
            found[expr] = None
            return expr
        return None

    for root in (program.score, program.keep.predicate, program.adjust, *program.weigh.extra):
        transform(root, visit)
    return list(found)


def _summed(dtype: Dtype) -> Dtype:
    """What a copy of elements is held in: their gradients are summed further."""
    return Dtype.F32 if dtype in (Dtype.F16, Dtype.BF16) else dtype


def without_route(program: Attention) -> Attention:
    """The program as if every head were on for every query, with gain 1."""
    plain = replace(program, route=Route())
    used = {read.tensor for root in plain.expressions for read in reads_of(root)}
    return replace(plain, tensors=tuple(decl for decl in program.tensors if decl.name in used))


def _channels(program: Attention, read: Read) -> Expr:
    return program.decls[read.tensor].shape[-1]


def _fresh(wish: str, taken: set[str]) -> str:
    name = next(n for i in range(1, len(taken) + 2) if (n := wish if i == 1 else f"{wish}{i}") not in taken)
    taken.add(name)
    return name


def is_plain(read: Read) -> bool:
    """True for an element at positions as they are."""
    axes = [entry for entry in read.index if isinstance(entry, Axis)]
    return len(set(axes)) == len(axes) and all(isinstance(entry, Axis | Const) for entry in read.index)

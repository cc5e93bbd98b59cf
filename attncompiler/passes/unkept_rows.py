"""Queries that keep no key under a finite mask, apart from the others.

A row that is masked by finfo.min everywhere is the softmax of what its scores then are, over all keys. An attention over listed keys
cannot say that. So it gives these rows lse = -inf, and a second attention computes them: of all keys, for these queries alone.

    attention ... keep  (picked[..] >= 0) & (picked[..] <= q_idx) else zero     -> o, lse
    tables ...    unkept[b, h, i] = lse[b, h, i] == -inf
    attention ... score dot(...) * 0.125 + -3.4e+38;  keep  unkept[b, h, q_idx] else zero      -> rest
    tables ...    out[b, h, i, c] = where(unkept[b, h, i], rest[b, h, i, c], o[b, h, i, c])
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from attncompiler.ir.expr import (
    FALSE,
    Q_IDX,
    TRUE,
    Apply,
    Axis,
    B,
    Const,
    Dot,
    Expr,
    H,
    Read,
    apply,
    conjuncts,
    reads_of,
    substitute,
    walk,
)
from attncompiler.ir.phases import Phase
from attncompiler.ir.program import Attention, Dtype, Empty, Keep, TensorDecl
from attncompiler.ir.tables import Each, Table, Tables
from attncompiler.passes.lift_mask import MASKED_AT_MOST
from attncompiler.passes.nodes import Operand
from attncompiler.passes.plan import score_where_kept

UNKEPT = "unkept"  # the name of the operand that says which queries keep no key


@dataclass(frozen=True)
class UnkeptRows:
    """The attention of the queries that keep no key. Its operands are those of the graph, by name, and `UNKEPT`, bool [b, h, q_idx]."""

    program: Attention
    operands: Mapping[str, Operand]

    def phases(self, first: Attention) -> tuple[Phase, ...]:
        """What follows the attention of the other queries, which gives `o` and `lse`."""
        i, c = Axis("i"), Axis("c")
        rows, statistics = (B, H, i), (first.axes.b, first.axes.h, first.axes.q_idx)
        axes = tuple(zip(rows, statistics, strict=True))
        lse = TensorDecl("lse", Dtype.F64 if first.value.dtype is Dtype.F64 else Dtype.F32, statistics)
        none = Table(UNKEPT, rows, Each(apply("eq", Read("lse", rows), Const(-math.inf))))
        o, rest = (TensorDecl(name, first.value.dtype, (*statistics, first.value.shape[-1])) for name in ("o", "rest"))
        unkept = TensorDecl(UNKEPT, Dtype.BOOL, statistics)
        both = apply("where", Read(UNKEPT, rows), Read("rest", (*rows, c)), Read("o", (*rows, c)))
        joined = Tables(
            (*axes, (c, first.value.shape[-1])), (o, rest, unkept), (Table("out", (*rows, c), Each(both)),), first.origin
        )
        return (
            Phase(Tables(axes, (lse,), (none,), first.origin), (UNKEPT,)),
            Phase(self.program, ("rest", "rest_lse")),
            Phase(joined, ("out",)),
        )


def without_unkept_rows(program: Attention, operands: Mapping[str, Operand]) -> tuple[Attention, UnkeptRows] | None:
    """The program with `else zero`, whose score holds no mask, and what its empty rows are instead; None where a mask is not one number
    that takes the place of the score, or is added to it."""
    outside = _outside(program)
    if program.keep.empty is not Empty.SCORE or outside is None or UNKEPT in operands:
        return None
    kept = replace(program, score=score_where_kept(program), keep=Keep(program.keep.predicate, Empty.ZERO))
    rows = Read(UNKEPT, (B, H, Q_IDX))
    axes = program.axes
    decl = TensorDecl(UNKEPT, Dtype.BOOL, (axes.b, axes.h, axes.q_idx))
    rest = replace(program, score=outside, keep=Keep(rows, Empty.ZERO))
    used = {read.tensor for root in rest.expressions for read in reads_of(root)}
    rest = replace(rest, tensors=tuple(d for d in (*program.tensors, decl) if d.name in used))
    return kept, UnkeptRows(rest, {d.name: operands[d.name] for d in rest.tensors if d.name != UNKEPT})


def _outside(program: Attention) -> Expr | None:
    """The score of a pair that is not kept, the same whichever part of `keep` fails."""
    found: set[Expr] = set()
    for part in conjuncts(program.keep.predicate):
        found.add(substitute(program.score, {part: FALSE, apply("not", part): TRUE}))
    if len(found) != 1:
        return None
    (outside,) = found
    is_sum = isinstance(outside, Apply) and outside.op == "add" and any(isinstance(arg, Const) for arg in outside.args)
    large = [n for n in walk(outside) if isinstance(n, Const) and isinstance(n.value, float) and n.value <= MASKED_AT_MOST]
    one_mask = len(large) == 1 and math.isfinite(float(large[0].value))
    return outside if is_sum and one_mask and any(isinstance(n, Dot) for n in walk(outside)) else None

"""The keys that each query ranks highest among those that it sees, told from a mask of all pairs.

    keep  mask[b, h // 2, q_idx, kv_idx] & ...        mask = scatter of topk(rank.masked_fill(~causal, -inf), w)

The ranked tensor has a number for each pair, but what is ranked does not vary with the query: that and which keys the query sees is
proved by reading the tensor's element, `where(kv_idx <= q_idx + c, rank[kv_idx], -inf)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attncompiler.ir.expr import (
    KV_IDX,
    Q_IDX,
    TRUE,
    Apply,
    Const,
    Expr,
    Read,
    add,
    apply,
    axes_of,
    conjuncts,
    reads_of,
    settled,
    sub,
    substitute,
)
from attncompiler.ir.program import Attention
from attncompiler.passes.nodes import Operand, dtype_of, shape_of
from attncompiler.passes.reader import Reader
from attncompiler.passes.sizes import size_expr
from attncompiler.passes.topk import ANY_RANK, Member, TopKOf, topk_of


@dataclass(frozen=True)
class Prefix:
    """A part of `keep`: query i keeps the `w` of largest rank among the keys up to `last`; with `ties`, all that equal the w-th.

    `test` is what is said of `ANY_RANK` besides."""

    part: Expr
    rank: Read
    operand: Operand
    w: Expr
    last: Expr  # q_idx + a number
    ties: bool
    test: Expr
    places: Expr  # how many keys are kept by any query, at most
    numbers: tuple[int | float | bool, ...]  # of the op, after the tensor and its dimension


def prefix(program: Attention, part: Expr, found: Member | None, operands: Mapping[str, Operand], reader: Reader) -> Prefix | None:
    """`part` as a choice among the keys that each query sees. `found`: what it is of a top-k's indices, if that."""
    if found is not None:
        return _ranked(program, part, found.topk, found.index, found.test, False, reader)
    compared = _compared(part, operands, reader)
    return _ranked(program, part, *compared, TRUE, True, reader) if compared is not None else None


def _compared(part: Expr, operands: Mapping[str, Operand], reader: Reader) -> tuple[TopKOf, tuple[Expr, ...]] | None:
    """What `ranked[..., q_idx, kv_idx] >= topk.values[..., q_idx, w - 1]` compares, and at which index."""
    if not isinstance(part, Apply) or part.op not in ("ge", "le"):
        return None
    ranked, least = part.args if part.op == "ge" else part.args[::-1]
    if not isinstance(least, Read) or "kv_idx" in axes_of(least) or not operands[least.tensor].is_plain:
        return None
    topk = topk_of(operands[least.tensor].node, 0)
    if topk is None:
        return None
    w = shape_of(topk.indices)[topk.dim]
    if not isinstance(w, int) or least.index[topk.dim] != Const(w - 1):
        return None
    index = (*least.index[: topk.dim], KV_IDX, *least.index[topk.dim + 1 :])
    own: dict[Expr, Expr] = {
        read: Read(operands[read.tensor].node.name, read.index) for read in reads_of(ranked) if operands[read.tensor].is_plain
    }
    same_element = reader.element(topk.rank, index) == substitute(ranked, own)
    return (topk, index) if same_element else None


def _ranked(
    program: Attention, part: Expr, topk: TopKOf, index: tuple[Expr, ...], test: Expr, ties: bool, reader: Reader
) -> Prefix | None:
    element = reader.element(topk.rank, index)
    if not isinstance(element, Apply) or element.op != "where":
        return None
    condition, yes, no = element.args
    rank, hidden, seen = (yes, no, condition) if isinstance(no, Const) else (no, yes, apply("not", condition))
    if not isinstance(rank, Read) or not isinstance(hidden, Const) or rank.index.count(KV_IDX) != 1:
        return None
    reach = _reach(seen)
    operand = reader.leaves[rank.tensor]
    extents = program.axes.q_idx, program.axes.kv_idx, reach, size_expr(shape_of(topk.indices)[topk.dim])
    if "q_idx" in axes_of(rank) or not operand.is_plain or reach is None or not all(isinstance(e, Const) for e in extents):
        return None
    m, n, first, w = (int(extent.value) for extent in extents if isinstance(extent, Const))
    above = _above(test, float(hidden.value), operand)
    says_seen = test != TRUE or any(_reach(p) == reach for p in conjuncts(program.keep.predicate) if p != part)
    if above is None or not says_seen:
        return None
    if ties and hidden.value != -math.inf:
        return None
    places = n if ties else min(n, w + m - 1)
    drop_nan = ties or (isinstance(test, Apply) and test.op == "gt")
    numbers = (w, first, m, above, drop_nan, ties, places)
    return Prefix(part, rank, operand, Const(w), add(Q_IDX, reach), ties, test, Const(places), numbers)


def _above(test: Expr, hidden: float, operand: Operand) -> float | None:
    """The number that a kept rank must exceed, where hidden keys rank as `hidden`; None where that is another condition."""
    lowest = torch.finfo(dtype_of(operand.node)).min
    if hidden != -math.inf and hidden > lowest:
        return None
    if test == TRUE:
        return math.nan
    if test in (apply("gt", ANY_RANK, Const(hidden)), apply("ne", ANY_RANK, Const(hidden))):
        return hidden
    return None


def _reach(seen: Expr) -> Expr | None:
    """c of `kv_idx <= q_idx + c`."""
    seen = settled(seen, KV_IDX)
    if not isinstance(seen, Apply) or seen.op not in ("le", "lt", "ge", "gt"):
        return None
    low, high = seen.args if seen.op in ("le", "lt") else seen.args[::-1]
    bound = add(sub(sub(high, low), Q_IDX), KV_IDX)
    bound = bound if seen.op in ("le", "ge") else sub(bound, Const(1))
    return None if axes_of(bound) else bound

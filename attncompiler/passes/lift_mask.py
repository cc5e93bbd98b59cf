"""Masks out of the score: which pairs `keep` holds for, and what stands outside.

A mask made with -inf becomes `keep P else nan` and leaves the score. A finite one (finfo.min) stays in the score, and
`keep P else score` states what is proved of it: in a row that keeps a key, every other key weighs exactly 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import (
    KV_IDX,
    ONE,
    Q_IDX,
    TRUE,
    Apply,
    Const,
    Dot,
    Expr,
    Read,
    Uniform,
    apply,
    axes_of,
    conj,
    conjuncts,
    substitute,
    walk,
)  # fmt: skip
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Empty, Keep
from attncompiler.passes.plan import proved_nonempty

# A score is taken to be below 1e29 in magnitude; a masked one at most -1e30 then weighs exp(-9e29) = 0 beside any kept one.
MASKED_AT_MOST = -1e30
_SCALES = ("mul", "div")


@dataclass(frozen=True)
class Lifted:
    """`score` with its -inf masks removed, the predicate, and whether a finite mask is part of it."""

    score: Expr
    predicate: Expr
    finite: bool


def lift_mask(program: Attention, trained: frozenset[str] = frozenset()) -> Attention:
    """Needs: a program with its masks in the score. Ensures: `keep` holds what masks prove. Keeps: the meaning, exactly.

    `trained` names operands that carry gradients or are ranked: a learned bias is never read as a mask."""
    lifted = _lift(program.score, trained)
    if lifted.predicate == TRUE:
        return program
    if lifted.finite or program.keep.empty is Empty.SCORE:
        predicate = conj(program.keep.predicate, lifted.predicate)
        if program.keep.predicate != TRUE and program.keep.empty is not Empty.SCORE:
            return program  # an SDPA mask beside a finite one: its own keep is enough, and exact
        return replace(program, keep=Keep(predicate, Empty.SCORE))
    empty = program.keep.empty
    return replace(program, score=lifted.score, keep=Keep(conj(program.keep.predicate, lifted.predicate), empty))


def zero_empty_rows(program: Attention) -> Attention:
    """Weights set to 0 after the softmax, at least in rows that keep no key: such a row gives 0 instead of NaN, and a factor that only
    says what `keep` does says nothing more. One that drops other pairs stays, for their sake.

    Raises: Unrecognised where weights are set to 0 and a row that keeps no key may keep its NaN in part."""
    if program.keep.empty is not Empty.NAN or program.keep.predicate == TRUE:
        return program
    kept, diagonal = set(conjuncts(program.keep.predicate)), _own_keys(program)
    factors = _factors(program.adjust)
    masks = {factor: _conjuncts_of_mask(factor) for factor in factors}
    covering = [factor for factor, said in masks.items() if said and (kept <= said or (diagonal is not None and diagonal <= said))]
    if not covering:
        if any(masks.values()) and not _surely_nonempty(program):
            raise Unrecognised(
                "weights are set to 0 after the softmax where not all of a row is",
                why="a row that keeps no key is NaN there, which no factor makes 0",
                do="set to 0 what the mask before the softmax leaves out, or all of such rows; or use nan_to_num(0.0) on the weights",
            )
        return program
    rest: Expr = ONE
    for factor in factors:
        left = _chosen(factor) if factor in covering and masks[factor] == kept else factor
        rest = left if rest == ONE else rest if left == ONE else apply("mul", rest, left)
    return replace(program, keep=replace(program.keep, empty=Empty.ZERO), adjust=rest)


def _own_keys(program: Attention) -> set[Expr] | None:
    """What must hold of a query for it to keep the key of its own number; None where there may be no such key."""
    queries, keys = program.axes.q_idx, program.axes.kv_idx
    shorter = isinstance(queries, Const) and isinstance(keys, Const) and int(queries.value) <= int(keys.value)
    if queries != keys and not shorter:
        return None
    own = substitute(program.keep.predicate, {KV_IDX: Q_IDX})
    return {part for part in conjuncts(own) if part != TRUE and not _is_reflexive(part)}


def _is_reflexive(part: Expr) -> bool:
    return isinstance(part, Apply) and part.op in ("le", "ge") and part.args[0] == part.args[1]


def _surely_nonempty(program: Attention) -> bool:
    return not program.sizes and proved_nonempty(program, {}, extents_of(program, {}))


def _conjuncts_of_mask(factor: Expr) -> set[Expr]:
    """What holds where a factor is not set to 0; nothing for a factor that is multiplied: draws of dropout, say."""
    if isinstance(factor, Apply) and factor.op == "where" and not any(isinstance(n, Uniform) for n in walk(factor.args[0])):
        condition, yes, no = factor.args
        if no == Const(0.0):
            return set(conjuncts(condition))
        if yes == Const(0.0):
            return set(conjuncts(apply("not", condition)))
    return set()


def _chosen(factor: Expr) -> Expr:
    """A factor without its condition, where the weights are 0 outside that; ONE for 1. What varies may be NaN outside, and stays."""
    assert isinstance(factor, Apply)
    _, yes, no = factor.args
    left = yes if no == Const(0.0) else no
    return factor if not isinstance(left, Const) else ONE if left == Const(1.0) else left


def weak_mask(score: Expr) -> float | None:
    """A large negative number that masks pairs in a score without being so large that it must: -1e9, say."""
    for node in walk(score):
        if isinstance(node, Apply) and node.op == "where":
            for branch in node.args[1:]:
                if isinstance(branch, Const) and MASKED_AT_MOST < float(branch.value) <= -1e3:
                    return float(branch.value)
    return None


def _factors(expr: Expr) -> list[Expr]:
    if isinstance(expr, Apply) and expr.op == "mul":
        return _factors(expr.args[0]) + _factors(expr.args[1])
    return [expr]


def _lift(score: Expr, trained: frozenset[str]) -> Lifted:
    """What the masks between the root of `score` and its dot products say."""
    nothing = Lifted(score, TRUE, False)
    if not isinstance(score, Apply) or not _has_dot(score):
        return nothing
    if score.op == "where":
        return _lift_where(score, trained)
    if score.op in ("add", "sub"):
        return _lift_sum(score, trained)
    if score.op in _SCALES and isinstance(score.args[1], Const) and _tame(score.args[1]):
        return _rewrap(score, _lift(score.args[0], trained), 0)
    if score.op == "mul" and isinstance(score.args[0], Const) and _tame(score.args[0]):
        return _rewrap(score, _lift(score.args[1], trained), 1)
    if score.op in ("round_f16", "round_bf16", "to_float"):
        return _rewrap(score, _lift(score.args[0], trained), 0)
    if score.op == "maximum" and isinstance(score.args[1], Const) and float(score.args[1].value) <= MASKED_AT_MOST:
        inner = _lift(score.args[0], trained)  # the score is clamped to finfo.min: an -inf mask becomes a finite one
        return Lifted(score, inner.predicate, True)
    return nothing


def _rewrap(score: Apply, inner: Lifted, place: int) -> Lifted:
    args = tuple(inner.score if i == place else arg for i, arg in enumerate(score.args))
    return Lifted(apply(score.op, *args), inner.predicate, inner.finite)


def _lift_where(score: Apply, trained: frozenset[str]) -> Lifted:
    condition, yes, no = score.args
    if _has_dot(condition):
        return Lifted(score, TRUE, False)
    for kept, masked, predicate in ((yes, no, condition), (no, yes, apply("not", condition))):
        if isinstance(masked, Const) and float(masked.value) <= MASKED_AT_MOST and _has_dot(kept):
            inner = _lift(kept, trained)
            both = conj(inner.predicate, predicate)
            if float(masked.value) == -math.inf and not inner.finite:
                return Lifted(inner.score, both, False)
            return Lifted(score, both, True)
    return Lifted(score, TRUE, False)


def _lift_sum(score: Apply, trained: frozenset[str]) -> Lifted:
    """score + mask, where the mask holds no dot product."""
    left, _right = score.args
    place = 0 if _has_dot(left) else 1
    kept, term = score.args[place], score.args[1 - place]
    if _has_dot(term) or (score.op == "sub" and place == 1):
        return Lifted(score, TRUE, False)
    inner = _lift(kept, trained)
    sign = -1.0 if score.op == "sub" else 1.0
    mask = _mask_term(term, sign, trained)
    rewrapped = _rewrap(score, inner, place)
    if mask is None:
        return rewrapped
    predicate, infinite, rest = mask
    both = conj(inner.predicate, predicate)
    if infinite and not inner.finite:
        stripped = inner.score if rest is None else apply(score.op, *((inner.score, rest) if place == 0 else (rest, inner.score)))
        return Lifted(stripped, both, False)
    return Lifted(score, both, True)


def _mask_term(term: Expr, sign: float, trained: frozenset[str]) -> tuple[Expr, bool, Expr | None] | None:
    """(predicate, whether masked entries are -inf, what the term adds where the predicate holds; None for 0)."""
    if isinstance(term, Apply) and term.op == "where":
        condition, yes, no = term.args
        for kept, masked, predicate in ((yes, no, condition), (no, yes, apply("not", condition))):
            if isinstance(masked, Const) and sign * float(masked.value) <= MASKED_AT_MOST and not _may_be_masked(kept, trained):
                zero = isinstance(kept, Const) and float(kept.value) == 0.0
                return predicate, math.isinf(float(masked.value)), None if zero else kept
        return None
    if sign > 0 and isinstance(term, Read) and term.tensor not in trained and "kv_idx" in axes_of(term):
        return apply("gt", term, Const(MASKED_AT_MOST)), False, term
    return None


def _may_be_masked(expr: Expr, trained: frozenset[str]) -> bool:
    """True where the kept branch may itself hold a mask value: then the predicate says too little, and nothing is lifted."""
    return any(
        (isinstance(n, Const) and isinstance(n.value, float) and n.value <= MASKED_AT_MOST)
        or (isinstance(n, Read) and "kv_idx" in axes_of(n) and n.tensor not in trained and isinstance(expr, Read))
        for n in walk(expr)
    )


def _has_dot(expr: Expr) -> bool:
    return any(isinstance(n, Dot) or (isinstance(n, Uniform) and not n.at) for n in walk(expr))


def _tame(scale: Const) -> bool:
    """A factor under which a masked score stays masked and a kept one stays small."""
    return 1e-6 <= float(scale.value) <= 1e6

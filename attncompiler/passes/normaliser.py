"""Which weights a program has: the normaliser inside an expression, its score, its extra terms and the factors after it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import ONE, ZERO, Apply, Const, Expr, Read, apply, axes_of, transform, walk
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.nodes import KV, NanToZero, RowReduce, Weights, shape_of
from attncompiler.passes.reader import Reader
from attncompiler.passes.sizes import Extent, same, size_expr


@dataclass(frozen=True)
class Normalised:
    """adjust * softmax(score, with extra scores). `stable` is False where the traced code subtracts no row maximum, so that a row
    whose scores are all absorbed by a finite mask is not the softmax of them."""

    score: Expr
    extra: tuple[Expr, ...]
    adjust: Expr
    nan_to_zero: bool
    stable: bool


def normalised(reader: Reader, weights: Expr, keys: Extent) -> Normalised:
    """Needs: an element of the weights, kv_idx free. Ensures: its clauses. Raises: Unrecognised, saying what stands in the way."""
    core, adjust, nan_to_zero = _peel_factors(weights)
    stable = True
    if isinstance(core, Weights):
        score, extra = _softmax_input(reader, core, keys)
    elif isinstance(core, Apply) and core.op == "exp":
        score, extra = _exponential(reader, core.args[0], keys)
        stable = isinstance(core.args[0], Weights)
    elif isinstance(core, Apply) and core.op == "div":
        score, extra = _quotient(reader, core.args[0], core.args[1])
        stable = _split_shift(score)[1] != ZERO
        score = score if stable else _masks_to_infinity(score)
    else:
        raise Unrecognised(
            "what is summed is not a softmax times factors",
            why=f"between the softmax and the product stands {_operator(reader, core)}",
        )
    score, shift = _split_shift(score)
    split = [_split_shift(e) for e in extra]
    if isinstance(core, Weights) and any(other != shift for _, other in split):
        raise Unrecognised("a row constant is subtracted from some of the scores only")
    extra = tuple(e for e, _ in split)
    for expr in (score, adjust, *extra):
        if any(isinstance(n, Weights | RowReduce | NanToZero) for n in walk(expr)):
            raise Unrecognised("a row reduction of the scores is used outside the softmax", why="the kernel has no such pass yet")
    return Normalised(score, extra, adjust, nan_to_zero, stable)


def _operator(reader: Reader, expr: Expr) -> str:
    if isinstance(expr, RowReduce):
        return f"a {expr.op} over an axis of its own"
    if isinstance(expr, Read):
        return base_name(reader.leaves[expr.tensor].node.target)
    return expr.op if isinstance(expr, Apply) else "an operator that is not followed"


def _has_normaliser(expr: Expr) -> bool:
    return any(isinstance(n, Weights | RowReduce) for n in walk(expr))


def _peel_factors(expr: Expr) -> tuple[Expr, Expr, bool]:
    """Split weights * factors, and whether NaN became 0. where(c, weights * x, 0) is the factor where(c, x, 0): of what is not chosen
    not even NaN is left."""
    if isinstance(expr, NanToZero):
        core, factor, _ = _peel_factors(expr.inner)
        return core, factor, True
    if not isinstance(expr, Apply):
        return expr, ONE, False
    if expr.op == "mul":
        for weights, factor in (expr.args, expr.args[::-1]):
            if _has_normaliser(weights) and not _has_normaliser(factor):
                core, inner, nan = _peel_factors(weights)
                return core, _times(factor, inner), nan
    if expr.op == "div" and not _has_normaliser(expr.args[1]):
        core, inner, nan = _peel_factors(expr.args[0])
        return core, apply("div", inner, expr.args[1]), nan
    if expr.op in ("round_f16", "round_bf16", "to_float"):
        return _peel_factors(expr.args[0])
    if expr.op == "where":
        condition, yes, no = expr.args
        for weights, other, chosen in ((yes, no, True), (no, yes, False)):
            if isinstance(other, Const) and float(other.value) == 0.0 and _has_normaliser(weights):
                core, inner, nan = _peel_factors(weights)
                factor = Const(1.0) if inner == ONE else inner
                sides = (factor, Const(0.0)) if chosen else (Const(0.0), factor)
                return core, apply("where", condition, *sides), nan
    return expr, ONE, False


def _times(left: Expr, right: Expr) -> Expr:
    return right if left == ONE else left if right == ONE else apply("mul", left, right)


def _softmax_input(reader: Reader, weights: Weights, keys: Extent) -> tuple[Expr, tuple[Expr, ...]]:
    node, index = weights.node, weights.index
    source = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs["dim"]
    assert isinstance(dim, int)
    dim %= len(index)
    if index[dim] != KV:
        raise Unrecognised("the softmax does not run over the summed axis", why="its axis is not that of the values")
    if any("kv_idx" in axes_of(i) for place, i in enumerate(index) if place != dim):
        raise Unrecognised("the softmax mixes keys with other axes")
    total = shape_of(node)[dim]

    def at(position: Expr) -> Expr:
        return reader.element(source, (*index[:dim], position, *index[dim + 1 :]))  # type: ignore[arg-type]

    extra = total - keys
    if not isinstance(extra, int) and same(extra, 0):
        extra = 0
    if not isinstance(extra, int | type(total)) or not _small(extra):
        raise Unrecognised("the softmax runs over more keys than are summed", why="only a few extra columns can be taken")
    count = int(extra) if isinstance(extra, int) else int(size_expr(extra).value)  # type: ignore[attr-defined]
    return at(KV), tuple(at(_plus(size_expr(keys), t)) for t in range(count))


def _small(extra: Extent) -> bool:
    value = size_expr(extra)
    return isinstance(value, Const) and 0 <= int(value.value) <= 8


def _plus(size: Expr, offset: int) -> Expr:
    return apply("add", size, Const(offset))


def _exponential(reader: Reader, exponent: Expr, keys: Extent) -> tuple[Expr, tuple[Expr, ...]]:
    """exp(log_softmax(x)) or exp(x - logsumexp(x))."""
    if isinstance(exponent, Weights) and exponent.log:
        return _softmax_input(reader, exponent, keys)
    if isinstance(exponent, Apply) and exponent.op == "sub":
        score, lse = exponent.args
        if isinstance(lse, RowReduce) and lse.op == "lse" and reader.element(lse.node, lse.index) == score:
            return score, ()
    raise Unrecognised("an exponential that is not normalised", why="exp(x) is taken only over its own row sum")


def _quotient(reader: Reader, numerator: Expr, denominator: Expr) -> tuple[Expr, tuple[Expr, ...]]:
    """exp(x) / sum(exp(x)), with or without the row maximum, with or without an extra term in the sum."""
    terms = _terms(denominator)
    sums = [t for t in terms if isinstance(t, RowReduce) and t.op == "sum"]
    if len(sums) != 1 or reader.element(sums[0].node, sums[0].index) != numerator:
        raise Unrecognised("the weights are divided by something other than their row sum")
    if not (isinstance(numerator, Apply) and numerator.op == "exp"):
        raise Unrecognised("the weights are divided by their row sum, but are not exponentials", why="only softmax is taken so far")
    exponent = numerator.args[0]
    shift = _shift_of(exponent)
    extra = tuple(_log_term(term, shift) for term in terms if term is not sums[0])
    return exponent, extra


def _terms(expr: Expr) -> list[Expr]:
    if isinstance(expr, Apply) and expr.op == "add":
        return _terms(expr.args[0]) + _terms(expr.args[1])
    return [expr]


def _shift_of(exponent: Expr) -> Expr:
    """The row constant that is subtracted before exponentiating; ZERO if there is none."""
    if isinstance(exponent, Apply) and exponent.op == "sub" and isinstance(exponent.args[1], RowReduce):
        return exponent.args[1]
    return ZERO


def _log_term(term: Expr, shift: Expr) -> Expr:
    """The score whose exponential is `term`, in units before the shift."""
    if isinstance(term, Apply) and term.op == "exp":
        inner = term.args[0]
        if shift == ZERO:
            return inner
        if inner == apply("neg", shift):
            return Const(0.0)
        if isinstance(inner, Apply) and inner.op == "sub" and inner.args[1] == shift:
            return inner.args[0]
    if isinstance(term, Const) and shift == ZERO and float(term.value) > 0:
        return Const(math.log(float(term.value)))
    raise Unrecognised("a term is added to the row sum that is not the exponential of a score")


_EXP_IS_ZERO = -1e4  # exp underflows to 0 there in every floating type


def _masks_to_infinity(score: Expr) -> Expr:
    """Without a row maximum, exp(s + mask) is exactly 0 for any large negative mask: the same as -inf, in empty rows too."""

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Apply) and node.op == "where":
            branches = [
                Const(-math.inf) if isinstance(b, Const) and float(b.value) <= _EXP_IS_ZERO else transform(b, visit)
                for b in node.args[1:]
            ]
            return apply("where", node.args[0], *branches)
        return None

    return transform(score, visit)


def _split_shift(expr: Expr) -> tuple[Expr, Expr]:
    """`expr` without a subtracted row reduction, through scalings by constants, and that reduction as scaled (ZERO if none)."""
    if isinstance(expr, Apply):
        if expr.op == "sub" and isinstance(expr.args[1], RowReduce):
            return expr.args[0], expr.args[1]
        if expr.op in ("mul", "div") and len(expr.args) == 2:
            scaled, factor = expr.args if isinstance(expr.args[1], Const) else expr.args[::-1]
            if isinstance(factor, Const) and (expr.op == "mul" or factor is expr.args[1]):
                inner, shift = _split_shift(scaled)
                if shift != ZERO:
                    return apply(expr.op, inner, factor), apply(expr.op, shift, factor)
    return expr, ZERO

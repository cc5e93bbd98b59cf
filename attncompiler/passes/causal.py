"""An expression of a pair by where its key stands: before the query, at its own position, or after it.

Decays are written in many ways that are one on the keys a causal mask keeps: `abs(q_idx - kv_idx)`, a clamp, a `where`, a product with
a triangle of ones. Under an assumption about the position each of them has the same expression.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

from attncompiler.ir.expr import KV_IDX, ONE, Q_IDX, ZERO, Apply, Const, Expr, add, apply, sub, surely_int, transform

_LAG = sub(Q_IDX, KV_IDX)


class Place(enum.Enum):
    """Where a key stands, by the least and the greatest q_idx - kv_idx."""

    PAST = (1, math.inf)
    OWN = (0, 0)
    FUTURE = (-math.inf, -1)


def at(place: Place, expr: Expr) -> Expr:
    """`expr` for keys that stand so: what depends on the sign of q_idx - kv_idx alone is decided, zeros and -inf are carried through.

    A product with 0 is 0, as a mask means it: what the other factor would be at a pair that is left out is never looked at."""

    def visit(node: Expr) -> Expr | None:
        if not isinstance(node, Apply):
            return None
        return _carried(_decided(place, Apply(node.op, tuple(transform(arg, visit) for arg in node.args))))

    return transform(expr, visit)


def _decided(place: Place, node: Apply) -> Expr:
    if node.op in _ORDER and (found := _span(place, sub(*map(_whole, node.args)))) is not None:
        yes, no = _ORDER[node.op]
        if yes(*found):
            return Const(True)
        if no(*found):
            return Const(False)
    if node.op in ("minimum", "maximum") and (found := _span(place, sub(*map(_whole, node.args)))) is not None:
        low, high = found
        if low >= 0 or high <= 0:
            return node.args[0] if (low >= 0) == (node.op == "maximum") else node.args[1]
    if node.op == "abs" and (found := _span(place, _whole(node.args[0]))) is not None:
        low, high = found
        if low >= 0 or high <= 0:
            return node.args[0] if low >= 0 else _negated(node.args[0])
    return apply(node.op, *node.args)


def _negated(value: Expr) -> Expr:
    if isinstance(value, Apply) and value.op == "to_float":
        return apply("to_float", apply("neg", value.args[0]))
    return apply("neg", value)


Test = Callable[[float, float], bool]
# By comparison with 0: what surely holds of a number in [low, high], and what surely does not.
_ORDER: dict[str, tuple[Test, Test]] = {
    "lt": (lambda low, high: high < 0, lambda low, high: low >= 0),
    "le": (lambda low, high: high <= 0, lambda low, high: low > 0),
    "gt": (lambda low, high: low > 0, lambda low, high: high <= 0),
    "ge": (lambda low, high: low >= 0, lambda low, high: high < 0),
    "eq": (lambda low, high: low == high == 0, lambda low, high: low > 0 or high < 0),
    "ne": (lambda low, high: low > 0 or high < 0, lambda low, high: low == high == 0),
}


def _whole(value: Expr) -> Expr:
    """A float that holds an integer as that integer."""
    if isinstance(value, Apply) and value.op == "to_float" and surely_int(value.args[0]):
        return value.args[0]
    if isinstance(value, Apply) and value.op in ("add", "sub", "mul", "neg"):
        return apply(value.op, *map(_whole, value.args))
    if isinstance(value, Const) and isinstance(value.value, float) and value.value.is_integer():
        return Const(int(value.value))
    return value


def _span(place: Place, value: Expr) -> tuple[float, float] | None:
    """The least and greatest value of c + q_idx - kv_idx or c - (q_idx - kv_idx); None for what is neither."""
    low, high = place.value
    for rest, least, greatest in ((sub(value, _LAG), low, high), (add(value, _LAG), -high, -low)):
        if isinstance(rest, Const) and surely_int(value):
            return least + int(rest.value), greatest + int(rest.value)
    return None


def _number(expr: Expr) -> float | None:
    return float(expr.value) if isinstance(expr, Const) else None


def _carried(expr: Expr) -> Expr:
    """What a 0, a 1 or an infinity makes of an operator on numbers; the rest as it is."""
    if not isinstance(expr, Apply) or expr.op not in ("mul", "add", "sub", "div", "pow") or surely_int(expr):
        return expr
    left, right = expr.args
    values = _number(left), _number(right)
    if expr.op == "mul":
        if 0.0 in values:
            return Const(0.0)
        if 1.0 in values:
            return right if values[0] == 1.0 else left
        if -math.inf in values:  # -inf under an exponential, times a rate: hidden, whatever the rate
            return Const(-math.inf)
    if expr.op in ("add", "sub") and 0.0 in values:
        if values[1] == 0.0:
            return left
        return right if expr.op == "add" else apply("neg", right)
    if values[0] == -math.inf or (expr.op == "add" and values[1] == -math.inf) or (expr.op == "sub" and values[1] == math.inf):
        return Const(-math.inf)
    if expr.op == "div" and values[0] == 0.0:
        return Const(0.0)
    if expr.op in ("div", "pow") and values[1] == 1.0:
        return left
    if expr.op == "pow" and right in (ZERO, Const(0.0)):
        return ONE
    return expr

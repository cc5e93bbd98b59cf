"""What an index can be at most: bounds of integer expressions from the sizes of the axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from attncompiler.ir.expr import FALSE, TRUE, ZERO, Apply, Axis, Const, Expr, Uniform, apply, surely_int, transform


def range_of(expr: Expr, extents: Mapping[Axis, int]) -> tuple[float, float]:
    """The smallest and largest value that an integer expression can have; infinite where nothing is known. `extents` are the sizes
    of the axes that are known."""
    anything = -math.inf, math.inf
    if isinstance(expr, Const):
        return float(expr.value), float(expr.value)
    if isinstance(expr, Axis):
        return 0.0, float(extents[expr]) - 1 if expr in extents else math.inf
    if not isinstance(expr, Apply):
        return anything
    bounds = [range_of(arg, extents) for arg in expr.args]
    if expr.op == "neg":
        return -bounds[0][1], -bounds[0][0]
    if expr.op == "abs":
        low, high = bounds[0]
        return max(low, -high, 0.0), max(-low, high)
    if expr.op == "where":
        return min(bounds[1][0], bounds[2][0]), max(bounds[1][1], bounds[2][1])
    if len(bounds) != 2:
        return anything
    (a, b), (c, d) = bounds
    if expr.op in ("add", "sub"):
        return (a + c, b + d) if expr.op == "add" else (a - d, b - c)
    if expr.op in ("minimum", "maximum"):
        return (min(a, c), min(b, d)) if expr.op == "minimum" else (max(a, c), max(b, d))
    if c == d and 0 < c < math.inf:
        if expr.op == "mul":
            return a * c, b * c
        if expr.op == "floordiv":
            return (a // c if math.isfinite(a) else a), (b // c if math.isfinite(b) else b)
        if expr.op == "mod":
            return 0.0, c - 1
    return anything


# Whether a comparison holds of every left value in [low, high] and every right one in [least, most].
_ALWAYS: Mapping[str, Callable[[float, float, float, float], bool]] = {
    "lt": lambda low, high, least, most: high < least, "le": lambda low, high, least, most: high <= least,
    "gt": lambda low, high, least, most: low > most, "ge": lambda low, high, least, most: low >= most,
}  # fmt: skip
_OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}


def within(expr: Expr, extents: Mapping[Axis, int]) -> Expr:
    """`expr` without what axes of these sizes leave nothing to do for: q_idx % 64 and q_idx < 64 among 64 queries, say."""

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Uniform):
            return node  # its cells vary with queries and keys, be there one of either
        if not isinstance(node, Apply) or node.op not in (*_ALWAYS, "floordiv", "mod", "minimum", "maximum"):
            return None
        left, right = (transform(arg, visit) for arg in node.args)
        known = _settled_by_ranges(node.op, left, right, extents) if surely_int(left) and surely_int(right) else None
        return known or apply(node.op, left, right)

    return transform(expr, visit)


def _settled_by_ranges(op: str, left: Expr, right: Expr, extents: Mapping[Axis, int]) -> Expr | None:
    (low, high), (least, most) = range_of(left, extents), range_of(right, extents)
    if op in _ALWAYS:
        for kind, answer in ((op, TRUE), (_OPPOSITE[op], FALSE)):
            if _ALWAYS[kind](low, high, least, most):
                return answer
    elif op in ("minimum", "maximum"):
        if high <= least:
            return left if op == "minimum" else right
        if most <= low:
            return right if op == "minimum" else left
    elif isinstance(right, Const) and low >= 0 and high < int(right.value):
        return ZERO if op == "floordiv" else left
    return None

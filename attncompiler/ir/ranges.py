"""What an index can be at most: bounds of integer expressions from the sizes of the axes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from attncompiler.ir.expr import Apply, Axis, Const, Expr


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

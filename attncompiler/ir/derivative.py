"""Symbolic derivatives of a score or adjust expression with respect to a dot product or a tensor read. Rules are data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from attncompiler.ir.expr import Apply, Axis, Const, Expr, Size, apply

_ONE, _ZERO = Const(1.0), Const(0.0)

# For each operator: its arguments and the node itself -> the factor of each argument's derivative.
PARTIALS: Mapping[str, Callable[..., tuple[Expr, ...]]] = {
    "add": lambda node, a, b: (_ONE, _ONE),
    "sub": lambda node, a, b: (_ONE, Const(-1.0)),
    "mul": lambda node, a, b: (b, a),
    "div": lambda node, a, b: (apply("div", _ONE, b), apply("neg", apply("div", node, b))),
    "neg": lambda node, a: (Const(-1.0),),
    "pow": lambda node, a, b: (
        apply("mul", b, apply("pow", a, apply("sub", b, _ONE))),
        apply("mul", node, apply("log", a)),
    ),
    "exp": lambda node, a: (node,),
    "log": lambda node, a: (apply("div", _ONE, a),),
    "sqrt": lambda node, a: (apply("div", Const(0.5), node),),
    "rsqrt": lambda node, a: (apply("mul", Const(-0.5), apply("mul", node, apply("mul", node, node))),),
    "tanh": lambda node, a: (apply("sub", _ONE, apply("mul", node, node)),),
    "sigmoid": lambda node, a: (apply("mul", node, apply("sub", _ONE, node)),),
    "sin": lambda node, a: (apply("cos", a),),
    "cos": lambda node, a: (apply("neg", apply("sin", a)),),
    "erf": lambda node, a: (apply("mul", Const(2.0 / math.sqrt(math.pi)), apply("exp", apply("neg", apply("mul", a, a)))),),
    "abs": lambda node, a: (
        apply("sub", apply("to_float", apply("gt", a, _ZERO)), apply("to_float", apply("lt", a, _ZERO))),
    ),
    "minimum": lambda node, a, b: _share(apply("lt", a, b), apply("lt", b, a)),
    "maximum": lambda node, a, b: _share(apply("gt", a, b), apply("gt", b, a)),
    "to_float": lambda node, a: (_ONE,),
    "round_f16": lambda node, a: (_ONE,),
    "round_bf16": lambda node, a: (_ONE,),
}  # fmt: skip


def _share(first: Expr, second: Expr) -> tuple[Expr, Expr]:
    """torch's convention at a tie: each side gets half."""
    half = Const(0.5)
    return (
        apply("where", first, _ONE, apply("where", second, _ZERO, half)),
        apply("where", second, _ONE, apply("where", first, _ZERO, half)),
    )


def derivative(expr: Expr, wrt: Expr) -> Expr:
    """d expr / d wrt, where `wrt` is a Dot or a Read that occurs in `expr`; the constant 0.0 where it does not."""
    memo: dict[Expr, Expr] = {}

    def go(node: Expr) -> Expr:
        if node == wrt:
            return _ONE
        if not isinstance(node, Apply):
            return _ZERO
        if node not in memo:
            memo[node] = branch(node) if node.op == "where" else chain(node)
        return memo[node]

    def branch(node: Apply) -> Expr:
        condition, yes, no = node.args
        d_yes, d_no = go(yes), go(no)
        return d_yes if d_yes == d_no else apply("where", condition, d_yes, d_no)

    def chain(node: Apply) -> Expr:
        inner = [go(arg) for arg in node.args]
        if all(d == _ZERO for d in inner):
            return _ZERO
        total: Expr = _ZERO
        for factor, d in zip(PARTIALS[node.op](node, *node.args), inner, strict=True):
            total = _plus(total, _times(factor, d))
        return total

    return go(expr)


def _times(left: Expr, right: Expr) -> Expr:
    if _ZERO in (left, right):
        return _ZERO
    left, right = (apply("to_float", side) if _is_integer(side) else side for side in (left, right))
    return right if left == _ONE else left if right == _ONE else apply("mul", left, right)


def _is_integer(expr: Expr) -> bool:
    """True for arithmetic on positions and sizes: a number times such integers has torch's default precision, not that of the work."""
    if isinstance(expr, Apply):
        return expr.op in ("add", "sub", "mul", "neg", "floordiv", "mod", "minimum", "maximum", "abs") and all(
            map(_is_integer, expr.args)
        )
    return isinstance(expr, Axis | Size) or (isinstance(expr, Const) and type(expr.value) is int)


def _plus(left: Expr, right: Expr) -> Expr:
    return right if left == _ZERO else left if right == _ZERO else apply("add", left, right)

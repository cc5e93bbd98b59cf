"""The elementwise ATen operators as expressions: one row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from attncompiler.ir.expr import Const, Expr, apply

Builder = Callable[..., Expr]


def _binary(op: str) -> Builder:
    return lambda a, b, **_: apply(op, a, b)


def _unary(op: str) -> Builder:
    return lambda a, **_: apply(op, a)


def _scaled(op: str) -> Builder:
    def build(a: Expr, b: Expr, alpha: Any = 1, **_: Any) -> Expr:
        return apply(op, a, b if alpha == 1 else apply("mul", b, Const(alpha)))

    return build


def _divide(a: Expr, b: Expr, rounding_mode: str | None = None, **_: Any) -> Expr:
    if rounding_mode == "floor":
        return apply("floordiv", a, b)
    quotient = apply("div", a, b)
    if rounding_mode == "trunc":
        return apply("to_int", quotient)
    return quotient


def _clamp(a: Expr, low: Expr | None = None, high: Expr | None = None, **named: Expr) -> Expr:
    low, high = named.get("min", low), named.get("max", high)
    if low is not None:
        a = apply("maximum", a, low)
    return a if high is None else apply("minimum", a, high)


def _truth(a: Expr) -> Expr:
    return apply("to_bool", a)


def _square(a: Expr, **_: Any) -> Expr:
    return apply("mul", a, a)


def _power(a: Expr, b: Expr, **_: Any) -> Expr:
    if isinstance(b, Const) and float(b.value) == 2.0:
        return apply("mul", a, a)
    return apply("pow", a, b)


def _gelu(a: Expr, approximate: str = "none", **_: Any) -> Expr:
    half = apply("mul", Const(0.5), a)
    if approximate == "none":
        return apply("mul", half, apply("add", Const(1.0), apply("erf", apply("mul", a, Const(math.sqrt(0.5))))))
    cube = apply("mul", Const(0.044715), apply("mul", a, apply("mul", a, a)))
    inner = apply("mul", Const(math.sqrt(2.0 / math.pi)), apply("add", a, cube))
    return apply("mul", half, apply("add", Const(1.0), apply("tanh", inner)))


_LOG2E = 1.0 / math.log(2.0)

# By the operator's name without its overload; operands are expressions, None or keyword expressions.
ELEMENTWISE: Mapping[str, Builder] = {
    "add": _scaled("add"), "sub": _scaled("sub"), "rsub": lambda a, b, alpha=1, **_: _scaled("sub")(b, a, alpha=alpha),
    "subtract": _scaled("sub"), "mul": _binary("mul"), "multiply": _binary("mul"),
    "div": _divide, "divide": _divide, "true_divide": _divide, "floor_divide": _binary("floordiv"), "remainder": _binary("mod"),
    "neg": _unary("neg"), "negative": _unary("neg"), "abs": _unary("abs"), "exp": _unary("exp"), "log": _unary("log"),
    "log2": lambda a, **_: apply("mul", apply("log", a), Const(_LOG2E)),
    "exp2": lambda a, **_: apply("exp", apply("mul", a, Const(math.log(2.0)))),
    "sqrt": _unary("sqrt"), "rsqrt": _unary("rsqrt"), "tanh": _unary("tanh"), "sigmoid": _unary("sigmoid"), "sin": _unary("sin"),
    "cos": _unary("cos"), "floor": _unary("floor"), "ceil": _unary("ceil"), "erf": _unary("erf"), "square": _square, "pow": _power,
    "reciprocal": lambda a, **_: apply("div", Const(1.0), a),
    "relu": lambda a, **_: apply("maximum", a, Const(0.0)),
    "clamp": _clamp, "clip": _clamp, "clamp_min": lambda a, b, **_: apply("maximum", a, b),
    "clamp_max": lambda a, b, **_: apply("minimum", a, b),
    "minimum": _binary("minimum"), "maximum": _binary("maximum"), "min": _binary("minimum"), "max": _binary("maximum"),
    "eq": _binary("eq"), "ne": _binary("ne"), "lt": _binary("lt"), "le": _binary("le"), "gt": _binary("gt"), "ge": _binary("ge"),
    "less": _binary("lt"), "less_equal": _binary("le"), "greater": _binary("gt"), "greater_equal": _binary("ge"),
    "not_equal": _binary("ne"),
    "logical_and": lambda a, b, **_: apply("and", _truth(a), _truth(b)),
    "logical_or": lambda a, b, **_: apply("or", _truth(a), _truth(b)),
    "logical_xor": lambda a, b, **_: apply("xor", _truth(a), _truth(b)),
    "logical_not": lambda a, **_: apply("not", _truth(a)),
    "bitwise_and": _binary("and"), "bitwise_or": _binary("or"), "bitwise_xor": _binary("xor"), "bitwise_not": _unary("not"),
    "__and__": _binary("and"), "__or__": _binary("or"), "__xor__": _binary("xor"),
    "where": lambda c, a, b, **_: apply("where", c, a, b),
    "fill": lambda a, value, **_: value,
    "masked_fill": lambda a, mask, value, **_: apply("where", mask, value, a),
}  # fmt: skip

# Of several operators each. log1p, expm1 and softplus are none: composed, they lose small numbers.
COMPOSED: Mapping[str, Builder] = {
    "silu": lambda a, **_: apply("mul", a, apply("sigmoid", a)), "gelu": _gelu,
}  # fmt: skip

# Bitwise operators mean logic only on booleans.
BOOLEAN_ONLY = frozenset({"bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "__and__", "__or__", "__xor__"})


def base_name(target: object) -> str:
    """ "masked_fill" of aten.masked_fill.Scalar; "" for what is neither an ATen operator nor one of ours."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "attncompiler"):
        return target._schema.name.split("::")[1]
    return ""

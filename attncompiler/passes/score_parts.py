"""What the element of scores is made of: one dot product, the factor that it has, and the sum over a row that it is divided by."""

from __future__ import annotations

from collections.abc import Iterator

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import ONE, ZERO, Apply, Const, Dot, Expr, apply, axes_of, dots_of, mul, walk
from attncompiler.ir.text import expr_text
from attncompiler.passes.nodes import RowReduce


def weighs_pairs(element: Expr) -> bool:
    """True where something beside the dot product depends on query and key together."""
    return any(
        {"q_idx", "kv_idx"} <= axes_of(node) and not dots_of(node)
        for node in _outside_dots(element)
    )  # fmt: skip


def _outside_dots(expr: Expr) -> Iterator[Expr]:
    stack = [expr]
    while stack:
        node = stack.pop()
        if not isinstance(node, Dot):
            yield node
            stack.extend(node.children)


def hides_some(*elements: Expr) -> bool:
    return any(element in (ZERO, Const(0.0)) for element in elements)


def factor_text(element: Expr) -> str:
    try:
        return expr_text(parts_of(element)[1])
    except Unrecognised:
        return "made of the scores"


def parts_of(element: Expr) -> tuple[Dot, Expr, Expr | None]:
    """dot * factor / divisor: the divisor is what holds sums over a row. Raises: Unrecognised, naming the operator in between."""
    if isinstance(element, Dot):
        return element, ONE, None
    if isinstance(element, Apply) and element.op in ("to_float", "round_f16", "round_bf16"):
        return parts_of(element.args[0])
    if isinstance(element, Apply) and element.op == "neg":
        raise Unrecognised("the scores are subtracted", why="they are negated before they are summed", do="negate the output")
    if isinstance(element, Apply) and element.op in ("mul", "div"):
        left, right = element.args
        if dots_of(left) and not dots_of(right):
            dot, factor, divisor = parts_of(left)
            if any(isinstance(n, RowReduce) for n in walk(right)):
                right = right if element.op == "div" else apply("div", Const(1.0), right)
                return dot, factor, right if divisor is None else mul(divisor, right)
            return dot, _times(factor, right) if element.op == "mul" else apply("div", factor, right), divisor
        if element.op == "mul" and dots_of(right) and not dots_of(left):
            return parts_of(apply("mul", right, left))
    what = element.op if isinstance(element, Apply) else "nothing that is a product of queries and keys"
    raise Unrecognised(
        "the scores are not a product of queries and keys times a factor",
        why=f"between the product and the values stands {what}",
    )


def _times(left: Expr, right: Expr) -> Expr:
    return right if left == ONE else mul(left, right)

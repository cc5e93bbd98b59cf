"""Where a gate is 0 by construction: by a scatter, a one-hot, a comparison, `where` or a masked softmax, of whatever values.

Found as nodes of the graph, bool and of the gate's shape or one that broadcasts to it: False where the gate is exactly 0 and
nothing that it is computed from has a gradient through it. A number that can turn such a 0 into NaN makes it True again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from attncompiler.passes.contraction import argument
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.memory import inherit_line
from attncompiler.passes.nodes import EXPANDS, PERMUTES, RESHAPES, dtype_of, is_tensor

aten = torch.ops.aten
_MOST_STEPS = 40  # operators between a gate and what makes its zeros


@dataclass(frozen=True)
class Builder:
    """Puts new nodes into a graph before a node, with the values that tracing would give them."""

    graph: Graph
    before: Node

    def __call__(self, op: torch._ops.OpOverload, *args: object, **kwargs: object) -> Node:
        def value(x: object) -> object:
            return x.meta["val"] if isinstance(x, Node) else [value(each) for each in x] if isinstance(x, list) else x

        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(op, args, kwargs)  # type: ignore[arg-type]
        node.meta["val"] = op(*map(value, args), **kwargs)
        inherit_line(node, self.before)
        return node


def activity(node: Node, build: Builder, steps: int = _MOST_STEPS) -> Node | None:
    """Where `node` may be other than 0; None where that may be anywhere."""
    if steps == 0 or node.op != "call_function" or not is_tensor(node):
        return None
    if not dtype_of(node).is_floating_point:
        return build(aten.ne.Scalar, node, 0)
    name = base_name(node.target).rstrip("_")
    rule = _RULES.get(name)
    if rule is not None:
        return rule(node, build, steps - 1)
    source = node.args[0] if node.args else None
    if name in _MOVES and isinstance(source, Node):
        found = activity(source, build, steps - 1)
        if found is None or found.meta["val"].shape != source.meta["val"].shape:
            return None
        assert isinstance(node.target, torch._ops.OpOverload)
        return build(node.target, found, *node.args[1:], **node.kwargs)
    return None


_MOVES = (
    RESHAPES | PERMUTES | EXPANDS | {"slice", "select", "repeat", "repeat_interleave", "clone", "alias", "contiguous", "narrow"}
)
_Rule = Callable[[Node, Builder, int], "Node | None"]


def _same_zeros(node: Node, build: Builder, steps: int) -> Node | None:
    source = node.args[0]
    return activity(source, build, steps) if isinstance(source, Node) else None


def _scatter(node: Node, build: Builder, steps: int) -> Node | None:
    base, dim, index = (argument(node, place, name) for place, name in enumerate(("self", "dim", "index")))
    if not isinstance(base, Node) or not is_zero(base):
        return None
    empty = build(aten.zeros_like.default, base, dtype=torch.bool)
    return build(aten.scatter.value, empty, dim, index, True)


def is_zero(value: object) -> bool:
    """True for 0, and for a tensor that is 0 everywhere."""
    if not isinstance(value, Node):
        return isinstance(value, bool | int | float) and value == 0
    name = base_name(value.target)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return True
    if name in ("full", "full_like", "new_full", "scalar_tensor"):
        return is_zero(argument(value, 0 if name == "scalar_tensor" else 2 if name == "new_full" else 1, "fill_value", 1))
    return name in ("to", "_to_copy", "expand", "clone") and is_zero(value.args[0])


def _cat(node: Node, build: Builder, steps: int) -> Node | None:
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    found = [activity(part, build, steps) if isinstance(part, Node) else None for part in parts]
    if all(each is None for each in found):
        return None
    every = []
    for part, each in zip(parts, found, strict=True):
        if each is None or each.meta["val"].shape != part.meta["val"].shape:
            each = build(aten.ones_like.default, part, dtype=torch.bool)
        every.append(each)
    return build(aten.cat.default, every, argument(node, 1, "dim", 0))


def _product(left: object, right: object, build: Builder, steps: int) -> Node | None:
    """0 where either is, unless the other is infinite or NaN."""
    sides = []
    for mine, other in ((left, right), (right, left)):
        found = activity(mine, build, steps) if isinstance(mine, Node) else None
        if found is None or (isinstance(other, float) and not math.isfinite(other)):
            continue
        if is_tensor(other):
            wild = build(aten.logical_not.default, build(aten.isfinite.default, other))
            found = build(aten.logical_or.default, found, wild)
        sides.append(found)
    if not sides:
        return None
    return sides[0] if len(sides) == 1 else build(aten.logical_and.default, *sides)


def _mul(node: Node, build: Builder, steps: int) -> Node | None:
    return _product(node.args[0], node.args[1], build, steps)


def _einsum(node: Node, build: Builder, steps: int) -> Node | None:
    """A product element by element, the letters of both laid out as those of the result."""
    spread = spread_einsum(node, build)
    return None if spread is None else _product(*spread, build, steps)


def spread_einsum(node: Node, build: Builder) -> tuple[Node, Node] | None:
    """The two operands of an einsum that sums nothing, in the dimensions of its result; None for another one."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, list | tuple)
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    sums = any(len(set(each)) < len(each) or set(each) - set(result) for each in letters)
    if not arrow or len(operands) != 2 or "." in equation or sums:
        return None
    found = []
    for operand, mine in zip(operands, letters, strict=True):
        assert isinstance(operand, Node)
        laid = build(aten.permute.default, operand, [mine.index(letter) for letter in result if letter in mine])
        for place, letter in enumerate(result):
            if letter not in mine:
                laid = build(aten.unsqueeze.default, laid, place)
        found.append(laid)
    return found[0], found[1]


def _div(node: Node, build: Builder, steps: int) -> Node | None:
    """0 / 0 is NaN, and so is 0 / NaN."""
    left, right = node.args[:2]
    found = activity(left, build, steps) if isinstance(left, Node) else None
    if found is None or (not isinstance(right, Node) and not right):
        return None
    if not is_tensor(right):
        return found
    wild = build(aten.logical_or.default, build(aten.eq.Scalar, right, 0), build(aten.isnan.default, right))
    return build(aten.logical_or.default, found, wild)


def _where(node: Node, build: Builder, steps: int) -> Node | None:
    condition, yes, no = node.args[:3]
    assert isinstance(condition, Node)
    if is_zero(no):
        return condition
    return build(aten.logical_not.default, condition) if is_zero(yes) else None


def _masked_fill(node: Node, build: Builder, steps: int) -> Node | None:
    mask, value = node.args[1:3]
    return build(aten.logical_not.default, mask) if is_zero(value) else None


def _softmax(node: Node, build: Builder, steps: int) -> Node | None:
    """What is masked by -inf weighs 0, but in a row of which all is masked."""
    scores = node.args[0]
    while isinstance(scores, Node) and base_name(scores.target) in ("to", "_to_copy", "clone"):
        scores = scores.args[0]
    if not isinstance(scores, Node) or base_name(scores.target).rstrip("_") != "masked_fill" or scores.args[2] != -math.inf:
        return None
    kept = build(aten.logical_not.default, scores.args[1])
    return build(aten.logical_or.default, kept, build(aten.isnan.default, node))


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("to", "_to_copy", "type_as", "detach", "neg"), _same_zeros),
    "scatter": _scatter, "scatter_add": _scatter, "cat": _cat, "mul": _mul, "div": _div, "where": _where, "masked_fill": _masked_fill,
    "softmax": _softmax, "einsum": _einsum,
}  # fmt: skip

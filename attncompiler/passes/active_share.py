"""How much of a mask that activity.py made is expected to be True: of what is scattered from top-k, k of all."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from attncompiler.passes.contraction import argument
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.nodes import EXPANDS, PERMUTES, RESHAPES, shape_of


def active_share(active: Node) -> float:
    """The share of pairs of a query and a head that are on, where the graph tells it; else 1."""
    if active.op != "call_function":
        return 1.0
    rule = _RULES.get(base_name(active.target))
    return rule(active) if rule is not None else 1.0


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _length(node: Node, dim: int) -> int:
    return _hint(shape_of(node)[dim])


def _of_source(node: Node) -> float:
    """A mask with its numbers moved, or one part of a dimension that has no other."""
    source = node.args[0]
    assert isinstance(source, Node)
    name = base_name(node.target)
    if name == "select" and _length(source, int(argument(node, 1, "dim", 0))) != 1:
        return 1.0
    return active_share(source)


def _scatter(node: Node) -> float:
    base, dim, index = node.args[:3]
    assert isinstance(base, Node) and isinstance(index, Node) and isinstance(dim, int)
    return min(1.0, _length(index, dim) / max(_length(base, dim), 1))


def _cat(node: Node) -> float:
    parts, dim = node.args[0], int(argument(node, 1, "dim", 0))
    assert isinstance(parts, list | tuple)
    lengths = [_length(part, dim) for part in parts if isinstance(part, Node)]
    shares = (active_share(part) for part in parts if isinstance(part, Node))
    return sum(share * length for share, length in zip(shares, lengths, strict=True)) / max(sum(lengths), 1)


def _and(node: Node) -> float:
    return min(active_share(side) for side in node.args if isinstance(side, Node))


def _or(node: Node) -> float:
    """What may be on, or a number that would be NaN: expected nowhere."""
    return active_share(node.args[0]) if isinstance(node.args[0], Node) else 1.0


def _nonzero(node: Node) -> float:
    """One-hot vectors, summed."""
    source = node.args[0]
    if not isinstance(source, Node) or base_name(source.target) != "sum" or not isinstance(source.args[0], Node):
        return 1.0
    vectors, dims = source.args[0], argument(source, 1, "dim")
    if base_name(vectors.target) != "one_hot" or not isinstance(dims, list | tuple):
        return 1.0
    return min(1.0, math.prod(_length(vectors, dim) for dim in dims) / max(_length(vectors, -1), 1))


def _at_least(node: Node) -> float:
    """What is no less than the smallest of its k largest."""
    x, bound = node.args[:2]
    while isinstance(bound, Node) and base_name(bound.target) in _PARTS:
        bound = bound.args[0]
    if not isinstance(bound, Node) or bound.target is not operator.getitem or bound.args[1] != 0:
        return 1.0
    ranked = bound.args[0]
    if not isinstance(x, Node) or not isinstance(ranked, Node) or base_name(ranked.target) != "topk" or ranked.args[0] is not x:
        return 1.0
    dim = int(argument(ranked, 2, "dim", -1))
    return _length(bound, dim) / max(_length(x, dim), 1)


def _not(node: Node) -> float:
    below = node.args[0]
    return _at_least(below) if isinstance(below, Node) and base_name(below.target) == "lt" else 1.0


_PARTS = {"slice", "select", "unsqueeze", "detach"}
_RULES: dict[str, Callable[[Node], float]] = {
    **dict.fromkeys(PERMUTES | RESHAPES | EXPANDS | {"select", "clone", "contiguous", "alias"}, _of_source),
    "scatter": _scatter, "cat": _cat, "logical_and": _and, "logical_or": _or, "ne": _nonzero, "ge": _at_least, "logical_not": _not,
}  # fmt: skip

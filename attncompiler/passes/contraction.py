"""Every kind of matrix product in the traced graph, as one einsum-like form with a letter for each dimension."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """out[letters] = alpha * sum over letters absent from `out` of left[letters] * right[letters] (+ beta * bias).

    Letters stand for dimensions from first to last; a dimension of size 1 may meet a larger one of the same letter (broadcast)."""

    left: Node
    right: Node
    left_letters: str
    right_letters: str
    out_letters: str
    dtype: torch.dtype
    alpha: float = 1.0
    bias: Node | None = None
    beta: float = 0.0

    @property
    def summed(self) -> str:
        return "".join(c for c in dict.fromkeys(self.left_letters + self.right_letters) if c not in self.out_letters)


def argument(node: Node, place: int, name: str = "", default: Any = None) -> Any:
    """An argument of a call by its place or its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def rank(node: Node) -> int:
    return int(node.meta["val"].dim())


def contraction_of(node: Node) -> Contraction | None:
    """The product that `node` computes; None if it computes none."""
    target = node.target
    if target is aten.einsum.default:
        return _einsum(node)
    if target in (aten.bmm.default, aten.mm.default, aten.matmul.default):
        left, right = node.args[:2]
        assert isinstance(left, Node) and isinstance(right, Node)
        return _matmul(left, right, node.meta["val"].dtype)
    if target is aten.baddbmm.default:
        bias, left, right = node.args[:3]
        assert isinstance(left, Node) and isinstance(right, Node) and isinstance(bias, Node)
        beta, alpha = float(node.kwargs.get("beta", 1)), float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
        return Contraction(left, right, "bmk", "bkn", "bmn", node.meta["val"].dtype, alpha, bias if beta else None, beta)
    return None


def _matmul(left: Node, right: Node, dtype: torch.dtype) -> Contraction | None:
    ranks = rank(left), rank(right)
    if min(ranks) < 2:
        return None
    batch = string.ascii_lowercase[: max(ranks) - 2]
    return Contraction(
        left, right, batch[len(batch) - ranks[0] + 2 :] + "xy", batch[len(batch) - ranks[1] + 2 :] + "yz", batch + "xz", dtype
    )


def _einsum(node: Node) -> Contraction | None:
    equation, operands = node.args[:2]
    assert isinstance(equation, str) and isinstance(operands, Sequence)
    equation = equation.replace(" ", "")
    if len(operands) != 2:
        return None
    inputs, arrow, output = equation.partition("->")
    left, right = inputs.split(",")
    a, b = operands
    assert isinstance(a, Node) and isinstance(b, Node)
    left, right, output = _spell_out_ellipsis(left, right, output, bool(arrow), rank(a), rank(b))
    if any(len(set(letters)) != len(letters) for letters in (left, right, output)):
        return None  # a diagonal
    return Contraction(a, b, left, right, output, node.meta["val"].dtype)


def _spell_out_ellipsis(left: str, right: str, output: str, explicit: bool, *ranks: int) -> tuple[str, str, str]:
    spare = [c for c in string.ascii_letters if c not in left + right + output]
    counts = [r - len(letters.replace("...", "")) for letters, r in zip((left, right), ranks, strict=True)]
    longest = "".join(spare[: max([n for n, s in zip(counts, (left, right), strict=True) if "..." in s] or [0])])
    left, right = (s.replace("...", longest[len(longest) - n :]) for s, n in zip((left, right), counts, strict=True))
    if not explicit:
        both = left + right
        output = longest + "".join(sorted(c for c in set(both) - set(longest) if both.count(c) == 1))
    return left, right, output.replace("...", longest)

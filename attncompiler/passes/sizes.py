"""Sizes of a traced graph as expressions: literals stay literals, symbols become run-time integers of the program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import ONE, ZERO, Axis, Const, Expr, Size, add, floordiv, mod, mul

Extent = int | torch.SymInt


def same(left: Extent, right: Extent) -> bool:
    """True where the sizes are known to be equal, with no new guard."""
    return bool(statically_known_true(left == right))


def size_expr(size: Extent) -> Expr:
    """A size of the graph as an expression. Raises: Unrecognised for arithmetic that the language does not have."""
    if isinstance(size, int):
        return Const(size)
    return _from_sympy(size.node.expr)


def _from_sympy(expr: Any) -> Expr:
    if isinstance(expr, sympy.Integer | int):
        return Const(int(expr))
    if isinstance(expr, sympy.Symbol):
        return Size(str(expr))
    if isinstance(expr, sympy.Add):
        total: Expr = ZERO
        for arg in expr.args:
            total = add(total, _from_sympy(arg))
        return total
    if isinstance(expr, sympy.Mul):
        total = ONE
        for arg in expr.args:
            total = mul(total, _from_sympy(arg))
        return total
    if isinstance(expr, FloorDiv):
        return floordiv(_from_sympy(expr.args[0]), _from_sympy(expr.args[1]))
    if isinstance(expr, Mod | PythonMod):
        return mod(_from_sympy(expr.args[0]), _from_sympy(expr.args[1]))
    raise Unrecognised(f"a size is computed as {expr}", why="the language has sums, products and floor divisions of sizes")


class IndexSpace:
    """The axes that an index is written in, with their sizes: decides what a view does to an index."""

    def __init__(self) -> None:
        self.extents: dict[Axis, Extent] = {}
        self._digits: dict[Expr, list[tuple[Expr, Extent]]] = {}  # merged indices, and what they were merged from

    def axis(self, name: str, extent: Extent) -> Expr:
        """A new axis; one of size 1 is the constant 0."""
        if same(extent, 1):
            return ZERO
        axis = Axis(name)
        self.extents[axis] = extent
        return axis

    def extent(self, index: Expr) -> Extent:
        """The size of an axis; 0 for what is no axis of this space."""
        return self.extents.get(index, 0) if isinstance(index, Axis) else 0

    def below(self, index: Expr, extent: Extent) -> bool:
        """True where 0 <= index < extent is certain."""
        if isinstance(index, Const):
            return bool(statically_known_true(extent > int(index.value)))
        if isinstance(index, Axis) and index in self.extents:
            return same(self.extents[index], extent) or bool(statically_known_true(self.extents[index] <= extent))
        return False

    def reshape(self, index: Sequence[Expr], out_shape: Sequence[Extent], in_shape: Sequence[Extent]) -> tuple[Expr, ...]:
        """The index into `in_shape` of the element that stands at `index` after a view to `out_shape`."""
        if any(same(size, 0) for size in out_shape):
            raise Unrecognised("a view of a tensor without elements")
        result: list[Expr] = []
        for outs, ins in _groups(out_shape, in_shape):
            digits = [(index[place], out_shape[place]) for place in outs if not same(out_shape[place], 1)]
            result += self._regroup(digits, [in_shape[place] for place in ins])
        return tuple(result)

    def _regroup(self, digits: list[tuple[Expr, Extent]], sizes: list[Extent]) -> list[Expr]:
        """Digits of a mixed-radix number, most significant first, rewritten to other radices."""
        found: list[Expr] = []
        for size in reversed(sizes):
            if same(size, 1):
                found.append(ZERO)
            elif not digits:
                raise Unrecognised("a view does not fit its shape")
            else:
                found.append(self._take(digits, size))
        return found[::-1]

    def _take(self, digits: list[tuple[Expr, Extent]], size: Extent) -> Expr:
        """Remove the least significant part of radix `size` from `digits`."""
        taken: list[tuple[Expr, Extent]] = []  # least significant first
        scale: Extent = 1
        while digits and not same(scale, size):
            digit, extent = digits.pop()
            wanted = size // scale
            if digit in self._digits and not same(extent, wanted):
                digits += self._digits[digit]
            elif statically_known_true(extent > wanted) and statically_known_true(extent % wanted == 0):
                divisor = size_expr(wanted)
                digits.append((floordiv(digit, divisor), extent // wanted))
                taken.append((mod(digit, divisor), wanted))
                scale = size
            elif statically_known_true(wanted % extent == 0):  # type: ignore[operator]
                taken.append((digit, extent))
                scale = scale * extent
            else:
                raise Unrecognised("a view mixes two axes whose sizes do not divide each other")
        return self._merge(taken[::-1])

    def _merge(self, digits: list[tuple[Expr, Extent]]) -> Expr:
        """One index from digits, most significant first; remembers them, so that a later view can take it apart again."""
        if len(digits) == 1:
            return digits[0][0]
        merged: Expr = ZERO
        for digit, extent in digits:
            merged = add(mul(merged, size_expr(extent)), digit)
        if all(digit != merged for digit, _ in digits):  # with zeros before it, a digit is its own sum
            self._digits[merged] = digits
        return merged


def _groups(out_shape: Sequence[Extent], in_shape: Sequence[Extent]) -> list[tuple[list[int], list[int]]]:
    """Cut both shapes into the finest runs of equal product, left to right."""
    groups = []
    o = i = 0
    while o < len(out_shape) or i < len(in_shape):
        outs, ins = [], []
        out_product: Extent = 1
        in_product: Extent = 1
        if o < len(out_shape):
            outs.append(o)
            out_product = out_shape[o]
            o += 1
        if i < len(in_shape):
            ins.append(i)
            in_product = in_shape[i]
            i += 1
        while not same(out_product, in_product):
            smaller_out = bool(statically_known_true(out_product < in_product))
            if (smaller_out or i >= len(in_shape)) and o < len(out_shape):
                out_product = out_product * out_shape[o]
                outs.append(o)
                o += 1
            elif i < len(in_shape):
                in_product = in_product * in_shape[i]
                ins.append(i)
                i += 1
            else:
                break
        groups.append((outs, ins))
    return groups

"""Predicate -> for each row of pairs the exact runs of columns that are kept: plans in time and memory O(N), without a table.

Holds for `and`, `or` of comparisons with one side free of the columns and the other free of the rows and rising along the
columns: causal, windows, lengths, sinks, documents in order. What else there is, is left to intervals.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.ir.evaluate import Block
from attncompiler.ir.expr import FALSE, TRUE, Apply, Axis, Const, Expr, axes_of

_MOST = 6  # runs a row; beyond, coarse-to-fine refinement is as good


@dataclass(frozen=True)
class Span:
    """Columns [begin, end) of each row, int64, each broadcast over [b, h, rows]; none where end <= begin."""

    begin: Tensor
    end: Tensor


def spans(predicate: Expr, block: Block, row: Axis, column: Axis) -> list[Span] | None:
    """The kept columns of every row of the block as a union of spans; None where the predicate has another form."""
    finder = _Finder(block, row, column)
    try:
        found = finder.union(predicate)
    except _OtherFormError:
        return None
    return found


class _OtherFormError(Exception):
    """The predicate is not made of spans."""


class _Finder:
    def __init__(self, block: Block, row: Axis, column: Axis) -> None:
        self.block, self.row, self.column = block, row, column
        self.rows, self.columns = block.positions[row.name].numel(), block.extents[column.name]

    def union(self, expr: Expr) -> list[Span]:
        if expr == TRUE:
            return [self._all()]
        if expr == FALSE:
            return []
        if isinstance(expr, Apply) and expr.op == "or":
            return self._few([*self.union(expr.args[0]), *self.union(expr.args[1])])
        if isinstance(expr, Apply) and expr.op == "and":
            left, right = self.union(expr.args[0]), self.union(expr.args[1])
            return self._few([Span(torch.maximum(a.begin, b.begin), torch.minimum(a.end, b.end)) for a in left for b in right])
        axes = axes_of(expr)
        if self.column.name not in axes:
            kept = self._along(expr, 2, self.rows).to(torch.bool)
            return [Span(torch.zeros_like(kept, dtype=torch.int64), kept * self.columns)]
        if isinstance(expr, Apply) and expr.op in _SWAPPED:
            return self._comparison(expr)
        raise _OtherFormError

    def _few(self, found: list[Span]) -> list[Span]:
        if len(found) > _MOST:
            raise _OtherFormError
        return found

    def _all(self) -> Span:
        return Span(*torch.tensor([0, self.columns])[:, None, None, None])

    def _comparison(self, expr: Apply) -> list[Span]:
        op, (rising, fixed) = expr.op, expr.args
        if self.row.name in axes_of(rising):
            op, rising, fixed = _SWAPPED[op], fixed, rising
        if self.row.name in axes_of(rising) or self.column.name in axes_of(fixed):
            raise _OtherFormError
        value = self._along(fixed, 2, self.rows)
        if value.is_floating_point():
            raise _OtherFormError
        place = self._places(rising, value.to(torch.int64))
        none, all_ = self._all().begin, self._all().end
        if op == "eq":
            return [Span(place(False), place(True))]
        if op == "ne":
            return [Span(none, place(False)), Span(place(True), all_)]
        edge = place(op in ("le", "gt"))
        return [Span(none, edge) if op in ("lt", "le") else Span(edge, all_)]

    def _places(self, rising: Expr, value: Tensor) -> Callable[[bool], Tensor]:
        """How many columns lie before each value of an expression that rises along them; with `right`, how many up to it."""
        if rising == self.column:  # its values are its places
            return lambda right: (value + 1 if right else value).clamp(0, self.columns)
        steps = self._along(rising, 3, self.columns)
        if steps.is_floating_point() or (not rises(rising, self.column) and bool((steps[..., 1:] < steps[..., :-1]).any())):
            raise _OtherFormError
        return _places(steps.to(torch.int64), value)

    def _along(self, expr: Expr, dim: int, size: int) -> Tensor:
        """The value at every position of the rows' or columns' axis: [b or 1, h or 1, size]."""
        value = self.block.tensor(expr)
        value = value.reshape((1,) * (4 - value.dim()) + tuple(value.shape)) if value.dim() < 4 else value
        if self.row.name != "q_idx":
            value = value.transpose(2, 3)
        value = value.squeeze(5 - dim)
        return value.expand(*value.shape[:2], size)


def _places(steps: Tensor, value: Tensor) -> Callable[[bool], Tensor]:
    """How many of the rising `steps` are below each value; with `right`, how many are not above it."""
    first, last = (
        (int(steps[..., end].min() if end == 0 else steps[..., end].max()) for end in (0, -1)) if steps.numel() else (0, -1)
    )
    span = last - first + 1
    if steps.numel() == steps.shape[2] and span <= 4 * steps.shape[2] and value.numel() >= steps.numel() // 8:
        # of numbers in a small range, by counting: several times faster over a million positions
        counted = torch.nn.functional.pad(torch.bincount(steps.reshape(-1) - first, minlength=span).cumsum(0), (1, 0))
        return lambda right: counted[(value - first + right).clamp(0, span)]
    shape = torch.broadcast_shapes(steps.shape[:2], value.shape[:2])
    sequence, values = (x.expand(*shape, -1).contiguous() for x in (steps, value))
    return lambda right: torch.searchsorted(sequence, values, right=right)


def rises(expr: Expr, axis: Axis) -> bool:
    """True where an integer expression surely never falls along an axis."""
    return _goes(expr, axis, up=True)


def _goes(expr: Expr, axis: Axis, up: bool) -> bool:
    if axis.name not in axes_of(expr):
        return True
    if not isinstance(expr, Apply):
        return expr == axis and up
    if expr.op in ("add", "minimum", "maximum"):
        return all(_goes(arg, axis, up) for arg in expr.args)
    if expr.op in ("sub", "neg"):
        return _goes(expr.args[-1], axis, not up) and (expr.op == "neg" or _goes(expr.args[0], axis, up))
    factor = expr.args[-1]
    if expr.op in ("mul", "floordiv") and isinstance(factor, Const) and type(factor.value) is int and factor.value > 0:
        return _goes(expr.args[0], axis, up)
    return False


def edges_decide(predicate: Expr, row: Axis, column: Axis) -> bool:
    """True where the spans of a predicate surely begin and end no earlier in a later row: the first and the last row of a tile then
    say what its other rows keep."""
    if not isinstance(predicate, Apply):
        return row.name not in axes_of(predicate)
    if predicate.op in ("and", "or"):
        return all(edges_decide(arg, row, column) for arg in predicate.args)
    if row.name not in axes_of(predicate):
        return True
    free = [arg for arg in predicate.args if column.name not in axes_of(arg)]
    return predicate.op in _SWAPPED and len(free) == 1 and rises(free[0], row)


_SWAPPED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}

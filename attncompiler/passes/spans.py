"""Predicate -> for each row of pairs the exact runs of columns that are kept: plans in time and memory O(N), without a table.

Holds for `and`, `or` of comparisons with one side free of the columns and the other free of the rows and rising along the
columns: causal, windows, lengths, sinks, documents in order. What else there is, is left to intervals.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.ir.evaluate import Block
from attncompiler.ir.expr import FALSE, TRUE, Apply, Axis, Expr, axes_of

_MOST = 6  # runs a row; beyond, coarse-to-fine refinement is as good


@dataclass(frozen=True)
class Span:
    """Columns [begin, end) of each row, int64 [b or 1, h or 1, rows]; none where end <= begin."""

    begin: Tensor
    end: Tensor


def spans(predicate: Expr, block: Block, row: Axis, column: Axis) -> list[Span] | None:
    """The kept columns of every row as a union of spans; None where the predicate has another form."""
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
        self.rows, self.columns = block.extents[row.name], block.extents[column.name]

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
        begin = torch.zeros(1, 1, self.rows, dtype=torch.int64)
        return Span(begin, begin + self.columns)

    def _comparison(self, expr: Apply) -> list[Span]:
        op, (rising, fixed) = expr.op, expr.args
        if self.row.name in axes_of(rising):
            op, rising, fixed = _SWAPPED[op], fixed, rising
        if self.row.name in axes_of(rising) or self.column.name in axes_of(fixed):
            raise _OtherFormError
        value = self._along(fixed, 2, self.rows)
        if rising == self.column:  # its values are its places
            if value.is_floating_point():
                raise _OtherFormError
            value = value.to(torch.int64)
            low, high = value.clamp(0, self.columns), (value + 1).clamp(0, self.columns)
        else:
            steps = self._along(rising, 3, self.columns)
            if steps.is_floating_point() or value.is_floating_point() or bool((steps[..., 1:] < steps[..., :-1]).any()):
                raise _OtherFormError
            shape = torch.broadcast_shapes(steps.shape[:2], value.shape[:2])
            steps = steps.to(torch.int64).expand(*shape, -1).contiguous()
            value = value.to(torch.int64).expand(*shape, -1).contiguous()
            low, high = _places(steps, value)
        none, all_ = torch.zeros_like(low), torch.full_like(low, self.columns)
        if op == "ne":
            return [Span(none, low), Span(high, all_)]
        begin, end = {"lt": (none, low), "le": (none, high), "ge": (low, all_), "gt": (high, all_), "eq": (low, high)}[op]
        return [Span(begin, end)]

    def _along(self, expr: Expr, dim: int, size: int) -> Tensor:
        """The value at every position of the rows' or columns' axis: [b or 1, h or 1, size]."""
        value = self.block.tensor(expr)
        value = value.reshape((1,) * (4 - value.dim()) + tuple(value.shape)) if value.dim() < 4 else value
        if self.row.name != "q_idx":
            value = value.transpose(2, 3)
        value = value.squeeze(5 - dim)
        return value.expand(*value.shape[:2], size)


def _places(steps: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the rising `steps` are below each value, and how many are not above it."""
    first = int(steps.min()) if steps.numel() else 0
    span = int(steps.max()) - first + 1 if steps.numel() else 0
    if steps.numel() != steps.shape[2] or span > 4 * steps.shape[2]:
        return torch.searchsorted(steps, value), torch.searchsorted(steps, value, right=True)
    # of numbers in a small range, by counting: several times faster over a million positions
    counted = torch.nn.functional.pad(torch.bincount(steps.reshape(-1) - first, minlength=span).cumsum(0), (1, 0))
    return counted[(value - first).clamp(0, span)], counted[(value - first + 1).clamp(0, span)]


_SWAPPED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}

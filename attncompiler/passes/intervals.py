"""What an expression can be on whole tiles of (query, key) pairs: bounds, proved without looking at every pair.

A boolean is bounded like a number in {0, 1}: `lo` says it surely holds everywhere, `hi` that it may hold somewhere. What depends on
one axis only (a length, a document id, a grid coordinate) is evaluated exactly and reduced over each tile: O(N), not O(N^2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attncompiler.ir.evaluate import LARGEST_UNIFORM, TORCH, Block, uniform
from attncompiler.ir.expr import OPERATORS, Apply, Axis, Const, Expr, Kind, Read, Size, Uniform, axes_of


@dataclass(frozen=True, slots=True)
class Interval:
    """lo <= value <= hi on every pair of a tile; both broadcast over [b, h, tiles]."""

    lo: Tensor
    hi: Tensor

    @property
    def is_bool(self) -> bool:
        return self.lo.dtype == torch.bool


@dataclass
class Tiles:
    """A list of tiles, and the program's operands. `rows` and `columns` are the tile numbers, int64 [L]."""

    block: Block  # all positions of the program, for what is evaluated exactly
    block_q: int
    block_kv: int
    rows: Tensor
    columns: Tensor
    memo: dict[Expr, Interval] = field(default_factory=dict)

    def __call__(self, expr: Expr) -> Interval:
        if expr not in self.memo:
            self.memo[expr] = self._bounds(expr)
        return self.memo[expr]

    def _bounds(self, expr: Expr) -> Interval:
        if isinstance(expr, Const | Size):
            value = self.block.tensor(expr).to(self.rows.device)
            return Interval(value, value)
        axes = axes_of(expr)
        if isinstance(expr, Axis) and expr.name in ("q_idx", "kv_idx"):
            tile, size = (self.rows, self.block_q) if expr.name == "q_idx" else (self.columns, self.block_kv)
            return Interval(tile * size, torch.clamp(tile * size + size - 1, max=self.block.extents[expr.name] - 1))
        if not {"q_idx", "kv_idx"} <= axes:
            return self._exact(expr, axes)
        if isinstance(expr, Read):
            return self._table(expr)
        if isinstance(expr, Uniform):
            return self._uniform(expr)
        assert isinstance(expr, Apply)
        return _applied(expr, [self(arg) for arg in expr.args], self.rows.device)

    def _exact(self, expr: Expr, axes: frozenset[str]) -> Interval:
        """Evaluated at every position of its one axis, then reduced over each tile."""
        value = self.block.tensor(expr)
        value = value.reshape((1,) * (4 - value.dim()) + tuple(value.shape)) if value.dim() < 4 else value
        if "q_idx" in axes:
            lo, hi = _reduce(value.squeeze(3), self.block_q)
            return Interval(lo[..., self.rows], hi[..., self.rows])
        if "kv_idx" in axes:
            lo, hi = _reduce(value.squeeze(2), self.block_kv)
            return Interval(lo[..., self.columns], hi[..., self.columns])
        value = value.squeeze(3)
        return Interval(*_without_nan(value, value))

    def _table(self, read: Read) -> Interval:
        """A table read at positions of both sides (a distance, a pair of blocks): its bounds where each tile reads it."""
        table = self.block.tensors[read.tensor]
        ranged = [place for place, entry in enumerate(read.index) if axes_of(entry) & {"q_idx", "kv_idx"}]
        pairs = self.block.extents["q_idx"] * self.block.extents["kv_idx"]
        is_small = math.prod(table.shape[place] for place in ranged) < pairs
        if not is_small or not (table.dtype == torch.bool or len(ranged) == 1) or table.numel() == 0:
            return self._pairs(read)
        places = [self._places(entry, size) for entry, size in zip(read.index, table.shape, strict=True)]
        return _in_boxes(table, places, ranged) if table.dtype == torch.bool else _in_runs(table, places, ranged[0])

    def _uniform(self, expr: Uniform) -> Interval:
        """One number where the tile lies in one cell of rows and columns, else any."""
        row, column = (_number(self(place)) for place in expr.at)
        drawn = uniform(self.block.tensors[expr.seed.tensor].reshape(()), row.lo, column.lo).double()
        one_cell = (row.lo == row.hi) & (column.lo == column.hi)
        return Interval(torch.where(one_cell, drawn, 0.0), torch.where(one_cell, drawn, LARGEST_UNIFORM))

    def _places(self, entry: Expr, size: int) -> Interval:
        """An index's bounds, inside its dimension as reads are."""
        bounds = _number(self(entry))
        lo, hi = (end.clamp(0, size - 1).to(torch.int64) for end in (bounds.lo, bounds.hi))
        return Interval(lo, hi)

    def _pairs(self, read: Read) -> Interval:
        """A tensor with one value for each pair: its smallest and largest in every tile."""
        value = self.block.tensor(read)
        shape = (*value.shape[:2], self.block.extents["q_idx"], self.block.extents["kv_idx"])
        lo, hi = _reduce(value.expand(shape), self.block_kv)
        lo, _ = _reduce(lo.transpose(2, 3), self.block_q)
        _, hi = _reduce(hi.transpose(2, 3), self.block_q)
        return Interval(lo[:, :, self.columns, self.rows], hi[:, :, self.columns, self.rows])


def _applied(expr: Apply, args: list[Interval], device: torch.device) -> Interval:
    """What an operator makes of bounds; the widest where no rule knows it."""
    rule = RULES.get(expr.op)
    if expr.op == "mul" and expr.args[0] == expr.args[1]:
        rule, args = _square, args[:1]
    if rule is not None:
        return rule(*args)
    if OPERATORS[expr.op].kind is Kind.BOOL:
        return Interval(torch.tensor(False, device=device), torch.tensor(True, device=device))
    return Interval(torch.tensor(-math.inf, device=device), torch.tensor(math.inf, device=device))


def bounds(expr: Expr, leaves: Mapping[Expr, Interval]) -> Interval:
    """Bounds of an expression of integers, from those of its leaves."""
    memo = dict(leaves)

    def go(node: Expr) -> Interval:
        if node not in memo:
            if isinstance(node, Const):
                memo[node] = Interval(torch.tensor(node.value), torch.tensor(node.value))
            else:
                assert isinstance(node, Apply)
                memo[node] = _applied(node, [go(arg) for arg in node.args], torch.device("cpu"))
        return memo[node]

    return go(expr)


def _in_boxes(table: Tensor, places: Sequence[Interval], ranged: Sequence[int]) -> Interval:
    """Whether a boolean table holds in all and in some of the box of entries that each tile reads, by counting from its corners."""
    counted = table.to(torch.int32)
    for place in ranged:
        counted = counted.cumsum(place, dtype=torch.int32)
        counted = torch.cat([torch.zeros_like(counted.narrow(place, 0, 1)), counted], place)
    held, entries = torch.zeros((), dtype=torch.int64, device=table.device), torch.ones((), dtype=torch.int64, device=table.device)
    for ends in itertools.product((False, True), repeat=len(ranged)):
        last = dict(zip(ranged, ends, strict=True))
        corner = tuple(at.hi + 1 if last.get(place) else at.lo for place, at in enumerate(places))
        held = held + counted[corner] * (-1 if ends.count(False) % 2 else 1)
    for place in ranged:
        entries = entries * (places[place].hi - places[place].lo + 1)
    return Interval(held == entries, held > 0)


def _in_runs(table: Tensor, places: Sequence[Interval], ranged: int) -> Interval:
    """The smallest and largest of the run of entries that each tile reads, from those of runs of 1, 2, 4, ... entries."""
    low, high = _without_nan(table, table)
    length = places[ranged].hi - places[ranged].lo + 1
    count = table.shape[ranged].bit_length()
    powers = 1 << torch.arange(count, device=table.device)
    level = torch.bucketize(length, powers, right=True) - 1
    found = []
    for values, smaller in ((low, torch.minimum), (high, torch.maximum)):
        levels = [values]
        for power in (1 << i for i in range(count - 1)):
            known = levels[-1]
            beyond = known.narrow(ranged, -1, 1).expand_as(known.narrow(ranged, 0, power))  # never looked at
            levels.append(smaller(known, torch.cat([known.narrow(ranged, power, known.shape[ranged] - power), beyond], ranged)))
        stacked = torch.stack(levels)
        first = [at.lo for at in places]
        second = list(first)
        second[ranged] = places[ranged].hi + 1 - powers[level]
        found.append(smaller(stacked[(level, *first)], stacked[(level, *second)]))
    return Interval(*found)


def _reduce(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest over each run of `size` along the last axis; the last run may be short."""
    length = values.shape[-1]
    short = -length % size
    if short:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], short)], dim=-1)
    tiled = values.unflatten(-1, (-1, size))
    if values.dtype == torch.bool:
        return tiled.all(-1), tiled.any(-1)
    return _without_nan(tiled.amin(-1), tiled.amax(-1))


def _without_nan(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """NaN compares false with everything: nothing may be proved of it."""
    if not lo.is_floating_point():
        return lo, hi
    return torch.where(lo.isnan(), -math.inf, lo), torch.where(hi.isnan(), math.inf, hi)


# ------------------------------------------------------------------------------------------------------------- rules


def _number(x: Interval) -> Interval:
    return Interval(x.lo.to(torch.int64), x.hi.to(torch.int64)) if x.is_bool else x


def _products(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Interval, Interval], Interval]:
    """Bounds from the four corners: right for operators monotone in each operand. 0 * inf counts as anything."""

    def rule(a: Interval, b: Interval) -> Interval:
        a, b = _number(a), _number(b)
        corners = [combine(x, y) for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
        lo, hi = corners[0], corners[0]
        for corner in corners[1:]:
            lo, hi = torch.minimum(*_same(lo, corner)), torch.maximum(*_same(hi, corner))
        return Interval(*_without_nan(lo, hi))

    return rule


def _same(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _by_positive(rule: Callable[[Interval, Interval], Interval]) -> Callable[[Interval, Interval], Interval]:
    """A division rule that holds for positive divisors; elsewhere the widest bounds."""

    def guarded(a: Interval, b: Interval) -> Interval:
        a, b = _number(a), _number(b)
        positive = b.lo > 0
        safe = Interval(torch.where(positive, b.lo, torch.ones_like(b.lo)), torch.where(positive, b.hi, torch.ones_like(b.hi)))
        found = rule(a, safe)
        low, high = (torch.iinfo(torch.int64).min // 4, torch.iinfo(torch.int64).max // 4)
        if found.lo.is_floating_point():
            return Interval(torch.where(positive, found.lo, -math.inf), torch.where(positive, found.hi, math.inf))
        return Interval(torch.where(positive, found.lo, low), torch.where(positive, found.hi, high))

    return guarded


def _mod(a: Interval, b: Interval) -> Interval:
    """Exact where the whole range lies between two multiples of one divisor."""
    one_period = (b.lo == b.hi) & (a.lo // b.lo == a.hi // b.lo)
    return Interval(
        torch.where(one_period, a.lo % b.lo, torch.zeros_like(a.lo)), torch.where(one_period, a.hi % b.lo, b.hi - 1 + 0 * a.hi)
    )


def _absolute(a: Interval) -> Interval:
    lo = torch.where(a.lo > 0, a.lo, torch.where(a.hi < 0, -a.hi, torch.zeros_like(a.lo)))
    return Interval(lo, torch.maximum(a.lo.abs(), a.hi.abs()))


def _square(a: Interval) -> Interval:
    """Not negative, which the product of two intervals would not say."""
    low, high = _absolute(a).lo, _absolute(a).hi
    return Interval(low * low, high * high)


def _where(condition: Interval, yes: Interval, no: Interval) -> Interval:
    if yes.is_bool != no.is_bool:
        yes, no = _number(yes), _number(no)
    dtype = torch.promote_types(yes.lo.dtype, no.lo.dtype)
    y_lo, y_hi, n_lo, n_hi = (t.to(dtype) for t in (yes.lo, yes.hi, no.lo, no.hi))
    both_lo, both_hi = (y_lo & n_lo, y_hi | n_hi) if yes.is_bool else (torch.minimum(y_lo, n_lo), torch.maximum(y_hi, n_hi))
    lo = torch.where(condition.lo, y_lo, torch.where(condition.hi, both_lo, n_lo))
    hi = torch.where(condition.lo, y_hi, torch.where(condition.hi, both_hi, n_hi))
    return Interval(lo, hi)


def _compare(sure: Callable[[Interval, Interval], Tensor], may: Callable[[Interval, Interval], Tensor]) -> Callable[..., Interval]:
    def rule(a: Interval, b: Interval) -> Interval:
        a, b = _number(a), _number(b)
        return Interval(sure(a, b), may(a, b))

    return rule


def _equal(a: Interval, b: Interval) -> Interval:
    a, b = _number(a), _number(b)
    return Interval((a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo), (a.lo <= b.hi) & (b.lo <= a.hi))


def _negate(a: Interval) -> Interval:
    return Interval(~a.hi, ~a.lo)


def _rising(op: str) -> Callable[[Interval], Interval]:
    function = TORCH[op]

    def rule(a: Interval) -> Interval:
        a = _number(a)
        lo, hi = function(a.lo.double()), function(a.hi.double())
        assert isinstance(lo, Tensor) and isinstance(hi, Tensor)
        return Interval(*_without_nan(lo, hi))

    return rule


RULES: Mapping[str, Callable[..., Interval]] = {
    "add": lambda a, b: Interval(_number(a).lo + _number(b).lo, _number(a).hi + _number(b).hi),
    "sub": lambda a, b: Interval(_number(a).lo - _number(b).hi, _number(a).hi - _number(b).lo),
    "neg": lambda a: Interval(-_number(a).hi, -_number(a).lo),
    "mul": _products(lambda x, y: x * y),
    "floordiv": _by_positive(_products(lambda x, y: x // y)),
    "div": _by_positive(_products(lambda x, y: x / y)),
    "mod": _by_positive(_mod),
    "minimum": lambda a, b: Interval(torch.minimum(*_same(a.lo, b.lo)), torch.minimum(*_same(a.hi, b.hi))),
    "maximum": lambda a, b: Interval(torch.maximum(*_same(a.lo, b.lo)), torch.maximum(*_same(a.hi, b.hi))),
    "abs": _absolute,
    "where": _where,
    "lt": _compare(lambda a, b: a.hi < b.lo, lambda a, b: a.lo < b.hi),
    "le": _compare(lambda a, b: a.hi <= b.lo, lambda a, b: a.lo <= b.hi),
    "gt": _compare(lambda a, b: a.lo > b.hi, lambda a, b: a.hi > b.lo),
    "ge": _compare(lambda a, b: a.lo >= b.hi, lambda a, b: a.hi >= b.lo),
    "eq": _equal,
    "ne": lambda a, b: _negate(_equal(a, b)),
    "and": lambda a, b: Interval(a.lo & b.lo, a.hi & b.hi),
    "or": lambda a, b: Interval(a.lo | b.lo, a.hi | b.hi),
    "xor": lambda a, b: Interval((a.lo & ~b.hi) | (~a.hi & b.lo), (a.hi & ~b.lo) | (~a.lo & b.hi)),
    "not": _negate,
    "to_int": lambda a: (
        a if not a.lo.is_floating_point() and not a.is_bool else _number(a) if a.is_bool else Interval(a.lo.trunc(), a.hi.trunc())
    ),
    "to_float": lambda a: Interval(_number(a).lo.double(), _number(a).hi.double()),
    "to_bool": lambda a: a if a.is_bool else _negate(_equal(a, Interval(torch.zeros_like(a.lo), torch.zeros_like(a.hi)))),
    **{op: _rising(op) for op in ("exp", "sqrt", "tanh", "sigmoid", "floor", "ceil", "erf", "log")},
}

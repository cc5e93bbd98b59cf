"""How many tiles a mask visits: of a plan; and of a grid without one, as products of sums over each axis, so that nothing is made
for each pair of tiles.

Tiles of keys lie where kernels have them, from where each row's box begins, or on a fixed lattice of the grid, that of NATTEN
(Generalized Neighborhood Attention, 2025), whose published bounds these counts are.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from attncompiler.errors import OptionError
from attncompiler.ir.expr import TRUE, Expr, axes_of, reads_of
from attncompiler.passes.grid import GridRule, along_axis, box_shapes, grid_rule
from attncompiler.passes.plan import TilePlan

Sides = tuple[int, ...]  # of a box, outermost axis first


@dataclass(frozen=True)
class TileCounts:
    """Over all batches and heads: rows, the tiles of queries; tiles visited, and full ones among them. `worst`: how many the row
    that visits most does."""

    block_q: int
    block_kv: int
    rows: int
    visited: int
    full: int
    worst: int

    @property
    def partial(self) -> int:
        return self.visited - self.full

    @staticmethod
    def of(plan: TilePlan, batches: int, heads: int) -> TileCounts:
        """Of a plan, for so many batches and heads."""
        copies = (batches // plan.plan_b) * (heads // plan.plan_h)
        visited, full = (int(ranges.lengths.sum()) * copies for ranges in (plan.visited, plan.full))
        worst = int(plan.work.max()) if plan.work.numel() else 0
        return TileCounts(plan.block_q, plan.block_kv, batches * heads * plan.q_tiles, visited, full, worst)

    @staticmethod
    def of_all(queries: int, keys: int, block_q: int, block_kv: int) -> TileCounts:
        """Of one head that keeps every pair."""
        rows, columns = -(-queries // block_q), -(-keys // block_kv)
        return TileCounts(block_q, block_kv, rows, rows * columns, queries // block_q * (keys // block_kv), columns)

    def __add__(self, other: TileCounts) -> TileCounts:
        """Of both, in tiles of one size."""
        assert (self.block_q, self.block_kv) == (other.block_q, other.block_kv)
        visited, full = self.visited + other.visited, self.full + other.full
        return replace(self, rows=self.rows + other.rows, visited=visited, full=full, worst=max(self.worst, other.worst))

    def times(self, copies: int) -> TileCounts:
        """Of so many heads that are alike."""
        return replace(self, rows=self.rows * copies, visited=self.visited * copies, full=self.full * copies)


@dataclass(frozen=True)
class AxisTiles:
    """The same of one axis of a grid."""

    rows: int
    visited: int
    full: int
    worst: int


@functools.lru_cache(maxsize=1 << 14)
def axis_tiles(demand: Expr, length: int, row: int, column: int, on_lattice: bool) -> AxisTiles | None:
    """Of a demand on the coordinates of an axis, in tiles of `row` queries and `column` keys. None where a query meets more than
    one run of keys."""
    boxes = along_axis(demand, length, row)
    if boxes is None:
        return None
    if on_lattice:
        begin, end, first, last = boxes.on_lattice(column)
        count = end - begin
    else:
        _, count, first, last = boxes.cut(column)
    return AxisTiles(boxes.start.numel(), int(count.sum()), int((last - first).sum()), int(count.max()))


_LONGEST = 1 << 17  # tokens in a row that are looked at one by one


def separable(predicate: Expr, tokens: int) -> GridRule | None:
    """The grid of a predicate that speaks of one axis at a time; tokens in a row are a grid of one axis. None for another
    predicate, and where a query sees more than one run of keys along an axis."""
    rule = grid_rule(predicate, tokens)
    in_a_row = tokens <= _LONGEST and not reads_of(predicate) and axes_of(predicate) <= {"q_idx", "kv_idx"}
    if rule is None and predicate != TRUE and in_a_row:
        rule = GridRule((tokens,), (predicate,), TRUE, TRUE)
    if rule is None or rule.across != TRUE or rule.rest != TRUE:
        return None
    met = (along_axis(demand, length, 1) for demand, length in zip(rule.along, rule.lengths, strict=True))
    return rule if all(axis is not None for axis in met) else None


def grid_rule_of(predicate: Expr, tokens: int) -> GridRule:
    """The same for what a user asks of. Raises: OptionError where there is none."""
    rule = separable(predicate, tokens)
    if rule is None:
        raise OptionError(
            "the mask is no rule for each axis of a grid by itself",
            why="tiles are counted along one axis at a time",
            do="give masks.grid or masks.halo alone; other masks have a plan, without --lattice and --strides",
        )
    return rule


def grid_counts(rule: GridRule, rows: Sides, columns: Sides, on_lattice: bool) -> TileCounts:
    """Of one head of a separable rule, in boxes of `rows` queries and `columns` keys."""
    axes = [axis_tiles(*part, on_lattice) for part in zip(rule.along, rule.lengths, rows, columns, strict=True)]
    counts = (math.prod(getattr(axis, name) for axis in axes) for name in ("rows", "visited", "full", "worst"))
    return TileCounts(math.prod(rows), math.prod(columns), *counts)


def kept_in_grid(rule: GridRule) -> int:
    """How many pairs a separable rule keeps."""
    met = (along_axis(demand, length, 1) for demand, length in zip(rule.along, rule.lengths, strict=True))
    return math.prod(int((axis.stop - axis.start).sum()) if axis is not None else 0 for axis in met)


def shapes_of(lengths: Sides, rows: int, columns: int) -> list[tuple[Sides, Sides]]:
    """The pairs of boxes of `rows` queries and `columns` keys in a grid whose sides are powers of two."""
    return [(r, c) for r in box_shapes(rows, lengths) for c in box_shapes(columns, lengths)]

"""The tiles of the portable lowering: a block of queries and all the keys that its plan visits, laid side by side.

A block is a run of tokens or, where the mask speaks of a grid and boxes of it meet less, a box: its tokens and its keys are then
several runs, one for each line of the grid."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.codegen.vectors import Lines
from attncompiler.ir.expr import AXES, TRUE, Expr, axes_of
from attncompiler.ir.program import Attention
from attncompiler.passes.grid import GridTiles
from attncompiler.passes.plan import Coverage, TilePlan, TileRanges, build_plan, plan_boxes, tiles_for

_BLOCK_Q, _BLOCK_KV = 128, 64
_LONG = 2048  # of more queries than this a block of one head holds twice as many: fewer calls
_WHOLE = 256  # up to this many queries and keys, one block holds everything
_ELEMENTS = 1 << 22  # scores in flight: they should stay in the cache of a core
_FEW_SPANS = 4  # a mask is evaluated on each of so many spans of columns; for more, once on all
_BOXES_WIN = 0.8  # of the pairs that runs of tokens visit: boxes are put together from pieces

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tile:
    """The queries in `rows` of batches [b0, b1) and heads [h0, h1) against the keys in `ranges`, both laid side by side. Only in the
    columns `partial` of these can a pair be outside `keep`."""

    b0: int
    b1: int
    h0: int
    h1: int
    rows: tuple[Lines, ...]
    ranges: tuple[Lines, ...]
    partial: Spans

    @property
    def masked(self) -> bool:
        return bool(self.partial)

    @property
    def height(self) -> int:
        """How many queries it has."""
        return _length(self.rows)

    @property
    def batches_and_heads(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.b0, self.b1), (self.h0, self.h1)


@dataclass(frozen=True)
class _Row:
    """A row of the plan in elements: its queries, its keys, and which columns of these are of partial tiles."""

    queries: tuple[Lines, ...]
    keys: tuple[Lines, ...]
    partial: Spans


def tiles(
    program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int], extents: Mapping[str, int], group: int
) -> Iterator[Tile]:
    """All tiles of the plan, in order. Heads of one `group`, which share keys, stay together where they share a plan."""
    b, h, m, n = (extents[axis.name] for axis in AXES)
    if min(b, h, m) == 0:
        return
    if m <= _WHOLE and n <= _WHOLE:
        partial: Spans = ((0, n),) if program.keep.predicate != TRUE else ()
        for b0, b1, h0, h1 in _batches(b, h, m, n, group):
            yield Tile(b0, b1, h0, h1, (Lines(0, m),), (Lines(0, n),), partial)
        return
    one_by_one = "h" in axes_of(program.keep.predicate)  # heads with plans of their own
    block_q = 2 * _BLOCK_Q if one_by_one and m > _LONG else _BLOCK_Q
    plan = build_plan(program, operands, sizes, block_q, _BLOCK_KV)
    boxes = tiles_for(program, sizes, _BLOCK_Q, _BLOCK_KV)
    if boxes and boxes.axes[-1].dilation == 1:
        rows = box_rows(program.keep.predicate, m, boxes)
        pairs = sum(_length(row.queries) * _length(row.keys) for row in rows)
        visited = float(plan.visited.lengths.sum()) / (plan.plan_b * plan.plan_h) * block_q * _BLOCK_KV
        if pairs < _BOXES_WIN * visited:
            for row in rows:
                for b0, b1, h0, h1 in _batches(b, h, _length(row.queries), _length(row.keys), group):
                    yield Tile(b0, b1, h0, h1, row.queries, row.keys, row.partial)
            return
    yield from _runs(plan, extents, block_q, group)


def _runs(plan: TilePlan, extents: Mapping[str, int], block_q: int, group: int) -> Iterator[Tile]:
    """The tiles of a plan of tokens in a row."""
    b, h, m, n = (extents[axis.name] for axis in AXES)
    rows = _row_ranges(plan, n)
    for tile in range(plan.q_tiles):
        queries = (Lines(tile * block_q, min((tile + 1) * block_q, m)),)
        for pb in range(plan.plan_b):
            for ph in range(plan.plan_h):
                ranges, partial = rows[(pb * plan.plan_h + ph) * plan.q_tiles + tile]
                wide_b = (pb, pb + 1) if plan.plan_b > 1 else (0, b)
                wide_h = (ph, ph + 1) if plan.plan_h > 1 else (0, h)
                whole_group = group if plan.plan_h == 1 else 1
                shape = wide_b[1] - wide_b[0], wide_h[1] - wide_h[0], _length(queries), _length(ranges)
                for b0, b1, h0, h1 in _batches(*shape, whole_group):
                    yield Tile(wide_b[0] + b0, wide_b[0] + b1, wide_h[0] + h0, wide_h[0] + h1, queries, ranges, partial)


def _batches(b: int, h: int, m: int, n: int, group: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut batches and heads so that the scores in flight stay small; heads of one group stay together."""
    room = max(_ELEMENTS // max(m * n, 1), 1)
    if room >= h:
        step = max(room // h, 1)
        yield from ((b0, min(b0 + step, b), 0, h) for b0 in range(0, b, step))
        return
    step = max(room // group, 1) * group
    yield from ((b0, b0 + 1, h0, min(h0 + step, h)) for b0 in range(b) for h0 in range(0, h, step))


def _length(lines: Sequence[Lines]) -> int:
    return sum(each.positions for each in lines)


def _row_ranges(plan: TilePlan, n: int) -> list[tuple[tuple[Lines, ...], Spans]]:
    """For each row of the plan its key ranges in elements, and which columns of these, laid side by side, are of partial tiles."""
    visited, partial = (_tile_ranges(ranges) for ranges in (plan.visited, plan.partial))
    return [_in_elements(found, cut, plan.block_kv, n) for found, cut in zip(visited, partial, strict=True)]


def _tile_ranges(ranges: TileRanges) -> list[Spans]:
    rows = zip(ranges.count.tolist(), ranges.begin.tolist(), ranges.end.tolist(), strict=True)
    return [tuple(zip(begin[:count], end[:count], strict=True)) for count, begin, end in rows]


def _in_elements(found: Spans, cut: Spans, block: int, n: int) -> tuple[tuple[Lines, ...], Spans]:
    """Ranges of tiles, of which those in `cut` are partial, in elements and in columns."""
    ranges: list[Lines] = []
    columns, left = [], iter(cut)
    start, at = 0, next(left, None)
    for begin, end in found:
        while at is not None and at[0] < end:  # a run of partial tiles lies in one of visited ones
            first, last = ((min(tile * block, n) - begin * block) + start for tile in at)
            columns.append((first, last))
            at = next(left, None)
        ranges.append(Lines(begin * block, min(end * block, n)))
        start += ranges[-1].positions
    return tuple(ranges), _joined(columns, start)


def _joined(spans: Sequence[tuple[int, int]], length: int) -> Spans:
    """Spans that touch become one; all of `length` where they are many or hold most of it."""
    found: list[tuple[int, int]] = []
    for first, last in spans:
        if found and found[-1][1] == first:
            first = found.pop()[0]
        found.append((first, last))
    if len(found) > _FEW_SPANS or 2 * sum(last - first for first, last in found) > length:
        return ((0, length),)
    return tuple(found)


# ------------------------------------------------------------------------------------------------------ boxes of a grid


@functools.lru_cache(maxsize=64)
def box_rows(predicate: Expr, tokens: int, boxes: GridTiles) -> list[_Row]:
    """The rows of the plan of a grid in boxes that are dense along the last axis: every token once, and of keys those of all boxes that
    its plan visits."""
    plan = plan_boxes(predicate, tokens, boxes)
    coverage, origins = plan.coverage[0, 0], plan.origins.to(torch.int64)
    first = _corners(boxes)
    found = []
    for row in range(plan.q_tiles):
        visited = (coverage[row] != int(Coverage.EMPTY)).nonzero().squeeze(1)
        begins = [
            origins[row, place] + visited // step % axis.reach * (axis.columns * axis.dilation)
            for place, (axis, step) in enumerate(zip(boxes.axes, boxes.steps, strict=True))
        ]
        keys, which = _tokens(boxes, begins, boxes.columns)
        cut = (coverage[row, visited] == int(Coverage.PARTIAL))[which].to(torch.int64)
        queries, _ = _tokens(boxes, [corner[row : row + 1] for corner in first], boxes.rows)
        found.append(
            _Row(_lines(_spans_of(queries)), _lines(_spans_of(keys)), _joined(_spans_of(cut.nonzero().squeeze(1)), len(keys)))
        )
    return found


def _corners(boxes: GridTiles) -> list[Tensor]:
    """Where the boxes of queries begin along each axis, int64 [boxes]; those of a residue class one after the other."""
    number, inner, found = torch.arange(boxes.row_tiles), boxes.row_tiles, []
    for axis in boxes.axes:
        inner //= axis.row_tiles
        digit, steps = number // inner % axis.row_tiles, axis.row_tiles // axis.dilation
        found.append(digit // steps + digit % steps * (axis.rows * axis.dilation))
    return found


def _tokens(boxes: GridTiles, begins: Sequence[Tensor], sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The tokens in the grid of the boxes that begin there, ascending, and which box each is of; int64."""
    count, axes = len(begins[0]), len(sides)
    token, inside = torch.zeros(count, *[1] * axes, dtype=torch.int64), torch.ones(count, *[1] * axes, dtype=torch.bool)
    for place, (axis, begin, side) in enumerate(zip(boxes.axes, begins, sides, strict=True)):
        steps = torch.arange(side).view(-1, *[1] * (axes - 1 - place)) * axis.dilation
        at = begin.view(-1, *[1] * axes) + steps
        token, inside = token * axis.length + at, inside & (at >= 0) & (at < axis.length)
    box = torch.arange(count).view(-1, *[1] * axes).expand(token.shape)[inside]
    ascending, order = token[inside].sort()
    return ascending, box[order]


def _spans_of(ascending: Tensor) -> Spans:
    """Numbers as runs of neighbours."""
    if not len(ascending):
        return ()
    breaks = (ascending.diff() != 1).nonzero().squeeze(1)
    begins = torch.cat([ascending[:1], ascending[breaks + 1]]).tolist()
    ends = (torch.cat([ascending[breaks], ascending[-1:]]) + 1).tolist()
    return tuple(zip(begins, ends, strict=True))


def _lines(spans: Spans) -> tuple[Lines, ...]:
    """Runs, as few as can be: those of one length that lie evenly are lines of one box."""
    found: list[Lines] = []
    for start, stop in spans:
        last = found[-1] if found else None
        step = 0 if last is None else start - last.start - (last.number - 1) * last.step
        if last is not None and stop - start == last.stop - last.start and (last.number == 1 or step == last.step):
            found[-1] = Lines(last.start, last.stop, last.number + 1, step)
        else:
            found.append(Lines(start, stop))
    return tuple(found)

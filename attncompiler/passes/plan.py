"""Predicate -> tile plan: for every query tile the ranges of key tiles to visit, full ones apart from partial ones.

EMPTY and FULL are proved (`intervals.py`); whatever is not is PARTIAL, where the predicate is evaluated pair by pair.
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attncompiler.ir.evaluate import Block, whole
from attncompiler.ir.expr import (
    AXES,
    FALSE,
    KV_IDX,
    Q_IDX,
    TRUE,
    Apply,
    Axis,
    Const,
    Expr,
    Kind,
    Read,
    Size,
    apply,
    axes_of,
    conjuncts,
    reads_of,
    sub,
    substitute,
    transform,
    walk,
)
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Empty, Keep, TensorDecl, kind_of
from attncompiler.passes.compact_rows import LENGTH
from attncompiler.passes.constant_plans import ConstantPlans
from attncompiler.passes.grid import ROWS, GridTiles, box_coverage, choose_tiles, rows_keep_some
from attncompiler.passes.intervals import Tiles
from attncompiler.passes.spans import Span, edges_decide, spans


class Coverage(enum.IntEnum):
    """What is proved of a tile."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


@dataclass(frozen=True)
class TileRanges:
    """For each row: tiles [begin[i], end[i]) for the first `count` entries i. int32 [P], [P, R], [P, R]."""

    count: Tensor
    begin: Tensor
    end: Tensor

    @property
    def lengths(self) -> Tensor:
        """How many tiles each row has, int64 [P]."""
        used = torch.arange(self.begin.shape[1], device=self.begin.device) < self.count.unsqueeze(1)
        return ((self.end - self.begin) * used).sum(1, dtype=torch.int64)

    def of_rows(self, rows: Tensor) -> TileRanges:
        """Those of some rows."""
        return TileRanges(*(x.index_select(0, rows) for x in (self.count, self.begin, self.end)))

    def widened(self, room: int) -> TileRanges:
        """The same with room for so many runs in each row."""
        missing = max(room - self.begin.shape[1], 0)
        begin, end = (torch.nn.functional.pad(x, (0, missing)) for x in (self.begin, self.end))
        return TileRanges(self.count, begin, end)

    def to(self, device: torch.device) -> TileRanges:
        """The same on another device."""
        return TileRanges(self.count.to(device), self.begin.to(device), self.end.to(device))


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Which tiles a program visits. `plan_b` and `plan_h` are 1 where all batches or heads share the plan.

    Row p of `visited`, `full` and `partial` is (pb * plan_h + ph) * q_tiles + q_tile; `visited` is the other two together. In grid
    tiles each row counts the `kv_tiles` tiles of a box of its own, from `origins` on (int32 [P, axes of the grid]; no axes: tiles
    are counted from the first key). `dense_tiles`: how many tiles dense attention visits in a row."""

    block_q: int
    block_kv: int
    plan_b: int
    plan_h: int
    q_tiles: int
    kv_tiles: int
    dense_tiles: int
    origins: Tensor
    visited: TileRanges
    full: TileRanges
    partial: TileRanges
    mirrored: Callable[[], TilePlan]

    @staticmethod
    def of_coverage(block_q: int, block_kv: int, coverage: Tensor) -> TilePlan:
        """From int8 [plan_b, plan_h, q_tiles, kv_tiles], of Coverage."""
        plan_b, plan_h, q_tiles, kv_tiles = coverage.shape
        visited, full, partial = runs_on_device(coverage) if coverage.is_cuda else runs_of(coverage)

        def mirrored() -> TilePlan:
            return TilePlan.of_coverage(block_kv, block_q, coverage.transpose(2, 3).contiguous())

        none = torch.zeros(plan_b * plan_h * q_tiles, 0, dtype=torch.int32, device=coverage.device)
        return TilePlan(block_q, block_kv, plan_b, plan_h, q_tiles, kv_tiles, kv_tiles, none, visited, full, partial, mirrored)

    @functools.cached_property
    def coverage(self) -> Tensor:
        """int8 [plan_b, plan_h, q_tiles, kv_tiles], of Coverage: one number for each tile, for pictures and tests."""
        found = torch.zeros(self.visited.count.shape[0], self.kv_tiles + 1, dtype=torch.int8, device=self.visited.count.device)
        for ranges, kind in ((self.full, Coverage.FULL), (self.partial, Coverage.PARTIAL)):
            used = torch.arange(ranges.begin.shape[1], device=found.device) < ranges.count.unsqueeze(1)
            step = used.to(torch.int8) * int(kind)
            found.scatter_add_(1, (ranges.begin * used).long(), step).scatter_add_(1, (ranges.end * used).long(), -step)
        return found.cumsum(1, dtype=torch.int8)[:, :-1].reshape(self.plan_b, self.plan_h, self.q_tiles, self.kv_tiles)

    @functools.cached_property
    def work(self) -> Tensor:
        """How many tiles each row visits, int64 [plan_b, plan_h, q_tiles]."""
        return self.visited.lengths.reshape(self.plan_b, self.plan_h, self.q_tiles)

    @property
    def density(self) -> float:
        """The share of tiles that are visited. Waits for the device."""
        tiles = self.work.numel() * self.dense_tiles
        return float(self.work.sum()) / tiles if tiles else 0.0

    @functools.cached_property
    def _mirrored(self) -> TilePlan:
        return self.mirrored()

    def transposed(self) -> TilePlan:
        """The plan with the query tiles of every key tile: the order of the backward for keys and values."""
        return self._mirrored

    def rows_in(self, order: Tensor) -> tuple[TileRanges, TileRanges, Tensor]:
        """The full and the partial ranges and the origins, with the query tiles of each batch and head in another order."""
        first = torch.arange(self.plan_b * self.plan_h, device=order.device).unsqueeze(1) * self.q_tiles
        rows = (first + order).reshape(-1)
        return self.full.of_rows(rows), self.partial.of_rows(rows), self.origins.index_select(0, rows)

    def to(self, device: torch.device) -> TilePlan:
        """The same plan on another device."""
        visited, full, partial = (kind.to(device) for kind in (self.visited, self.full, self.partial))
        return replace(
            self, origins=self.origins.to(device), visited=visited, full=full, partial=partial,
            mirrored=lambda: self.transposed().to(device),
        )  # fmt: skip


def runs_of(coverage: Tensor) -> tuple[TileRanges, TileRanges, TileRanges]:
    """Runs of visited, of full and of partial tiles along the last axis. Where the kind changes is looked for once; the rest costs what
    the runs are."""
    padded = torch.nn.functional.pad(coverage.flatten(0, -2), (1, 1), value=int(Coverage.EMPTY))
    row, tile = (padded[:, 1:] != padded[:, :-1]).nonzero(as_tuple=True)
    before, behind = padded[row, tile], padded[row, tile + 1]
    kinds = [(before == Coverage.EMPTY, behind == Coverage.EMPTY)]
    kinds += [(behind == kind, before == kind) for kind in (Coverage.FULL, Coverage.PARTIAL)]
    visited, full, partial = (_listed(len(padded), row[begins], tile[begins], tile[ends]) for begins, ends in kinds)
    return visited, full, partial


def _listed(rows: int, row: Tensor, begin: Tensor, end: Tensor) -> TileRanges:
    """Runs, given in the order of their rows."""
    count = torch.bincount(row, minlength=rows)
    slot = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    room = max(int(count.max()) if rows else 0, 1)
    begins, ends = torch.zeros(2, rows, room, dtype=torch.int32)
    begins[row, slot], ends[row, slot] = begin.int(), end.int()
    return TileRanges(count.int(), begins, ends)


def runs_on_device(coverage: Tensor) -> tuple[TileRanges, TileRanges, TileRanges]:
    """The same without waiting for a GPU: at most every other tile begins a run."""
    tiles = coverage.shape[-1]
    room = (tiles + 1) // 2
    place = torch.arange(tiles, device=coverage.device, dtype=torch.int32)

    def places(marks: Tensor, offset: int) -> Tensor:
        slot = torch.where(marks, marks.cumsum(1) - 1, room)
        found = torch.zeros(marks.shape[0], room + 1, dtype=torch.int32, device=marks.device)
        return found.scatter_(1, slot, (place + offset).expand_as(slot))[:, :room].contiguous()

    def runs(wanted: Tensor) -> TileRanges:
        rows = wanted.flatten(0, -2)
        padded = torch.nn.functional.pad(rows, (1, 1))
        edges = padded[:, 1:] != padded[:, :-1]  # in turn the first tile of a run and the one after it
        starts, stops = edges[:, :-1] & rows, edges[:, 1:] & rows
        return TileRanges(starts.sum(1, dtype=torch.int32), places(starts, 0), places(stops, 1))

    return runs(coverage != Coverage.EMPTY), runs(coverage == Coverage.FULL), runs(coverage == Coverage.PARTIAL)


# ---------------------------------------------------------------------------------------------------------- building


def build_plan(
    program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int], block_q: int, block_kv: int
) -> TilePlan:
    """The plan of a program on its operands' device. Plans that read no tensor, or only constant ones, are remembered; the others
    never wait for a GPU."""
    extents = extents_of(program, sizes)
    device = operands[program.sum.tensor].device
    predicate = with_sizes(program, sizes)
    keep = Keep(predicate, program.keep.empty)
    shape = tuple(extents[axis.name] for axis in AXES)
    if not reads_of(predicate):
        return _static_plan(keep, shape, block_q, block_kv, device)
    if not is_fixed(program):
        return _plan(keep, operands, shape, block_q, block_kv, device)
    read = [operands[name] for name in dict.fromkeys(read.tensor for read in reads_of(predicate))]
    what = keep, shape, block_q, block_kv, device
    return _CONSTANT_PLANS.of(what, read, lambda: _plan(keep, operands, shape, block_q, block_kv, device))


def is_fixed(program: Attention) -> bool:
    """True where all that the predicate reads is constant: its plan depends on which tensors these are, not on the call."""
    return all(program.decls[read.tensor].constant for read in reads_of(program.keep.predicate))


_CONSTANT_PLANS: ConstantPlans[TilePlan] = ConstantPlans()


def plan_boxes(predicate: Expr, tokens: int, tiles: GridTiles, by_keys: bool = False) -> TilePlan:
    """The plan of a predicate over a grid in boxes of it, on the CPU. `by_keys`: that of the backward for keys."""
    rows, columns = math.prod(tiles.rows), math.prod(tiles.columns)
    coverage, origins = box_coverage(predicate, tokens, tiles, by_keys)
    plan = TilePlan.of_coverage(rows, columns, coverage[None, None])

    def mirrored() -> TilePlan:
        return plan_boxes(predicate, tokens, choose_tiles(predicate, tokens, columns, rows, not by_keys), not by_keys)

    return replace(plan, origins=origins, dense_tiles=math.ceil(tokens / columns), mirrored=mirrored)


def tiles_for(
    program: Attention, sizes: Mapping[str, int], block_q: int, block_kv: int, by_keys: bool = False, halves: bool = False
) -> GridTiles:
    """Boxes to cut the tokens of a program into, where its mask is one of a grid; ROWS elsewhere, also where queries or keys are those
    of a list, which does not lie in a grid. `halves`: as in choose_tiles."""
    if program.axes.q_idx == Size(LENGTH) or any(decl.ascending for decl in program.tensors):
        return ROWS
    extents = extents_of(program, sizes)
    tokens, keep = extents["q_idx"], program.keep
    if tokens != extents["kv_idx"] or tokens == 0:
        return ROWS
    if keep.empty is Empty.SCORE and not rows_keep_some(keep.predicate, tokens):
        return ROWS
    rows, columns = (block_kv, block_q) if by_keys else (block_q, block_kv)
    return choose_tiles(keep.predicate, tokens, rows, columns, by_keys, halves)


def build_boxes(program: Attention, sizes: Mapping[str, int], tiles: GridTiles, by_keys: bool, device: torch.device) -> TilePlan:
    """The plan of a program in boxes that `tiles_for` chose, on `device`. Nothing of it depends on tensors."""
    plan = plan_boxes(program.keep.predicate, extents_of(program, sizes)["q_idx"], tiles, by_keys)
    return plan if device.type == "cpu" else plan.to(device)


def plan_predicate(
    predicate: Expr, operands: Mapping[str, Tensor], shape: tuple[int, int, int, int], block_q: int, block_kv: int
) -> TilePlan:
    """The plan of a predicate alone, on the CPU. `shape`: b, h, q_idx, kv_idx."""
    return _plan(Keep(predicate, Empty.ZERO), operands, shape, block_q, block_kv, torch.device("cpu"))


_MOST_EVALUATED = 1 << 31


def count_kept(
    predicate: Expr, operands: Mapping[str, Tensor], shape: tuple[int, int, int, int], most: int = _MOST_EVALUATED
) -> int | None:
    """How many pairs a predicate keeps: from its spans, else pair by pair in partial tiles; None where that is more than `most`."""
    extents = dict(zip((axis.name for axis in AXES), shape, strict=True))
    b, h, m, n = shape
    block = whole(operands, {}, extents, torch.float64, torch.device("cpu"))
    rows = spans(predicate, block, Q_IDX, KV_IDX) if min(shape) else []
    if rows is not None:
        return _count_spans(rows, b, h, m)
    plan = plan_predicate(predicate, operands, shape, 128, 128)
    copies = (b // plan.plan_b) * (h // plan.plan_h)
    if int(plan.partial.lengths.sum()) * 128 * 128 > most:
        return None
    kept = int((plan.full.lengths.reshape(-1, plan.q_tiles) * _tile_heights(m, 128)).sum()) * 128
    for row, count in enumerate(plan.partial.count.tolist()):
        pair, tile = divmod(row, plan.q_tiles)
        for i in range(count):
            first, last = int(plan.partial.begin[row, i]) * 128, min(int(plan.partial.end[row, i]) * 128, n)
            places = {
                "b": torch.tensor([pair // plan.plan_h]), "h": torch.tensor([pair % plan.plan_h]),
                "q_idx": torch.arange(tile * 128, min(tile * 128 + 128, m)), "kv_idx": torch.arange(first, last),
            }  # fmt: skip
            shaped = {name: at.reshape([-1 if axis.name == name else 1 for axis in AXES]) for name, at in places.items()}
            part = Block(operands, {}, extents, shaped, torch.float64).tensor(predicate)
            kept += int(part.expand(1, 1, len(places["q_idx"]), last - first).sum())
    return kept * copies


def _tile_heights(length: int, size: int) -> Tensor:
    """How many rows each tile has."""
    return torch.clamp(length - torch.arange(math.ceil(length / size)) * size, max=size)


def _count_spans(found: list[Span], b: int, h: int, m: int) -> int:
    """The sizes of the unions."""
    if not found:
        return 0
    every = torch.broadcast_tensors(*(x.expand(*x.shape[:2], m) for s in found for x in (s.begin, s.end)))
    begins, ends = torch.stack(every[0::2]), torch.stack(every[1::2])
    order = begins.argsort(0)
    begins, ends = begins.gather(0, order), ends.gather(0, order)
    reached = torch.zeros_like(begins[0])
    total = 0
    for begin, end in zip(begins, ends, strict=True):
        total += int((end - torch.maximum(begin, reached)).clamp(min=0).sum())
        reached = torch.maximum(reached, end)
    return total * (b // begins.shape[1]) * (h // begins.shape[2])


def with_sizes(program: Attention, sizes: Mapping[str, int]) -> Expr:
    """The predicate of a program with its run-time integers as numbers."""
    return substitute(program.keep.predicate, {Size(name): Const(sizes[name]) for name in program.sizes})


@functools.lru_cache(maxsize=512)
def _static_plan(keep: Keep, shape: tuple[int, ...], block_q: int, block_kv: int, device: torch.device) -> TilePlan:
    if device.type == "cpu":
        return _plan(keep, {}, shape, block_q, block_kv, device)
    return _static_plan(keep, shape, block_q, block_kv, torch.device("cpu")).to(device)  # the choice of tiles has made it


def _plan(
    keep: Keep, operands: Mapping[str, Tensor], shape: tuple[int, ...], block_q: int, block_kv: int, device: torch.device
) -> TilePlan:
    extents = dict(zip((axis.name for axis in AXES), shape, strict=True))
    q_tiles, kv_tiles = math.ceil(shape[2] / block_q), math.ceil(shape[3] / block_kv)

    def positions() -> Block:
        return whole(operands, {}, extents, torch.float64, device)

    axes = axes_of(keep.predicate)
    plan_b, plan_h = (shape[0] if "b" in axes else 1), (shape[1] if "h" in axes else 1)
    if device.type == "cpu" and min(shape) > 0:
        planned = _of_spans(keep, positions, (plan_b, plan_h), block_q, block_kv)
        if planned is not None:
            return planned
    block = positions()
    if keep.predicate == TRUE:
        coverage = torch.full((1, 1, q_tiles, kv_tiles), Coverage.FULL, dtype=torch.int8, device=device)
    elif reads_of(keep.predicate) and device.type != "cpu":
        grid = torch.cartesian_prod(torch.arange(q_tiles, device=device), torch.arange(kv_tiles, device=device))
        found = _coverage(keep.predicate, Tiles(block, block_q, block_kv, grid[:, 0], grid[:, 1]))
        coverage = found.expand(plan_b, plan_h, -1).reshape(plan_b, plan_h, q_tiles, kv_tiles).contiguous()
    else:
        coverage = _refined(keep.predicate, block, block_q, block_kv, (plan_b, plan_h, q_tiles, kv_tiles))
    if shape[3] % block_kv:
        coverage[..., -1] = coverage[..., -1].clamp(max=Coverage.PARTIAL)
    if keep.empty is Empty.SCORE:
        coverage = _visit_all_for_empty_rows(keep.predicate, block, coverage, block_q)
    return TilePlan.of_coverage(block_q, block_kv, coverage)


def _of_spans(keep: Keep, positions: Callable[[], Block], heads: tuple[int, int], block_q: int, block_kv: int) -> TilePlan | None:
    """The plan from the runs that each row keeps, where the predicate is made of such. Plans are kept: positions are not."""
    block = positions()
    m, n = block.extents["q_idx"], block.extents["kv_idx"]
    q_tiles, kv_tiles = math.ceil(m / block_q), math.ceil(n / block_kv)
    if keep.empty is Empty.SCORE and not _every_row_keeps(keep.predicate, block):
        return None
    rows = _tile_spans(keep.predicate, block, Q_IDX, KV_IDX, block_q)
    if rows is None:
        return None

    def mirrored() -> TilePlan:
        columns = _tile_spans(keep.predicate, positions(), KV_IDX, Q_IDX, block_kv)
        if columns is None:
            return TilePlan.of_coverage(block_kv, block_q, forward.coverage.transpose(2, 3).contiguous())
        ranges = _tile_ranges(columns, heads, block_kv, block_q, n, m, by_keys=True)
        none = torch.zeros(heads[0] * heads[1] * kv_tiles, 0, dtype=torch.int32)
        return TilePlan(block_kv, block_q, *heads, kv_tiles, q_tiles, q_tiles, none, *ranges, lambda: forward)

    ranges = _tile_ranges(rows, heads, block_q, block_kv, m, n, by_keys=False)
    none = torch.zeros(heads[0] * heads[1] * q_tiles, 0, dtype=torch.int32)
    forward = TilePlan(block_q, block_kv, *heads, q_tiles, kv_tiles, kv_tiles, none, *ranges, mirrored)
    return forward


def _every_row_keeps(predicate: Expr, block: Block) -> bool:
    """True where every query surely keeps a key, by the spans of the queries."""
    kept = [span.end > span.begin for span in spans(predicate, block, Q_IDX, KV_IDX) or ()]
    return bool(kept) and bool(functools.reduce(torch.logical_or, kept).all())


@dataclass(frozen=True)
class _TileSpan:
    """Of one span of the rows of each tile: columns [first, last), from the first to the last that a row keeps, and [common_first,
    common_last), which every row keeps. int64, broadcast over [b, h, tiles]; none where an end is not after its beginning."""

    first: Tensor
    last: Tensor
    common_first: Tensor
    common_last: Tensor


def _tile_spans(predicate: Expr, block: Block, row: Axis, column: Axis, size: int) -> list[_TileSpan] | None:
    """The spans of tiles of `size` rows; None where the predicate is not made of spans."""
    if edges_decide(predicate, row, column):
        by_edges = _spans_of_edges(predicate, block, row, column, size)
        if by_edges is not None:
            return by_edges
    found = spans(predicate, block, row, column)
    if found is None:
        return None
    length, width = block.extents[row.name], block.extents[column.name]
    tiled = []
    for span in found:
        begin, end = (_in_tiles(x.expand(*x.shape[:2], length), size) for x in (span.begin, span.end))
        some = end > begin
        begin, end = torch.where(some, begin, width), torch.where(some, end, 0)
        tiled.append(_TileSpan(begin.amin(-1), end.amax(-1), begin.amax(-1), end.amin(-1)))
    return tiled


def _spans_of_edges(predicate: Expr, block: Block, row: Axis, column: Axis, size: int) -> list[_TileSpan] | None:
    """The same from the first and the last row of each tile, where spans only move on from row to row; None where that is not
    exact, since one of the two rows keeps nothing."""
    length = block.extents[row.name]
    starts = torch.arange(0, length, size)
    edges = torch.stack([starts, (starts + (size - 1)).clamp(max=length - 1)], 1)
    shape = [-1 if axis == row else 1 for axis in AXES]
    at_edges = replace(block, positions={**block.positions, row.name: edges.reshape(shape)}, memo={})
    tiled = []
    for span in spans(predicate, at_edges, row, column) or ():
        begin, end = (x.expand(*x.shape[:2], edges.numel()).unflatten(2, edges.shape) for x in (span.begin, span.end))
        tile = _TileSpan(begin[..., 0], end[..., 1], begin[..., 1], end[..., 0])
        if bool(((end <= begin).any(-1) & (tile.last > tile.first)).any()):
            return None
        tiled.append(tile)
    return tiled or None


def _tile_ranges(
    of: list[_TileSpan], heads: tuple[int, int], row_block: int, column_block: int, length: int, width: int, by_keys: bool
) -> tuple[TileRanges, TileRanges, TileRanges]:
    """Visited, full and partial tiles of every row of tiles, from the spans of its rows.

    A key tile that is cut short is never full; a query tile may be: what it computes outside is not stored."""
    rows, tiles = math.ceil(length / row_block), math.ceil(width / column_block)
    edges = []
    for span in of:
        some = span.last > span.first
        first, last = span.first // column_block, (span.last * some + (column_block - 1)) // column_block
        inner_first, common = (span.common_first + (column_block - 1)) // column_block, span.common_last
        inner_last = torch.where(common == width, tiles, common // column_block) if by_keys else common // column_block
        last = torch.maximum(first, last)
        inner_first = torch.minimum(torch.maximum(inner_first, first), last)
        inner_last = torch.minimum(torch.maximum(inner_last, inner_first), last)
        if by_keys and length % row_block:
            inner_last[..., -1] = inner_first[..., -1]
        edges.append(torch.stack([x.expand(*heads, rows) for x in (first, last, inner_first, inner_last)], -1).reshape(-1, 4))
    if not edges:
        nothing = torch.zeros(heads[0] * heads[1] * rows, 1, dtype=torch.int64)
        return (_runs(nothing, [nothing[:, 0] > 0]),) * 3
    points = torch.cat(edges, 1).sort(1).values
    any_, full = [], []
    for left, right in itertools.pairwise(points.unbind(1)):  # what holds at the left end holds up to the right one
        real = right > left
        any_.append(real & torch.stack([(e[:, 0] <= left) & (left < e[:, 1]) for e in edges]).any(0))
        full.append(real & torch.stack([(e[:, 2] <= left) & (left < e[:, 3]) for e in edges]).any(0))
    partial = [some & ~whole_ for some, whole_ in zip(any_, full, strict=True)]
    return _runs(points, any_), _runs(points, full), _runs(points, partial)


def _in_tiles(values: Tensor, size: int) -> Tensor:
    """The last axis cut into tiles; the last tile repeats its last value."""
    short = -values.shape[-1] % size
    if short:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], short)], -1)
    return values.reshape(*values.shape[:-1], -1, size)


def _runs(points: Tensor, wanted: list[Tensor]) -> TileRanges:
    """Neighbouring segments between `points` [P, S] that are wanted, as one; those of no length part nothing."""
    lengths = (points[:, 1:] > points[:, :-1]).unbind(1)
    count = torch.zeros(points.shape[0], dtype=torch.int64)
    begin = torch.zeros(points.shape[0], len(wanted) // 2 + 2, dtype=torch.int64)
    end, rows = begin.clone(), torch.arange(points.shape[0])
    inside = torch.zeros(points.shape[0], dtype=torch.bool)
    for place, (some, real) in enumerate(zip(wanted, lengths, strict=False)):
        begins, ends = some & ~inside, real & ~some & inside
        begin[rows[begins], count[begins]] = points[begins, place]
        end[rows[ends], count[ends]] = points[ends, place]
        count += ends
        inside = (inside | begins) & ~ends
    end[rows[inside], count[inside]] = points[inside, -1]
    count += inside
    room = max(int(count.max()), 1)
    return TileRanges(count.to(torch.int32), *(x[:, :room].to(torch.int32).contiguous() for x in (begin, end)))


def _coverage(predicate: Expr, tiles: Tiles) -> Tensor:
    """int8 [b, h, L] (1 where shared)."""
    bounds = tiles(predicate)
    shape = torch.broadcast_shapes(bounds.lo.shape, bounds.hi.shape, (1, 1, tiles.rows.shape[0]))
    return (bounds.hi.to(torch.int8) + bounds.lo.to(torch.int8)).expand(shape)


_STEP = 8  # how many tiles a side of a coarse tile spans


def _refined(predicate: Expr, block: Block, block_q: int, block_kv: int, shape: tuple[int, int, int, int]) -> Tensor:
    """Coarse tiles first; only those that are neither full nor empty for every batch and head are cut: cost follows the answer."""
    plan_b, plan_h, q_tiles, kv_tiles = shape
    coverage = torch.full(shape, Coverage.EMPTY, dtype=torch.int8)
    span = 1
    while max(q_tiles, kv_tiles) > span * 2 * _STEP:
        span *= _STEP
    rows = torch.arange(math.ceil(q_tiles / span))
    pending = torch.cartesian_prod(rows, torch.arange(math.ceil(kv_tiles / span)))
    while len(pending):
        found = _coverage(predicate, Tiles(block, block_q * span, block_kv * span, pending[:, 0], pending[:, 1]))
        found = found.expand(plan_b, plan_h, -1)
        settled = ((found != Coverage.PARTIAL).all(0).all(0)) if span > 1 else torch.ones(len(pending), dtype=torch.bool)
        _fill(coverage, pending[settled], found[:, :, settled], span)
        pending = _cut(pending[~settled], span, q_tiles, kv_tiles)
        span //= _STEP
    return coverage


def _fill(coverage: Tensor, tiles: Tensor, values: Tensor, span: int) -> None:
    if span == 1:
        coverage[:, :, tiles[:, 0], tiles[:, 1]] = values
        return
    nonempty = (values != Coverage.EMPTY).any(0).any(0)
    for (row, column), value in zip(tiles[nonempty].tolist(), values[:, :, nonempty].unbind(2), strict=True):
        coverage[:, :, row * span : (row + 1) * span, column * span : (column + 1) * span] = value[:, :, None, None]


def _cut(tiles: Tensor, span: int, q_tiles: int, kv_tiles: int) -> Tensor:
    """The next finer tiles inside coarse ones."""
    steps = torch.arange(_STEP)
    rows = (tiles[:, 0, None, None] * _STEP + steps[None, :, None]).expand(-1, _STEP, _STEP).reshape(-1)
    columns = (tiles[:, 1, None, None] * _STEP + steps[None, None, :]).expand(-1, _STEP, _STEP).reshape(-1)
    finer = span // _STEP
    inside = (rows * finer < q_tiles) & (columns * finer < kv_tiles)
    return torch.stack([rows[inside], columns[inside]], 1)


def _visit_all_for_empty_rows(predicate: Expr, block: Block, coverage: Tensor, block_q: int) -> Tensor:
    """A row under a finite mask that keeps nothing is the softmax over all keys: its query tile visits every key tile.

    A row is proved to keep a key by a full tile beside it, or by one of a few witnesses."""
    m = block.extents["q_idx"]
    kept = _surely_kept(predicate, block, coverage.device)
    plan_b, plan_h, q_tiles, _ = coverage.shape
    kept = kept.expand(plan_b, plan_h, m, 1).squeeze(3)
    short = -m % block_q
    kept = torch.cat([kept, torch.ones(plan_b, plan_h, short, dtype=torch.bool, device=kept.device)], 2)
    proved = kept.reshape(plan_b, plan_h, q_tiles, block_q).all(3) | (coverage == Coverage.FULL).any(3)
    return torch.where(proved.unsqueeze(3), coverage, coverage.new_tensor(Coverage.PARTIAL))


def kept_by_witness(predicate: Expr, m: Expr, n: Expr) -> Expr:
    """Whether a query surely keeps a key: the key of the same number, that on the diagonal, the first or the last."""
    kept: Expr = FALSE
    last = sub(n, Const(1))
    for witness in (Q_IDX, sub(Q_IDX, sub(m, n)), Const(0), last):
        at = apply("minimum", apply("maximum", witness, Const(0)), last)
        kept = apply("or", kept, substitute(predicate, {KV_IDX: at}))
    return kept


def _surely_kept(predicate: Expr, block: Block, device: torch.device) -> Tensor:
    """Which queries keep one of the witnesses: bool, broadcast to [b, h, q_idx, 1]."""
    m, n = block.extents["q_idx"], block.extents["kv_idx"]
    kept = block.tensor(kept_by_witness(predicate, Const(m), Const(n))).to(torch.bool).to(device)
    return kept | torch.zeros(1, 1, m, 1, dtype=torch.bool, device=device)


def proved_nonempty(program: Attention, sizes: Mapping[str, int], extents: Mapping[str, int]) -> bool:
    """True where the mask, whatever the tensors hold, leaves every query a key."""
    predicate = program.keep.predicate
    if predicate == TRUE:
        return extents["kv_idx"] > 0
    shape = tuple(extents[axis.name] for axis in AXES)
    predicate = with_sizes(program, sizes)
    if extents["q_idx"] <= extents["kv_idx"]:
        diagonal = _on_the_diagonal(predicate, program.decls)  # of documents and the like only what no tensor decides is left
        if not reads_of(diagonal) and _keeps_in_every_row(diagonal, shape):
            return True
    return not reads_of(predicate) and _keeps_in_every_row(predicate, shape)


def _on_the_diagonal(predicate: Expr, decls: Mapping[str, TensorDecl]) -> Expr:
    """The predicate for the key of the query's own number; all but NaN equals itself."""

    def visit(node: Expr) -> Expr | None:
        alike = isinstance(node, Apply) and node.op in ("eq", "le", "ge") and node.args[0] == node.args[1]
        return TRUE if alike and kind_of(node.children[0], decls) is not Kind.FLOAT else None

    return transform(substitute(predicate, {KV_IDX: Q_IDX}), visit)


_LONGEST_TILE = 256  # keys of a kernel's tile, at most


@functools.lru_cache(maxsize=512)
def keeps_only_keys(predicate: Expr, m: Expr, n: Expr) -> bool:
    """True where a query in [0, m) keeps no position from n on, as under a causal mask of a square: the end needs no test."""
    if not (isinstance(m, Const) and isinstance(n, Const) and min(int(m.value), int(n.value)) > 0):
        return False
    rows, keys = int(m.value), int(n.value)
    further = torch.arange(1, 1 + max(1, math.ceil(_LONGEST_TILE / keys)))  # the last tile may reach over the end by its own length
    extents = {"b": 1, "h": 1, "q_idx": rows, "kv_idx": keys * (1 + len(further))}
    block = whole({}, {}, extents, torch.float64, torch.device("cpu"))
    fixed = [part for part in conjuncts(predicate) if not any(isinstance(node, Read | Size) for node in walk(part))]
    beyond = Tiles(block, rows, keys, torch.zeros_like(further), further)
    return any(not bool(beyond(part).hi.any()) for part in fixed if axes_of(part) <= {"q_idx", "kv_idx"})


@functools.lru_cache(maxsize=512)
def _keeps_in_every_row(predicate: Expr, shape: tuple[int, ...]) -> bool:
    extents = dict(zip((axis.name for axis in AXES), shape, strict=True))
    if min(shape) == 0:
        return False
    device = torch.device("cpu")
    return bool(_surely_kept(predicate, whole({}, {}, extents, torch.float64, device), device).all())


# ------------------------------------------------------------------------------------------------- the score of full tiles


def score_where_kept(program: Attention) -> Expr:
    """The score of pairs that `keep` holds for: what full tiles evaluate. Each conjunct is true there, its negation false."""
    facts: dict[Expr, Expr] = {}
    for part in conjuncts(program.keep.predicate):
        facts[part] = TRUE
        facts[apply("not", part)] = FALSE
    return substitute(program.score, facts) if facts else program.score

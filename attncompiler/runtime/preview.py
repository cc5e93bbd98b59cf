"""What would run of a program, and what that is worth, without running it: for `explain`, `inspect` and the zoo."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from attncompiler.ir.expr import AXES, TRUE, Const, Expr, conj, conjuncts, reads_of
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Dtype, Keep, Route
from attncompiler.passes.compact_rows import without_route
from attncompiler.passes.grid import ROWS, choose_tiles
from attncompiler.passes.grid_among_runs import grid_among_runs
from attncompiler.passes.placed import placed
from attncompiler.passes.plan import TilePlan, build_boxes, build_plan, count_kept, plan_boxes, with_sizes
from attncompiler.passes.tile_counts import TileCounts, kept_in_grid, separable
from attncompiler.runtime.gathered import gathered
from attncompiler.runtime.lowering import unsupported
from attncompiler.runtime.parted import Part, join_ms, parts_of
from attncompiler.runtime.scheduling import schedule_of_layout
from attncompiler.tuning.schedule import Schedule, choose_schedule
from attncompiler.tuning.speed_of_light import SpeedOfLight, boxes_of, speed_of_light
from attncompiler.tuning.strides import full_strides
from attncompiler.tuning.target import Target


@dataclass(frozen=True)
class Preview:
    """What runs of a program: the schedule of its kernels, which share of all tiles the forward one visits and how many, what that is
    worth (None where an axis has no element), and what to know of these numbers. `build_ms`: making the plan, in tiles of tokens in a
    row choosing these too. `draw`: the plan for a picture. `parts`: what runs of a program that runs part by part (runtime/parted.py);
    the rest is then of its grid, or of all parts together."""

    schedule: Schedule
    density: float
    counts: TileCounts
    light: SpeedOfLight | None
    notes: tuple[str, ...]
    build_ms: float
    draw: Callable[[], TilePlan]
    parts: tuple[tuple[Part, Preview], ...] = ()


def preview(
    program: Attention, sizes: Mapping[str, int], outlines: Mapping[str, Tensor], target: Target,
    known: Mapping[str, Tensor] = MappingProxyType({}), kept_pairs: int | None = None,
) -> Preview:  # fmt: skip
    """What runs of a program. `outlines`: its operands on the meta device. `known`: what is known of them, on the CPU; the
    parts of a mask that read others count as kept, and a note says so. `kept_pairs`: if these are counted."""
    if program.route != Route():  # at most: as if every head were on
        program = without_route(program)
        outlines = {decl.name: outlines[decl.name] for decl in program.tensors}
    lists = gathered(program)
    if lists.gathers:
        outlines = lists.outlines(outlines, sizes)
        program = lists.program
    parts = parts_of(program)
    if parts:
        return _in_parts(parts, program, sizes, outlines, target, kept_pairs)
    extents = extents_of(program, sizes)
    b, h, m, n = (extents[axis.name] for axis in AXES)
    read = sorted({read.tensor for read in reads_of(program.keep.predicate)} - known.keys())
    notes = (f"at most: what {', '.join(read)} skips is found at run time",) if read else ()
    has_kernels = not unsupported(program)
    start = time.perf_counter()
    schedule = schedule_of_layout(program, sizes, target, outlines) if has_kernels else choose_schedule(program, target)
    forward = schedule.forward
    if forward.tiles:
        start = time.perf_counter()  # boxes are chosen before any plan, tiles of tokens in a row by their plans
        plan = build_boxes(program, sizes, forward.tiles, False, torch.device("cpu"))
    else:
        given = {program.sum.tensor: torch.empty(0), **known}
        demands = conjuncts(program.keep.predicate)
        fixed = conj(*(demand for demand in demands if all(read.tensor in given for read in reads_of(demand))))
        bounded = replace(program, keep=Keep(fixed, program.keep.empty))
        plan = build_plan(bounded, given, sizes, forward.block_m, forward.block_n)
    build_ms = 1e3 * (time.perf_counter() - start)

    def draw() -> TilePlan:
        return placed(plan, forward.tiles) if forward.tiles else plan

    if min(b, h, m, n) == 0:
        return Preview(schedule, plan.density, TileCounts.of(plan, 0, 0), None, notes, build_ms, draw)
    predicate = with_sizes(program, sizes)
    if kept_pairs is None and not read:
        kept_pairs = counted(predicate, known, (b, h, m, n))
    shape = b, h, m, n, _channels(program)
    strides = full_strides(predicate, m, forward.block_m, forward.block_n) if m == n else ()
    counts = TileCounts.of(plan, b, h)
    light = speed_of_light(counts, kept_pairs, shape, target, _element(program), boxes_of(forward.tiles), strides)
    if not forward.tiles and not read:
        notes = (*notes, *_lost_boxes(predicate, light, (b * h, m, n)))
    return Preview(schedule, plan.density, counts, light, notes, build_ms, draw)


def _in_parts(
    parts: tuple[Part, ...], program: Attention, sizes: Mapping[str, int], outlines: Mapping[str, Tensor], target: Target,
    kept_pairs: int | None,
) -> Preview:  # fmt: skip
    """Of a program that runs part by part: counted in tiles of its grid."""
    found = tuple((part, preview(part.program, sizes, part.operands(outlines), target)) for part in parts)
    grid = next(shown for part, shown in found if part.program.keep.predicate != TRUE)
    forward, extents = grid.schedule.forward, extents_of(program, sizes)
    b, h, m, n = (extents[axis.name] for axis in AXES)

    def counts(part: Part, shown: Preview) -> TileCounts:
        if shown is grid:
            return shown.counts
        return TileCounts.of_all(part.queries[1], part.keys[1], forward.block_m, forward.block_n).times(b * h)

    def draw() -> TilePlan:
        return build_plan(program, {program.sum.tensor: torch.empty(0)}, sizes, forward.block_m, forward.block_n)

    total = functools.reduce(TileCounts.__add__, (counts(*each) for each in found))
    total = replace(total, rows=b * h * -(-m // forward.block_m))  # some parts have rows of the same queries
    if kept_pairs is None:
        of_parts = [shown.light.kept_pairs if shown.light else None for _, shown in found]
        kept_pairs = None if None in of_parts else sum(filter(None, of_parts))
    shape, boxes = (b, h, m, n, _channels(program)), boxes_of(forward.tiles)
    light = speed_of_light(total, kept_pairs, shape, target, _element(program), boxes)
    one_after_another = sum(shown.light.predicted_ms for _, shown in found if shown.light)
    for (_, queries), count in Counter(part.queries for part in parts).items():
        one_after_another += (count - 1) * join_ms(b * h, queries, _channels(program), target)
    light = replace(light, predicted_ms=one_after_another)
    density = light.visited_tiles * forward.block_m * forward.block_n / (b * h * m * n)
    runs = ", ".join(f"{q} queries by {k} keys" for part in parts for (_, q), (_, k) in ((part.queries, part.keys),))
    note = f"runs in parts, for a grid beside other tokens is cut into boxes: {runs}"
    build_ms = sum(shown.build_ms for _, shown in found)
    return Preview(grid.schedule, density, total, light, (note, *grid.notes), build_ms, draw, found)


def _channels(program: Attention) -> int:
    channels = program.value.shape[-1]
    return int(channels.value) if isinstance(channels, Const) else 64


def _element(program: Attention) -> int:
    """Bytes of a number."""
    return 2 if program.value.dtype in (Dtype.BF16, Dtype.F16) else 4


_MUCH_LESS = 0.8


def _lost_boxes(predicate: Expr, light: SpeedOfLight, shape: tuple[int, int, int]) -> tuple[str, ...]:
    """A note, where the mask speaks of a grid beside other tokens that apart from these would be cut into boxes. `shape`: heads of all
    batches, queries, keys."""
    heads, m, n = shape
    found = grid_among_runs(predicate, m, n)
    tiles = choose_tiles(found.predicate, found.queries[1], *light.tile) if found else ROWS
    if not (found and tiles):
        return ()
    full = sum(TileCounts.of_all(rows, columns, *light.tile).visited for (_, rows), (_, columns) in found.full)
    apart = heads * (int(plan_boxes(found.predicate, found.queries[1], tiles).work.sum()) + full)
    if apart > _MUCH_LESS * light.visited_tiles:
        return ()
    lost = f"a grid of {found.queries[1]} tokens beside others: tiles are runs of tokens, {light.visited_tiles} in all"
    why = (
        f"apart and in boxes {apart} would do, and so run vectors of half precision with no score by position, where that is faster"
    )
    return (f"{lost}; {why}",)


_MOST_COUNTED = 1 << 26  # pairs that are looked at one by one to explain a function


def counted(predicate: Expr, operands: Mapping[str, Tensor], shape: tuple[int, int, int, int]) -> int | None:
    """How many pairs a predicate keeps, None where that takes too long to count."""
    b, h, m, n = shape
    rule = separable(predicate, m) if m == n else None
    return b * h * kept_in_grid(rule) if rule is not None else count_kept(predicate, operands, shape, _MOST_COUNTED)

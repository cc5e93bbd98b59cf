"""`attncompiler plan --strides`: what every stride of a neighbourhood would leave to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from attncompiler.errors import OptionError
from attncompiler.masks import Mask
from attncompiler.passes.tile_counts import Sides
from attncompiler.tuning.speed_of_light import Boxes, boxes_text, sides_text, speed_of_light
from attncompiler.tuning.strides import AxisWindow, neighbourhood_of, smallest_full, strides_of, tilings
from attncompiler.tuning.target import Target


@dataclass(frozen=True)
class StrideRow:
    """One stride, of all batches and heads. `full_share`: of the tiles visited. `block_sparse`: no tile is partial; `smallest`: and
    no smaller stride does that. `own`: the mask's."""

    stride: Sides
    boxes: Boxes
    kept_pairs: int
    bound_flops: float
    bound_tiles: float
    bound_worst: float
    full_share: float
    predicted_ms: float
    block_sparse: bool
    smallest: bool
    own: bool


def check_neighbourhood(mask: Mask, shape: tuple[int, int, int, int, int]) -> tuple[AxisWindow, ...]:
    """The mask's windows along each axis. Raises: OptionError where it is no neighbourhood of a grid."""
    b, h, m, n, _ = shape
    axes = neighbourhood_of(mask.predicate(b, h, m, n), m) if m == n else None
    if axes is None:
        raise OptionError(f"--strides: {mask} is no neighbourhood of a grid", do="give masks.grid(...) alone, in one to three axes")
    return axes


def stride_rows(
    axes: tuple[AxisWindow, ...], shape: tuple[int, int, int, int, int], tile: tuple[int, int], on_lattice: bool,
    boxes: Boxes | None, target: Target,
) -> list[StrideRow]:  # fmt: skip
    """Small strides first. `boxes`: the one shape of tiles to have; else the best of `tile` for each stride."""
    b, h, _, _, _ = shape
    shapes, in_a_row = tilings(axes, *tile)
    found = strides_of(axes, [boxes] if boxes else shapes, on_lattice or in_a_row)
    smallest = set(smallest_full(found))
    own = tuple(axis.stride for axis in axes)
    rows = []
    for each in found:
        light = speed_of_light(each.counts.times(b * h), b * h * each.kept_pairs, shape, target)
        assert light.kept_pairs is not None and light.bound_flops and light.bound_tiles and light.bound_worst
        rows.append(StrideRow(
            each.stride, each.boxes, light.kept_pairs, light.bound_flops, light.bound_tiles, light.bound_worst,
            each.counts.full / each.counts.visited, light.predicted_ms, each.is_full, each.stride in smallest, each.stride == own,
        ))  # fmt: skip
    return sorted(rows, key=lambda row: (math.prod(row.stride), row.predicted_ms, max(row.stride)))


_MOST_SMALLEST = 6


def stride_table(rows: Sequence[StrideRow]) -> str:
    """Those of note: the mask's own, those faster than all before them, and the smallest that make it block-sparse."""
    smallest = [row for row in rows if row.smallest]
    chosen = {id(row) for row in sorted(smallest, key=lambda row: (row.predicted_ms, max(row.stride)))[:_MOST_SMALLEST]}
    shown, best = [], math.inf
    for row in rows:
        if row.own or row.predicted_ms < best or id(row) in chosen:
            shown.append(row)
        best = min(best, row.predicted_ms)
    table = []
    for row in shown:
        bounds = (f"{bound:.2f}" for bound in (row.bound_flops, row.bound_tiles, row.bound_worst))
        cost = f"{100 * row.full_share:.0f} %", f"{row.predicted_ms:.4g}"
        table.append((sides_text(row.stride), f"{row.kept_pairs:,}", *bounds, *cost, boxes_text(row.boxes), _remark(row)))
    headers = ("stride", "kept pairs", "bound FLOPs", "tiles", "worst", "full", "predicted ms", "tiles of", "")
    text = tabulate(table, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 6, "left", "left"))
    count = f"{len(shown)} of {len(rows)} strides: each is faster than all smaller ones, or marked; --json has all."
    none = "" if smallest else " None of them leaves every tile full."
    more = f" {len(smallest)} smallest strides are block-sparse." if len(smallest) > _MOST_SMALLEST else ""
    return f"{text}\n\n{count}{more}{none}"


def _remark(row: StrideRow) -> str:
    sparse = "smallest block-sparse" if row.smallest else "block-sparse" if row.block_sparse else ""
    return ", ".join(part for part in ("this mask" if row.own else "", sparse) if part)

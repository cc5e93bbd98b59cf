"""What a mask can be worth on a GPU, without running it: bounds by pairs and by tiles, and a predicted time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attncompiler.passes.grid import PARTIAL, GridTiles
from attncompiler.passes.tile_counts import Sides, TileCounts
from attncompiler.tuning.target import Target

# Of the forward kernel for Hopper, fitted to twelve masks on one H200, bf16, D128 (docs/performance.md, with what they miss): the
# share of the peak that tiles without a mask reach; in such tiles, what one with a mask costs, and a row beside its tiles.
EFFICIENCY = 0.685
MASKED = 1.14
ROW = 0.3

Boxes = tuple[Sides, Sides]  # of queries and of keys


@dataclass(frozen=True)
class SpeedOfLight:
    """Of all batches and heads together. Bounds are speed-ups over dense attention: by kept pairs, by visited tiles, and by the
    query tile that visits most, as if all did. `kept_pairs` is None where counting takes too long, or only a call can tell; a bound
    where nothing is visited. `predicted_ms`: the forward.

    `tile`: queries and keys of a tile; `boxes`: how it lies in a grid, the shapes that leave least to do, None for runs of tokens.
    `full_strides`: for a grid, the smallest strides that leave no partial tile, in the shapes that are best for each."""

    kept_pairs: int | None
    visited_tiles: int
    full_tiles: int
    partial_tiles: int
    worst_row_tiles: int
    bound_flops: float | None
    bound_tiles: float | None
    bound_worst: float | None
    predicted_ms: float
    tile: tuple[int, int]
    boxes: Boxes | None = None
    full_strides: tuple[Sides, ...] = ()


def speed_of_light(
    counts: TileCounts, kept_pairs: int | None, shape: tuple[int, int, int, int, int], target: Target, element: int = 2,
    boxes: Boxes | None = None, full_strides: tuple[Sides, ...] = (),
) -> SpeedOfLight:  # fmt: skip
    """`shape`: B, H, queries, keys, D. `element`: bytes of one number."""
    b, h, m, n, _ = shape
    dense = b * h * math.ceil(m / counts.block_q) * math.ceil(n / counts.block_kv)
    return SpeedOfLight(
        kept_pairs, counts.visited, counts.full, counts.partial, counts.worst,
        b * h * m * n / kept_pairs if kept_pairs else None,
        dense / counts.visited if counts.visited else None,
        dense / (counts.rows * counts.worst) if counts.worst else None,
        predicted_ms(counts, shape, target, element),
        (counts.block_q, counts.block_kv), boxes, full_strides,
    )  # fmt: skip


def predicted_ms(counts: TileCounts, shape: tuple[int, int, int, int, int], target: Target, element: int = 2) -> float:
    """Of the forward: by arithmetic spread over the GPU, by the longest row on one multiprocessor, or by memory."""
    b, h, m, n, d = shape
    work = counts.full + MASKED * counts.partial + ROW * counts.rows
    longest = (counts.worst + ROW) * target.multiprocessors
    flops = 4.0 * counts.block_q * counts.block_kv * d * max(work, longest)
    keys = min(b * h * n, counts.visited * counts.block_kv)
    memory = element * d * 2.0 * (b * h * m + keys) / target.bandwidth
    return 1e3 * max(flops / (target.flops(element) * EFFICIENCY), memory)


def tile_work(counts: TileCounts) -> float:
    """By what shapes of tiles of one size are compared: tiles, in those without a mask."""
    return counts.full + PARTIAL * counts.partial


def boxes_of(tiles: GridTiles) -> Boxes | None:
    """The shapes of tiles that are boxes of a grid."""
    return (tiles.rows, tiles.columns) if tiles else None


def sides_text(sides: Sides) -> str:
    """2x8x8"""
    return "x".join(map(str, sides))


def boxes_text(boxes: Boxes) -> str:
    """2x8x8:2x8x8, queries first."""
    return ":".join(map(sides_text, boxes))

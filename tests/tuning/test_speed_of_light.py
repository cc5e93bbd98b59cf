"""Bounds and predicted times, beside what was measured (docs/performance.md)."""

from __future__ import annotations

import pytest

from attncompiler import masks
from attncompiler.masks import Mask
from attncompiler.passes.tile_counts import TileCounts
from attncompiler.tuning.speed_of_light import predicted_ms, speed_of_light
from attncompiler.tuning.target import TARGETS

_H100 = TARGETS["sm_90"]
_CAUSAL = masks.causal()


@pytest.mark.parametrize(
    ("mask", "tokens", "heads", "keys", "ms"),
    [
        (masks.full(), 16384, 16, 128, 2.993),
        (_CAUSAL, 16384, 16, 128, 1.526),
        (_CAUSAL & masks.window(1024, 0), 16384, 16, 128, 0.234),
        (_CAUSAL & (masks.window(1024, 0) | masks.sink(64)), 16384, 16, 128, 0.255),
        (masks.strided(64, 16, 16, heads=16), 16384, 16, 64, 0.317),
        (masks.grid((128, 128), 17), 16384, 16, 128, 0.176),
        (masks.disc((128, 128), 16), 16384, 16, 128, 0.355),
        (masks.grid((256, 256), 80), 65536, 24, 128, 9.98),
        (masks.grid((256, 256), 80, stride=16), 65536, 24, 128, 7.946),
        (masks.grid((30, 48, 80), (18, 24, 24)), 115200, 24, 128, 41.38),
        (masks.grid((30, 48, 80), (18, 24, 24), stride=(16, 8, 8)), 115200, 24, 128, 23.74),
    ],
    ids=str,
)
def test_masks_that_were_measured(mask: Mask, tokens: int, heads: int, keys: int, ms: float) -> None:
    """`keys` of a tile, as the kernel had them."""
    tiles = mask.tiles(1, heads, tokens, tokens)
    plan = mask.plan_in(tiles, 1, heads, tokens, tokens) if tiles else mask.plan(1, heads, tokens, tokens, 128, keys)
    predicted = predicted_ms(TileCounts.of(plan, 1, heads), (1, heads, tokens, tokens, 128), _H100)
    assert predicted == pytest.approx(ms, rel=0.09)


def test_a_long_row_is_the_time() -> None:
    """One row of 64 tiles occupies one multiprocessor, whatever the others do."""
    alone = TileCounts(128, 128, 1, 64, 64, 64)
    assert predicted_ms(alone.times(10), (1, 10, 128, 8192, 128), _H100) == predicted_ms(alone, (1, 1, 128, 8192, 128), _H100)


def test_few_queries_wait_for_the_keys_that_they_visit() -> None:
    near = TileCounts(16, 64, 1, 16, 15, 16).times(4096)
    half = predicted_ms(near, (1, 4096, 1, 4096, 128), _H100)
    assert half == pytest.approx(1e3 * 2 * 2 * 128 * 4096 * (1 + 16 * 64) / _H100.bandwidth)
    assert predicted_ms(near, (1, 4096, 1, 4096, 128), _H100, element=4) > 1.9 * half


def test_bounds_are_over_dense_attention_without_padding() -> None:
    """Boxes that stick out of the grid are visited too, so they count against the mask."""
    mask = masks.grid((9, 9), 3)
    tiles = mask.tiles(1, 1, 81, 81, 16, 16)
    counts = TileCounts.of(mask.plan_in(tiles, 1, 1, 81, 81), 1, 1)
    light = speed_of_light(counts, mask.kept_pairs(1, 1, 81, 81), (1, 1, 81, 81, 64), _H100)
    assert counts.rows > 6 and light.bound_flops == 9.0 and light.bound_tiles == 36 / counts.visited
    assert light.bound_worst == 36 / (counts.rows * counts.worst)


def test_nothing_visited_has_no_bound() -> None:
    light = speed_of_light(TileCounts(128, 128, 4, 0, 0, 0), 0, (1, 1, 512, 512, 64), _H100)
    assert (light.bound_flops, light.bound_tiles, light.bound_worst) == (None, None, None) and light.predicted_ms > 0

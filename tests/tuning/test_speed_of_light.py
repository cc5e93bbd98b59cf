"""Bounds and predicted times, beside what was measured (docs/performance.md)."""

from __future__ import annotations

import pytest

from attncompiler import masks
from attncompiler.passes.tile_counts import TileCounts
from attncompiler.tuning.speed_of_light import predicted_ms, speed_of_light
from attncompiler.tuning.target import TARGETS
from benchmarks.fit_predicted import MEASURED, counts_of

_H100 = TARGETS["sm_90"]


@pytest.mark.parametrize("name", MEASURED)
def test_masks_that_were_measured(name: str) -> None:
    mask, tokens, heads, keys, ms = MEASURED[name]
    assert predicted_ms(counts_of(mask, tokens, heads, keys), (1, heads, tokens, tokens, 128), _H100) == pytest.approx(ms, rel=0.09)


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

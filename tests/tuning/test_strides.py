"""Which strides leave no partial tile, by looking at every tile of dense masks."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from attncompiler import masks
from attncompiler.passes.grid import choose_tiles
from attncompiler.passes.plan import plan_boxes
from attncompiler.passes.tile_counts import TileCounts
from attncompiler.tuning.speed_of_light import tile_work
from attncompiler.tuning.strides import AxisWindow, full_strides, neighbourhood_of, smallest_full, strides_of, tilings

Sides = tuple[int, ...]


def _axes(shape: Sides, window: int | Sides, stride: int | Sides = 1) -> tuple[AxisWindow, ...]:
    tokens = math.prod(shape)
    axes = neighbourhood_of(masks.grid(shape, window, stride).predicate(1, 1, tokens, tokens), tokens)
    assert axes is not None
    return axes


def test_windows_are_read_off_predicates() -> None:
    rng = random.Random(0)
    read = 0
    for _ in range(60):
        shape = tuple(rng.randint(4, 16) for _ in range(rng.choice([2, 3])))
        dilation = tuple(rng.choice([1, 1, 2]) for _ in shape)
        window = tuple(rng.randint(2, length // d) for length, d in zip(shape, dilation, strict=True))
        stride, causal = tuple(rng.randint(1, w) for w in window), tuple(rng.random() < 0.2 for _ in shape)
        tokens = math.prod(shape)
        mask = masks.grid(shape, window, stride, dilation, causal)
        axes = neighbourhood_of(mask.predicate(1, 1, tokens, tokens), tokens)
        if axes is None or tuple(axis.length for axis in axes) != shape:
            continue  # all is seen along an axis, and the others are tokens in a row
        read += 1
        names = ("window", "stride", "dilation", "causal")
        again = masks.grid(shape, *(tuple(getattr(axis, name) for axis in axes) for name in names))
        assert again.same_as(mask, 1, 1, tokens, tokens)
        assert all(axis.stride <= s for axis, s in zip(axes, stride, strict=True))  # several may say the same
    assert read > 40


@pytest.mark.parametrize("mask", [masks.halo((8, 8), 2, 1), masks.disc((8, 8), 3), masks.prefix(9), masks.window(5)], ids=str)
def test_other_masks_are_no_neighbourhoods(mask: masks.Mask) -> None:
    assert (
        neighbourhood_of(mask.predicate(1, 1, 64, 64), 64) is None and full_strides(mask.predicate(1, 1, 64, 64), 64, 16, 16) == ()
    )


@pytest.mark.parametrize(("shape", "window"), [((16, 16), (8, 4)), ((12, 20), (6, 5)), ((6, 8, 8), (3, 4, 4))])
def test_each_stride_is_as_its_plan_says(shape: Sides, window: Sides) -> None:
    """The best shape is the one that kernels would have, and so are its counts; full strides are those whose plan has no partial
    tile, and none below them has that."""
    axes, tokens = _axes(shape, window), math.prod(shape)
    found = strides_of(axes, *tilings(axes, 16, 16))
    full = []
    for each in found:
        mask = masks.grid(shape, window, each.stride)
        predicate = mask.predicate(1, 1, tokens, tokens)
        tiles = choose_tiles(predicate, tokens, 16, 16)
        assert each.kept_pairs == mask.kept_pairs(1, 1, tokens, tokens)
        if tiles:
            counts = TileCounts.of(plan_boxes(predicate, tokens, tiles), 1, 1)
            assert tile_work(counts) == tile_work(each.counts) and (tiles.rows, tiles.columns) == each.boxes
            full += [each.stride] if counts.partial == 0 else []
    least = {s for s in full if not any(o != s and all(a <= b for a, b in zip(o, s, strict=True)) for o in full)}
    assert (
        set(smallest_full(found))
        == least
        == set(full_strides(masks.grid(shape, window).predicate(1, 1, tokens, tokens), tokens, 16, 16))
    )


def test_all_strides_that_fit_are_looked_at() -> None:
    (axis,) = _axes((32,), 12)
    assert axis.strides() == (1, 2, 3, 4, 6, 8, 12)
    found = strides_of([axis], [((4,), (4,))], True)
    assert [each.stride for each in found] == [(s,) for s in axis.strides()]


@pytest.mark.parametrize(
    ("shape", "window", "boxes", "stride"),
    [
        ((30, 48, 80), (18, 24, 24), ((2, 8, 8), (2, 8, 8)), (2, 8, 8)),
        ((256, 256), 80, ((8, 16), (8, 16)), (16, 16)),
        ((32768,), 2048, ((128,), (128,)), (256,)),
        ((32768,), 2048, ((256,), (128,)), (256,)),
    ],
)
def test_published_strides(shape: Sides, window: int | Sides, boxes: tuple[Sides, Sides], stride: Sides) -> None:
    """On the lattice of Generalized Neighborhood Attention (2025); (16, 8, 8) is published for the first, and no smaller one."""
    tokens = math.prod(shape)
    predicate = masks.grid(shape, window).predicate(1, 1, tokens, tokens)
    assert full_strides(predicate, tokens, 128, 128, on_lattice=True, boxes=boxes) == (stride,)


def test_a_causal_row_has_no_such_stride() -> None:
    mask = masks.grid((256,), 64, causal=True)
    assert full_strides(mask.predicate(1, 1, 256, 256), 256, 64, 64) == ()
    axes = neighbourhood_of(mask.predicate(1, 1, 256, 256), 256)
    assert axes == (AxisWindow(256, 64, 1, 1, True),)
    assert smallest_full(strides_of(axes, *tilings(axes, 64, 64))) == ()


def test_no_smaller_stride_than_those_that_are_named() -> None:
    axes = _axes((16, 16), (8, 8))
    found = strides_of(axes, *tilings(axes, 16, 16))
    full = [each.stride for each in found if each.is_full]
    for one, other in itertools.permutations(smallest_full(found), 2):
        assert any(a > b for a, b in zip(one, other, strict=True))
    assert all(any(all(a <= b for a, b in zip(s, f, strict=True)) for s in smallest_full(found)) for f in full)

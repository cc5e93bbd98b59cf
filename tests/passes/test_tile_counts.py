"""Tiles of grids counted along each axis, by brute force: every tile of a dense mask is looked at."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from attncompiler import masks
from attncompiler.errors import OptionError
from attncompiler.masks import Mask
from attncompiler.passes.grid import along_axis, choose_tiles
from attncompiler.passes.placed import lattice_plan, placed
from attncompiler.passes.plan import plan_boxes
from attncompiler.passes.tile_counts import TileCounts, grid_counts, grid_rule_of, kept_in_grid, separable

Sides = tuple[int, ...]


def _random_grid(rng: random.Random) -> tuple[Mask, Sides]:
    """A rule of a grid, and its shape."""
    shape = tuple(rng.randint(3, [60, 14, 7][rank]) for rank in [rng.choice([0, 1, 1, 2])] for _ in range(rank + 1))
    if len(shape) > 1 and rng.random() < 0.2:
        return masks.halo(shape, rng.randint(1, 4), rng.randint(0, 3)), shape
    dilation = [rng.choice([1, 1, 2, 3]) for _ in shape]
    window = [rng.randint(1, length // d) for length, d in zip(shape, dilation, strict=True)]
    stride = [rng.randint(1, w) for w in window]
    return masks.grid(shape, window, stride, dilation, [rng.random() < 0.2 for _ in shape]), shape


def _lattice(shape: Sides, dilation: Sides, sides: Sides) -> list[Tensor]:
    """The tokens of every tile, in the order of tiles; short where a tile sticks out of its residue class."""
    along = []
    for length, d, side in zip(shape, dilation, sides, strict=True):
        most = math.ceil(math.ceil(length / d) / side)
        classes = [list(range(residue, length, d)) for residue in range(d)]
        along.append([places[t * side : (t + 1) * side] for places in classes for t in range(most)])
    found = []
    for box in itertools.product(*along):
        tokens = torch.zeros(1, dtype=torch.int64)
        for places, length in zip(box, shape, strict=True):
            tokens = (tokens[:, None] * length + torch.tensor(places, dtype=torch.int64)).reshape(-1)
        found.append(tokens)
    return found


def _coverage(kept: Tensor, shape: Sides, dilation: Sides, rows: Sides, columns: Sides) -> Tensor:
    """0 empty, 1 partial, 2 full; a tile of keys that sticks out is never full."""
    found = []
    keys = _lattice(shape, dilation, columns)
    for queries in _lattice(shape, dilation, rows):
        tiles = [kept[queries[:, None], at] for at in keys]
        found.append([0 if not t.any() else 1 + int(t.all() and t.shape[1] == math.prod(columns)) for t in tiles])
    return torch.tensor(found)


@pytest.mark.parametrize("seed", range(6))
def test_a_lattice_is_as_every_tile_says(seed: int) -> None:
    rng = random.Random(seed)
    looked_at = 0
    for _ in range(8):
        mask, shape = _random_grid(rng)
        tokens = math.prod(shape)
        rows, columns = (tuple(rng.randint(1, 6 // len(shape) + 1) for _ in shape) for _ in range(2))
        rule = separable(mask.predicate(1, 1, tokens, tokens), tokens)
        if rule is None or rule.lengths != shape:
            continue  # all is seen along some axes: the rest is tokens in a row, or another grid
        looked_at += 1
        kept = mask.dense(1, 1, tokens, tokens)[0, 0]
        axes = (along_axis(demand, length, 1) for demand, length in zip(rule.along, shape, strict=True))
        dilation = tuple(axis.dilation for axis in axes if axis is not None)
        expected = _coverage(kept, shape, dilation, rows, columns)
        visited = expected > 0
        assert grid_counts(rule, rows, columns, on_lattice=True) == TileCounts(
            math.prod(rows),
            math.prod(columns),
            len(expected),
            int(visited.sum()),
            int((expected == 2).sum()),
            int(visited.sum(1).max()),
        )
        assert torch.equal(lattice_plan(rule, rows, columns).coverage[0, 0].long(), expected)
        assert kept_in_grid(rule) == int(kept.sum()) == mask.kept_pairs(1, 1, tokens, tokens)
    assert looked_at > 3


@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_as_their_plan_says(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(6):
        mask, shape = _random_grid(rng)
        tokens = math.prod(shape)
        predicate = mask.predicate(1, 1, tokens, tokens)
        tiles = choose_tiles(predicate, tokens, 16, 16)
        if tiles:
            plan = plan_boxes(predicate, tokens, tiles)
            counts = grid_counts(grid_rule_of(predicate, tokens), tiles.rows, tiles.columns, on_lattice=False)
            assert TileCounts.of(plan, 1, 1) == counts
            assert TileCounts.of(plan, 2, 3) == counts.times(6)
            drawn = placed(plan, tiles)
            assert TileCounts.of(drawn, 1, 1) == counts and drawn.density == plan.density


@pytest.mark.parametrize(
    ("shape", "window", "stride", "rows", "columns", "mean", "worst"),
    [
        ((30, 48, 80), (18, 24, 24), 1, (2, 8, 8), (2, 8, 8), 5.4, 3.6),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), (2, 8, 8), 11.1, 11.1),
        ((256, 256), 80, 1, (8, 16), (8, 16), 7.5, 6.6),
        ((256, 256), 80, 16, (16, 16), (16, 8), 10.24, 10.24),
        ((256, 256), 80, 1, (1, 128), (1, 128), 3.2, 3.2),
    ],
)
def test_published_bounds(
    shape: Sides, window: int | Sides, stride: int | Sides, rows: Sides, columns: Sides, mean: float, worst: float
) -> None:
    """Generalized Neighborhood Attention (2025): HunyuanVideo and FLUX at 4K."""
    tokens = math.prod(shape)
    rule = grid_rule_of(masks.grid(shape, window, stride).predicate(1, 1, tokens, tokens), tokens)
    counts = grid_counts(rule, rows, columns, on_lattice=True)
    dense = math.ceil(tokens / counts.block_q) * math.ceil(tokens / counts.block_kv)
    assert dense / counts.visited == pytest.approx(mean, abs=0.05)
    assert dense / (counts.rows * counts.worst) == pytest.approx(worst, abs=0.05)
    assert (counts.partial == 0) == (stride != 1)


@pytest.mark.parametrize(
    "mask", [masks.disc((8, 8), 3), masks.grid((8, 8), 3) & masks.causal(), masks.grid((8, 8), 3) | masks.sink(2)]
)
def test_what_is_no_rule_of_single_axes(mask: Mask) -> None:
    with pytest.raises(OptionError, match="no rule for each axis"):
        grid_rule_of(mask.predicate(1, 1, 64, 64), 64)

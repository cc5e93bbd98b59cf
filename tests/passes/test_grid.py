"""Boxes of a grid by brute force: no kept pair is dropped, no pair is visited twice, no full tile has a hole."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

from attncompiler import masks
from attncompiler.errors import OptionError
from attncompiler.ir.expr import AXES, Expr
from attncompiler.masks import Mask
from attncompiler.passes.grid import GridTiles, box_coverage, choose_tiles, grid_rule, windows_of


def predicate_of(mask: Mask, tokens: int) -> Expr:
    return mask.rule(dict(zip(AXES, (1, 1, tokens, tokens), strict=True)))[0]


def _random_mask(rng: random.Random) -> tuple[Mask, int]:
    """A rule of a grid of one to three axes, now and then joined with tokens in a row."""
    while True:
        rank = rng.choice([1, 2, 2, 3])
        shape = [rng.randint(2, [150, 18, 8][rank - 1]) for _ in range(rank)]
        dilation = [rng.choice([1, 1, 2, 3]) for _ in shape]
        window = [rng.randint(1, max(1, length // d)) for length, d in zip(shape, dilation, strict=True)]
        stride = [rng.randint(1, w) for w in window]
        causal = [rng.random() < 0.2 for _ in shape]
        kind = rng.choice(["grid", "grid", "grid", "disc", "halo"]) if rank == 2 else "grid"
        try:
            if kind == "disc":
                mask = masks.disc(shape, rng.randint(1, 8))
            elif kind == "halo":
                mask = masks.halo(shape, rng.randint(1, 4), rng.randint(0, 3))
            else:
                mask = masks.grid(shape, window, stride, dilation, causal)
        except OptionError:
            continue
        return mask & masks.causal() if rng.random() < 0.2 else mask, math.prod(shape)


def _tokens(starts: list[int], sides: tuple[int, ...], tiles: GridTiles) -> list[int]:
    """The tokens of a box, -1 for what sticks out."""
    found = []
    along = [[s + j * axis.dilation for j in range(side)] for s, side, axis in zip(starts, sides, tiles.axes, strict=True)]
    for place in itertools.product(*along):
        inside = all(0 <= at < axis.length for at, axis in zip(place, tiles.axes, strict=True))
        token = 0
        for at, axis in zip(place, tiles.axes, strict=True):
            token = token * axis.length + at
        found.append(token if inside else -1)
    return found


def _digits(number: int, sizes: list[int]) -> list[int]:
    found = []
    for size in reversed(sizes):
        number, digit = divmod(number, size)
        found.append(digit)
    return found[::-1]


def _check(mask: Mask, tokens: int, rows: int, columns: int, by_keys: bool, halves: bool) -> bool:
    """False where tiles are no boxes."""
    predicate = predicate_of(mask, tokens)
    tiles = choose_tiles(predicate, tokens, rows, columns, by_keys, halves)
    if not tiles:
        return False
    kept = mask.dense(1, 1, tokens, tokens)[0, 0]
    kept = kept.T if by_keys else kept
    coverage, origins = box_coverage(predicate, tokens, tiles, by_keys)
    visited = torch.zeros(tokens, tokens, dtype=torch.bool)
    for row in range(coverage.shape[0]):
        starts = []
        for digit, axis in zip(_digits(row, [axis.row_tiles for axis in tiles.axes]), tiles.axes, strict=True):
            steps = axis.row_tiles // axis.dilation
            starts.append(digit // steps + digit % steps * axis.rows * axis.dilation)
        stays = torch.tensor([t for t in _tokens(starts, tiles.rows, tiles) if t >= 0], dtype=torch.int64)
        for step in coverage[row].nonzero().flatten().tolist():
            digits = [step // size % axis.reach for size, axis in zip(tiles.steps, tiles.axes, strict=True)]
            corner = [
                int(o) + digit * axis.columns * axis.dilation
                for o, digit, axis in zip(origins[row], digits, tiles.axes, strict=True)
            ]
            box = _tokens(corner, tiles.columns, tiles)
            assert -1 not in box or not tiles.inside
            moves = torch.tensor([t for t in box if t >= 0], dtype=torch.int64)
            assert not visited[stays[:, None], moves].any(), "a pair is visited twice"
            visited[stays[:, None], moves] = True
            if coverage[row, step] == 2:
                assert -1 not in box and kept[stays[:, None], moves].all(), "a full tile has a hole"
    assert not (kept & ~visited).any(), "a kept pair is dropped"
    return True


@pytest.mark.parametrize("seed", range(4))
def test_boxes_hold_what_is_kept(seed: int) -> None:
    rng = random.Random(seed)
    boxed = 0
    for _ in range(20):
        mask, tokens = _random_mask(rng)
        rows, columns, (by_keys, halves) = rng.choice([16, 32]), rng.choice([16, 32]), rng.choices([True, False], k=2)
        boxed += _check(mask, tokens, rows, columns, by_keys, halves)
    assert boxed > 3


def test_halves_take_short_turns() -> None:
    """A row of 16 x 8 tokens is parted along y: tiles are counted along y first, then what either half needs alone is never far."""
    mask = masks.grid((128, 128), 17)
    tiles = choose_tiles(predicate_of(mask, 16384), 16384, 128, 64, by_keys=True, halves=True)
    assert tiles.rows == (16, 8) and tiles.steps == (1, tiles.axes[0].reach)
    assert replace(tiles, halves=False).steps == (tiles.axes[1].reach, 1)


@pytest.mark.parametrize("by_keys", [False, True])
def test_windows_are_the_mask(by_keys: bool) -> None:
    mask, shape = masks.grid((12, 20), (3, 5), stride=(2, 3)), (12, 20)
    predicate = predicate_of(mask, 240)
    tiles = choose_tiles(predicate, 240, 8, 8, by_keys)
    table = windows_of(predicate, 240, tiles, by_keys)
    y, x = table[:12], table[12:]
    at = torch.arange(240)
    row, column = (at // shape[1])[:, None], (at % shape[1])[:, None]
    seen = (y[row, 0] <= at // 20) & (at // 20 < y[row, 1]) & (x[column, 0] <= at % 20) & (at % 20 < x[column, 1])
    kept = mask.dense(1, 1, 240, 240)[0, 0]
    assert torch.equal(seen, kept.T if by_keys else kept)


@pytest.mark.parametrize("mask", [masks.blocks(64), masks.causal() & masks.window(10), masks.document(every=50)], ids=str)
def test_tokens_in_a_row_are_no_grid(mask: Mask) -> None:
    assert grid_rule(predicate_of(mask, 1024), 1024) is None


@pytest.mark.parametrize(
    ("mask", "tokens", "bound"),
    [
        (masks.grid((30, 48, 80), (18, 24, 24)), 115200, 6.87),  # 5.4 on a lattice of 2 x 8 x 8
        (masks.grid((30, 48, 80), (18, 24, 24), stride=(16, 8, 8)), 115200, 11.11),
        (masks.grid((256, 256), 80), 65536, 8.33),  # 7.5 on a lattice of 8 x 16
        (masks.grid((256, 256), 80, stride=16), 65536, 10.24),
    ],
    ids=str,
)
def test_bounds_of_published_grids(mask: Mask, tokens: int, bound: float) -> None:
    predicate = predicate_of(mask, tokens)
    tiles = choose_tiles(predicate, tokens, 128, 128)
    coverage, _ = box_coverage(predicate, tokens, tiles, False)
    assert (tokens / 128) ** 2 / int((coverage > 0).sum()) == pytest.approx(bound, abs=0.01)

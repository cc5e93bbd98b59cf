"""Grids beside other tokens: which runs they lie in, and what is left of the mask there."""

from __future__ import annotations

import pytest
import torch

from attncompiler import masks
from attncompiler.ir.evaluate import Block
from attncompiler.ir.expr import Expr
from attncompiler.masks import Mask
from attncompiler.passes.grid import grid_rule
from attncompiler.passes.grid_among_runs import GridAmongRuns, grid_among_runs

_DISC, _WINDOW = masks.disc((8, 12), 4), masks.grid((8, 12), 5)
CASES: dict[str, tuple[Mask, int, int, tuple[int, int]]] = {
    "text first": (masks.disc((8, 12), 4, text=32), 128, 128, (32, 32)),
    "text of an odd length": (masks.disc((8, 12), 4, text=13), 109, 109, (13, 13)),
    "image first": (masks.segments({"image": 96, "text": 20}, {("image", "image"): _WINDOW}), 116, 116, (0, 0)),
    "between": (masks.segments({"text": 7, "image": 96, "more": 9}, {("image", "image"): _WINDOW}), 112, 112, (7, 7)),
    "extra keys": (masks.segments({"grid": 96}, {("grid", "grid"): _DISC}, keys={"grid": 96, "extra": 16}), 96, 112, (0, 0)),
    "keys that few see": (
        masks.segments({"text": 5, "image": 96}, {("image", "image"): _WINDOW, ("image", "text"): False}), 101, 101, (5, 5)
    ),
}  # fmt: skip
OTHERS: dict[str, tuple[Mask, int]] = {
    "no grid": (masks.causal(), 64),
    "a prefix": (masks.prefix(16), 64),
    "a grid alone": (_WINDOW, 96),
    "two grids": (masks.segments([96, 96], {(0, 0): _WINDOW, (1, 1): _DISC, (0, 1): False, (1, 0): False}), 192),
}


def _table(predicate: Expr, m: int, n: int) -> torch.Tensor:
    places = {"q_idx": torch.arange(m).view(1, 1, m, 1), "kv_idx": torch.arange(n).view(1, 1, 1, n)}
    extents = {"b": 1, "h": 1, "q_idx": m, "kv_idx": n}
    return Block({}, {}, extents, places, torch.float32).tensor(predicate).expand(1, 1, m, n)[0, 0].clone()


@pytest.mark.parametrize("name", CASES)
def test_the_runs_of_a_grid_are_found(name: str) -> None:
    """What is said of each pair of runs is, put together, the mask."""
    mask, m, n, firsts = CASES[name]
    predicate = mask.predicate(1, 1, m, n)
    found = grid_among_runs(predicate, m, n)
    assert isinstance(found, GridAmongRuns)
    (q, length), (k, _) = found.queries, found.keys
    assert (q, k) == firsts and length == 96 and grid_rule(found.predicate, 96) is not None
    together = torch.zeros(m, n, dtype=torch.bool)
    for (row, rows), (column, columns) in found.full:
        together[row : row + rows, column : column + columns] = True
    together[q : q + length, k : k + length] = _table(found.predicate, length, length)
    assert torch.equal(together, _table(predicate, m, n))


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_have_none(name: str) -> None:
    mask, n = OTHERS[name]
    assert grid_among_runs(mask.predicate(1, 1, n, n), n, n) is None

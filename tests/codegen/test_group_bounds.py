"""What a group may leave out holds no pair that the mask keeps: the emitted test, run on every row of tiles and every tile."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attncompiler.codegen.emission import Emission, Layout, halved
from attncompiler.codegen.emit_backward import KEYS, QUERIES
from attncompiler.codegen.group_bounds import GroupTest, group_test
from attncompiler.codegen.positions import TilePositions
from attncompiler.ir import Attention, parse, verify
from attncompiler.ir.evaluate import whole
from attncompiler.ir.text import to_text
from attncompiler.tuning.schedule import choose_schedule, for_mask
from attncompiler.tuning.target import TARGETS

TOKENS = 1024  # in grids: 32 x 32
SCALARS: dict[str, Any] = {
    "tl": SimpleNamespace(minimum=min, maximum=max, abs=abs, where=lambda test, yes, no: yes if test else no),
    "floor_div": lambda a, b: a // b, "floor_mod": lambda a, b: a % b, "h": 1, "M": TOKENS, "N": TOKENS,
}  # fmt: skip

MASKS = {
    "causal": "kv_idx <= q_idx",
    "window": "(kv_idx <= q_idx) & (kv_idx >= q_idx - 100)",
    "strided blocks": "(kv_idx <= q_idx) & ((kv_idx // 64 >= q_idx // 64 - 1) | ((kv_idx // 64 + h) % 4 == 0))",
    "documents": "(kv_idx <= q_idx) & (ids[kv_idx] == ids[q_idx])",
    "disc": "(q_idx // 32 - kv_idx // 32) * (q_idx // 32 - kv_idx // 32)"
            " + (q_idx % 32 - kv_idx % 32) * (q_idx % 32 - kv_idx % 32) < 30",
    "grid": "(kv_idx // 32 >= q_idx // 32 - 3) & (kv_idx // 32 <= q_idx // 32 + 3)"
            " & (kv_idx % 32 >= q_idx % 32 - 5) & (kv_idx % 32 <= q_idx % 32 + 5)",
}  # fmt: skip


def _program(keep: str) -> Attention:
    vectors = ", ".join(f"{name}: bf16[1, 2, {TOKENS}, 128]" for name in "qkv")
    text = f"""attention
      axes b=1, h=2, q_idx={TOKENS}, kv_idx={TOKENS}
      read {vectors}, ids: i32[{TOKENS}]
      score dot(q[b, h, q_idx], k[b, h, kv_idx])
      keep {keep} else zero
      weigh softmax
      sum v[b, h, kv_idx]"""
    if "ids[" not in keep:
        text = text.replace(f", ids: i32[{TOKENS}]", "")
    return verify(parse(text))


def _tests(keep: str, kernel: str) -> tuple[Attention, TilePositions, TilePositions, GroupTest]:
    p = _program(keep)
    schedule = for_mask(choose_schedule(p, TARGETS["sm_90"], descriptors=True), p, {})
    assert schedule.warp_roles
    e = Emission(p, schedule, Layout((1, 1, 1), frozenset("qkv")))
    queries, keys = e.positions(kernel)
    stays, moves = (keys, queries) if kernel == KEYS else (queries, keys)
    return p, stays, moves, group_test(e, stays, moves, "row * 128 + PART * 64", "tile * 64", 64)


def _tokens(positions: TilePositions, scope: dict[str, Any], start: int, length: int, part: int) -> torch.Tensor:
    """The tokens of a tile or, with a `part`, of a group's half of one."""
    if not positions.tiles:
        return torch.arange(start, start + length)
    sides = positions.tiles.columns if positions.moves else positions.tiles.rows
    shape = sides if positions.moves else halved(sides)
    y, x = (scope[at] + part * (side - mine) for at, side, mine in zip(positions.at(""), sides, shape, strict=True))
    ys, xs = torch.arange(y, y + shape[0]), torch.arange(x, x + shape[1])
    ys, xs = ys[(ys >= 0) & (ys < 32)], xs[(xs >= 0) & (xs < 32)]
    return (ys[:, None] * 32 + xs).flatten()


@pytest.mark.parametrize("kernel", [QUERIES, KEYS])
@pytest.mark.parametrize("name", MASKS)
def test_no_kept_pair_is_left_out(name: str, kernel: str) -> None:
    p, stays, moves, test = _tests(MASKS[name], kernel)
    assert bool(stays.tiles) == (name in ("disc", "grid"))
    ids = {"ids": torch.arange(TOKENS, dtype=torch.int32) // 300}
    extents = {"b": 1, "h": 2, "q_idx": TOKENS, "kv_idx": TOKENS}
    kept = whole(ids, {}, extents, torch.float64, torch.device("cpu")).tensor(p.keep.predicate)
    kept = kept.expand(1, 2, TOKENS, TOKENS)[0, 1]
    kept = kept.T if kernel == KEYS else kept
    steps = range(moves.tiles.axes[0].reach * moves.tiles.axes[1].reach) if moves.tiles else range(TOKENS // 64)
    left_out = 0
    for row, part, tile in itertools.product(range(8), range(2), steps):
        scope = {**SCALARS, "row": row, "PART": part, "tile": tile, "origin_y": 4 * row - 4, "origin_x": 8 * (row % 2)}
        if stays.tiles:
            exec(f"{stays.corner('row')}\n{moves.corner('tile')}", scope)
        exec(f"{test.row_lines}\n{test.lines}", scope)
        if not eval(test.may, scope):
            rows, columns = (_tokens(side, scope, *at) for side, at in (
                (stays, (row * 128 + part * 64, 64, part)), (moves, (tile * 64, 64, 0)),
            ))  # fmt: skip
            assert not kept[rows][:, columns].any()
            left_out += 1
    assert left_out


def test_rows_that_must_see_every_key_leave_nothing_out() -> None:
    p = verify(parse(to_text(_program(MASKS["causal"])).replace("else zero", "else score")))
    e = Emission(p, choose_schedule(p, TARGETS["sm_90"], descriptors=True), Layout((1, 1, 1), frozenset("qkv")))
    assert not group_test(e, *e.positions(QUERIES), "0", "0", 64).may

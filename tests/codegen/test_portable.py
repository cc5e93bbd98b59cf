"""The portable lowering against float64: every program, small tiles and large, all dtypes."""

from __future__ import annotations

import resource
from unittest import mock

import pytest
import torch

from attncompiler import masks
from attncompiler.codegen import portable, portable_tiles
from attncompiler.dsl.attention import declare
from attncompiler.ir import parse, verify
from attncompiler.ir.expr import Q_IDX
from attncompiler.masks import Mask
from tests.programs import PROGRAMS, SIZES, judge, judge_on, operands, program

SMALL = {"_BLOCK_Q": 8, "_BLOCK_KV": 4, "_WHOLE": 0, "_ELEMENTS": 64}  # many tiles in small problems


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("tiles", ["whole", "small"])
def test_forward_and_gradients(name: str, sizes: tuple[int, int, int, int], tiles: str) -> None:
    with mock.patch.multiple(portable_tiles, **(SMALL if tiles == "small" else {"_WHOLE": 256})):
        judge(portable, program(name, *sizes))


@pytest.mark.parametrize("dtype", ["f64", "bf16", "f16"])
@pytest.mark.parametrize("name", ["window", "sinks", "dropout"])
def test_dtypes_and_strides(name: str, dtype: str) -> None:
    judge(portable, program(name, 33, 70, 80, 48, dtype), strided=True)


@pytest.mark.parametrize("wide", [6, 8])  # stripes that tiles cut through, or hold
def test_blocks_of_one_head(wide: int) -> None:
    """Where heads have plans of their own, blocks of long sequences are taller."""
    p = verify(
        parse(f"""attention
      axes b=2, h=3, q_idx=90, kv_idx=83
      read q: f32[2, 3, 90, 8], k: f32[2, 3, 83, 8], v: f32[2, 3, 83, 8]
      score dot(q[b, h, q_idx], k[b, h, kv_idx]) * 0.25
      keep ((kv_idx // {wide} + h) % 2 == 0) | (q_idx - kv_idx < 9) & (kv_idx <= q_idx) else zero
      weigh softmax
      sum v[b, h, kv_idx]
    """)
    )
    plans = []
    planned = portable_tiles.build_plan
    with (
        mock.patch.multiple(portable_tiles, **SMALL, _LONG=50),
        mock.patch.object(portable_tiles, "build_plan", lambda *given: plans.append(planned(*given)) or plans[-1]),
    ):
        judge_on(portable, p, operands(p))
    assert {(plan.plan_h, plan.block_q) for plan in plans} == {(3, 16)}


GRIDS: dict[str, Mask] = {
    "na2d": masks.grid((13, 17), 5),
    "na2d with strides": masks.grid((12, 20), (6, 7), stride=(3, 2)),
    "na3d, causal along one axis": masks.grid((5, 7, 9), (3, 5, 3), causal=(True, False, False)),
    "dilated lines": masks.grid((16, 12), (5, 3), dilation=(3, 1)),
    "disc": masks.disc((15, 18), 4),
    "halo": masks.halo((16, 24), 4, 2),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_in_boxes(name: str) -> None:
    """Every query and every kept key comes once; boxes visit less than rows of tokens."""
    mask = GRIDS[name]
    n = {axis: size for axis, size in getattr(mask, "sizes").items()}[Q_IDX]  # noqa: B009
    made = {key: torch.randn(2, 3, n, 8, dtype=torch.float64) for key in "qkv"}
    program_ = declare(*made.values(), keep=mask).program
    run = portable._Run(program_, made, {})
    with mock.patch.multiple(portable_tiles, _BLOCK_Q=16, _BLOCK_KV=8, _WHOLE=0, _BOXES_WIN=1.0):
        tiles = [tile for tile in run.tiles() if (tile.b0, tile.h0) == (0, 0)]
        assert any(tile.rows[0].number > 1 or len(tile.rows) > 1 for tile in tiles)
        kept, dense = torch.zeros(n, n, dtype=torch.int64), mask.dense(1, 1, n, n)[0, 0]
        surely = torch.zeros_like(dense)
        for tile in tiles:
            rows, keys = (portable._taken(torch.arange(n).view(1, 1, -1), lines).flatten() for lines in (tile.rows, tile.ranges))
            kept[rows[:, None], keys] += 1
            full = torch.ones(len(keys), dtype=torch.bool)
            for first, last in tile.partial:
                full[first:last] = False
            surely[rows[:, None], keys[full]] = True
        assert kept.max() == 1 and kept[dense].all() and dense[surely].all()
        assert sum(tile.height for tile in tiles) == n
        judge_on(portable, program_, made)


def test_boxes_visit_what_a_kernel_on_a_gpu_visits() -> None:
    """128 x 128 with windows of 17 x 17: 768 keys for most blocks of queries, not the 17 lines of 128 of tokens in a row."""
    made = {key: torch.zeros(1, 1, 16384, 8) for key in "qkv"}
    tiles = list(portable._Run(declare(*made.values(), keep=masks.grid((128, 128), 17)).program, made, {}).tiles())
    assert sum(lines.positions for tile in tiles for lines in tile.ranges) / len(tiles) < 800


def test_memory_follows_the_window() -> None:
    """At 16384 tokens the scores alone would be a gigabyte a head."""
    n = 16384
    text = f"""attention
      axes b=1, h=1, q_idx={n}, kv_idx={n}
      read q: f32[1, 1, {n}, 16], k: f32[1, 1, {n}, 16], v: f32[1, 1, {n}, 16]
      score dot(q[b, h, q_idx], k[b, h, kv_idx]) * 0.25
      keep (kv_idx <= q_idx) & (q_idx - kv_idx < 64) else nan
      weigh softmax
      sum v[b, h, kv_idx]
    """
    p = verify(parse(text))
    made = {name: torch.randn(1, 1, n, 16) for name in "qkv"}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    o, lse, rcp = portable.forward(p, made, {})
    portable.backward(p, made, {}, o, lse, rcp, torch.ones_like(o), None, frozenset("qkv"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB

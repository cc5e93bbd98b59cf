"""The portable lowering against float64: every program, small tiles and large, all dtypes."""

from __future__ import annotations

import resource
from unittest import mock

import pytest
import torch

from attncompiler.codegen import portable
from attncompiler.ir import parse, verify
from tests.programs import PROGRAMS, SIZES, judge, judge_on, operands, program

SMALL = {"_BLOCK_Q": 8, "_BLOCK_KV": 4, "_WHOLE": 0, "_ELEMENTS": 64}  # many tiles in small problems


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("tiles", ["whole", "small"])
def test_forward_and_gradients(name: str, sizes: tuple[int, int, int, int], tiles: str) -> None:
    with mock.patch.multiple(portable, **(SMALL if tiles == "small" else {"_WHOLE": 256})):
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
    planned = portable.build_plan
    with (
        mock.patch.multiple(portable, **SMALL, _LONG=50),
        mock.patch.object(portable, "build_plan", lambda *given: plans.append(planned(*given)) or plans[-1]),
    ):
        judge_on(portable, p, operands(p))
    assert {(plan.plan_h, plan.block_q) for plan in plans} == {(3, 16)}


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

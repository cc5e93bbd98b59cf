"""The portable lowering against float64: every program, small tiles and large, all dtypes."""

from __future__ import annotations

import resource
from unittest import mock

import pytest
import torch

from attncompiler.codegen import portable
from attncompiler.ir import parse, verify
from tests.programs import PROGRAMS, SIZES, judge, program

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

"""Tiles of 64 keys, computed in pairs: rows of an odd number of them, keys that end within one, tests of each pair beside those of ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attncompiler import masks
from attncompiler.dsl.attention import declare
from attncompiler.masks import Mask
from attncompiler.runtime import prepared, triton_launch
from tests.programs import judge, operands

_STRIPES = masks.strided(64, 4, 4, heads=4)
MASKS: dict[str, Mask] = {
    "stripes": _STRIPES,
    "few tiles": masks.causal() & masks.where(lambda b, h, q, k: (k // 64 + h) % 8 == 0),
    "a test of each pair": _STRIPES & masks.where(lambda b, h, q, k: (q + 2 * k) % 5 != 0),
    "no query is behind": masks.where(lambda b, h, q, k: (k // 64 + h + q // 128) % 3 == 0),
}


def _biased(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return s - 0.01 * (q - k).abs()


def _of_keys(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return s + torch.arange(2048.0, device=s.device)[k] / 1000


@pytest.mark.gpu
@pytest.mark.parametrize("score", [None, _biased, _of_keys])
@pytest.mark.parametrize(("tokens", "d", "kv_heads", "dtype"), [
    (2048, 128, 4, torch.bfloat16), (1985, 64, 1, torch.float16), (1000, 128, 2, torch.bfloat16), (2000, 64, 4, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("name", MASKS)
def test_pairs_of_tiles(
    name: str, tokens: int, d: int, kv_heads: int, dtype: torch.dtype, score: Callable[..., Any] | None
) -> None:
    q, k, v = (torch.empty(2, heads, tokens, d, dtype=dtype, device="cuda") for heads in (4, kv_heads, kv_heads))
    program = declare(q, k, v, keep=MASKS[name], score=score, enable_gqa=kv_heads < 4).program
    schedule = prepared.prepare(program, operands(program, "cuda"), {}).schedule
    assert schedule.forward.pairs
    judge(triton_launch, program, "cuda", d == 64)

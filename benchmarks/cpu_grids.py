"""Grids by the portable lowering: tokens in rows beside boxes of the grid, forward and backward.

    python benchmarks/cpu_grids.py

float32, four heads of 64 channels (two at 16384 tokens), two threads, medians of three after a first call; both ways give one O.
"""

from __future__ import annotations

import statistics
import time
from unittest import mock

import torch
from torch import Tensor

from attncompiler import masks
from attncompiler.codegen import portable, portable_tiles
from attncompiler.dsl.attention import declare
from attncompiler.masks import Mask

CASES: list[tuple[Mask, int, int]] = [
    (masks.grid((128, 128), 17), 16384, 2), (masks.halo((64, 64), 8, 3), 4096, 4), (masks.grid((8, 32, 32), (5, 7, 7)), 8192, 4),
    (masks.grid((64, 64), 31), 4096, 4), (masks.grid((64, 64), 7), 4096, 4), (masks.disc((64, 64), 8), 4096, 4),
]  # fmt: skip


def timed(mask: Mask, qkv: list[Tensor]) -> tuple[float, float, Tensor]:
    """Milliseconds forward and backward, and O."""
    program, made = declare(*qkv, keep=mask).program, dict(zip("qkv", qkv, strict=True))
    o, lse, rcp = portable.forward(program, made, {})
    grad, times = torch.ones_like(o), []
    for _ in range(3):
        start = time.perf_counter()
        o, lse, rcp = portable.forward(program, made, {})
        middle = time.perf_counter()
        portable.backward(program, made, {}, o, lse, rcp, grad, None, frozenset("qkv"))
        times.append((middle - start, time.perf_counter() - middle))
    forward, backward = (statistics.median(each) * 1e3 for each in zip(*times, strict=True))
    return forward, backward, o


def main() -> None:
    torch.set_num_threads(2)
    print("| mask | forward, rows | boxes | backward, rows | boxes |\n|---|---|---|---|---|")
    for mask, tokens, heads in CASES:
        qkv = [torch.randn(1, heads, tokens, 64) for _ in range(3)]
        with mock.patch.object(portable_tiles, "_BOXES_WIN", 0.0):
            rows = timed(mask, qkv)
        boxes = timed(mask, qkv)
        torch.testing.assert_close(boxes[2], rows[2])
        print(f"| `{mask}` | {rows[0]:.0f} | {boxes[0]:.0f} | {rows[1]:.0f} | {boxes[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()

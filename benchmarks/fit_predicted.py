"""The constants of predicted times (attncompiler/tuning/speed_of_light.py), fitted to kernels as they were measured; needs no GPU.

    python benchmarks/fit_predicted.py

Prints the constants that leave the least squares of the relative error, what each mask then misses, what one left out of the fit would
have missed, and the best fit without a cost of masked tiles. docs/performance.md has the table.
"""

from __future__ import annotations

import itertools
import math
import statistics

import torch
from tabulate import tabulate

from attncompiler import masks
from attncompiler.masks import Mask
from attncompiler.passes.tile_counts import TileCounts
from attncompiler.tuning.target import TARGETS

_CAUSAL = masks.causal()
_FLUX, _VIDEO = (256, 256), (30, 48, 80)
_WINDOW = (18, 24, 24)
# Mask, tokens, heads, keys of a tile, ms of the forward kernel by the profiler: an H200, bf16, D128, 2026-11-30.
MEASURED: dict[str, tuple[Mask, int, int, int, float]] = {
    "full": (masks.full(), 16384, 16, 128, 2.993),
    "causal": (_CAUSAL, 16384, 16, 128, 1.526),
    "sliding1024": (_CAUSAL & masks.window(1024, 0), 16384, 16, 128, 0.234),
    "sink64+sliding1024": (_CAUSAL & (masks.window(1024, 0) | masks.sink(64)), 16384, 16, 128, 0.255),
    "s2-16shards": (masks.strided(64, 16, 16, heads=16), 16384, 16, 64, 0.317),
    "na2d-17x17": (masks.grid((128, 128), 17), 16384, 16, 128, 0.176),
    "circle-r16": (masks.disc((128, 128), 16), 16384, 16, 128, 0.355),
    "flux-80x80": (masks.grid(_FLUX, 80), 65536, 24, 128, 9.980),
    "flux-80x80-stride16": (masks.grid(_FLUX, 80, stride=16), 65536, 24, 128, 7.946),
    "hunyuan": (masks.grid(_VIDEO, _WINDOW), 115200, 24, 128, 41.38),
    "hunyuan-stride": (masks.grid(_VIDEO, _WINDOW, stride=(16, 8, 8)), 115200, 24, 128, 23.74),
    "document-causal": (
        # those of benchmarks/gpu_ab.py
        _CAUSAL & masks.document(torch.sort(torch.randint(0, 12, (16384,), generator=torch.Generator().manual_seed(0))).values),
        16384, 16, 128, 0.202,
    ),
}  # fmt: skip
_SHARES = [0.6 + 0.005 * i for i in range(40)]
_OF_MASKED = [0.9 + 0.02 * i for i in range(36)]
_OF_ROWS = [0.05 * i for i in range(61)]
Constants = tuple[float, float, float]  # EFFICIENCY, MASKED, ROW


def counts_of(mask: Mask, tokens: int, heads: int, keys: int) -> TileCounts:
    tiles = mask.tiles(1, heads, tokens, tokens)
    plan = mask.plan_in(tiles, 1, heads, tokens, tokens) if tiles else mask.plan(1, heads, tokens, tokens, 128, keys)
    return TileCounts.of(plan, 1, heads)


def predicted(counts: TileCounts, constants: Constants) -> float:
    """As `predicted_ms` has it, of masks that neither wait for memory nor for one long row."""
    share, masked, row = constants
    target = TARGETS["sm_90"]
    tiles = counts.full + masked * counts.partial + row * counts.rows
    return 4e3 * counts.block_q * counts.block_kv * 128 * tiles / (target.peak_flops * share)


def fitted(counts: dict[str, TileCounts], masked: list[float]) -> Constants:
    def misses(constants: Constants) -> float:
        return sum((predicted(counted, constants) / MEASURED[name][-1] - 1) ** 2 for name, counted in counts.items())

    return min(itertools.product(_SHARES, masked, _OF_ROWS), key=misses)


def main() -> None:
    counts = {name: counts_of(*of[:4]) for name, of in MEASURED.items()}
    best, plain = fitted(counts, _OF_MASKED), fitted(counts, [1.0])
    rows: list[list[object]] = []
    columns: list[list[float]] = []
    for name, counted in counts.items():
        without = fitted({other: each for other, each in counts.items() if other != name}, _OF_MASKED)
        ms = MEASURED[name][-1]
        misses = [predicted(counted, constants) / ms - 1 for constants in (best, plain, without)]
        columns.append(misses)
        share = counted.partial / counted.visited
        rows.append([name, f"{share:.0%}", f"{predicted(counted, best):.3f}", ms, *(f"{100 * miss:+.0f} %" for miss in misses)])
    print(
        tabulate(
            rows, ["mask", "partial", "predicted ms", "measured ms", "error", "no cost of partial tiles", "left out of the fit"]
        )
    )
    for what, of_all in zip(("three constants", "two", "left out"), zip(*columns, strict=True), strict=True):
        mean = math.sqrt(statistics.fmean(miss * miss for miss in of_all))
        print(f"{what}: root of the mean square {100 * mean:.1f} %, at worst {100 * max(map(abs, of_all)):.0f} %")
    print("EFFICIENCY {:.3f}, MASKED {:.2f}, ROW {:.2f}".format(*best))


if __name__ == "__main__":
    main()

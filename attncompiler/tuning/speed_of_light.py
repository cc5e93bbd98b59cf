"""What a mask can be worth on a GPU, without running it: bounds by pairs and by tiles, and a predicted time."""

from __future__ import annotations

from dataclasses import dataclass

from attncompiler.passes.plan import TilePlan
from attncompiler.tuning.target import Target

# Of the forward kernels on one H200, bf16, N16384 D128 (docs/performance.md): the share of the peak that long rows of tiles reach,
# and what a row costs beside its tiles, in tiles of 128 x 128. Full, causal and sliding masks are met within 4 % there; masks
# that read a tensor for each pair cost more than this says (documents: 32 %).
EFFICIENCY = 0.68
ROW_OVERHEAD = 1.7


@dataclass(frozen=True)
class SpeedOfLight:
    """Of all batches and heads together. Bounds are speed-ups over dense attention: by kept pairs, by visited tiles, and by the
    query tile that visits most. `kept_pairs` is None where counting takes too long, a bound where nothing is visited.
    `predicted_ms`: the forward."""

    kept_pairs: int | None
    visited_tiles: int
    full_tiles: int
    partial_tiles: int
    worst_row_tiles: int
    bound_flops: float | None
    bound_tiles: float | None
    bound_worst: float | None
    predicted_ms: float


def speed_of_light(
    plan: TilePlan, kept_pairs: int | None, shape: tuple[int, int, int, int, int], target: Target, element: int = 2
) -> SpeedOfLight:
    """`shape`: B, H, queries, keys, D. `element`: bytes of one number."""
    b, h, m, n, d = shape
    copies = (b // plan.plan_b) * (h // plan.plan_h)
    visited, full, partial = (int(ranges.lengths.sum()) * copies for ranges in (plan.visited, plan.full, plan.partial))
    worst = int(plan.work.max()) if plan.work.numel() else 0
    rows = b * h * plan.q_tiles
    tile_flops = 4.0 * plan.block_q * plan.block_kv * d
    overhead = rows * ROW_OVERHEAD * 4.0 * plan.block_q * 128 * d
    compute = (visited * tile_flops + overhead) / (target.peak_flops * EFFICIENCY)
    memory = element * b * h * d * 2.0 * (m + n) / target.bandwidth
    return SpeedOfLight(
        kept_pairs, visited, full, partial, worst,
        b * h * m * n / kept_pairs if kept_pairs else None,
        rows * plan.dense_tiles / visited if visited else None,
        plan.dense_tiles / worst if worst else None,
        1e3 * max(compute, memory),
    )  # fmt: skip

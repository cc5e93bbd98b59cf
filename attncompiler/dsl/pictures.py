"""A tile plan as text."""

from __future__ import annotations

from attncompiler.passes.plan import Coverage, TilePlan

_MARKS = {Coverage.EMPTY: "\u00b7", Coverage.PARTIAL: "\u2592", Coverage.FULL: "\u2588"}


def picture(plan: TilePlan, columns: int = 64) -> str:
    """Queries downwards, keys to the right; the first batch and head. A mark stands for one tile or for a box of them."""
    tiles = plan.coverage[0, 0]
    width = max(1, -(-tiles.shape[1] // columns))
    height = max(1, -(-tiles.shape[0] // (columns // 2)))
    lines = []
    for top in range(0, tiles.shape[0], height):
        marks = []
        for left in range(0, tiles.shape[1], width):
            box = tiles[top : top + height, left : left + width]
            low, high = int(box.min()), int(box.max())
            marks.append(_MARKS[Coverage.FULL if low == 2 else Coverage.EMPTY if high == 0 else Coverage.PARTIAL])
        lines.append("".join(marks))
    legend = "  ".join(f"{mark} {kind.name.lower()}" for kind, mark in _MARKS.items())
    box_text = f"; a mark is {height} x {width} tiles" if height * width > 1 else ""
    return "\n".join([*lines, f"{legend}  (tiles of {plan.block_q} queries x {plan.block_kv} keys{box_text})"])

"""A tile plan as a picture: text or SVG."""

from __future__ import annotations

from attncompiler.passes.plan import Coverage, TilePlan

COLOURS = {Coverage.EMPTY: "#f2f2ee", Coverage.PARTIAL: "#e8a33d", Coverage.FULL: "#2f6f8f"}
_MOST_CELLS = 64  # a larger plan is drawn coarser: a cell then stands for several tiles
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


def svg(plan: TilePlan, alone: bool = True) -> str:
    """Queries downwards, keys to the right; the first batch and head. `alone`: a file of its own, not a part of a page."""
    coverage = plan.coverage[0, 0]
    rows, columns = coverage.shape
    step_r, step_c = -(-rows // _MOST_CELLS), -(-columns // _MOST_CELLS)
    cells = []
    for r in range(0, rows, step_r):
        for c in range(0, columns, step_c):
            box = coverage[r : r + step_r, c : c + step_c]
            kind = Coverage.FULL if bool((box == 2).all()) else Coverage.EMPTY if bool((box == 0).all()) else Coverage.PARTIAL
            at = f"x='{c * plan.block_kv}' y='{r * plan.block_q}' width='{step_c * plan.block_kv}' height='{step_r * plan.block_q}'"
            cells.append(f"<rect {at} fill='{COLOURS[kind]}'/>")
    width, height = columns * plan.block_kv, rows * plan.block_q
    namespace = " xmlns='http://www.w3.org/2000/svg'" if alone else ""
    return f"<svg{namespace} viewBox='0 0 {width} {height}' shape-rendering='crispEdges'>{''.join(cells)}</svg>"

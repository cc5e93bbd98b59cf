"""A tile plan as a picture: text, SVG or PNG. Queries downwards, keys to the right; one panel for each head that differs."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from attncompiler.passes.plan import Coverage, TilePlan

COLOURS = {Coverage.EMPTY: "#f2f2ee", Coverage.PARTIAL: "#e8a33d", Coverage.FULL: "#2f6f8f"}
_INK, _PAPER, _FRAME = "#222222", "#ffffff", "#cccccc"
_MARKS = {Coverage.EMPTY: "\u00b7", Coverage.PARTIAL: "\u2592", Coverage.FULL: "\u2588"}
_MOST_PANELS = 16
_MOST_CELLS = 128  # a side of SVG; a larger plan is drawn coarser, in the mean colour of several tiles
_NARROWEST = 12  # columns of text of a panel

_SIDE, _GAP, _LINE, _PER_ROW = 384, 24, 20, 4  # pixels: a panel's longer side, between panels, a line of text; panels in a row


@dataclass(frozen=True)
class Panel:
    """The coverage [q_tiles, kv_tiles] of the heads that `title` names; "" where all are alike."""

    title: str
    tiles: Tensor


def panels(plan: TilePlan, batch: int | None = None, head: int | None = None) -> list[Panel]:
    """Those of one batch and head, or of all that differ, in their order."""
    batches = range(plan.plan_b) if batch is None else [batch if plan.plan_b > 1 else 0]
    heads = range(plan.plan_h) if head is None else [head if plan.plan_h > 1 else 0]
    coverage = plan.coverage.cpu()
    alike: dict[bytes, list[tuple[int, int]]] = {}
    for place in itertools.product(batches, heads):
        alike.setdefault(coverage[place].numpy().tobytes(), []).append(place)
    groups = list(alike.values())
    if len(groups) == 1 and batch is None and head is None:
        return [Panel("", coverage[groups[0][0]])]
    return [Panel(_title(places, plan), coverage[places[0]]) for places in groups]


def _title(places: Sequence[tuple[int, int]], plan: TilePlan) -> str:
    named = [("batch", sorted({b for b, _ in places}), plan.plan_b), ("head", sorted({h for _, h in places}), plan.plan_h)]
    rest = len(places) != len(named[0][1]) * len(named[1][1])  # alike by pairs, not by batches and heads
    words = [f"{what}{'es' if what == 'batch' else 's'} {_numbers(n)}" if len(n) > 1 else f"{what} {n[0]}"
             for what, n, count in named if count > 1]  # fmt: skip
    return ", ".join(words) + (" (some)" if rest else "")


def _numbers(numbers: Sequence[int]) -> str:
    """0, 2-5"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _coarse(tiles: Tensor, height: int, width: int) -> Tensor:
    """Boxes of `height` x `width` tiles as one cell each: full or empty where all of it is, else partial."""
    rows, columns = -(-tiles.shape[0] // height), -(-tiles.shape[1] // width)
    low = torch.full((rows * height, columns * width), int(Coverage.FULL), dtype=torch.int8)
    high = torch.full_like(low, int(Coverage.EMPTY))
    for padded in (low, high):
        padded[: tiles.shape[0], : tiles.shape[1]] = tiles
    low, high = (t.view(rows, height, columns, width) for t in (low, high))
    least, most = low.amin((1, 3)), high.amax((1, 3))
    return torch.where(least == most, least, torch.full_like(least, int(Coverage.PARTIAL)))


def _omitted(count: int) -> str:
    return f"{count - _MOST_PANELS} more are not shown" if count > _MOST_PANELS else ""


# -------------------------------------------------------------------------------------------------------------- text


def picture(plan: TilePlan, columns: int = 64, batch: int | None = None, head: int | None = None, boxes: str = "") -> str:
    """In text, side by side where `columns` characters are enough. A mark stands for one tile or for a box of them. `boxes`: the
    shapes of tiles that are boxes of a grid, for the legend."""
    shown = panels(plan, batch, head)
    wanted = columns if len(shown) == 1 else max(_NARROWEST, (columns - 2 * (len(shown) - 1)) // len(shown))
    width, height = max(1, -(-plan.kv_tiles // wanted)), max(1, -(-plan.q_tiles // max(wanted // 2, 1)))
    drawn = []
    for panel in shown[:_MOST_PANELS]:
        cells = _coarse(panel.tiles, height, width)
        lines = ["".join(_MARKS[Coverage(cell)] for cell in row) for row in cells.tolist()]
        drawn.append([panel.title, *lines] if panel.title else lines)
    across = max(len(line) for lines in drawn for line in lines)
    found = []
    fitting = max(1, (columns + 2) // (across + 2))
    for first in range(0, len(drawn), fitting):
        side_by_side = zip(*drawn[first : first + fitting], strict=True)
        found += ["  ".join(line.ljust(across) for line in row).rstrip() for row in side_by_side]
    legend = "  ".join(f"{mark} {kind.name.lower()}" for kind, mark in _MARKS.items())
    box_text = f"; a mark is {height} x {width} tiles" if height * width > 1 else ""
    found += [_omitted(len(shown))] if _omitted(len(shown)) else []
    return "\n".join([*found, f"{legend}  ({_tile_text(plan, boxes)}{box_text})"])


def _tile_text(plan: TilePlan, boxes: str) -> str:
    lie = f" in boxes of {boxes}, box after box" if boxes else ""
    return f"tiles of {plan.block_q} queries x {plan.block_kv} keys{lie}"


# --------------------------------------------------------------------------------------------------------- SVG and PNG


@dataclass(frozen=True)
class _Layout:
    """Where things are, in pixels: panels of one size in rows, a line of text above each if any has a title."""

    panel: tuple[int, int]  # width, height
    corners: tuple[tuple[int, int], ...]
    size: tuple[int, int]


def _layout(plan: TilePlan, count: int, titled: bool, legend: bool, margin: int) -> _Layout:
    tokens = plan.kv_tiles * plan.block_kv, plan.q_tiles * plan.block_q
    scale = _SIDE / max(*tokens, 1)
    width, height = (max(8, round(n * scale)) for n in tokens)
    top = _LINE if titled else 0
    corners = [(margin + i % _PER_ROW * (width + _GAP), margin + top + i // _PER_ROW * (height + top + _GAP)) for i in range(count)]
    right, bottom = corners[min(count, _PER_ROW) - 1][0] + width, corners[-1][1] + height
    return _Layout((width, height), tuple(corners), (right + margin, bottom + margin + legend * 2 * _LINE))


def _legend(plan: TilePlan, count: int, boxes: str) -> list[str]:
    """What stands below: the colours' names in their order, then the rest."""
    rest = f"{_tile_text(plan, boxes)}, {100 * plan.density:.3g} % visited"
    return [*(kind.name.lower() for kind in COLOURS), rest + (f"; {_omitted(count)}" if _omitted(count) else "")]


def _cells(tiles: Tensor, most: tuple[int, int]) -> Image.Image:
    """A pixel for each tile, of at most `most` = (width, height); beyond that in the mean colour of several."""
    image = Image.fromarray(tiles.contiguous().numpy().astype("uint8")).convert("P")
    image.putpalette([channel for kind in Coverage for channel in bytes.fromhex(COLOURS[kind][1:])])
    size = min(image.width, most[0]), min(image.height, most[1])
    return image.convert("RGB").resize(size, Image.Resampling.BOX)


def svg(plan: TilePlan, alone: bool = True, batch: int | None = None, head: int | None = None, boxes: str = "") -> str:
    """As SVG. `alone`: a file of its own, with a legend; else a part of a page that has one."""
    shown = panels(plan, batch, head)
    titled = any(panel.title for panel in shown)
    drawn = shown[:_MOST_PANELS]
    margin = _GAP // 2 if alone else 0
    layout = _layout(plan, len(drawn), titled, alone, margin)
    text = f"font-family='sans-serif' font-size='13' fill='{_INK}'"
    parts = []
    for panel, (x, y) in zip(drawn, layout.corners, strict=True):
        cells = _cells(panel.tiles, (_MOST_CELLS, _MOST_CELLS))
        columns, rows = cells.size
        if panel.title:
            parts.append(f"<text x='{x}' y='{y - 6}' {text}>{panel.title}</text>")
        parts.append(f"<g transform='translate({x} {y}) scale({layout.panel[0] / columns:.6g} {layout.panel[1] / rows:.6g})'>")
        pixels = cells.tobytes()
        for row in range(rows):
            column = 0
            places = range(3 * row * columns, 3 * (row + 1) * columns, 3)
            for colour, run in itertools.groupby(f"#{pixels[at : at + 3].hex()}" for at in places):
                length = len(list(run))
                parts.append(f"<rect x='{column}' y='{row}' width='{length}' height='1' fill='{colour}'/>")
                column += length
        parts.append("</g>")
    width, height = layout.size
    if alone:
        *names, rest = _legend(plan, len(shown), boxes)
        keys = "".join(
            f"<tspan fill='{colour}'>\u25a0</tspan> {name}  " for colour, name in zip(COLOURS.values(), names, strict=True)
        )
        parts.append(f"<text x='{margin}' y='{height - margin - _LINE}' xml:space='preserve' {text}>{keys}</text>")
        parts.append(f"<text x='{margin}' y='{height - margin}' {text}>{rest}</text>")
    namespace = f" xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'" if alone else ""
    return f"<svg{namespace} viewBox='0 0 {width} {height}' shape-rendering='crispEdges'>{''.join(parts)}</svg>"


def png(plan: TilePlan, batch: int | None = None, head: int | None = None, boxes: str = "") -> bytes:
    """As PNG, with a legend. Where there are more tiles than pixels, a pixel has the mean colour of several."""
    shown = panels(plan, batch, head)
    drawn = shown[:_MOST_PANELS]
    margin = _GAP // 2
    layout = _layout(plan, len(drawn), any(panel.title for panel in shown), True, margin)
    image = Image.new("RGB", layout.size, _PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for panel, (x, y) in zip(drawn, layout.corners, strict=True):
        image.paste(_cells(panel.tiles, layout.panel).resize(layout.panel, Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + layout.panel[0], y + layout.panel[1]), outline=_FRAME)
        pen.text((x, y - _LINE + 2), panel.title, fill=_INK, font=font)
    *names, rest = _legend(plan, len(shown), boxes)
    x, y = margin, layout.size[1] - margin - 2 * _LINE + 8
    for colour, name in zip(COLOURS.values(), names, strict=True):
        pen.rectangle((x, y + 3, x + 10, y + 13), fill=colour, outline=_FRAME)
        pen.text((x + 16, y), name, fill=_INK, font=font)
        x += 16 + round(pen.textlength(name, font=font)) + 14
    pen.text((margin, y + _LINE), rest, fill=_INK, font=font)
    written = io.BytesIO()
    image.save(written, format="PNG")
    return written.getvalue()

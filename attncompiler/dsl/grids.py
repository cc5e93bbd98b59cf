"""Rules of positions in a grid of one to three axes, in row-major order: images and video."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from attncompiler.dsl.masks import Counted, Mask, make_rule, pickled
from attncompiler.dsl.segments import segments
from attncompiler.dsl.sequences import whole
from attncompiler.dsl.term import Positions, equal, larger, smaller
from attncompiler.errors import OptionError
from attncompiler.ir.expr import KV_IDX, Q_IDX


@pickled
def grid(
    shape: Sequence[int], window: int | Sequence[int], stride: int | Sequence[int] = 1, dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Mask:  # fmt: skip
    """(Generalised) neighbourhood attention over a grid of tokens in row-major order, as NATTEN defines it.

    For each axis: `window` keys around the query, shifted at the borders and never shrunk; `stride` queries share the window of
    their leader; with `dilation` each residue class is a grid of its own; `causal` windows end at the query."""
    sizes = _axes_of(shape, "grid")
    each = [_for_each_axis(value, len(sizes), name) for value, name in (
        (window, "window"), (stride, "stride"), (dilation, "dilation"), (causal, "causal"))]  # fmt: skip
    axes: list[tuple[int, int, int, int, int, bool]] = []
    for axis, (length, w, s, d, c) in enumerate(zip(sizes, *each, strict=True)):
        if not (1 <= s <= w and d >= 1 and w * d <= length):
            raise OptionError(
                f"axis {axis} of {length} tokens can't have window {w}, stride {s}, dilation {d}",
                why="1 <= stride <= window and window * dilation <= length must hold",
                do=_grid_advice(length, w, s, d),
            )
        axes.append((math.prod(sizes[axis + 1 :]), length, w, s, d, bool(c)))

    def kept(p: Positions) -> Any:
        seen = [
            _axis_window(p.q // inner % length, p.k // inner % length, length, w, s, d, c) for inner, length, w, s, d, c in axes
        ]
        return reduce(lambda one, other: one & other, seen)

    text = ", ".join(f"{name}={value}" for name, value, default in (
        ("stride", stride, 1), ("dilation", dilation, 1), ("causal", causal, False)) if value != default)  # fmt: skip
    formula = f"grid({sizes}, window={window}{', ' + text if text else ''})"
    return _of_tokens(make_rule(formula, kept), math.prod(sizes), lambda: math.prod([_axis_pairs(*axis[1:]) for axis in axes]))


def _grid_advice(length: int, w: int, s: int, d: int) -> str:
    if min(w, s, d) < 1:
        return "give numbers from 1 on"
    if w * d > length:
        fits = f"a window of at most {length // d}" if d <= length else f"a dilation of at most {length}"
        return f"give {fits}; a window as long as its axis sees all of it"
    return f"give a stride of at most {w}"


def _of_tokens(mask: Mask, tokens: int, count: Callable[[], int]) -> Mask:
    return Counted(mask, {Q_IDX: tokens, KV_IDX: tokens}, count)


def _axis_pairs(length: int, w: int, s: int, d: int, causal: bool) -> int:
    """How many pairs one axis keeps."""
    low, high = _axis_run(torch.arange(length), length, w, s, d, causal)
    return int((high - low).sum())


def _axis_window(i: Any, j: Any, length: int, w: int, s: int, d: int, causal: bool) -> Any:
    low, high = _axis_run(i, length, w, s, d, causal)
    seen = (j // d >= low) & (j // d < high)
    return seen if d == 1 else seen & equal(i % d, j % d)


def _axis_run(i: Any, length: int, w: int, s: int, d: int, causal: bool) -> tuple[Any, Any]:
    """The places [low, high) within the residue class of a query that it sees."""
    place, count = i // d, ((i % d) * -1 + (length + d - 1)) // d  # within the residue class, and the class's length
    last = count - 1
    if causal:
        leader = smaller(place // s * s + (s - 1), last)
        return larger(leader - (w - 1), 0), place + 1
    leader = smaller(place // s * s + s // 2, last)
    low = smaller(larger(leader - w // 2, 0), count - w)
    return low, low + w


def _for_each_axis(value: Any, axes: int, name: str) -> tuple[Any, ...]:
    found = (value,) * axes if not isinstance(value, Sequence) else tuple(value)
    for number in found:
        whole("grid", **{name: number})
    if len(found) != axes:
        raise OptionError(f"{name} has {len(found)} numbers for {axes} axes")
    return found


def _axes_of(shape: Any, rule: str) -> tuple[int, ...]:
    """The lengths of the axes of a grid."""
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    for size in sizes:
        whole(rule, shape=size)
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise OptionError(f"{rule} of {sizes}: one to three axes of one token or more")
    return sizes


@pickled
def halo(shape: Sequence[int], block: int, halo: int) -> Mask:
    """HaloNet: a grid in blocks of `block` tokens a side; each query sees its block and `halo` tokens around it, within the grid.

    Where HaloNet pads the border with zeros and lets these take part, this leaves them out."""
    sizes = _axes_of(shape, "halo")
    whole("halo", block=block, halo=halo)
    if block < 1 or halo < 0:
        raise OptionError(f"halo({sizes}, {block}, {halo}) has a size that can't be")
    axes = [(math.prod(sizes[axis + 1 :]), length) for axis, length in enumerate(sizes)]

    def near(i: Any, j: Any) -> Any:
        first = i // block * block
        return (j >= first - halo) & (j < first + block + halo)

    def kept(p: Positions) -> Any:
        seen = [near(p.q // inner % length, p.k // inner % length) for inner, length in axes]
        return reduce(lambda one, other: one & other, seen)

    def count() -> int:
        total = 1
        for length in sizes:
            i = torch.arange(length)
            total *= int(near(i[:, None], i[None, :]).sum())
        return total

    return _of_tokens(make_rule(f"halo({sizes}, block={block}, halo={halo})", kept), math.prod(sizes), count)


@pickled
def radial(frames: int, frame: int, tokens: int | None = None, *, block: int = 128, decay: float = 1.0, sink: bool = True) -> Mask:
    """Radial attention over `frames` frames of `frame` video tokens, text or padding after them up to `tokens`.

    Bands between frames narrow as their distance grows, far pairs thin out, `sink`: all see the first frame. Blocks of `block`
    tokens are kept whole or not at all, by the rule of the authors' code; `tokens` must be a multiple of `block`."""
    tokens = tokens or frames * frame
    if min(frames, frame, block) < 1 or tokens < frames * frame or tokens % block:
        why = f"{frames} frames of {frame} tokens in {tokens} tokens, blocks of {block}"
        raise OptionError("radial takes whole blocks that hold all frames", why=why)
    pattern = _radial_blocks(frames, frame, tokens // block, block, decay, sink)
    text = f"radial({frames}, {frame}{f', {tokens}' if tokens > frames * frame else ''}, block={block}, decay={decay}, sink={sink})"
    whole_blocks = make_rule(text, lambda p: p.captured["pattern"][p.q // block, p.k // block], pattern=pattern)
    return _of_tokens(whole_blocks, tokens, lambda: int(pattern.sum()) * block * block)


def _radial_blocks(frames: int, frame: int, blocks: int, block: int, decay: float, sink: bool) -> Tensor:
    """Which blocks are kept, bool [blocks, blocks]: where over 0.6 of the columns that a band meets are over a third full."""
    found = torch.zeros(blocks, blocks, dtype=torch.bool)
    video, side = frames * frame // block, -(-frame // block)
    found[video:] = True
    found[:, video:] = True
    for i in range(frames):
        for j in range(frames):
            width = _radial_width(abs(i - j), frame, block, decay, sink and j == 0)
            if width is None:
                continue
            top, left = i * frame // block, j * frame // block
            rows = torch.arange(top, top + side) * block - i * frame
            columns = torch.arange(left * block, (left + side) * block) - j * frame
            first = torch.maximum(rows[:, None].clamp(min=0), (columns - width)[None])
            last = torch.minimum((rows[:, None] + block).clamp(max=frame), (columns + width + 1)[None])
            full = (last - first).clamp(min=0) * ((columns >= 0) & (columns < frame))
            full = full.view(side, side, block)
            kept = (full * 3 > block).sum(-1) > 0.6 * (full > 0).sum(-1)
            found[top : top + side, left : left + side] |= kept[: blocks - top, : blocks - left]
    return found


def _radial_width(distance: int, frame: int, block: int, decay: float, seen_by_all: bool) -> int | None:
    """Half the width of the band between two frames; None where the pair is left out."""
    if distance == 0 or seen_by_all:
        return frame
    span = 2.0 ** (frame.bit_length() - distance.bit_length())
    if span < 128 and distance % int(128 / span) != 0:
        return None
    return frame if distance == 1 else math.floor(max(span * decay, block))


@pickled
def disc(shape: Sequence[int], radius: int, text: int = 0) -> Mask:
    """CLEAR: image tokens on a grid [rows, columns] nearer than `radius` (strictly, Euclidean).

    `text` tokens come first; they see all and are seen by all."""
    sizes = _axes_of(shape, "disc")
    whole("disc", radius=radius, text=text)
    if len(sizes) != 2:
        raise OptionError(f"disc of {sizes}", do="give the grid as (rows, columns)")
    rows, columns = sizes
    if radius < 1 or text < 0:
        raise OptionError(f"disc({(rows, columns)}, {radius}, {text}) has a size below 1")

    def kept(p: Positions) -> Any:
        down, across = p.q // columns - p.k // columns, p.q % columns - p.k % columns
        return down * down + across * across < radius * radius

    def count() -> int:
        down, across = torch.arange(-rows + 1, rows)[:, None], torch.arange(-columns + 1, columns)
        pairs = (rows - down.abs()) * (columns - across.abs()) * (down * down + across * across < radius * radius)
        return int(pairs.sum())

    image = _of_tokens(make_rule(f"disc({(rows, columns)}, {radius})", kept), rows * columns, count)
    return image if text == 0 else segments({"text": text, "image": rows * columns}, {("image", "image"): image})

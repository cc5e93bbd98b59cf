"""What makes the scores of a partial tile -inf outside `keep` and outside the tensors.

In plain Triton that is a `where` of all tests. On Hopper it is what a masked tile spends most instructions on, beside its
exponentials: LLVM makes vectors of the truth values, packs them into bits and takes these apart again, and no longer joins the scale
and the subtraction of the maximum. There comparisons of integers go into one short piece of assembly, a comparison each and one
selection, and what a box tests along its axes is one comparison: a window is a difference without sign, and the tests along the
other axes, of which a thread has few, empty it. Of tiles that are runs of tokens most of the mask is bits (kept_bits.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attncompiler.codegen.emission import Emission
from attncompiler.codegen.kept_bits import ORDERS, Columns, are_bits, bit, bits, is_int32
from attncompiler.codegen.positions import Window
from attncompiler.codegen.triton_expr import Names, triton
from attncompiler.ir.expr import KV_IDX, Q_IDX, TRUE, Apply, Axis, Expr, Size, conj, conjuncts, sub, walk, with_axis_alone
from attncompiler.ir.program import Empty
from attncompiler.passes.grid import grid_rule
from attncompiler.passes.plan import keeps_only_keys


@dataclass(frozen=True)
class _Comparison:
    """A test of 32-bit integers, as source over a tile."""

    left: str
    op: str
    right: str
    signed: bool = True

    def assembly(self, place: int) -> str:
        """The test as the `place`-th of several, all of which p then says."""
        kind = "s32" if self.signed else "u32"
        return _joined(place, f"setp.{self.op}", kind, f"${2 * place + 1}, ${2 * place + 2}")


@dataclass(frozen=True)
class _BitTest:
    """Whether `left`, a word, has the bit `right`."""

    left: str
    right: str

    def assembly(self, place: int) -> str:
        return f"and.b32 t, ${2 * place + 1}, ${2 * place + 2}; {_joined(place, 'setp.ne', 'b32', 't, 0')}"


def _joined(place: int, op: str, kind: str, sides: str) -> str:
    joined, rest = (".and", ", p") if place else ("", "")
    return f"{op}{joined}.{kind} p, {sides}{rest};"


def kept_scores(e: Emission, names: Names, kernel: str, within: str = "") -> str:
    """Lines that change `scores`, the tile of one kernel; "" where nothing of it can lie outside. `within`: the variable that counts
    the columns of a tile, in kernels with warp roles."""
    windows: Sequence[Window] = ()
    in_boxes = bool(e.schedule.of(kernel).tiles)
    if in_boxes:
        windows, parts, end = _in_grid(e, names, kernel)
    else:
        parts, end = _in_a_row(e, kernel)
    if end:
        parts = (*parts, Apply("lt", (KV_IDX, Size("N"))))
    if not e.has_warp_roles(kernel):
        return _where([*(window.text for window in windows), *(triton(part, names) for part in parts)])
    found: list[_Comparison | _BitTest] = []
    if not in_boxes:
        parts, found = _as_bits(e, names, kernel, parts, within)
    others = []
    for part in parts:
        if _is_comparison(part, e):
            assert isinstance(part, Apply)
            left, right = (triton(arg, names) for arg in part.args)
            found.append(_Comparison(left, part.op, right))
        else:
            others.append(triton(part, names))
    return "\n".join(filter(None, [_where(others), _selected([*found, *_in_one(windows)])]))


def _as_bits(
    e: Emission, names: Names, kernel: str, parts: tuple[Expr, ...], within: str
) -> tuple[tuple[Expr, ...], list[_Comparison | _BitTest]]:
    """The parts that are left, and those that are bits of one word."""
    schedule = e.schedule.of(kernel)
    axis, width = (Q_IDX, schedule.block_m) if names.transposed else (KV_IDX, schedule.block_n)
    starts = [f"{axis.name.removesuffix('_idx')}_start", *(["second_start"] if schedule.pairs else [])]
    tiles = [Columns(axis, start, f"{within}{names.along(axis.name)}", width) for start in starts]
    solved = {part: with_axis_alone(part, axis) for part in parts}
    chosen = [part for part in parts if are_bits(tiles[0].alike(solved[part]), axis, e)]
    rest = tuple(part for part in parts if part not in chosen)
    if not schedule.pairs:
        beside_others = len(chosen) == 1 and any(_is_comparison(part, e) for part in rest)
        in_backward = kernel != "attention_forward"  # which does not wait for instructions, and has no register to spare
        if not chosen or ((beside_others or in_backward) and all(_is_comparison(part, e) for part in chosen)):
            return parts, []
    words = [" & ".join(bits(columns.alike(solved[part]), columns, names) for part in chosen) or "-1" for columns in tiles]
    word = words[0]
    if schedule.pairs:
        word = f"(({words[0]}) & {(1 << width // 4) - 1}) | (tl.where(second >= 0, {words[1]}, 0) << {width // 4})"
    return rest, [_BitTest(word, bit(tiles[0], names))]


def _where(tests: Sequence[str]) -> str:
    return f'scores = tl.where({" & ".join(tests)}, scores, float("-inf"))' if tests else ""


def _selected(tests: Sequence[_Comparison | _BitTest]) -> str:
    """The scores where all tests hold."""
    if not tests:
        return ""
    count = 2 * len(tests)
    found = " ".join(test.assembly(place) for place, test in enumerate(tests))
    word = " .reg .b32 t;" if any(isinstance(test, _BitTest) for test in tests) else ""
    assembly = f"{{ .reg .pred p;{word} {found} selp.f32 $0, ${count + 1}, 0fFF800000, p; }}"
    constraints = ",".join(["=f", *["r"] * count, "f"])
    sides = ", ".join(side for test in tests for side in (test.left, test.right))
    return (
        f'scores = tl.inline_asm_elementwise("{assembly}", "{constraints}", [{sides}, scores], dtype=tl.float32, '
        "is_pure=True, pack=1)"
    )


def _in_one(windows: Sequence[Window]) -> list[_Comparison]:
    """All windows as one comparison, along the axis of which a thread has most places."""
    if not windows:
        return []
    widest = max(windows, key=lambda window: window.side)
    length = f"({widest.last} - {widest.first})"
    others = " & ".join(window.text for window in windows if window is not widest)
    return [
        _Comparison(f"({widest.place} - {widest.first})", "lt", f"tl.where({others}, {length}, 0)" if others else length, False)
    ]


def _in_a_row(e: Emission, kernel: str) -> tuple[tuple[Expr, ...], bool]:
    """The parts of the predicate; and whether the end of the keys is to be looked at."""
    keep, axes = e.program.keep, e.program.axes
    if keep.predicate == TRUE or keep.empty is Empty.SCORE:
        return (), True
    ends = e.whole_key_tiles(kernel) or keeps_only_keys(keep.predicate, axes.q_idx, axes.kv_idx)
    return conjuncts(with_axis_alone(keep.predicate, KV_IDX)), not ends


def _in_grid(e: Emission, names: Names, kernel: str) -> tuple[Sequence[Window], tuple[Expr, ...], bool]:
    """The same in a grid: a window along each axis, then what else the predicate demands. Windows lie within the grid."""
    predicate = e.program.keep.predicate
    stays, moves = sorted(e.positions(kernel), key=lambda positions: positions.moves)
    rule = grid_rule(predicate, math.prod(axis.length for axis in stays.tiles.axes))
    assert rule is not None
    is_finite = e.program.keep.empty is Empty.SCORE
    windows = [] if is_finite else stays.windows(moves, names.along)
    others = TRUE if is_finite else with_axis_alone(conj(rule.across, rule.rest), KV_IDX)
    parts = tuple(_apart(part) for part in conjuncts(others)) if others != TRUE else ()
    keys_may_stick_out = moves.axis == KV_IDX and not moves.tiles.inside
    tested = (windows or parts) and all(axis.has_window for axis in moves.tiles.axes)
    return windows, parts, keys_may_stick_out and not tested


def _apart(part: Expr) -> Expr:
    """dy * dy + dx * dx < 256 as dy * dy < 256 - dx * dx: of each side a thread has few values."""
    if not (isinstance(part, Apply) and part.op in ("lt", "le", "gt", "ge")):
        return part
    total, limit = part.args
    if not (isinstance(total, Apply) and total.op == "add"):
        return part
    one, other = total.args
    if not (_places(one) and _places(other)) or _places(one) & _places(other):
        return part
    return Apply(part.op, (one, sub(limit, other)))


def _places(expr: Expr) -> frozenset[str]:
    """The axes of the grid that an expression of coordinates speaks of."""
    return frozenset(node.name.rpartition("_")[2] for node in walk(expr) if isinstance(node, Axis))


def _is_comparison(part: Expr, e: Emission) -> bool:
    """True for a comparison of what kernels compute in 32-bit integers."""
    return isinstance(part, Apply) and part.op in ORDERS and all(is_int32(arg, e) for arg in part.args)

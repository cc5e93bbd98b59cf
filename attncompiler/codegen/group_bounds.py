"""Whether a tile keeps a pair in the rows of one group, as source for the Hopper kernels: bounds of the mask over both."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from attncompiler.codegen.emission import Emission, halved
from attncompiler.codegen.positions import TilePositions
from attncompiler.codegen.tile_bounds import EndBounds, FlatNames
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.expr import KV_IDX, Q_IDX, Axis, Expr, conjuncts, substitute, walk
from attncompiler.ir.program import Empty
from attncompiler.passes.grid import coordinate, grid_rule


@dataclass(frozen=True)
class GroupTest:
    """`row_lines` are of a row of tiles, `lines` of a tile; `may`: the tile may keep a pair of the group's rows ("": always)."""

    row_lines: str = ""
    lines: str = ""
    may: str = ""


def group_test(e: Emission, stays: TilePositions, moves: TilePositions, row_start: str, tile_start: str, tile: int) -> GroupTest:
    """For a group PART that has 64 rows, half a tile, of the side that stays. `row_start` and `tile_start`: the first token of
    either, where tiles are runs of tokens; `tile`: the tokens of one that moves."""
    if e.program.keep.empty is Empty.SCORE:
        return GroupTest()
    parts = _in_coordinates(e, stays)
    row_ends = _box_ends(stays, "PART") if stays.tiles else _run_ends(stays.axis, row_start, 64)
    tile_ends = _box_ends(moves, "") if moves.tiles else _run_ends(moves.axis, tile_start, tile)
    names = FlatNames(e.program, {}, bounds=frozenset(), helpers=e.helpers)
    ends: dict[Expr, str] = {axis: axis.name for axis in (*row_ends, *tile_ends)}
    bounds = EndBounds(e.program, stays.axis.name, moves.axis.name, {}, names, names, ends=ends)
    tests = []
    for part in parts:
        if not any(node in row_ends for node in walk(part)) or not any(node in tile_ends for node in walk(part)):
            continue
        written = len(bounds.lines)
        try:
            tests.append(f"({bounds(part).hi})")
        except UnsupportedProgram:
            del bounds.lines[written:]
    if not tests:
        return GroupTest()
    row_lines, lines = ([line for each in ends.values() for line in each] for ends in (row_ends, tile_ends))
    may = " & ".join(tests)
    return GroupTest("\n".join(row_lines), "\n".join(_read([*lines, *bounds.lines], may)), may)


def _read(lines: list[str], result: str) -> list[str]:
    """The assignments that `result` depends on: bounds come in pairs, of which mostly one is asked for."""
    kept: list[str] = []
    for line in reversed(lines):
        name = line.split(" = ")[0]
        if any(re.search(rf"\b{name}\b", text) for text in (result, *kept)):
            kept.append(line)
    return kept[::-1]


def _in_coordinates(e: Emission, stays: TilePositions) -> list[Expr]:
    """The conjuncts of the mask that speak of nothing but positions, in the coordinates of the tiles."""
    predicate = e.program.keep.predicate
    if not stays.tiles:
        return list(conjuncts(predicate))
    rule = grid_rule(predicate, math.prod(axis.length for axis in stays.tiles.axes))
    assert rule is not None
    parts = [
        substitute(part, {axis: coordinate(axis, place) for axis in (Q_IDX, KV_IDX)})
        for place, demand in enumerate(rule.along)
        for part in conjuncts(demand)
    ]
    return [*parts, *conjuncts(rule.across)]


def _run_ends(axis: Axis, start: str, length: int) -> Mapping[Axis, list[str]]:
    return {axis: [f"{axis.name}_lo = {start}", f"{axis.name}_hi = {axis.name}_lo + {length - 1}"]}


def _box_ends(positions: TilePositions, part: str) -> Mapping[Axis, list[str]]:
    """The ends of a box along each axis; of half of one for the group `part`."""
    sides = positions.tiles.columns if positions.moves else positions.tiles.rows
    lengths = halved(sides) if part else sides
    found: dict[Axis, list[str]] = {}
    for place, (axis, start, side, length) in enumerate(zip(positions.tiles.axes, positions.at(""), sides, lengths, strict=True)):
        name = coordinate(positions.axis, place).name
        own = f" + {part} * {length * axis.dilation}" if length < side else ""
        found[coordinate(positions.axis, place)] = [
            f"{name}_lo = {start}{own}",
            f"{name}_hi = {name}_lo + {(length - 1) * axis.dilation}",
        ]
    return found

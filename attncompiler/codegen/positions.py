"""The positions of a tile's tokens as source: a run of tokens, or a box of a grid (passes/grid.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from attncompiler.ir.expr import Axis, Expr
from attncompiler.passes.grid import NAMES, GridAxis, GridTiles, coordinate, coordinates


@dataclass(frozen=True)
class Window:
    """A test: `first` <= `place` < `last`, as source over a tile; `side`: how many places a tile has along this axis."""

    place: str
    first: str
    last: str
    side: int

    @property
    def text(self) -> str:
        return f"({self.place} >= {self.first}) & ({self.place} < {self.last})"


@dataclass(frozen=True)
class TilePositions:
    """How a kernel finds the tokens of its tiles along `axis`. `moves`: these tiles come one after the other, from an origin that
    the plan gives for each row; else there is one for each program."""

    axis: Axis
    tiles: GridTiles
    moves: bool

    @property
    def _stem(self) -> str:
        return self.axis.name.removesuffix("_idx")

    @property
    def _letters(self) -> str:
        return NAMES[len(NAMES) - len(self.tiles.axes) :]

    @property
    def _sides(self) -> tuple[int, ...]:
        return self.tiles.columns if self.moves else self.tiles.rows

    def lines(self, tile: str, start: str, within: str) -> str:
        """What computes the positions. `tile` is the tile's number, `start` its first token where tiles are runs of tokens;
        `within` counts the tokens of the tile. Positions outside the grid are set past the end of the axis."""
        if not self.tiles:
            return f"{self.axis.name} = {start} + {within}"
        stem, end = self._stem, "M" if self.axis.name == "q_idx" else "N"
        found = self.corner(tile).splitlines()
        inner = math.prod(self._sides)
        total = ""
        for letter, axis, side in zip(self._letters, self.tiles.axes, self._sides, strict=True):
            inner //= side
            place = _digit(within, inner, side, inner * side == math.prod(self._sides)) if side > 1 else f"{within} * 0"
            step = f" * {axis.dilation}" if axis.dilation > 1 else ""
            found.append(f"{stem}_{letter} = {stem}_{letter}_start + {place}{step}")
            total = f"({total}) * {axis.length} + {stem}_{letter}" if total else f"{stem}_{letter}"
        found.append(f"{self.axis.name} = {total}")
        tests = self._inside_tests()
        if not self.moves:
            found += self.window_loads.splitlines()
        if tests:
            inside = " & ".join(tests)
            found.append(f"{self.axis.name} = tl.where({inside}, {self.axis.name}, {end})  # in the grid, or past the end")
        return "\n".join(found)

    def corner(self, tile: str) -> str:
        """What computes where a box begins."""
        numbers = [axis.reach if self.moves else axis.row_tiles for axis in self.tiles.axes]
        steps = self.tiles.steps if self.moves else tuple(math.prod(numbers[place + 1 :]) for place in range(len(numbers)))
        found = []
        for letter, axis, number, step, side in zip(self._letters, self.tiles.axes, numbers, steps, self._sides, strict=True):
            digit = _digit(tile, step, number, step * number == math.prod(numbers))
            if self.moves:
                start = f"origin_{letter} + {digit} * {side * axis.dilation}"
            elif axis.dilation > 1:
                of_class = axis.row_tiles // axis.dilation
                start = f"({digit}) // {of_class} + ({digit}) % {of_class} * {side * axis.dilation}"
            else:
                start = f"{digit} * {side}"
            found.append(f"{self._stem}_{letter}_start = {start}")
        return "\n".join(found)

    def at(self, start: str) -> tuple[str, ...]:
        """Where a descriptor loads a tile from, along the axes of tokens."""
        return tuple(f"{self._stem}_{letter}_start" for letter in self._letters) if self.tiles else (start,)

    def _inside_tests(self) -> list[str]:
        found = []
        for letter, axis in zip(self._letters, self.tiles.axes, strict=True):
            name = f"{self._stem}_{letter}"
            if self.moves and not self.tiles.inside:
                found += [f"({name} >= 0)", f"({name} < {axis.length})"]
            elif not self.moves and axis.length % (axis.dilation * axis.rows):
                found.append(f"({name} < {axis.length})")
        return found

    @property
    def names(self) -> Mapping[Expr, tuple[str, str]]:
        """The coordinates in expressions: every spelling, and the variable and axis that it is."""
        lengths = tuple(axis.length for axis in self.tiles.axes)
        return {
            spelling: (f"{self._stem}_{letter}", self.axis.name)
            for place, (letter, spellings) in enumerate(zip(self._letters, coordinates(self.axis, lengths), strict=True))
            for spelling in (*spellings, coordinate(self.axis, place))
        }

    @property
    def _windows(self) -> list[tuple[str, GridAxis, int]]:
        """Of the axes with windows: letter, axis, and where its windows begin in the table."""
        found, begin = [], 0
        for letter, axis in zip(self._letters, self.tiles.axes, strict=True):
            if axis.has_window:
                found.append((letter, axis, begin))
                begin += axis.length
        return found

    @property
    def window_loads(self) -> str:
        """What loads the windows of the tile that stays."""
        lines = []
        for letter, axis, begin in self._windows:
            name = f"{self._stem}_{letter}"
            whole = axis.length % (axis.dilation * axis.rows) == 0
            guard = "" if whole else f", mask={name} < {axis.length}, other=0"
            at = f"Windows + ({name}{f' + {begin}' if begin else ''}) * 2"
            lines += [f"{name}_first = tl.load({at}{guard})", f"{name}_last = tl.load({at} + 1{guard})"]
        return "\n".join(lines)

    def windows(self, moving: TilePositions, along: Callable[[str], str]) -> list[Window]:
        """Where a token of the side that moves lies in the windows of one that stays. `along` lays a vector across a tile."""
        found = []
        for letter, axis, _ in self._windows:
            first, last = (f"{self._stem}_{letter}_{end}{along(self.axis.name)}" for end in ("first", "last"))
            found.append(Window(f"{moving._stem}_{letter}{along(moving.axis.name)}", first, last, axis.columns))
        return found

    @property
    def origins(self) -> str:
        """What loads where the boxes of a row begin."""
        count = len(self.tiles.axes)
        row = "Origins + plan_row" + (f" * {count}" if count > 1 else "")
        return "\n".join(
            f"origin_{letter} = tl.load({row}{f' + {place}' if place else ''})" for place, letter in enumerate(self._letters)
        )


def _digit(number: str, inner: int, size: int, outermost: bool) -> str:
    """A digit of a number in mixed radix."""
    if size == 1:
        return "0"
    text = f"{number} // {inner}" if inner > 1 else number
    return text if outermost else f"{text} % {size}"

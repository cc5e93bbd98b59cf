"""Which stride makes a neighbourhood block-sparse: what every stride of a grid would leave to visit, without planning any.

A stride lets that many queries share the window of their leader. Where it fits the tiles no tile is partial, and a mask is worth by
tiles what it is worth by pairs. Everything is a product over axes, so each axis is looked at once for each of its strides.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attncompiler.errors import OptionError
from attncompiler.ir.expr import KV_IDX, Q_IDX, TRUE, Expr
from attncompiler.passes.grid import PARTIAL, GridRule
from attncompiler.passes.mask_rules import neighbourhood
from attncompiler.passes.tile_counts import AxisTiles, Sides, TileCounts, axis_boxes, axis_tiles, kept_in_grid, separable, shapes_of
from attncompiler.tuning.speed_of_light import Boxes


@dataclass(frozen=True)
class AxisWindow:
    """One axis of a grid, as `masks.grid` takes it."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    @property
    def demand(self) -> Expr:
        """On the coordinates of this axis."""
        if self.window == self.length and not self.causal:
            return TRUE
        return neighbourhood(Q_IDX, KV_IDX, self.length, self.window, self.stride, self.dilation, self.causal)

    def strides(self) -> tuple[int, ...]:
        """Those worth a look: 1, the window's own, powers of two, and divisors of the window and of the axis."""
        if self.demand == TRUE:
            return (1,)
        places = -(-self.length // self.dilation)
        fitting = (s for s in range(1, self.window + 1) if not (s & (s - 1) and self.window % s and places % s))
        return tuple(fitting)


@functools.lru_cache(maxsize=512)
def neighbourhood_of(predicate: Expr, tokens: int) -> tuple[AxisWindow, ...] | None:
    """The windows and strides of a predicate, for each axis of its grid; None where it is no `masks.grid`."""
    rule = separable(predicate, tokens)
    if rule is None:
        return None
    found = [_axis_window(demand, length) for demand, length in zip(rule.along, rule.lengths, strict=True)]
    windows = tuple(window for window in found if window is not None)
    return windows if len(windows) == len(found) else None


def _axis_window(demand: Expr, length: int) -> AxisWindow | None:
    """By comparing what every place meets with what it would by the rule."""
    met = axis_boxes(demand, length, 1)
    assert met is not None
    begin, end = met.start[0], met.stop[0]
    causal = demand != TRUE and torch.equal(end, torch.arange(1, len(end) + 1))
    window = int((end - begin).max())
    if not 1 <= window * met.dilation <= length:
        return None
    moves = (begin[1:] != begin[:-1]).nonzero().squeeze(1)
    widest = int((moves[1:] - moves[:-1]).max()) if moves.numel() > 1 else window
    for stride in dict.fromkeys([1, min(widest, window), *range(1, window + 1)]):
        guess = AxisWindow(length, window, stride, met.dilation, causal)
        again = axis_boxes(guess.demand, length, 1)
        if again is not None and again.dilation == met.dilation and torch.equal(again.start, met.start):
            if torch.equal(again.stop, met.stop):
                return guess
    return None


@dataclass(frozen=True)
class Stride:
    """What a stride leaves to do, in the best shape of tiles. `counts` and `kept_pairs` are of one head."""

    stride: Sides
    boxes: Boxes
    counts: TileCounts
    kept_pairs: int

    @property
    def is_full(self) -> bool:
        """True where no tile is partial."""
        return self.counts.partial == 0


def strides_of(
    axes: Sequence[AxisWindow], shapes: Sequence[Boxes], on_lattice: bool, strides: Sequence[Sides] | None = None
) -> list[Stride]:
    """What each stride leaves to do, in that one of `shapes` that leaves least. `strides`: those of each axis to combine.

    Shapes: those of `shapes_of`, which kernels choose from by the same measure; or one that is given."""
    choices = [axis.strides() for axis in axes] if strides is None else strides
    found = []
    tables = [_AxisTable(axis, place, shapes, on_lattice) for place, axis in enumerate(axes)]
    for stride in itertools.product(*choices):
        along = [table.of(s) for table, s in zip(tables, stride, strict=True)]
        visited, full = (math.prod((each[i] for each in along), start=torch.ones((), dtype=torch.int64)) for i in range(2))
        cost = full + PARTIAL * (visited - full)
        boxes = shapes[int((cost == cost.min()).nonzero()[0])]
        found.append(_stride(axes, stride, boxes, on_lattice))
    return found


class _AxisTable:
    """Tiles visited and full along one axis in every shape, int64 [shapes], for one stride after the other."""

    def __init__(self, axis: AxisWindow, place: int, shapes: Sequence[Boxes], on_lattice: bool) -> None:
        self.axis, self.on_lattice = axis, on_lattice
        self.sides = [(rows[place], columns[place]) for rows, columns in shapes]
        self.known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
        if stride not in self.known:
            demand = replace(self.axis, stride=stride).demand
            tiles = {sides: _tiles(demand, self.axis.length, sides, self.on_lattice) for sides in set(self.sides)}
            visited = torch.tensor([tiles[sides].visited for sides in self.sides])
            self.known[stride] = visited, torch.tensor([tiles[sides].full for sides in self.sides])
        return self.known[stride]


def _tiles(demand: Expr, length: int, sides: tuple[int, int], on_lattice: bool) -> AxisTiles:
    found = axis_tiles(demand, length, *sides, on_lattice)
    assert found is not None
    return found


def _stride(axes: Sequence[AxisWindow], stride: Sides, boxes: Boxes, on_lattice: bool) -> Stride:
    strided = [replace(axis, stride=s) for axis, s in zip(axes, stride, strict=True)]
    rule = GridRule(tuple(axis.length for axis in axes), tuple(axis.demand for axis in strided), TRUE, TRUE)
    return Stride(stride, boxes, grid_counts(rule, *boxes, on_lattice), kept_in_grid(rule))

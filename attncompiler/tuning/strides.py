"""Which stride makes a neighbourhood block-sparse: what every stride of a grid would leave to visit, without planning any.

A stride lets that many queries share the window of their leader. Where it fits the tiles no tile is partial, and a mask is worth by
tiles what it is worth by pairs. Everything is a product over axes, so each axis is looked at once for each of its strides.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

from attncompiler.ir.expr import KV_IDX, Q_IDX, TRUE, Expr
from attncompiler.passes.grid import PARTIAL, GridRule, along_axis
from attncompiler.passes.mask_rules import neighbourhood
from attncompiler.passes.tile_counts import Sides, TileCounts, axis_tiles, kept_in_grid, separable, shapes_of
from attncompiler.tuning.speed_of_light import Boxes, sides_text


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
    met = along_axis(demand, length, 1)
    assert met is not None
    begin, end = met.start[0], met.stop[0]
    places = torch.arange(len(begin))
    window = int((end - begin).max())
    if window * met.dilation > length or bool(((places < begin) | (places >= end)).any()):  # a query always sees itself
        return None
    causal = demand != TRUE and torch.equal(end, places + 1)
    moves = ((begin[1:] != begin[:-1]).nonzero().squeeze(1) + 1).tolist()  # windows move where a group begins
    for stride in range(1, window + 1):
        if math.gcd(*moves) % stride == 0:
            guess = AxisWindow(length, window, stride, met.dilation, causal)
            again = along_axis(guess.demand, length, 1)
            if again is not None and torch.equal(again.start, met.start) and torch.equal(again.stop, met.stop):
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


def strides_of(axes: Sequence[AxisWindow], shapes: Sequence[Boxes], on_lattice: bool) -> list[Stride]:
    """What each combination of the axes' strides leaves to do, in that one of `shapes` that leaves least.

    Shapes: those of `shapes_of`, from which kernels choose by the same measure; or one that is given."""
    tables = [_AxisTable(axis, place, shapes, on_lattice) for place, axis in enumerate(axes)]
    found = []
    for stride in itertools.product(*(axis.strides() for axis in axes)):
        along = [table.of[s] for table, s in zip(tables, stride, strict=True)]
        rows, visited, full, worst = (
            functools.reduce(torch.mul, each) for each in zip(*(tiles for tiles, _ in along), strict=True)
        )
        cost = full + PARTIAL * (visited - full)
        best = int((cost == cost.min()).nonzero()[0])
        queries, keys = shapes[best]
        counts = TileCounts(math.prod(queries), math.prod(keys), *(int(each[best]) for each in (rows, visited, full, worst)))
        found.append(Stride(stride, shapes[best], counts, math.prod(kept for _, kept in along)))
    return found


class _AxisTable:
    """One axis under one stride after the other."""

    def __init__(self, axis: AxisWindow, place: int, shapes: Sequence[Boxes], on_lattice: bool) -> None:
        self.axis, self.on_lattice = axis, on_lattice
        self.sides = [(rows[place], columns[place]) for rows, columns in shapes]
        self.of = {stride: self._of(replace(axis, stride=stride).demand) for stride in axis.strides()}

    def _of(self, demand: Expr) -> tuple[tuple[torch.Tensor, ...], int]:
        """Rows, and tiles visited, full and of the worst row, in every shape, int64 [shapes] each; and how many pairs are kept."""
        tiles = {sides: _tiles(demand, self.axis.length, sides, self.on_lattice) for sides in set(self.sides)}
        listed = tuple(torch.tensor([tiles[sides] for sides in self.sides]).T)
        return listed, kept_in_grid(GridRule((self.axis.length,), (demand,), TRUE, TRUE))


def _tiles(demand: Expr, length: int, sides: tuple[int, int], on_lattice: bool) -> tuple[int, ...]:
    found = axis_tiles(demand, length, *sides, on_lattice)
    assert found is not None
    return astuple(found)


def smallest_full(strides: Sequence[Stride]) -> tuple[Sides, ...]:
    """The strides that leave no partial tile, without those that another one of them is nowhere above."""
    full = [each.stride for each in strides if each.is_full]

    def is_least(stride: Sides) -> bool:
        return not any(other != stride and all(a <= b for a, b in zip(other, stride, strict=True)) for other in full)

    return tuple(stride for stride in full if is_least(stride))


@functools.lru_cache(maxsize=512)
def full_strides(
    predicate: Expr, tokens: int, rows: int, columns: int, on_lattice: bool = False, boxes: Boxes | None = None
) -> tuple[Sides, ...]:
    """The smallest strides with which no tile of `rows` queries and `columns` keys is partial, where kernels have their tiles or on
    a fixed lattice, in the best shape for each stride or in `boxes`; () where the mask is no neighbourhood, or no stride does."""
    axes = neighbourhood_of(predicate, tokens)
    if axes is None or (len(axes) == 1 and axes[0].causal):  # the diagonal of a row of tokens
        return ()
    shapes, in_a_row = tilings(axes, rows, columns)
    return smallest_full(strides_of(axes, [boxes] if boxes else shapes, on_lattice or in_a_row))


def tilings(axes: Sequence[AxisWindow], rows: int, columns: int) -> tuple[list[Boxes], bool]:
    """The shapes of tiles of so many queries and keys that kernels choose from, and whether these lie on a lattice, as those of
    tokens in a row do."""
    return shapes_of(tuple(axis.length for axis in axes), rows, columns), len(axes) == 1 and axes[0].dilation == 1


_MOST_NAMED = 4


def strides_text(strides: Sequence[Sides]) -> str:
    """The first of them; "-" for none."""
    ordered = sorted(strides, key=lambda stride: (max(stride), stride))
    more = f" and {len(strides) - _MOST_NAMED} more" if len(strides) > _MOST_NAMED else ""
    return ", ".join(map(sides_text, ordered[:_MOST_NAMED])) + more or "-"

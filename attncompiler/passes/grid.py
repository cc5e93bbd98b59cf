"""Tokens that lie in a grid of up to three axes: which axes a predicate speaks of, tiles that are boxes of it, and their plan.

A row of tiles is one box of the side that stays (queries; keys in the backward for keys). What it meets of the other side is a box
too, cut into tiles from where that box begins: `origins`, one place a row. So a window of 24 x 32 tokens is 6 tiles of 8 x 16
wherever it lies. Nothing is permuted in memory: kernels compute positions from tile numbers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.ir.evaluate import whole
from attncompiler.ir.expr import (
    KV_IDX,
    Q_IDX,
    TRUE,
    Apply,
    Axis,
    Const,
    Expr,
    Size,
    add,
    conj,
    conjuncts,
    floordiv,
    mul,
    reads_of,
    substitute,
    transform,
    walk,
)
from attncompiler.passes.intervals import Interval, bounds
from attncompiler.passes.spans import spans

NAMES = "tyx"  # of the axes, the last one being that of neighbouring tokens
_MOST_AXES = 3
_MOST_DIVISORS = 8  # of positions, that are tried as steps of a grid


@dataclass(frozen=True, slots=True)
class GridAxis:
    """One axis of the grid, and a tile's share of it. Neighbours within a tile are `dilation` tokens apart."""

    length: int
    dilation: int
    rows: int  # positions of a tile of the side that stays, along this axis: a power of two
    columns: int  # of a tile of the other side
    reach: int  # how many of these a row can meet along this axis
    has_window: bool  # each position of the side that stays meets one run of the other's, [first, last) of the plan's windows

    @property
    def places(self) -> int:
        """Positions of a residue class; some classes may have one less."""
        return -(-self.length // self.dilation)

    @property
    def row_tiles(self) -> int:
        return self.dilation * -(-self.places // self.rows)


@dataclass(frozen=True, slots=True)
class GridTiles:
    """Tiles as boxes of a grid. Without axes: tiles are runs of tokens. `inside`: no tile of the side that moves sticks out of the
    grid. `halves`: each half of a tile of rows leaves out what the other alone needs."""

    axes: tuple[GridAxis, ...] = ()
    inside: bool = True
    halves: bool = False

    def __bool__(self) -> bool:
        return bool(self.axes)

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of a tile of the side that stays."""
        return tuple(axis.rows for axis in self.axes)

    @property
    def columns(self) -> tuple[int, ...]:
        """The shape of a tile of the side that moves."""
        return tuple(axis.columns for axis in self.axes)

    @property
    def row_tiles(self) -> int:
        return math.prod(axis.row_tiles for axis in self.axes)

    @property
    def steps(self) -> tuple[int, ...]:
        """Along each axis, how much higher the number of the next tile of a row's box is: tokens that are neighbours in memory come
        first. With `halves` the axis that parts these does: what one half alone needs, what both need and what the other needs then
        take short turns, and neither waits long for the other."""
        places = list(reversed(range(len(self.axes))))
        if self.halves:
            places.sort(key=lambda place: place != split_axis(self.rows))
        found, step = [1] * len(places), 1
        for place in places:
            found[place] = step
            step *= self.axes[place].reach
        return tuple(found)

    @property
    def rows_inside(self) -> bool:
        """True where no tile of the side that stays sticks out."""
        return all(axis.length % (axis.dilation * axis.rows) == 0 for axis in self.axes)

    @property
    def is_dense(self) -> bool:
        """True where the tokens of a tile are neighbours along every axis."""
        return all(axis.dilation == 1 for axis in self.axes)


ROWS = GridTiles()


def coordinates(axis: Axis, lengths: tuple[int, ...]) -> list[tuple[Expr, ...]]:
    """The spellings of each coordinate of a position on `axis`, in a grid of these lengths."""
    found: list[tuple[Expr, ...]] = []
    for place, length in enumerate(lengths):
        inner = floordiv(axis, Const(math.prod(lengths[place + 1 :])))
        outer = Apply("mod", (inner, Const(length)))
        found.append((outer, inner) if place == 0 else (outer,))
    return found


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, slots=True)
class GridRule:
    """A predicate over a grid: the parts that speak of one axis, `along[a]`, with Q_IDX and KV_IDX as coordinates on that axis;
    those that speak of several, `across`, with the axes of `coordinate`; and `rest`, which speaks of more than coordinates."""

    lengths: tuple[int, ...]
    along: tuple[Expr, ...]
    across: Expr
    rest: Expr


def coordinate(axis: Axis, place: int) -> Axis:
    """A coordinate of a query or a key as an axis of its own."""
    return Axis(f"{axis.name}_{place}")


@functools.lru_cache(maxsize=512)
def grid_rule(predicate: Expr, tokens: int) -> GridRule | None:
    """The grid that a predicate over `tokens` queries and as many keys speaks of; None where it speaks of tokens in a row."""
    parts = conjuncts(predicate)
    found = [rule for lengths in _candidates(parts, tokens) if (rule := _split(parts, lengths)) is not None]
    return min(found, key=lambda r: (len(conjuncts(r.rest)), len(conjuncts(r.across)), -len(r.lengths)), default=None)


def _candidates(parts: tuple[Expr, ...], tokens: int) -> Iterator[tuple[int, ...]]:
    """Lengths of grids that the divisions of positions suggest; the row of tokens itself, for classes of residues."""
    found: set[int] = set()
    for node in (node for part in parts for node in walk(part)):
        if not (isinstance(node, Apply) and node.op in ("floordiv", "mod") and isinstance(node.args[1], Const)):
            continue
        inner, size = node.args[0], int(node.args[1].value)
        if inner in (Q_IDX, KV_IDX):
            found.add(size)
        elif isinstance(inner, Apply) and inner.op == "floordiv" and inner.args[0] in (Q_IDX, KV_IDX) and node.op == "mod":
            assert isinstance(inner.args[1], Const)
            found |= {int(inner.args[1].value), size * int(inner.args[1].value)}
    yield (tokens,)
    steps_within = sorted(step for step in found if 1 < step < tokens)[:_MOST_DIVISORS]
    for count in range(1, _MOST_AXES):
        for chosen in itertools.combinations(steps_within, count):
            steps = [1, *chosen, tokens]
            if all(larger % step == 0 for step, larger in itertools.pairwise(steps)):
                yield tuple(larger // step for step, larger in itertools.pairwise(steps))[::-1]


def _split(parts: tuple[Expr, ...], lengths: tuple[int, ...]) -> GridRule | None:
    """The parts of a predicate by what they speak of; None where that is not a grid: tokens in a row, without residue classes."""
    names = {
        spelling: coordinate(axis, place)
        for axis in (Q_IDX, KV_IDX)
        for place, spellings in enumerate(coordinates(axis, lengths))
        for spelling in spellings
    }
    owners = {coordinate(axis, place): (axis, place) for axis in (Q_IDX, KV_IDX) for place in range(len(lengths))}
    along: list[list[Expr]] = [[] for _ in lengths]
    across, rest = [], []
    for part in parts:
        named = transform(part, lambda node: names.get(node) or _of_outermost(node, lengths))
        used = [owners[node] for node in walk(named) if node in owners]
        places = {place for _, place in used}
        if reads_of(part) or not places or any(isinstance(node, Axis | Size) and node not in owners for node in walk(named)):
            rest.append(part)
        elif len(places) == 1:
            along[places.pop()].append(substitute(named, {name: axis for name, (axis, _) in owners.items()}))
        else:
            across.append(named)
    rule = GridRule(lengths, tuple(conj(*demands) for demands in along), conj(*across), conj(*rest))
    spoken = sum(demand != TRUE for demand in rule.along)
    if len(lengths) == 1:
        return rule if _residues(rule.along[0])[0] > 1 else None
    return rule if spoken > 1 or rule.across != TRUE else None


def _of_outermost(node: Expr, lengths: tuple[int, ...]) -> Expr | None:
    """q_idx // 256 in a grid whose rows are 128 long is y // 2."""
    inner = math.prod(lengths[1:])
    if isinstance(node, Apply) and node.op == "floordiv" and node.args[0] in (Q_IDX, KV_IDX) and isinstance(node.args[1], Const):
        axis, divisor = node.args[0], int(node.args[1].value)
        if isinstance(axis, Axis) and divisor > inner and divisor % inner == 0:
            return floordiv(coordinate(axis, 0), Const(divisor // inner))
    return None


def _residues(demand: Expr) -> tuple[int, Expr]:
    """The distance of tokens of one residue class that a demand keeps to, and the demand without that."""
    for part in conjuncts(demand):
        if isinstance(part, Apply) and part.op == "eq" and all(isinstance(arg, Apply) and arg.op == "mod" for arg in part.args):
            (left, size), (right, other) = (arg.args for arg in part.args if isinstance(arg, Apply))
            if {left, right} == {Q_IDX, KV_IDX} and size == other and isinstance(size, Const) and int(size.value) > 1:
                return int(size.value), conj(*(each for each in conjuncts(demand) if each != part))
    return 1, demand


# ------------------------------------------------------------------------------------------------------ what rows meet


@dataclass(frozen=True)
class _Windows:
    """Of one axis and residue class: places [begin, end) that each place of the side that stays meets, int64 [places]."""

    begin: Tensor
    end: Tensor


@functools.lru_cache(maxsize=512)
def _windows(demand: Expr, length: int, by_keys: bool) -> tuple[int, tuple[_Windows, ...]] | None:
    """(dilation, the windows of each residue class); None where a place meets more than one run."""
    dilation, demand = _residues(demand)
    found = []
    row, column = (KV_IDX, Q_IDX) if by_keys else (Q_IDX, KV_IDX)
    for residue in range(min(dilation, length)):
        places = -(-(length - residue) // dilation)
        shifted: dict[Expr, Expr] = {axis: add(mul(axis, Const(dilation)), Const(residue)) for axis in (Q_IDX, KV_IDX)}
        within = substitute(demand, shifted)
        block = whole({}, {}, {"b": 1, "h": 1, "q_idx": places, "kv_idx": places}, torch.float64, torch.device("cpu"))
        runs = spans(within, block, row, column)
        if runs is None or len(runs) != 1:
            return None
        begin, end = (x.expand(1, 1, places).reshape(-1) for x in (runs[0].begin, runs[0].end))
        found.append(_Windows(begin, end))
    return dilation, tuple(found)


@functools.lru_cache(maxsize=512)
def _shadow(across: Expr, lengths: tuple[int, ...], place: int, by_keys: bool) -> _Windows:
    """What `across` leaves possible along one axis, wherever the other coordinates are."""
    length = lengths[place]
    leaves: dict[Expr, Interval] = {}
    for axis in (Q_IDX, KV_IDX):
        for other, size in enumerate(lengths):
            span = torch.tensor([0, size - 1])
            leaves[coordinate(axis, other)] = Interval(span[0], span[1])
    ends = torch.arange(length)
    row, column = (KV_IDX, Q_IDX) if by_keys else (Q_IDX, KV_IDX)
    leaves[coordinate(row, place)] = Interval(ends[:, None], ends[:, None])
    leaves[coordinate(column, place)] = Interval(ends, ends)
    may = bounds(across, leaves).hi.expand(length, length)
    some = may.any(1)
    begin, end = may.to(torch.int8).argmax(1), length - may.flip(1).to(torch.int8).argmax(1)
    return _Windows(begin * some, end * some)


@dataclass(frozen=True)
class AxisBoxes:
    """What each tile of rows meets along one axis: places [start, stop), all of which [common_first, common_last) is kept by every
    row. int64 [dilation, tiles of a class]; nothing is met where stop <= start."""

    dilation: int
    start: Tensor
    stop: Tensor
    common_first: Tensor
    common_last: Tensor

    def counts(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """How many column tiles are met, and how many of these are full, over all rows, for tiles of `columns` [C] places."""
        size = columns[:, None, None]
        _, count, first, last = self._cut(size)
        return count.sum((1, 2)), (last - first).sum((1, 2))

    def met_by_halves(self, halves: AxisBoxes, columns: Tensor) -> Tensor:
        """How many column tiles are met by each half of a tile of rows, the mean of both, over all rows, as `counts` has it."""
        size = columns[:, None, None, None]
        origin = self._cut(columns[:, None, None])[0][..., None]
        start, stop = (torch.nn.functional.pad(x, (0, x.shape[1] % 2)).unflatten(1, (-1, 2)) for x in (halves.start, halves.stop))
        first, last = (start - origin) // size, -(-(stop - origin) // size)
        met: Tensor = (last - first) * (stop > start)
        return met.sum((1, 2, 3)) / 2

    def cut(self, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each tile of rows: the token where its first column tile begins, how many it meets, and the range of full ones."""
        origin, count, first, last = self._cut(torch.tensor(columns))
        residues = torch.arange(self.dilation)[:, None]
        return (origin * self.dilation + residues).reshape(-1), count.reshape(-1), first.reshape(-1), last.reshape(-1)

    def on_lattice(self, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same for column tiles on a fixed lattice, that of NATTEN: counted from the first place of a class, the range of those
        that are met and the range of full ones."""
        first, last = self.start // columns, -(-self.stop // columns)
        common_first, common_last = -(-self.common_first // columns), self.common_last // columns
        common_last = torch.maximum(common_last, common_first)
        return first, torch.maximum(last, first), common_first, common_last

    def _cut(self, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        width = self.stop - self.start
        count = -(-width // columns)
        slack = count * columns - width
        shift = (self.start - self.common_first) % columns  # so that a tile begins where all rows begin to see
        fits = (self.common_first < self.common_last) & (shift <= slack)
        origin = self.start - torch.where(fits, shift, 0)
        origin = torch.where(origin < 0, torch.minimum(torch.zeros_like(origin), origin + slack), origin)
        first = -(-(self.common_first - origin).clamp(min=0) // columns)
        last = torch.minimum((self.common_last - origin).clamp(min=0) // columns, count)
        return origin, count, torch.minimum(first, last), last


@functools.lru_cache(maxsize=4096)
def _boxes(rule: GridRule, place: int, rows: int, by_keys: bool) -> AxisBoxes | None:
    """None where a row meets more than one run along this axis."""
    length = rule.lengths[place]
    found = _windows(rule.along[place], length, by_keys)
    if found is None or (found[0] > 1 and rule.across != TRUE):
        return None
    dilation, classes = found
    if rule.across != TRUE:
        shadow = _shadow(rule.across, rule.lengths, place, by_keys)
        (own,) = classes
        classes = (_Windows(torch.maximum(own.begin, shadow.begin), torch.minimum(own.end, shadow.end)),)
    tiles = _ceil(_ceil(length, dilation), rows)
    far = 1 << 40
    begin, end, nothing = (torch.stack(each) for each in zip(*(_tiled(w, tiles, rows) for w in classes), strict=True))
    start, stop = begin.masked_fill(nothing, far).amin(-1), end.masked_fill(nothing, -far).amax(-1)
    some = stop > start
    start, stop = start * some, stop * some
    common_first, common_last = begin.masked_fill(end > far, -far).amax(-1), end.amin(-1)
    some = some & (common_last > common_first)
    return AxisBoxes(dilation, start, stop, torch.where(some, common_first, start), torch.where(some, common_last, start))


def _tiled(windows: _Windows, tiles: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Begin, end and whether nothing is met, [tiles, rows]; a row that sticks out meets nothing and forbids nothing."""
    missing = tiles * rows - windows.begin.shape[0]
    begin = torch.nn.functional.pad(windows.begin, (0, missing), value=-(1 << 41))
    end = torch.nn.functional.pad(windows.end, (0, missing), value=1 << 41)
    nothing = torch.nn.functional.pad(windows.end <= windows.begin, (0, missing), value=True)
    return begin.view(tiles, rows), end.view(tiles, rows), nothing.view(tiles, rows)


# ---------------------------------------------------------------------------------------------------------- choosing

PARTIAL = 1.45  # what a tile with a mask costs beside one without, where shapes are compared: of the kernels of 2026-11-24


@functools.lru_cache(maxsize=512)
def choose_tiles(predicate: Expr, tokens: int, rows: int, columns: int, by_keys: bool = False, halves: bool = False) -> GridTiles:
    """Boxes of `rows` and `columns` tokens that leave the least to visit; ROWS where the predicate is not of a grid, or all of it
    is met. `by_keys`: keys stay, queries move. `halves`: as GridTiles has it."""
    rule = grid_rule(predicate, tokens)
    if rule is None:
        return ROWS
    row_shapes, column_shapes = (box_shapes(size, rule.lengths) for size in (rows, columns))
    sides = torch.tensor([1 << i for i in range(columns.bit_length())])
    met = torch.ones(len(row_shapes), len(column_shapes), dtype=torch.float64)
    full = met.clone() if rule.rest == TRUE and rule.across == TRUE else torch.zeros_like(met)
    for place in range(len(rule.lengths)):
        lengths = sorted({shape[place] for shape in row_shapes})
        boxes = [_boxes(rule, place, length, by_keys) for length in lengths]
        counts = [each.counts(sides) for each in boxes if each is not None]
        if len(counts) < len(boxes):
            return ROWS
        chosen = torch.tensor([lengths.index(shape[place]) for shape in row_shapes])[:, None]
        side = torch.tensor([shape[place].bit_length() - 1 for shape in column_shapes])
        met_along, full_along = (torch.stack(each).double()[chosen, side] for each in zip(*counts, strict=True))
        for row, shape in enumerate(row_shapes if halves else ()):
            half = _boxes(rule, place, shape[place] // 2, by_keys) if split_axis(shape) == place else None
            if half is not None:
                whole_box = boxes[lengths.index(shape[place])]
                assert whole_box is not None
                met_along[row] = whole_box.met_by_halves(half, sides)[side]
        met *= met_along
        full *= full_along
    cost = full + PARTIAL * (met - full)
    if float(cost.min()) >= _ceil(tokens, rows) * _ceil(tokens, columns):
        return ROWS
    r, c = divmod(int((cost == cost.min()).to(torch.int8).argmax()), len(column_shapes))  # the first of the cheapest
    return _tiles(rule, row_shapes[r], column_shapes[c], by_keys, halves)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _tiles(rule: GridRule, rows: tuple[int, ...], columns: tuple[int, ...], by_keys: bool, halves: bool) -> GridTiles:
    axes = []
    inside = True
    for place, (length, r, c) in enumerate(zip(rule.lengths, rows, columns, strict=True)):
        boxes = _boxes(rule, place, r, by_keys)
        assert boxes is not None
        origin, count, _, _ = boxes.cut(c)
        axes.append(GridAxis(length, boxes.dilation, r, c, max(int(count.max()), 1), rule.along[place] != TRUE))
        met = count > 0
        last = origin + (count * c - 1) * boxes.dilation
        inside = inside and bool((origin[met] >= 0).all()) and bool((last[met] < length).all())
    return GridTiles(tuple(axes), inside, halves)


def split_axis(box: tuple[int, ...]) -> int:
    """The axis along which the first and the second half of a box's tokens, in their order, lie beside each other."""
    return next(place for place, side in enumerate(box) if side > 1)


def box_shapes(size: int, lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The boxes of `size` tokens whose sides are powers of two, none longer than its axis needs."""
    room = [1 << (length - 1).bit_length() for length in lengths]
    powers = [1 << i for i in range(size.bit_length())]
    found = [shape for shape in itertools.product(powers, repeat=len(lengths)) if math.prod(shape) == size]
    fitting = [shape for shape in found if all(side <= most for side, most in zip(shape, room, strict=True))]
    return fitting or [shape for shape in found if shape[:-1] == (1,) * (len(lengths) - 1)]


# ---------------------------------------------------------------------------------------------------------- planning


def box_coverage(predicate: Expr, tokens: int, tiles: GridTiles, by_keys: bool) -> tuple[Tensor, Tensor]:
    """(0 empty, 1 partial, 2 full for every tile of rows and every tile of its box, int8 [row_tiles, tiles of a box]; the token
    where each box begins, int32 [row_tiles, axes])."""
    rule = grid_rule(predicate, tokens)
    assert rule is not None
    lengths = [axis.row_tiles for axis in tiles.axes]
    numbers = torch.arange(math.prod(axis.reach for axis in tiles.axes))
    coverage = torch.full((1, len(numbers)), 2 if rule.rest == TRUE else 1, dtype=torch.int8)
    origins = []
    for place, (axis, step) in enumerate(zip(tiles.axes, tiles.steps, strict=True)):
        boxes = _boxes(rule, place, axis.rows, by_keys)
        assert boxes is not None
        origin, count, first, last = (x[:, None] for x in boxes.cut(axis.columns))
        at = torch.arange(axis.reach)
        along = (at < count).to(torch.int8) + ((first <= at) & (at < last)).to(torch.int8)
        coverage = torch.minimum(coverage[:, None], along[None, :, numbers // step % axis.reach]).flatten(0, 1)
        spread = [1] * len(lengths)
        spread[place] = lengths[place]
        origins.append(origin.reshape(spread).expand(lengths).reshape(-1))
    begins = torch.stack(origins, 1)
    if rule.across != TRUE:
        coverage = _looked_at(rule.across, tiles, coverage, begins, by_keys)
    return coverage, begins.to(torch.int32)


def _looked_at(across: Expr, tiles: GridTiles, coverage: Tensor, origins: Tensor, by_keys: bool) -> Tensor:
    """The same, with what bounds of `across` over every tile that is met say of it."""
    row, column = (KV_IDX, Q_IDX) if by_keys else (Q_IDX, KV_IDX)
    rows, numbers = (coverage > 0).nonzero(as_tuple=True)
    leaves: dict[Expr, Interval] = {}
    sticks_out = torch.zeros_like(rows, dtype=torch.bool)
    inner_rows = tiles.row_tiles
    for place, (axis, step) in enumerate(zip(tiles.axes, tiles.steps, strict=True)):
        inner_rows //= axis.row_tiles
        first = rows // inner_rows % axis.row_tiles * axis.rows
        leaves[coordinate(row, place)] = Interval(first, (first + axis.rows - 1).clamp(max=axis.length - 1))
        begin = origins[rows, place] + numbers // step % axis.reach * axis.columns
        end = begin + axis.columns - 1
        sticks_out |= (begin < 0) | (end >= axis.length)
        leaves[coordinate(column, place)] = Interval(begin.clamp(0, axis.length - 1), end.clamp(0, axis.length - 1))
    found = bounds(across, leaves)
    kind = found.hi.to(torch.int8) + (found.lo & ~sticks_out).to(torch.int8)
    coverage[rows, numbers] = torch.minimum(coverage[rows, numbers], kind)
    return coverage


def windows_of(predicate: Expr, tokens: int, tiles: GridTiles, by_keys: bool) -> Tensor:
    """For each axis with windows, one after the other: tokens [first, last) along it that each position meets, int32 [lengths, 2].
    With a dilation, those among them of the same residue class."""
    rule = grid_rule(predicate, tokens)
    assert rule is not None
    found = [torch.zeros(0, 2, dtype=torch.int64)]
    for demand, axis in zip(rule.along, tiles.axes, strict=True):
        windows = _windows(demand, axis.length, by_keys)
        assert windows is not None
        if axis.has_window:
            along = torch.zeros(axis.length, 2, dtype=torch.int64)
            for residue, runs in enumerate(windows[1]):
                tokens_of = torch.stack([runs.begin, (runs.end - 1)], 1) * axis.dilation + residue
                along[residue :: axis.dilation] = torch.where(runs.end > runs.begin, tokens_of.T + torch.tensor([[0], [1]]), 0).T
            found.append(along)
    return torch.cat(found).to(torch.int32)


def rows_keep_some(predicate: Expr, tokens: int) -> bool:
    """True where every query of the grid surely keeps a key."""
    rule = grid_rule(predicate, tokens)
    if rule is None or rule.rest != TRUE or rule.across != TRUE:
        return False
    found = [_windows(demand, length, False) for demand, length in zip(rule.along, rule.lengths, strict=True)]
    return all(w is not None and all(bool((c.end > c.begin).all()) for c in w[1]) for w in found)


def along_axis(demand: Expr, length: int, rows: int) -> AxisBoxes | None:
    """What each tile of `rows` queries meets along one axis of `length` tokens, by a demand on its coordinates; None where a query
    meets more than one run there."""
    return _boxes(GridRule((length,), (demand,), TRUE, TRUE), 0, rows, False)

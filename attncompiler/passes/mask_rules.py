"""Rules that may explain a dense mask [M, N], simplest first: guesses from a sample of its rows.

A guess costs O(sample * N) and proves nothing; `lift_constant.py` compares it with every pair before it is believed. What is found
has the text of the rule that declares it (`attncompiler.masks`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attncompiler.ir.evaluate import Block
from attncompiler.ir.expr import (
    KV_IDX,
    Q_IDX,
    TRUE,
    Const,
    Expr,
    Read,
    add,
    apply,
    conj,
    floordiv,
    mod,
    mul,
    sub,
    substitute,
)


@dataclass(frozen=True)
class Rule:
    """A predicate over h, q_idx and kv_idx, and the tensors that it reads, by name: ids [N], or a pattern of blocks."""

    predicate: Expr
    tables: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def is_copy(self) -> bool:
        """True where it says no more than the mask does: it reads a number for each pair."""
        return isinstance(self.predicate, Read) and {Q_IDX, KV_IDX} <= set(self.predicate.index)

    def on_rows(self, rows: Tensor, head: int, shape: tuple[int, int]) -> Tensor:
        """The mask's rows of one head, bool [rows, N]. `shape`: M, N."""
        at = {
            "b": torch.zeros(1, 1, 1, 1, dtype=torch.int64), "h": torch.full((1, 1, 1, 1), head),
            "q_idx": rows.reshape(1, 1, -1, 1), "kv_idx": torch.arange(shape[1]).reshape(1, 1, 1, -1),
        }  # fmt: skip
        block = Block(self.tables, {}, {"b": 1, "h": head + 1, "q_idx": shape[0], "kv_idx": shape[1]}, at, torch.float64)
        kept = block.tensor(self.predicate).to(torch.bool)
        return kept.expand(1, 1, rows.numel(), shape[1])[0, 0]


class Plane:
    """A mask bool [M, N], and a sample of its rows with what is kept there: row, first, end, count and number of runs, int64 [S].

    Of a row that keeps nothing first is 0 and end N."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.m, self.n = mask.shape
        self.row = _sample(self.m)
        self.sample = mask[self.row]
        self.count = self.sample.sum(1)
        ends = self.sample.to(torch.int8)
        self.first = ends.argmax(1)
        self.end = self.n - ends.flip(1).argmax(1)
        before = torch.nn.functional.pad(self.sample[:, :-1], (1, 0))
        self.runs = (self.sample & ~before).sum(1)

    def looks_like(self, rule: Rule, head: int = 0) -> bool:
        """Whether the sampled rows are as the rule says of a head."""
        return torch.equal(rule.on_rows(self.row, head, (self.m, self.n)), self.sample)

    @functools.cached_property
    def first_of_all(self) -> Tensor:
        """The first kept key of every row, int64 [M]; 0 where there is none."""
        first: Tensor = self.mask.view(torch.uint8).argmax(1)
        return first


_CHUNK = 1 << 22  # pairs that are looked at together: their intermediate results stay in cache


def holds(rule: Rule, mask: Tensor) -> bool:
    """Whether a mask [heads, M, N] keeps what the rule says: every pair is compared."""
    heads, m, n = mask.shape
    step = max(_CHUNK // max(n, 1), 1)
    return all(
        torch.equal(rule.on_rows(rows, head, (m, n)), mask[head, int(rows[0]) : int(rows[-1]) + 1])
        for rows in torch.arange(m).split(step)
        for head in range(heads)
    )


def _sample(m: int) -> Tensor:
    """Rows to look at: all of a small mask; else the first and last ones, evenly spaced ones, and some that keep no step."""
    if m <= 96:
        return torch.arange(m)
    generator = torch.Generator().manual_seed(m)
    spaced, drawn = torch.linspace(0, m - 1, 33).long(), torch.randint(0, m, (48,), generator=generator)
    rows: Tensor = torch.cat([torch.arange(4), spaced, drawn, torch.arange(m - 4, m)]).unique()
    return rows


# ---------------------------------------------------------------------------------------------------- rules of a sequence


def rules_of(plane: Plane) -> Iterator[Rule]:
    """Guesses for a sequence of queries and one of keys, simplest first."""
    yield from _runs(plane)
    yield from _dilated(plane)
    if plane.m == plane.n:
        yield from _documents(plane)
        yield from _grids(plane)


def _at_least(bound: Expr) -> Expr:
    return apply("ge", KV_IDX, bound)


def _at_most(bound: Expr) -> Expr:
    return apply("le", KV_IDX, bound)


def _first_keys(count: int) -> Expr:
    return apply("lt", KV_IDX, Const(count))


def _shift(values: Tensor) -> int | None:
    """The one value of a tensor; None where there are several, or none."""
    return int(values[0]) if values.numel() and bool((values == values[0]).all()) else None


def _lower(row: Tensor, first: Tensor) -> Iterator[Expr]:
    """What the first key of each row may follow: nothing, the query at a distance, or one key."""
    moved = first > 0
    if not bool(moved.any()):
        yield TRUE
        return
    if (left := _shift((row - first)[moved])) is not None:
        yield _at_least(sub(Q_IDX, Const(left)))
    if (start := _shift(first)) is not None:
        yield _at_least(Const(start))


def _upper(row: Tensor, end: Tensor, n: int) -> Iterator[Expr]:
    """What the last key of each row may follow: nothing, the query at a distance, or one key."""
    cut = end < n
    if not bool(cut.any()):
        yield TRUE
        return
    if (right := _shift((end - 1 - row)[cut])) is not None:
        yield _at_most(add(Q_IDX, Const(right)))
    if (length := _shift(end)) is not None:
        yield _first_keys(length)


def _runs(plane: Plane) -> Iterator[Rule]:
    """One run of keys a query: causal, windows, prefixes, causal by blocks; and such a run after the first keys."""
    some = plane.count > 0
    row, first, end = plane.row[some], plane.first[some], plane.end[some]
    if int(plane.runs.max()) == 1:
        for low in _lower(row, first):
            for high in _upper(row, end, plane.n):
                yield Rule(conj(low, high))
        beyond = (end > end.min()) & (end < plane.n)
        if not bool(first.any()) and (right := _shift((end - 1 - row)[beyond])) is not None:
            yield Rule(apply("or", _at_most(add(Q_IDX, Const(right))), _first_keys(int(end.min()))))
        if not bool(first.any()) and 1 < (size := int(plane.end[0])) < plane.n:
            yield Rule(apply("le", floordiv(KV_IDX, Const(size)), floordiv(Q_IDX, Const(size))))
    yield from _after_first_keys(plane)


def _after_first_keys(plane: Plane) -> Iterator[Rule]:
    """A window, and the first keys for all: streaming with sinks; with queries that see all, Longformer's global tokens."""
    see_all = _leading_full_rows(plane)
    rest = (plane.count > 0) & (plane.row >= see_all)
    two = rest & (plane.runs == 2) & (plane.first == 0)
    if not bool(two.any()):
        return
    split = plane.sample[two]
    sinks = int((~split).to(torch.int8).argmax(1).min())
    gap = ~split & (torch.arange(plane.n) < plane.end[two].unsqueeze(1))
    left = _shift(plane.row[two] - (plane.n - gap.to(torch.int8).flip(1).argmax(1)))  # the last run begins where the gap ends
    if left is None:
        return
    rest = rest & (plane.end > sinks)
    for high in _upper(plane.row[rest], plane.end[rest], plane.n):
        near = conj(_at_least(sub(Q_IDX, Const(left))), high)
        seen = apply("or", near, _first_keys(sinks))
        if high == _at_most(Q_IDX):
            yield Rule(conj(high, seen))  # no sink is ahead of its query
        yield Rule(seen)
        if see_all:
            yield Rule(apply("or", seen, apply("lt", Q_IDX, Const(see_all))))


def _leading_full_rows(plane: Plane) -> int:
    """How many queries from the first on see all keys."""
    full = plane.mask[: plane.m // 2].all(1) if bool(plane.mask[0].all()) else torch.zeros(1, dtype=torch.bool)
    return int(full.to(torch.int8).cumprod(0).sum())


def _dilated(plane: Plane) -> Iterator[Rule]:
    """Every d-th key, counted from the query, within a reach or without."""
    places = plane.sample.nonzero()
    away = places[:, 1] - plane.row[places[:, 0]]
    if not away.numel():
        return
    step = math.gcd(*(int(d) for d in away.abs().unique()))
    if step <= 1:
        return
    same = apply("eq", mod(Q_IDX, Const(step)), mod(KV_IDX, Const(step)))
    left, right = -int(away.min()), int(away.max())
    yield Rule(same)
    if right == 0:
        yield Rule(conj(_at_most(Q_IDX), same))
        yield Rule(conj(_at_most(Q_IDX), _at_least(sub(Q_IDX, Const(left))), same))
    yield Rule(conj(_at_least(sub(Q_IDX, Const(left))), _at_most(add(Q_IDX, Const(right))), same))


def _documents(plane: Plane) -> Iterator[Rule]:
    """Keys of the query's own document or region, perhaps causal or near."""
    if not bool(plane.mask.diagonal().all()):
        return
    left, right = int((plane.row - plane.first).max()), int((plane.end - 1 - plane.row).max())
    near = conj(_at_least(sub(Q_IDX, Const(left))), _at_most(add(Q_IDX, Const(right))))
    for same, tables in _own(plane):
        yield Rule(same, tables)
        yield Rule(conj(_at_most(add(Q_IDX, Const(right))), same), tables)
        yield Rule(conj(near, same), tables)


def _own(plane: Plane) -> Iterator[tuple[Expr, Mapping[str, Tensor]]]:
    """That both are of one document: runs that the first diagonal below shows, of one size or not; or of one region, which its
    first key names."""
    starts = torch.nn.functional.pad(~plane.mask.diagonal(-1), (1, 0), value=True)
    at = starts.nonzero().squeeze(1)
    if 1 < at.numel() < plane.n:
        size = int(at[1])
        if torch.equal(at, torch.arange(0, plane.n, size)):
            yield apply("eq", floordiv(Q_IDX, Const(size)), floordiv(KV_IDX, Const(size))), {}
        yield _same("doc"), {"doc": (starts.cumsum(0) - 1).to(torch.int32)}
    labels = plane.first_of_all.unique(return_inverse=True)[1].to(torch.int32)
    if int(labels.max()) and bool((labels[1:] < labels[:-1]).any()):
        yield _same("label"), {"label": labels}


def _same(table: str) -> Expr:
    return apply("eq", Read(table, (Q_IDX,)), Read(table, (KV_IDX,)))


# ------------------------------------------------------------------------------------------------------- neighbourhoods


def neighbourhoods(plane: Plane) -> Iterator[Rule]:
    """Neighbourhood attention along one axis, with NATTEN's borders, strides and dilation."""
    if plane.m != plane.n or not bool(plane.count.min() > 0):
        return
    length, causal = plane.n, bool((plane.end == plane.row + 1).all())
    kept = plane.mask[-1 if causal else 0].nonzero().squeeze(1)
    window = kept.numel()
    dilation = int(kept[1] - kept[0]) if window > 1 else 1
    if (not causal and _shift(plane.count) is None) or window * dilation > length:
        return
    for stride in sorted({1, *_steps(plane.first_of_all[::dilation])}):
        if stride <= window:
            yield Rule(neighbourhood(Q_IDX, KV_IDX, length, window, stride, dilation, causal))


_MOST_STEPS = 8


def _steps(values: Tensor) -> list[int]:
    """After how many places a sequence changes: the few smallest distances between changes."""
    moves = (values[1:] != values[:-1]).nonzero().squeeze(1) + 1
    gaps = moves[1:] - moves[:-1] if moves.numel() > 1 else moves
    return [int(gap) for gap in gaps.unique()[:_MOST_STEPS]]


def halos(plane: Plane) -> Iterator[Rule]:
    """The query's block and some keys around it: the formula of `masks.halo`."""
    for block in _steps(plane.first_of_all):
        halo = int(plane.end[0]) - block
        if halo >= 0:
            start = mul(floordiv(Q_IDX, Const(block)), Const(block))
            beyond = apply("lt", KV_IDX, add(start, Const(block + halo)))
            yield Rule(conj(apply("ge", KV_IDX, sub(start, Const(halo))), beyond))


def neighbourhood(i: Expr, j: Expr, length: int, window: int, stride: int, dilation: int, causal: bool) -> Expr:
    """That j is in the window of i, on an axis of `length` tokens: the formula of `masks.grid`."""
    d, s = Const(dilation), Const(stride)
    place = floordiv(i, d)
    count = floordiv(add(mul(mod(i, d), Const(-1)), Const(length + dilation - 1)), d)
    last = sub(count, Const(1))
    leader = apply("minimum", add(mul(floordiv(place, s), s), Const(stride - 1 if causal else stride // 2)), last)
    if causal:
        low, high = apply("maximum", sub(leader, Const(window - 1)), Const(0)), add(place, Const(1))
    else:
        low = apply("minimum", apply("maximum", sub(leader, Const(window // 2)), Const(0)), sub(count, Const(window)))
        high = add(low, Const(window))
    seen = conj(apply("ge", floordiv(j, d), low), apply("lt", floordiv(j, d), high))
    return seen if dilation == 1 else conj(seen, apply("eq", mod(i, d), mod(j, d)))


def _grids(plane: Plane) -> Iterator[Rule]:
    """A rule of its own for each axis of a grid of one to three, in row-major order."""
    one = ([(plane.n, rule)] for rule in itertools.chain(neighbourhoods(plane), halos(plane)))
    for axes in itertools.chain(one, _separated(plane, 2), _separated(plane, 3)):
        inner = plane.n
        parts = []
        for length, rule in axes:
            inner //= length
            at: dict[Expr, Expr] = {axis: mod(floordiv(axis, Const(inner)), Const(length)) for axis in (Q_IDX, KV_IDX)}
            parts.append(substitute(rule.predicate, at))
        yield Rule(conj(*parts))


def _separated(plane: Plane, axes: int) -> Iterator[list[tuple[int, Rule]]]:
    """The lengths of two or three axes, outer ones first, with a rule for each, such that a pair seems to be kept where all axes
    keep it.

    If the mask is the Kronecker product of two, a row is the outer product of a row of each: the outer one shows in the rows at
    the start of each inner run, the inner one in those of the first run."""
    n = plane.n
    for inner in (size for size in range(2, n // 2 + 1) if n % size == 0):
        grid = plane.sample.view(-1, n // inner, inner)
        outer_kept, inner_kept = grid.any(2), grid.any(1)
        if not torch.equal(grid, outer_kept.unsqueeze(2) & inner_kept.unsqueeze(1)):
            continue
        inner_rule = _axis_rule(Plane(plane.mask[:inner].view(inner, -1, inner).any(1)))
        if inner_rule is None:
            continue
        outer = Plane(plane.mask[::inner].view(n // inner, -1, inner).any(2))
        if axes > 2:
            yield from ([*others, (inner, inner_rule)] for others in _separated(outer, axes - 1))
        elif (outer_rule := _axis_rule(outer)) is not None:
            yield [(n // inner, outer_rule), (inner, inner_rule)]


def _axis_rule(axis: Plane) -> Rule | None:
    """The rule of one axis of a grid; no axis of thousands of tokens is worth the look."""
    if axis.n > 4096:
        return None
    guesses: tuple[Callable[[Plane], Iterator[Rule]], ...] = (_everything, neighbourhoods, _runs, halos, _dilated)
    return next(
        (rule for guess in guesses for rule in guess(axis) if axis.looks_like(rule) and holds(rule, axis.mask.unsqueeze(0))), None
    )


def _everything(plane: Plane) -> Iterator[Rule]:
    if bool(plane.mask.all()):
        yield Rule(TRUE)

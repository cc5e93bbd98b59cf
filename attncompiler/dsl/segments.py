"""Masks over runs of tokens of several kinds: text and image, prefix and extra keys, each pair of kinds with its own rule."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from attncompiler.dsl.masks import Captured, Extents, Mask, adopt, as_mask, pickled, rename
from attncompiler.dsl.term import Term, equal, larger, smaller
from attncompiler.errors import OptionError
from attncompiler.ir.expr import AXES, KV_IDX, Q_IDX, Expr, settled, substitute

Name = str | int
Runs = Mapping[str, int] | Sequence[int]
Pair = tuple[Name, Name]


@pickled
def segments(
    queries: Runs,
    rules: Mapping[Pair, Mask | Callable[..., Any] | bool],
    *,
    keys: Runs | None = None,
    otherwise: bool = True,
) -> Mask:
    """Tokens in runs that follow one another, and for each pair (run of queries, run of keys) what is kept of it.

    `queries` and `keys` (default: the same runs) are the runs' numbers of tokens in their order, by name, or as a sequence whose
    runs are then called 0, 1, ... A rule is a mask in the runs' own positions, both from 0, or True or False for all and nothing;
    pairs without a rule are `otherwise`. Runs of no tokens are left out.

    CLEAR: `segments({"text": 512, "image": 4096}, {("image", "image"): disc((64, 64), 8)})`. Extra keys that all queries see:
    `segments({"grid": 4096}, {("grid", "grid"): grid((64, 64), 7)}, keys={"grid": 4096, "extra": 16})`."""
    of_queries, of_keys = _runs(queries, "queries"), _runs(queries if keys is None else keys, "keys")
    for pair in rules:
        if not (isinstance(pair, tuple) and len(pair) == 2 and pair[0] in of_queries and pair[1] in of_keys):
            raise OptionError(
                f"segments has no pair {pair!r} of (queries, keys)",
                why=f"its queries are {', '.join(map(repr, of_queries))}, its keys {', '.join(map(repr, of_keys))}",
            )
    kept = {pair: rule if isinstance(rule, bool) else as_mask(rule) for pair, rule in rules.items()}
    return _Segments(of_queries, of_keys, kept, otherwise)


def _runs(runs: Runs, what: str) -> dict[Name, int]:
    named: dict[Name, int] = {name: count for name, count in (runs.items() if isinstance(runs, Mapping) else enumerate(runs))}
    if any(not isinstance(count, int) or count < 0 for count in named.values()) or sum(named.values()) < 1:
        raise OptionError(
            f"the runs of {what} are {named}", do='give the number of tokens of each, one or more in all: {"text": 512, ...}'
        )
    return named


@dataclass(frozen=True)
class _Run:
    """Tokens [first, last) of an axis of `total`."""

    name: Name
    first: int
    last: int
    total: int

    def own(self, at: Any, inside: bool) -> Any:
        """Positions of the axis as positions of the run; with `inside` those of other runs as the nearest one in it."""
        local = at - self.first if self.first else at
        if inside and self.first:
            local = larger(local, 0)
        return smaller(local, self.last - self.first - 1) if inside and self.last < self.total else local


def _laid_out(runs: Mapping[Name, int]) -> list[_Run]:
    ends = list(itertools.accumulate(runs.values(), initial=0))
    return [_Run(name, ends[i], ends[i + 1], ends[-1]) for i, (name, count) in enumerate(runs.items()) if count]


@dataclass(frozen=True, eq=False)
class _Segments(Mask):
    queries: Mapping[Name, int]
    keys: Mapping[Name, int]
    rules: Mapping[Pair, Mask | bool]
    otherwise: bool

    def _pairs(self) -> list[tuple[_Run, list[tuple[_Run, Mask | bool]]]]:
        columns = _laid_out(self.keys)
        return [(q, [(k, self.rules.get((q.name, k.name), self.otherwise)) for k in columns]) for q in _laid_out(self.queries)]

    def _masks(self) -> list[Mask]:
        return [rule for rule in self.rules.values() if isinstance(rule, Mask)]

    @property
    def is_fixed(self) -> bool:
        return all(mask.is_fixed for mask in self._masks())

    @property
    def reads_tensors(self) -> bool:
        return any(mask.reads_tensors for mask in self._masks())

    def moved(self, device: torch.device | str) -> Mask:
        rules = {pair: rule if isinstance(rule, bool) else rule.to(device) for pair, rule in self.rules.items()}
        return replace(self, rules=rules)

    def check(self, extents: Extents) -> None:
        for what, axis, runs in (("queries", Q_IDX, self.queries), ("keys", KV_IDX, self.keys)):
            if extents[axis] != sum(runs.values()):
                sizes = " + ".join(f"{count} of {name}" for name, count in runs.items())
                raise OptionError(
                    f"segments is for {sum(runs.values())} {what}, not {extents[axis]}",
                    why=f"its runs are {sizes}",
                    do=f"give runs that add up to the number of {what}",
                )
        for q, row in self._pairs():
            for k, rule in row:
                if isinstance(rule, Mask):
                    rule.check(_extents(extents, q, k))

    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        self.check(extents)
        captured: Captured = {}

        def kept(rule: Mask, q: _Run, k: _Run) -> Term:
            expr, tensors = rule.rule(_extents(extents, q, k))
            own: dict[Expr, Expr] = {
                Q_IDX: q.own(Term(Q_IDX), rule.reads_tensors).expr,
                KV_IDX: k.own(Term(KV_IDX), rule.reads_tensors).expr,
            }
            return Term(substitute(rename(expr, adopt(captured, tensors)), own))

        return settled(self._joined(Term(Q_IDX), Term(KV_IDX), kept).expr, KV_IDX), captured

    def at(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        def kept(rule: Mask, q: _Run, k: _Run) -> Tensor:
            return rule.at(b, h, q.own(q_idx, rule.reads_tensors), k.own(kv_idx, rule.reads_tensors))

        found: Tensor = self._joined(q_idx, kv_idx, kept)
        return found

    def _joined(self, q_idx: Any, kv_idx: Any, kept: Callable[[Mask, _Run, _Run], Any]) -> Any:
        rows = []
        for q, row in self._pairs():
            rows.append((q, _either(kv_idx, [(k, kept(rule, q, k) if isinstance(rule, Mask) else rule) for k, rule in row])))
        found = _either(q_idx, rows)
        if isinstance(found, bool):
            return equal(kv_idx, kv_idx) if found else ~equal(kv_idx, kv_idx)
        return found

    def kept_pairs(self, b: int, h: int, m: int, n: int) -> int | None:
        self.check(dict(zip(AXES, (b, h, m, n), strict=True)))
        total = 0
        for q, row in self._pairs():
            for k, rule in row:
                size = q.last - q.first, k.last - k.first
                kept = rule.kept_pairs(b, h, *size) if isinstance(rule, Mask) else rule * b * h * size[0] * size[1]
                if kept is None:
                    return None
                total += kept
        return total

    def __str__(self) -> str:
        rules = ", ".join(f"{pair}: {rule}" for pair, rule in self.rules.items())
        keys = f", keys={dict(self.keys)}" if list(self.keys.items()) != list(self.queries.items()) else ""
        return f"segments({dict(self.queries)}, {{{rules}}}{keys}{'' if self.otherwise else ', otherwise=False'})"


def _extents(extents: Extents, q: _Run, k: _Run) -> Extents:
    return {**extents, Q_IDX: q.last - q.first, KV_IDX: k.last - k.first}


def _either(at: Any, kept: Sequence[tuple[_Run, Any]]) -> Any:
    """What is kept of an axis, where each run keeps True, False or a predicate; True or False where all runs agree.

    A predicate is cut off at its run's ends, but not towards the axis' end or towards runs that keep all anyway: what it says of
    these does not matter."""
    merged: list[tuple[_Run, Any]] = []
    for run, value in kept:
        if merged and isinstance(value, bool) and merged[-1][1] is value:
            merged[-1] = replace(merged[-1][0], last=run.last), value
        else:
            merged.append((run, value))
    if len(merged) == 1:
        return merged[0][1]
    parts = []
    for place, (run, value) in enumerate(merged):
        if value is False:
            continue
        before, after = merged[:place], merged[place + 1 :]
        tests = [] if value is True else [value]
        if not all(other is True for _, other in after):
            tests.insert(0, at < run.last)
        if not all(other is True for _, other in before):
            tests.insert(0, at >= run.first)
        parts.append(reduce(operator.and_, tests))
    return reduce(operator.or_, parts)

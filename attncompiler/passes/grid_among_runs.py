"""A grid beside other tokens: image tokens with text before them, a video with extra keys.

Such a mask cuts queries and keys into runs; of one pair of runs it keeps what a rule of a grid keeps, of all others everything or
nothing. Found by what the mask compares positions with, and proved by what is left of it within each pair of runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from attncompiler.ir.expr import FALSE, KV_IDX, Q_IDX, TRUE, Apply, Axis, Const, Expr, add, substitute, walk
from attncompiler.ir.ranges import within
from attncompiler.passes.grid import grid_rule

_MOST_RUNS = 8  # of queries or keys: masks that are cut more often are no few runs of tokens
_CUTS_BEHIND = {"le": 1, "gt": 1, "lt": 0, "ge": 0}  # where `axis < c` and the like change, beyond c

Run = tuple[int, int]  # first token and length


@dataclass(frozen=True)
class GridAmongRuns:
    """`predicate`: what is kept of the pairs of the runs `queries` and `keys`, in positions of these. `full`: the pairs of runs of
    which all is kept."""

    queries: Run
    keys: Run
    predicate: Expr
    full: tuple[tuple[Run, Run], ...]


def grid_among_runs(predicate: Expr, queries: int, keys: int) -> GridAmongRuns | None:
    """The grid that a mask speaks of beside other tokens; None where it speaks of none, or of more."""
    of_queries, of_keys = (_runs(predicate, axis, tokens) for axis, tokens in ((Q_IDX, queries), (KV_IDX, keys)))
    if len(of_queries) * len(of_keys) == 1 or max(len(of_queries), len(of_keys)) > _MOST_RUNS:
        return None
    kept = {(q, k): _of_runs(predicate, q, k) for q, k in itertools.product(of_queries, of_keys)}
    partly = [(pair, rest) for pair, rest in kept.items() if rest not in (TRUE, FALSE)]
    if len(partly) != 1:
        return None
    ((q, k), rest) = partly[0]
    if q[1] != k[1] or grid_rule(rest, q[1]) is None:
        return None
    return GridAmongRuns(q, k, rest, tuple(pair for pair, rest in kept.items() if rest == TRUE))


def _runs(predicate: Expr, axis: Axis, tokens: int) -> list[Run]:
    cuts = sorted({0, tokens, *(cut for cut in _cuts(predicate, axis) if 0 < cut < tokens)})
    return [(first, last - first) for first, last in itertools.pairwise(cuts)]


def _cuts(predicate: Expr, axis: Axis) -> Iterator[int]:
    """Where a comparison of the bare position with a number changes."""
    for node in walk(predicate):
        if isinstance(node, Apply) and node.op in _CUTS_BEHIND and node.args[0] == axis and isinstance(node.args[1], Const):
            yield int(node.args[1].value) + _CUTS_BEHIND[node.op]


def _of_runs(predicate: Expr, queries: Run, keys: Run) -> Expr:
    """What is left of a predicate for the tokens of two runs, in positions of these."""
    moved = substitute(predicate, {axis: add(axis, Const(first)) for axis, (first, _) in ((Q_IDX, queries), (KV_IDX, keys))})
    return within(moved, {Q_IDX: queries[1], KV_IDX: keys[1]})

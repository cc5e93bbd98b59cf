"""Select: which keys, blocks, queries or heads take part, computed from the data. Cuts, orders and lists, as forms of tables.

    top_k(x, k, over=key, where=seen)               the k largest of each row: a predicate
    top_sum(x, need, over=key, least=1)             the largest, until their sum reaches `need`: a predicate
    argsort(x, over=key, into=place)                positions in order of x: a permutation, or its first places
    positions(kept, over=key, into=place)           where a predicate holds, ascending: a list of fixed length

Everything else of a selection is an equation as any other: pools and cheap scores are sums and means, a threshold is a comparison
with a statistic, a majority compares two sums, set algebra is `& | ~` with comparisons of original positions. A row may range over
several axes (`over=(q, block)`: one ranking of all pairs of a head); they then count as one, row-major.

How a row is ranked, by every form, on every lowering:

* ties go to the lower position: orders are stable, ascending and descending;
* NaN is above every number, inf included, as in torch: a NaN is kept first, so that it shows;
* what is outside `where` is no candidate. It is never kept, whatever it holds, and comes after all others in an order. -inf within
  `where` is a candidate, after every number;
* of fewer candidates than are asked for, all are kept. A list says -1 at places that it has no position for. A list that is shorter
  than what it has to say ends early.

A read at -1 is a read at 0, as every index outside a tensor is read at the nearest: what uses a list says `picked[...] >= 0` in its
`keep`. The four results that selections have: a list is `positions` or `argsort`; CSR is `cumsum` of counts and `positions` over
rows and keys; a compacted buffer is a table read at a list; a rank-1 predicate is a table for each key beside one for each row,
compared in `keep`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncompiler.ir.expr import TRUE, ZERO, Axis, Expr, Kind
from attncompiler.ir.program import TensorDecl
from attncompiler.ir.tables import Among, Form


@dataclass(frozen=True, slots=True)
class TopK(Among):
    """True for the `k` largest values of each row; k is an integer of the row, 0 and less keep nothing."""

    value: Expr
    k: Expr
    over: tuple[Axis, ...]
    where: Expr = TRUE
    keeps = True

    @property
    def limits(self) -> tuple[Expr, ...]:
        return (self.k,)

    def kind(self, decls: Mapping[str, TensorDecl]) -> Kind:
        return Kind.BOOL


@dataclass(frozen=True, slots=True)
class TopSum(Among):
    """True for the values of each row, from the largest, before which the sum is below `need`, and for the first `least` anyway.

    So the last one kept is the one that reaches `need`; after a NaN nothing more is. A share of the row is need = share * its
    sum."""

    value: Expr
    need: Expr
    over: tuple[Axis, ...]
    where: Expr = TRUE
    least: Expr = ZERO
    keeps = True

    @property
    def limits(self) -> tuple[Expr, ...]:
        return (self.need, self.least)

    def kind(self, decls: Mapping[str, TensorDecl]) -> Kind:
        return Kind.BOOL


@dataclass(frozen=True, slots=True)
class Argsort(Among):
    """The positions along `over` in order of the values, as many as the axis `into` has places."""

    value: Expr
    over: tuple[Axis, ...]
    into: Axis
    where: Expr = TRUE
    descending: bool = False

    def kind(self, decls: Mapping[str, TensorDecl]) -> Kind:
        return Kind.INT


@dataclass(frozen=True, slots=True)
class Positions(Form):
    """The positions along `over` at which `predicate` holds, ascending, as many as the axis `into` has places."""

    predicate: Expr
    over: tuple[Axis, ...]
    into: Axis

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.predicate,)

    def kind(self, decls: Mapping[str, TensorDecl]) -> Kind:
        return Kind.INT

"""Tables: what is computed around an attention, as named tensors over named axes, one equation each.

    tables  # model.py:38
      axes    b=2, g=2, key=4096, block=64, t=64, place=8
      read    bias: f32[2, 2, 4096]
      let     mass[b, g, block] = sum(exp(bias[b, g, block * 64 + t]), over=t)
      select  kept[b, g, block] = top_k(mass[b, g, block], 8, over=block)
      select  picked[b, g, place] = positions(kept[b, g, block], over=block, into=place)
      return  picked

An equation holds for every position of the axes on its left. What it reads are operands and the tables above it, at any index
expression, so that permutations, pools over blocks, groups of heads and gathers need no form of their own. `let` defines floating
numbers, which carry gradients; `select` defines truths and integers (which keys take part, and where they are), which carry none: a
selection's gradient stops where it becomes an index. Cuts, orders and lists are in select.py.

Floating tables are computed and kept in float32, in float64 where any operand is f64.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attncompiler.ir.expr import TRUE, Axis, Expr, Kind, Size, walk
from attncompiler.ir.program import NOWHERE, Dtype, Origin, TensorDecl, kind_of


class Form:
    """Base of the right sides of equations.

    `inputs` are evaluated over the axes of the rows and over `over`; `limits` over the rows alone. `into` is the axis that takes
    the place of `over` on the left; without it, `over` is on the left if the form `keeps` it."""

    __slots__ = ()
    keeps = False

    @property
    def over(self) -> tuple[Axis, ...]:
        return ()

    @property
    def into(self) -> Axis | None:
        return None

    @property
    def inputs(self) -> tuple[Expr, ...]:
        raise NotImplementedError

    @property
    def limits(self) -> tuple[Expr, ...]:
        return ()

    def kind(self, decls: Mapping[str, TensorDecl]) -> Kind:
        """What the table holds, given the tensors and tables that it reads."""
        raise NotImplementedError


class Among(Form):
    """Base of forms of the values along `over`, among the positions where `where` holds."""

    __slots__ = ()
    value: Expr
    where: Expr

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.value, self.where)


@dataclass(frozen=True, slots=True)
class Each(Form):
    """table = value, at each position."""

    value: Expr

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.value,)

    def kind(self, decls: Mapping[str, TensorDecl]) -> Kind:
        return kind_of(self.value, decls)


class Fold(enum.Enum):
    """What one number is made of many. Of none: 0, NaN, -inf, inf (of integers the smallest and largest), False, True."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"  # NaN where any is
    MIN = "min"
    ANY = "any"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Reduce(Among):
    """table = `by` of the values along the axes `over`, of those where `where` holds."""

    by: Fold
    value: Expr
    over: tuple[Axis, ...]
    where: Expr = TRUE

    def kind(self, decls: Mapping[str, TensorDecl]) -> Kind:
        if self.by is Fold.MEAN:
            return Kind.FLOAT
        return Kind.BOOL if self.by in (Fold.ANY, Fold.ALL) else kind_of(self.value, decls)


class Run(enum.Enum):
    """What keeps the axes that it goes along; several of them count as one, row-major."""

    SOFTMAX = "softmax"  # 0 outside `where`, and so 0 everywhere in a row that has no candidate
    CUMSUM = "cumsum"  # the sum up to and with each position; what is outside `where` adds nothing


@dataclass(frozen=True, slots=True)
class Along(Among):
    """table = `run` of the values along the axes `over`, among those where `where` holds."""

    run: Run
    value: Expr
    over: tuple[Axis, ...]
    where: Expr = TRUE
    keeps = True

    def kind(self, decls: Mapping[str, TensorDecl]) -> Kind:
        return Kind.FLOAT if self.run is Run.SOFTMAX else kind_of(self.value, decls)


@dataclass(frozen=True, slots=True)
class Table:
    """One equation: name[axes] = form."""

    name: str
    axes: tuple[Axis, ...]
    form: Form

    @property
    def rows(self) -> tuple[Axis, ...]:
        """The axes that the equation holds for one by one."""
        return tuple(axis for axis in self.axes if axis not in self.form.over and axis != self.form.into)


@dataclass(frozen=True)
class Tables:
    """Equations in order; each may read the tables before it."""

    axes: tuple[tuple[Axis, Expr], ...]  # each with its size: a literal or an expression of run-time integers
    tensors: tuple[TensorDecl, ...]
    tables: tuple[Table, ...]
    origin: Origin = NOWHERE

    @functools.cached_property
    def decls(self) -> Mapping[str, TensorDecl]:
        """Operands and tables, with the element type that each table has."""
        known = {decl.name: decl for decl in self.tensors}
        sizes = dict(self.axes)
        floating = Dtype.F64 if any(decl.dtype is Dtype.F64 for decl in self.tensors) else Dtype.F32
        dtypes = {Kind.BOOL: Dtype.BOOL, Kind.INT: Dtype.I64, Kind.FLOAT: floating}
        for table in self.tables:
            kind = table.form.kind(known)
            known[table.name] = TensorDecl(table.name, dtypes[kind], tuple(sizes[axis] for axis in table.axes))
        return known

    @property
    def expressions(self) -> Iterator[Expr]:
        for table in self.tables:
            yield from table.form.inputs
            yield from table.form.limits

    @functools.cached_property
    def sizes(self) -> tuple[str, ...]:
        """Names of the run-time integers, in order of first use."""
        roots = [size for _, size in self.axes] + [size for decl in self.tensors for size in decl.shape] + [*self.expressions]
        return tuple(dict.fromkeys(node.name for root in roots for node in walk(root) if isinstance(node, Size)))

"""What an attention program is: the nodes of the clause form.

    axes   sizes of b, h, q_idx, kv_idx          score   s, an expression of dot products, positions and tensor reads
    read   the tensors, their shapes and dtypes   keep    which pairs take part, and what an empty row gives
    weigh  the normaliser                         adjust  a factor on each weight after normalising
    sum    the value vectors                      route   which heads a query uses, and how strongly

tables.py and select.py say what is computed around an attention, state.py what a recurrence is, phases.py how they follow one
another.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from attncompiler.ir.expr import (
    AXES,
    ONE,
    OPERATORS,
    TRUE,
    Apply,
    Axis,
    Const,
    Dot,
    Expr,
    Kind,
    Read,
    Size,
    Uniform,
    axes_of,
    dots_of,
    reads_of,
    walk,
)


class Dtype(enum.Enum):
    """Element types of operands, under the names they have in a program's text."""

    F64 = "f64"
    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    BOOL = "bool"
    U8 = "u8"
    I8 = "i8"
    I16 = "i16"
    I32 = "i32"
    I64 = "i64"

    @property
    def kind(self) -> Kind:
        if self is Dtype.BOOL:
            return Kind.BOOL
        return Kind.FLOAT if self in (Dtype.F64, Dtype.F32, Dtype.BF16, Dtype.F16) else Kind.INT


@dataclass(frozen=True, slots=True)
class TensorDecl:
    """An operand: `q: bf16[B, 8, M, 64]`. A size is a literal or the name of a run-time integer.

    Two facts that whoever makes the tensor sees to; they serve plans, and change no result. `constant`, `ids: const(i32[4096])`: nobody
    ever writes to it. `ascending`, `rows: ascending(i32[B, M])`: along the last dimension no number is below the one before."""

    name: str
    dtype: Dtype
    shape: tuple[Expr, ...]
    constant: bool = False
    ascending: bool = False


@dataclass(frozen=True, slots=True)
class Axes:
    """The sizes of the four axes, each a literal or a run-time integer (a grouped batch may be a product of them)."""

    b: Expr
    h: Expr
    q_idx: Expr
    kv_idx: Expr

    def size(self, axis: Axis) -> Expr:
        value: Expr = getattr(self, axis.name)
        return value


class Empty(enum.Enum):
    """What happens outside `keep`, and so what a row that keeps no key gives."""

    NAN = "nan"  # the score there is -inf: softmax over an empty row is 0 / 0
    ZERO = "zero"  # as NAN, but an empty row gives O = 0 (and lse = -inf): scaled_dot_product_attention
    SCORE = "score"  # `score` holds a finite mask itself: outside `keep` a weight is 0 if its row keeps any key,
    #                  and a row that keeps none is the softmax of `score` over ALL keys (uniform for finfo.min)
    UNREAD = "unread"  # as ZERO, but nothing reads what an empty row gives, nor its gradients: kernels may leave them unwritten


@dataclass(frozen=True, slots=True)
class Keep:
    """A predicate over b, h, q_idx, kv_idx; TRUE keeps every pair."""

    predicate: Expr = TRUE
    empty: Empty = Empty.NAN

    @property
    def zero_if_empty(self) -> bool:
        """True where a row that keeps no key gives O = 0."""
        return self.empty in (Empty.ZERO, Empty.UNREAD)


@dataclass(frozen=True, slots=True)
class Softmax:
    """exp(s) / (sum_j exp(s) + sum_e exp(e)) for each row; `extra` are scores of no key (sinks; softmax + 1 is extra 0)."""

    extra: tuple[Expr, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """Which heads a query uses, and how strongly: both over b, h and q_idx (or fewer).

    O[b, h, i] is `gain` times the sum where `active` holds. Elsewhere the head is not computed for the query: O is 0 and lse is
    -inf whatever the row or the gain would be, NaN included, and nothing gets a gradient through it. All heads of a query may be
    off. Keys and values are never routed: a token that does not use a head as a query still serves it as a key."""

    active: Expr = TRUE
    gain: Expr = ONE


@dataclass(frozen=True, slots=True)
class Origin:
    """The user's line, "file.py:41"; empty for declared programs."""

    line: str = ""


NOWHERE = Origin()


@dataclass(frozen=True)
class Attention:
    """O[b, h, i] = gain * sum_j weigh(score where keep)[j] * adjust[j] * value[j], for each b, h and query i that is active.

    Outputs: O [b, h, q_idx, Dv] in the dtype of the value operand; lse [b, h, q_idx] float32 (float64 for f64), natural log of
    the denominator, extra scores included.
    """

    axes: Axes
    tensors: tuple[TensorDecl, ...]
    score: Expr
    keep: Keep
    weigh: Softmax
    adjust: Expr  # ONE changes nothing
    sum: Read  # a vector over the channels of the value
    route: Route = Route()
    origin: Origin = NOWHERE

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.axes, self.tensors, self.score, self.keep, self.weigh, self.adjust, self.sum, self.route, self.origin))

    def __hash__(self) -> int:
        """Computed once: programs are keys of every cache that a call looks at."""
        return self._hash

    @functools.cached_property
    def decls(self) -> Mapping[str, TensorDecl]:
        return {decl.name: decl for decl in self.tensors}

    @property
    def value(self) -> TensorDecl:
        return self.decls[self.sum.tensor]

    @property
    def expressions(self) -> tuple[Expr, ...]:
        """Every expression of the program, clause by clause."""
        return (self.score, self.keep.predicate, *self.weigh.extra, self.adjust, self.sum, self.route.active, self.route.gain)

    @functools.cached_property
    def sizes(self) -> tuple[str, ...]:
        """Names of the run-time integers, in order of first use."""
        roots: list[Expr] = [self.axes.size(axis) for axis in AXES]
        roots += [size for decl in self.tensors for size in decl.shape]
        roots += self.expressions
        names = [node.name for root in roots for node in walk(root) if isinstance(node, Size)]
        return tuple(dict.fromkeys(names))

    @functools.cached_property
    def absorbs(self) -> bool:
        """True where a row's lse may be too large for float32 to hold log(l) beside the row maximum: under a finite mask."""
        large = any(isinstance(n, Const) and isinstance(n.value, float) and -math.inf < n.value <= -1e3 for n in walk(self.score))
        return self.keep.empty is Empty.SCORE or large

    @functools.cached_property
    def has_rcp(self) -> bool:
        """True where a weight is exp(score - lse) * rcp: rcp gives back what rounding took from lse. So under a finite mask, and in
        float32, where that rounding is as large as the error of eager code."""
        return self.absorbs or self.value.dtype is Dtype.F32

    @functools.cached_property
    def vectors(self) -> frozenset[str]:
        """Operands that are read as vectors: both sides of every dot product, and the value."""
        names = {self.sum.tensor}
        for expr in (self.score, *self.weigh.extra, self.adjust):
            for dot in dots_of(expr):
                names |= {dot.left.tensor, dot.right.tensor}
        return frozenset(names)

    @functools.cached_property
    def differentiable(self) -> tuple[str, ...]:
        """Operands that can carry a gradient: the floating ones that reach the output other than through a predicate."""
        used = {read.tensor for expr in (self.score, *self.weigh.extra, self.adjust, self.route.gain) for read in reads_of(expr)}
        used.add(self.sum.tensor)
        return tuple(decl.name for decl in self.tensors if decl.name in used and decl.dtype.kind is Kind.FLOAT)


def each_clause(program: Attention, change: Callable[[Expr], Expr]) -> Attention:
    """A change of the expression of every clause; the value stays a read."""
    value = change(program.sum)
    assert isinstance(value, Read)
    return replace(
        program,
        score=change(program.score),
        keep=replace(program.keep, predicate=change(program.keep.predicate)),
        weigh=Softmax(tuple(change(extra) for extra in program.weigh.extra)),
        adjust=change(program.adjust),
        sum=value,
        route=Route(change(program.route.active), change(program.route.gain)),
    )


def kind_of(expr: Expr, decls: Mapping[str, TensorDecl]) -> Kind:
    """What `expr` evaluates to, given the dtypes of the tensors that it reads."""
    if isinstance(expr, Const):
        if isinstance(expr.value, bool):
            return Kind.BOOL
        return Kind.INT if isinstance(expr.value, int) else Kind.FLOAT
    if isinstance(expr, Axis | Size):
        return Kind.INT
    if isinstance(expr, Dot | Uniform):
        return Kind.FLOAT
    if isinstance(expr, Read):
        return decls[expr.tensor].dtype.kind
    assert isinstance(expr, Apply)
    fixed = OPERATORS[expr.op].kind
    if fixed is not None:
        return fixed
    operands = expr.args[1:] if expr.op == "where" else expr.args
    kinds = {kind_of(arg, decls) for arg in operands}
    return next(kind for kind in (Kind.FLOAT, Kind.INT, Kind.BOOL) if kind in kinds)


def pair_axes(expr: Expr) -> tuple[bool, bool]:
    """Whether `expr` varies with q_idx, and whether it varies with kv_idx."""
    axes = axes_of(expr)
    return "q_idx" in axes, "kv_idx" in axes

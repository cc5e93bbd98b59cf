"""State: a recurrence over the keys in place of score, weigh and sum. Linear attention in all its kinds.

    state  # model.py:41
      axes    b=2, h=4, q_idx=N, kv_idx=N, c=64, d=64
      read    q: bf16[2, N, 4, 64], k: bf16[2, N, 4, 64], v: bf16[2, N, 4, 64], g: f32[2, N, 4], beta: f32[2, N, 4]
      decay   exp(g[b, kv_idx, h])
      correct -beta[b, kv_idx, h] * k[b, kv_idx, h, c], k[b, kv_idx, h, c] after decay
      write   k[b, kv_idx, h, c], beta[b, kv_idx, h] * v[b, kv_idx, h, d]
      query   q[b, q_idx, h, c] * 0.125 after q_idx

For each b and h a matrix S over c (features of queries and keys) and d (channels of values) goes through one step for each key j:

    S = start                                              before step 0, and before each step that `reset` holds for
    S = decay * S + left (right^T X) + key value^T         X: S after its decay, or before it
    O[b, h, i, d] = sum_c query[i, c] * S[c, d] / weigh    S after, or before, the update of the step that query i names

Each of these is an expression with a channel of its own, so that a feature map, a rotation, a scale or a gate is not a field: `key`
may be `maximum(k[b, h, kv_idx, c], 0.0)`. Before the first step there is `start`, past the last one the last: `after 4095` of 4096
keys is attention to all of them, `after q_idx` is causal, `before q_idx` leaves the own key out, `after q_idx * 2 + 1` makes two
steps a token.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass

from attncompiler.ir.expr import FALSE, KV_IDX, ONE, Q_IDX, ZERO, Axis, B, Expr, H, Read, Size, reads_of, walk
from attncompiler.ir.program import NOWHERE, Dtype, Origin, TensorDecl

C, D, SEGMENT = Axis("c"), Axis("d"), Axis("segment")
STATE_AXES = (B, H, Q_IDX, KV_IDX, C, D, SEGMENT)
ROW = Read("row", (B, H, Q_IDX))  # sum_c query * z: what a normaliser reads; z goes through the steps of S with value 1


@dataclass(frozen=True, slots=True)
class StateAxes:
    """The sizes of b, h, q_idx, kv_idx, of the features c and the channels d, and how many final states there are."""

    b: Expr
    h: Expr
    q_idx: Expr
    kv_idx: Expr
    c: Expr
    d: Expr
    segment: Expr = ONE

    def size(self, axis: Axis) -> Expr:
        value: Expr = getattr(self, axis.name)
        return value


class Moment(enum.Enum):
    """Before or after: of a decay, or of the update of a step (its reset has been made by then)."""

    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Correction:
    """left (right^T X) is added to S; X is S `moment` its decay. The delta rule is left = -beta k, right = k. ZERO, ZERO: none."""

    left: Expr = ZERO  # over b, h, kv_idx, c
    right: Expr = ZERO
    moment: Moment = Moment.AFTER


@dataclass(frozen=True, slots=True)
class Query:
    """What reads the state, over b, h, q_idx, c, and at which moment of which step, an integer over b, h, q_idx."""

    value: Expr
    moment: Moment
    step: Expr


@dataclass(frozen=True, slots=True)
class Start:
    """What S is before its first step and after a reset, over b, h, kv_idx, c, d; kv_idx is the step, so that each segment may have
    its own. `row` is the same for z, over b, h, kv_idx, c."""

    state: Expr = ZERO
    row: Expr = ZERO


@dataclass(frozen=True)
class State:
    """A recurrence and what reads it.

    Outputs: O [b, h, q_idx, d] in the type of the tensor that `value` reads first; the final states [b, segment, h, c, d], S after
    the step `final` of each segment; where there is a normaliser also the final z [b, segment, h, c]. States are float32 (float64
    where an operand is f64)."""

    axes: StateAxes
    tensors: tuple[TensorDecl, ...]
    key: Expr  # over b, h, kv_idx, c
    value: Expr  # over b, h, kv_idx, d
    query: Query
    final: Expr  # over b, segment: the step after which the state of each segment is given; mostly kv_idx - 1, of one segment
    decay: Expr = ONE  # over b, h, kv_idx, c, d: a factor for each head, token, feature or element; exp(x) says its logarithm
    correct: Correction = Correction()
    start: Start = Start()
    reset: Expr = FALSE  # over b, h, kv_idx
    bonus: Expr = ZERO  # over b, h, kv_idx, c: sum_c query * bonus * key * value of the step that the query names is added to O
    weigh: Expr = ONE  # what O is divided by, over b, h, q_idx; may read ROW
    origin: Origin = NOWHERE

    @property
    def clauses(self) -> Mapping[str, Expr]:
        """Every expression of the program, by the name that errors call it."""
        return {
            "key": self.key, "value": self.value, "query": self.query.value, "the step of a query": self.query.step,
            "decay": self.decay, "the left side of a correction": self.correct.left,
            "the right side of a correction": self.correct.right, "start": self.start.state, "the start of rows": self.start.row,
            "reset": self.reset, "bonus": self.bonus, "weigh": self.weigh, "final": self.final,
        }  # fmt: skip

    @property
    def expressions(self) -> tuple[Expr, ...]:
        return tuple(self.clauses.values())

    @functools.cached_property
    def decls(self) -> Mapping[str, TensorDecl]:
        """The operands, and the row that a normaliser reads."""
        row = TensorDecl(ROW.tensor, self.statistics, (self.axes.b, self.axes.h, self.axes.q_idx))
        return {decl.name: decl for decl in (*self.tensors, row)}

    @property
    def statistics(self) -> Dtype:
        """The type of states and rows."""
        return Dtype.F64 if any(decl.dtype is Dtype.F64 for decl in self.tensors) else Dtype.F32

    @property
    def normalised(self) -> bool:
        return ROW in reads_of(self.weigh)

    @functools.cached_property
    def sizes(self) -> tuple[str, ...]:
        """Names of the run-time integers, in order of first use."""
        roots = [self.axes.size(axis) for axis in STATE_AXES] + [size for decl in self.tensors for size in decl.shape]
        roots += self.expressions
        return tuple(dict.fromkeys(node.name for root in roots for node in walk(root) if isinstance(node, Size)))

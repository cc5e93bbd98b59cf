"""What the lowerings take of a state: plain reads, one decay a head or a token, one way to look at the past."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass, replace

from attncompiler.codegen.strided import is_affine
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.expr import (
    FALSE,
    KV_IDX,
    ONE,
    Q_IDX,
    ZERO,
    Apply,
    B,
    Const,
    Expr,
    H,
    Read,
    apply,
    axes_of,
    reads_of,
    sub,
)
from attncompiler.ir.program import Dtype, TensorDecl
from attncompiler.ir.state import C, Correction, D, Moment, Start, State

QUERY_AXES, KEY_AXES, VALUE_AXES = (B, H, Q_IDX, C), (B, H, KV_IDX, C), (B, H, KV_IDX, D)
STATE_AXES, ROW_AXES = (B, H, C, D), (B, H, C)


class Past(enum.Enum):
    """Which steps a query sees."""

    UP_TO_OWN = "after q_idx"
    BEFORE_OWN = "before q_idx"
    ALL = "after the last step"


class Decays(enum.Enum):
    """What the decay varies with."""

    NEVER = "none"
    BY_HEAD = "per head"
    BY_TOKEN = "per token"


@dataclass(frozen=True, eq=False)
class Recurrence:
    """S[j] = exp(log_decay[j]) S[j - 1] + key[j] value[j]^T;  O[i] = scale * query[i]^T S[.] / weigh.

    `start` and `start_row` are tuples of at most one read: none is a start from zero. `weigh` reads ROW where the state is
    normalised; `log_decay` is over b, h and (BY_TOKEN) kv_idx. Compared by identity, since it is a key of caches:
    `parse_recurrence` gives one for a text."""

    program: State
    query: Read
    key: Read
    value: Read
    scale: float
    past: Past
    decays: Decays
    log_decay: Expr
    start: tuple[Read, ...]
    start_row: tuple[Read, ...]
    weigh: Expr

    @property
    def normalised(self) -> bool:
        return self.program.normalised

    @property
    def value_dtype(self) -> Dtype:
        return self.program.decls[self.value.tensor].dtype

    @functools.cached_property
    def differentiable(self) -> frozenset[str]:
        """Operands that can carry a gradient."""
        roots = (self.query, self.key, self.value, self.log_decay, *self.start, *self.start_row, self.weigh)
        floats = {decl.name for decl in self.program.tensors if decl.dtype in (Dtype.F64, Dtype.F32, Dtype.BF16, Dtype.F16)}
        return frozenset(read.tensor for root in roots for read in reads_of(root)) & floats


def recurrence_of(program: State) -> Recurrence:
    """The recurrence that a state is. Raises: UnsupportedProgram, naming the first clause that no lowering computes."""
    try:
        return _recurrence(program)
    except _NotThere as error:
        raise UnsupportedProgram(
            f"{error.what} has no kernel yet",
            where=program.origin.line,
            why="it is part of the language, with a meaning (ir.interpret_program), but no kernel of linear attention computes it",
            do=error.do,
        ) from None


def why_not_lowered(program: State) -> str:
    """Why no lowering computes a state; "" where one does."""
    try:
        recurrence_of(program)
    except UnsupportedProgram as error:
        return error.what
    return ""


class _NotThere(Exception):
    def __init__(self, what: str, do: str) -> None:
        self.what, self.do = what, do
        super().__init__(what)


_BEFORE = "compute it in plain PyTorch before the linear attention: what it gives is an operand like any other"


def _recurrence(program: State) -> Recurrence:
    axes = program.axes
    if program.correct != Correction():
        raise _NotThere("a state that is corrected at each step (delta rule)", "write the steps as a loop, or as chunks")
    if program.reset != FALSE:
        raise _NotThere("a state that starts anew within a sequence (reset)", "give each sequence a batch entry of its own")
    if program.bonus != ZERO:
        raise _NotThere(
            "a bonus of the own key (bonus)", "add it to the output: it is a dot product of each query with its own key"
        )
    if axes.segment != ONE or program.final != sub(axes.kv_idx, ONE):
        raise _NotThere("a final state other than that after the last step", "cut the sequence there, and pass the state on")
    scale, query = _scaled(program.query.value)
    key, value = program.key, program.value
    found: list[Read] = []
    for name, expr in (("query", query), ("key", key), ("value", value)):
        if not isinstance(expr, Read) or not is_affine(expr):
            raise _NotThere(f"a {name} that is computed or gathered within the state", _BEFORE)
        found.append(expr)
    decays, log_decay = _decay(program.decay)
    start, start_row = (_start(expr, name) for expr, name in ((program.start.state, "state"), (program.start.row, "row")))
    if any("kv_idx" in axes_of(expr) for expr in (*start, *start_row)):
        raise _NotThere("a start that differs from step to step", "give each sequence a batch entry of its own")
    return Recurrence(
        program, found[0], found[1], found[2], scale, _past(program), decays, log_decay, start, start_row, program.weigh
    )  # fmt: skip


def _scaled(query: Expr) -> tuple[float, Expr]:
    """A query, or a logarithm, as a number times what is left."""
    if isinstance(query, Apply) and query.op in ("mul", "div"):
        left, right = query.args
        if isinstance(right, Const):
            scale, rest = _scaled(left)
            number = float(right.value)
            return (scale * number if query.op == "mul" else scale / number), rest
        if isinstance(left, Const) and query.op == "mul":
            scale, rest = _scaled(right)
            return scale * float(left.value), rest
    if isinstance(query, Apply) and query.op == "neg":
        scale, rest = _scaled(query.args[0])
        return -scale, rest
    return 1.0, query


def factored_log(recurrence: Recurrence) -> tuple[float, Read] | None:
    """The logarithm of a decay as a number times one plain read; None where it is another expression."""
    factor, read = _scaled(recurrence.log_decay)
    return (factor, read) if isinstance(read, Read) and is_affine(read) else None


def _past(program: State) -> Past:
    query, axes = program.query, program.axes
    if query.step == Q_IDX and axes.q_idx == axes.kv_idx:
        return Past.UP_TO_OWN if query.moment is Moment.AFTER else Past.BEFORE_OWN
    if query.step == sub(axes.kv_idx, ONE) and query.moment is Moment.AFTER:
        return Past.ALL
    if query.step == Q_IDX:
        raise _NotThere(
            "a causal state with other numbers of queries and keys", "give as many queries as keys, and an initial state"
        )
    raise _NotThere(
        "a query that reads the state at a step other than its own or the last", "cut the sequence, and pass the state on"
    )


def _decay(decay: Expr) -> tuple[Decays, Expr]:
    if decay in (ONE, Const(1.0)):
        return Decays.NEVER, ZERO
    if isinstance(decay, Const) and decay.value > 0:
        return Decays.BY_HEAD, apply("log", Const(float(decay.value)))
    if not (isinstance(decay, Apply) and decay.op == "exp"):
        raise _NotThere("a decay that is not exp of its logarithm", "pass the logarithm, and exp of it as the decay")
    (log,) = decay.args
    varies = axes_of(log)
    if varies & {"c", "d"}:
        raise _NotThere("a decay of each channel", "use one decay for all channels of a head, or write the steps as a loop")
    return (Decays.BY_TOKEN if KV_IDX.name in varies else Decays.BY_HEAD), log


def _start(expr: Expr, name: str) -> tuple[Read, ...]:
    if expr in (ZERO, Const(0.0)):
        return ()
    if not isinstance(expr, Read) or not is_affine(expr):
        raise _NotThere(f"an initial {name} that is computed within the state", _BEFORE)
    return (expr,)


@functools.lru_cache(maxsize=4096)
def undivided(recurrence: Recurrence) -> tuple[Recurrence, ...]:
    """A recurrence without its division; where that reads rows, also the one whose O, of a single channel, is the rows: its values
    are an operand `ones` of one element."""
    program = recurrence.program
    above = recurrence_of(replace(program, weigh=ONE, start=Start(program.start.state)))
    if not recurrence.normalised:
        return (above,)
    ones = TensorDecl("ones", recurrence.value_dtype, (ONE,))
    rows = replace(
        program,
        axes=replace(program.axes, d=ONE),
        tensors=(*program.tensors, ones),
        value=Read(ones.name, (ZERO,)),
        start=Start(program.start.row),
        weigh=ONE,
    )
    return above, recurrence_of(rows)

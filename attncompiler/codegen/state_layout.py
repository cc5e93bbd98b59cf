"""The results of a recurrence, and what its kernels need to know of the operands at run time."""

from __future__ import annotations

from dataclasses import dataclass

from attncompiler.codegen.recurrence import Decays, Past, Recurrence
from attncompiler.codegen.strided import group_of
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.expr import Const
from attncompiler.ir.program import Dtype
from attncompiler.tuning.state_schedule import padded

MAX_CHANNELS = 256


@dataclass(frozen=True, slots=True)
class Role:
    """One result of a recurrence, as templates/chunked_state.py has it. `out` and `seen`: the tensors that its kernel writes, the
    second what a decay's gradient is made of, which is its result times `along`; `states` what enters segments, `last` the one past
    all of them."""

    kernel: str
    x: str
    y: str
    z: str
    backward: bool
    out: str
    along: str = ""
    seen: str = ""

    @property
    def transposed(self) -> bool:
        """Whether the state is x by z the other way round: states in memory are [c, d]."""
        return self.x in ("v", "do")

    @property
    def states(self) -> str:
        return "StateGradients" if self.backward else "States"

    @property
    def last(self) -> str:
        return "StartGradient" if self.backward else "Final"


OUTPUTS = Role("state_outputs", "q", "k", "v", False, "O")
QUERIES = Role("gradient_of_queries", "do", "v", "k", False, "DQ", "q", "Seen")
VALUES = Role("gradient_of_values", "k", "q", "do", True, "DV")
KEYS = Role("gradient_of_keys", "v", "do", "q", True, "DK", "k", "Written")
ROLES = {role.kernel: role for role in (OUTPUTS, QUERIES, VALUES, KEYS)}


@dataclass(frozen=True)
class StateLayout:
    """What the operands look like at run time, as far as the source depends on it.

    `groups`: heads that share a query, a key and a value vector. `segmented`: whether a sequence is cut. `entering`, `arriving`:
    whether there is a state before the first step, and a gradient of the one after the last. `of_decay`: whether the gradient of
    the decay is asked for; `roles`: which other gradients are. `log_factor`: what logarithms in memory are multiplied by."""

    groups: tuple[int, int, int]
    segmented: bool
    entering: bool = False
    arriving: bool = False
    of_decay: bool = False
    roles: tuple[Role, ...] = (QUERIES, VALUES, KEYS)
    log_factor: float = 1.0


def channels_of(recurrence: Recurrence) -> tuple[int, int]:
    """c and d. Raises: UnsupportedProgram, in the user's words, for what has no kernel on a GPU."""
    axes, decls = recurrence.program.axes, recurrence.program.decls

    def refuse(what: str, why: str) -> UnsupportedProgram:
        return UnsupportedProgram(what, where=recurrence.program.origin.line, why=why, do="it runs as torch code, in chunks")

    if not (isinstance(axes.c, Const) and isinstance(axes.d, Const)):
        raise refuse("the sizes of features and channels are known at run time only", "tiles are made for them")
    c, d = int(axes.c.value), int(axes.d.value)
    if max(c, d) > MAX_CHANNELS:
        raise refuse(f"a state of {c} by {d} numbers", f"kernels keep up to {MAX_CHANNELS} features in registers")
    dtypes = {decls[read.tensor].dtype for read in (recurrence.query, recurrence.key, recurrence.value)}
    if len(dtypes) > 1 or not dtypes <= {Dtype.F32, Dtype.BF16, Dtype.F16} or recurrence.program.statistics is Dtype.F64:
        raise refuse("queries, keys and values that are not all float32, bfloat16 or float16", "tensor cores multiply these")
    if recurrence.past is Past.ALL and recurrence.decays is not Decays.NEVER:
        raise refuse("a decay where every query sees all keys", "kernels have one for queries that see the past alone")
    return c, d


def slices_of(size: int, block: int) -> int:
    """How many programs share the channels of a vector of `size`, each with at most `block` of them."""
    return -(-size // min(block, padded(size)))


def static_groups(recurrence: Recurrence) -> tuple[int, int, int]:
    """How many heads share a query, a key and a value, by the program's text."""
    q, k, v = (group_of(read) for read in (recurrence.query, recurrence.key, recurrence.value))
    return q, k, v

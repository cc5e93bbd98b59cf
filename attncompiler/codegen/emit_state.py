"""Recurrence + schedule -> one readable Triton file: forward and backward kernels. Fills holes, decides nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attncompiler.codegen.recurrence import Decays, Past, Recurrence
from attncompiler.codegen.strided import group_of
from attncompiler.codegen.text import fill, signature
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.expr import ONE, Const
from attncompiler.ir.phase_text import work_text
from attncompiler.ir.program import Dtype
from attncompiler.templates import chunked_state
from attncompiler.tuning.state_schedule import ChunkSchedule, StateSchedule, choose_state_schedule, padded
from attncompiler.tuning.target import Target

LOG2E = math.log2(math.e)
MAX_CHANNELS = 256


@dataclass(frozen=True, slots=True)
class Role:
    """One result of a recurrence, as templates/chunked_state.py has it. `along`: what its gradient of a logarithm is taken along."""

    kernel: str
    x: str
    y: str
    z: str
    backward: bool
    along: str

    @property
    def transposed(self) -> bool:
        """Whether the state is x by z the other way round: states in memory are [c, d]."""
        return self.x in ("v", "do")


OUTPUTS = Role("state_outputs", "q", "k", "v", False, "")
QUERIES = Role("state_backward_queries", "do", "v", "k", False, "q")
VALUES = Role("state_backward_values", "k", "q", "do", True, "")
KEYS = Role("state_backward_keys", "v", "do", "q", True, "k")
ROLES = {role.kernel: role for role in (OUTPUTS, QUERIES, VALUES, KEYS)}
SCAN = ChunkSchedule(0, 0, 4, 1)  # one program for 1024 numbers of a state
_POINTERS = {"q": "Q", "k": "K", "v": "V", "do": "DO"}


@dataclass(frozen=True)
class StateLayout:
    """What the operands look like at run time, as far as the source depends on it.

    `groups`: heads that share a query, a key and a value vector. `segmented`: whether a sequence is cut. `entering`, `arriving`:
    whether there is a state before the first step, and a gradient of the one after the last. `of_decay`: whether the gradient of the
    decay is asked for."""

    groups: tuple[int, int, int]
    segmented: bool
    entering: bool = False
    arriving: bool = False
    of_decay: bool = False


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
    if recurrence.weigh != ONE:
        raise refuse("a normaliser", "kernels do not sum rows yet")
    return c, d


def emit_state(recurrence: Recurrence, schedule: StateSchedule, layout: StateLayout) -> str:
    """The source of all kernels. Raises: UnsupportedProgram, in the user's words."""
    e = StateEmission(recurrence, schedule, layout)
    kernels = "\n".join(map(e.source, e.kernels))
    return f"{_header(recurrence)}\nimport triton\nimport triton.language as tl\n{kernels}"


class StateEmission:
    """The pieces that the kernels of one recurrence share."""

    def __init__(self, recurrence: Recurrence, schedule: StateSchedule, layout: StateLayout) -> None:
        self.recurrence, self.schedule, self.layout = recurrence, schedule, layout
        c, d = channels_of(recurrence)
        self.size = {"q": c, "k": c, "v": d, "do": d}
        q, k, v = layout.groups
        self.group = {"q": q, "k": k, "v": v, "do": 1}
        self.strict = recurrence.past is Past.BEFORE_OWN
        self.decays = recurrence.decays
        dtype = recurrence.program.decls[recurrence.query.tensor].dtype
        self.precision = f', input_precision="{schedule.float32}"' if dtype is Dtype.F32 else ""

    # ------------------------------------------------------------------------------------------------------ kernels

    @property
    def kernels(self) -> dict[str, ChunkSchedule]:
        """The kernels that may run, in order, and how each is cut up."""
        cut = self.layout.segmented or self.recurrence.past is Past.ALL
        before = {"state_segments": self.schedule.states, "state_scan": SCAN} if cut else {}
        after = {"state_backward_segments": self.schedule.states, "state_backward_scan": SCAN} if cut else {}
        backward = {role.kernel: self.schedule.walk for role in (QUERIES, VALUES, KEYS)}
        return {**before, OUTPUTS.kernel: self.schedule.walk, **after, **backward}

    def sliced(self, kernel: str) -> str:
        """Whose channels the programs of a kernel share: v's, for the kernels of states."""
        return ROLES[kernel].z if kernel in ROLES else "v"

    def source(self, kernel: str) -> str:
        if kernel in ROLES:
            role = ROLES[kernel]
            return self.read(role) if self.recurrence.past is Past.ALL else self.walk(role)
        backward = "backward" in kernel
        if kernel.endswith("scan"):
            return self.scan(kernel, backward)
        return self.states(kernel, *(("q", "do") if backward else ("k", "v")), backward)

    def states(self, kernel: str, y: str, z: str, backward: bool) -> str:
        """The state of each segment by itself, from zero."""
        schedule = self.schedule.states
        total = "tl.store(Totals + bh * SEGMENTS + segment, tl.sum(sums, 0))" if self.decays is Decays.BY_TOKEN else ""
        before = "\n".join(filter(None, [self.before(), "sums = tl.zeros([BLOCK_N], dtype=tl.float64)" if total else ""]))
        parameters = [*self.pointers(y, z), "States", *(["Totals"] if total else []), *self.log_pointer(True)]
        parameters += [*self.common(), "SEGMENTS"]
        return fill(
            chunked_state.STATES,
            kernel=kernel,
            parameters=signature([*parameters, *self.strides(y, z), *_TILES]),
            slices=self.slices(z, schedule),
            block_x=str(padded(self.size[y])),
            place_y=self.place(y, "rows", transposed=True),
            place_z=self.place(z, "channels"),
            before=before,
            chunk=_chunk(backward),
            load_y=self.load(y, self.all_masked(y), transposed=True),
            load_z=self.load(z, self.slice_masked(z, schedule)),
            decays=self.decay_lines(backward, within=False) + ("\nsums += logs" if total else ""),
            write=self.write(y, z, backward),
            store_total=total,
            elements=str(self.elements),
            state_offsets=self.state_offsets(False),
            state_mask=self.state_mask(y, z, schedule),
        )

    def scan(self, kernel: str, backward: bool) -> str:
        """What enters each segment, and what leaves the last."""
        has_start = self.layout.arriving if backward else self.layout.entering
        whole = {
            Decays.NEVER: "state",
            Decays.BY_HEAD: "state * tl.exp2(log * tl.minimum(SEGMENT, N - segment * SEGMENT))",
            Decays.BY_TOKEN: f"state * tl.exp2(tl.load(Totals + bh * SEGMENTS + segment).to(tl.float32) * {LOG2E!r})",
        }[self.decays]
        parameters = ["States", "Final", *(["Start"] if has_start else []), *self.log_pointer(False)]
        parameters += ["Totals"] if self.decays is Decays.BY_TOKEN else ["SEGMENT", "N"] if self.decays is Decays.BY_HEAD else []
        return fill(
            chunked_state.SCAN,
            kernel=kernel,
            parameters=signature([*parameters, "SEGMENTS"]),
            elements=str(self.elements),
            before=self.before() if self.decays is Decays.BY_HEAD else "",
            start=f"tl.load(Start + bh * {self.elements} + elements, mask=inside, other=0.0)"
            if has_start
            else "tl.zeros([1024], dtype=tl.float32)",
            segment="SEGMENTS - 1 - step" if backward else "step",
            whole=whole,
        )

    def walk(self, role: Role) -> str:
        """One result, chunk after chunk."""
        x, y, z, schedule = role.x, role.y, role.z, self.schedule.walk
        along = role.along if self.layout.of_decay else ""
        leaves = not self.layout.segmented
        parameters = [*self.pointers(x, y, z, *([along] if along else [])), "Out"]
        parameters += ["States"] if self.enters(role) else []
        parameters += ["Left"] if leaves else []
        parameters += ["Seen"] if along else []
        parameters += [*self.log_pointer(True), *self.common(), *(["SEGMENTS"] if self.enters(role) else [])]
        operands = dict.fromkeys((x, y, z, *([along] if along else [])))
        return fill(
            chunked_state.WALK,
            kernel=role.kernel,
            parameters=signature([*parameters, *self.strides(*operands), *_strides("out"), *_TILES]),
            slices=self.slices(z, schedule),
            block_x=str(padded(self.size[x])),
            x=x,
            y=y,
            z=z,
            place_x=self.place(x, "rows"),
            place_y=self.place(y, "rows", transposed=True),
            place_z=self.place(z, "channels"),
            place_along=self.place(along, "channels") if along else "",
            before=self.before(),
            enter=self.enter(role),
            chunk=_chunk(role.backward),
            load_x=self.load(x, self.all_masked(x)),
            load_y=self.load(y, self.all_masked(y), transposed=True),
            load_z=self.load(z, self.slice_masked(z, schedule)),
            decays=self.decay_lines(role.backward, within=True),
            precision=self.precision,
            weigh=self.weigh(role.backward),
            entered="" if self.decays is Decays.NEVER else " * reads[:, None]",
            products=self.products(role, along),
            scale="" if role.backward or self.recurrence.scale == 1.0 else f"out *= {self.recurrence.scale!r}",
            write=self.write(y, z, role.backward),
            channel_mask=self.channel_mask(z, schedule),
            leave=self.leave(role) if leaves else "",
        )

    def read(self, role: Role) -> str:
        """One result where all steps read one state."""
        x, z, schedule = role.x, role.z, self.schedule.walk
        parameters = [*self.pointers(x), "Out", "States", "H", "N"]
        return fill(
            chunked_state.READ,
            kernel=role.kernel,
            parameters=signature([*parameters, *self.strides(x), *_strides("out"), *_TILES]),
            slices=self.slices(z, schedule),
            block_x=str(padded(self.size[x])),
            x=x,
            place_x=self.place(x, "rows"),
            enter="at = bh * {} + {}\nstate = tl.load(States + at{})".format(
                self.elements, self.state_offsets(role.transposed), self.state_mask(x, z, schedule, load=True)
            ),
            load_x=self.load(x, self.all_masked(x)),
            precision=self.precision,
            scale="" if role.backward or self.recurrence.scale == 1.0 else f"out *= {self.recurrence.scale!r}",
            channel_mask=self.channel_mask(z, schedule),
        )

    # ------------------------------------------------------------------------------------------------- parameters

    @property
    def elements(self) -> int:
        return self.size["q"] * self.size["v"]

    def slices(self, z: str, schedule: ChunkSchedule) -> str:
        return str(-(-self.size[z] // self.block_z(z, schedule)))

    def channel_mask(self, z: str, schedule: ChunkSchedule) -> str:
        return f" & (channels[None, :] < {self.size[z]})" if self.slice_masked(z, schedule) else ""

    def pointers(self, *names: str) -> list[str]:
        return [_POINTERS[name] for name in dict.fromkeys(names)]

    def log_pointer(self, walks: bool) -> list[str]:
        return ["LogDecay"] if self.decays is Decays.BY_HEAD or (walks and self.decays is Decays.BY_TOKEN) else []

    def common(self) -> list[str]:
        return ["H", "N", "SEGMENT"]

    def strides(self, *names: str) -> list[str]:
        return [stride for name in dict.fromkeys(names) for stride in _strides(name)]

    # ------------------------------------------------------------------------------------------------------- loads

    def block_z(self, name: str, schedule: ChunkSchedule) -> int:
        return min(schedule.block_z, padded(self.size[name]))

    def place(self, name: str, channels: str, transposed: bool = False) -> str:
        """Where a tensor's vectors of this batch and head begin, and the offsets of a tile; `channels`: all of them are `rows`."""
        head = "h" if self.group[name] == 1 else f"(h // {self.group[name]})"
        base = f"{name}_at = {_POINTERS[name]} + b * stride_{name}_b + {head} * stride_{name}_h"
        across, down = f"{channels}[:, None]", "steps[None, :]"
        if not transposed:
            across, down = f"{channels}[None, :]", "steps[:, None]"
        return f"{base}\n{name}_offsets = {down} * stride_{name}_row + {across} * stride_{name}_channel"

    def load(self, name: str, masked: str = "", transposed: bool = False) -> str:
        """A tile [steps, channels], or [channels, steps]; `masked` names the channels where they don't fill it."""
        inside = "inside[None, :]" if transposed else "inside[:, None]"
        test = f" & ({masked}[{':, None' if transposed else 'None, :'}] < {self.size[name]})" if masked else ""
        at = f"{name}_at + start.to(tl.int64) * stride_{name}_row + {name}_offsets"
        return f"{name}{'_t' if transposed else ''} = tl.load({at}, mask={inside}{test}, other=0.0)"

    def all_masked(self, name: str) -> str:
        return "rows" if padded(self.size[name]) != self.size[name] else ""

    def slice_masked(self, name: str, schedule: ChunkSchedule) -> str:
        return "channels" if self.size[name] % self.block_z(name, schedule) else ""

    def state_offsets(self, transposed: bool) -> str:
        """Of a tile [rows, channels] of a state, in memory [c, d]."""
        d = self.size["v"]
        return f"rows[:, None] + channels[None, :] * {d}" if transposed else f"rows[:, None] * {d} + channels[None, :]"

    def state_mask(self, x: str, z: str, schedule: ChunkSchedule, load: bool = False) -> str:
        tests = [f"({name}[{at}] < {size})" for name, at, size in (
            (self.all_masked(x), ":, None", self.size[x]), (self.slice_masked(z, schedule), "None, :", self.size[z]),
        ) if name]  # fmt: skip
        return f", mask={' & '.join(tests)}{', other=0.0' if load else ''}" if tests else ""

    def enters(self, role: Role) -> bool:
        return self.layout.segmented or (self.layout.arriving if role.backward else self.layout.entering)

    def enter(self, role: Role) -> str:
        """The state before the segment's first step; walking back, the gradient of that after its last."""
        if not self.enters(role):
            return f"state = tl.zeros([{padded(self.size[role.x])}, BLOCK_Z], dtype=tl.float32)"
        at = f"(bh * SEGMENTS + segment) * {self.elements} + {self.state_offsets(role.transposed)}"
        return f"state = tl.load(States + {at}{self.state_mask(role.x, role.z, self.schedule.walk, load=True)})"

    def leave(self, role: Role) -> str:
        at = f"bh * {self.elements} + {self.state_offsets(role.transposed)}"
        return f"tl.store(Left + {at}, state{self.state_mask(role.x, role.z, self.schedule.walk)})"

    # ------------------------------------------------------------------------------------------------------ decays

    def before(self) -> str:
        return f"log = tl.load(LogDecay + bh) * {LOG2E!r}" if self.decays is Decays.BY_HEAD else ""

    def decay_lines(self, backward: bool, within: bool) -> str:
        """`reads` from the state to a step, `writes` from a step to the state, `whole` across the chunk; `within` it, from each step of
        the columns to one of the rows that sees it, else 0. Walking back, steps of the rows are seen by those of the columns."""
        later, earlier = ("[None, :]", "[:, None]") if backward else ("[:, None]", "[None, :]")
        apart = f"steps{later} - steps{earlier}"
        lines = [f"sees = {apart} >= {int(self.strict)}"] if within else []
        if self.decays is Decays.NEVER:
            return "\n".join(lines)
        of_queries, of_keys = ("writes", "reads") if backward else ("reads", "writes")
        wanted = {"reads", "writes"} if within else {"writes"}
        if self.decays is Decays.BY_HEAD:
            lines.append("count = tl.minimum(N - start, BLOCK_N)")
            factors = {of_queries: f"tl.exp2({'steps' if self.strict else '(steps + 1)'} * log)"}
            factors[of_keys] = "tl.exp2(tl.maximum(count - 1 - steps, 0) * log)"
            exponent = f"({apart}{' - 1' if self.strict else ''}) * log"
            whole = "tl.exp2(count * log)"
        else:
            lines += [
                "logs = tl.load(LogDecay + bh * N + start + steps, mask=inside, other=0.0).to(tl.float64)",
                "total = tl.cumsum(logs, 0)",
                "end = tl.sum(logs, 0)",
                *(["entry = total - logs"] if self.strict else []),
            ]
            entry = "entry" if self.strict else "total"
            factors = {of_queries: f"tl.exp2({entry}.to(tl.float32) * {LOG2E!r})"}
            factors[of_keys] = f"tl.exp2((end - total).to(tl.float32) * {LOG2E!r})"
            whole = f"tl.exp2(end.to(tl.float32) * {LOG2E!r})"
            if within:
                lines.append(
                    "# coarse parts of the sums have exact differences: a strong decay leaves the weak ones after it their digits"
                )
                for name in dict.fromkeys((entry, "total")):
                    lines += [
                        f"coarse_{name} = (tl.floor({name} * 256.0) * 0.00390625).to(tl.float32)",
                        f"fine_{name} = ({name} - coarse_{name}).to(tl.float32)",
                    ]
            parts = (f"({part}_{entry}{later} - {part}_total{earlier})" for part in ("coarse", "fine"))
            exponent = f"({' + '.join(parts)}) * {LOG2E!r}"
        if within:
            lines.append(f'within = tl.exp2(tl.where(sees, {exponent}, float("-inf")))')
        lines += [f"{name} = {factor}" for name, factor in sorted(factors.items()) if name in wanted]
        return "\n".join([*lines, f"whole = {whole}"])

    def weigh(self, backward: bool) -> str:
        weighed = "tl.where(sees, scores, 0.0)" if self.decays is Decays.NEVER else "scores * within"
        scale = f" * {self.recurrence.scale!r}" if backward and self.recurrence.scale != 1.0 else ""
        return f"scores = {weighed}{scale}"

    def write(self, y: str, z: str, backward: bool) -> str:
        """Adds a chunk to the state. Walking back, y and z are of queries, which have a scale."""
        factors = [] if self.decays is Decays.NEVER else ["writes[:, None]"]
        factors += [repr(self.recurrence.scale)] if backward and self.recurrence.scale != 1.0 else []
        written = f"({' * '.join([z, *factors])}).to({z}.dtype)" if factors else z
        kept = "state" if self.decays is Decays.NEVER else "state * whole"
        return f"state = tl.dot({y}_t, {written}, acc={kept}{self.precision})"

    def products(self, role: Role, along: str) -> str:
        """Adds to `out` what the chunk's own steps give. With `along`, what a step gives itself is added last, after the sum that a
        gradient of logarithms is made of: it has no decay, and would only cancel there."""
        z = role.z
        if not along:
            return f"out = tl.dot(scores.to({z}.dtype), {z}, acc=out{self.precision})"
        lines = []
        if not self.strict:
            lines = [
                "diagonal = steps[:, None] == steps[None, :]",
                "own = tl.sum(tl.where(diagonal, scores, 0.0), 1)",
                "scores = tl.where(diagonal, 0.0, scores)",
            ]
        scale = "" if role.backward or self.recurrence.scale == 1.0 else f" * {self.recurrence.scale!r}"
        lines += [
            f"out = tl.dot(scores.to({z}.dtype), {z}, acc=out{self.precision})",
            self.load(along, self.slice_masked(along, self.schedule.walk)),
            f"seen = tl.sum(out * {along}, 1){scale}",
            f"seen_at = Seen + (tl.program_id(0) % {self.slices(z, self.schedule.walk)} * (tl.num_programs(0) // "
            f"{self.slices(z, self.schedule.walk)}) + bh) * N",
            "tl.store(seen_at + start + steps, seen, mask=inside)",
        ]
        return "\n".join([*lines, *([] if self.strict else [f"out += own[:, None] * {z}"])])


def _strides(name: str) -> list[str]:
    return [f"stride_{name}_{axis}" for axis in ("b", "h", "row", "channel")]


_TILES = ["BLOCK_N: tl.constexpr", "BLOCK_Z: tl.constexpr"]


def _chunk(backward: bool) -> str:
    return "(chunks - 1 - chunk)" if backward else "chunk"


def _header(recurrence: Recurrence) -> str:
    origin = recurrence.program.origin.line or "a declared program"
    lines = [f"Linear attention for {origin}: a state goes through the keys, chunk by chunk; time and memory are linear.", ""]
    lines += work_text(recurrence.program).rstrip().splitlines()
    lines += ["", "S[j] = decay[j] * S[j - 1] + K[j] V[j]^T;  O[i] = Q[i]^T S[.], of the step that the query names."]
    return "\n".join(f"# {line}".rstrip() for line in lines) + "\n"


def state_source(recurrence: Recurrence, target: Target) -> str:
    """What would run on a target of operands that lie dense, segmented, with every gradient: for people to read."""
    c, d = channels_of(recurrence)
    dtype = recurrence.program.decls[recurrence.query.tensor].dtype
    schedule = choose_state_schedule(max(c, d), 4 if dtype is Dtype.F32 else 2, target)
    of_decay = recurrence.decays is not Decays.NEVER
    layout = StateLayout(static_groups(recurrence), True, bool(recurrence.start), False, of_decay)
    return emit_state(recurrence, schedule, layout)


def static_groups(recurrence: Recurrence) -> tuple[int, int, int]:
    """How many heads share a query, a key and a value, by the program's text."""
    q, k, v = (group_of(read) for read in (recurrence.query, recurrence.key, recurrence.value))
    return q, k, v

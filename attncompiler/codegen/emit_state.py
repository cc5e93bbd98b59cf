"""Recurrence + schedule -> one readable Triton file: forward and backward kernels. Fills holes, decides nothing."""

from __future__ import annotations

from attncompiler.codegen.recurrence import Decays, Past, Recurrence, factored_log, undivided
from attncompiler.codegen.state_layout import KEYS, OUTPUTS, QUERIES, ROLES, StateLayout, channels_of, static_groups
from attncompiler.codegen.state_tiles import LOG2E
from attncompiler.codegen.state_walks import BLOCKS, StateWalks, chunk_of
from attncompiler.codegen.text import fill, indent, signature
from attncompiler.ir.expr import ONE
from attncompiler.ir.phase_text import work_text
from attncompiler.ir.program import Dtype
from attncompiler.templates import chunked_state
from attncompiler.tuning.state_schedule import ChunkSchedule, StateSchedule, choose_state_schedule, padded
from attncompiler.tuning.target import Target

SEGMENTS, SCAN, OF_SEGMENTS, OF_SCAN = "state_segments", "state_scan", "gradient_of_segments", "gradient_scan"
_SCANNED = ChunkSchedule(0, 0, 4, 1)  # one program for 1024 numbers of a state


def emit_state(recurrence: Recurrence, schedule: StateSchedule, layout: StateLayout) -> str:
    """The source of all kernels. Raises: UnsupportedProgram, in the user's words."""
    kernels = "\n".join(StateEmission(recurrence, schedule, layout).sources())
    return f"{_header(recurrence)}\nimport triton\nimport triton.language as tl\n{kernels}"


class StateEmission(StateWalks):
    """The kernels of one recurrence. What a backward launches at once are parts of one kernel, by its third program index."""

    @property
    def cut(self) -> bool:
        return self.layout.segmented or self.recurrence.past is Past.ALL

    @property
    def forward(self) -> dict[str, tuple[str, ...]]:
        """The kernels of a forward, in order, each with its parts."""
        before = {SEGMENTS: (SEGMENTS,), SCAN: (SCAN,)} if self.cut else {}
        return {**before, OUTPUTS.kernel: (OUTPUTS.kernel,)}

    @property
    def backward(self) -> dict[str, tuple[str, ...]]:
        """The kernels of a backward. States that no gradient needs are not made."""
        roles = self.layout.roles
        if not roles:
            return {}
        needed = [(QUERIES in roles, SEGMENTS, SCAN), (any(role.backward for role in roles), OF_SEGMENTS, OF_SCAN)]
        segments, scans = (tuple(parts[place] for parts in needed if parts[0]) for place in (1, 2))
        before = {"state_backward_segments": segments, "state_backward_scan": scans} if self.cut else {}
        return {**before, "state_backward": tuple(role.kernel for role in roles)}  # type: ignore[dict-item]

    def schedule_of(self, kernel: str) -> ChunkSchedule:
        if kernel.endswith("scan"):
            return _SCANNED
        return self.schedule.states if kernel.endswith("segments") else self.schedule.walk

    def across(self, part: str) -> int:
        """How many programs share the channels of a head in a part."""
        return 1 if part in (SCAN, OF_SCAN) else self.slices(self.sliced(part), self.schedule_of(part))

    def sliced(self, part: str) -> str:
        """Whose channels the programs of a part share."""
        return ROLES[part].z if part in ROLES else "v"

    def sources(self) -> list[str]:
        """Every part, and the kernels that hold several."""
        parts = dict.fromkeys(part for parts in (*self.forward.values(), *self.backward.values()) for part in parts)
        found = {part: self._source(part) for part in parts}
        parameters = {part: self._parameters(part) for part in parts}
        return [*found.values(), *(self._joined(name, of, parameters) for name, of in self.backward.items())]

    def _source(self, part: str) -> str:
        if part in ROLES:
            return self.read(ROLES[part]) if self.recurrence.past is Past.ALL else self.walk(ROLES[part])
        return self._scan(part) if part in (SCAN, OF_SCAN) else self._states(part)

    def _parameters(self, part: str) -> list[str]:
        if part in (SCAN, OF_SCAN):
            return self._scan_parameters(part)
        if part in ROLES:
            return self.role_parameters(ROLES[part])
        y, z = _yz(part)
        totals = ["Totals"] if self._makes_totals(part) else []
        states = [QUERIES.states if part == SEGMENTS else KEYS.states, *totals, *self.log_parameters(True)]
        return [*self.pointers(y, z), *states, "H", "N", "SEGMENT", "SEGMENTS", *self.strides(y, z), *BLOCKS]

    def _joined(self, kernel: str, parts: tuple[str, ...], parameters: dict[str, list[str]]) -> str:
        """One kernel for several parts; a part with fewer slices than another leaves programs over."""
        most = max(map(self.across, parts))
        wanted = dict.fromkeys(name for part in parts for name in parameters[part] if not name.startswith("BLOCK_Z"))
        lines = ["part = tl.program_id(2)"] if len(parts) > 1 else []
        for place, part in enumerate(parts):
            block_z = str(self.block_z(self.sliced(part), self.schedule_of(part)))
            given = [block_z if name.startswith("BLOCK_Z") else name.split(":")[0] for name in parameters[part]]
            tests = [f"part == {place}"] if len(parts) > 1 else []
            slices = self.across(part)
            if slices < most:
                wanted.setdefault("BH")
                tests.append(f"tl.program_id(0) < BH * {slices}")
            call = f"{part}({signature(given)})"
            lines.append(f"if {' and '.join(tests)}:\n{indent(call, 1)}" if tests else call)
        body = indent("\n".join(lines), 1)
        constexprs = [name for name in wanted if ":" in name]
        ordered = [*(name for name in wanted if ":" not in name), *constexprs]
        return f"\n@triton.jit\ndef {kernel}({signature(ordered)}):\n{body}\n"

    # ------------------------------------------------------------------------------------------- states of segments

    def _makes_totals(self, part: str) -> bool:
        """Whether a part writes the sums of a segment's logarithms: one of a launch does."""
        first = part == SEGMENTS or SEGMENTS not in self.backward.get("state_backward_segments", ())
        return self.decays is Decays.BY_TOKEN and first

    def _states(self, part: str) -> str:
        """The state of each segment by itself, from zero."""
        (y, z), backward, schedule = _yz(part), part == OF_SEGMENTS, self.schedule.states
        total = "tl.store(Totals + bh * SEGMENTS + segment, tl.sum(sums, 0))" if self._makes_totals(part) else ""
        before = "\n".join(filter(None, [self.before(), "sums = tl.zeros([BLOCK_N], dtype=tl.float64)" if total else ""]))
        return fill(
            chunked_state.STATES,
            kernel=part,
            parameters=signature(self._parameters(part)),
            which=self.which(z, schedule),
            block_x=str(padded(self.size[y])),
            place_y=self.place(y, "rows", transposed=True),
            place_z=self.place(z, "channels"),
            before=before,
            chunk=chunk_of(backward),
            load_y=self.load(y, self.all_masked(y), transposed=True),
            load_z=self.load(z, self.slice_masked(z, schedule)),
            decays=self.decay_lines(backward, within=False) + ("\nsums += logs" if total else ""),
            write=self.write(y, z, backward),
            store_total=total,
            states=KEYS.states if backward else QUERIES.states,
            elements=str(self.elements),
            state_offsets=self.state_offsets(False),
            state_mask=self.state_mask(y, z, schedule),
        )

    def _scan_parameters(self, part: str) -> list[str]:
        role = KEYS if part == OF_SCAN else QUERIES
        log = {Decays.NEVER: [], Decays.BY_HEAD: [*self.log_parameters(False), "H", "N", "SEGMENT"], Decays.BY_TOKEN: ["Totals"]}
        return [role.states, role.last, *self._start(part), *log[self.decays], "SEGMENTS"]

    def _start(self, part: str) -> list[str]:
        """What goes into the first segment."""
        if part == OF_SCAN:
            return ["FinalGradient"] if self.layout.arriving else []
        return ["Start"] if self.layout.entering else []

    def _scan(self, part: str) -> str:
        """What enters each segment, and what leaves the last."""
        role, start = KEYS if part == OF_SCAN else QUERIES, self._start(part)
        whole = {
            Decays.NEVER: "state",
            Decays.BY_HEAD: "state * tl.exp2(log * tl.minimum(SEGMENT, N - segment * SEGMENT))",
            Decays.BY_TOKEN: f"state * tl.exp2(tl.load(Totals + bh * SEGMENTS + segment).to(tl.float32) * {LOG2E!r})",
        }[self.decays]
        return fill(
            chunked_state.SCAN,
            kernel=part,
            parameters=signature(self._scan_parameters(part)),
            elements=str(self.elements),
            before=f"b, h = bh // H, bh % H\n{self.before()}" if self.decays is Decays.BY_HEAD else "",
            start=f"tl.load({start[0]} + bh * {self.elements} + elements, mask=inside, other=0.0)"
            if start
            else "tl.zeros([1024], dtype=tl.float32)",
            states=role.states,
            last=role.last,
            segment="SEGMENTS - 1 - step" if part == OF_SCAN else "step",
            whole=whole,
        )


def _yz(part: str) -> tuple[str, str]:
    return ("q", "do") if part == OF_SEGMENTS else ("k", "v")


def _header(recurrence: Recurrence) -> str:
    origin = recurrence.program.origin.line or "a declared program"
    lines = [f"Linear attention for {origin}: a state goes through the keys, chunk by chunk; time and memory are linear.", ""]
    lines += work_text(recurrence.program).rstrip().splitlines()
    lines += ["", "S[j] = decay[j] * S[j - 1] + K[j] V[j]^T;  O[i] = Q[i]^T S[.], of the step that the query names."]
    return "\n".join(f"# {line}".rstrip() for line in lines) + "\n"


def state_source(recurrence: Recurrence, target: Target) -> str:
    """What would run on a target of operands that lie dense, segmented, with every gradient: for people to read. The rows of a
    normaliser have kernels of their own. Raises: UnsupportedProgram, in the user's words."""
    parts = undivided(recurrence) if recurrence.weigh != ONE else (recurrence,)
    return "\n\n".join(_source(part, target) for part in parts)


def _source(recurrence: Recurrence, target: Target) -> str:
    return emit_state(recurrence, *shown_choice(recurrence, target))


def shown_choice(recurrence: Recurrence, target: Target) -> tuple[StateSchedule, StateLayout]:
    """What a recurrence is shown with: the schedule of a target, and operands as `state_source` has them."""
    c, d = channels_of(recurrence)
    dtype = recurrence.program.decls[recurrence.query.tensor].dtype
    of_decay = recurrence.decays is not Decays.NEVER
    schedule = choose_state_schedule(max(c, d), 4 if dtype is Dtype.F32 else 2, target)
    factored = factored_log(recurrence)
    factor = factored[0] if factored else 1.0
    return schedule, StateLayout(static_groups(recurrence), True, bool(recurrence.start), False, of_decay, log_factor=factor)

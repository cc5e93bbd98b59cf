"""The walks of a recurrence: one result, chunk after chunk, or read from one state."""

from __future__ import annotations

from attncompiler.codegen.recurrence import Decays, Past
from attncompiler.codegen.state_layout import OUTPUTS, QUERIES, VALUES, Role
from attncompiler.codegen.state_tiles import StateTiles, strides_of
from attncompiler.codegen.text import fill, signature
from attncompiler.templates import chunked_state
from attncompiler.tuning.state_schedule import padded

BLOCKS = ["BLOCK_N: tl.constexpr", "BLOCK_Z: tl.constexpr"]


class StateWalks(StateTiles):
    """Kernels of results, and what they share with those of states."""

    def role_parameters(self, role: Role) -> list[str]:
        if self.recurrence.past is Past.ALL:
            names = [*self.pointers(role.x), role.out, role.last, "H", _steps(role), "SEGMENT"]
            return [*names, *self.strides(role.x), *strides_of(role.out), *BLOCKS]
        along = [role.along] if self._seen(role) else []
        operands = dict.fromkeys((role.x, role.y, role.z, *along))
        return [
            *self.pointers(*operands), role.out, *([role.states] if self._enters(role) else []),
            *([role.last] if self._leaves(role) else []), *([role.seen, "BH"] if along else []), *self.log_parameters(True),
            "H", "N", "SEGMENT", *(["SEGMENTS"] if self._enters(role) else []), *self.strides(*operands), *strides_of(role.out),
            *BLOCKS,
        ]  # fmt: skip

    def _seen(self, role: Role) -> bool:
        return self.layout.of_decay and bool(role.seen)

    def _enters(self, role: Role) -> bool:
        """Whether there is a state before a segment's first step; walking back, a gradient of that after its last."""
        return self.layout.segmented or (self.layout.arriving if role.backward else self.layout.entering)

    def _leaves(self, role: Role) -> bool:
        """Whether a walk writes its last state: of a sequence that is not cut no scan has."""
        if self.layout.segmented:
            return False
        return role is OUTPUTS or (role is QUERIES and self.layout.of_decay) or role is VALUES

    def walk(self, role: Role) -> str:
        """One result, chunk after chunk."""
        x, y, z, schedule = role.x, role.y, role.z, self.schedule.walk
        along = role.along if self._seen(role) else ""
        return fill(
            chunked_state.WALK,
            kernel=role.kernel,
            parameters=signature(self.role_parameters(role)),
            which=self.which(z, schedule),
            block_x=str(padded(self.size[x])),
            x=x,
            y=y,
            z=z,
            place_x=self.place(x, "rows"),
            place_y=self.place(y, "rows", transposed=True),
            place_z=self.place(z, "channels"),
            place_along=self.place(along, "channels") if along else "",
            place_out=self.place_out(role.out),
            before=self.before(),
            enter=self._enter(role),
            chunk=chunk_of(role.backward),
            load_x=self.load(x, self.all_masked(x)),
            load_y=self.load(y, self.all_masked(y), transposed=True),
            load_z=self.load(z, self.slice_masked(z, schedule)),
            decays=self.decay_lines(role.backward, within=True),
            precision=self.precision,
            weigh=self._weigh(role.backward),
            entered="" if self.decays is Decays.NEVER else " * reads[:, None]",
            products=self._products(role, along),
            scale=self._scale(role),
            write=self.write(y, z, role.backward),
            store=self.store(role.out, z, schedule),
            leave=self._leave(role) if self._leaves(role) else "",
        )

    def read(self, role: Role) -> str:
        """One result where all steps read one state."""
        x, z, schedule = role.x, role.z, self.schedule.walk
        return fill(
            chunked_state.READ,
            kernel=role.kernel,
            parameters=signature(self.role_parameters(role)),
            which=self.which(z, schedule),
            block_x=str(padded(self.size[x])),
            x=x,
            place_x=self.place(x, "rows"),
            place_out=self.place_out(role.out),
            enter=f"at = bh * {self.elements} + {self.state_offsets(role.transposed)}\n"
            f"state = tl.load({role.last} + at{self.state_mask(x, z, schedule, load=True)})",
            load_x=self.load(x, self.all_masked(x)),
            steps=_steps(role),
            precision=self.precision,
            scale=self._scale(role),
            store=self.store(role.out, z, schedule),
        )

    def _scale(self, role: Role) -> str:
        return "" if role.backward or self.recurrence.scale == 1.0 else f"out *= {self.recurrence.scale!r}"

    def _enter(self, role: Role) -> str:
        if not self._enters(role):
            return f"state = tl.zeros([{padded(self.size[role.x])}, BLOCK_Z], dtype=tl.float32)"
        at = f"(bh * SEGMENTS + segment) * {self.elements} + {self.state_offsets(role.transposed)}"
        return f"state = tl.load({role.states} + {at}{self.state_mask(role.x, role.z, self.schedule.walk, load=True)})"

    def _leave(self, role: Role) -> str:
        at = f"bh * {self.elements} + {self.state_offsets(role.transposed)}"
        return f"tl.store({role.last} + {at}, state{self.state_mask(role.x, role.z, self.schedule.walk)})"

    def _weigh(self, backward: bool) -> str:
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

    def _products(self, role: Role, along: str) -> str:
        """Adds to `out` what the chunk's own steps give. With `along`, what a step gives itself is added last, after the sum that
        a gradient of logarithms is made of: it has no decay, and would only cancel there."""
        z, slices = role.z, self.slices(role.z, self.schedule.walk)
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
            f"seen_at = {role.seen} + ({f'tl.program_id(0) % {slices} * BH + ' if slices > 1 else ''}bh) * N",
            "tl.store(seen_at + start + steps, seen, mask=inside)",
        ]
        return "\n".join([*lines, *([] if self.strict else [f"out += own[:, None] * {z}"])])


def _steps(role: Role) -> str:
    """How many steps a result has where all read one state: queries, or keys."""
    return "M" if role in (OUTPUTS, QUERIES) else "N"


def chunk_of(backward: bool) -> str:
    return "(chunks - 1 - chunk)" if backward else "chunk"

"""Pieces of the kernels of a recurrence: where tiles lie, their loads and masks, and what decays between steps."""

from __future__ import annotations

import math

from attncompiler.codegen.recurrence import Decays, Past, Recurrence
from attncompiler.codegen.state_layout import StateLayout, channels_of, slices_of
from attncompiler.ir.program import Dtype
from attncompiler.tuning.state_schedule import ChunkSchedule, StateSchedule, padded

LOG2E = math.log2(math.e)
_POINTERS = {"q": "Q", "k": "K", "v": "V", "do": "DO"}
# a decay of exp of this and below counts as this: differences of logarithms stay finite (bound_state.py)
_LOWEST = "-120.0, propagate_nan=tl.PropagateNan.ALL"


def strides_of(name: str) -> list[str]:
    """The parameters for the strides of a tensor [b, h, steps, channels]."""
    return [f"stride_{name.lower()}_{axis}" for axis in ("b", "h", "row", "channel")]


class StateTiles:
    """What the kernels of one recurrence share."""

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

    @property
    def elements(self) -> int:
        return self.size["q"] * self.size["v"]

    # ------------------------------------------------------------------------------------------------- parameters

    def slices(self, z: str, schedule: ChunkSchedule) -> int:
        return slices_of(self.size[z], schedule.block_z)

    def block_z(self, z: str, schedule: ChunkSchedule) -> int:
        return min(schedule.block_z, padded(self.size[z]))

    def which(self, z: str, schedule: ChunkSchedule) -> str:
        """The batch and head of a program, and its slice of z's channels."""
        slices = self.slices(z, schedule)
        if slices == 1:
            return "bh = tl.program_id(0).to(tl.int64)\nchannels = tl.arange(0, BLOCK_Z)"
        first = f"tl.program_id(0) % {slices} * BLOCK_Z"
        return f"bh = (tl.program_id(0) // {slices}).to(tl.int64)\nchannels = {first} + tl.arange(0, BLOCK_Z)"

    def pointers(self, *names: str) -> list[str]:
        return [_POINTERS[name] for name in dict.fromkeys(names)]

    def strides(self, *names: str) -> list[str]:
        return [stride for name in dict.fromkeys(names) for stride in strides_of(name)]

    def log_parameters(self, steps: bool) -> list[str]:
        """Of the logarithms, where a kernel reads them: of each head, or (`steps`: it goes along them) of each token."""
        if self.decays is Decays.BY_HEAD:
            return ["LogDecay", "stride_log_b", "stride_log_h"]
        if self.decays is Decays.BY_TOKEN and steps:
            return ["LogDecay", "stride_log_b", "stride_log_h", "stride_log_row"]
        return []

    # ------------------------------------------------------------------------------------------------------- loads

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

    def place_out(self, out: str) -> str:
        low = out.lower()
        return (
            f"out_at = {out} + b * stride_{low}_b + h * stride_{low}_h\n"
            f"out_offsets = steps[:, None] * stride_{low}_row + channels[None, :] * stride_{low}_channel"
        )

    def store(self, out: str, z: str, schedule: ChunkSchedule) -> str:
        mask = f" & (channels[None, :] < {self.size[z]})" if self.slice_masked(z, schedule) else ""
        at = f"out_at + start.to(tl.int64) * stride_{out.lower()}_row + out_offsets"
        return f"tl.store({at}, out.to({out}.dtype.element_ty), mask=inside[:, None]{mask})"

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

    # ------------------------------------------------------------------------------------------------------ decays

    def before(self) -> str:
        """The logarithm of a head, in base 2."""
        if self.decays is not Decays.BY_HEAD:
            return ""
        return f"log = {self._log('b * stride_log_b + h * stride_log_h')} * {LOG2E!r}"

    def _log(self, offset: str, mask: str = "") -> str:
        log = f"tl.load(LogDecay + {offset}{mask}).to(tl.float32)"
        factor = "" if self.layout.log_factor == 1.0 else f" * {self.layout.log_factor!r}"
        return f"tl.maximum({log}{factor}, {_LOWEST})"

    def decay_lines(self, backward: bool, within: bool) -> str:
        """`reads` from the state to a step, `writes` from a step to the state, `whole` across a chunk; `within` it, from a step of
        the columns to one of the rows that sees it, else 0. Walking back, rows are seen by columns."""
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
            entry = "entry" if self.strict else "total"
            lines += self._sums_of_logs(entry, within)
            factors = {of_queries: f"tl.exp2({entry}.to(tl.float32) * {LOG2E!r})"}
            factors[of_keys] = f"tl.exp2((end - total).to(tl.float32) * {LOG2E!r})"
            whole = f"tl.exp2(end.to(tl.float32) * {LOG2E!r})"
            parts = (f"({part}_{entry}{later} - {part}_total{earlier})" for part in ("coarse", "fine"))
            exponent = f"({' + '.join(parts)}) * {LOG2E!r}"
        if within:
            lines.append(f'within = tl.exp2(tl.where(sees, {exponent}, float("-inf")))')
        lines += [f"{name} = {factor}" for name, factor in sorted(factors.items()) if name in wanted]
        return "\n".join([*lines, f"whole = {whole}"])

    def _sums_of_logs(self, entry: str, within: bool) -> list[str]:
        """The logarithms of a chunk's steps, cumulated; `entry`: up to the step that a query reads."""
        offset = "b * stride_log_b + h * stride_log_h + (start + steps).to(tl.int64) * stride_log_row"
        lines = [
            f"logs = {self._log(offset, ', mask=inside, other=0.0')}.to(tl.float64)",
            "total = tl.cumsum(logs, 0)",
            "end = tl.sum(logs, 0)",
            *(["entry = total - logs"] if self.strict else []),
        ]
        if not within:
            return lines
        lines.append("# coarse parts of the sums have exact differences: a strong decay leaves the weak ones after it their digits")
        for name in dict.fromkeys((entry, "total")):
            lines += [
                f"coarse_{name} = (tl.floor({name} * 256.0) * 0.00390625).to(tl.float32)",
                f"fine_{name} = ({name} - coarse_{name}).to(tl.float32)",
            ]
        return lines

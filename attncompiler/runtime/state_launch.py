"""The lowering of recurrences on a GPU: run the emitted kernels, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from attncompiler.codegen.bound_state import Bound, StateGradients
from attncompiler.codegen.emit_state import KEYS, OUTPUTS, QUERIES, ROLES, VALUES, Role, StateEmission, StateLayout, emit_state
from attncompiler.codegen.kernel_module import load_module
from attncompiler.codegen.recurrence import KEY_AXES, QUERY_AXES, VALUE_AXES, Decays, Past, Recurrence
from attncompiler.codegen.strided import StridedView, strided_view
from attncompiler.ir.expr import Axis, Read, reads_of
from attncompiler.runtime.launch import Launch
from attncompiler.runtime.prepared import target_of
from attncompiler.tuning.schedule import KernelSchedule
from attncompiler.tuning.state_schedule import choose_state_schedule, segment_length

_FARTHEST = 2**31 - 1  # offsets within a tile are 32-bit


def forward(
    recurrence: Recurrence, operands: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O, the final states, z and the rows, as portable_state.forward gives them."""
    call = _call(recurrence, operands, sizes)
    run = _Run(call, operands, sizes)
    b, h, m, c, d = call.shape
    o = torch.empty((b, m, h, d), dtype=call.dtype, device=call.device).transpose(1, 2)
    final = run.empty(b, 1, h, c, d)
    states = run.states(backward=False, first=run.start(), last=final)
    run.result(OUTPUTS, o, states, left=final)
    return o, final, run.empty(0), run.empty(0)


def backward(
    recurrence: Recurrence,
    operands: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    o: Tensor,
    rows: Tensor,
    grad_o: Tensor,
    grad_final: Tensor | None,
    grad_z: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients of the operands in `wanted`."""
    of_decay = bool({read.tensor for read in reads_of(recurrence.log_decay)} & wanted)
    call = _call(recurrence, operands, sizes, arriving=grad_final is not None, of_decay=of_decay)
    run = _Run(call, {**operands, "DO": grad_o.to(call.dtype)}, sizes)
    b, h, _, c, d = call.shape
    arriving = None if grad_final is None else grad_final.to(torch.float32).contiguous()
    final, of_start = run.empty(b, h, c, d), run.empty(b, h, c, d)
    states = run.states(backward=False, first=run.start(), last=final)
    after = run.states(backward=True, first=arriving, last=of_start)
    gradients = _Places(run, wanted)
    seen = {role: run.empty(call.slices(role), b * h, call.n) for role in (QUERIES, KEYS)} if of_decay else {}
    for role, entering, left in ((QUERIES, states, final), (VALUES, after, of_start), (KEYS, after, of_start)):
        needed = gradients.wants(role) or of_decay or (role is VALUES and not call.cut and bool(recurrence.start))
        if needed:
            run.result(role, gradients.of(role), entering, left, seen.get(role))
    logs = run.empty(0)
    if of_decay:
        logs = run.of_logs(seen[QUERIES], seen[KEYS], (states, final), (after, of_start))
    return gradients.finish(of_start, logs)


# ------------------------------------------------------------------------------------------------------------ one layout


class _Call:
    """What is the same for all calls whose operands have one layout."""

    def __init__(
        self, recurrence: Recurrence, operands: Mapping[str, Tensor], sizes: Mapping[str, int], arriving: bool, of_decay: bool
    ) -> None:
        bound = Bound(recurrence, operands, sizes)
        extents = bound.extents
        value = operands[recurrence.value.tensor]
        self.recurrence, self.device, self.dtype = recurrence, value.device, value.dtype
        self.shape = tuple(extents[name] for name in ("b", "h", "q_idx", "c", "d"))
        self.b, self.h, self.n = extents["b"], extents["h"], extents["kv_idx"]
        self.views = {"Q": bound.view(recurrence.query, QUERY_AXES), "K": bound.view(recurrence.key, KEY_AXES)}
        self.views["V"] = bound.view(recurrence.value, VALUE_AXES)
        target = target_of(self.device)
        self.schedule = choose_state_schedule(max(extents["c"], extents["d"]), value.element_size(), target)
        slices = -(-max(extents["c"], extents["d"]) // self.schedule.walk.block_z)
        self.segment = segment_length(max(self.n, 1), self.b * self.h, slices, target)
        self.segments = max(-(-self.n // self.segment), 1)
        self.all = recurrence.past is Past.ALL
        self.cut = self.segments > 1 or self.all
        q, k, v = (self.views[name].group for name in ("Q", "K", "V"))
        self.layout = StateLayout((q, k, v), self.cut, bool(recurrence.start), arriving, of_decay)
        self.emission = StateEmission(recurrence, self.schedule, self.layout)
        self.module = load_module(emit_state(recurrence, self.schedule, self.layout))
        self.launches: dict[object, Launch] = {}

    def slices(self, role: Role) -> int:
        return int(self.emission.slices(role.z, self.schedule.walk))

    def launch(self, kernel: str, strides: tuple[tuple[str, tuple[int, ...]], ...]) -> Launch:
        """A kernel for tensors of these strides, by the names that its parameters have."""
        key = (kernel, strides)
        found = self.launches.get(key)
        if found is None:
            found = self.launches[key] = self._launch(kernel, dict(strides))
        return found

    def _launch(self, kernel: str, strides: Mapping[str, tuple[int, ...]]) -> Launch:
        schedule = self.emission.kernels[kernel]
        z = self.emission.sliced(kernel)
        block_z = self.emission.block_z(z, schedule) if schedule.block_z else 0
        constants = {"H": self.h, "N": self.n, "SEGMENT": self.segment, "SEGMENTS": self.segments, "BLOCK_Z": block_z}
        for name, values in strides.items():
            constants |= {f"stride_{name}_{axis}": value for axis, value in zip(("b", "h", "row", "channel"), values, strict=True)}
        grid = self._grid(kernel)
        function = getattr(self.module, kernel)
        cut = KernelSchedule(0, schedule.block_n, schedule.num_warps, schedule.num_stages)
        return Launch(function, kernel, grid, constants, {}, cut, None, {})

    def _grid(self, kernel: str) -> tuple[int, int]:
        heads = self.b * self.h
        if kernel.endswith("scan"):
            return heads, -(-self.emission.elements // 1024)
        schedule = self.emission.kernels[kernel]
        across = heads * int(self.emission.slices(self.emission.sliced(kernel), schedule))
        if kernel in ROLES and self.all:
            steps = self.shape[2] if kernel in (OUTPUTS.kernel, QUERIES.kernel) else self.n
            return across, -(-steps // schedule.block_n)
        return across, self.segments


_CALLS: dict[object, _Call] = {}
_MOST_CALLS = 1024


def _call(
    recurrence: Recurrence,
    operands: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    arriving: bool = False,
    of_decay: bool = False,
) -> _Call:
    layouts = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in operands.values())
    device = operands[recurrence.value.tensor].device
    key = (recurrence, layouts, tuple(sizes.values()), device, arriving, of_decay)
    found = _CALLS.get(key)
    if found is None:
        if len(_CALLS) >= _MOST_CALLS:
            _CALLS.pop(next(iter(_CALLS)))
        found = _CALLS[key] = _Call(recurrence, operands, sizes, arriving, of_decay)
    return found


# -------------------------------------------------------------------------------------------------------------- one call


class _Run:
    """One call: its tensors, by the names that kernels give them."""

    def __init__(self, call: _Call, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        self.call, self.operands, self.sizes = call, operands, sizes
        parts = call.recurrence
        self.bound = Bound(parts, operands, sizes)
        self.tensors = {
            name: call.views[name].of(operands[read.tensor])
            for name, read in (("Q", parts.query), ("K", parts.key), ("V", parts.value))
        }
        if "DO" in operands:
            self.tensors["DO"] = operands["DO"]
        for name, tensor in self.tensors.items():
            if 128 * max(tensor.stride()[2:]) > _FARTHEST:
                self.tensors[name] = tensor.contiguous()
        if parts.decays is not Decays.NEVER:
            self.tensors["LogDecay"] = self.bound.log_decay

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.call.device)

    def start(self) -> Tensor | None:
        """S before the first step, dense [b, h, c, d]."""
        return self.bound.start().contiguous() if self.call.recurrence.start else None

    def states(self, backward: bool, first: Tensor | None, last: Tensor) -> Tensor | None:
        """The states that enter segments, [b * h, segments, c, d]; walking back, the gradients of those that leave them. The one past
        all of them goes to `last`. A sequence that is not cut is walked from `first`."""
        call = self.call
        if not call.cut:
            return first
        states = self.empty(call.b * call.h, call.segments, *call.shape[3:])
        tensors = {**self.tensors, "States": states, "Final": last}
        if first is not None:
            tensors["Start"] = first
        if call.recurrence.decays is Decays.BY_TOKEN:
            tensors["Totals"] = torch.empty((call.b * call.h, call.segments), dtype=torch.float64, device=call.device)
        names = ("state_backward_segments", "state_backward_scan") if backward else ("state_segments", "state_scan")
        self._launch(names[0], tensors, ("Q", "DO") if backward else ("K", "V"))
        self._launch(names[1], tensors, ())
        return last.view(call.b * call.h, 1, *call.shape[3:]) if call.all else states

    def result(self, role: Role, out: Tensor, states: Tensor | None, left: Tensor, seen: Tensor | None = None) -> None:
        """One result, written to `out` [b, h, steps, channels]; in a sequence that is not cut, the last state to `left`."""
        if out.numel() == 0:
            return
        tensors = {**self.tensors, "Out": out, "Left": left}
        if states is not None:
            tensors["States"] = states
        if seen is not None:
            tensors["Seen"] = seen
        self._launch(role.kernel, tensors, tuple(name for name in ("Q", "K", "V", "DO") if name in tensors))

    def _launch(self, kernel: str, tensors: Mapping[str, Tensor], strided: tuple[str, ...]) -> None:
        names = (*strided, *(("Out",) if "Out" in tensors else ()))
        strides = tuple((name.lower(), tensors[name].stride()) for name in names)
        launch = self.call.launch(kernel, strides)
        if self.call.device.type == "cuda" and self.call.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.call.device):
                launch(tensors)
        else:
            launch(tensors)

    def of_logs(
        self, seen: Tensor, written: Tensor, borders: tuple[Tensor | None, Tensor], of_borders: tuple[Tensor | None, Tensor]
    ) -> Tensor:
        """The gradient of logarithms, [b, h, kv_idx] or, per head, [b, h, 1].

        That of step t is <dS, S> at any step before it, plus what steps wrote and less what queries saw from there to t; or at any
        step after it, the other way round (portable_state.py, of_logs). At the borders of segments <dS, S> is known: `borders` are
        the states that enter segments and the last one, `of_borders` the gradients of those that leave them and of the first. The
        nearer border counts more, as is best where errors add up at random."""
        call, shape = self.call, (self.call.b * self.call.h, *self.call.shape[3:])
        steps = call.segment if call.cut else call.n
        padding = call.segments * steps - call.n
        seen, written = (
            torch.nn.functional.pad(x.double().sum(0), (0, padding)).view(-1, call.segments, steps) for x in (seen, written)
        )
        entering = self._products(borders[0], of_borders[0], of_borders[1].view(shape), first=True)
        if call.recurrence.past is Past.BEFORE_OWN:  # the own query reads the state before its step
            entering = entering - seen[..., :1]
            seen = torch.cat([seen[..., 1:], torch.zeros_like(seen[..., :1])], -1)
        later = (seen - written).flip(-1).cumsum(-1).flip(-1)
        leaving = self._products(borders[0], of_borders[0], borders[1].view(shape), first=False)
        place = torch.arange(steps, device=call.device) / max(steps, 1)
        total = (1.0 - place) * (entering + later - later[..., :1]) + place * (leaving + later)
        logs = total.view(call.b, call.h, -1)[..., : call.n]
        if call.recurrence.decays is Decays.BY_HEAD:
            logs = logs.sum(-1, keepdim=True)
        return logs.to(torch.float32)

    def _products(self, states: Tensor | None, gradients: Tensor | None, outer: Tensor, first: bool) -> Tensor:
        """<dS, S> [b * h, segments, 1] where segments begin (`first`; `outer` is the gradient there of all), or end (`outer` is the
        state there of all). A missing tensor is 0."""
        missing = torch.zeros((outer.shape[0], self.call.segments, 1), dtype=torch.float64, device=outer.device)
        known = states if first else gradients
        if known is None:
            return missing
        shape = outer.shape[0], self.call.segments, *outer.shape[1:]
        states, gradients = (None if x is None else x.view(shape) for x in (states, gradients))
        known = known.view(shape)
        if first:
            beside = torch.cat([outer.unsqueeze(1), *([] if gradients is None else [gradients[:, :-1]])], 1)
        else:
            beside = torch.cat([*([] if states is None else [states[:, 1:]]), outer.unsqueeze(1)], 1)
        return (known * beside).sum((-2, -1), dtype=torch.float64).unsqueeze(-1)


class _Places:
    """Where kernels put gradients: into that of the operand where it has just these vectors, else into a buffer that is added."""

    def __init__(self, run: _Run, wanted: frozenset[str]) -> None:
        self.run, self.wanted = run, wanted
        parts = run.call.recurrence
        self.reads: dict[Role, tuple[Read, tuple[Axis, ...]]] = {
            QUERIES: (parts.query, QUERY_AXES), KEYS: (parts.key, KEY_AXES), VALUES: (parts.value, VALUE_AXES),
        }  # fmt: skip
        self.whole: dict[str, Tensor] = {}
        self.buffers: dict[Role, Tensor] = {}

    def wants(self, role: Role) -> bool:
        return self.reads[role][0].tensor in self.wanted

    def of(self, role: Role) -> Tensor:
        """[b, h, steps, channels] to write to."""
        read, axes = self.reads[role]
        run, extents = self.run, self.run.bound.extents
        operand = run.operands[read.tensor]
        shape = tuple(extents[axis.name] for axis in axes)
        alone = sum(read.tensor == other.tensor for other, _ in self.reads.values()) == 1
        if self.wants(role) and alone:
            whole = torch.empty(operand.shape, dtype=operand.dtype, device=operand.device)
            view = strided_view(read, whole, axes, extents, run.sizes)
            if view is not None and view.shape == shape and whole.numel() == _count(view):
                self.whole[read.tensor] = whole
                return view.of(whole)
        self.buffers[role] = run.empty(*shape)
        return self.buffers[role]

    def finish(self, of_start: Tensor, logs: Tensor) -> dict[str, Tensor]:
        """The gradient of every wanted operand."""
        bound, rest = self.run.bound, self.wanted - self.whole.keys()
        if not rest:
            return self.whole
        into = bound.totals(rest)
        none = self.run.empty(0)
        q, k, v = (self.buffers.get(role, none) for role in (QUERIES, KEYS, VALUES))
        bound.add(StateGradients(q, k, v, logs, of_start, none), into)
        return {**self.whole, **{name: total.to(bound.operands[name].dtype) for name, total in into.items()}}


def _count(view: StridedView) -> int:
    """How many elements a view shows; -1 where it shows one more than once."""
    if any(stride == 0 and extent > 1 for stride, extent in zip(view.strides, view.shape, strict=True)):
        return -1
    return math.prod(view.shape)

"""What a call of a recurrence's kernels needs besides the values of its tensors: made once for all operands of one layout."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from attncompiler.codegen.bound_state import Bound
from attncompiler.codegen.emit_state import StateEmission, emit_state
from attncompiler.codegen.kernel_module import load_module
from attncompiler.codegen.recurrence import KEY_AXES, QUERY_AXES, VALUE_AXES, Decays, Past, Recurrence, factored_log
from attncompiler.codegen.state_layout import KEYS, QUERIES, ROLES, VALUES, Role, StateLayout, slices_of
from attncompiler.codegen.state_tiles import strides_of
from attncompiler.codegen.strided import StridedView, strided_view
from attncompiler.ir.expr import KV_IDX as KV
from attncompiler.ir.expr import B, H, reads_of
from attncompiler.runtime.launch import Launch
from attncompiler.runtime.prepared import target_of
from attncompiler.tuning.schedule import KernelSchedule
from attncompiler.tuning.state_schedule import choose_state_schedule, segment_length

_FARTHEST = 2**31 - 1  # offsets within a tile are 32-bit
READS = {QUERIES: QUERY_AXES, KEYS: KEY_AXES, VALUES: VALUE_AXES}


class StateCall:
    """A recurrence for operands of one layout on one device; with `roles`, its backward."""

    def __init__(
        self, recurrence: Recurrence, operands: Mapping[str, Tensor], sizes: Mapping[str, int], arriving: bool, of_decay: bool,
        roles: tuple[Role, ...],
    ) -> None:  # fmt: skip
        bound = Bound(recurrence, operands, sizes)
        self.recurrence, self.extents, self.sizes = recurrence, bound.extents, sizes
        value = operands[recurrence.value.tensor]
        self.device, self.dtype = value.device, value.dtype
        self.b, self.h, self.m, self.n, self.c, self.d = (bound.extents[axis] for axis in ("b", "h", "q_idx", "kv_idx", "c", "d"))
        reads = {"Q": (recurrence.query, QUERY_AXES), "K": (recurrence.key, KEY_AXES), "V": (recurrence.value, VALUE_AXES)}
        self.views = {name: (read.tensor, bound.view(read, axes)) for name, (read, axes) in reads.items()}
        log = self._log_view(operands)
        target, channels = target_of(self.device), max(self.c, self.d)
        schedule = choose_state_schedule(channels, value.element_size(), target, of_decay)
        slices = slices_of(channels, schedule.walk.block_z)
        self.segment = segment_length(max(self.n, 1), self.b * self.h, slices, target)
        self.segments = max(-(-self.n // self.segment), 1)
        groups = self.views["Q"][1].group, self.views["K"][1].group, self.views["V"][1].group
        layout = StateLayout(
            groups, self.segments > 1, bool(recurrence.start), arriving, of_decay, roles, log[0] if log is not None else 1.0
        )
        self.emission = StateEmission(recurrence, schedule, layout)
        self.cut = self.emission.cut
        self._module = load_module(emit_state(recurrence, schedule, layout))
        self._launches: dict[str, Launch] = {}
        self._log = log[1:] if log is not None else None
        self._constant_log = None if reads_of(recurrence.log_decay) else bound.log_decay
        self.places = {role: self._place(role, operands) for role in roles}

    def _log_view(self, operands: Mapping[str, Tensor]) -> tuple[float, str, StridedView] | None:
        """How kernels find the logarithms in an operand; None where these are to be evaluated first."""
        found = None if self.recurrence.decays is Decays.NEVER else factored_log(self.recurrence)
        if found is None or not operands[found[1].tensor].is_floating_point():
            return None
        axes = (B, H, KV) if self.recurrence.decays is Decays.BY_TOKEN else (B, H)
        view = strided_view(found[1], operands[found[1].tensor], axes, self.extents, self.sizes)
        return None if view is None or view.group > 1 else (found[0], found[1].tensor, view)

    def _place(self, role: Role, operands: Mapping[str, Tensor]) -> StridedView | None:
        """Where in the gradient of its operand a result goes; None where the operand has other elements than just these vectors."""
        reads = {QUERIES: self.recurrence.query, KEYS: self.recurrence.key, VALUES: self.recurrence.value}
        read, axes = reads[role], READS[role]
        operand = operands[read.tensor]
        outline = torch.empty(operand.shape, dtype=operand.dtype, device="meta")
        view = strided_view(read, outline, axes, self.extents, self.sizes)
        alone = sum(read.tensor == other.tensor for other in reads.values()) == 1
        shape = tuple(self.extents[axis.name] for axis in axes)
        fits = alone and view is not None and view.shape == shape and _count(view) == operand.numel()
        return view if fits else None

    # --------------------------------------------------------------------------------------------------------- one call

    def pointers(self, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The operands of a call under the names that kernels give them."""
        found = {}
        for name, (operand, view) in self.views.items():
            tensor = operands[operand]
            far = 128 * max(view.strides[2:]) > _FARTHEST
            found[name] = view.of(tensor) if view.offset or far else tensor
            if far:
                found[name] = found[name].contiguous()
        if self.recurrence.decays is not Decays.NEVER:
            found["LogDecay"] = self._logarithms(operands)
        return found

    def _logarithms(self, operands: Mapping[str, Tensor]) -> Tensor:
        if self._log is not None:
            name, view = self._log
            return view.of(operands[name]) if view.offset else operands[name]
        if self._constant_log is not None:
            return self._constant_log
        return Bound(self.recurrence, operands, self.sizes).log_decay

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def states(self) -> Tensor:
        """Room for the states that enter segments [b * h, segments, c, d]."""
        return self.empty(self.b * self.h, self.segments, self.c, self.d)

    def totals(self) -> Tensor:
        """Room for the sums of logarithms over segments."""
        return torch.empty((self.b * self.h, self.segments), dtype=torch.float64, device=self.device)

    def run(self, kernels: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> None:
        """Launch kernels one after the other. `tensors`: what they read and write, by the names that they give it; those of `more`
        [b, h, steps, channels] lie in memory as their strides say."""
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self.run(kernels, tensors, more)
        for name, parts in kernels.items():
            launch = self._launches.get(name)
            if launch is None:
                launch = self._launches[name] = self._launch(name, parts, tensors, more)
            launch(tensors)

    def _launch(self, kernel: str, parts: tuple[str, ...], tensors: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> Launch:
        schedule = self.emission.schedule_of(kernel)
        constants = {
            "H": self.h, "M": self.m, "N": self.n, "BH": self.b * self.h, "SEGMENT": self.segment, "SEGMENTS": self.segments,
        }  # fmt: skip
        constants["BLOCK_Z"] = self.emission.block_z(self.emission.sliced(parts[0]), schedule)
        strides = {name: view.strides for name, (_, view) in self.views.items()}
        shown = {name: tensor for name, tensor in tensors.items() if name in strides and 128 * max(strides[name][2:]) > _FARTHEST}
        strides |= {name: tensor.stride() for name, tensor in {**shown, **more}.items()}
        for name, values in strides.items():
            constants |= dict(zip(strides_of(name), values, strict=True))
        if self.recurrence.decays is not Decays.NEVER:
            of_log = self._log[1].strides if self._log is not None else tensors["LogDecay"].stride()
            constants |= dict(zip(("stride_log_b", "stride_log_h", "stride_log_row"), of_log, strict=False))
        cut = KernelSchedule(0, schedule.block_n, schedule.num_warps, schedule.num_stages)
        return Launch(getattr(self._module, kernel), kernel, self._grid(kernel, parts), constants, {}, cut, None, {})

    def _grid(self, kernel: str, parts: tuple[str, ...]) -> tuple[int, int, int]:
        heads = self.b * self.h
        if kernel.endswith("scan"):
            return heads, -(-self.emission.elements // 1024), len(parts)
        along = self.segments
        if self.recurrence.past is Past.ALL and not kernel.endswith("segments"):
            along = -(-max(self.m if ROLES[part].x in ("q", "do") else self.n for part in parts) // self.segment)
        return heads * max(map(self.emission.across, parts)), along, len(parts)


_CALLS: dict[object, StateCall] = {}
_MOST_CALLS = 1024


def state_call(
    recurrence: Recurrence, operands: Mapping[str, Tensor], sizes: Mapping[str, int], above: tuple[Tensor, ...] = (),
    arriving: bool = False, of_decay: bool = False, roles: tuple[Role, ...] = (),
) -> StateCall:  # fmt: skip
    """The prepared call for operands of this layout, made on the first of them; `above`: the gradient of O, which a backward reads."""
    layouts = tuple([(t.shape, t.stride(), t.dtype) for t in (*operands.values(), *above)])
    key = (recurrence, layouts, *sizes.values(), operands[recurrence.value.tensor].device, arriving, of_decay, roles)
    found = _CALLS.get(key)
    if found is None:
        if len(_CALLS) >= _MOST_CALLS:
            _CALLS.pop(next(iter(_CALLS)))
        found = _CALLS[key] = StateCall(recurrence, operands, sizes, arriving, of_decay, roles)
    return found


def _count(view: StridedView) -> int:
    """How many elements a view shows; -1 where it shows one more than once."""
    if any(stride == 0 and extent > 1 for stride, extent in zip(view.strides, view.shape, strict=True)):
        return -1
    return math.prod(view.shape)

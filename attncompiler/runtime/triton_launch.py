"""Run emitted kernels: bind operands, make the plan, launch. The lowering of a GPU."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attncompiler.codegen.emit import Emission, Layout, element_gradients, emit, needed_kernels, program_dots, side_of, vector_reads
from attncompiler.codegen.vectors import VectorView, add_elements, head_group, vector_gradient, view_vectors
from attncompiler.config import cache_dir, read_checked, write_atomic
from attncompiler.ir.derivative import derivative
from attncompiler.ir.evaluate import Block, whole
from attncompiler.ir.expr import KV_IDX, Q_IDX, Axis, Const, Read, reads_of
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention
from attncompiler.passes.plan import TilePlan, TileRanges, build_plan
from attncompiler.tuning.schedule import KernelSchedule, Schedule, choose_schedule


def load_module(source: str) -> ModuleType:
    """The generated file as a module; kept in the cache directory under the hash of its text."""
    name = f"attncompiler_kernels_{hashlib.sha256(source.encode()).hexdigest()[:24]}"
    if name in sys.modules:
        return sys.modules[name]
    path = cache_dir() / "kernels" / f"{name}.py"
    if read_checked(path) != source:
        write_atomic(path, source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


@functools.lru_cache(maxsize=1024)
def kernels_for(program: Attention, schedule: Schedule, layout: Layout) -> tuple[ModuleType, Emission]:
    """The module of a program's kernels and what was emitted; made once."""
    return load_module(emit(program, schedule, layout)), Emission(program, schedule, layout)


@dataclass(frozen=True)
class _Bound:
    """The operands of one call, as the kernels take them."""

    program: Attention
    operands: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    extents: Mapping[str, int]
    views: Mapping[Read, VectorView]
    everywhere: Block

    @property
    def groups(self) -> tuple[int, ...]:
        heads = self.extents["h"]
        return tuple(view.group if view.tensor.shape[1] > 1 or heads == 1 else heads for view in self.views.values())


def _row_axis(program: Attention, read: Read) -> Axis:
    return Q_IDX if any(read == dot.left for dot in program_dots(program)) else KV_IDX


def _bind(program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> _Bound:
    extents = extents_of(program, sizes)
    everywhere = whole(operands, sizes, extents, torch.float32, operands[program.sum.tensor].device)
    views = {r: view_vectors(r, operands[r.tensor], _row_axis(program, r), everywhere) for r in vector_reads(program)}
    return _Bound(program, operands, sizes, extents, views, everywhere)


def _strides(view: VectorView, name: str) -> dict[str, int]:
    tensor = view.tensor
    strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
    return dict(zip((f"stride_{name}_{a}" for a in ("b", "h", "row", "channel")), (*strides, tensor.stride(3)), strict=True))


def _arguments(bound: _Bound) -> dict[str, Any]:
    """Every operand and size under the names that kernels give them."""
    found: dict[str, Any] = {"H": bound.extents["h"], "M": bound.extents["q_idx"], "N": bound.extents["kv_idx"]}
    found |= bound.sizes
    for read, view in bound.views.items():
        found[_pointer(read.tensor)] = view.tensor
        found |= _strides(view, read.tensor)
    for decl in bound.program.tensors:
        if decl.name not in bound.program.vectors:
            tensor = bound.operands[decl.name]
            found[_pointer(decl.name)] = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            found |= {f"stride_{decl.name}_{place}": stride for place, stride in enumerate(tensor.stride())}
    return found


def _pointer(name: str) -> str:
    return name[0].upper() + name[1:]


def _ranges(name: str, ranges: TileRanges) -> dict[str, Any]:
    return {
        f"{name}Count": ranges.count, f"{name}Begin": ranges.begin, f"{name}End": ranges.end, 
        f"{name}_ranges": ranges.begin.shape[1],
    }  # fmt: skip


@functools.lru_cache(maxsize=512)
def _order(plan: TilePlan) -> Tensor:
    """Tiles with the most work first, so that the last programs to run are short."""
    work = (plan.coverage != 0).sum(3).amax((0, 1))
    return torch.argsort(work, descending=True, stable=True).to(torch.int32)


def _describable(tensor: Tensor) -> bool:
    """True where a TMA descriptor can show a tensor: aligned, dense channels, no broadcast."""
    step = tensor.element_size()
    return (
        tensor.stride(3) == 1
        and tensor.data_ptr() % 16 == 0
        and all(
            size == 1 or (stride > 0 and stride * step % 16 == 0)
            for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
        )
        and min(tensor.shape) > 0
    )


def _descriptor(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    step = 16 // tensor.element_size()
    strides = [
        stride if size > 1 else max(stride, step) // step * step for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    strides[3] = 1
    return TensorDescriptor(tensor, list(tensor.shape), strides, list(block))


def _with_descriptors(
    arguments: Mapping[str, Any], emission: Emission, schedule: KernelSchedule, names: list[str]
) -> dict[str, Any]:
    found = dict(arguments)
    for name in names:
        block = emission.descriptor_block(name, schedule)
        if block is not None:
            found[name] = _descriptor(arguments[name], block)
    return found


def _launch(
    kernel: Any, grid: tuple[int, int], arguments: Mapping[str, Any], schedule: KernelSchedule, emission: Emission | None = None
) -> None:
    if emission is not None and emission.schedule.descriptors:
        arguments = _with_descriptors(arguments, emission, schedule, kernel.arg_names)
    values = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    values |= {
        name: value for name, value in (("BLOCK_M", schedule.block_m), ("BLOCK_N", schedule.block_n)) if name in kernel.arg_names
    }
    kernel[grid](**values, num_warps=schedule.num_warps, num_stages=schedule.num_stages)


def _plan_arguments(bound: _Bound, schedule: KernelSchedule, transposed: bool) -> tuple[dict[str, Any], int]:
    plan = build_plan(bound.program, bound.operands, bound.sizes, schedule.block_m, schedule.block_n)
    plan = plan.transposed() if transposed else plan
    return {**_ranges("Full", plan.full), **_ranges("Partial", plan.partial), "Order": _order(plan)}, plan.q_tiles


def _schedule(bound: _Bound) -> Schedule:
    tensors = [view.tensor for view in bound.views.values()]
    hopper = tensors[0].is_cuda and torch.cuda.get_device_capability(tensors[0].device) >= (9, 0)
    descriptors = hopper and all(_describable(tensor) for tensor in tensors)
    return choose_schedule(bound.program, descriptors, few_queries=bound.extents["q_idx"] <= 16)


def check(program: Attention) -> None:
    """Raises: UnsupportedProgram, with the reason, for a program that has no kernel."""
    layout = Layout(static_groups(program), frozenset(program.differentiable))
    emit(program, choose_schedule(program, False), layout)


def static_groups(program: Attention) -> tuple[int, ...]:
    """How many heads share each vector operand, from the program's text alone (a run-time size counts as 1)."""
    heads = program.axes.h
    count = int(heads.value) if isinstance(heads, Const) else 1
    return tuple(head_group(read, count) for read in vector_reads(program))


def forward(program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """O, lse and rcp, as docs/design.md defines them."""
    bound = _bind(program, operands, sizes)
    schedule = _schedule(bound)
    module, emission = kernels_for(program, schedule, Layout(bound.groups, frozenset()))
    b, h, m = (bound.extents[axis] for axis in ("b", "h", "q_idx"))
    value = operands[program.sum.tensor]
    o = value.new_empty((b, m, h, value.shape[-1])).transpose(1, 2)
    lse = value.new_empty((b, h, m), dtype=torch.float32)
    rcp = value.new_empty((b, h, m) if program.absorbs else (0,), dtype=torch.float32)
    if o.numel() == 0:
        return o, lse, rcp
    plan, tiles = _plan_arguments(bound, schedule.forward, False)
    outputs = {"O": o, "Lse": lse, "Rcp": rcp, "stride_o_b": o.stride(0), "stride_o_h": o.stride(1), "stride_o_m": o.stride(2)}
    _launch(module.attention_forward, (tiles, b * h), {**_arguments(bound), **plan, **outputs}, schedule.forward, emission)
    return o, lse, rcp


def backward(
    program: Attention,
    operands: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    o: Tensor,
    lse: Tensor,
    rcp: Tensor,
    grad_o: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients of the operands in `wanted`."""
    bound = _bind(program, operands, sizes)
    schedule = _schedule(bound)
    if schedule.descriptors and not _describable(grad_o):
        grad_o = grad_o.contiguous()
    module, emission = kernels_for(program, schedule, Layout(bound.groups, wanted, grad_lse is not None))
    b, h, m, n = (bound.extents[axis] for axis in ("b", "h", "q_idx", "kv_idx"))
    delta = torch.empty((b, h, m), dtype=torch.float32, device=o.device)
    arguments = {**_arguments(bound), "O": o, "DO": grad_o, "Lse": lse, "Rcp": rcp, "Delta": delta}
    arguments |= {f"stride_{t}_{a}": x.stride(i) for t, x in (("o", o), ("do", grad_o)) for i, a in enumerate("bhmd")}
    if grad_lse is not None:
        arguments["DLse"] = grad_lse.contiguous()
    sums = _Sums(bound, wanted)
    arguments |= sums.arguments
    kernels = needed_kernels(program, wanted)
    if o.numel():
        _launch(module.attention_delta, (math.ceil(m / 64), b * h), arguments, KernelSchedule(64, 64, 4, 1))
        if "queries" in kernels and n:
            plan, tiles = _plan_arguments(bound, schedule.backward_queries, False)
            _launch(module.attention_backward_queries, (tiles, b * h), {**arguments, **plan}, schedule.backward_queries, emission)
        if "keys" in kernels and n:
            plan, tiles = _plan_arguments(bound, schedule.backward_keys, True)
            group = max(bound.groups)
            _launch(
                module.attention_backward_keys, (tiles, b * (h // group)), {**arguments, **plan}, schedule.backward_keys, emission
            )
    return sums.finish(lse, rcp, delta)


class _Sums:
    """Where kernels put gradients, and how those become gradients of whole operands."""

    def __init__(self, bound: _Bound, wanted: frozenset[str]) -> None:
        self.bound, self.wanted = bound, wanted
        program, operands = bound.program, bound.operands
        b, h, m, n = (bound.extents[axis] for axis in ("b", "h", "q_idx", "kv_idx"))
        device = operands[program.sum.tensor].device
        self.direct: dict[str, Tensor] = {}
        self.scattered: list[tuple[Read, Tensor]] = []
        self.elements: list[tuple[Read, Tensor]] = []
        self.arguments: dict[str, Any] = {}
        for (read, view), group in zip(bound.views.items(), bound.groups, strict=True):
            if read.tensor not in wanted:
                continue
            place = self._vector(read, view, group, b, h)
            self.arguments[f"Grad_{read.tensor}"] = place
            self.arguments |= {
                f"stride_grad_{read.tensor}_{a}": place.stride(i) for i, a in enumerate(("b", "h", "row", "channel"))
            }
        counts: dict[str, int] = {}
        for read in element_gradients(program, wanted):
            counts[read.tensor] = counts.get(read.tensor, 0) + 1
            tag = read.tensor if counts[read.tensor] == 1 else f"{read.tensor}_{counts[read.tensor]}"
            shape = {"pair": (b, h, m, n), "q": (b, h, m, 1), "kv": (b, h, 1, n)}[side_of(read)]
            self.arguments[f"Grad_{tag}"] = torch.zeros(shape, dtype=torch.float32, device=device)
            self.elements.append((read, self.arguments[f"Grad_{tag}"]))

    def _vector(self, read: Read, view: VectorView, group: int, b: int, h: int) -> Tensor:
        """The operand's own gradient where the kernel's [b, h / group, row, channel] is a view of it; else a buffer to add up."""
        operand = self.bound.operands[read.tensor]
        fits = not view.gathered and tuple(view.tensor.shape[:2]) == (b, h // group) and self._covers(read, view, operand)
        if fits and read.tensor not in self.direct:
            whole_gradient = torch.empty(operand.shape, dtype=operand.dtype, device=operand.device)
            self.direct[read.tensor] = whole_gradient
            return view_vectors(read, whole_gradient, _row_axis(self.bound.program, read), self.bound.everywhere).tensor
        buffer = torch.empty((b, h // group, *view.tensor.shape[2:]), dtype=torch.float32, device=operand.device)
        self.scattered.append((read, buffer))
        return buffer

    @staticmethod
    def _covers(read: Read, view: VectorView, operand: Tensor) -> bool:
        return view.tensor.numel() == operand.numel()

    def finish(self, lse: Tensor, rcp: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """The gradient of every wanted operand."""
        bound, program = self.bound, self.bound.program
        totals = {
            name: torch.zeros(bound.operands[name].shape, dtype=torch.float32, device=lse.device)
            for name in self.wanted
            if name not in self.direct
        }
        b, h = bound.extents["b"], bound.extents["h"]
        for read, buffer in self.scattered:
            axis = _row_axis(program, read)
            target = vector_gradient(read, bound.views[read], totals[read.tensor], axis, bound.everywhere)
            shared = bound.views[read].tensor.shape[1] == 1 and buffer.shape[1] > 1
            target.add(buffer.sum(1, keepdim=True) if shared else buffer, (0, b), (0, h), ((0, buffer.shape[2]),))
            target.scatter(bound.everywhere)
        for read, gradient in self.elements:
            add_elements(read, gradient, totals[read.tensor], bound.everywhere)
        self._extra_scores(totals, lse, rcp, delta)
        found = {name: total.to(bound.operands[name].dtype) for name, total in totals.items()}
        return {**self.direct, **found}

    def _extra_scores(self, totals: Mapping[str, Tensor], lse: Tensor, rcp: Tensor, delta: Tensor) -> None:
        """d loss / d extra = -weight(extra) * delta for each row."""
        program, block = self.bound.program, self.bound.everywhere
        for extra in program.weigh.extra:
            for read in dict.fromkeys(r for r in reads_of(extra) if r.tensor in totals):
                weight = torch.exp(block.tensor(extra) - lse.unsqueeze(3))
                weight = weight * rcp.unsqueeze(3) if program.absorbs else weight
                slope = derivative(extra, read)
                factor = float(slope.value) if isinstance(slope, Const) else block.tensor(slope)
                add_elements(read, -weight * delta.unsqueeze(3) * factor, totals[read.tensor], block)

"""What a call of emitted kernels needs besides the values of its tensors: made once for all operands of the same layout.

A call then only fills the pointers in. Plans that read no tensor are part of what is kept; the others are built at each call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia import hopper as gluon_hopper
from triton.tools.tensor_descriptor import TensorDescriptor

from attncompiler.codegen.emission import Emission, Layout, program_dots, shared_heads, vector_reads
from attncompiler.codegen.emit import emit
from attncompiler.codegen.emit_hopper import REGISTERS, shared_layout
from attncompiler.codegen.kernel_module import load_module
from attncompiler.codegen.plan_kernel import MOST_TILES, emit_plan, has_plan_kernel
from attncompiler.codegen.triton_expr import pointer_name
from attncompiler.codegen.vectors import VectorView, view_vectors
from attncompiler.ir.evaluate import Block, whole
from attncompiler.ir.expr import AXES, KV_IDX, Q_IDX, Axis, Read, axes_of, conj, conjuncts, reads_of
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Empty, Keep
from attncompiler.passes.plan import TilePlan, TileRanges, build_plan
from attncompiler.tuning.schedule import KernelSchedule, choose_schedule
from attncompiler.tuning.target import Target, target_of_capability

Constants = Mapping[str, Any]
_DELTA = KernelSchedule(64, 64, 4, 1)


@functools.lru_cache(maxsize=64)
def target_of(device: torch.device) -> Target:
    """The target of a device; without one, that of the kernels which the interpreter runs."""
    if device.type != "cuda":
        return target_of_capability(8, False)
    return target_of_capability(torch.cuda.get_device_capability(device)[0], torch.version.hip is not None)


# -------------------------------------------------------------------------------------------------------- descriptors


def describable(tensor: Tensor) -> bool:
    """True where a TMA descriptor can show a tensor: aligned, dense channels, no broadcast."""
    step = tensor.element_size()
    sides = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return (
        tensor.stride(3) == 1
        and tensor.data_ptr() % 16 == 0
        and all(size == 1 or (stride > 0 and stride * step % 16 == 0) for size, stride in sides)
        and min(tensor.shape) > 0
    )


def _descriptor(tensor: Tensor, block: tuple[int, ...], gluon: bool) -> TensorDescriptor:
    step = 16 // tensor.element_size()
    strides = [
        stride if size > 1 else max(stride, step) // step * step for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    strides[3] = 1
    if gluon:
        return gluon_hopper.TensorDescriptor(tensor, list(tensor.shape), strides, list(block), shared_layout(block, tensor.dtype))
    return TensorDescriptor(tensor, list(tensor.shape), strides, list(block))


class Launch:
    """One kernel with everything filled in but its pointers."""

    def __init__(
        self, kernel: Any, name: str, grid: tuple[int, int], constants: Constants, tensors: Mapping[str, Tensor],
        schedule: KernelSchedule, emission: Emission | None,
    ) -> None:  # fmt: skip
        values = {**constants, "BLOCK_M": schedule.block_m, "BLOCK_N": schedule.block_n}
        self._kernel = kernel[grid]
        self._arguments = [values.get(name) for name in kernel.arg_names]
        self._pointers: list[tuple[int, str]] = []
        self._descriptors: list[tuple[int, str, dict[str, Any]]] = []
        gluon = emission is not None and emission.has_warp_roles(name)
        self._options = {
            "num_warps": schedule.num_warps,
            **({"maxnreg": REGISTERS} if gluon else {"num_stages": schedule.num_stages}),
        }
        self._descriptor_type = gluon_hopper.TensorDescriptor if gluon else TensorDescriptor
        for place, parameter in enumerate(kernel.arg_names):
            if parameter in values:
                continue
            block = emission.descriptor_block(name, parameter) if emission is not None else None
            if block is None:
                self._pointers.append((place, parameter))
            else:
                self._descriptors.append((place, parameter, dict(vars(_descriptor(tensors[parameter], block, gluon)))))

    def __call__(self, tensors: Mapping[str, Tensor], plan: Constants | None = None) -> None:
        self._kernel(*self._filled(tensors, plan), **self._options)

    def frozen(self, tensors: Mapping[str, Tensor]) -> Callable[[], object]:
        """The launch of these very tensors and nothing else: what host time is compared with."""
        return functools.partial(self._kernel, *self._filled(tensors, None), **self._options)

    def _filled(self, tensors: Mapping[str, Tensor], plan: Constants | None) -> list[Any]:
        arguments = self._arguments.copy()
        for place, name in self._pointers:
            arguments[place] = tensors[name] if plan is None or name not in plan else plan[name]
        for place, name, fields in self._descriptors:
            descriptor = object.__new__(self._descriptor_type)  # its checks were made for the first of these
            descriptor.__dict__.update(fields, base=tensors[name])
            arguments[place] = descriptor
        return arguments


# ----------------------------------------------------------------------------------------------------------- operands


@dataclass(frozen=True)
class _Vectors:
    """Where the vectors of one read lie in its operand: [B', H', L, D] from `offset` elements on."""

    view: VectorView
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def show(self, operand: Tensor) -> Tensor:
        """The same vectors of another tensor of the same layout."""
        return operand if self.offset == 0 else operand.as_strided(self.shape, self.strides, operand.storage_offset() + self.offset)


def row_axis(program: Attention, read: Read) -> Axis:
    """The axis that the vectors of a read go along."""
    return Q_IDX if any(read == dot.left for dot in program_dots(program)) else KV_IDX


class Prepared:
    """A program for operands of one layout on one device."""

    def __init__(self, program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        self.program, self.sizes = program, sizes
        self.extents = extents_of(program, sizes)
        self.device = operands[program.sum.tensor].device
        self._positions = whole({}, sizes, self.extents, torch.float32, self.device).positions
        self._launches: dict[tuple[Any, ...], Launch] = {}
        views = self.views(operands)
        self.gathers = any(view.gathered for view in views.values())
        self._vectors = {
            read: _Vectors(
                VectorView(torch.empty(0), view.group, view.gathered),
                0 if view.gathered else int(view.tensor.storage_offset() - operands[read.tensor].storage_offset()),
                tuple(view.tensor.shape),
                view.tensor.stride(),
            )
            for read, view in views.items()
        }
        target = target_of(self.device)
        descriptors = target.descriptors and all(
            describable(view.tensor) and view.tensor.shape[2] == self.length(read) for read, view in views.items()
        )
        self.schedule = choose_schedule(program, target, descriptors, few_queries=self.extents["q_idx"] <= 16)
        heads = self.extents["h"]
        self.groups = tuple(view.group if view.tensor.shape[1] > 1 or heads == 1 else heads for view in views.values())
        self.constants = self._constants(operands, views)
        self.static = not reads_of(program.keep.predicate)
        tiles = -(-max(self.extents["q_idx"], self.extents["kv_idx"]) // 16)
        self._plans_on_device = tiles <= MOST_TILES and has_plan_kernel(program)
        self._orders: dict[str, Tensor] = {}

    def length(self, read: Read) -> int:
        """How many positions the vectors of a read go along; a view of length 1 shows one vector for all of them."""
        return self.extents[row_axis(self.program, read).name]

    def views(self, operands: Mapping[str, Tensor]) -> dict[Read, VectorView]:
        """The vectors of every read of a call."""
        block = self.block(operands)
        return {r: view_vectors(r, operands[r.tensor], row_axis(self.program, r), block) for r in vector_reads(self.program)}

    def block(self, operands: Mapping[str, Tensor]) -> Block:
        """All positions of the program, over the operands of a call."""
        return Block(operands, self.sizes, self.extents, self._positions, torch.float32)

    def _constants(self, operands: Mapping[str, Tensor], views: Mapping[Read, VectorView]) -> Constants:
        """Sizes and strides under the names that kernels give them."""
        found: dict[str, Any] = {"H": self.extents["h"], "M": self.extents["q_idx"], "N": self.extents["kv_idx"], **self.sizes}
        for read, view in views.items():
            shape, strides = view.tensor.shape, view.tensor.stride()
            dense = [0 if size == 1 else stride for size, stride in zip(shape[:3], strides[:3], strict=True)]
            names = [f"stride_{read.tensor}_{a}" for a in ("b", "h", "row", "channel")]
            found |= dict(zip(names, (*dense, strides[3]), strict=True))
        for decl in self.program.tensors:
            if decl.name not in self.program.vectors:
                found |= {f"stride_{decl.name}_{place}": stride for place, stride in enumerate(operands[decl.name].stride())}
        return found

    def pointers(self, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The operands of a call under the names that kernels give them."""
        found = self._raw(operands)
        if self.gathers:
            found |= {pointer_name(read.tensor): view.tensor for read, view in self.views(operands).items()}
        else:
            found |= {pointer_name(read.tensor): vectors.show(operands[read.tensor]) for read, vectors in self._vectors.items()}
        return found

    def _raw(self, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for decl in self.program.tensors:
            tensor = operands[decl.name]
            found[pointer_name(decl.name)] = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
        return found

    # ------------------------------------------------------------------------------------------------------- kernels

    def run(
        self,
        name: str,
        variant: Hashable,
        tensors: Mapping[str, Tensor],
        operands: Mapping[str, Tensor],
        describe: Callable[[], tuple[Layout, Constants]],
    ) -> None:
        """Launch one kernel of the program. `variant` tells apart what the layout of the operands leaves open (wanted gradients,
        strides of others); `describe` gives the kernel's layout and these strides, and is asked once for each variant."""
        schedule = _DELTA if name == "attention_delta" else getattr(self.schedule, name[len("attention_") :])
        launch = self._launches.get((name, variant))
        plan: Constants = {}
        tiles = -(-self.extents["q_idx"] // schedule.block_m)
        if schedule is not _DELTA and not (self.static and launch):
            plan, tiles = self._plan(name, schedule, operands)
        if launch is None:
            launch = self._launches[name, variant] = self._launch(name, schedule, *describe(), tensors, plan, tiles)
        launch(tensors, plan)

    def _launch(
        self, name: str, schedule: KernelSchedule, layout: Layout, constants: Constants, tensors: Mapping[str, Tensor],
        plan: Constants, tiles: int,
    ) -> Launch:  # fmt: skip
        module = load_module(emit(self.program, self.schedule, layout))
        emission = None if schedule is _DELTA else Emission(self.program, self.schedule, layout)
        b, h = self.extents["b"], self.extents["h"]
        rows = b * (h // shared_heads(self.program, self.groups)) if name == "attention_backward_keys" else b * h
        kept = {key: value for key, value in plan.items() if self.static or not isinstance(value, Tensor)}
        fixed = {**self.constants, **constants, **kept}
        return Launch(getattr(module, name), name, (tiles, rows), fixed, tensors, schedule, emission)

    def _plan(self, name: str, schedule: KernelSchedule, operands: Mapping[str, Tensor]) -> tuple[Constants, int]:
        """The tiles that a kernel visits, and the number of rows of tiles."""
        transposed = name == "attention_backward_keys"
        if self._plans_on_device:
            return self._planned_by_kernel(name, schedule, transposed, operands)
        plan = build_plan(self.program, operands, self.sizes, schedule.block_m, schedule.block_n)
        plan = plan.transposed() if transposed else plan
        found = {**_ranges("Full", plan.full), **_ranges("Partial", plan.partial), "Order": _order(plan)}
        return found, plan.q_tiles

    def _planned_by_kernel(
        self, name: str, schedule: KernelSchedule, transposed: bool, operands: Mapping[str, Tensor]
    ) -> tuple[Constants, int]:
        b, h, m, n = (self.extents[axis.name] for axis in AXES)
        axes = axes_of(self.program.keep.predicate)
        shared = (b if "b" in axes else 1) * (h if "h" in axes else 1)
        sides = (m, schedule.block_m), (n, schedule.block_n)
        (length, block), (columns, column_block) = reversed(sides) if transposed else sides
        rows, tiles = -(-length // block), -(-columns // column_block)
        room, width = (tiles + 1) // 2, 1 << (tiles - 1).bit_length()
        counts, begins = shared * rows, shared * rows * room
        memory = torch.empty(2 * counts + 4 * begins, dtype=torch.int32, device=self.device)
        pieces = memory.split([counts, counts, begins, begins, begins, begins])
        names = ("FullCount", "PartialCount", "FullBegin", "FullEnd", "PartialBegin", "PartialEnd")
        outputs = dict(zip(names, pieces, strict=True))
        tensors = {**self._raw(operands), **outputs, "Coverage": torch.empty(counts * width, dtype=torch.int8, device=self.device)}
        launch = self._launches.get(("plan", name))
        if launch is None:
            source = emit_plan(self.program, "kv_idx" if transposed else "q_idx")
            kernel = getattr(load_module(source), "plan_columns" if transposed else "plan_rows")
            sizes = {
                "PLAN_H": h if "h" in axes else 1,
                "RANGES": room,
                "ROW_BLOCK": block,
                "COLUMN_BLOCK": column_block,
                "TILES": width,
            }
            chosen = KernelSchedule(block, column_block, 4, 1)
            launch = Launch(kernel, "plan", (rows, shared), {**self.constants, **sizes}, tensors, chosen, None)
            self._launches[("plan", name)] = launch
            self._orders[name] = self._static_order(schedule, transposed, operands)
        launch(tensors)
        return {**outputs, "Full_ranges": room, "Partial_ranges": room, "Order": self._orders[name]}, rows

    def _static_order(self, schedule: KernelSchedule, transposed: bool, operands: Mapping[str, Tensor]) -> Tensor:
        """The order by the parts of the mask that read no tensor: what is known before the call."""
        fixed = conj(*(part for part in conjuncts(self.program.keep.predicate) if not reads_of(part)))
        program = replace(self.program, keep=Keep(fixed, Empty.NAN))
        plan = build_plan(program, operands, self.sizes, schedule.block_m, schedule.block_n)
        return _order(plan.transposed() if transposed else plan)


def _ranges(name: str, ranges: TileRanges) -> dict[str, Any]:
    return {
        f"{name}Count": ranges.count,
        f"{name}Begin": ranges.begin,
        f"{name}End": ranges.end,
        f"{name}_ranges": ranges.begin.shape[1],
    }


def _order(plan: TilePlan) -> Tensor:
    """Tiles with the most work first, so that the last programs to run are short."""
    work = (plan.coverage != 0).sum(3).amax((0, 1))
    return torch.argsort(work, descending=True, stable=True).to(torch.int32)


_PREPARED: dict[tuple[Any, ...], Prepared] = {}
_MOST = 1024  # layouts remembered; a serving process with ever new lengths must not grow for ever


def prepare(program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Prepared:
    """The prepared program for operands of this layout; made on the first call."""
    tensors = operands.values()
    key = (
        program,
        *sizes.values(),
        operands[program.sum.tensor].device,
        *[(t.shape, t.stride(), t.dtype, t.data_ptr() & 15) for t in tensors],
    )
    found = _PREPARED.get(key)
    if found is None:
        if len(_PREPARED) >= _MOST:
            _PREPARED.pop(next(iter(_PREPARED)))
        found = _PREPARED[key] = Prepared(program, operands, sizes)
    return found

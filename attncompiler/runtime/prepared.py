"""What a call of emitted kernels needs besides the values of its tensors: made once for all operands of the same layout.

A call then only fills the pointers in. Plans that read no tensor are part of what is kept; the others are built at each call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncompiler.codegen.emission import Emission, Layout, shared_heads
from attncompiler.codegen.emit import emit
from attncompiler.codegen.kernel_module import load_module
from attncompiler.codegen.triton_expr import pointer_name
from attncompiler.codegen.vectors import VectorView
from attncompiler.ir.evaluate import Block, whole
from attncompiler.ir.expr import AXES, Q_IDX, TRUE, Read
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention
from attncompiler.passes.plan import proved_nonempty
from attncompiler.runtime.launch import Constants, Launch
from attncompiler.runtime.planning import Planner
from attncompiler.runtime.scheduling import row_axis, schedule_of, views_of
from attncompiler.tuning.schedule import KernelSchedule
from attncompiler.tuning.target import Target, target_of_capability


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(maxsize=64)
def target_of(device: torch.device) -> Target:
    """The target of a device; without one, that of the kernels which the interpreter runs."""
    if device.type != "cuda":
        return target_of_capability(8, False)
    return target_of_capability(torch.cuda.get_device_capability(device)[0], torch.version.hip is not None)


@dataclass(frozen=True)
class Vectors:
    """Where vectors lie in a tensor: [B', H', L, D] from `offset` elements on."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(view: VectorView, tensor: Tensor) -> Vectors:
        """As `view` shows those of `tensor`."""
        offset = 0 if view.gathered else int(view.tensor.storage_offset() - tensor.storage_offset())
        return Vectors(offset, tuple(view.tensor.shape), view.tensor.stride())

    def show(self, tensor: Tensor, always: bool = False) -> Tensor:
        """The same vectors of another tensor of the same layout; where they begin with it, the tensor serves unless `always`."""
        if self.offset == 0 and not always:
            return tensor
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)


class Prepared:
    """A program for operands of one layout on one device."""

    def __init__(self, program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        self.program, self.sizes = program, sizes
        self.extents = extents_of(program, sizes)
        self.device = operands[program.sum.tensor].device
        self.no_rcp = torch.empty(0, dtype=torch.float32, device=self.device)  # of programs without rcp; holds nothing
        self._positions = whole({}, sizes, self.extents, torch.float32, self.device).positions
        self._launches: dict[tuple[Any, ...], Launch] = {}
        views = self.views(operands)
        self.gathers = any(view.gathered for view in views.values())
        shown = [(read, Vectors.of(view, operands[read.tensor])) for read, view in views.items()]
        self._within = [(pointer_name(r.tensor), r.tensor, v) for r, v in shown if v.offset and not self.gathers]
        self._names = [(pointer_name(decl.name), decl.name) for decl in program.tensors]
        self._booleans = [pointer_name(name) for name, tensor in operands.items() if tensor.dtype == torch.bool]
        self.gradient_places: dict[frozenset[str], object] = {}  # what runtime/gradients.py finds once for these operands
        self.may_keep_nothing = program.keep.predicate != TRUE and not proved_nonempty(program, sizes, self.extents)
        self.schedule = schedule_of(program, sizes, target_of(self.device), views)
        heads = self.extents["h"]
        self.groups = tuple(view.group if view.tensor.shape[1] > 1 or heads == 1 else heads for view in views.values())
        self.constants = self._constants(operands, views)
        lefts = [read.tensor for read in views if row_axis(program, read) == Q_IDX]
        self.query_strides = [self.constants[f"stride_{name}_{axis}"] for name in lefts for axis in ("b", "h", "row")]
        self._planners: dict[str, Planner] = {}

    def length(self, read: Read) -> int:
        """How many positions the vectors of a read go along; a view of length 1 shows one vector for all of them."""
        return self.extents[row_axis(self.program, read).name]

    def views(self, operands: Mapping[str, Tensor]) -> dict[Read, VectorView]:
        """The vectors of every read of a call."""
        return views_of(self.program, operands, self.block(operands))

    def block(self, operands: Mapping[str, Tensor]) -> Block:
        """All positions of the program, over the operands of a call."""
        return Block(operands, self.sizes, self.extents, self._positions, torch.float32)

    def _constants(self, operands: Mapping[str, Tensor], views: Mapping[Read, VectorView]) -> Constants:
        """Sizes and strides under the names that kernels give them."""
        lengths = dict(zip("BHMN", (self.extents[axis.name] for axis in AXES), strict=True))
        found: dict[str, Any] = {**lengths, **self.sizes}
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
        found = self.raw(operands)
        if self.gathers:
            found |= {pointer_name(read.tensor): view.tensor for read, view in self.views(operands).items()}
        for pointer, name, vectors in self._within:
            found[pointer] = vectors.show(operands[name])
        return found

    def raw(self, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The operands themselves; Triton takes bytes for booleans."""
        found = {pointer: operands[name] for pointer, name in self._names}
        for pointer in self._booleans:
            found[pointer] = found[pointer].view(torch.uint8)
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
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self.run(name, variant, tensors, operands, describe)
        schedule = self.schedule.of(name)
        launch = self._launches.get((name, variant))
        planner = self._planners.get(name)
        if planner is None and self.schedule.follows_plan(name):
            by_keys = name == "attention_backward_keys"
            queued = Emission(self.program, self.schedule, Layout(self.groups, frozenset())).has_queue(name)
            members = self._members(name) if queued else 0
            planner = Planner(self.program, self.sizes, self.extents, schedule, by_keys, self.device, members)
            self._planners[name] = planner
        plan: Constants = {}
        if planner is not None and not (planner.is_static and launch):
            plan = planner(operands, self.raw(operands), self.constants)
        if launch is None:
            launch = self._launches[name, variant] = self._launch(name, schedule, *describe(), tensors, operands, plan)
        launch(tensors, plan)

    def _members(self, name: str) -> int:
        """How many heads each row of a kernel sums over."""
        return shared_heads(self.program, self.groups) if name == "attention_backward_keys" else 1

    def _launch(
        self, name: str, schedule: KernelSchedule, layout: Layout, constants: Constants, tensors: Mapping[str, Tensor],
        operands: Mapping[str, Tensor], plan: Constants,
    ) -> Launch:  # fmt: skip
        module = load_module(emit(self.program, self.schedule, layout))
        emission = Emission(self.program, self.schedule, layout)
        b, h = self.extents["b"], self.extents["h"]
        axis, block = ("kv_idx", schedule.block_n) if name == "attention_backward_keys" else ("q_idx", schedule.block_m)
        tiles, rows = -(-self.extents[axis] // block), b * (h // self._members(name))
        tiles = schedule.tiles.row_tiles if schedule.tiles else tiles
        grid = (tiles, rows)
        shares: Constants = {}
        if emission.has_warp_roles(name):
            grid = (min(tiles * rows, _multiprocessors(self.device)), 1)
            if not emission.takes_tickets(name):
                shares = {"Shares": self._planners[name].shares(operands, rows, grid[0], emission.heads_in_turn(name))}
        static = name not in self._planners or self._planners[name].is_static
        kept = {key: value for key, value in plan.items() if static or not isinstance(value, Tensor)}
        fixed = {**self.constants, **constants, **kept, **shares}
        shown = {pointer_name(read.tensor): view.tensor for read, view in self.views(operands).items()}
        return Launch(getattr(module, name), name, grid, fixed, tensors, schedule, emission, shown)


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

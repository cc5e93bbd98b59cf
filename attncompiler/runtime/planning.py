"""The tile plan of a call as kernels read it: tables with a row for each program, in the order of launch."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attncompiler.codegen.kernel_module import load_module
from attncompiler.codegen.plan_kernel import MOST_TILES, emit_plan, has_plan_kernel
from attncompiler.ir.expr import (
    KV_IDX,
    Q_IDX,
    Axis,
    Const,
    Expr,
    Kind,
    Read,
    axes_of,
    conj,
    conjuncts,
    floordiv,
    mul,
    reads_of,
    transform,
)
from attncompiler.ir.program import Attention, Empty, Keep
from attncompiler.passes.grid import windows_of
from attncompiler.passes.plan import TilePlan, TileRanges, build_boxes, build_plan, is_fixed
from attncompiler.runtime.launch import Constants, Launch
from attncompiler.runtime.queue import RowQueue
from attncompiler.tuning.schedule import KernelSchedule


class Planner:
    """Plans one kernel of a program. `is_static`: the plan reads no tensor and is made once; one of constant tensors is made once for
    each that is given."""

    def __init__(
        self, program: Attention, sizes: Mapping[str, int], extents: Mapping[str, int], schedule: KernelSchedule, by_keys: bool,
        device: torch.device, members: int = 0,
    ) -> None:  # fmt: skip
        """`members`: how many heads each row of tiles of a kernel with a queue sums over; 0 for a kernel without."""
        self._program, self._sizes, self._extents, self._device = program, sizes, extents, device
        self._schedule, self._by_keys = schedule, by_keys
        self.is_static = bool(schedule.tiles) or not reads_of(program.keep.predicate)
        self._blocks = {"q_idx": schedule.block_m, "kv_idx": schedule.block_n}
        self._on_device = not self.is_static and not is_fixed(program) and has_plan_kernel(program, self._blocks)
        read = dict.fromkeys(read.tensor for read in reads_of(program.keep.predicate))
        self._constants = tuple(read) if is_fixed(program) else ()
        self._plan: TilePlan | None = None  # the last, and the memory of the constants that it was made of
        self._memory: list[torch.UntypedStorage] = []
        self._tables: WeakKeyDictionary[TilePlan, Constants] = WeakKeyDictionary()
        self._kernel: _PlanKernel | None = None
        axis, block = ("kv_idx", schedule.block_n) if by_keys else ("q_idx", schedule.block_m)
        tiles = -(-extents[axis] // block)
        self._queue = RowQueue.of(program, extents, members, tiles, by_keys) if members else None

    def __call__(self, operands: Mapping[str, Tensor], raw: Mapping[str, Tensor], constants: Constants) -> Constants:
        """The tables for a call. `raw` and `constants` are what kernels get of the operands: pointers and strides, by name."""
        if self._on_device:
            if self._kernel is None:
                self._kernel = self._plan_kernel(operands, raw, constants)
            return self._kernel(raw)
        if self.is_static:
            self._plan = self._plan or self._rows(self._program, operands)
            return self._tables_of(self._plan)
        memory = [operands[name].untyped_storage() for name in self._constants]
        if not self._constants or [storage.data_ptr() for storage in memory] != [storage.data_ptr() for storage in self._memory]:
            self._plan, self._memory = self._rows(self._program, operands), memory
        assert self._plan is not None
        return {**self._tables_of(self._plan), "NextRow": torch.zeros(2, dtype=torch.int32, device=self._device)}

    def _tables_of(self, plan: TilePlan) -> Constants:
        if plan not in self._tables:
            order = _order(plan)
            full, partial, origins = plan.rows_in(order)
            if not self.is_static:  # a launch remembers how wide the tables are
                full, partial = (ranges.widened((plan.kv_tiles + 1) // 2) for ranges in (full, partial))
            in_boxes = {"Origins": origins, "Windows": self._windows()} if self._schedule.tiles else {}
            queue: Constants = {}
            if self._queue is not None:
                queue = {"Queue": self._queue.made(plan.work[:, :, order.long()].to(torch.int32).contiguous())}
            self._tables[plan] = {**_ranges("Full", full), **_ranges("Partial", partial), "Order": order, **in_boxes, **queue}
        return self._tables[plan]

    def _windows(self) -> Tensor:
        predicate, tokens = self._program.keep.predicate, self._extents["q_idx"]
        return windows_of(predicate, tokens, self._schedule.tiles, self._by_keys).to(self._device)

    def shares(self, operands: Mapping[str, Tensor], pairs: int, programs: int, in_turn: int) -> Tensor:
        """The rows of each program of a kernel with warp roles, int32 [rounds + 1, programs], for `pairs` batches and heads: every
        row, in the order of `_place` in templates/hopper_rows.py with so many heads `in_turn`, goes to the program that is done first.
        After the last of a program comes the number of rows."""
        plan = self._rows(self._program, operands)
        work = plan.work[:, :, _order(plan).long()].cpu() + _ROW_OVERHEAD
        b = self._extents["b"]
        work = work.expand(b, pairs // b, -1).flatten(0, 1)
        return fair_shares([float(x) for group in work.split(in_turn) for x in group.T.flatten()], programs).to(self._device)

    def _rows(self, program: Attention, operands: Mapping[str, Tensor]) -> TilePlan:
        if self._schedule.tiles:
            return build_boxes(program, self._sizes, self._schedule.tiles, self._by_keys, self._device)
        plan = build_plan(program, operands, self._sizes, self._schedule.block_m, self._schedule.block_n)
        return plan.transposed() if self._by_keys else plan

    def _plan_kernel(self, operands: Mapping[str, Tensor], raw: Mapping[str, Tensor], constants: Constants) -> _PlanKernel:
        """Rows go in the order by what of the mask is known before the call."""
        fixed = as_if_in_order(self._program.keep.predicate, self._extents["q_idx"], self._extents["kv_idx"])
        order = _order(self._rows(replace(self._program, keep=Keep(fixed, Empty.NAN)), operands))
        return _PlanKernel(self._program, self._extents, self._blocks, self._by_keys, order, raw, constants, self._queue)


def as_if_in_order(predicate: Expr, queries: int, keys: int) -> Expr:
    """The parts of a mask that read no tensor; and those that compare a position with one by list, as if a list held positions evenly,
    of queries all, of keys as many as there are. Of two lists along one axis the second is not one of positions: it ends runs."""
    lists: dict[str, str] = {}
    spread = floordiv(mul(KV_IDX, Const(queries)), Const(keys)) if keys < queries else KV_IDX

    def position(expr: Expr) -> Expr | None:
        if not isinstance(expr, Read) or len(axes := axes_of(expr) & {"q_idx", "kv_idx"}) != 1:
            return None
        (axis,) = axes
        if lists.setdefault(axis, expr.tensor) != expr.tensor:
            return expr
        return Q_IDX if axis == "q_idx" else spread

    found = []
    for part in conjuncts(predicate):
        guessed = transform(part, position) if _has_bare_axis(part) else part  # numbers of documents and the like are no positions
        found += [] if reads_of(guessed) else [guessed]
    return conj(*found)


def _has_bare_axis(part: Expr) -> bool:
    """True where a position stands outside of what is read."""
    bare: list[Expr] = []

    def outside_reads(expr: Expr) -> Expr | None:
        bare.extend([expr] if isinstance(expr, Axis) else [])
        return expr if isinstance(expr, Read) else None

    transform(part, outside_reads)
    return bool(bare)


_MOST_RANGES = 1 << 21  # of a table, all rows together
_FEWEST_RANGES = 128  # of a row, whatever the table then holds: memory stays O(N)


class _PlanKernel:
    """The kernels that plan on the device, and the shape of their tables."""

    def __init__(
        self, program: Attention, extents: Mapping[str, int], blocks: Mapping[str, int], by_keys: bool, order: Tensor,
        raw: Mapping[str, Tensor], constants: Constants, queue: RowQueue | None,
    ) -> None:  # fmt: skip
        self._queue = queue
        row, column = ("kv_idx", "q_idx") if by_keys else ("q_idx", "kv_idx")
        axes = axes_of(program.keep.predicate)
        self._shared = (extents["b"] if "b" in axes else 1) * (extents["h"] if "h" in axes else 1)
        rows, tiles = (-(-extents[axis] // blocks[axis]) for axis in (row, column))
        is_long = tiles > MOST_TILES
        emitted = emit_plan(program, row, blocks, is_long)
        room = (tiles + 1) // 2
        self._width = 1 << (tiles - 1).bit_length()
        if is_long:
            self._width = 1 << ((tiles - 1).bit_length() + 1) // 2  # as many runs of tiles as a run has tiles
            room = min(room, max(_MOST_RANGES // (rows * self._shared), _FEWEST_RANGES)) + self._width // 2 + 1
        sizes = dict.fromkeys(("FullCount", "PartialCount", "Work"), 1)
        sizes |= dict.fromkeys(("FullBegin", "FullEnd", "PartialBegin", "PartialEnd"), room)
        lengths = {name: self._shared * rows * size for name, size in sizes.items()} | {"NextRow": 2}
        if queue is not None:
            lengths["Queue"] = queue.length
        self._lengths = {name: -(-length // 4) * 4 for name, length in lengths.items()}  # each begins where 16 bytes do
        self._device = order.device
        self._fixed = {"Full_ranges": room, "Partial_ranges": room, "Order": order}
        self._column_tables = emitted.tables
        literals = {
            "PLAN_H": extents["h"] if "h" in axes else 1,
            "RANGES": room,
            "ROW_BLOCK": blocks[row],
            "COLUMN_BLOCK": blocks[column],
            "COLUMNS": min(blocks[column], max(8, 4096 // self._width)),
            "TILES": self._width,
        }
        module = load_module(emitted.source)
        values, tensors = {**constants, **literals}, {**raw, **self._tables(), **self._bounds()}

        def ready(name: str, grid: tuple[int, int], num_warps: int) -> Launch:
            schedule = KernelSchedule(blocks[row], blocks[column], num_warps, 1)
            return Launch(getattr(module, name), name, grid, values, tensors, schedule, None, {})

        self._columns = ready(emitted.columns, (-(-tiles // self._width), self._shared), 8) if emitted.columns else None
        warps = max(self._width // 128, 1) if is_long else 8 if emitted.reads_columns else 2
        self._rows = ready(emitted.rows, (rows, self._shared), warps)

    def _tables(self) -> dict[str, Any]:
        memory = torch.empty(sum(self._lengths.values()), dtype=torch.int32, device=self._device)
        return {**dict(zip(self._lengths, memory.split(list(self._lengths.values())), strict=True)), **self._fixed}

    def _bounds(self) -> dict[str, Tensor]:
        """The tables of the columns' bounds, which only the plan is made of."""
        length = self._shared * (self._width * self._width + self._width)
        kinds = {name: torch.float32 if kind is Kind.FLOAT else torch.int64 for name, kind in self._column_tables.items()}
        return {name: torch.empty(length, dtype=dtype, device=self._device) for name, dtype in kinds.items()}

    def __call__(self, raw: Mapping[str, Tensor]) -> Constants:
        tables = self._tables()
        tensors = {**raw, **tables, **self._bounds()}
        if self._columns is not None:
            self._columns(tensors)
        self._rows(tensors)
        if self._queue is not None:
            self._queue.fill(tables["Queue"], tables["Work"])
        return tables


_ROW_OVERHEAD = 2  # what a row costs beside its tiles, in tiles
_MOST_SHARED_OUT = 1 << 15  # rows; more are dealt out in turn


def fair_shares(work: Sequence[float], programs: int) -> Tensor:
    """Rows [rounds + 1, programs] for rows with this much work, each given to the program that is done first; ends in len(work)."""
    if len(work) > _MOST_SHARED_OUT:
        rounds = -(-len(work) // programs)
        return torch.arange((rounds + 1) * programs, dtype=torch.int32).clamp(max=len(work)).view(rounds + 1, programs)
    done = [(0.0, program) for program in range(programs)]
    rows: list[list[int]] = [[] for _ in range(programs)]
    for row, cost in enumerate(work):
        busy, program = heapq.heappop(done)
        rows[program].append(row)
        heapq.heappush(done, (busy + cost, program))
    rounds = max(map(len, rows)) + 1
    padded = [share + [len(work)] * (rounds - len(share)) for share in rows]
    return torch.tensor(padded, dtype=torch.int32).T.contiguous()


def _ranges(name: str, ranges: TileRanges) -> dict[str, Any]:
    return {
        f"{name}Count": ranges.count,
        f"{name}Begin": ranges.begin,
        f"{name}End": ranges.end,
        f"{name}_ranges": ranges.begin.shape[1],
    }


def _order(plan: TilePlan) -> Tensor:
    """Tiles with the most work first, so that the last programs to run are short."""
    return torch.argsort(plan.work.amax((0, 1)), descending=True, stable=True).to(torch.int32)

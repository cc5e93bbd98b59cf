# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""In which order the programs of a kernel take rows of tiles, where only the device knows how long these are.

The longest come first, of as many heads at a time as the cache of the device holds what streams past their rows: the longest rows of
all heads, taken first, would each read it from memory. Rows that are short for a row come last, of all heads, so that the programs
end together (benchmarks/row_order.py simulates both). Where one row takes long beside all that a program does, only its length counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attncompiler.codegen.vectors import head_group
from attncompiler.ir.expr import axes_of
from attncompiler.ir.program import Attention, Empty
from attncompiler.runtime.row_kernels import run
from attncompiler.tuning.schedule import heads_cached
from attncompiler.tuning.target import TARGETS

_SORTED = 8192  # rows; of more, each program takes many, and those of eight heads by turns find their keys in cache
_BLOCK, _CHUNK = 16, 1024
_SHORT = tl.constexpr(0.7)  # of the mean: some 1/8 of the work, where rows are of all lengths
_PARTS = tl.constexpr(TARGETS["sm_90"].multiprocessors * 4)  # a row with more than such a part of all work is long for a program


@triton.jit
def _queue_rows(Work, Queue, work_b, work_h, TILES, ROWS, TOGETHER, MEMBERS: tl.constexpr, SORTED: tl.constexpr,
                PASS_EMPTY: tl.constexpr, HEADS: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    work = _work_of(Work, mine, work_b, work_h, TILES, ROWS, HEADS, MEMBERS)
    place = tl.zeros([BLOCK], tl.int32)
    if SORTED:
        all_rows = tl.arange(0, ALL)
        all_work = _work_of(Work, all_rows, work_b, work_h, TILES, ROWS, HEADS, MEMBERS)
        rows = tl.sum(((all_rows < ROWS) & ((all_work > 0) | (not PASS_EMPTY))).to(tl.int32), 0)
        work_of_all = tl.sum(all_work, 0).to(tl.float32)
        by_heads = tl.max(all_work, 0).to(tl.float32) * _PARTS <= work_of_all
        short = tl.where(by_heads, _SHORT * work_of_all / tl.maximum(rows, 1), 0.0)
        TOGETHER = tl.where(by_heads, TOGETHER, ROWS)
        group = _group_of(mine, work, short, TOGETHER, PASS_EMPTY)[:, None]
        for start in range(0, ROWS, CHUNK):
            other = start + tl.arange(0, CHUNK)
            theirs = _work_of(Work, other, work_b, work_h, TILES, ROWS, HEADS, MEMBERS)
            their_group = _group_of(other, theirs, short, TOGETHER, PASS_EMPTY)[None, :]
            longer = (theirs[None, :] > work[:, None]) | ((theirs[None, :] == work[:, None]) & (other[None, :] < mine[:, None]))
            first = (their_group < group) | ((their_group == group) & longer)
            place += tl.sum(((other < ROWS)[None, :] & first).to(tl.int32), 1)
    else:
        head = mine // TILES
        turns = tl.minimum(ROWS // TILES - head // 8 * 8, 8)
        place = head // 8 * 8 * TILES + mine % TILES * turns + head % 8
        rows = ROWS
    tl.store(Queue + 1 + place, mine, mask=mine < ROWS)
    tl.store(Queue, rows)  # each program stores the same


@triton.jit
def _group_of(row, work, short, TOGETHER, PASS_EMPTY: tl.constexpr):
    """Which rows come before which, whatever their length: long rows by heads, short rows, rows that nobody takes."""
    group = tl.where(work < short, 1 << 30, row // TOGETHER)
    return tl.where((work == 0) & PASS_EMPTY, (1 << 30) + 1, group)


@triton.jit
def _work_of(Work, row, work_b, work_h, TILES, ROWS, HEADS: tl.constexpr, MEMBERS: tl.constexpr):
    """The tiles of a row: those of all heads that it sums over."""
    head = row // TILES
    at = Work + head // HEADS * work_b + head % HEADS * MEMBERS * work_h + row % TILES
    found = tl.load(at, mask=row < ROWS, other=0)
    for member in tl.static_range(1, MEMBERS):
        found += tl.load(at + member * work_h, mask=row < ROWS, other=0)
    return found


@dataclass(frozen=True)
class RowQueue:
    """The queue of one kernel: which of its rows, `tiles` of each head, come first. `members` heads of the program share rows.
    `together`: of so many heads, members counted as one, the cache has what streams. `pass_empty`: rows that visit no tile are left
    out."""

    batches: int
    heads: int  # that have rows
    members: int
    tiles: int
    work_strides: tuple[int, int]  # over batches and heads of the program
    together: int
    pass_empty: bool

    @staticmethod
    def of(program: Attention, extents: Mapping[str, int], members: int, tiles: int, by_keys: bool) -> RowQueue:
        """Rows of keys are all written."""
        axes, (b, h) = axes_of(program.keep.predicate), (extents["b"], extents["h"])
        over_h = tiles if "h" in axes else 0
        over_b = tiles * (h if "h" in axes else 1) if "b" in axes else 0
        unread = program.keep.empty is Empty.UNREAD
        tokens = extents["q_idx"] * members if by_keys else extents["kv_idx"] / head_group(program.sum, h)
        together = heads_cached(program, tokens)
        return RowQueue(b, h // members, members, tiles, (over_b, over_h), together, unread and not by_keys)

    @property
    def length(self) -> int:
        """Numbers that it has: how many rows there are to take, then which, as (batch and head) * tiles + row."""
        return 1 + self.batches * self.heads * self.tiles

    def fill(self, queue: Tensor, work: Tensor) -> None:
        """`work`: the tiles that each row of a plan visits, for each batch and head with a plan of its own. int32 both."""
        rows = self.length - 1
        numbers = {"work_b": self.work_strides[0], "work_h": self.work_strides[1], "TILES": self.tiles, "ROWS": rows}
        numbers["TOGETHER"] = min(self.together, self.heads * self.batches) * self.tiles
        variant = {"MEMBERS": self.members, "HEADS": self.heads, "SORTED": rows <= _SORTED, "PASS_EMPTY": self.pass_empty}
        blocks = {"ALL": triton.next_power_of_2(min(rows, _SORTED)), "BLOCK": _BLOCK, "CHUNK": _CHUNK}
        run(_queue_rows, (-(-rows // _BLOCK), 1), {"Work": work, "Queue": queue}, {**numbers, **variant, **blocks}, num_warps=8)

    def made(self, work: Tensor) -> Tensor:
        """The queue of a plan."""
        queue = torch.empty(self.length, dtype=torch.int32, device=work.device)
        self.fill(queue, work)
        return queue

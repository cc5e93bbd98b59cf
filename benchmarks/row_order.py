"""How much of K and V the forward reads from memory, by the order in which programs take rows. Simulated, on a CPU.

    TRITON_INTERPRET=1 python benchmarks/row_order.py [--only documents,flux-80x80-stride16] [--heads 8] [--cache 40]

Programs visit the tiles of their row one after the other, all at the same pace; what was not used for the longest time leaves the cache
first. Cases: a dozen causal documents of 16384 tokens, and the grids of gpu_masks.py, whose tiles begin where a row's box does. Of
documents "as now" is the order that runtime/queue.py makes, of grids the one with as many heads in turn as the cache has; the others
are what they were compared with. "ends" is in tiles: when the last program is done, beside the mean.
"""

from __future__ import annotations

import argparse
import heapq
import math
import os
import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator

import torch
from gpu_masks import cases
from tabulate import tabulate

from attncompiler import masks
from attncompiler.codegen.emission import Emission, Layout
from attncompiler.dsl.attention import declare
from attncompiler.ir.program import Attention
from attncompiler.passes.plan import TilePlan, build_boxes, build_plan
from attncompiler.runtime.queue import RowQueue
from attncompiler.tuning.schedule import KernelSchedule, choose_schedule, for_mask
from attncompiler.tuning.target import TARGETS

_BLOCK, _D = 128, 128
_PROGRAMS = 132
_ROW = 0.6  # what a row costs beside its tiles, in tiles
_BANDWIDTH = 4.8e12  # bytes a second, of an H200

Tile = tuple[Hashable, ...]  # the parts of it that the cache keeps or not
Rows = list[list[Tile]]  # the tiles of each row, of any head
Order = Iterable[tuple[int, int]]  # head and row


def simulated(order: Order, rows: Rows, cached: int) -> tuple[int, float]:
    """How many parts of tiles come from memory, where the cache has room for `cached`, and when the last program is done."""
    programs = [(0.0, program) for program in range(_PROGRAMS)]
    left: dict[int, Iterator[tuple[int, Tile]]] = {program: iter(()) for program in range(_PROGRAMS)}
    cache: OrderedDict[tuple[int, Hashable], None] = OrderedDict()
    to_take, read, done = iter(order), 0, 0.0
    while programs:
        now, program = heapq.heappop(programs)
        visited = next(left[program], None)
        if visited is None:
            taken = next(to_take, None)
            if taken is None:
                done = max(done, now)
                continue
            head, row = taken
            left[program] = iter([(head, tile) for tile in rows[row]])
            heapq.heappush(programs, (now + _ROW, program))
            continue
        head, tile = visited
        for part in tile:
            read += (head, part) not in cache
            cache[head, part] = None
            cache.move_to_end((head, part))
            if len(cache) > cached:
                cache.popitem(last=False)
        heapq.heappush(programs, (now + 1, program))
    return read, done


def in_turns(count: int, heads: int, in_turn: int) -> Order:
    """The order of `_place` in templates/hopper_rows.py."""
    for first in range(0, heads, in_turn):
        yield from ((head, row) for row in range(count) for head in range(first, min(first + in_turn, heads)))


def documents(heads: int) -> tuple[Rows, int, dict[str, Order]]:
    """The rows, the tokens of a part of a tile, and the orders."""
    n = 16384
    q = torch.empty(1, heads, 1, _D, dtype=torch.bfloat16).expand(1, heads, n, _D)
    ids = torch.sort(torch.randint(0, 12, (n,), generator=torch.Generator().manual_seed(0))).values.to(torch.int32)
    declared = declare(q, q, q, keep=masks.causal() & masks.document(ids))
    program = declared.program
    operands = dict(zip((tensor.name for tensor in program.tensors), (q, q, q, *declared.captured), strict=True))
    plan = build_plan(program, operands, {}, _BLOCK, _BLOCK)
    rows: Rows = [
        [(tile,) for tile in range(int(begin[0]), int(begin[0]) + int(work))]
        for begin, work in zip(plan.visited.begin, plan.work.flatten(), strict=True)
    ]
    all_rows = [(head, row) for head in range(heads) for row in range(len(rows))]
    of_rows = RowQueue.of(program, {"b": 1, "h": heads, "q_idx": n, "kv_idx": n}, 1, len(rows), False)
    made = of_rows.made(plan.work.to(torch.int32))[1:].tolist()
    orders: dict[str, Order] = {
        "longest first, of all heads": sorted(all_rows, key=lambda taken: -len(rows[taken[1]])),
        "head by head, longest first": sorted(all_rows, key=lambda taken: (taken[0], -len(rows[taken[1]]))),
        f"as now, {of_rows.together} heads at a time": [divmod(row, len(rows)) for row in made],
    }
    return rows, _BLOCK, orders


def grid(mask: masks.Mask, tokens: int, heads: int) -> tuple[Rows, int, dict[str, Order]]:
    """The same of a mask in a grid."""
    q = torch.empty(1, heads, tokens, _D, dtype=torch.bfloat16, device="meta")
    program: Attention = declare(q, q, q, keep=mask).program
    schedule = for_mask(choose_schedule(program, TARGETS["sm_90"], True), program, {})
    plan = build_boxes(program, {}, schedule.forward.tiles, False, torch.device("cpu"))
    order = torch.argsort(plan.work.amax((0, 1)), descending=True, stable=True)
    rows, part = _boxes(plan, schedule.forward)
    rows = [rows[row] for row in order.tolist()]
    now = Emission(program, schedule, Layout.of((1, 1, 1), frozenset())).heads_in_turn("attention_forward")
    orders = {"eight heads in turn": in_turns(len(rows), heads, 8), f"as now, {now} in turn": in_turns(len(rows), heads, now)}
    return rows, part, orders


def _boxes(plan: TilePlan, kernel: KernelSchedule) -> tuple[Rows, int]:
    """The tiles of each row in parts of a few tokens along each axis, so that tiles that overlap share some, and the tokens of a part."""
    axes = kernel.tiles.axes
    begins = plan.origins.T.tolist()
    sides = [math.gcd(axis.columns, *begin) for axis, begin in zip(axes, begins, strict=True)]
    sides = [side if side > 1 else max(1, axis.columns // 2) for side, axis in zip(sides, axes, strict=True)]
    rows: Rows = []
    for row in range(plan.q_tiles):
        tiles: list[Tile] = []
        for kind in (plan.partial, plan.full):
            for place in range(int(kind.count[row])):
                for tile in range(int(kind.begin[row, place]), int(kind.end[row, place])):
                    parts: list[tuple[int, ...]] = [()]
                    for axis, step, side, begin in zip(axes, kernel.tiles.steps, sides, begins, strict=True):
                        first = begin[row] + tile // step % axis.reach * axis.columns
                        along = range(first // side, (first + axis.columns - 1) // side + 1)
                        parts = [(*part, at) for part in parts for at in along]
                    tiles.append(tuple(parts))
        rows.append(tiles)
    return rows, math.prod(sides)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="documents,na2d-17x17,circle-r16,flux-80x80-stride16")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--cache", type=int, default=40, help="MiB")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("set TRITON_INTERPRET=1: the queue is made by its kernel")
        return 1
    table = []
    for name in arguments.only.split(","):
        case = next((case for case in cases() if case.name == name), None)
        found = documents(arguments.heads) if case is None else grid(case.mask, case.tokens, arguments.heads)
        rows, part, orders = found
        size, tiles = 2 * part * _D * 2, arguments.heads * sum(map(len, rows))  # bytes of K and V
        for order, taken in orders.items():
            read, done = simulated(taken, rows, arguments.cache * 2**20 // size)
            of_memory = f"{read * size / 2**20:.0f}", f"{1e3 * read * size / _BANDWIDTH:.3f}"
            table.append([name, order, *of_memory, f"{done:.0f}", f"{tiles / _PROGRAMS:.0f}"])
    headers = ["mask", "order", "MiB from memory", "ms at 4.8 TB/s", "ends", "tiles a program"]
    print(tabulate(table, headers, tablefmt="github"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

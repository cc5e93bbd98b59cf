"""How much of K and V the forward reads from memory, by the order in which programs take rows of causal documents. Simulated, on a CPU.

    TRITON_INTERPRET=1 python benchmarks/row_order.py [--tokens 16384] [--heads 16] [--documents 12] [--cache 40]

Programs visit the tiles of their row one after the other, all at the same pace; a tile of K and V that was not used for the longest time
leaves the cache first. "queue" is the order that runtime/queue.py makes; the others are what it was compared with. "ends" is in tiles:
when the last program is done, beside the mean.
"""

from __future__ import annotations

import argparse
import heapq
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable

import torch
from tabulate import tabulate

from attncompiler import masks
from attncompiler.dsl.attention import declare
from attncompiler.passes.plan import build_plan
from attncompiler.runtime.queue import RowQueue

_BLOCK = 128
_PROGRAMS = 132
_ROW = 0.6  # what a row costs beside its tiles, in tiles


def simulated(order: Iterable[int], tiles: list[range], cached: int) -> tuple[int, float]:
    """How many tiles come from memory, and when the last program is done. Row r is of head r // len(tiles)."""
    programs = [(0.0, program) for program in range(_PROGRAMS)]
    left: dict[int, list[tuple[int, int]]] = {program: [] for program in range(_PROGRAMS)}
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    rows, read, done = iter(order), 0, 0.0
    while programs:
        now, program = heapq.heappop(programs)
        if not left[program]:
            row = next(rows, None)
            if row is None:
                done = max(done, now)
                continue
            left[program] = [(row // len(tiles), tile) for tile in reversed(tiles[row % len(tiles)])]
            heapq.heappush(programs, (now + _ROW, program))
            continue
        tile = left[program].pop()
        read += tile not in cache
        cache[tile] = None
        cache.move_to_end(tile)
        if len(cache) > cached:
            cache.popitem(last=False)
        heapq.heappush(programs, (now + 1, program))
    return read, done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--cache", type=int, default=40, help="MiB")
    parser.add_argument("--d", type=int, default=128)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("set TRITON_INTERPRET=1: the queue is made by its kernel")
        return 1
    n, h = arguments.tokens, arguments.heads
    ids = torch.sort(torch.randint(0, arguments.documents, (n,), generator=torch.Generator().manual_seed(0))).values.to(torch.int32)
    q = torch.empty(1, h, 1, arguments.d, dtype=torch.bfloat16).expand(1, h, n, arguments.d)
    declared = declare(q, q, q, keep=masks.causal() & masks.document(ids))
    program = declared.program
    operands = dict(zip((tensor.name for tensor in program.tensors), (q, q, q, *declared.captured), strict=True))
    plan = build_plan(program, operands, {}, _BLOCK, _BLOCK)
    tiles = [
        range(int(begin[0]), int(begin[0]) + int(work)) for begin, work in zip(plan.visited.begin, plan.work.flatten(), strict=True)
    ]
    rows, total = range(h * len(tiles)), h * sum(map(len, tiles))

    def length(row: int) -> int:
        return len(tiles[row % len(tiles)])

    of_rows = RowQueue.of(program, {"b": 1, "h": h, "q_idx": n, "kv_idx": n}, 1, len(tiles), False)
    orders = {
        "longest first, of all heads": sorted(rows, key=lambda row: -length(row)),
        "head by head, longest first": sorted(rows, key=lambda row: (row // len(tiles), -length(row))),
        f"queue ({of_rows.together} heads at a time)": of_rows.made(plan.work.to(torch.int32))[1:].tolist(),
    }
    size = 2 * _BLOCK * arguments.d * 2 / 2**20  # MiB of K and V
    found = [(name, *simulated(order, tiles, int(arguments.cache / size))) for name, order in orders.items()]
    print(f"{total} tiles, {total / _PROGRAMS:.1f} a program; K and V {h * len(tiles) * size:.0f} MiB")
    table = [[name, f"{read * size:.0f}", f"{read * size * 2**20 / 4.8e9:.3f}", f"{done:.1f}"] for name, read, done in found]
    print(tabulate(table, ["order", "MiB from memory", "ms at 4.8 TB/s", "ends"], tablefmt="github"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The order in which programs take rows of tiles that only the device knows the length of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attncompiler.codegen.cross_compile import compiled_kernel
from attncompiler.ir import Attention, parse, verify
from attncompiler.ir.text import to_text
from attncompiler.runtime import queue
from attncompiler.runtime.planning import Planner
from attncompiler.runtime.prepared import Prepared
from attncompiler.runtime.queue import RowQueue
from attncompiler.tuning import schedule
from attncompiler.tuning.schedule import KernelSchedule
from attncompiler.tuning.target import TARGETS

EXTENTS = {"b": 2, "h": 6, "q_idx": 512, "kv_idx": 512}


def _program(keep: str) -> Attention:
    read = "doc: i32[2, 512]" if "doc" in keep else "on: i32[6, 512]"
    text = f"""attention
      axes b=2, h=6, q_idx=512, kv_idx=512
      read q: bf16[2, 6, 512, 64], k: bf16[2, 3, 512, 64], v: bf16[2, 3, 512, 64], {read}
      score dot(q[b, h, q_idx], k[b, h // 2, kv_idx]) * 0.125
      keep {keep}
      weigh softmax
      sum v[b, h // 2, kv_idx]
    """
    return verify(parse(text))


PLANS = {
    "every batch": ("doc[b, q_idx] == doc[b, kv_idx] else unread", (2, 1)),
    "every head": ("on[h, q_idx] <= kv_idx else zero", (1, 6)),
    "one": ("on[0, q_idx] <= kv_idx else unread", (1, 1)),
}


def _sums(work: Tensor, members: int) -> Tensor:
    """The tiles of each row of the kernel."""
    return work.expand(2, 6, -1).reshape(2, 6 // members, members, -1).sum(2).flatten()


def _ordered(sums: list[int], together: int, leaves_out: bool) -> list[int]:
    """Rows: long ones, `together` of them at a time, the longest first; then short ones likewise, of all; then those left out. Where a
    row has a quarter of what one of 132 programs does, the longest first."""
    taken = [work for work in sums if work or not leaves_out]
    short = 0.7 * sum(sums) / max(len(taken), 1)
    if max(sums) * 4 * 132 > sum(sums):
        short, together = 0.0, len(sums)

    def place(row: int) -> tuple[int, int, int, int]:
        kind = 2 if leaves_out and not sums[row] else int(sums[row] < short)
        return kind, 0 if kind else row // together, -sums[row], row

    return sorted(range(len(sums)), key=place)


@pytest.mark.interpreted
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("by_keys", "members", "tiles"), [(False, 1, 4), (False, 1, 150), (True, 2, 250)])
@pytest.mark.parametrize("together", [1, 2, 100])
def test_long_rows_come_first(
    plan: str, by_keys: bool, members: int, tiles: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, shape = PLANS[plan]
    program = _program(keep)
    # what streams: two vectors of each of 512 tokens, which two heads share; of keys, what all members see
    monkeypatch.setattr(schedule, "_CACHED", together * 512 * 2 * 64 * 2 * (members if by_keys else 0.5))
    work = torch.randint(0, 5, (*shape, tiles), generator=torch.Generator().manual_seed(tiles), dtype=torch.int32)
    of_rows = RowQueue.of(program, EXTENTS, members, tiles, by_keys)
    assert of_rows.together == together
    found = of_rows.made(work)
    sums = _sums(work, members)
    count, rows = int(found[0]), found[1:].tolist()
    left_out = keep.endswith("unread") and not by_keys  # what nothing reads need not be made; gradients of keys must
    assert rows == _ordered(sums.tolist(), together * tiles, left_out)
    assert count == (int((sums > 0).sum()) if left_out else len(sums))


@pytest.mark.parametrize("members", [1, 4])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_the_kernel_compiles(is_sorted: bool, members: int) -> None:
    from triton.compiler import ASTSource

    names = queue._queue_rows.arg_names
    constants = {"MEMBERS": members, "SORTED": is_sorted, "PASS_EMPTY": True, "HEADS": 16, "ALL": 2048, "BLOCK": 16, "CHUNK": 1024}
    types = {name: "constexpr" if name in constants else "*i32" if name in ("Work", "Queue") else "i32" for name in names}
    source = ASTSource(queue._queue_rows, types, {(names.index(name),): value for name, value in constants.items()})
    assert not compiled_kernel("_queue_rows", source, {"num_warps": 8}, TARGETS["sm_90"]).spills


@pytest.mark.interpreted
def test_rows_of_equal_length_stay_with_their_heads() -> None:
    found = RowQueue(1, 6, 1, 7, (0, 0), 2, False).made(torch.full((1, 1, 7), 3, dtype=torch.int32))
    assert found.tolist() == [42, *range(42)]


@pytest.mark.interpreted
def test_of_many_rows_eight_heads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_SORTED", 10)
    work = torch.zeros(1, 6, 7, dtype=torch.int32)
    found = RowQueue.of(_program(PLANS["every head"][0]), EXTENTS, 1, 7, False).made(work)
    rows = found[1:].tolist()
    assert int(found[0]) == 84 and sorted(rows) == list(range(84))
    assert [divmod(row, 7) for row in rows[:9]] == [(head, 0) for head in range(8)] + [(0, 1)]
    assert [divmod(row, 7) for row in rows[56:61]] == [(8, 0), (9, 0), (10, 0), (11, 0), (8, 1)]


@pytest.mark.interpreted
@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_a_plan_brings_its_queue(constant: bool, by_keys: bool) -> None:
    """Of the tiles that its rows visit, made on the device or, of a constant, before."""
    program = _program("(doc[b, q_idx] == doc[b, kv_idx]) & (kv_idx <= q_idx) else zero")
    if constant:
        program = verify(parse(to_text(program).replace("doc: i32[2, 512]", "doc: const(i32[2, 512])")))
    doc = torch.randint(0, 9, (2, 512), generator=torch.Generator().manual_seed(1), dtype=torch.int32).sort(-1).values
    qkv = {name: torch.zeros(2, heads, 512, 64, dtype=torch.bfloat16) for name, heads in (("q", 6), ("k", 3), ("v", 3))}
    made = {**qkv, "doc": doc}
    call = Prepared(program, made, {})
    members = 2 if by_keys else 1
    planner = Planner(program, {}, call.extents, KernelSchedule(64, 64, 1, 1), by_keys, torch.device("cpu"), members)
    found = planner(made, call.raw(made), call.constants)
    same = doc[:, :, None] == doc[:, None, :]
    tiles = (same & torch.ones(512, 512, dtype=torch.bool).tril()).unflatten(1, (8, 64)).unflatten(3, (8, 64)).any(2).any(3)
    visited = tiles.sum(1 if by_keys else 2)[:, found["Order"].long()]
    sums = (visited[:, None] * members).expand(2, 6 // members, 8).flatten()
    rows = found["Queue"][1 : len(sums) + 1].tolist()
    assert rows == _ordered(sums.tolist(), len(sums), False)  # few rows: a program has less than four
    assert int(found["Queue"][0]) == len(sums)

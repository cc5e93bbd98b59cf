"""A plan never drops a kept pair and never calls a tile full that has a hole: random predicates, by brute force."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import attncompiler.runtime.selection  # noqa: F401  registers the ops
from attncompiler.codegen.plan_kernel import has_plan_kernel
from attncompiler.errors import InvalidProgram
from attncompiler.ir import Attention, parse, verify
from attncompiler.ir.evaluate import whole
from attncompiler.ir.expr import KV_IDX, Q_IDX, Const, Read, Size, apply, axes_of, conj
from attncompiler.ir.program import Empty
from attncompiler.ir.text import to_text
from attncompiler.passes.plan import Coverage, build_plan, keeps_only_keys, proved_nonempty, runs_of, runs_on_device
from attncompiler.runtime import planning
from attncompiler.runtime.planning import Planner
from attncompiler.runtime.prepared import Prepared
from attncompiler.runtime.rows import rows_of
from attncompiler.tuning.schedule import KernelSchedule

READS = {
    "doc": "i32[{both}]", "lens": "i64[2]", "pad": "bool[2, {n}]", "x": "f32[{both}]", "table": "bool[2, 4, {m}, {n}]",
    "cell": "bool[4, 12, 8]", "near": "i32[{both}]", "seed": "i64[1]",
}  # fmt: skip


def term(r: random.Random, reads: bool, tables: bool) -> str:
    """A random condition on a pair. `tables`: also what only plans made here can bound."""
    integer = [
        "q_idx",
        "kv_idx",
        "q_idx - kv_idx",
        "q_idx // 3",
        "kv_idx % 5",
        "(q_idx + kv_idx) // 4",
        "h * 3",
        "b",
        "abs(q_idx - kv_idx)",
    ]
    integer += ["doc[q_idx]", "doc[kv_idx]", "lens[b]"] if reads else []
    left, right = r.choice(integer), r.choice([*integer, str(r.randint(-3, 20))])
    choices = [f"({left} {r.choice(['<', '<=', '>', '>=', '==', '!='])} {right})"]
    if reads:
        choices += ["pad[b, kv_idx]", "(x[q_idx] > x[kv_idx])", "(x[kv_idx] > 0.3)", "table[b, h, q_idx, kv_idx]"]
    if reads and tables:
        choices += ["cell[h, q_idx // 6, kv_idx // 9]", "(x[abs(q_idx - kv_idx)] < 0.3)", "(near[abs(q_idx - kv_idx) + b] < 3)"]
        choices += [f"(uniform(seed[0], h * 64 + q_idx // 6, kv_idx // {r.choice([1, 9])}) < {r.choice([0.02, 0.5])})"]
    elif reads:  # of one cell for each tile
        size = 64 if r.random() < 0.5 else 128
        row, column = f"q_idx // {size}", f"kv_idx // {size}"
        choices += [f"cell[h, {row}, {column}]", f"(near[abs({row} - {column}) + b] < 3)"]
        choices += [f"(uniform(seed[0], h * 64 + {row}, {column}) < {r.choice([0.3, 0.8])})"]
    return r.choice(choices)


def predicate(r: random.Random, reads: bool, tables: bool) -> str:
    text = term(r, reads, tables)
    for _ in range(r.randint(0, 3)):
        text = f"({text} {r.choice('&|')} {r.choice(['', '~'])}{term(r, reads, tables)})"
    return f"where({term(r, reads, tables)}, {text}, {term(r, reads, tables)})" if r.random() < 0.2 else text


def masked(r: random.Random, reads: bool, m: int, n: int, tables: bool = True) -> tuple[Attention, dict[str, Tensor]]:
    """A program under a random mask, and operands with NaN among them."""
    empty = r.choice(["nan", "zero", "score"])
    sizes = {"m": m, "n": n, "both": m + n}
    keep = predicate(r, reads, tables)
    used = "".join(f", {name}: {shape.format(**sizes)}" for name, shape in READS.items() if f"{name}[" in keep)
    text = f"""attention
      axes b=2, h=4, q_idx={m}, kv_idx={n}
      read q: f32[2, 4, {m}, 16], k: f32[2, 4, {n}, 16], v: f32[2, 4, {n}, 16]{used}
      score dot(q[b, h, q_idx], k[b, h, kv_idx])
      keep {keep} else {empty}
      weigh softmax
      sum v[b, h, kv_idx]
    """
    g = torch.Generator().manual_seed(r.randint(0, 10**6))
    x = torch.randn(m + n, generator=g)
    x[::11] = torch.nan
    made = {
        "q": torch.zeros(2, 4, m, 16), "k": torch.zeros(2, 4, n, 16), "v": torch.zeros(2, 4, n, 16), "x": x,
        "doc": torch.randint(0, 5, (m + n,), generator=g, dtype=torch.int32).sort().values,
        "lens": torch.randint(0, n + 1, (2,), generator=g), "pad": torch.rand(2, n, generator=g) > r.choice([0.02, 0.5]),
        "table": torch.rand(2, 4, m, n, generator=g) > r.choice([0.01, 0.99]),
        "cell": torch.rand(4, 12, 8, generator=g) > r.choice([0.1, 0.9]), "near": torch.randint(0, 6, (m + n,), generator=g).int(),
        "seed": torch.randint(-(2**62), 2**62, (1,), generator=g),
    }  # fmt: skip
    try:
        p = verify(parse(text))
    except InvalidProgram:  # simplifying took a tensor out: another mask
        return masked(r, reads, m, n, tables)
    return p, {name: made[name] for name in p.decls}


def truth(p: Attention, made: dict[str, Tensor], m: int, n: int) -> Tensor:
    block = whole(made, {}, {"b": 2, "h": 4, "q_idx": m, "kv_idx": n}, torch.float64, torch.device("cpu"))
    return block.tensor(p.keep.predicate).to(torch.bool).expand(2, 4, m, n)


def check(p: Attention, coverage: Tensor, kept: Tensor, block_q: int, block_kv: int) -> None:
    m, n = kept.shape[2:]
    coverage = coverage.expand(2, 4, -1, -1)
    pairs = coverage.repeat_interleave(block_q, 2)[:, :, :m].repeat_interleave(block_kv, 3)[:, :, :, :n]
    assert not (kept & (pairs == Coverage.EMPTY)).any(), "a kept pair is dropped"
    assert not (~kept & (pairs == Coverage.FULL)).any(), "a full tile has a hole"
    if n % block_kv:
        assert not (coverage[..., -1] == Coverage.FULL).any(), "a full tile sticks out"
    if p.keep.empty is Empty.SCORE:
        assert not ((pairs == Coverage.EMPTY).any(3) & ~kept.any(3)).any(), "a row that keeps nothing must see every key"


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_plans_are_exact(first: int, reads: bool) -> None:
    for seed in range(first, first + 100):
        r = random.Random(f"{seed} {reads}")
        m, n = r.randint(1, 70), r.randint(1, 70)
        p, made = masked(r, reads, m, n)
        block_q, block_kv = r.choice([4, 8, 16]), r.choice([4, 8, 16])
        plan = build_plan(p, made, {}, block_q, block_kv)
        kept = truth(p, made, m, n)
        check(p, plan.coverage, kept, block_q, block_kv)
        check(p, plan.transposed().coverage.transpose(2, 3), kept, block_q, block_kv)
        check_ranges(plan.full.count, plan.full.begin, plan.full.end, plan.coverage, Coverage.FULL)
        check_ranges(plan.partial.count, plan.partial.begin, plan.partial.end, plan.coverage, Coverage.PARTIAL)


def check_ranges(count: Tensor, begin: Tensor, end: Tensor, coverage: Tensor, kind: Coverage) -> None:
    rows = coverage.reshape(-1, coverage.shape[-1])
    for row, (c, starts, stops) in enumerate(zip(count.tolist(), begin.tolist(), end.tolist(), strict=True)):
        tiles = [t for i in range(c) for t in range(starts[i], stops[i])]
        assert tiles == (rows[row] == kind).nonzero().flatten().tolist()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 64, 65), (1, 1, 3, 0), (1, 1, 0, 4)], ids=str)
def test_runs_are_the_same_on_a_device(shape: tuple[int, ...]) -> None:
    coverage = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    for ours, theirs in zip(runs_of(coverage), runs_on_device(coverage), strict=True):
        assert torch.equal(ours.count, theirs.count) and torch.equal(ours.lengths, theirs.lengths)
        used = torch.arange(ours.begin.shape[1]) < ours.count.unsqueeze(1)
        for mine, other in ((ours.begin, theirs.begin), (ours.end, theirs.end)):
            assert torch.equal(mine[used], torch.nn.functional.pad(other, (0, 1))[:, : mine.shape[1]][used])


def test_a_causal_window_is_what_it_should_be() -> None:
    text = """attention
      axes b=1, h=1, q_idx=256, kv_idx=256
      read q: f32[1, 1, 256, 16], k: f32[1, 1, 256, 16], v: f32[1, 1, 256, 16]
      score dot(q[b, h, q_idx], k[b, h, kv_idx])
      keep (kv_idx <= q_idx) & (q_idx - kv_idx < 128) else nan
      weigh softmax
      sum v[b, h, kv_idx]
    """
    plan = build_plan(verify(parse(text)), {"v": torch.zeros(1)}, {}, 64, 64)
    assert plan.coverage[0, 0].tolist() == [[1, 0, 0, 0], [2, 1, 0, 0], [1, 2, 1, 0], [0, 1, 2, 1]]
    assert plan.transposed().coverage[0, 0].tolist() == [[1, 2, 1, 0], [0, 1, 2, 1], [0, 0, 1, 2], [0, 0, 0, 1]]


def test_what_a_mask_itself_keeps_inside() -> None:
    """A causal square needs no test of its end; a causal rectangle with more keys does not; one with fewer does."""
    causal = apply("le", KV_IDX, Q_IDX)
    assert keeps_only_keys(causal, Const(100), Const(100))
    assert keeps_only_keys(conj(Read("doc", (KV_IDX,)), causal), Const(100), Const(130))
    assert not keeps_only_keys(causal, Const(101), Const(100))
    assert not keeps_only_keys(causal, Size("n"), Size("n"))
    same_residue = apply("eq", apply("mod", Q_IDX, Const(3)), apply("mod", KV_IDX, Const(3)))
    assert not keeps_only_keys(same_residue, Const(1), Const(1))  # position 1 is not kept, but 3 is: a tile reaches that far


def test_documents_leave_each_query_its_own_key() -> None:
    text = """attention
      axes b=1, h=1, q_idx=50, kv_idx=50
      read q: f32[1, 1, 50, 16], k: f32[1, 1, 50, 16], v: f32[1, 1, 50, 16], doc: {dtype}[50]
      score dot(q[b, h, q_idx], k[b, h, kv_idx])
      keep (kv_idx <= q_idx) & (doc[q_idx] == doc[kv_idx]) else nan
      weigh softmax
      sum v[b, h, kv_idx]
    """
    extents = {"b": 1, "h": 1, "q_idx": 50, "kv_idx": 50}
    assert proved_nonempty(verify(parse(text.format(dtype="i32"))), {}, extents)
    assert not proved_nonempty(verify(parse(text.format(dtype="f32"))), {}, extents)  # NaN is not equal to itself


@pytest.mark.interpreted
@pytest.mark.parametrize("first", range(0, 120, 40))
def test_plans_made_on_the_device(first: int) -> None:
    """The generated kernel is as exact as the plans made here."""
    assert _plan_on_the_device(range(first, first + 40), longest=150, blocks=(64, 64)) >= 5


@pytest.mark.interpreted
@pytest.mark.parametrize(("fewest", "first"), [(2, 200), (128, 215)])
def test_long_rows_planned_on_the_device(monkeypatch: pytest.MonkeyPatch, fewest: int, first: int) -> None:
    """Rows that are walked run by run; with room for few ranges, where runs of tiles are taken as a whole."""
    monkeypatch.setattr(planning, "MOST_TILES", 0)
    monkeypatch.setattr(planning, "_MOST_RANGES", 0)
    monkeypatch.setattr(planning, "_FEWEST_RANGES", fewest)
    assert _plan_on_the_device(range(first, first + 9), longest=40, blocks=(8, 2)) > 0


@pytest.mark.interpreted
@pytest.mark.parametrize("per_row", [False, True])
def test_tiles_of_a_list_that_no_query_sees_are_left_out(per_row: bool) -> None:
    """Lists of keys, in order of position: but for the tile where a list ends, the plan is what the pairs say."""
    m, w, blocks = 300, 100, (32, 16)
    until = " & (q_idx < until[b, h // 2, kv_idx])" if per_row else ""
    reads = ", until: i32[2, 2, 100]" * per_row
    p = verify(parse(f"""attention
      axes  b=2, h=4, q_idx={m}, kv_idx={w}
      read  q: f32[2, 4, {m}, 16], k: f32[2, 4, {w}, 16], v: f32[2, 4, {w}, 16], picked: i32[2, 2, {w}]{reads}
      score dot(q[b, h, q_idx], k[b, h, kv_idx])
      keep  (picked[b, h // 2, kv_idx] >= 0) & (picked[b, h // 2, kv_idx] <= q_idx){until} else zero
      weigh softmax
      sum   v[b, h, kv_idx]
    """))  # fmt: skip
    rank = torch.randn(2, 2, m)
    picked = torch.ops.attncompiler.ascending(rank.topk(w).indices, rank.topk(w).values > rank.topk(70).values[..., -1:])
    end = (picked + torch.arange(w).flip(-1) + 20).to(torch.int32)  # the later keys are dropped sooner
    made = {decl.name: torch.randn([int(size.value) for size in decl.shape]) for decl in p.tensors}  # type: ignore[attr-defined]
    made |= {"picked": picked, **({"until": end} if per_row else {})}
    kept = truth(p, made, m, w)
    for by_keys in (False, True):
        coverage = _device_coverage(p, made, (m, w), blocks, by_keys)
        coverage = coverage.transpose(2, 3) if by_keys else coverage
        check(p, coverage, kept, *blocks)
        tiles = torch.nn.functional.pad(kept, (0, -w % 16, 0, -m % 32)).unflatten(3, (-1, 16)).unflatten(2, (-1, 32))
        some, visited = tiles.any(5).any(3), coverage != Coverage.EMPTY
        ends = 69 // 16
        assert torch.equal(visited[..., :ends], some[..., :ends]) and not visited[..., ends + 1 :].any()


@pytest.mark.interpreted
@pytest.mark.parametrize("is_long", [False, True])
def test_lists_of_rows_planned_on_the_device(monkeypatch: pytest.MonkeyPatch, is_long: bool) -> None:
    """What ascends is looked at where tiles begin and end; lists are empty, short and full."""
    if is_long:
        monkeypatch.setattr(planning, "MOST_TILES", 0)
    m, n = 90, 70
    active = torch.rand(2, 4, m) < torch.tensor([[0.0, 0.1, 1.0, 0.7], [0.5, 0.9, 0.3, 0.0]])[..., None]
    rows = rows_of(active)
    length = rows.length
    text = f"""attention
      axes b=2, h=4, q_idx={length}, kv_idx={n}
      read q: f32[2, 4, {length}, 16], k: f32[2, 4, {n}, 16], v: f32[2, 4, {n}, 16], rows: ascending(i32[2, 4, {length}]), count: i32[2, 4]
      score dot(q[b, h, q_idx], k[b, h, kv_idx])
      keep (q_idx < count[b, h]) & ((kv_idx <= rows[b, h, q_idx]) & (rows[b, h, q_idx] - kv_idx < 30)) else zero
      weigh softmax
      sum v[b, h, kv_idx]
    """
    p = verify(parse(text))
    assert verify(parse(to_text(p))) == p and "ascending(i32" in to_text(p)
    keys = torch.zeros(2, 4, n, 16)
    made = {"q": torch.zeros(2, 4, length, 16), "k": keys, "v": keys, "rows": rows.index.contiguous(), "count": rows.count}
    kept, blocks = truth(p, made, length, n), (8, 16)
    for by_keys in (False, True):
        coverage = _device_coverage(p, made, (length, n), blocks, by_keys)
        coverage = coverage.transpose(2, 3) if by_keys else coverage
        check(p, coverage, kept, *blocks)
        assert torch.equal(coverage, build_plan(p, made, {}, *blocks).coverage)


def _plan_on_the_device(seeds: range, longest: int, blocks: tuple[int, int]) -> int:
    """How many of random masks the kernels plan; each plan is compared with every pair."""
    planned = 0
    for seed in seeds:
        r = random.Random(f"device {seed}")
        m, n = r.randint(1, longest), r.randint(1, longest)
        p, made = masked(r, True, m, n, tables=False)
        if "x" in p.decls or not has_plan_kernel(p, dict(zip(("q_idx", "kv_idx"), blocks, strict=True))):
            continue  # Triton's interpreter can't mix the comparison of one loaded float with that of a tile
        planned += 1
        for by_keys in (False, True):
            coverage = _device_coverage(p, made, (m, n), blocks, by_keys)
            check(p, coverage.transpose(2, 3) if by_keys else coverage, truth(p, made, m, n), *blocks)
    return planned


def _device_coverage(
    p: Attention, made: Mapping[str, Tensor], lengths: tuple[int, int], blocks: tuple[int, int], by_keys: bool
) -> Tensor:
    """What the tables of a plan made on the device say of every tile, [b or 1, h or 1, rows, columns]."""
    call = Prepared(p, made, {})
    planner = Planner(p, {}, call.extents, KernelSchedule(*blocks, 1, 1), by_keys, torch.device("cpu"))
    found = planner(made, call.raw(made), call.constants)
    rows, columns = (-(-length // block) for length, block in zip(lengths, blocks, strict=True))
    rows, columns = (columns, rows) if by_keys else (rows, columns)
    shape = _plan_shape(p, call.extents)
    launched = torch.zeros(math.prod(shape) * rows, columns, dtype=torch.int8)
    for kind, which in ((Coverage.FULL, "Full"), (Coverage.PARTIAL, "Partial")):
        room = found[f"{which}_ranges"]
        for row, count in enumerate(found[f"{which}Count"].tolist()[: len(launched)]):
            assert count <= room
            for i in range(row * room, row * room + count):
                begin, end = int(found[f"{which}Begin"][i]), int(found[f"{which}End"][i])
                assert 0 <= begin < end <= columns and not launched[row, begin:end].any()
                launched[row, begin:end] = kind
    assert found["Work"][: len(launched)].tolist() == (launched != 0).sum(1).tolist()  # what rows are sorted by
    coverage = torch.empty_like(launched).reshape(-1, rows, columns)
    coverage[:, found["Order"].long()] = launched.reshape(-1, rows, columns)
    return coverage.reshape(*shape, rows, columns)


def _plan_shape(p: Attention, extents: Mapping[str, int]) -> tuple[int, int]:
    """How many batches and heads have a plan of their own."""
    axes = axes_of(p.keep.predicate)
    return (extents["b"] if "b" in axes else 1), (extents["h"] if "h" in axes else 1)

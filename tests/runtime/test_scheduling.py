"""What is said to run is what runs: the schedule of a call and that of its outline."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.codegen.emission import Emission, Layout
from attncompiler.dsl.attention import declare
from attncompiler.explain import preview_site, trace
from attncompiler.ir.expr import Expr
from attncompiler.ir.text import parse
from attncompiler.masks import Mask
from attncompiler.runtime import planning, prepared
from attncompiler.runtime.planning import as_if_in_order
from attncompiler.runtime.prepared import Prepared
from attncompiler.tuning.schedule import choose_schedule, for_mask
from attncompiler.tuning.target import TARGETS

_GRID, _GRID_3D = masks.grid((32, 32), 5), masks.grid((8, 12, 12), 3)


def _of(b: int, h: int, n: int, d: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(b, h, n, d, dtype=dtype)


def _packed(b: int, h: int, n: int, d: int) -> list[Tensor]:
    return list(torch.zeros(b, n, 3, h, d, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4).unbind(0))


def _misaligned(b: int, h: int, n: int, d: int) -> list[Tensor]:
    return [torch.zeros(b * h * n * d + 1, dtype=torch.bfloat16)[1:].view(b, h, n, d) for _ in range(3)]


CASES: dict[str, tuple[list[Tensor], Mask | None]] = {
    "all pairs": ([_of(1, 2, 1024)] * 3, None),
    "grid": ([_of(1, 2, 1024)] * 3, _GRID),
    "grid, packed": (_packed(1, 2, 1024, 64), _GRID),
    "packed": (_packed(2, 2, 96, 64), masks.causal()),
    "not aligned": (_misaligned(1, 2, 1024, 64), _GRID),
    "grid of three axes": ([_of(1, 2, 1152)] * 3, _GRID_3D),
    "grid of three axes, several batches": ([_of(2, 2, 1152)] * 3, _GRID_3D),
    "dilated": ([_of(1, 2, 1024)] * 3, masks.grid((32, 32), 5, dilation=2)),
    "one query": ([_of(1, 2, 1), _of(1, 2, 96), _of(1, 2, 96)], None),
    "sixteen queries": ([_of(1, 2, 16), _of(1, 2, 96), _of(1, 2, 96)], masks.causal()),
    "seventeen queries": ([_of(1, 2, 17), _of(1, 2, 96), _of(1, 2, 96)], masks.causal()),
    "float32": ([_of(1, 2, 1024, dtype=torch.float32)] * 3, _GRID),
    "documents": ([_of(1, 2, 1024)] * 3, masks.causal() & masks.document(every=100)),
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_explained_is_what_runs(case: str, target: str) -> None:
    qkv, mask = CASES[case]
    qkv = [tensor if tensor.storage_offset() else tensor.clone() for tensor in qkv]  # three tensors, not one

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attncompiler.attention(q, k, v, keep=mask)

    torch._dynamo.reset()
    (site,), _ = trace(attend, *qkv)
    explained = preview_site(site, TARGETS[target])
    declared = declare(*qkv, keep=mask)
    names = (decl.name for decl in declared.program.tensors)
    operands = dict(zip(names, (*qkv, *declared.captured), strict=True))
    with mock.patch.object(prepared, "target_of", lambda device: TARGETS[target]):
        runs = Prepared(declared.program, operands, {}).schedule
    assert explained.schedule == runs
    forward, plan = runs.forward, explained.counts
    assert (plan.block_q, plan.block_kv) == (forward.block_m, forward.block_n)
    assert explained.light is not None
    assert explained.light.boxes == ((forward.tiles.rows, forward.tiles.columns) if forward.tiles else None)


def test_the_cases_differ() -> None:
    """Boxes by descriptors, boxes by computed positions, runs of tokens, kernels of few queries."""
    kinds = set()
    for qkv, mask in CASES.values():
        program = declare(*qkv, keep=mask)
        names = (decl.name for decl in program.program.tensors)
        with mock.patch.object(prepared, "target_of", lambda device: TARGETS["sm_90"]):
            schedule = Prepared(program.program, dict(zip(names, (*qkv, *program.captured), strict=True)), {}).schedule
        kinds.add((bool(schedule.forward.tiles), schedule.descriptors, schedule.delta_over_keys))
    assert kinds == {(True, True, False), (True, False, False), (False, True, False), (False, True, True)}


def test_all_that_a_region_says_of_speed() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attncompiler.attention(q, k, v, keep=_GRID)

    explanation = attncompiler.explain(attend, *[_of(1, 2, 1024)] * 3)
    (region,) = explanation.regions
    light = region.speed_of_light
    assert light is not None and light.kept_pairs == 2 * (32 * 5) ** 2
    assert light.visited_tiles == light.full_tiles + light.partial_tiles and light.worst_row_tiles > 1
    assert (light.tile, light.boxes) == ((128, 64), ((4, 32), (2, 32)))
    assert light.bound_flops == 40.96 and light.bound_tiles == 2 * 8 * 16 / light.visited_tiles and light.predicted_ms > 0
    assert not light.full_strides and "predicted ms" in str(explanation)


def test_a_stride_is_proposed() -> None:
    mask = masks.grid((32, 32), (16, 16))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attncompiler.attention(q, k, v, keep=mask)

    (region,) = attncompiler.explain(attend, *[_of(1, 2, 1024)] * 3).regions
    assert region.speed_of_light is not None and (8, 16) in region.speed_of_light.full_strides
    assert any(note.startswith("with a stride of 8x16, 16x8") for note in region.notes)


@pytest.mark.parametrize(("text", "notes"), [(128, 1), (0, 0)])
def test_a_grid_beside_other_tokens_is_said_to_lose_its_boxes(text: int, notes: int) -> None:
    mask = masks.disc((64, 64), 8, text=text)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attncompiler.attention(q, k, v, keep=mask)

    qkv = [_of(1, 2, 4096 + text, dtype=torch.float32)] * 3  # of half precision the parts would run
    (region,) = attncompiler.explain(attend, *qkv).regions
    said = [note for note in region.notes if note.startswith("a grid of 4096 tokens beside others")]
    assert len(said) == notes and all("in boxes" in note for note in said)


@pytest.mark.parametrize(("m", "n"), [(0, 0), (0, 64), (64, 0)])
def test_nothing_to_attend_to_has_no_speed(m: int, n: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    explanation = attncompiler.explain(attend, _of(1, 2, m), _of(1, 2, n), _of(1, 2, n))
    assert all(region.speed_of_light is None for region in explanation.regions) and str(explanation)


def test_rows_are_shared_out_fairly() -> None:
    """Every row once, in the order of `_place`, each to the program that is done first; then the number of rows."""
    work = [130.0 - row // 8 for row in range(1024)] * 2
    shares = planning.fair_shares(work, 132)
    assert sorted(shares[shares < len(work)].tolist()) == list(range(len(work))) and bool((shares[-1] == len(work)).all())
    loads = torch.tensor([*work, 0.0])[shares.long()].sum(0)
    assert loads.max() <= loads.mean() + work[0] * 0.1
    many = planning.fair_shares([1.0] * 40000, 7)
    assert sorted(many[many < 40000].tolist()) == list(range(40000)) and bool((many[-1] == 40000).all())


@pytest.mark.parametrize(
    ("mask", "tokens", "in_turn", "of_shared_keys", "by_shared_keys"),
    [
        (masks.causal(), 16384, 8, 8, 8),
        (masks.grid((128, 128), 17), 16384, 3, 8, 1),
        (masks.grid((64, 64), 9), 4096, 8, 8, 3),
        (masks.grid((256, 256), 80, stride=16), 65536, 1, 3, 1),
    ],
)
def test_no_more_heads_of_a_grid_are_taken_in_turn_than_the_cache_has(
    mask: Mask, tokens: int, in_turn: int, of_shared_keys: int, by_shared_keys: int
) -> None:
    """24 MiB for 512 bytes a token; four heads of queries that share keys: their rows read one head's, and rows of keys read four's."""
    found = []
    for kv_heads in (8, 2):
        q, k = (torch.empty(1, heads, tokens, 128, dtype=torch.bfloat16, device="meta") for heads in (8, kv_heads))
        program = declare(q, k, k, keep=mask, enable_gqa=True).program
        schedule = for_mask(choose_schedule(program, TARGETS["sm_90"], True), program, {})
        group = 8 // kv_heads
        emission = Emission(program, schedule, Layout.of((1, group, group), frozenset("qkv")))
        found += [emission.heads_in_turn(kernel) for kernel in ("attention_forward", "attention_backward_keys")]
    assert found == [in_turn, in_turn, of_shared_keys, by_shared_keys]


@pytest.mark.parametrize(
    ("mask", "narrow"),
    [(masks.causal(), False), (masks.strided(64, 4, 4, heads=2), True), (masks.causal() & masks.window(1024), False)],
)
def test_key_tiles_are_narrow_where_wide_ones_would_be_cut_through(mask: Mask, narrow: bool) -> None:
    declared = declare(*[_of(1, 2, 4096)] * 3, keep=mask)
    operands = dict(zip("qkv", [_of(1, 2, 4096) for _ in range(3)], strict=True))
    with mock.patch.object(prepared, "target_of", lambda device: TARGETS["sm_90"]):
        schedule = Prepared(declared.program, operands, {}).schedule
    assert schedule.warp_roles and schedule.forward.block_n == (64 if narrow else 128) and schedule.forward.pairs == narrow


def test_rows_of_one_narrow_tile_are_no_pairs() -> None:
    q, k = _of(1, 2, 4096), _of(1, 2, 64)
    declared = declare(q, k, k, keep=masks.full())
    with mock.patch.object(prepared, "target_of", lambda device: TARGETS["sm_90"]):
        forward = Prepared(declared.program, {"q": q, "k": k, "v": k}, {}).schedule.forward
    assert forward.block_n == 64 and not forward.pairs


@pytest.mark.parametrize(
    ("mask", "guessed"),
    [
        ("kv_idx <= rows[b, h, q_idx]", "kv_idx <= q_idx"),
        ("picked[b, kv_idx] <= q_idx", "kv_idx * 32 // 8 <= q_idx"),
        ("(picked[b, kv_idx] >= 0) & (picked[b, kv_idx] <= q_idx) & (q_idx < until[b, kv_idx])",
         "kv_idx * 32 // 8 <= q_idx"),
        ("(kv_idx <= q_idx) & (document[q_idx] == document[kv_idx])", "kv_idx <= q_idx"),
    ],
)  # fmt: skip
def test_rows_by_list_go_in_the_order_of_positions(mask: str, guessed: str) -> None:
    """Long rows first; documents and the ends of runs say nothing of how long a row is."""
    assert as_if_in_order(_predicate(mask), 32, 8) == _predicate(guessed)


def _predicate(text: str) -> Expr:
    lists = "rows: i32[1, 2, 8]", "picked: i64[1, 8]", "until: i64[1, 8]", "document: i32[8]"
    reads = ", ".join([*(f"{name}: f32[1, 2, 8, 16]" for name in "qkv"), *(each for each in lists if each.split(":")[0] in text)])
    p = parse(f"""attention
      axes b=1, h=2, q_idx=8, kv_idx=8
      read {reads}
      score dot(q[b, h, q_idx], k[b, h, kv_idx])
      keep {text} else zero
      weigh softmax
      sum v[b, h, kv_idx]""")
    return p.keep.predicate

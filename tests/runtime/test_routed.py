"""Attention with a route, by rows that are taken together: every program of tests/programs.py, and the edges of a route."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from attncompiler.codegen import portable
from attncompiler.codegen.lowerable import parse_lowerable
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir import Attention, parse, verify
from attncompiler.ir.text import to_line, to_text
from attncompiler.passes.compact_rows import compact_rows, without_route
from attncompiler.runtime import lowering as chosen
from attncompiler.runtime import prepared, routed, row_kernels, triton_launch
from attncompiler.runtime.rows import Rows, rows_of
from attncompiler.tuning.schedule import choose_schedule
from attncompiler.tuning.target import TARGETS, Target
from tests.programs import PROGRAMS, judge_on, operands, program

GATED = "gate[b, q_idx, h] where on[b, q_idx, h]"
ROUTES = {
    "gated": (GATED, ", gate: {dtype}[2, {m}, 4], on: bool[2, {m}, 4]"),
    "switched": ("1 where on[b, q_idx, h]", ", on: bool[2, {m}, 4]"),
    "a gain for each head": ("gate[h] where heads[h]", ", gate: f32[4], heads: bool[4]"),
}


@dataclass
class Lowered:
    """A lowering of programs with a route, with the signature of one without."""

    lowering: ModuleType
    saved: list[Tensor] = field(default_factory=list)

    def forward(self, p: Attention, made: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        o, lse, rcp, *self.saved = routed.forward(self.lowering, p, made, sizes, False)
        return o, lse, rcp

    def backward(self, p: Attention, made: Mapping[str, Tensor], sizes: Mapping[str, int], o: Tensor, lse: Tensor, rcp: Tensor,
                 *rest: Any) -> dict[str, Tensor]:  # fmt: skip
        return routed.backward(self.lowering, p, made, sizes, o, lse, rcp, *self.saved, *rest)


def routed_program(name: str, route: str, m: int, n: int, d: int, dv: int, dtype: str = "f32") -> Attention:
    gain, reads = ROUTES[route]
    text = to_text(program(name, m, n, d, dv, dtype))
    lines = [line + reads.format(m=m, dtype=dtype) if line.strip().startswith("read") else line for line in text.splitlines()]
    return verify(parse("\n".join([*lines, f"  route {gain}"])))


def judge(lowering: ModuleType, p: Attention, device: str = "cpu", strided: bool = False) -> None:
    judge_on(Lowered(lowering), p, operands(p, device, strided))  # type: ignore[arg-type]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program(name: str, route: str) -> None:
    judge(portable, routed_program(name, route, 48, 33, 16, 24))


@pytest.mark.parametrize("name", ["window", "empty rows give 0", "pair bias and slopes", "dropout"])
def test_long_sequences(name: str) -> None:
    judge(portable, routed_program(name, "gated", 600, 700, 16, 24), strided=True)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["window", "empty rows give 0", "dropout", "a term of each query"])
def test_kernels(name: str) -> None:
    judge(triton_launch, routed_program(name, "gated", 150, 70, 16, 24))


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["plain", "documents", "pair bias and slopes", "bias of each key"])
def test_kernels_of_few_queries(name: str) -> None:
    judge(triton_launch, routed_program(name, "gated", 9, 33, 16, 24))


@pytest.mark.interpreted
@pytest.mark.parametrize(("name", "route"), [
    ("window", "a gain for each head"), ("empty rows are uniform", "gated"), ("pair bias and slopes", "switched"),
])  # fmt: skip
def test_kernels_with_anything_past_the_lists(name: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists as long as there are queries, and past the last tile of each NaN: as a GPU has it."""
    take, take_gradients = Rows.take, Rows.take_gradients

    def ended(rows: Rows, x: Tensor, fill: bool) -> Tensor:
        tiles = -(-rows.count // row_kernels.TILE)
        past = torch.arange(rows.length) >= tiles[..., None] * row_kernels.TILE
        return x if fill else x.masked_fill(past[..., None], torch.nan)

    def gradients(rows: Rows, *given: Any) -> tuple[Tensor, Tensor]:
        grad, lse = take_gradients(rows, *given)
        past = torch.arange(rows.length) >= rows.count[..., None]
        return ended(rows, grad, given[-1]), lse if given[-1] else lse.masked_fill(past, -torch.inf)

    monkeypatch.setattr(Rows, "take_vectors", lambda rows, x, fill: ended(rows, take(rows, x), fill))
    monkeypatch.setattr(Rows, "take_gradients", gradients)
    monkeypatch.setattr(Rows, "of", lambda lists, count: Rows(lists[0], count, lists[1], lists))
    judge(triton_launch, routed_program(name, route, 290, 33, 16, 24))


def test_a_list_does_not_lie_in_a_grid() -> None:
    """Boxes over places of a list would mix what is past its end into every tile."""
    text = to_text(routed_program("plain", "gated", 576, 576, 64, 64, "bf16"))
    keep = "      keep  (kv_idx % 24 < 8) & (kv_idx // 24 < 8) else zero"
    p = verify(parse(text.replace("  weigh", f"{keep}\n  weigh", 1)))
    call = routed.Routed(p, operands(p), {})
    with mock.patch.object(prepared, "target_of", lambda device: TARGETS["sm_90"]):
        whole, listed = (
            prepared.Prepared(program, given, sizes).schedule
            for program, given, sizes in (
                (without_route(p), call.given, {}),
                (call.compact.program, call.taken(call.operands()), call.sizes),
            )
        )
    assert whole.forward.tiles and whole.warp_roles and listed.warp_roles
    assert not (listed.forward.tiles or listed.backward_queries.tiles or listed.backward_keys.tiles)


ON_A_GPU = [(257, 300, 80, 48), (600, 700, 128, 128), (1, 129, 128, 128)]  # queries, keys, size of q and k, of v


def covering() -> list[tuple[tuple[int, int, int, int], str, str, str]]:
    """Sizes, programs, routes and dtypes for a GPU: every pair of these, and every program three times."""
    dtypes = "bf16", "f16", "f32"
    cases = [
        (ON_A_GPU[(at + place) % 3], name, route, dtypes[(at // 3 + place) % 3])
        for at, name in enumerate(PROGRAMS)
        for place, route in enumerate(ROUTES)
    ]
    # here the gradient of a gain is one number, in which eager happens to be off by much less than float16 rounds
    return [*cases, (ON_A_GPU[1], "softcap", "a gain for each head", "f16")]


def test_the_cases_for_a_gpu_cover_every_pair() -> None:
    for one, other in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        pairs = {(case[one], case[other]) for case in covering()}
        assert len(pairs) == len({pair[0] for pair in pairs}) * len({pair[1] for pair in pairs})
    assert len(covering()) <= 50


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "name", "route", "dtype"), covering(), ids=str)
def test_on_the_gpu(sizes: tuple[int, int, int, int], name: str, route: str, dtype: str) -> None:
    judge(chosen, routed_program(name, route, *sizes, dtype), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("d", [64, 128])
def test_inference_is_the_forward_of_training(d: int, route: str, heads_first: bool) -> None:
    """To the bit: what is kept for the backward changes nothing else. Memory is full of NaN before."""
    p = routed_program("window", route, 700, 700, d, d, "bf16")
    made = operands(p, "cuda")
    (o, lse, *_, summed, _, _), (again, lse_again, *_, kept, _, _) = (
        routed.forward(chosen, p, made, {}, heads_first, for_backward) for for_backward in (True, False)
    )
    assert o.stride() == again.stride() and torch.equal(o, again) and torch.equal(lse, lse_again)
    assert not kept.numel() and bool(summed.numel()) == ("gate" in made)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_has_a_kernel(name: str, route: str) -> None:
    assert not chosen.unsupported(routed_program(name, route, 48, 33, 16, 24, "bf16"))


READS = {
    "a bias by query in half precision": (" + bias[b, q_idx]", ", bias: {dtype}[2, {m}]"),
    "a table by position": (" + table[q_idx % 5] * q_idx", ", table: f32[5]"),
    "a list within a read": (" + listed[order[q_idx]]", ", order: i32[{m}], listed: f32[9]"),
    "one tensor in two ways": (" + twice[0, q_idx] - twice[b, 3]", ", twice: {dtype}[2, {m}]"),
    "pairs that heads share": (" + pairs[q_idx, kv_idx]", ", pairs: f32[{m}, {n}]"),
    "keys before queries": (" + turned[b, kv_idx, h, q_idx]", ", turned: f32[2, {n}, 4, {m}]"),
}


def with_reads(names: Iterable[str], m: int, n: int) -> Attention:
    """A routed program whose score has further terms."""
    lines = to_text(routed_program("window", "gated", m, n, 16, 16)).splitlines()
    terms, reads = ("".join(READS[name][place].format(m=m, n=n, dtype="f16") for name in names) for place in (0, 1))
    added = {"read": reads, "score": terms}
    return verify(parse("\n".join(line + added.get(line.split()[0], "") for line in lines)))


@pytest.mark.parametrize("reads", READS)
def test_what_a_score_reads_of_a_query(reads: str) -> None:
    judge(portable, with_reads([reads], 40, 33))


@pytest.mark.interpreted
def test_kernels_read_all_of_it() -> None:
    judge(triton_launch, with_reads(READS, 20, 33))


@pytest.mark.parametrize("kept", [0.0, 1.0], ids=["all off", "all on"])
def test_ends(kept: float) -> None:
    p = routed_program("window", "gated", 40, 50, 16, 16)
    made = operands(p)
    made["on"] = torch.full_like(made["on"], bool(kept))
    judge_on(Lowered(portable), p, made)  # type: ignore[arg-type]


def test_what_is_off_is_not_read() -> None:
    """NaN in rows and gains of heads that are off reaches nothing."""
    p = routed_program("window", "gated", 300, 300, 16, 16)
    made = operands(p)
    made["on"][0, :, 1] = False  # a head that no query uses, and below a query that uses no head
    made["on"][1, 7] = False
    on = made["on"].transpose(1, 2)
    made["q"][~on], made["gate"][~made["on"]] = torch.nan, torch.nan
    saved = routed.forward(portable, p, made, {}, True)
    o, lse = saved[:2]
    grads = routed.backward(portable, p, made, {}, *saved, torch.ones_like(o), None, frozenset(p.differentiable))
    assert (o[~on] == 0).all() and (lse[~on] == -torch.inf).all() and o.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["q"][~on] == 0).all() and (grads["gate"][~made["on"]] == 0).all()


def test_a_gain_that_is_computed_is_refused() -> None:
    p = routed_program("plain", "gated", 5, 5, 16, 16)
    text = to_text(p).replace("route   gate[b, q_idx, h]", "route   gate[b, q_idx, h] * 2.0")
    with pytest.raises(UnsupportedProgram, match="gain"):
        parse_lowerable(to_line(verify(parse(text))))


def test_the_compact_program() -> None:
    p = compact_rows(routed_program("window", "gated", 5, 6, 16, 8), True).program
    assert (
        to_text(verify(p))
        == """attention
  axes    b=2, h=4, q_idx=rows_length, kv_idx=6
  read    k: f32[2, 2, 6, 16], v: f32[2, 2, 6, 8], q_rows: f32[2, 4, rows_length, 16], \
rows: ascending(i32[2, 4, rows_length]), rows_count: i32[2, 4]
  score   dot(q_rows[b, h, q_idx], k[b, h // 2, kv_idx]) * 0.25
  keep    (q_idx < rows_count[b, h]) & ((kv_idx <= rows[b, h, q_idx]) & (rows[b, h, q_idx] - kv_idx < 7)) else unread
  weigh   softmax
  sum     v[b, h // 2, kv_idx]
"""
    )


def test_rows() -> None:
    active = torch.tensor([[[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]]).bool()
    rows = rows_of(active)
    assert rows.index.tolist() == [[[1, 2, 4], [0, 0, 0]]] and rows.count.tolist() == [[3, 0]]
    assert rows.place.tolist() == [[[-1, 0, 1, -1, 2], [-1] * 5]]
    x = torch.arange(1.0, 11).view(1, 2, 5)
    assert rows.take(x).tolist() == [[[2, 3, 5], [0, 0, 0]]]
    assert torch.equal(rows.put(rows.take(x)), x * active)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nan_if_empty", [False, True])
def test_the_kernels_that_move_rows(nan_if_empty: bool, dtype: torch.dtype) -> None:
    """Against torch, with strides, more rows than a program moves, and lists that end anywhere."""
    active = torch.rand(2, 150, 3).transpose(1, 2) > 0.4
    active[0, 1] = False
    rows, (lists, count) = rows_of(active), row_kernels.list_rows(active)
    longest, (index, place) = rows.length, lists
    assert torch.equal(index[..., :longest], rows.index) and torch.equal(count, rows.count) and torch.equal(lists, rows.lists)
    x, gain = torch.randn(2, 150, 3, 48, dtype=dtype).transpose(1, 2)[..., ::2], torch.randn(2, 150, 3, dtype=dtype).transpose(1, 2)
    lse, summed = torch.randn(2, 3, 150, dtype=dtype), torch.randn(2, 3, 150, 24, dtype=dtype)
    along, by_kernel = (torch.zeros(2, 150, 3, dtype=torch.float32).transpose(1, 2) for _ in range(2))
    expected = rows.take_gradients(x, lse, gain, summed[:, :, :longest], along, True)
    found = row_kernels.take_rows(x, index, count, gain, summed, by_kernel, lse)
    torch.testing.assert_close((found[0][:, :, :longest], found[1][..., :longest], by_kernel), (*expected, along))  # type: ignore[index]
    assert not found[0][:, :, longest:].any()
    taken, lse_rows = rows.take(x), rows.take(lse).masked_fill(rows.index % 5 == 0, -torch.inf)
    for heads_first in (True, False):
        put = rows.put_vectors(taken, lse_rows, gain, nan_if_empty, heads_first)
        padded = torch.nn.functional.pad(taken, (0, 0, 0, 150 - longest)), torch.nn.functional.pad(lse_rows, (0, 150 - longest))
        ours = row_kernels.put_rows(padded[0], place, gain, padded[1], nan_if_empty, heads_first)
        torch.testing.assert_close(ours, put, equal_nan=True)
        assert ours[0].stride() == put[0].stride()
    into = torch.full((2, 150, 3, 24), torch.nan, dtype=dtype).transpose(1, 2)
    row_kernels.put_rows_into(into, padded[0], place)
    torch.testing.assert_close(into, rows.put(taken))


@pytest.mark.interpreted
@pytest.mark.parametrize(("m", "d"), [(150, 24), (300, 128)])
def test_lists_come_with_what_queries_in_none_give(m: int, d: int) -> None:
    active = torch.rand(2, m, 3).transpose(1, 2) > 0.4
    active[0, 1], active[1, 2] = False, True
    o, lse = torch.full((2, m, 3, d), 7.0, dtype=torch.bfloat16).transpose(1, 2), torch.full((2, 3, m), 7.0)
    expected = row_kernels.list_rows(active)
    assert all(torch.equal(x, y) for x, y in zip(row_kernels.list_rows(active, (o, lse)), expected, strict=True))
    assert torch.equal(o, (active * 7.0).to(o.dtype)[..., None].expand(o.shape))
    assert torch.equal(lse, torch.where(active, 7.0, -torch.inf))


@pytest.mark.interpreted
def test_rows_past_the_end_are_left_but_for_a_tile() -> None:
    """Where nothing reads them; the values of what is left are whatever the memory held."""
    active = torch.arange(700).expand(1, 2, 700) < torch.tensor([[[0], [257]]])
    lists, count = row_kernels.list_rows(active)
    x = torch.randn(1, 2, 700, 16)
    taken, _ = row_kernels.take_rows(x, lists[0], count, fill=False)
    assert taken[0, 0].isnan().all()  # memory of tests is full of NaN
    assert torch.equal(taken[0, 1, :257], x[0, 1, :257]) and not taken[0, 1, 257:512].any() and taken[0, 1, 512:].isnan().all()


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_no_kernel_reads_more_rows_at_once_than_are_filled(target: Target) -> None:
    for d, dtype in ((16, "bf16"), (128, "bf16"), (256, "f16"), (128, "f32")):
        compact = chosen.in_kernels(routed_program("window", "gated", 600, 700, d, d, dtype))
        schedule = choose_schedule(compact, target, target.descriptors)
        assert all(row_kernels.TILE % schedule.of(k).block_m == 0 for k in ("forward", "backward_queries", "backward_keys"))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_op(compiled: bool) -> None:
    p = routed_program("window", "gated", 70, 80, 16, 24, "f64")
    made = operands(p)
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in made.values()]

    line = to_line(p)

    def attend(*given: Tensor) -> Tensor:
        o: Tensor = torch.ops.attncompiler.attention(given, [], line)[0]
        return o

    o = torch.compile(attend, fullgraph=True)(*leaves) if compiled else attend(*leaves)
    o.square().sum().backward()
    lowered = Lowered(portable)
    expected = lowered.forward(p, made, {})
    grads = lowered.backward(p, made, {}, *expected, 2 * expected[0], None, frozenset(p.differentiable))
    torch.testing.assert_close(o, expected[0])
    for (name, _), leaf in zip(made.items(), leaves, strict=True):
        if name in grads:
            torch.testing.assert_close(leaf.grad, grads[name])

"""Attention over listed keys: the kernels that copy rows, and programs with a list for all queries or for each."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

import attncompiler.runtime.selection  # noqa: F401  registers the ops
from attncompiler.ir import Attention, parse, verify
from attncompiler.ir.text import to_text
from attncompiler.runtime import gathered as gathering
from attncompiler.runtime import key_kernels, lowering, triton_launch
from attncompiler.runtime.gathered import gathered
from tests.programs import DTYPES, judge_on

DEVICES = [pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]


def listed(m: int, n: int, w: int, d: int, dtype: str, per_row: bool, group: int = 2, empty: str = "zero") -> Attention:
    """Two batches, four heads; a list [B, Hkv, w] that ends in -1 where it has no more; causal, the queries being the last positions."""
    heads, last = 4 // group, n - m
    key = f"picked[b, h // {group}, kv_idx]" if group > 1 else "picked[b, h, kv_idx]"
    reads = ", ".join([
        f"q: {dtype}[2, 4, {m}, {d}], k: {dtype}[2, {heads}, {n}, {d}], v: {dtype}[2, {heads}, {n}, {d}]",
        f"bias: f32[2, {n}, {heads}], picked: i32[2, {heads}, {w}]", *[f"until: i32[2, {heads}, {w}]"] * per_row,
    ])  # fmt: skip
    head = f"h // {group}" if group > 1 else "h"
    until = f" & (q_idx < until[b, {head}, kv_idx])" if per_row else ""
    return verify(
        parse(f"""attention
      axes  b=2, h=4, q_idx={m}, kv_idx={w}
      read  {reads}
      score dot(q[b, h, q_idx], k[b, {head}, {key}]) * 0.25 + bias[b, {key}, {head}]
      keep  ({key} >= 0) & ({key} <= q_idx + {last}){until} else {empty}
      weigh softmax
      sum   v[b, {head}, {key}]
    """)
    )


def made(p: Attention, m: int, n: int, w: int, per_row: bool, device: str) -> dict[str, Tensor]:
    """Random numbers, and lists: of w keys in all, or of the w keys of largest rank that each query sees; one key in four is dropped."""
    found = {}
    for decl in p.tensors:
        shape = [int(size.value) for size in decl.shape]  # type: ignore[attr-defined]
        found[decl.name] = torch.randn(shape).to(DTYPES[decl.dtype.value])
    rank, places = torch.randn(2, found["k"].shape[1], n), found["picked"].shape[-1]
    if per_row:
        numbers = (w, n - m, m, -0.7, False, False, places)
        found["picked"], found["until"] = torch.ops.attncompiler.prefix_top_k(rank, -1, *numbers)
    else:
        found["picked"] = torch.ops.attncompiler.ascending(rank.topk(places).indices, torch.rand(rank.shape)[..., :places] > 0.25)
    return {name: tensor.to(device) for name, tensor in found.items()}


def judge(p: Attention, operands: dict[str, Tensor], device: str) -> None:
    """On a GPU as it runs there, and here by the same kernels."""
    if device == "cuda":
        judge_on(lowering, p, operands)
    else:
        kernels = mock.patch.object(gathering, "_has_kernels", lambda tensor: True)
        with kernels, mock.patch.object(lowering, "_lowering", lambda *_: triton_launch):
            judge_on(lowering, p, operands)


SHARED = [(70, 70, 20, 16), (33, 40, 40, 48), (1, 130, 17, 64), (45, 45, 33, 32)]  # queries, keys, kept keys, channels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("m", "n", "w", "d"), SHARED)
def test_one_list_for_all_queries(m: int, n: int, w: int, d: int, device: str) -> None:
    p = listed(m, n, w, d, "f32", False)
    judge(p, made(p, m, n, w, False, device), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("m", "n", "w", "d"), [(45, 45, 11, 16), (33, 60, 20, 32)])
def test_a_list_with_the_queries_that_keep_each_key(m: int, n: int, w: int, d: int, device: str) -> None:
    p = listed(m, n, min(n, w + m - 1), d, "f32", True)
    judge(p, made(p, m, n, w, True, device), device)


@pytest.mark.gpu
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("dtype", "m", "n", "w", "d", "group"),
    [("bf16", 700, 700, 300, 128, 2), ("f16", 257, 513, 130, 64, 1), ("bf16", 130, 300, 60, 80, 4)],
)
def test_in_half_precision(dtype: str, m: int, n: int, w: int, d: int, group: int, per_row: bool) -> None:
    p = listed(m, n, min(n, w + m - 1) if per_row else w, d, dtype, per_row, group)
    judge(p, made(p, m, n, w, per_row, "cuda"), "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("empty", ["zero", "nan"])
def test_nothing_is_kept(empty: str, device: str) -> None:
    """A list of no keys, and one of the last key alone, which only the last query sees."""
    p = listed(70, 70, 20, 16, "f32", False, empty=empty)
    operands = made(p, 70, 70, 20, False, device)
    operands["picked"].fill_(-1)[0, 1, 0] = 69
    judge(p, operands, device)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each head with a copy of its own, as for many queries."""
    monkeypatch.setattr(gathering, "_MANY_QUERIES", 1)
    gathered.cache_clear()
    yield
    gathered.cache_clear()


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("device", DEVICES)
def test_heads_with_copies_of_their_own(device: str) -> None:
    p = listed(45, 45, 20, 16, "f32", False)
    assert [(copy.name, copy.group, copy.shared) for copy in gathered(p).gathers] == [
        ("k_kept", 1, 2), ("bias_kept", 2, 1), ("v_kept", 1, 2),
    ]  # fmt: skip
    operands = made(p, 45, 45, 20, False, device)
    judge(p, operands, device)
    judge_on(lowering, p, operands)


@pytest.mark.gpu
@pytest.mark.parametrize("one_bias", [False, True])
def test_no_call_waits_for_the_device(one_bias: bool) -> None:
    """Selection, copies, kernels and gradients: nothing that a CUDA graph could not hold. A bias that batches share is copied and
    summed in torch."""
    m = n = 700
    p = listed(m, n, 200, 128, "bf16", False)
    if one_bias:
        p = verify(parse(to_text(p).replace("bias: f32[2,", "bias: f32[1,").replace("bias[b,", "bias[0,")))
    operands = made(p, m, n, 200, False, "cuda")
    rank, grad = torch.randn(2, 2, n, device="cuda"), torch.randn(2, 4, m, 128, device="cuda", dtype=torch.bfloat16)

    def both() -> Tensor:
        operands["picked"] = torch.ops.attncompiler.ascending(rank.topk(200).indices, rank.topk(200).values > -0.5)
        found = lowering.forward(p, operands, {})
        gradients = lowering.backward(p, operands, {}, *found, grad, None, frozenset(p.differentiable))
        torch.ops.attncompiler.prefix_top_k(rank, -1, 200, 0, m, 0.0, False, True, n)
        return gradients["k"]

    expected = both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = both()
    graph.replay()
    assert torch.equal(held, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_by_list(dtype: torch.dtype, guarded: bool, device: str) -> None:
    """Against torch: strides, heads that share lists or rows, keys named twice, out of order and out of range."""
    b, g, n, d, w = 2, 4, 90, 24, 130
    keys = torch.randint(-2, n + 5, (b, 2, w), dtype=torch.int32)
    keys[0, 0, 3:70] = 5
    x = torch.randn(b, n, 2, 2 * d, dtype=dtype).transpose(1, 2)[..., ::2]
    named = keys.repeat_interleave(2, 1)
    grad = torch.randn(b, g, w, d, dtype=dtype).masked_fill((named < 0)[..., None] & guarded, 0)
    index = named.clamp(0, n - 1).long()[..., None].expand(-1, -1, -1, d)
    left_out = (named < 0)[..., None] & guarded
    expected = x.repeat_interleave(2, 1).gather(2, index).masked_fill(left_out, 0)
    sums = torch.zeros(b, g, n, d, dtype=torch.float64).scatter_add(2, index, grad.double())
    taken = key_kernels.take_keys(x.to(device), keys.to(device), (b, g, w), guarded)
    assert torch.equal(taken.cpu(), expected)
    out = torch.zeros(b, n, g, d, dtype=dtype, device=device).transpose(1, 2)
    key_kernels.put_keys(out, grad.to(device), keys.to(device), guarded)
    torch.testing.assert_close(out.cpu(), sums.to(dtype))


def test_what_is_copied() -> None:
    lists = gathered(listed(5, 6, 3, 16, "f32", False))
    assert [(copy.name, copy.group, copy.guarded) for copy in lists.gathers] == [
        ("k_kept", 2, True), ("bias_kept", 2, True), ("v_kept", 2, True),
    ]  # fmt: skip
    text = to_text(listed(5, 6, 3, 16, "f32", False)).replace("(picked[b, h // 2, kv_idx] >= 0) & ", "")
    assert not any(copy.guarded for copy in gathered(verify(parse(text))).gathers)  # a list may end in any key then

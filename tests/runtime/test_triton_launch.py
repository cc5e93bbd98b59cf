"""The kernels against float64: in Triton's interpreter in CI, on the device with `-m gpu`."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from attncompiler.codegen import portable
from attncompiler.ir import parse, verify
from attncompiler.ir.text import to_text
from attncompiler.runtime import triton_launch
from tests.programs import PROGRAMS, SIZES, judge, judge_on, operands, program


@pytest.fixture
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16 in the interpreter, which else multiplies the integers that it keeps these numbers in."""
    plain: Any = InterpreterBuilder.create_dot

    def widened(x: TensorHandle) -> TensorHandle:
        if x.data.dtype != np.uint16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        return plain(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_and_gradients(name: str, sizes: tuple[int, int, int, int]) -> None:
    judge(triton_launch, program(name, *sizes))


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["sinks", "pair bias and slopes"])
def test_gradients_of_one_operand_alone(name: str) -> None:
    """Each asks for other kernels; those of extra scores are made of delta, without any."""
    p = program(name, 33, 70, 80, 48)
    made = operands(p)
    given = triton_launch.forward(p, made, {})
    grad = torch.randn_like(given[0])
    for wanted in p.differentiable:
        (found, expected) = (
            lowering.backward(p, made, {}, *given, grad, None, frozenset({wanted}))[wanted]
            for lowering in (triton_launch, portable)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreted
def test_no_queries_have_no_gradients() -> None:
    p = program("window", 0, 70, 80, 48)
    made = operands(p)
    o, lse, rcp = triton_launch.forward(p, made, {})
    found = triton_launch.backward(p, made, {}, o, lse, rcp, o, None, frozenset("qkv"))
    assert all(not found[name].any() and found[name].shape == made[name].shape for name in "qkv")


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", ["f32", "f16"])  # the interpreter multiplies bfloat16 as the integers that it keeps them in
def test_strided_operands(dtype: str) -> None:
    judge(triton_launch, program("window", 33, 70, 80, 48, dtype), strided=True)


@pytest.mark.interpreted
def test_a_table_without_the_memory_for_a_buffer(caplog: pytest.LogCaptureFixture) -> None:
    with mock.patch.object(triton_launch, "room", lambda device: 0.0):
        judge(triton_launch, program("relative positions", 33, 70, 80, 48))
    assert "gradients of table are summed without a kernel" in caplog.text


@pytest.mark.interpreted
@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize(
    ("name", "m", "dtype"),
    [
        ("window", 16, "f32"), ("empty rows give 0", 5, "f32"), ("pair bias and slopes", 1, "f32"), ("dropout", 1, "f32"),
        ("a term of each query", 5, "f32"), ("sinks", 1, "bf16"), ("empty rows are uniform", 5, "bf16"), ("dropout", 16, "bf16"),
    ],
)  # fmt: skip
def test_few_queries(name: str, m: int, dtype: str) -> None:
    judge(triton_launch, program(name, m, 129, 128, 48, dtype))


@pytest.mark.interpreted
def test_few_queries_of_vectors_of_two_dtypes() -> None:
    text = str(to_text(program("sinks", 5, 129, 80, 48, "f16"))).replace("q: f16", "q: f32")
    judge(triton_launch, verify(parse(text)))


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("dropped", [False, True])
def test_score_gradients_of_a_row_sum_to_zero(dropped: bool, dtype: str, device: str) -> None:
    """What is added to every score of a row changes nothing. delta read off an O that was rounded to bfloat16 leaves its error."""
    seed = ", seed: i64[1]" if dropped else ""
    p = verify(
        parse(f"""attention
      axes b=2, h=4, q_idx=5, kv_idx=129
      read q: {dtype}[2, 4, 5, 128], k: {dtype}[2, 4, 129, 128], v: {dtype}[2, 4, 129, 128], shift: f32[2, 4, 5]{seed}
      score dot(q[b, h, q_idx], k[b, h, kv_idx]) * 0.25 + shift[b, h, q_idx]
      weigh softmax
      {"adjust where(uniform(seed[0]) >= 0.25, 1.3333333333333333, 0.0)" if dropped else ""}
      sum v[b, h, kv_idx]
    """)
    )
    made = operands(p, device)
    o, lse, rcp = triton_launch.forward(p, made, {})
    grad_o = torch.randn(o.shape).to(o)
    found = triton_launch.backward(p, made, {}, o, lse, rcp, grad_o, None, frozenset(["shift"]))["shift"]
    largest = grad_o.norm(dim=-1).float().max() * made["v"].float().norm(dim=-1).max()  # what a dP may be
    assert found.abs().max() < torch.finfo(torch.float32).eps * largest


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_scores_of_one_key_have_no_gradient(dtype: str, device: str) -> None:
    """A weight of 1 that is rounded would leave its rounding times dP, where eager code has 0."""
    p = verify(
        parse(f"""attention
      axes b=2, h=4, q_idx=3, kv_idx=129
      read q: {dtype}[2, 4, 3, 128], k: {dtype}[2, 4, 129, 128], v: {dtype}[2, 4, 129, 128]
      score dot(q[b, h, q_idx], k[b, h, kv_idx]) * 0.25
      keep kv_idx == q_idx * 50 + 7 else zero
      weigh softmax
      sum v[b, h, kv_idx]
    """)
    )
    made = operands(p, device)
    o, lse, rcp = triton_launch.forward(p, made, {})
    grad_o = torch.randn(o.shape).to(o)
    wanted = ["q", "k"] if device == "cuda" else ["q"]  # numpy sums the products of transposed tiles in another order
    found = triton_launch.backward(p, made, {}, o, lse, rcp, grad_o, None, frozenset(wanted))
    assert all(found[name].count_nonzero() == 0 for name in wanted)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_constant_masks(dtype: str, device: str) -> None:
    """Their plan is kept, and never taken for that of another mask of the same program."""
    p = verify(
        parse(f"""attention
      axes b=1, h=2, q_idx=130, kv_idx=200
      read q: {dtype}[1, 2, 130, 64], k: {dtype}[1, 2, 200, 64], v: {dtype}[1, 2, 200, 64], mask: const(bool[130, 200])
      score dot(q[b, h, q_idx], k[b, h, kv_idx]) * 0.25
      keep mask[q_idx, kv_idx] else zero
      weigh softmax
      sum v[b, h, kv_idx]
    """)
    )
    made = operands(p, device)
    query, key = torch.arange(130, device=device)[:, None], torch.arange(200, device=device)
    for mask in (query // 64 == key // 64, query // 64 != key // 64, query // 64 == key // 64):
        judge_on(triton_launch, p, made | {"mask": mask & made["mask"]})


@pytest.mark.gpu
def test_a_captured_graph_plans_anew() -> None:
    """The plan of documents is part of what a CUDA graph replays: nothing of it is made on the host."""
    p = verify(
        parse("""attention
      axes b=1, h=4, q_idx=1000, kv_idx=1000
      read q: bf16[1, 4, 1000, 64], k: bf16[1, 4, 1000, 64], v: bf16[1, 4, 1000, 64], doc: i32[1000]
      score dot(q[b, h, q_idx], k[b, h, kv_idx]) * 0.125
      keep (kv_idx <= q_idx) & (doc[q_idx] == doc[kv_idx]) else nan
      weigh softmax
      sum v[b, h, kv_idx]
    """)
    )
    made = operands(p, "cuda")
    grads = torch.randn(1, 4, 1000, 64, device="cuda", dtype=torch.bfloat16), torch.zeros(1, 4, 1000, device="cuda")

    def run() -> list[Tensor]:
        o, lse, rcp = triton_launch.forward(p, made, {})
        return [o, *triton_launch.backward(p, made, {}, o, lse, rcp, *grads, frozenset("qkv")).values()]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for length in (1000, 130, 7):
        made["doc"].copy_(torch.arange(1000, device="cuda") // length)
        graph.replay()
        for ours, expected in zip(captured, run(), strict=True):
            assert torch.equal(ours, expected)


LARGE = ((257, 300, 80, 48), (257, 300, 64, 64), (130, 200, 128, 128), (1, 129, 128, 128))


def _covering() -> list[tuple[tuple[int, int, int, int], str, bool, str]]:
    """Every program in every type, dense and strided; the sizes rotate."""
    return [
        (LARGE[(place + of_type + 2 * strided) % len(LARGE)], name, strided, dtype)
        for place, name in enumerate(PROGRAMS)
        for of_type, dtype in enumerate(("f32", "bf16", "f16"))
        for strided in (False, True)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "name", "strided", "dtype"), _covering(), ids=str)
def test_on_the_gpu(sizes: tuple[int, int, int, int], name: str, strided: bool, dtype: str) -> None:
    judge(triton_launch, program(name, *sizes, dtype), "cuda", strided)

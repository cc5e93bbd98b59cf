"""Kernels whose tiles are boxes of a grid, against float64: in Triton's interpreter in CI, on the device with `-m gpu`."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from attncompiler import masks
from attncompiler.dsl.attention import declare
from attncompiler.ir import Attention
from attncompiler.masks import Mask
from attncompiler.runtime import prepared, scheduling, triton_launch
from attncompiler.tuning.schedule import KernelSchedule, Schedule
from tests.programs import judge, judge_on

SMALL = {
    "2-D, sides that tiles do not divide": (masks.grid((7, 13), 5), 91),
    "stride and dilation": (masks.grid((12, 20), (3, 5), stride=(2, 3), dilation=(2, 3)), 240),
    "3-D, causal along one axis": (masks.grid((4, 6, 10), (2, 3, 3), causal=(True, False, False)), 240),
    "disc": (masks.disc((10, 18), 4), 180),
    "and tokens in a row": (masks.grid((9, 16), 5) & masks.causal(), 144),
}
LARGE = {
    "na2d": (masks.grid((24, 40), 7), 960),
    "na2d with stride": (masks.grid((32, 32), (16, 8), stride=(8, 8)), 1024),
    "na2d dilated": (masks.grid((24, 40), (5, 7), dilation=(2, 3)), 960),
    "na3d": (masks.grid((6, 10, 14), (3, 5, 7)), 840),
    "na3d causal": (masks.grid((6, 10, 14), (3, 5, 7), causal=(True, False, True)), 840),
    "halo": (masks.halo((24, 40), 5, 2), 960),
    "disc": (masks.disc((24, 40), 6), 960),
    "grid and causal": (masks.grid((24, 40), 7) & masks.causal(), 960),
}


def _program(mask: Mask, tokens: int, d: int, dtype: torch.dtype) -> Attention:
    q, k = (torch.zeros(2, heads, tokens, d, dtype=dtype) for heads in (4, 2))
    return declare(q, k, k, keep=mask, enable_gqa=True).program


@pytest.mark.interpreted
@pytest.mark.parametrize("name", SMALL)
def test_boxes(name: str) -> None:
    mask, tokens = SMALL[name]
    q, k = (torch.randn(1, heads, tokens, 16) for heads in (2, 1))
    program = declare(q, k, k, keep=mask, enable_gqa=True).program
    small = KernelSchedule(16, 16, 4, 1)
    with mock.patch.object(scheduling, "choose_schedule", lambda *_, **__: Schedule(small, small, small, False, "ieee")):
        made = {"q": q, "k": k, "v": k.flip(2)}
        assert prepared.prepare(program, made, {}).schedule.forward.tiles, "tiles should be boxes"
        judge_on(triton_launch, program, made)


@pytest.mark.gpu
@pytest.mark.parametrize("of_type", range(3))
@pytest.mark.parametrize("name", LARGE)
def test_boxes_on_the_gpu(name: str, of_type: int) -> None:
    """Every mask in every type; the channels rotate."""
    dtype = (torch.bfloat16, torch.float16, torch.float32)[of_type]
    d = (64, 80, 128)[(of_type + list(LARGE).index(name)) % 3]
    judge(triton_launch, _program(*LARGE[name], d, dtype), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens_first", [False, True])
def test_one_batch_in_three_axes(tokens_first: bool) -> None:
    """With a single batch, descriptors show all three axes of tokens."""
    mask, tokens = masks.grid((6, 10, 16), (3, 5, 7)), 960
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    if tokens_first:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    program = declare(q, k, v, keep=mask).program
    made = dict(zip("qkv", (q, k, v), strict=True))
    assert prepared.prepare(program, made, {}).schedule.warp_roles
    o, lse, rcp = triton_launch.forward(program, made, {})
    grad_o = torch.randn_like(o)
    found = triton_launch.backward(program, made, {}, o, lse, rcp, grad_o, None, frozenset("qkv"))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    kept = mask.dense(1, 1, tokens, tokens).cuda()
    exact = ((leaves[0] @ leaves[1].mT * 64**-0.5).masked_fill(~kept, float("-inf"))).softmax(-1) @ leaves[2]
    exact_grads = torch.autograd.grad((exact * grad_o.double()).sum(), leaves)
    for ours, theirs in ((o, exact), *((found[name], grad) for name, grad in zip("qkv", exact_grads, strict=True))):
        assert (ours.double() - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128])
def test_operands_with_tokens_before_heads(d: int) -> None:
    """`einsum("bnhd,bmhd->bhnm")` reads q[b, q_idx, h]: descriptors must follow the read, not the operand's own order."""
    from attncompiler.ir import parse, verify

    b, n, h = 2, 256, 4
    shape = f"bf16[{b}, {n}, {h}, {d}]"
    program = verify(
        parse(f"""attention
          axes    b={b}, h={h}, q_idx={n}, kv_idx={n}
          read    q: {shape}, k: {shape}, v: {shape}
          score   dot(q[b, q_idx, h], k[b, kv_idx, h]) * 0.125
          keep    kv_idx <= q_idx else nan
          weigh   softmax
          sum     v[b, kv_idx, h]
        """)
    )
    torch.manual_seed(0)
    made = {name: torch.randn(b, n, h, d, device="cuda", dtype=torch.bfloat16) for name in "qkv"}
    o, lse, rcp = triton_launch.forward(program, made, {})
    grad_o = torch.randn_like(o)
    found = triton_launch.backward(program, made, {}, o, lse, rcp, grad_o, None, frozenset("qkv"))
    leaves = {name: x.double().requires_grad_() for name, x in made.items()}
    q, k, v = (x.transpose(1, 2) for x in leaves.values())
    causal = torch.ones(n, n, dtype=torch.bool, device="cuda").tril()
    exact = (q @ k.mT * 0.125).masked_fill(~causal, float("-inf")).softmax(-1) @ v
    grads = torch.autograd.grad((exact * grad_o.double()).sum(), list(leaves.values()))
    for ours, theirs in ((o, exact), *zip((found[name] for name in "qkv"), grads, strict=True)):
        assert (ours.double() - theirs).norm() < 1e-2 * theirs.norm()

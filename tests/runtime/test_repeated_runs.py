"""Runs that fill the device give the same bits: what one warp still reads while another writes shows in a row of a hundred thousand."""

import pytest
import torch

from attncompiler import masks
from attncompiler.dsl.attention import declare
from attncompiler.masks import Mask
from attncompiler.runtime import triton_launch

TOKENS = 16384
MASKS = {
    "causal": lambda: masks.causal(),
    "window": lambda: masks.causal() & masks.window(300, 0),
    "documents": lambda: masks.causal() & masks.document((torch.arange(TOKENS) // 700).to(torch.int32).cuda()),
    "stripes": lambda: masks.strided(64, 16, 16, heads=8),
    "disc": lambda: masks.disc((128, 128), 16),
    "grid": lambda: masks.grid((128, 128), 17),
    "short rows": lambda: masks.window(20, 20),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_the_same_bits_each_time(name: str, d: int, kv_heads: int) -> None:
    mask: Mask = MASKS[name]()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, TOKENS, d, device="cuda", dtype=torch.bfloat16) for heads in (8, kv_heads, kv_heads))
    declared = declare(q, k, v, keep=mask, enable_gqa=kv_heads < 8)
    program = declared.program
    made = dict(zip((tensor.name for tensor in program.tensors), (q, k, v, *declared.captured), strict=True))
    o, lse, rcp = triton_launch.forward(program, made, {})
    grad_o = torch.randn_like(o)
    grads = triton_launch.backward(program, made, {}, o, lse, rcp, grad_o, None, frozenset("qkv"))
    for _ in range(40):
        again, lse_again, _ = triton_launch.forward(program, made, {})
        assert torch.equal(again, o) and torch.equal(lse_again, lse)
        found = triton_launch.backward(program, made, {}, o, lse, rcp, grad_o, None, frozenset("qkv"))
        different = [name for name in grads if not torch.equal(found[name], grads[name])]
        assert not different, different

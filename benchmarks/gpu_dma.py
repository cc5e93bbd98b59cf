"""Dynamic mask attention on a GPU: attention to the 1024 keys of largest bias, beside cuDNN's dense causal attention.

    python benchmarks/gpu_dma.py [--kv-heads 4] [--no-rows]

B1, 16 heads of queries, D128, bf16, causal. Selection is part of the forward; gradients of q, k, v and the bias. O and all gradients of
one head of keys are checked against float32 first. Medians of `triton.testing.do_bench`. `over`: the dense time over ours. Goals at
32768 tokens: 6 forward, 4 backward. The last line, for information: each query choosing among the keys that it sees.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attncompiler.zoo.dma import dma_attend, dma_attend_declared

HEADS, D, KEPT = 16, 128, 1024
Times = tuple[float, float]


def timed(f: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(statistics.median(do_bench(f, return_mode="median") for _ in range(3)))


def both(f: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Times:
    """Milliseconds forward, and backward."""
    o = f()
    backward = timed(lambda: torch.autograd.grad(o, leaves, grad, retain_graph=True))
    with torch.no_grad():
        return timed(f), backward


def operands(n: int, kv_heads: int, bias_dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the bias, and the gradient of the output."""
    torch.manual_seed(0)
    shapes = (1, HEADS, n, D), (1, kv_heads, n, D), (1, kv_heads, n, D)
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    bias = torch.randn(1, kv_heads, n, device="cuda", dtype=bias_dtype).requires_grad_()
    return [*leaves, bias], torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)


def check(form: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor, per_row: bool) -> None:
    """O and the gradients of the last head of keys against float32, of the keys that some query may keep."""
    o = form(*leaves)
    found = torch.autograd.grad(o, leaves, grad)
    kv_heads, n = leaves[1].shape[1:3]
    group = HEADS // kv_heads
    rows = slice(HEADS - group, HEADS)
    i = torch.arange(n, device="cuda")[:, None]
    rank = leaves[3].detach()[0, -1]
    if per_row:
        chosen = rank.masked_fill(i < i.T, -torch.inf).topk(KEPT).indices
        kept = torch.zeros(n, n, dtype=torch.bool, device="cuda").scatter(1, chosen, True) & (i >= i.T)
        listed = kept.any(0).nonzero().squeeze(1)
        kept = kept[:, listed]
    else:
        listed = rank.topk(KEPT).indices
        kept = i >= listed
    q, k, v, bias = (x.detach()[0, rows if x is leaves[0] else -1].float().requires_grad_() for x in leaves)
    slopes = [torch.zeros_like(x) for x in (k, v, bias)]
    for head in range(group):  # one head of queries at a time: the scores are [n, listed]
        scores = (q[head] @ k[listed].T * D**-0.5 + bias[listed]).masked_fill(~kept, -torch.inf)
        exact = scores.softmax(-1).nan_to_num(0.0) @ v[listed]
        dq, *rest = torch.autograd.grad(exact, [q, k, v, bias], grad[0, HEADS - group + head].float())
        slopes = [total + one for total, one in zip(slopes, rest, strict=True)]
        close("o", o[0, HEADS - group + head], exact)
        close("dq", found[0][0, HEADS - group + head], dq[head])
    for name, ours, slope in zip(("dk", "dv", "dbias"), found[1:], slopes, strict=True):
        close(name, ours[0, -1], slope)


def close(name: str, ours: Tensor, exact: Tensor) -> None:
    gap = float((ours.detach().float() - exact.detach()).norm() / exact.detach().norm())
    assert gap < 2e-2, f"{name} is off by {gap:.1e}"


def dense(leaves: list[Tensor]) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(*leaves[:3], is_causal=True, enable_gqa=True)


def line(name: str, n: int, times: Times, peer: Times) -> None:
    ratios = [whole / part for whole, part in zip(peer, times, strict=True)]
    print(f"| {name} | {n} | {times[0]:.3f} | {ratios[0]:.2f} | {times[1]:.3f} | {ratios[1]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--no-rows", action="store_true")
    arguments = parser.parse_args()
    torch._functorch.config.donated_buffer = False  # a backward is run again and again
    start = time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, H{HEADS}/{arguments.kv_heads} D{D} bf16, {KEPT} keys kept")
    print("| form | tokens | fwd ms | over | bwd ms | over |\n|---|---|---|---|---|---|")
    for n in (32768, 8192):
        leaves, grad = operands(n, arguments.kv_heads, torch.bfloat16)
        peer = both(partial(dense, leaves), leaves[:3], grad)
        line("dense, cuDNN", n, peer, peer)
        forms = {"plain": dma_attend, "declared": dma_attend_declared} if n > 8192 else {"plain": dma_attend}
        for name, form in forms.items():
            compiled = torch.compile(partial(form, w=KEPT), backend="attncompiler", dynamic=False)
            check(compiled, leaves, grad, per_row=False)
            line(name, n, both(partial(compiled, *leaves), leaves, grad), peer)
    if not arguments.no_rows:
        leaves, grad = operands(n, arguments.kv_heads, torch.float32)  # without ties, of which the reference keeps others
        rows = partial(dma_attend_declared, w=KEPT, per_row=True)
        compiled = torch.compile(rows, backend="attncompiler", dynamic=False)
        check(compiled, leaves, grad, per_row=True)
        line("each query choosing", n, both(partial(compiled, *leaves), leaves, grad), peer)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()

"""MoH on a GPU: heads that are off for a query, beside the same attention with every head on.

    python benchmarks/gpu_moh.py [--n 8192] [--kernels]

Causal, 32 heads of queries and 8 of keys, D128, bf16. Checked against float32 on sampled rows first. `over share`: time / (share
of pairs of query and head that are on, times our own dense time). Medians of `triton.testing.do_bench`. `--kernels`: also the device
time of each kernel, from torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from gpu_session import kernel_times
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attncompiler.ir import parse, verify
from attncompiler.ir.text import to_line
from attncompiler.runtime import ops as _ops  # noqa: F401  registers the op

HEADS, KV_HEADS, D = 32, 8, 128


def text(n: int, route: bool) -> str:
    reads = f", gate: bf16[1, {n}, {HEADS}], on: bool[1, {n}, {HEADS}]" if route else ""
    found = f"""attention
      axes    b=1, h={HEADS}, q_idx={n}, kv_idx={n}
      read    q: bf16[1, {HEADS}, {n}, {D}], k: bf16[1, {KV_HEADS}, {n}, {D}], v: bf16[1, {KV_HEADS}, {n}, {D}]{reads}
      score   dot(q[b, h, q_idx], k[b, h // {HEADS // KV_HEADS}, kv_idx]) * {D**-0.5}
      keep    kv_idx <= q_idx else zero
      weigh   softmax
      sum     v[b, h // {HEADS // KV_HEADS}, kv_idx]
    """
    return found + ("  route gate[b, q_idx, h] where on[b, q_idx, h]\n" if route else "")


def timed(f: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(statistics.median(do_bench(f, return_mode="median") for _ in range(3)))


def both(f: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[float, float]:
    """Milliseconds forward, and backward."""
    o = f()
    backward = timed(lambda: torch.autograd.grad(o, leaves, grad, retain_graph=True))
    with torch.no_grad():
        return timed(f), backward


def check(o: Tensor, grads: list[Tensor], leaves: list[Tensor], on: Tensor, grad: Tensor) -> None:
    """O and dQ of sampled rows against float32."""
    q, k, v, gate = (x.detach().float() for x in leaves)
    n, head = q.shape[2], 5
    rows = torch.arange(n, device=q.device)[on[0, :, head]][:: max(n // 64, 1)]
    kept = torch.arange(n, device=q.device) <= rows[:, None]
    scores = (q[0, head, rows] @ k[0, head // 4].T * D**-0.5).masked_fill(~kept, float("-inf"))
    weights = scores.softmax(-1)
    summed, gain = weights @ v[0, head // 4], gate[0, rows, head, None]
    along = grad[0, head, rows].float() * gain
    slopes = weights * (along @ v[0, head // 4].T - (along * summed).sum(-1, keepdim=True))
    gain_grad = (grad[0, head, rows].float() * summed).sum(-1)
    for name, exact, ours in (
        ("o", summed * gain, o[0, head, rows]),
        ("dq", slopes @ k[0, head // 4] * D**-0.5, grads[0][0, head, rows]),
        ("dgate", gain_grad, grads[3][0, rows, head]),
    ):
        gap = float((ours.float() - exact).norm() / exact.norm())
        assert gap < 2e-2, f"{name} is off by {gap:.1e}"
    assert (o[0, head][~on[0, :, head]] == 0).all() and (grads[0][0, head][~on[0, :, head]] == 0).all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--kernels", action="store_true", help="also the time of each kernel")
    arguments = parser.parse_args()
    n = arguments.n
    torch.manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    q, k, v = made(1, HEADS, n, D), made(1, KV_HEADS, n, D), made(1, KV_HEADS, n, D)
    gate, grad = made(1, n, HEADS), torch.randn(1, HEADS, n, D, device="cuda", dtype=torch.bfloat16)
    lines = {route: to_line(verify(parse(text(n, route)))) for route in (False, True)}

    def ours(*operands: Tensor) -> Tensor:
        o: Tensor = torch.ops.attncompiler.attention(operands, [], lines[len(operands) > 3], True)[0]
        return o

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, N{n} H{HEADS}/{KV_HEADS} D{D} bf16 causal")
    dense = both(lambda: ours(q, k, v), [q, k, v], grad)
    if arguments.kernels:
        print(kernel_times({"both": lambda: torch.autograd.grad(ours(q, k, v), [q, k, v], grad)}))
    peer = both(cudnn, [q, k, v], grad)
    gated = both(lambda: cudnn() * gate.transpose(1, 2)[..., None], [q, k, v, gate], grad)
    print("| heads on | fwd ms | over share | bwd ms | over share |\n|---|---|---|---|---|")
    print(f"| all, no route | {dense[0]:.3f} | | {dense[1]:.3f} | |")
    print(f"| all, cuDNN | {peer[0]:.3f} | | {peer[1]:.3f} | |\n| all, cuDNN times a gate | {gated[0]:.3f} | | {gated[1]:.3f} | |")
    for shared, chosen in ((16, 8), (8, 8)):
        score = torch.rand(1, n, HEADS - shared, device="cuda")
        routed = torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(chosen, -1).indices, True)
        on = torch.cat([torch.ones(1, n, shared, dtype=torch.bool, device="cuda"), routed], -1)
        leaves = [q, k, v, gate]
        o = ours(*leaves, on)
        grads = list(torch.autograd.grad(o, leaves, grad))
        check(o, grads, leaves, on, grad)
        share = (shared + chosen) / HEADS
        times = both(lambda: ours(*leaves, on), leaves, grad)  # noqa: B023
        if arguments.kernels:
            print(kernel_times({"both": lambda: torch.autograd.grad(ours(*leaves, on), leaves, grad)}))  # noqa: B023
        ratios = [time / (share * whole) for time, whole in zip(times, dense, strict=True)]
        print(f"| {share:.0%} | {times[0]:.3f} | {ratios[0]:.2f} | {times[1]:.3f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()

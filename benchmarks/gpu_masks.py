"""Sparse masks on a GPU: ours beside FlexAttention and beside dense attention by cuDNN, in one process.

    python benchmarks/gpu_masks.py [--only na2d,flux] [--ours] [--kernels] [--out FILE.md]

Every case is first checked: some rows of O and dQ, and some rows of dK and dV, in float32 from the definition of the mask. TFLOP/s
count the kept pairs; a backward counts 2.5 forwards. Medians of `triton.testing.do_bench`, interleaved with the peers. `--kernels`: also
the device time of each kernel, from torch's profiler. What runs part by part (runtime/parted.py) has a line for the whole too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_session import kernel_times, milliseconds
from torch import Tensor

from attncompiler import masks
from attncompiler.dsl.attention import declare
from attncompiler.ir import Attention
from attncompiler.passes.tile_counts import TileCounts
from attncompiler.runtime import lowering, parted, prepared, triton_launch
from attncompiler.runtime.preview import preview
from attncompiler.tuning.speed_of_light import predicted_ms
from attncompiler.tuning.target import TARGETS


@dataclass(frozen=True)
class Case:
    """A mask over `tokens` tokens; `flex` says it as FlexAttention's mask_mod, "" where that peer is left out."""

    name: str
    mask: masks.Mask
    tokens: int
    heads: int
    flex: Callable[..., Tensor] | None
    dense_peer: bool  # beside dense attention by cuDNN
    backward: bool = True


def _na2d(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    low = [torch.clamp(at - 8, 0, 111) for at in (q // 128, q % 128)]
    return (k // 128 >= low[0]) & (k // 128 < low[0] + 17) & (k % 128 >= low[1]) & (k % 128 < low[1] + 17)


def _circle(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q // 128 - k // 128) ** 2 + (q % 128 - k % 128) ** 2 < 256


def _clear(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q < 512) | (k < 512) | _circle(b, h, q - 512, k - 512)


def _strided(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ((k // 64 > q // 64 - 16) | ((k // 64 + h) % 16 == 0))


def cases() -> list[Case]:
    """The cases of the field: 16384 tokens as 128 x 128, FLUX at 4K, HunyuanVideo."""
    causal = masks.causal()
    return [
        Case("full", masks.full(), 16384, 16, lambda b, h, q, k: q >= 0, True),
        Case("causal", causal, 16384, 16, lambda b, h, q, k: q >= k, False),
        Case("sliding1024", causal & masks.window(1024, 0), 16384, 16, lambda b, h, q, k: (q >= k) & (q - k <= 1024), False),
        Case("sink64+sliding1024", causal & (masks.window(1024, 0) | masks.sink(64)), 16384, 16,
             lambda b, h, q, k: (q >= k) & ((q - k <= 1024) | (k < 64)), False),
        Case("s2-16shards", masks.strided(64, 16, 16, heads=16), 16384, 16, _strided, False),
        Case("causal-131072", causal, 131072, 16, None, False),
        Case("s2-131072", masks.strided(64, 16, 16, heads=16), 131072, 16, None, False),
        Case("na2d-17x17", masks.grid((128, 128), 17), 16384, 16, _na2d, False),
        Case("circle-r16", masks.disc((128, 128), 16), 16384, 16, _circle, False),
        Case("text512+circle-r16", masks.disc((128, 128), 16, text=512), 16896, 16, _clear, True),
        Case("flux-80x80", masks.grid((256, 256), 80), 65536, 24, None, True),
        Case("flux-80x80-stride16", masks.grid((256, 256), 80, stride=16), 65536, 24, None, True),
        Case("hunyuan", masks.grid((30, 48, 80), (18, 24, 24)), 115200, 24, None, True, backward=False),
        Case("hunyuan-stride", masks.grid((30, 48, 80), (18, 24, 24), stride=(16, 8, 8)), 115200, 24, None, True, backward=False),
    ]  # fmt: skip


def _wrong(case: Case, qkv: list[Tensor], o: Tensor, lse: Tensor, grad_o: Tensor, grads: dict[str, Tensor]) -> str:
    """What differs from float32 attention over a sample of rows; "" if nothing does."""
    q, k, v = (x[0].float() for x in qkv)
    n, scale = q.shape[1], q.shape[2] ** -0.5
    head, predicate = case.heads // 2, _predicate(case)
    zero, every = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device="cuda"), torch.arange(n, device="cuda")
    heads = torch.arange(case.heads, device="cuda")[:, None, None]
    rows = torch.randperm(n, device="cuda")[:64]

    def kept(queries: Tensor, keys: Tensor) -> Tensor:
        found = predicate(zero, heads, queries[:, None], keys[None, :])
        return found.expand(1, case.heads, len(queries), len(keys))[0, head]

    delta = (grad_o[0, head].float() * o[0, head].float()).sum(-1)
    scores = (q[head, rows] @ k[head].mT * scale).masked_fill(~kept(rows, every), float("-inf"))
    weights = scores.softmax(-1)
    found = {"o": (weights @ v[head], o[0, head, rows])}
    if grads:
        slopes = weights * (grad_o[0, head, rows].float() @ v[head].mT - delta[rows, None])
        found["dq"] = (slopes @ k[head] * scale, grads["q"][0, head, rows])
        columns = (q[head] @ k[head, rows].mT * scale).masked_fill(~kept(every, rows), float("-inf"))
        weights = torch.exp(columns - lse[0, head, :, None])
        slopes = weights * (grad_o[0, head].float() @ v[head, rows].mT - delta[:, None])
        found["dv"] = (weights.mT @ grad_o[0, head].float(), grads["v"][0, head, rows])
        found["dk"] = (slopes.mT @ q[head] * scale, grads["k"][0, head, rows])
    gaps = {name: float((ours.float() - exact).norm() / exact.norm()) for name, (exact, ours) in found.items()}
    return ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items() if not gap < 2e-2)


def row(case: Case, d: int, compiled: Callable[..., Tensor] | None, kernels: bool) -> str:
    """One line of the table, or two; without FlexAttention compiled no peer is run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.functional import scaled_dot_product_attention

    n, h = case.tokens, case.heads
    qkv = [torch.randn(1, h, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    program: Attention = declare(*qkv, keep=case.mask).program
    made = dict(zip("qkv", qkv, strict=True))
    made |= {name: t.cuda() for name, t in zip([x.name for x in program.tensors[3:]], declare(*qkv, keep=case.mask).captured)}
    o, lse, rcp = lowering.forward(program, made, {}, True)
    grad_o = torch.randn_like(o)
    wanted = frozenset("qkv")
    grads = lowering.backward(program, made, {}, o, lse, rcp, grad_o, None, wanted) if case.backward else {}
    wrong = _wrong(case, qkv, o, lse, grad_o, grads)
    if wrong:
        return f"| {case.name} | WRONG: {wrong} |"
    runs: dict[str, Callable[[], object]] = {"fwd": lambda: lowering.forward(program, made, {}, True)}
    if case.backward:
        runs["bwd"] = lambda: lowering.backward(program, made, {}, o, lse, rcp, grad_o, None, wanted)
    if parted.parts_of(program):
        runs["whole fwd"] = lambda: triton_launch.forward(program, made, {}, True)
        runs["whole bwd"] = lambda: triton_launch.backward(program, made, {}, o, lse, rcp, grad_o, None, wanted)
    if kernels:
        print(f"{case.name}: {kernel_times(runs)}")
    leaves = [x.detach().requires_grad_() for x in qkv]
    if case.flex is not None and compiled is not None:
        block_mask = create_block_mask(case.flex, None, h if case.name.startswith("s2") else None, n, n, device="cuda")
        theirs = compiled(*leaves, block_mask=block_mask)
        runs["flex fwd"] = lambda: compiled(*leaves, block_mask=block_mask)
        runs["flex bwd"] = lambda: torch.autograd.grad(theirs, leaves, grad_o, retain_graph=True)
    if case.dense_peer and compiled is not None:

        def dense() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(*leaves)

        runs["dense fwd"] = dense
        if case.backward:
            out = dense()
            runs["dense bwd"] = lambda: torch.autograd.grad(out, leaves, grad_o, retain_graph=True)
    timed: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            timed[name].append(milliseconds(run, 5, 30))
    ms = {name: statistics.median(times) for name, times in timed.items()}
    kept = case.mask.kept_pairs(1, h, n, n) or _counted(case)

    def rate(name: str, forwards: float) -> str:
        return f"{ms[name]:.3f} ({forwards * 4 * kept * d / ms[name] / 1e9:.0f})" if name in ms else ""

    def over(peer: str, side: str, way: str) -> str:
        return f"**{ms[f'{peer} {side}'] / ms[way + side]:.2f}**" if f"{peer} {side}" in ms else ""

    def line(name: str, way: str, predicted: float) -> str:
        error = f"{100 * (predicted / ms[way + 'fwd'] - 1):+.0f} %"
        cells = [name, f"{kept / (h * n * n):.4f}", rate(f"{way}fwd", 1), f"{predicted:.3f} ({error})", over("flex", "fwd", way),
                 over("dense", "fwd", way), rate(f"{way}bwd", 2.5), over("flex", "bwd", way), over("dense", "bwd", way)]  # fmt: skip
        return "| " + " | ".join(cells) + " |"

    whole = _predicted(program, made)
    if not parted.parts_of(program):
        return line(case.name, "", whole)
    outlines = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in made.items()}
    light = preview(program, {}, outlines, TARGETS["sm_90"]).light
    assert light is not None
    return line(f"{case.name}, in parts", "", light.predicted_ms) + "\n" + line(f"{case.name}, as a whole", "whole ", whole)


def _predicate(case: Case) -> Callable[..., Tensor]:
    """The mask on the device, without a check of sizes, for what is asked are samples: as its peer has it, else as declared."""
    if case.flex is not None:
        return case.flex
    mask = case.mask.to("cuda")
    return mask.mask.on if hasattr(mask, "mask") else mask.on


def _counted(case: Case) -> int:
    """The kept pairs, each looked at on the device: seconds for 131072 tokens."""
    n, device = case.tokens, torch.device("cuda")
    heads, keys = (torch.arange(size, dtype=torch.int32, device=device) for size in (case.heads, n))
    predicate, total = _predicate(case), 0
    for rows in torch.arange(n, dtype=torch.int32, device=device).split(64):
        kept = predicate(torch.zeros_like(rows[:1]), heads[:, None, None], rows[:, None], keys)
        total += int(kept.expand(case.heads, len(rows), n).sum())
    return total


def _predicted(program: Attention, made: dict[str, Tensor]) -> float:
    """The forward time that `attncompiler plan` predicts of a whole program, of the plan that the kernel ran."""
    plan = prepared.prepare(program, made, {})._planners["attention_forward"]._rows(program, made)
    (b, h, m, d), n = made["q"].shape, made["k"].shape[2]
    return predicted_ms(TileCounts.of(plan, b, h), (b, h, m, n, d), TARGETS["sm_90"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--ours", action="store_true", help="leave the peers out")
    parser.add_argument("--kernels", action="store_true", help="also the time of each kernel")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here")
        return 1
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64
    compiled = None if arguments.ours else torch.compile(flex_attention, dynamic=False)
    rows = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, `{' '.join(sys.argv)}`",
        "",
        "| mask | kept | fwd ms (TFLOP/s) | predicted | over flex | over dense cuDNN | bwd ms (TFLOP/s) | over flex | over dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases():
        if arguments.only and not any(case.name.startswith(name) for name in arguments.only.split(",")):
            continue
        try:
            rows.append(row(case, arguments.d, compiled, arguments.kernels))
        except Exception as error:  # the other cases still run
            rows.append(f"| {case.name} | {type(error).__name__}: {str(error)[:300]} |")
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    print("\n".join(rows))
    if arguments.out:
        arguments.out.write_text("\n".join(rows) + "\n")
    return int(any("WRONG" in line or "Error" in line for line in rows))


if __name__ == "__main__":
    sys.exit(main())

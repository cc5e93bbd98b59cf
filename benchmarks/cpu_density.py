"""Time and memory of what is selected, routed or striped, as less of it is kept: forward and backward on a CPU, fp32, B1 H8 D64, causal.

    python benchmarks/cpu_density.py [--out FILE.md]

`kept`: the share of what the dense form computes. `ideal`: the dense time times that. Each measurement runs in a process of its own, as in
cpu.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from cpu import HEADS, SIZE, resident, timed
from torch import Tensor

import attncompiler
from attncompiler import masks, select

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
TOKENS = {"moh": 4096, "s2": 8192, "dma": 8192}
KEPT = {"moh": (1.0, 0.5, 0.25), "s2": (1.0, 0.25, 0.125), "dma": (1.0, 0.25, 0.0625)}


def attend(case: str, share: float) -> tuple[Attend, float]:
    """The attention, and the share that it keeps of causal pairs (DMA: of keys)."""
    n = TOKENS[case]
    causal = masks.causal()
    if share == 1.0:
        return lambda q, k, v: attncompiler.attention(q, k, v, keep=causal), 1.0
    if case == "moh":
        route = attncompiler.route(torch.ones(1, HEADS, n), torch.rand(1, HEADS, n) < share)
        return lambda q, k, v: attncompiler.attention(q, k, v, keep=causal, route=route), share
    if case == "s2":
        stripes = masks.strided(64, 4, round(1 / share), HEADS)
        kept = stripes.kept_pairs(1, HEADS, n, n)
        assert kept is not None
        return lambda q, k, v: attncompiler.attention(q, k, v, keep=stripes), kept / (HEADS * n * (n + 1) / 2)
    rank = torch.randn(1, HEADS, n)
    return lambda q, k, v: attncompiler.attention(q, k, v, keep=causal, select=select.top_k(rank, round(n * share))), share


def measure(case: str, share: float, steps: int) -> dict[str, float]:
    """Least milliseconds of a forward with backward, and peak memory in MiB."""
    torch.manual_seed(0)
    f, kept = attend(case, share)
    q, k, v = (torch.randn(1, HEADS, TOKENS[case], SIZE, requires_grad=True) for _ in range(3))

    def step() -> None:
        torch.autograd.grad(f(q, k, v).sum(), (q, k, v))

    step()
    Path("/proc/self/clear_refs").write_text("5")
    held = resident("VmRSS")
    ms = min(timed(step) for _ in range(steps))
    return {"ms": ms, "peak": resident("VmHWM") - held, "kept": kept}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs=2, metavar=("CASE", "SHARE"))
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only[0], float(arguments.only[1]), arguments.steps)))
        return 0
    rows = [
        f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, fp32, B1 H{HEADS} D{SIZE}",
        "",
        "| case | tokens | kept | ms | ideal | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for case, shares in KEPT.items():
        dense = 0.0
        for share in shares:
            print(f"{case}: {share} ...", file=sys.stderr)
            command = [sys.executable, "-W", "ignore", __file__, "--steps", str(arguments.steps), "--only", case, str(share)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            dense = dense or found["ms"]
            rows.append(
                f"| {case} | {TOKENS[case]} | {found['kept']:.3f} | {found['ms']:.0f} | {dense * found['kept']:.0f} | {found['peak']:.0f} |"
            )
    print("\n".join(rows))
    if arguments.out:
        arguments.out.write_text("\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

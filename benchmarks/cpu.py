"""The portable lowering beside Inductor on the same source: seconds and peak memory of forward and backward, fp32, H8 D64.

    python benchmarks/cpu.py [--out FILE.md]

Each measurement runs in a process of its own. Memory is the peak of the resident set above what the process held, with its inputs,
after one warm step and before the measured ones.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

HEADS, SIZE = 8, 64


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    hidden = i[None, :] > i[:, None]
    return (q @ k.mT / math.sqrt(SIZE)).masked_fill(hidden, -math.inf).softmax(-1) @ v


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    hidden = (i[None, :] > i[:, None]) | (i[:, None] - i[None, :] >= 256)
    return (q @ k.mT / math.sqrt(SIZE)).masked_fill(hidden, -math.inf).softmax(-1) @ v


CASES: dict[str, tuple[Callable[..., Tensor], int]] = {"window 256, N 4096": (window, 4096), "causal, N 2048": (causal, 2048)}


def measure(case: str, backend: str, steps: int) -> dict[str, float]:
    """Median milliseconds of a forward and of a forward with backward, and peak memory in MiB."""
    f, n = CASES[case]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, n, SIZE, requires_grad=True) for _ in range(3))
    compiled = torch.compile(f, backend=backend)

    def step() -> None:
        torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))

    step()
    Path("/proc/self/clear_refs").write_text("5")
    held = resident("VmRSS")
    both = [timed(step) for _ in range(steps)]
    peak = resident("VmHWM") - held
    with torch.no_grad():
        compiled(q, k, v)
        forward = [timed(lambda: compiled(q, k, v)) for _ in range(steps)]
    return {"forward": sorted(forward)[steps // 2], "both": sorted(both)[steps // 2], "peak": peak}


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs=2, metavar=("CASE", "BACKEND"))
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(*arguments.only, arguments.steps)))
        return 0
    rows = [
        f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, fp32, H{HEADS} D{SIZE}",
        "",
        "| case | | attncompiler | Inductor | ratio |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        found = {}
        for backend in ("attncompiler", "inductor"):
            print(f"{case}: {backend} ...", file=sys.stderr)
            command = [sys.executable, "-W", "ignore", __file__, "--steps", str(arguments.steps), "--only", case, backend]
            found[backend] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for what, label in (("forward", "forward, ms"), ("both", "forward + backward, ms"), ("peak", "peak memory, MiB")):
            ours, theirs = (found[b][what] for b in ("attncompiler", "inductor"))
            rows.append(f"| {case} | {label} | {ours:.0f} | {theirs:.0f} | {theirs / ours:.1f} |")
    print("\n".join(rows))
    if arguments.out:
        arguments.out.write_text("\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

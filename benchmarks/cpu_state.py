"""Lightning-2 on a CPU, written as scores of all pairs: compiled by attncompiler beside Inductor on the same source. B1 H8 D64, fp32.

    python benchmarks/cpu_state.py [--threads 2] [--out FILE.md]

At 8192 tokens both, forward, and forward with backward; then attncompiler alone from 2048 to 32768 tokens. Each measurement runs in
a process of its own; the median of the steps, and the least, which says how busy the machine was. With one thread it is the time that
the process had the core, which a busy machine leaves as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

HEADS, SIZE, BESIDE = 8, 64, 8192
LENGTHS = (2048, 4096, 8192, 16384, 32768)


def lightning(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    decay = torch.exp(-rate[:, None, None] * (i[:, None] - i).clamp(min=0)) * (i[:, None] >= i)
    return (q @ k.mT * decay) @ v


def measure(backend: str, n: int, steps: int, threads: int) -> dict[str, list[float]]:
    """Milliseconds of each step: of a forward, and of a forward with backward."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, n, SIZE).mul_(0.1).requires_grad_() for _ in range(3))
    rate = torch.logspace(-1, -8, HEADS, 2.0)
    compiled = torch.compile(lightning, backend=backend, dynamic=False)

    def both() -> None:
        torch.autograd.grad(compiled(q, k, v, rate).sum(), (q, k, v))

    def forward() -> None:
        with torch.no_grad():
            compiled(q, k, v, rate)

    found = {}
    for name, run in (("forward", forward), ("both", both)):
        run()
        found[name] = sorted(_timed(run) for _ in range(steps))
    return found


def _timed(run: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return 1e3 * (clock() - start)


def _measured(backend: str, n: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    print(f"{n} tokens: {backend} ...", file=sys.stderr)
    options = ["--steps", str(arguments.steps), "--threads", str(arguments.threads), "--only", backend, str(n)]
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, *options], capture_output=True, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _text(times: list[float]) -> str:
    return f"{times[len(times) // 2]:.0f} ({times[0]:.0f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs=2, metavar=("BACKEND", "TOKENS"))
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only[0], int(arguments.only[1]), arguments.steps, arguments.threads)))
        return 0
    rows = [
        f"{arguments.threads} threads, {platform.machine()}, torch {torch.__version__}, fp32, B1 H{HEADS} D{SIZE}; load of the "
        f"machine when it began: {os.getloadavg()[0]:.1f}. Milliseconds, median (least) of {arguments.steps}.",
        "",
        "| tokens | compiled by | forward | forward + backward | forward, us a token |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(rows), flush=True)
    for backend, n in [("inductor", BESIDE), *(("attncompiler", n) for n in LENGTHS)]:
        found = _measured(backend, n, arguments)
        each = 1e3 * found["forward"][len(found["forward"]) // 2] / n
        rows.append(f"| {n} | {backend} | {_text(found['forward'])} | {_text(found['both'])} | {each:.1f} |")
        print(rows[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

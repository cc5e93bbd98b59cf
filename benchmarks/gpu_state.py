"""Linear attention with a decay of each head (Lightning-2) on a GPU: time, share of the memory floor, and what it costs a token.

    python benchmarks/gpu_state.py [--schedules]

Errors are checked first, on a small size against float64: no time is printed beside a red one. The floor reads q, k and v once and
writes O once (backward: reads q, k, v and dO, writes three gradients) at 3.35 TB/s. `--schedules` times other ways to cut the walk.
"""

from __future__ import annotations

import argparse
import sys
from unittest import mock

import torch
from torch import Tensor
from triton.testing import do_bench

from attncompiler import linear_attention
from attncompiler.runtime import state_launch
from attncompiler.tuning import state_schedule
from attncompiler.tuning.state_schedule import ChunkSchedule, StateSchedule

_BYTES_PER_SECOND = 3.35e12
CASES = [(1, 16, 16384, 128), (8, 16, 2048, 128), (1, 16, 131072, 128), (1, 16, 1048576, 128), (1, 16, 16384, 64)]


def _dense(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
    n = q.shape[2]
    distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
    weight = torch.exp(log[:, None, None] * distance.clamp(min=0)).masked_fill(distance < 0, 0.0)
    return (q @ k.mT * weight.to(q.dtype)) @ v


def _inputs(b: int, h: int, n: int, d: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    made = [torch.randn(b, h, n, d, device="cuda", dtype=dtype).mul_(0.1).requires_grad_() for _ in range(3)]
    return *made, -torch.logspace(-3, 0, h, 2.0, device="cuda")


def check() -> bool:
    """Whether O and the gradients are within twice eager's error, at a small size, cut into segments."""
    inputs = _inputs(1, 4, 2000, 128)
    weight = torch.randn(1, 4, 2000, 128, device="cuda", dtype=torch.bfloat16)

    def results(run: object, leaves: tuple[Tensor, ...]) -> list[Tensor]:
        out = run(*leaves)  # type: ignore[operator]
        return [out.double(), *(g.double() for g in torch.autograd.grad(out, leaves[:3], weight.to(out.dtype)))]

    exact = results(_dense, tuple(t.detach().double().requires_grad_() for t in inputs))
    eager = results(_dense, inputs)
    ours = results(lambda q, k, v, log: linear_attention(q, k, v, decay=log), inputs)
    fine = True
    for name, found, plain, right in zip(("O", "dQ", "dK", "dV"), ours, eager, exact, strict=True):
        error, allowed = float((found - right).abs().max()), 2 * float((plain - right).abs().max())
        print(f"{name:3} error {error:.3e}, allowed {allowed:.3e}{'' if error <= allowed else '   RED'}")
        fine &= error <= allowed
    return fine


def timed(b: int, h: int, n: int, d: int) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward."""
    q, k, v, log = _inputs(b, h, n, d)
    with torch.no_grad():
        forward = do_bench(lambda: linear_attention(q, k, v, decay=log), return_mode="median")
    out = linear_attention(q, k, v, decay=log)
    above = torch.randn_like(out)
    backward = do_bench(lambda: torch.autograd.grad(out, (q, k, v), above, retain_graph=True), return_mode="median")
    return forward, backward


def table() -> None:
    columns = f"{'B':>3} {'H':>3} {'N':>8} {'D':>4} {'fwd ms':>9} {'floor':>6} {'bwd ms':>9} {'floor':>6}"
    print(f"{columns} {'fwd ns/token':>13} {'eager fwd':>10}")
    for b, h, n, d in CASES:
        forward, backward = timed(b, h, n, d)
        tensor_ms = 1e3 * 2 * b * h * n * d / _BYTES_PER_SECOND
        eager = "-"
        if b * h * n * n * 2 * 4 < 0.5 * torch.cuda.mem_get_info()[0]:
            inputs = _inputs(b, h, n, d)
            with torch.no_grad():
                eager = f"{do_bench(lambda: _dense(*inputs), return_mode='median'):.2f}"  # noqa: B023
        print(
            f"{b:3} {h:3} {n:8} {d:4} {forward:9.3f} {4 * tensor_ms / forward:6.0%} "
            f"{backward:9.3f} {7 * tensor_ms / backward:6.0%} "
            f"{1e6 * forward / (b * n):13.2f} {eager:>10}"
        )
        torch.cuda.empty_cache()


def schedules() -> None:
    """Other ways to cut the walk at the first case."""
    states = ChunkSchedule(64, 128, 8, 3)
    tiles = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2), (64, 32, 4, 2), (128, 64, 8, 2), (32, 64, 4, 3)]
    walks = [ChunkSchedule(*sizes) for sizes in tiles]
    for walk in walks:
        for per_sm in (1, 2, 4):
            chosen = StateSchedule(states, walk, "tf32x3")

            def cut(n: int, heads: int, slices: int, target: object, programs: int = per_sm * 132) -> int:
                wanted = max(programs // (heads * slices), 1)
                return -(-n // wanted // state_schedule.SEGMENT_STEPS) * state_schedule.SEGMENT_STEPS

            with (
                mock.patch.object(state_launch, "choose_state_schedule", lambda *_, chosen=chosen: chosen),
                mock.patch.object(state_launch, "segment_length", cut),
                mock.patch.object(state_launch, "_CALLS", {}),
            ):
                try:
                    forward, backward = timed(*CASES[0])
                except Exception as error:
                    print(walk, per_sm, type(error).__name__, str(error)[:80])
                    continue
            print(f"{walk} {per_sm} a multiprocessor: {forward:.3f} {backward:.3f} ms")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--schedules", action="store_true")
    chosen = arguments.parse_args()
    print(torch.cuda.get_device_name())
    if not check():
        return 1
    table()
    if chosen.schedules:
        schedules()
    return 0


if __name__ == "__main__":
    sys.exit(main())

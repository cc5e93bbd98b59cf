"""Linear attention with a decay of each head (Lightning-2) on a GPU: time, share of the memory floor, and what it costs a token.

    python benchmarks/gpu_state.py [--schedules | --quadratic]

Errors are checked first, on a small size against float64: no time is printed beside a red one. The floor reads q, k and v once and
writes O once (backward: reads q, k, v and dO, writes three gradients) at 3.35 TB/s. `device`: replay of a captured graph, which has no
part of the host; the backward's is that of both less that of the forward. Each kernel by itself is from torch's profiler.
`--schedules` times other ways to cut the walk; `--quadratic` compiles the same as people write it, with its matrix of queries and keys,
by this backend and by Inductor.
"""

from __future__ import annotations

import argparse
import sys
from unittest import mock

import torch
from torch import Tensor
from triton.testing import do_bench

from attncompiler import linear_attention
from attncompiler.runtime import state_call
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


def on_device(b: int, h: int, n: int, d: int) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward without the host: captured, and played again."""
    q, k, v, log = _inputs(b, h, n, d)
    above = torch.randn_like(q)

    def forward() -> None:
        with torch.no_grad():
            linear_attention(q, k, v, decay=log)

    def both() -> None:
        torch.autograd.grad(linear_attention(q, k, v, decay=log), (q, k, v), above)

    times = []
    for run in (forward, both):
        run()  # compiles, which a capture can't
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times.append(do_bench(graph.replay, return_mode="median"))
        del graph
    return times[0], times[1] - times[0]


def kernels(b: int, h: int, n: int, d: int) -> None:
    """Prints microseconds of each kernel of a forward and a backward by itself."""
    q, k, v, log = _inputs(b, h, n, d)
    above = torch.randn_like(q)

    def both() -> None:
        torch.autograd.grad(linear_attention(q, k, v, decay=log), (q, k, v), above)

    both()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            both()
        torch.cuda.synchronize()
    print(f"\nB{b} H{h} N{n} D{d}, each kernel, us:")
    for event in sorted(profile.key_averages(), key=lambda e: -e.device_time_total):
        print(f"  {event.key[:60]:60} {event.device_time_total / 10:9.1f} in {event.count / 10:.0f} launches")


def table() -> None:
    columns = (
        f"{'B':>3} {'H':>3} {'N':>8} {'D':>4} {'fwd ms':>9} {'device':>7} {'floor':>6} {'bwd ms':>9} {'device':>7} {'floor':>6}"
    )
    print(f"{columns} {'fwd ns/token':>13} {'eager fwd':>10}")
    for b, h, n, d in CASES:
        forward, backward = timed(b, h, n, d)
        alone = on_device(b, h, n, d)
        tensor_ms = 1e3 * 2 * b * h * n * d / _BYTES_PER_SECOND
        eager = "-"
        if b * h * n * n * 2 * 4 < 0.5 * torch.cuda.mem_get_info()[0]:
            inputs = _inputs(b, h, n, d)
            with torch.no_grad():
                eager = f"{do_bench(lambda: _dense(*inputs), return_mode='median'):.2f}"  # noqa: B023
        print(
            f"{b:3} {h:3} {n:8} {d:4} {forward:9.3f} {alone[0]:7.3f} {4 * tensor_ms / forward:6.0%} "
            f"{backward:9.3f} {alone[1]:7.3f} {7 * tensor_ms / backward:6.0%} "
            f"{1e6 * forward / (b * n):13.2f} {eager:>10}"
        )
        torch.cuda.empty_cache()
    for case in CASES[:2]:
        kernels(*case)


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
                mock.patch.object(state_call, "choose_state_schedule", lambda *_, chosen=chosen: chosen),
                mock.patch.object(state_call, "segment_length", cut),
                mock.patch.object(state_call, "_CALLS", {}),
            ):
                try:
                    forward, backward = timed(*CASES[0])
                except Exception as error:
                    print(walk, per_sm, type(error).__name__, str(error)[:80])
                    continue
            print(f"{walk} {per_sm} a multiprocessor: {forward:.3f} {backward:.3f} ms")


def quadratic() -> None:
    """Milliseconds and further memory at its most of the quadratic source, forward alone and with the gradients."""
    from attncompiler.zoo.lightning import lightning

    b, h, n, d = CASES[0]
    q, k, v, log = _inputs(b, h, n, d)
    above = torch.randn_like(q)
    print(f"\nquadratic source, B{b} H{h} N{n} D{d}\n{'':12} {'fwd ms':>9} {'MB':>7} {'both ms':>9} {'MB':>7}")
    for backend in ("attncompiler", "inductor", "eager"):
        torch._dynamo.reset()
        compiled = lightning if backend == "eager" else torch.compile(lightning, backend=backend)

        def forward() -> None:
            with torch.no_grad():
                compiled(q, k, v, -log)  # noqa: B023

        def both() -> None:
            torch.autograd.grad(compiled(q, k, v, -log), (q, k, v), above)  # noqa: B023

        cells = []
        for run in (forward, both):
            run()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            megabytes = (torch.cuda.max_memory_allocated() - before) / 1e6
            cells.append(f"{do_bench(run, return_mode='median'):9.3f} {megabytes:7.0f}")
        print(f"{backend:12} {' '.join(cells)}", flush=True)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--schedules", action="store_true")
    arguments.add_argument("--quadratic", action="store_true")
    chosen = arguments.parse_args()
    print(torch.cuda.get_device_name())
    if not check():
        return 1
    if chosen.quadratic:
        quadratic()
        return 0
    table()
    if chosen.schedules:
        schedules()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One GPU session: kernels timed beside the peers in the same process. Whether they are right, `pytest -m gpu tests/runtime` says.

    python benchmarks/gpu_session.py schedules          times of candidate schedules (causal and full)
    python benchmarks/gpu_session.py bench              ours beside flex, cuDNN and FlashAttention-2
    python benchmarks/gpu_session.py plans              plans that are made on the device, to 1048576 tokens
    python benchmarks/gpu_session.py host compile       host time of a call; seconds of a cold and of a warm compile
    --n 16384 --heads 16 --d 128   --out FILE.md

TFLOP/s count the kept pairs only; a backward counts 2.5 forwards. Medians of `triton.testing.do_bench`, interleaved with the peers.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from attncompiler.ir import Attention, parse, verify
from attncompiler.ir.text import to_line
from attncompiler.runtime import ops as _ops  # noqa: F401  registers the op
from attncompiler.runtime import prepared, scheduling, triton_launch
from attncompiler.runtime.planning import Planner
from attncompiler.tuning.schedule import KernelSchedule, Schedule


def program(
    n: int, h: int, d: int, score: str = "{dot} * {scale}", keep: str = "", reads: str = "", dtype: str = "bf16"
) -> Attention:
    """Dense-layout attention with one head of keys a head of queries."""
    dot = "dot(q[b, h, q_idx], k[b, h, kv_idx])"
    text = f"""attention
      axes    b=1, h={h}, q_idx={n}, kv_idx={n}
      read    q: {dtype}[1, {h}, {n}, {d}], k: {dtype}[1, {h}, {n}, {d}], v: {dtype}[1, {h}, {n}, {d}]{reads}
      score   {score.format(dot=dot, scale=d**-0.5)}
      {f"keep    {keep}" if keep else ""}
      weigh   softmax
      sum     v[b, h, kv_idx]
    """
    return verify(parse(text))


@dataclass(frozen=True)
class Case:
    """A mask or score change: our program, flex's mods, and the share of pairs kept (0: counted on the device)."""

    name: str
    ours: Attention
    operands: Mapping[str, Tensor]
    score_mod: Callable[..., Tensor] | None
    mask_mod: Callable[..., Tensor] | None
    density: float


def cases(n: int, h: int, d: int) -> list[Case]:
    """The masks and scores of the field's usual benchmark."""
    documents = torch.sort(torch.randint(0, 12, (n,), device="cuda")).values.to(torch.int32)
    slopes = torch.exp2(-8.0 * torch.arange(1, h + 1, device="cuda") / h)
    table = torch.randn(h, 2 * n, device="cuda", dtype=torch.bfloat16)
    causal = "kv_idx <= q_idx"
    half = (n + 1) / (2 * n)
    counts = torch.bincount(documents.long()).double()
    in_documents = float((counts * (counts + 1) / 2).sum() / n**2)
    window = float(sum(min(i + 1, 1025) for i in range(n)) / n**2)
    causal_mod = lambda b, h, q, k: q >= k
    return [
        Case("full", program(n, h, d), {}, None, None, 1.0),
        Case("causal", program(n, h, d, keep=f"{causal} else nan"), {}, None, causal_mod, half),
        Case("sliding1024", program(n, h, d, keep=f"({causal}) & (q_idx - kv_idx <= 1024) else nan"), {}, None,
             lambda b, h, q, k: (q >= k) & (q - k <= 1024), window),
        Case("document-causal", program(n, h, d, keep=f"({causal}) & (doc[q_idx] == doc[kv_idx]) else nan",
                                        reads=f", doc: i32[{n}]"),
             {"doc": documents}, None, lambda b, h, q, k: (q >= k) & (documents[q] == documents[k]), in_documents),
        Case("alibi-causal", program(n, h, d, score="{dot} * {scale} + slope[h] * (kv_idx - q_idx)", keep=f"{causal} else nan",
                                     reads=f", slope: f32[{h}]"), {"slope": slopes},
             lambda s, b, h, q, k: s + slopes[h] * (k - q), causal_mod, half),
        Case("softcap-causal", program(n, h, d, score="tanh({dot} * {scale} / 20.0) * 20.0", keep=f"{causal} else nan"), {},
             lambda s, b, h, q, k: torch.tanh(s / 20.0) * 20.0, causal_mod, half),
        Case("relbias-full", program(n, h, d, score=f"{{dot}} * {{scale}} + table[h, q_idx - kv_idx + {n}]",
                                     reads=f", table: bf16[{h}, {2 * n}]"), {"table": table},
             lambda s, b, h, q, k: s + table[h, q - k + n], None, 1.0),
    ]  # fmt: skip


def operands_of(case: Case, n: int, h: int, d: int) -> dict[str, Tensor]:
    made = {name: torch.randn(1, h, n, d, device="cuda", dtype=torch.bfloat16) for name in "qkv"}
    return made | dict(case.operands)


# ------------------------------------------------------------------------------------------------------------- time


def kernel_times(runs: Mapping[str, Callable[[], object]], times: int = 20) -> str:
    """Milliseconds of each kernel, the mean of so many runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(times):
            for run in runs.values():
                run()
        torch.cuda.synchronize()
    of = {event.key: event.self_device_time_total / times / 1e3 for event in found.key_averages()}
    return ", ".join(f"{name} {ms:.3f}" for name, ms in of.items() if ms > 0)


def milliseconds(f: Callable[[], object], warmup: int = 15, rep: int = 60) -> float:
    from triton.testing import do_bench

    return float(do_bench(f, warmup=warmup, rep=rep, return_mode="median"))


def schedules(n: int, h: int, d: int) -> None:
    """Candidate schedules, forward and backward, causal and full."""
    K = KernelSchedule
    base = Schedule(K(128, 64, 4, 2), K(64, 64, 4, 2), K(64, 64, 4, 2), True, "tf32x3")
    forwards = [K(128, 64, 4, 2), K(128, 64, 4, 3), K(128, 128, 8, 2), K(64, 64, 4, 3), K(64, 128, 4, 2)]
    queries = [K(64, 64, 4, 2), K(128, 64, 8, 2), K(64, 128, 4, 2), K(64, 32, 4, 3)]
    keys = [K(64, 64, 4, 2), K(64, 128, 8, 2), K(128, 64, 8, 2), K(32, 64, 4, 3)]
    for case in cases(n, h, d)[:2]:
        made = operands_of(case, n, h, d)
        flops = 4 * h * n * n * d * case.density
        choices = [("forward", replace(base, forward=k)) for k in forwards]
        choices += [("backward_queries", replace(base, backward_queries=k)) for k in queries]
        choices += [("backward_keys", replace(base, backward_keys=k)) for k in keys]
        for part, schedule in choices:
            try:
                ms = _time_part(case, made, schedule, part)
                share = {"forward": 1.0, "backward_queries": 1.5, "backward_keys": 2.0}[part]
                print(
                    f"{case.name:8} {part:17} {getattr(schedule, part)}: {ms:.3f} ms, {share * flops / ms / 1e9:.0f} TFLOP/s",
                    flush=True,
                )
            except Exception as error:
                print(f"{case.name:8} {part:17} {getattr(schedule, part)}: {type(error).__name__} {str(error)[:90]!r}", flush=True)


def _time_part(case: Case, made: dict[str, Tensor], schedule: Schedule, part: str) -> float:
    from unittest import mock

    wanted = {"forward": frozenset[str](), "backward_queries": frozenset("q"), "backward_keys": frozenset("kv")}[part]
    prepared._PREPARED.clear()
    with mock.patch.object(scheduling, "choose_schedule", lambda *_, **__: schedule):
        o, lse, rcp = triton_launch.forward(case.ours, made, {})
        if part == "forward":
            return milliseconds(lambda: triton_launch.forward(case.ours, made, {}))
        grad_o = torch.randn_like(o)
        return milliseconds(lambda: triton_launch.backward(case.ours, made, {}, o, lse, rcp, grad_o, None, wanted))


def bench(n: int, h: int, d: int, only: str) -> list[str]:
    """A row for each case: ours and flex, forward and backward; cuDNN and FA2 where they have the case."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(flex_attention, dynamic=False)
    rows = [
        "| case | ours fwd ms (TFLOP/s) | flex fwd | ratio | ours bwd ms (TFLOP/s) | flex bwd | ratio | peer fwd | peer bwd |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases(n, h, d):
        if only and case.name not in only.split(","):
            continue
        rows.append(_row(case, n, h, d, compiled))
        print(rows[-1], flush=True)
    return rows


def _row(case: Case, n: int, h: int, d: int, compiled: Callable[..., Tensor]) -> str:
    """One line of the table: checked against flex, then timed with the peers, interleaved."""
    from torch.nn.attention.flex_attention import create_block_mask

    made = operands_of(case, n, h, d)
    wanted = frozenset("qkv")
    o, lse, rcp = triton_launch.forward(case.ours, made, {})
    grad_o = torch.randn_like(o)
    block_mask = create_block_mask(case.mask_mod, None, None, n, n, device="cuda") if case.mask_mod else None
    leaves = [made[name].detach().requires_grad_() for name in "qkv"]
    theirs = compiled(*leaves, score_mod=case.score_mod, block_mask=block_mask)
    difference = (o.float() - theirs.float()).norm() / theirs.float().norm()
    ours_g = triton_launch.backward(case.ours, made, {}, o, lse, rcp, grad_o, None, wanted)
    theirs_g = torch.autograd.grad(theirs, leaves, grad_o, retain_graph=True)
    gap = max(float((ours_g[k].float() - g.float()).norm() / g.float().norm()) for k, g in zip("qkv", theirs_g, strict=True))
    if not (difference < 2e-2 and gap < 3e-2):
        return f"| {case.name} | WRONG: o {difference:.1e}, gradients {gap:.1e} |"
    runs = {
        "fwd": lambda: triton_launch.forward(case.ours, made, {}),
        "flex fwd": lambda: compiled(*leaves, score_mod=case.score_mod, block_mask=block_mask),
        "bwd": lambda: triton_launch.backward(case.ours, made, {}, o, lse, rcp, grad_o, None, wanted),
        "flex bwd": lambda: torch.autograd.grad(theirs, leaves, grad_o, retain_graph=True),
    }
    planned = _planned(case, made, o, lse)
    if planned is not None:
        runs["planned fwd"] = planned
    peers = _peers(case, leaves, grad_o)
    timed: dict[str, list[float]] = {name: [] for name in (*runs, *peers)}
    for _ in range(3):
        for name, run in (*runs.items(), *peers.items()):
            timed[name].append(milliseconds(run))
    ms = {name: statistics.median(times) for name, times in timed.items()}
    flops = 4 * h * n * n * d * case.density

    def rate(name: str, forwards: float) -> str:
        return f"{ms[name]:.3f} ({forwards * flops / ms[name] / 1e9:.0f})"

    def others(side: str, forwards: float) -> str:
        return " / ".join(f"{name.split()[0]} {rate(name, forwards)}" for name in peers if side in name)

    ratios = [f"**{ms[f'flex {side}'] / ms[side]:.2f}**" for side in ("fwd", "bwd")]
    cells = [case.name, rate("fwd", 1), rate("flex fwd", 1), ratios[0], rate("bwd", 2.5), rate("flex bwd", 2.5), ratios[1]]
    row = "| " + " | ".join([*cells, others("fwd", 1), others("bwd", 2.5)]) + " |"
    if planned is not None:
        ratio = f"**{ms['flex fwd'] / ms['planned fwd']:.2f}**"
        like = [f"{case.name}, on a plan made before, as flex's", rate("planned fwd", 1), rate("flex fwd", 1), ratio]
        row += "\n| " + " | ".join([*like, "", "", "", "", ""]) + " |"
    return row


def _planned(case: Case, made: dict[str, Tensor], o: Tensor, lse: Tensor) -> Callable[[], object] | None:
    """Our forward without its planning, for a mask whose plan is made at each call: flex's time leaves that out too."""
    call = prepared.prepare(case.ours, made, {})
    planner, launch = call._planners["attention_forward"], call._launches["attention_forward", False]
    if planner.is_static:
        return None
    plan = planner(made, call.raw(made), call.constants)
    tensors = {**call.pointers(made), "O": o, "Lse": lse}
    turns = plan.get("NextRow")

    def run() -> None:
        if turns is not None:
            turns.zero_()
        launch(tensors, plan)

    return run


def _peers(case: Case, leaves: list[Tensor], grad_o: Tensor) -> dict[str, Callable[[], object]]:
    """cuDNN and FlashAttention-2 through SDPA, for dense and causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    if case.name not in ("full", "causal"):
        return {}
    found: dict[str, Callable[[], object]] = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FA2", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(*leaves, is_causal=case.name == "causal")

            def run(backend=backend):  # type: ignore[no-untyped-def]
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(*leaves, is_causal=case.name == "causal")

            found[f"{name} fwd"] = run
            found[f"{name} bwd"] = lambda out=out: torch.autograd.grad(out, leaves, grad_o, retain_graph=True)
    return found


def host_time() -> list[str]:
    """Host microseconds a call: the bare launch of the kernel, our forward, and the registered op around it."""
    text = to_line(program(64, 1, 64, keep="kv_idx <= q_idx else nan"))
    case = Case("causal", parse(text), {}, None, None, 1.0)  # the very object that the op finds for this text
    made = operands_of(case, 64, 1, 64)
    o, lse, rcp = triton_launch.forward(case.ours, made, {})
    call = prepared.prepare(case.ours, made, {})
    launch = call._launches["attention_forward", False]
    tensors = {**call.pointers(made), "O": o, "Lse": lse, "Rcp": rcp}
    operands = list(made.values())
    runs = {
        "bare launch": launch.frozen(tensors),
        "forward": lambda: triton_launch.forward(case.ours, made, {}),
        "registered op, eager": lambda: torch.ops.attncompiler.attention.default(operands, [], text),
        "registered op, as a compiled graph calls it": lambda: torch.ops.attncompiler.attention_forward.default(operands, [], text),
    }
    return [f"{name}: {_microseconds(run):.1f} us a call" for name, run in runs.items()]


def plan_time() -> list[str]:
    """Milliseconds of a plan that is made on the device: causal documents, one head, forward and backward for keys."""
    lines = []
    for n in (16384, 131072, 1048576):
        case = next(case for case in cases(n, 1, 128) if case.name == "document-causal")
        made = operands_of(case, n, 1, 128)
        call = prepared.prepare(case.ours, made, {})
        raw = call.raw(made)
        times = []
        for by_keys, schedule in ((False, call.schedule.forward), (True, call.schedule.backward_keys)):
            planner = Planner(case.ours, {}, call.extents, schedule, by_keys, call.device)
            tables = planner(made, raw, call.constants)
            size = sum(t.numel() * t.element_size() for t in tables.values() if isinstance(t, Tensor)) / 2**20
            taken = milliseconds(functools.partial(planner, made, raw, call.constants))
            times.append(f"{taken:.3f} ms, {size:.1f} MiB of tables")
        lines.append(f"{n} tokens: {times[0]}; by keys {times[1]}")
    return lines


def _microseconds(run: Callable[[], object], calls: int = 500) -> float:
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, time.perf_counter() - start)
        torch.cuda.synchronize()
    return best / calls * 1e6


_COMPILED = """
import time, torch, attncompiler
def attention(q, k, v):
    n = q.shape[2]
    mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    return (q @ k.mT * 0.125).masked_fill(~mask, float("-inf")).softmax(-1) @ v
q, k, v = (torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
torch.compile(torch.nn.functional.relu)(q).sum().backward()  # what torch.compile itself needs once in a process
torch.cuda.synchronize(); start = time.perf_counter()
torch.compile(attention, backend="attncompiler")(q, k, v).sum().backward()
torch.cuda.synchronize(); print(f"{time.perf_counter() - start:.2f}")
"""


def compile_time() -> list[str]:
    """Seconds from the first call to the end of its backward: with empty caches, then in a new process with them."""
    import os
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        names = ("ATTNCOMPILER_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        environment = {**os.environ, **{name: f"{folder}/{name}" for name in names}}
        found = []
        for name in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", _COMPILED], env=environment, capture_output=True, text=True
            )
            found.append(f"{name} compile of one attention, forward and backward: {(done.stdout.strip() or done.stderr[-400:])} s")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["schedules", "bench", "host", "compile", "plans"])
    parser.add_argument("--n", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here")
        return 1
    rows = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, `{' '.join(sys.argv)}`", ""]
    if "host" in arguments.what:
        rows += host_time()
    if "plans" in arguments.what:
        rows += plan_time()
    if "compile" in arguments.what:
        rows += compile_time()
    if "schedules" in arguments.what:
        schedules(arguments.n, arguments.heads, arguments.d)
    if "bench" in arguments.what:
        rows += bench(arguments.n, arguments.heads, arguments.d, arguments.only)
    print("\n".join(rows))
    if arguments.out:
        arguments.out.write_text("\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

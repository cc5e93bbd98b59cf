"""Versions of the package by turns in one process: the device time of each kernel, and whether results are the same bits.

    python benchmarks/gpu_ab.py export REVISION NAME          (where git is: writes build/NAME, that revision's package under that name)
    python benchmarks/gpu_ab.py run NAME attncompiler [--only circle,documents] [--rounds 6] [--forward]

A card gets slower as it gets hot, and two of a kind differ: so what a change gains shows only by turns. Medians, from torch's profiler.
16 heads, 16384 tokens (grids: 128 x 128), D128, bf16. "differs" says that two runs of one version are not the same, or that a version is
not the same as the first.
"""

from __future__ import annotations

import argparse
import importlib
import io
import statistics
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_BUILD = Path(__file__).parent.parent / "build"
_TOKENS, _HEADS, _D = 16384, 16, 128
_HEAD_START = 2_000_000  # cycles for which the device waits, so that the host is ahead of it
_CALLS = 3  # of a turn


def masks_of(m: Any) -> dict[str, Callable[[], Any]]:
    """The masks, made by the module `masks` of a version."""
    ids = torch.sort(torch.randint(0, 12, (_TOKENS,), generator=torch.Generator().manual_seed(0))).values.to(torch.int32)
    return {
        "full": m.full,
        "causal": m.causal,
        "sliding": lambda: m.causal() & m.window(1024, 0),
        "sink": lambda: m.causal() & (m.window(1024, 0) | m.sink(64)),
        "s2": lambda: m.strided(64, 16, 16, heads=_HEADS),
        "documents": lambda: m.causal() & m.document(ids.cuda()),
        "na2d": lambda: m.grid((128, 128), 17),
        "circle": lambda: m.disc((128, 128), 16),
    }


def export(revision: str, name: str) -> None:
    """The package of a revision, under another name, so that two can be imported at once."""
    archive = subprocess.run(["git", "archive", revision, "attncompiler"], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files.getmembers():
            path = _BUILD / name / Path(member.name).relative_to("attncompiler")
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            elif (file := files.extractfile(member)) is not None:
                content = file.read()
                path.write_bytes(content.replace(b"attncompiler", name.encode()) if path.suffix == ".py" else content)


def runs_of(package: str, mask: str, tensors: list[Tensor], forward_only: bool) -> Callable[[], dict[str, Tensor]]:
    """What runs a version's forward and backward."""
    declare = importlib.import_module(f"{package}.dsl.attention").declare
    launch = importlib.import_module(f"{package}.runtime.triton_launch")
    q, k, v, grad_o = tensors
    declared = declare(q, k, v, keep=masks_of(importlib.import_module(f"{package}.masks"))[mask]())
    program = declared.program
    made = dict(zip((tensor.name for tensor in program.tensors), (q, k, v, *declared.captured), strict=True))

    def run() -> dict[str, Tensor]:
        o, lse, rcp = launch.forward(program, made, {}, True)
        if forward_only:
            return {"o": o, "lse": lse}
        return {"o": o, "lse": lse, **launch.backward(program, made, {}, o, lse, rcp, grad_o, None, frozenset("qkv"))}

    return run


def timed(run: Callable[[], dict[str, Tensor]]) -> dict[str, list[float]]:
    """Microseconds of each kernel in one turn, by name."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        torch.cuda._sleep(_HEAD_START)
        for _ in range(_CALLS):
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiled.events():
        if event.name.startswith(("attention_", "plan_", "_queue")):
            found[event.name.removeprefix("attention_")].append(event.device_time)
    return found


def compare(mask: str, packages: list[str], rounds: int, forward_only: bool) -> list[list[str]]:
    """A row for each version."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, _HEADS, _TOKENS, _D, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    runs = {package: runs_of(package, mask, tensors, forward_only) for package in packages}
    first = runs[packages[0]]()
    times: dict[str, dict[str, list[float]]] = {package: defaultdict(list) for package in packages}
    notes = {}
    for package, run in runs.items():
        once, twice = run(), run()
        again = [name for name in once if not torch.equal(once[name], twice[name])]
        other = [name for name in once if not torch.equal(once[name], first[name])]
        notes[package] = f"differs at each run: {again}" if again else f"differs from {packages[0]}: {other}" if other else ""
    for _ in range(rounds):
        for package, run in runs.items():
            for name, found in timed(run).items():
                times[package][name] += found
    rows = []
    for package, kernels in times.items():
        text = ", ".join(f"{name} {statistics.median(found) / 1e3:.4f}" for name, found in sorted(kernels.items()))
        rows.append([mask, package, text, notes[package]])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export")
    exporting.add_argument("revision")
    exporting.add_argument("name")
    running = commands.add_parser("run")
    running.add_argument("packages", nargs="+")
    running.add_argument("--only", default="circle,na2d,causal")
    running.add_argument("--rounds", type=int, default=6)
    running.add_argument("--forward", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "export":
        export(arguments.revision, arguments.name)
        return 0
    if not torch.cuda.is_available():
        print("no GPU here")
        return 1
    sys.path[:0] = [str(_BUILD)]
    rows = [
        row for mask in arguments.only.split(",") for row in compare(mask, arguments.packages, arguments.rounds, arguments.forward)
    ]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(tabulate(rows, ["mask", "version", "kernels, ms", "results"], tablefmt="github"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

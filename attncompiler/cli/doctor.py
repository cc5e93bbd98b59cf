"""`attncompiler doctor`: what this installation can do, each line tried, not assumed."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tabulate import tabulate

from attncompiler.cli.progress import steps
from attncompiler.codegen.cross_compile import cross_compile
from attncompiler.codegen.emission import Layout
from attncompiler.config import cache_dir
from attncompiler.ir.text import parse
from attncompiler.runtime.triton_launch import static_groups
from attncompiler.tuning.schedule import choose_schedule
from attncompiler.tuning.target import TARGETS, Target


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it is well, and what was seen. Only an `essential` one makes the exit code 1."""

    what: str
    ok: bool
    seen: str
    essential: bool = False


_PROGRAM = """attention
  axes    b=1, h=2, q_idx=64, kv_idx=64
  read    q: bf16[1, 2, 64, 64], k: bf16[1, 2, 64, 64], v: bf16[1, 2, 64, 64]
  score   dot(q[b, h, q_idx], k[b, h, kv_idx]) * 0.125
  keep    kv_idx <= q_idx else nan
  weigh   softmax
  sum     v[b, h, kv_idx]
"""


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings; 1 if an essential one is not well."""
    findings = list(_findings())
    if arguments.json:
        print(json.dumps([vars(f) for f in findings], indent=2))
    else:
        print(
            tabulate(
                [("ok" if f.ok else "FAIL" if f.essential else "-", f.what, f.seen) for f in findings],
                headers=("", "check", "seen"),
            )
        )
    return 1 if any(f.essential and not f.ok for f in findings) else 0


def _findings() -> list[Finding]:
    import triton

    found = [
        Finding("Python", sys.version_info >= (3, 11), platform.python_version(), True),
        Finding("torch", _version(torch.__version__) >= (2, 11), torch.__version__, True),
        Finding("triton", _version(triton.__version__) >= (3, 6), triton.__version__, True),
        _device(),
        Finding(
            "C++ compiler (Inductor on a CPU)", bool(shutil.which("g++") or shutil.which("clang++")), shutil.which("g++") or "none"
        ),
        _cache(),
        _try("recognition and training, portable lowering", _portable, True),
    ]
    for target in steps(TARGETS.values(), "cross-compiling"):
        found.append(_try(f"cross-compilation to {target.name}", partial(_cross, target)))
    return [*found, _recompiles()]


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _device() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", False, "none: the portable lowering runs, kernels can still be compiled and inspected")
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return Finding("GPU", True, f"{name}, sm_{capability[0]}{capability[1]}")


def _cache() -> Finding:
    path = cache_dir()
    files = [file for file in path.rglob("*") if file.is_file()]
    return Finding("cache", True, f"{path}: {len(files)} files, {sum(f.stat().st_size for f in files) / 1024:.0f} KiB")


def _try(what: str, attempt: Callable[[], str], essential: bool = False) -> Finding:
    try:
        return Finding(what, True, attempt(), essential)
    except Exception as error:
        return Finding(what, False, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}", essential)


def _portable() -> str:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT / 8).softmax(-1) @ v

    q, k, v = (torch.randn(1, 2, 40, 64, requires_grad=True) for _ in range(3))
    out = torch.compile(attention, backend="attncompiler", options={"inner": "aot_eager"})(q, k, v)
    out.sum().backward()
    error = (out - attention(q, k, v)).abs().max().item()
    if not error < 1e-4:
        raise RuntimeError(f"differs from eager by {error:.1e}")
    return f"differs from eager by {error:.0e}"


def _cross(target: Target) -> str:
    program = parse(_PROGRAM)
    layout = Layout.of(static_groups(program), frozenset(program.differentiable))
    kernels = cross_compile(program, choose_schedule(program, target, target.descriptors), layout, target)
    if not all(kernel.fits for kernel in kernels):
        raise RuntimeError("a kernel needs more shared memory than a block has")
    return f"{len(kernels)} kernels, at most {max(k.registers for k in kernels)} registers"


def _recompiles() -> Finding:
    limit = torch._dynamo.config.recompile_limit
    return Finding(
        "recompile limit", True,
        f"{limit}: past it Dynamo runs a function in eager, silently; TORCH_LOGS=recompiles shows the causes",
    )  # fmt: skip

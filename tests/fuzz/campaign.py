"""Run random programs through the compiler and judge them against float64. `python -m tests.fuzz.campaign --count 500`."""

from __future__ import annotations

import argparse
import sys
import unittest.mock
from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.backend import attncompiler, compile_or_leave
from tests.fuzz.programs import Program


@dataclass(frozen=True)
class Verdict:
    """`wrong` is empty where output and gradients hold the budget; `regions` counts what was taken."""

    program: Program
    regions: int
    wrong: str


def judge(program: Program, inner: str = "aot_eager", train: bool = True) -> Verdict:
    """Error of the compiled program at most twice that of eager in the same dtype, both against float64."""
    torch._dynamo.reset()
    if program.seed % 2:  # small tiles, so that small problems have many: what large ones meet
        small = {"_BLOCK_Q": 8, "_BLOCK_KV": 4, "_WHOLE": 0, "_ELEMENTS": 64}
        with unittest.mock.patch.multiple("attncompiler.codegen.portable_tiles", **small):
            return _judge(program, inner, train)
    return _judge(program, inner, train)


def _judge(program: Program, inner: str, train: bool) -> Verdict:
    regions = 0

    def backend(module, inputs):  # type: ignore[no-untyped-def]
        nonlocal regions
        regions += len(compile_or_leave(module, inputs).sites)
        return attncompiler(module, inputs, options={"inner": inner})

    compiled = torch.compile(program.__call__, backend=backend)
    for salt in (0, 1):  # other values and lengths the second time: nothing of the first call may be baked in
        exact = _run(program, program.inputs(torch.float64, salt), train)
        eager = _run(program, program.inputs(salt=salt), train)
        ours = _run(compiled, program.inputs(salt=salt), train)
        for name, reference in exact.items():
            if name not in eager or name not in ours:
                continue  # gradients were not asked for: the output itself is NaN
            problem = _compare(name, reference, eager[name], ours[name], program.choice["dtype"])
            if problem:
                return Verdict(program, regions, f"call {salt}: {problem}")
    return Verdict(program, regions, "")


def _run(f, inputs: dict[str, Tensor], train: bool) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    out = f(inputs)
    results = {"output": out.detach()}
    if train:
        weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape)
        loss = (torch.nan_to_num(out) * weights.to(out.dtype)).sum()
        if not out.isnan().any():  # gradients of rows that are NaN are NaN in one way or another
            names = [name for name, t in inputs.items() if t.requires_grad]
            grads = torch.autograd.grad(loss, [inputs[name] for name in names], allow_unused=True)
            results |= {f"grad of {n}": torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(names, grads, strict=True)}
    return results


def _compare(name: str, exact: Tensor, eager: Tensor, ours: Tensor, dtype: torch.dtype) -> str:
    if ours.shape != eager.shape or ours.dtype != eager.dtype:
        return f"{name} is {ours.dtype} {tuple(ours.shape)}, eager {eager.dtype} {tuple(eager.shape)}"
    finite, ours_finite = torch.isfinite(eager), torch.isfinite(ours)
    # a row that keeps no key, its weights set to 0 afterwards: eager's backward multiplies 0 by NaN, ours gives the 0 that is meant
    spurious = ours_finite & eager.isnan() if name.startswith("grad of") else torch.zeros_like(finite)
    if not torch.equal(finite | spurious, ours_finite):
        return f"{name} is finite where eager is not, or the other way round"
    both = finite & torch.isfinite(exact)
    exact, eager, ours = (t.double().masked_fill(~both, 0.0) for t in (exact, eager, ours))
    scale = exact.abs().max().item() if exact.numel() else 0.0
    allowed = (
        2 * (eager - exact).abs().max().item() + (16 if dtype == torch.bfloat16 else 64) * torch.finfo(dtype).eps * max(scale, 1.0)
        if exact.numel()
        else 0.0
    )
    error = (ours - exact).abs().max().item() if exact.numel() else 0.0
    return "" if error <= allowed else f"{name} is off by {error:.2e}, allowed {allowed:.2e}"


def main() -> int:
    """Exit code 1 if any program is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--inner", default="aot_eager", choices=["inductor", "aot_eager", "eager"])
    arguments = parser.parse_args()
    wrong = taken = 0
    for seed in range(arguments.first, arguments.first + arguments.count):
        program = Program(seed)
        try:
            verdict = judge(program, arguments.inner)
        except Exception as error:
            verdict = Verdict(program, 0, f"{type(error).__name__}: {str(error)[:300]}")
        taken += verdict.regions > 0
        if verdict.wrong:
            wrong += 1
            print(f"{program}\n    {verdict.regions} taken: {verdict.wrong}", flush=True)
        if sys.stderr.isatty():
            print(f"\r{seed + 1 - arguments.first}/{arguments.count}", end="", file=sys.stderr)
    print(f"{arguments.count} programs: {taken} taken, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

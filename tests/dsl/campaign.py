"""Random configurations of every mask rule, judged. `python -m tests.dsl.campaign --pairs 1000 --runs 1000`.

pairs: every pair against the definition, in all forms that a mask has. runs: forward and gradients by the portable lowering against
the float64 interpreter. kernels: the same by the emitted kernels in Triton's interpreter (run with TRITON_INTERPRET=1)."""

from __future__ import annotations

import argparse
import os
import sys
import time
import unittest.mock
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from attncompiler.codegen import portable, portable_tiles
from attncompiler.dsl.attention import declare
from attncompiler.passes.plan import Coverage, TilePlan
from attncompiler.runtime import triton_launch
from tests.dsl.rules import RULES, Case, case
from tests.programs import judge_on


def judge_pairs(found: Case, seed: int) -> str:
    """What is wrong with the pairs of a mask, "" if nothing: in the matrix, in plain torch, in counts, in plans of three tiles."""
    mask, expected, s = found.mask, found.expected, found.sizes
    shape = s.b, s.h, s.m, s.n
    if not torch.equal(mask.dense(*shape).expand(shape), expected):
        return "the matrix differs"
    places = [torch.arange(size).reshape([-1] + [1] * (3 - axis)) for axis, size in enumerate(shape)]
    if not torch.equal(mask.on(*places).expand(shape), expected):
        return "plain torch differs"
    if (count := mask.kept_pairs(*shape)) != int(expected.sum()):
        return f"{count} pairs counted, {int(expected.sum())} kept"
    if mask.keeps_nothing(*shape) == bool(expected.any()):
        return "whether it keeps nothing is wrong"
    for block_q, block_kv in ((1, 1), (4, 8), (3 + seed % 5, 2 + seed % 7)):
        plan = mask.plan(*shape, block_q, block_kv)
        for one, dense in ((plan, expected), (plan.transposed(), expected.mT)):
            if wrong := _judge_plan(one, dense):
                return f"tiles of {one.block_q} x {one.block_kv}{' by keys' if one is not plan else ''}: {wrong}"
    return ""


def _judge_plan(plan: TilePlan, expected: Tensor) -> str:
    """Full tiles hold every pair, tiles that are left out hold none."""
    b, h, m, n = expected.shape
    rows = torch.arange(m).unsqueeze(1) // plan.block_q
    kinds = plan.coverage[:, :, rows, torch.arange(n) // plan.block_kv].expand(b, h, m, n)
    if bool((expected & (kinds == Coverage.EMPTY)).any()):
        return "a tile that is left out holds a pair"
    return "a full tile misses a pair" if bool((~expected & (kinds == Coverage.FULL)).any()) else ""


def judge_run(found: Case, seed: int, lowering: ModuleType, dtype: torch.dtype) -> str:
    """What is wrong with O, lse and the gradients of a lowering; "" if nothing."""
    s = found.sizes
    d, dv = ((8, 5), (16, 16))[dtype != torch.float64]
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(s.b, s.h, length, size, generator=generator, dtype=torch.float64).to(dtype)
               for length, size in ((s.m, d), (s.n, d), (s.n, dv)))  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*keeps no key.*")
        declared = declare(q, k, v, keep=found.mask)
    names = [decl.name for decl in declared.program.tensors]
    made = dict(zip(names, (q, k, v, *declared.captured), strict=True))
    small = {"_BLOCK_Q": 8, "_BLOCK_KV": 4, "_WHOLE": 0, "_ELEMENTS": 64}  # so that small problems have many tiles
    with unittest.mock.patch.multiple(portable_tiles, **small):
        try:
            judge_on(lowering, declared.program, made, runs=1)
        except AssertionError as error:
            return str(error)
    return ""


def verdicts(what: str, rules: tuple[str, ...], seeds: range) -> Iterator[tuple[Case, str]]:
    """Every case with what is wrong with it; runs take the rules by turns."""
    for seed in seeds:
        for rule in rules if what == "pairs" else (rules[seed % len(rules)],):
            found = case(rule, seed)
            if what != "pairs" and found.expected[0, 0].numel() > 2400:  # pairs in one head: a run is for its clauses, not its size
                continue
            try:
                if what == "pairs":
                    wrong = judge_pairs(found, seed)
                elif what == "runs":
                    wrong = judge_run(found, seed, portable, torch.float64)
                else:
                    wrong = judge_run(found, seed, triton_launch, torch.float32)
            except Exception as error:
                wrong = f"{type(error).__name__}: {str(error)[:300]}"
            yield found, wrong


def main() -> int:
    """Exit code 1 if anything is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=0, help="configurations of each rule, pair by pair")
    parser.add_argument("--runs", type=int, default=0, help="configurations in all, forward and gradients, portable lowering")
    parser.add_argument("--kernels", type=int, default=0, help="the same through kernels; needs TRITON_INTERPRET=1")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further configuration after so long")
    parser.add_argument("--rule", action="append", choices=RULES, help="only this rule (may be given several times)")
    arguments = parser.parse_args()
    if arguments.kernels and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--kernels needs TRITON_INTERPRET=1 in the environment")
    rules, failed = tuple(arguments.rule or RULES), 0
    for what in ("pairs", "runs", "kernels"):
        count = getattr(arguments, what)
        judged, wrong, end = dict.fromkeys(rules, 0), 0, time.monotonic() + arguments.seconds
        for found, problem in verdicts(what, rules, range(arguments.first, arguments.first + count)):
            judged[found.rule] += 1
            if problem:
                wrong += 1
                print(f"{found}\n    {what}: {problem}", flush=True)
            if sys.stderr.isatty():
                print(f"\r{what} {sum(judged.values())}", end="", file=sys.stderr)
            if time.monotonic() > end:
                break
        if count:
            of_each = ", ".join(f"{rule} {times}" for rule, times in judged.items())
            print(f"{what}: {sum(judged.values())} configurations, {wrong} wrong ({of_each})", flush=True)
        failed += wrong
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

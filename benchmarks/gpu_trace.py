"""Where the time of a kernel goes: clock readings of its two computing groups, on a GPU with warp roles (sm_90).

    python benchmarks/gpu_trace.py [--only circle-r16,na2d-17x17,documents] [--kernel keys|queries|forward]

The emitted source is given a reading of the clock between its steps, by text, so a run is some 30 % slower than without: compare shares
and medians. Of long rows the first readings are kept. Cycles are of one multiprocessor's clock; "n" counts the steps of both groups of
a few programs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
from gpu_ab import masks_of
from gpu_masks import cases
from tabulate import tabulate
from torch import Tensor

from attncompiler import masks
from attncompiler.codegen import kernel_module
from attncompiler.dsl.attention import declare
from attncompiler.runtime import prepared, triton_launch
from attncompiler.runtime.outputs import attention_outputs

_MOST = 4096  # readings of a group
_WORDS_BEFORE = 1024  # of the memory that the readings follow
_PROGRAMS = 6  # that are looked at
_LOG = '''
@gluon.jit
def _log(log, count, what: gl.constexpr, where):
    """Write which step ends now, and the clock."""
    now = gl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r,r", [where], dtype=gl.int32, is_pure=False, pack=1)
    writes = (where == 0) & (count < {most})
    gl.store(log + count * 2 + where * 0, now * 0 + what, mask=writes)
    gl.store(log + count * 2 + 1 + where * 0, now, mask=writes)
    return count + 1


'''


def _backward(waited: str, freed: str) -> list[tuple[str, str, int]]:
    """`waited`: the first of what the last products of a tile make; `freed`: whose place is free then."""
    return [
        ("next message", r"words = _heard\(words_of", 1),
        ("row set up, what stays there", r"after = ranges", -1),
        ("from tile to tile", r"mbarrier\.wait\(ready", -1),
        ("wait for a tile", r"mbarrier\.wait\(ready", 1),
        ("first product", r"qk = warpgroup_mma_wait", 1),
        ("weights", r"dp = warpgroup_mma_wait", -1),
        ("second product", r"dp = warpgroup_mma_wait", 1),
        ("slopes", rf"warpgroup_mma_wait\(0, \({waited}", -1),
        ("last products, or none", rf"mbarrier\.arrive\(free\.index\({freed}", -1),
        ("gradients written", r"turn \+= 1", -1),
    ]


# Steps, and the line of a group's code before (-1) or behind (1) which each ends: the last line that fits, or, of the forward, all.
_STEPS = {
    "keys": _backward("dv", "slot"),
    "queries": _backward("moved", r"gl\.maximum"),
    "forward": [
        ("next message", r"words = _heard\(words_of", 1),
        ("row set up, queries there", r"mbarrier\.wait\(q_ready", 1),
        ("from tile to tile", r"mbarrier\.wait\(k_ready", -1),
        ("wait for keys", r"mbarrier\.wait\(k_ready", 1),
        ("label, positions", r"mbarrier\.wait\(v_ready", -1),
        ("wait for values", r"mbarrier\.wait\(v_ready", 1),
        ("product of keys", r"qk = warpgroup_mma_wait", 1),
        ("softmax", r"acc = warpgroup_mma_wait", -1),
        ("product of values", r"acc = warpgroup_mma_wait", 1),
        ("sums over threads", r"rcp = ", -1),
        ("outputs written", r"turn \+= 1", -1),
    ],
}


_ROW_BEGINS = "next message"
_WAITS = (
    "wait for a tile",
    "wait for keys",
    "wait for values",
    "product of keys",
    "softmax",
)  # that are told apart in a row's first tile


def traced(source: str, kernel: str) -> str:
    """Emitted source whose groups of one kernel, "keys", "queries" or "forward", write down what they do and when."""
    forward = kernel == "forward"
    groups, name = ("_rows", "attention_forward") if forward else (f"_rows_{kernel}", f"attention_backward_{kernel}")
    begin = source.index(f"@gluon.jit\ndef {groups}(")
    rows = source[begin : source.index("\n\n\n", begin) + 1]
    behind, group = ("Lse", "GROUP") if forward else ("Delta", "PART")
    words = "B * H * M" if forward else "(B * H * M + 3) // 4 * 8"
    memory = f"{behind}.to(gl.pointer_type(gl.int32)) + {words} + {_WORDS_BEFORE} + (gl.program_id(0) * 2 + {group})"
    text = source.replace(
        rows, _LOG.format(most=_MOST) + _with_readings(rows, kernel, "keys = " if forward else "within = ", memory)
    )
    handed = re.search(r"    operands = \((.*)\)\n", text[text.index(f"@gluon.jit\ndef {name}(") :])
    assert handed is not None
    return text.replace(f"({handed[1]}) = operands\n", f"({handed[1]}, B) = operands\n").replace(
        handed[0], f"    operands = ({handed[1]}, B)\n"
    )


def _with_readings(rows: str, kernel: str, first: str, memory: str) -> str:
    """The code of the groups with readings into `memory`, which may begin behind the line that starts with `first`."""
    plain, lines, steps = rows.splitlines(), [], _STEPS[kernel]
    where = first.split()[0]
    ends = [[at for at, line in enumerate(plain) if re.search(text, line)] for _, text, _ in steps]
    ends = ends if kernel == "forward" else [found[-1:] for found in ends]
    for at, line in enumerate(plain):
        found = [place for place in range(len(steps)) if at in ends[place]]
        indent = " " * (len(line) - len(line.lstrip()))
        logs = {place: f"{indent}log_count = _log(log, log_count, {place}, {where})" for place in found}
        lines += [logs[place] for place in found if steps[place][2] < 0]
        lines.append(line)
        lines += [logs[place] for place in found if steps[place][2] > 0]
        if line.strip().startswith(first):
            lines += [f"    log = {memory} * {2 * _MOST}", "    log_count = 0"]
    return "\n".join(lines) + "\n"


def _case(name: str) -> tuple[masks.Mask, int, int]:
    """A mask, how many tokens and how many heads it is for: one of `gpu_masks.py`, or a dozen causal documents."""
    if name == "documents":
        return masks_of(masks)["documents"](), 16384, 16
    case = next(case for case in cases() if case.name == name)
    return case.mask, case.tokens, case.heads


def _readings(case_name: str, kernel: str, d: int) -> Tensor:
    """int32 [programs, groups, readings, (step, clock)] of one run of a kernel."""
    mask, tokens, heads = _case(case_name)
    memory: list[Tensor] = []

    def zeros(size: int, **options: object) -> Tensor:
        """The memory that ends with the counters of rows, with room for the readings behind them."""
        memory.append(torch.zeros(size + _WORDS_BEFORE + 2 * 2 * _MOST * 256, **options))  # type: ignore[call-overload]
        return memory[-1]

    def outputs(*arguments: object) -> tuple[Tensor, Tensor]:
        """O, and an lse with room for the readings behind it."""
        o, lse = attention_outputs(*arguments)  # type: ignore[arg-type]
        memory.append(torch.zeros(lse.numel() + _WORDS_BEFORE + 2 * 2 * _MOST * 256, device=lse.device))
        return o, memory[-1][: lse.numel()].view(lse.shape)

    load = kernel_module.load_module
    begins = "def _rows(" if kernel == "forward" else f"def _rows_{kernel}("
    prepared.load_module = lambda source: load(traced(source, kernel) if begins in source else source)
    if kernel == "forward":
        triton_launch.attention_outputs = outputs
    triton_launch.torch = SimpleNamespace(**{**vars(torch), "zeros": zeros})
    qkv = [torch.randn(1, heads, tokens, d, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    declared = declare(*qkv, keep=mask)
    program = declared.program
    made = dict(zip((tensor.name for tensor in program.tensors), (*qkv, *declared.captured), strict=True))
    for _ in range(3):
        o, lse, rcp = triton_launch.forward(program, made, {}, True)
        if kernel != "forward":
            triton_launch.backward(program, made, {}, o, lse, rcp, torch.randn_like(o), None, frozenset("qkv"))
    counters = lse.numel() if kernel == "forward" else -(-lse.numel() // 4) * 8  # behind reference and delta
    words = memory[-1][counters + _WORDS_BEFORE :].view(torch.int32)[: _PROGRAMS * 4 * _MOST]
    return words.view(_PROGRAMS, 2, _MOST, 2).cpu()


def table(readings: Tensor, kernel: str) -> str:
    """What each step takes, the longest in all first."""
    took: dict[str, list[int]] = defaultdict(list)
    for group in readings.flatten(0, 1):
        steps, clocks = group[group[:, 1] != 0].to(torch.int64).unbind(1)
        of_row: set[int] = set()
        for step, before, now in zip(steps[1:].tolist(), clocks[:-1].tolist(), clocks[1:].tolist(), strict=True):
            name = _STEPS[kernel][step][0]
            took[f"{name}, a row's first" if name in _WAITS and step not in of_row else name].append((now - before) & 0xFFFFFFFF)
            of_row = {step} if name == _ROW_BEGINS else of_row | {step}
    total = sum(map(sum, took.values()))
    rows = []
    for name, cycles in sorted(took.items(), key=lambda item: -sum(item[1])):
        found = torch.tensor(cycles, dtype=torch.float32)
        middle, most = found.quantile(torch.tensor([0.5, 0.9])).tolist()
        rows.append([name, len(cycles), f"{found.mean():.0f}", f"{middle:.0f}", f"{most:.0f}", f"{sum(cycles) / total:.3f}"])
    return tabulate(rows, ["step", "n", "mean cycles", "median", "90 %", "share"], tablefmt="github")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="na2d-17x17,circle-r16")
    parser.add_argument("--kernel", default="keys", choices=list(_STEPS))
    parser.add_argument("--d", type=int, default=128)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("no GPU with warp roles here")
        return 1
    for name in arguments.only.split(","):
        print(f"\n{name}, {arguments.kernel}\n")
        print(table(_readings(name, arguments.kernel, arguments.d), arguments.kernel))
    return 0


if __name__ == "__main__":
    sys.exit(main())

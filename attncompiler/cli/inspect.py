"""`attncompiler inspect`: the kernels of a function, as source, program, PTX, SASS or resources, for any target, with no GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tabulate import tabulate

from attncompiler.cli.page import page
from attncompiler.cli.progress import steps
from attncompiler.cli.subject import load
from attncompiler.codegen.cross_compile import CompiledKernel, cross_compile, kernels_of
from attncompiler.codegen.cross_compile_state import cross_compile_state
from attncompiler.codegen.emission import Layout
from attncompiler.codegen.emit_state import StateEmission, shown_choice, state_source
from attncompiler.codegen.recurrence import Recurrence, undivided
from attncompiler.errors import OptionError
from attncompiler.explain import kernel_sources, preview_site, trace
from attncompiler.ir.expr import ONE
from attncompiler.ir.phase_text import work_text
from attncompiler.ir.program import Attention
from attncompiler.ir.text import to_text
from attncompiler.passes.site import Site
from attncompiler.runtime.lowering import unsupported
from attncompiler.runtime.preview import Preview
from attncompiler.runtime.triton_launch import static_groups
from attncompiler.state_region import StateUse
from attncompiler.tuning.schedule import Schedule
from attncompiler.tuning.target import Target, target_named


@dataclass(frozen=True)
class Inspected:
    """One region: the user's line, its program as text, the generated source ("" where it has no GPU kernel, with the reason), each
    of its kernels, to be compiled; and what runs of an attention."""

    line: str
    text: str
    source: str
    reason: str
    kernels: Sequence[Callable[[], CompiledKernel]]
    preview: Preview | None = None


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 if the function has no region, or one without a kernel."""
    subject = load(arguments.subject, arguments.input)
    sites, states = trace(subject.call, *subject.args, **subject.kwargs)
    target = target_named(arguments.target)
    regions = [*(_attention(site, target) for site in sites), *(_state(use, target) for use in states)]
    if not regions:
        print("No attention found; `attncompiler explain` says why.", file=sys.stderr)
        return 1
    chosen = list(enumerate(regions))
    if arguments.region is not None:
        if not 0 <= arguments.region < len(regions):
            raise OptionError(
                f"there is no region {arguments.region}", do=f"{arguments.subject} has regions 0 to {len(regions) - 1}"
            )
        chosen = [chosen[arguments.region]]
    if arguments.html:
        Path(arguments.html).write_text(page(subject.name, regions))
        print(f"wrote {arguments.html}", file=sys.stderr)
    if arguments.show in ("source", "ir"):
        texts = [r.source or f"# no GPU kernel: {r.reason}\n" if arguments.show == "source" else r.text for _, r in chosen]
        print(json.dumps(texts) if arguments.json else "\n".join(texts))
    else:
        _compiled(arguments, chosen)
    return 1 if any(r.reason for _, r in chosen) else 0


def _attention(site: Site, target: Target) -> Inspected:
    program, preview, reason = site.program, preview_site(site, target), unsupported(site.program)
    line, text = program.origin.line, to_text(program)
    if reason:
        return Inspected(line, text, "", reason, (), preview)

    def kernel(run: Attention, schedule: Schedule, layout: Layout, name: str) -> CompiledKernel:
        (found,) = cross_compile(run, schedule, layout, target, [name])
        return found

    kernels = []
    running = [(part.program, shown.schedule) for part, shown in preview.parts] or [(program, preview.schedule)]
    for run, schedule in running:
        layout = Layout.of(static_groups(run), frozenset(run.differentiable))
        kernels += [partial(kernel, run, schedule, layout, name) for name in kernels_of(run, schedule, layout)]
    return Inspected(line, text, "\n\n".join(kernel_sources(program, preview).values()), reason, kernels, preview)


def _state(use: StateUse, target: Target) -> Inspected:
    whole, reason = use.recurrence, use.reason
    text = work_text(whole.program)
    if reason:
        return Inspected(use.line, text, "", reason, ())

    def kernel(parts: Recurrence, name: str) -> CompiledKernel:
        (found,) = cross_compile_state(parts, *shown_choice(parts, target), target, [name])
        return found

    kernels = []
    for parts in (whole,) if whole.weigh == ONE else undivided(whole):
        emission = StateEmission(parts, *shown_choice(parts, target))
        kernels += [partial(kernel, parts, name) for name in (*emission.forward, *emission.backward)]
    return Inspected(use.line, text, state_source(whole, target), reason, kernels)


def _compiled(arguments: argparse.Namespace, chosen: list[tuple[int, Inspected]]) -> None:
    """The views that need machine code: list, resources, ptx, sass."""
    rows: list[list[object]] = [[number, r.line, f"none: {r.reason}"] + [""] * 5 for number, r in chosen if r.reason]
    texts = [""] * len(rows)
    wanted = [(number, region, kernel) for number, region in chosen for kernel in region.kernels]
    for number, region, compile_ in steps(wanted, f"compiling for {arguments.target}"):
        kernel = compile_()
        rows.append([number, region.line, kernel.name, arguments.target, kernel.registers or "?", kernel.spills,
                     kernel.shared, "yes" if kernel.fits else "NO"])  # fmt: skip
        texts.append(kernel.assembly if arguments.show == "ptx" else kernel.sass() if arguments.show == "sass" else "")
    headers = ["region", "where", "kernel", "target", "registers", "spilled bytes", "shared bytes", "fits"]
    if arguments.show in ("ptx", "sass"):
        print(json.dumps(texts) if arguments.json else "\n".join(texts))
    elif arguments.json:
        print(json.dumps([dict(zip(headers, row, strict=True)) for row in rows], indent=2))
    else:
        print(tabulate(rows, headers=headers))

"""`attncompiler inspect`: the kernels of a function, as source, program, PTX, SASS or resources, for any target, with no GPU."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from attncompiler.cli.page import page
from attncompiler.cli.progress import steps
from attncompiler.cli.subject import load
from attncompiler.codegen.cross_compile import cross_compile, kernels_of
from attncompiler.codegen.emission import Layout
from attncompiler.errors import OptionError
from attncompiler.explain import kernel_source, preview_site, trace
from attncompiler.ir.program import Attention
from attncompiler.ir.text import to_text
from attncompiler.runtime.lowering import unsupported
from attncompiler.runtime.preview import Preview
from attncompiler.runtime.triton_launch import static_groups
from attncompiler.tuning.schedule import Schedule
from attncompiler.tuning.target import target_named


@dataclass(frozen=True)
class Inspected:
    """One region: its program, what runs of it, and the generated source ("" where it has no GPU kernel, with the reason)."""

    program: Attention
    preview: Preview
    source: str
    reason: str


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 if the function has no region, or one without a kernel."""
    subject = load(arguments.subject, arguments.input)
    sites, _ = trace(subject.call, *subject.args, **subject.kwargs)
    regions = []
    for site in sites:
        reason = unsupported(site.program)
        shown = preview_site(site, target_named(arguments.target))
        source = "" if reason else kernel_source(site.program, shown.schedule)
        regions.append(Inspected(site.program, shown, source, reason))
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
        texts = [
            r.source or f"# no GPU kernel: {r.reason}\n" if arguments.show == "source" else to_text(r.program) for _, r in chosen
        ]
        print(json.dumps(texts) if arguments.json else "\n".join(texts))
    else:
        _compiled(arguments, chosen)
    return 1 if any(r.reason for _, r in chosen) else 0


def _compiled(arguments: argparse.Namespace, chosen: list[tuple[int, Inspected]]) -> None:
    """The views that need machine code: list, resources, ptx, sass."""
    rows, texts = [], []
    target = target_named(arguments.target)
    wanted = [(number, region, name) for number, region in chosen for name in _kernel_names(region)]
    for number, region, name in steps(wanted, f"compiling for {target.name}"):
        if region.reason:
            rows.append([number, region.program.origin.line, f"none: {region.reason}"] + [""] * 5)
            continue
        (kernel,) = cross_compile(region.program, *_chosen(region), target, [name])
        rows.append([number, region.program.origin.line, kernel.name, target.name, kernel.registers or "?", kernel.spills,
                     kernel.shared, "yes" if kernel.fits else "NO"])  # fmt: skip
        texts.append(kernel.assembly if arguments.show == "ptx" else kernel.sass() if arguments.show == "sass" else "")
    headers = ["region", "where", "kernel", "target", "registers", "spilled bytes", "shared bytes", "fits"]
    if arguments.show in ("ptx", "sass"):
        print(json.dumps(texts) if arguments.json else "\n".join(texts))
    elif arguments.json:
        print(json.dumps([dict(zip(headers, row, strict=True)) for row in rows], indent=2))
    else:
        print(tabulate(rows, headers=headers))


def _kernel_names(region: Inspected) -> list[str]:
    return [""] if region.reason else list(kernels_of(region.program, *_chosen(region)))


def _chosen(region: Inspected) -> tuple[Schedule, Layout]:
    return region.preview.schedule, Layout.of(static_groups(region.program), frozenset(region.program.differentiable))

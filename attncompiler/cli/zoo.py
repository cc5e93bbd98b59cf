"""`attncompiler zoo list | show | run`: published systems, plain and declared, side by side."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from attncompiler.cli.plan import light_text, number_text
from attncompiler.cli.progress import steps
from attncompiler.dsl.pictures import picture
from attncompiler.errors import DeviceError
from attncompiler.ir.expr import TRUE, Const
from attncompiler.ir.text import expr_text, to_text
from attncompiler.passes.placed import placed
from attncompiler.passes.plan import TilePlan, build_boxes, tiles_for
from attncompiler.passes.tile_counts import TileCounts
from attncompiler.state_region import region_of_state
from attncompiler.tuning.speed_of_light import SpeedOfLight, boxes_of, boxes_text, speed_of_light
from attncompiler.tuning.strides import full_strides
from attncompiler.tuning.target import TARGETS, Target, target_named
from attncompiler.zoo import COMMANDED, LINEAR, Example, Size, System, system_named
from attncompiler.zoo.compare import Outcome, compare, eager_bytes, free_bytes
from attncompiler.zoo.programs import Call, Likeness, declared, likeness, recognised
from attncompiler.zoo.states import states_of
from attncompiler.zoo.system import Form

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The subcommands and their options."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, about: str, run: Callable[[argparse.Namespace], int], size: Size | None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.add_argument("--json", action="store_true", help="print plain data instead of tables")
        if size is not None:
            sub.add_argument("name", metavar="NAME", help="a system of `attncompiler zoo list`")
            what = f"size of the example (default {size.value})"
            sub.add_argument("--size", choices=[s.value for s in Size], default=size.value, help=what)
        sub.set_defaults(run=run)
        return sub

    command("list", "list the systems", _list, None)
    show = command("show", "show a system: both forms, its program, mask and plan; nothing is run", _show, Size.REALISTIC)
    show.add_argument("--target", choices=list(TARGETS), default="sm_90", help="GPU to predict for (default sm_90)")
    run = command("run", "run a system: plain, compiled and declared, against float64", _run, Size.SMALL)
    run.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N (default %(default)s)"
    )
    run.add_argument("--dtype", choices=list(_DTYPES), default="f32", help="of the floating inputs (default %(default)s)")


def _list(arguments: argparse.Namespace) -> int:
    found = [{"name": s.name, "title": s.title, "source": s.source, "file": _file(s)} for s in COMMANDED.values()]
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print(
            tabulate([tuple(row.values())[:3] for row in found], headers=("name", "system", "source"), maxcolwidths=[None, 40, 70])
        )
    return 0


def _show(arguments: argparse.Namespace) -> int:
    """Exit code 1 where the two forms end in different programs."""
    system = system_named(arguments.name)
    example, target = system.example(Size(arguments.size)), target_named(arguments.target)
    if system.name in LINEAR:
        return _show_linear(system, example, arguments)
    tasks: tuple[Callable[[], Any], ...] = (partial(declared, system, example), partial(recognised, system.plain, example))
    calls, found = (task() for task in steps(tasks, f"reading {system.name}"))
    plans = [_planned(call, system, example, target) for call in steps(calls, f"planning {system.name}")]
    alike = likeness(found.programs, [call.program for call in calls])
    mask = str(system.mask(*example.indices, **example.numbers)) if system.mask is not None else ""
    if arguments.json:
        shown: dict[str, Any] = {
            "name": system.name, "title": system.title, "source": system.source, "file": _file(system), "note": system.note,
            "plain": source_of(system.plain), "declared": source_of(system.declared), "size": arguments.size,
            "example": _example_text(example), "recognised": [to_text(program) for program in found.programs],
            "missed": [asdict(missed) for missed in found.missed],
            "programs": [to_text(call.program) for call in calls], "likeness": alike.name.lower(), "mask": mask,
            "plans": [asdict(light) for _, light in plans], "pictures": [_picture(*planned) for planned in plans],
        }  # fmt: skip
        print(json.dumps(shown, indent=2))
    else:
        print(f"{system.title}\n{system.source}\n{_file(system)}" + (f"\n{system.note}" if system.note else ""))
        _section("Plain", source_of(system.plain))
        _section("Declared", source_of(system.declared))
        _section(f"Example, {arguments.size}", _example_text(example))
        for program in found.programs:
            _section("Recognised in the plain form", to_text(program))
        for missed in found.missed:
            _section("Left to Inductor", f"{missed.source_location}: {missed.reason}")
        print(f"\nDeclared: {alike.value}.")
        for call, (plan, light) in zip(calls, plans, strict=True):
            if alike is not Likeness.SAME:
                _section("Declared program", to_text(call.program))
            _section("Mask", mask or _keep_text(call))
            _section("Plan", f"{_picture(plan, light)}\n\n{light_text({}, light)}")
    return 0 if alike is not Likeness.DIFFERENT and calls else 1


def _show_linear(system: System, example: Example, arguments: argparse.Namespace) -> int:
    """Exit code 1 where the declared form has no state."""
    forms = {name: states_of(form, example) for name, form in (("plain", system.plain), ("declared", system.declared))}
    if arguments.json:
        shown: dict[str, Any] = {
            "name": system.name, "title": system.title, "source": system.source, "file": _file(system), "note": system.note,
            "plain": source_of(system.plain), "declared": source_of(system.declared), "size": arguments.size,
            "example": _example_text(example),
            "states": {name: [asdict(region_of_state(use)) for use in found.uses] for name, found in forms.items()},
            "missed": [asdict(missed) for missed in forms["plain"].missed],
        }  # fmt: skip
        print(json.dumps(shown, indent=2))
        return 0 if forms["declared"].uses else 1
    print(f"{system.title}\n{system.source}\n{_file(system)}" + (f"\n{system.note}" if system.note else ""))
    _section("Plain", source_of(system.plain))
    _section("Declared", source_of(system.declared))
    _section(f"Example, {arguments.size}", _example_text(example))
    for name, title in (("plain", "Recognised in the plain form"), ("declared", "Declared program")):
        for use in forms[name].uses:
            region = region_of_state(use)
            _section(title, "\n".join([region.ir.rstrip(), "", *region.notes]))
    for missed in forms["plain"].missed:
        _section("Left to Inductor", f"{missed.source_location}: {missed.reason}")
    return 0 if forms["declared"].uses else 1


_TILE = 128, 128  # of half precision on a target with warp roles; the examples are traced in float32


def _planned(call: Call, system: System, example: Example, target: Target) -> tuple[TilePlan, SpeedOfLight]:
    """The plan for a picture, and its numbers: boxes of a grid where the mask is one of a grid."""
    b, h, m, n = call.extents
    if system.mask is not None:  # a rule may know how many it keeps
        kept = system.mask(*example.indices, **example.numbers).kept_pairs(b, h, m, n)
    else:
        kept = call.kept_pairs()
    channels = call.program.value.shape[-1]
    assert isinstance(channels, Const)
    tiles = tiles_for(call.program, call.sizes, *_TILE)
    plan = build_boxes(call.program, call.sizes, tiles, False, torch.device("cpu")) if tiles else call.plan(*_TILE)
    strides = full_strides(call.program.keep.predicate, m, *_TILE) if m == n else ()
    counts, shape = TileCounts.of(plan, b, h), (b, h, m, n, int(channels.value))
    light = speed_of_light(counts, kept, shape, target, boxes=boxes_of(tiles), full_strides=strides)
    return placed(plan, tiles) if tiles else plan, light


def _picture(plan: TilePlan, light: SpeedOfLight) -> str:
    return picture(plan, boxes=boxes_text(light.boxes) if light.boxes else "")


def _run(arguments: argparse.Namespace) -> int:
    """Exit code 1 where a form exceeds twice eager's error."""
    system, device = system_named(arguments.name), _device(arguments.device)
    example = system.example(Size(arguments.size))
    linear = system.name in LINEAR  # no tiles of pairs are visited there
    calls = [] if linear else declared(system, example)
    alike = likeness([] if linear else recognised(system.plain, example).programs, [call.program for call in calls])
    needed, free = eager_bytes(states_of(system.declared, example).uses if linear else calls), free_bytes(device)
    judged = needed <= free
    forms = compare(system, example, device, _DTYPES[arguments.dtype], judged)
    outcomes = [next(forms) for _ in steps(range(3 if judged else 2), f"running {system.name}")]
    counts = [call.tiles() for call in calls]
    visited, dense = (sum(of_call[place] for of_call in counts) for place in (0, 1))
    compiled = None if alike is Likeness.DIFFERENT else visited
    tiles = {} if linear else {"plain, eager": dense, "plain, compiled": compiled, "declared": visited}
    if arguments.json:
        rows = [{**asdict(o), "tiles": tiles.get(o.form), "agrees": o.agrees} for o in outcomes]
        print(json.dumps({"name": system.name, "size": arguments.size, "device": str(device), "dtype": arguments.dtype,
                          "judged": judged, "dense_tiles": dense, "forms": rows}, indent=2))  # fmt: skip
    else:
        table = []
        for o in outcomes:
            times = f"{o.first_s:.2f}", f"{o.forward_ms:.2f}", f"{o.backward_ms:.2f}"
            table.append((o.form, *times, f"{number_text(tiles[o.form])} of {dense:,}" if tiles else "-", *_judgement(o)))
        headers = ("form", "first call s", "forward ms", "backward ms", "tiles of 128 x 128", "error", "of budget", "agrees")
        print(f"{system.title}: {_example_text(example)}, {arguments.dtype} on {device}\n")
        print(tabulate(table, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 6, "left")))
        if not judged:
            print(f"\nNot compared with float64, which needs {needed / 2**30:,.0f} GiB here; {free / 2**30:,.0f} GiB may be used.")
    return 0 if all(outcome.agrees for outcome in outcomes) else 1


def _judgement(outcome: Outcome) -> tuple[str, str, str]:
    if outcome.error is None or outcome.of_budget is None:
        return "-", "-", "not judged"
    return f"{outcome.error:.1e}", f"{outcome.of_budget:.2f}", "yes" if outcome.agrees else "NO"


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"there is no device {text!r}", why=str(error).splitlines()[0], do="give cpu, cuda or cuda:N") from error
    return device


def source_of(form: Form) -> str:
    """A form with the functions and classes of its file that it uses, in the file's order."""
    module = sys.modules[form.__module__]
    own = {name: thing for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__}
    found: dict[str, Any] = {}
    waiting = [form.__name__]
    while waiting:
        name = waiting.pop()
        if name in found or name not in own:
            continue
        found[name] = own[name]
        tree = ast.parse(textwrap.dedent(inspect.getsource(own[name])))
        waiting += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    ordered = sorted(found.values(), key=lambda thing: inspect.getsourcelines(thing)[1])
    return "\n\n".join(inspect.getsource(thing).rstrip() for thing in ordered)


def _file(system: System) -> str:
    path = Path(inspect.getsourcefile(inspect.unwrap(system.plain)) or "")
    return "/".join(path.parts[-3:])


def _example_text(example: Example) -> str:
    inputs = [str(list(given.shape if isinstance(given, torch.Tensor) else given)) for given in example.inputs]
    return ", ".join([*inputs, *(f"{name}={value}" for name, value in example.numbers.items())])


def _keep_text(call: Call) -> str:
    predicate = call.program.keep.predicate
    return "all pairs" if predicate == TRUE else expr_text(predicate)


def _section(title: str, body: str) -> None:
    print(f"\n{title}\n\n{textwrap.indent(body.rstrip(), '    ')}")

"""`attncompiler plan`: what a mask keeps and costs at a shape, without running anything."""

from __future__ import annotations

import argparse
import ast
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from attncompiler import masks
from attncompiler.cli.strides import check_neighbourhood, stride_rows, stride_table
from attncompiler.dsl.attention import declare
from attncompiler.dsl.pictures import picture, png, svg
from attncompiler.errors import OptionError
from attncompiler.masks import Mask
from attncompiler.passes.grid import ROWS
from attncompiler.passes.placed import lattice_plan, placed
from attncompiler.passes.plan import TilePlan
from attncompiler.passes.tile_counts import TileCounts, grid_counts, grid_rule_of, shapes_of
from attncompiler.runtime.preview import preview
from attncompiler.tuning.speed_of_light import Boxes, SpeedOfLight, boxes_of, boxes_text, sides_text, speed_of_light, tile_work
from attncompiler.tuning.strides import full_strides, strides_text
from attncompiler.tuning.target import Target, target_named

_NAMES: dict[str, Callable[..., Mask]] = {name: getattr(masks, name) for name in masks.__all__ if name not in ("Mask", "where")}
_BEST = "best"  # --lattice without shapes

Shape = tuple[int, int, int, int, int]  # B, H, queries, keys, D


@dataclass(frozen=True)
class _Planned:
    """What a mask costs in tiles of some kind, and these tiles as a picture shows them. `build_ms`: as in Preview. `parts`: queries and
    keys of what runs part by part, which a picture shows in runs of tokens."""

    light: SpeedOfLight
    drawn: Callable[[], TilePlan]
    build_ms: float
    parts: tuple[tuple[int, int], ...] = ()


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 for a mask that keeps nothing."""
    mask, target = parse_mask(arguments.mask), target_named(arguments.target)
    numbers = _numbers(arguments.shape, "--shape", (4, 5), "B,H,N,D or B,H,M,N,D")
    b, h, m, n, d = numbers if len(numbers) == 5 else (*numbers[:3], *numbers[2:])
    shape = b, h, m, n, d
    head = arguments.head
    if head is not None and not 0 <= head < h:
        raise OptionError(f"--head {head}: the shape has {h} heads", do=f"give one from 0 to {h - 1}")
    if arguments.row_major and (arguments.lattice or arguments.strides):
        raise OptionError("--row-major has no boxes, which --lattice and --strides are about", do="give one of them")
    found = _planned(mask, shape, target, arguments)
    light = found.light
    rows = []
    if arguments.strides:
        axes = check_neighbourhood(mask, shape)
        lattice = light.boxes if arguments.lattice not in (None, _BEST) else None
        rows = stride_rows(axes, shape, light.tile, bool(arguments.lattice), lattice, target)
    boxes = boxes_text(light.boxes) if light.boxes and not found.parts else ""
    if arguments.svg:
        Path(arguments.svg).write_text(svg(found.drawn(), head=head, boxes=boxes))
    if arguments.png:
        Path(arguments.png).write_bytes(png(found.drawn(), head=head, boxes=boxes))
    shown = {"mask": str(mask), "shape": list(shape), "target": arguments.target, "lattice": bool(arguments.lattice)}
    if arguments.json:
        strides = {"strides": [asdict(row) for row in rows]} if arguments.strides else {}
        print(json.dumps({**shown, "build_ms": found.build_ms, **asdict(light), "parts": found.parts, **strides}, indent=2))
    else:
        print(light_text({**shown, "build_ms": found.build_ms}, light, found.parts))
        if arguments.picture:
            print("\n" + picture(found.drawn(), head=head, boxes=boxes))
        if arguments.strides:
            print("\n" + stride_table(rows))
        if light.visited_tiles == 0:
            print("\nThis mask keeps no key for any query.")
    return 1 if light.visited_tiles == 0 else 0


def _planned(mask: Mask, shape: Shape, target: Target, arguments: argparse.Namespace) -> _Planned:
    """In the tiles that would run; or as --lattice, --row-major and --tile say."""
    kept = mask.kept_pairs(*shape[:4])
    tile = _numbers(arguments.tile, "--tile", (2,), "QUERIES,KEYS") if arguments.tile else None
    _warm_up()
    if arguments.lattice:
        return _on_lattice(mask, shape, target, arguments.lattice, tile, kept)
    if tile or arguments.row_major:
        return _in_tiles(mask, shape, target, tile or (128, 128), arguments.row_major, kept)
    return _as_run(mask, shape, target, kept)


def _warm_up() -> None:
    """What is loaded at the first plan is not the plan's time."""
    for small in (masks.causal(), masks.grid((8, 32), 3)):
        small.plan_in(tiles, 1, 1, 256, 256) if (tiles := small.tiles(1, 1, 256, 256, 16, 16)) else small.plan(1, 1, 256, 256)


def _as_run(mask: Mask, shape: Shape, target: Target, kept: int | None) -> _Planned:
    """For bfloat16 tensors of this shape, contiguous."""
    b, h, m, n, d = shape
    zero = torch.zeros((), dtype=torch.bfloat16)
    q, k, v = zero.expand(b, h, m, d), zero.expand(b, h, n, d), zero.expand(b, h, n, d)
    with warnings.catch_warnings(action="ignore"):  # of a mask that keeps nothing: it is said below
        declared = declare(q, k, v, keep=mask)
    names = (decl.name for decl in declared.program.tensors)
    operands = dict(zip(names, (q, k, v, *declared.captured), strict=True))
    outlines = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in operands.items()}
    shown = preview(declared.program, {}, outlines, target, operands, kept)
    assert shown.light is not None
    parts = tuple((part.queries[1], part.keys[1]) for part, _ in shown.parts)
    return _Planned(shown.light, shown.draw, shown.build_ms, parts)


def _in_tiles(mask: Mask, shape: Shape, target: Target, tile: tuple[int, ...], row_major: bool, kept: int | None) -> _Planned:
    b, h, m, n, _ = shape
    tiles = ROWS if row_major else mask.tiles(b, h, m, n, *tile)
    start = time.perf_counter()
    plan = mask.plan_in(tiles, b, h, m, n) if tiles else mask.plan(b, h, m, n, *tile)
    build_ms = 1e3 * (time.perf_counter() - start)
    strides = () if row_major or m != n else full_strides(mask.predicate(b, h, m, n), m, *tile)
    light = speed_of_light(TileCounts.of(plan, b, h), kept, shape, target, boxes=boxes_of(tiles), full_strides=strides)
    return _Planned(light, lambda: placed(plan, tiles) if tiles else plan, build_ms)


def _on_lattice(mask: Mask, shape: Shape, target: Target, text: str, tile: tuple[int, ...] | None, kept: int | None) -> _Planned:
    b, h, m, n, _ = shape
    if m != n:
        raise OptionError(f"--lattice is of a grid of queries and keys, not of {m} queries and {n} keys")
    start = time.perf_counter()
    predicate = mask.predicate(b, h, m, n)
    rule = grid_rule_of(predicate, m)
    shapes = shapes_of(rule.lengths, *(tile or (128, 128))) if text == _BEST else [_boxes(text, len(rule.lengths))]
    sizes = tuple(map(math.prod, shapes[0]))
    if tile and sizes != tile:
        raise OptionError(f"--lattice {text} has tiles of {sizes[0]} x {sizes[1]} tokens, --tile says {tile[0]} x {tile[1]}")
    counted = {boxes: grid_counts(rule, *boxes, on_lattice=True) for boxes in shapes}
    boxes = min(shapes, key=lambda each: tile_work(counted[each]))
    build_ms = 1e3 * (time.perf_counter() - start)
    strides = full_strides(predicate, m, *sizes, on_lattice=True, boxes=None if text == _BEST else boxes)
    light = speed_of_light(counted[boxes].times(b * h), kept, shape, target, boxes=boxes, full_strides=strides)
    return _Planned(light, lambda: lattice_plan(rule, *boxes), build_ms)


def _boxes(text: str, axes: int) -> Boxes:
    """2x8x8:2x8x8, or one shape for both."""
    try:
        parts = [tuple(int(side) for side in part.split("x")) for part in text.split(":")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or any(len(part) != axes or min(part) < 1 for part in parts):
        form = sides_text((8,) * axes)
        raise OptionError(
            f"--lattice {text!r} is not a tile of queries and one of keys in {axes} axes",
            do=f"write {form}:{form}, or --lattice alone",
        )
    return parts[0], parts[-1]


def light_text(before: dict[str, Any], light: SpeedOfLight, parts: Sequence[tuple[int, int]] = ()) -> str:
    """A line for each number, for people."""
    rows = {**before, **asdict(light)}
    rows["tile"] = "{} queries x {} keys".format(*light.tile)
    where = ", on a fixed lattice" if rows.pop("lattice", False) else ""
    rows["boxes"] = f"{boxes_text(light.boxes)} (queries:keys){where}" if light.boxes else "runs of tokens"
    rows["full_strides"] = strides_text(light.full_strides)
    lines = [(name.replace("_", " "), number_text(value)) for name, value in rows.items()]
    if parts:
        lines.append(("parts", ", ".join(f"{queries} queries by {keys} keys" for queries, keys in parts)))
    return tabulate(lines, tablefmt="plain", disable_numparse=True)


def parse_mask(text: str) -> Mask:
    """A mask from an expression such as "causal & window(1024)". Raises: OptionError for anything else."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise OptionError(f"{text!r} is no expression of masks", why=str(error.msg)) from error
    return _mask(tree, text)


def _mask(node: ast.expr, text: str) -> Mask:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        left, right = _mask(node.left, text), _mask(node.right, text)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask(node.operand, text)
    call = node if isinstance(node, ast.Call) else None
    if call is not None and isinstance(call.func, ast.Attribute) and call.func.attr == "after":
        return _after(call.func.value, call, text)
    name = call.func if call is not None else node
    if not isinstance(name, ast.Name) or name.id not in _NAMES:
        raise OptionError(f"{ast.unparse(node)!r} in {text!r} is no mask", do=f"the masks are {', '.join(_NAMES)}")
    if call is None:
        return _made(name.id, [], {})
    if name.id == "per_head" and len(call.args) == 1 and isinstance(call.args[0], ast.List):
        return masks.per_head([_mask(element, text) for element in call.args[0].elts])
    try:
        positional = [ast.literal_eval(argument) for argument in call.args[: 1 if name.id == "segments" else None]]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        if name.id == "segments" and len(call.args) == 2 and isinstance(rules := call.args[1], ast.Dict):
            pairs = [ast.literal_eval(key) if key is not None else None for key in rules.keys]
            positional.append({pair: _rule(rule, text) for pair, rule in zip(pairs, rules.values, strict=True)})
    except ValueError as error:
        raise OptionError(f"the arguments of {name.id} in {text!r} must be literals") from error
    return _made(name.id, positional, named)


def _after(node: ast.expr, call: ast.Call, text: str) -> Mask:
    """A mask for queries that come after a number of tokens."""
    try:
        (count,) = (ast.literal_eval(argument) for argument in (*call.args, *call.keywords))
    except ValueError as error:
        raise OptionError(f"{ast.unparse(call)!r} in {text!r}: after takes one number", do="give the tokens before it") from error
    return _mask(node, text).after(count)


def _rule(node: ast.expr, text: str) -> Mask | bool:
    """What segments keeps of a pair: a mask, True or False."""
    return bool(node.value) if isinstance(node, ast.Constant) else _mask(node, text)


def _made(name: str, positional: list[Any], named: dict[str, Any]) -> Mask:
    try:
        return _NAMES[name](*positional, **named)
    except (TypeError, AttributeError) as error:
        raise OptionError(f"{name}: {error}") from error


def _numbers(text: str, option: str, counts: tuple[int, ...], form: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) not in counts or min(found) < 1:
        raise OptionError(f"{option} {text!r} is not {form}")
    return found


def number_text(value: object) -> str:
    """A number for people; "-" for None."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)

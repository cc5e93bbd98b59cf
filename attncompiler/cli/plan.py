"""`attncompiler plan`: what a mask keeps and costs at a shape, without running anything."""

from __future__ import annotations

import argparse
import ast
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from attncompiler import masks
from attncompiler.dsl.pictures import picture, png, svg
from attncompiler.errors import OptionError
from attncompiler.masks import Mask
from attncompiler.passes.grid import ROWS, GridTiles
from attncompiler.passes.plan import TilePlan
from attncompiler.tuning.speed_of_light import speed_of_light
from attncompiler.tuning.target import target_named

_NAMES: dict[str, Callable[..., Mask]] = {name: getattr(masks, name) for name in masks.__all__ if name not in ("Mask", "where")}


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 for a mask that keeps nothing."""
    mask = parse_mask(arguments.mask)
    shape = _numbers(arguments.shape, "--shape", (4, 5), "B,H,N,D or B,H,M,N,D")
    b, h, m, n, d = shape if len(shape) == 5 else (*shape[:2], shape[2], *shape[2:])
    block_q, block_kv = _numbers(arguments.tile, "--tile", (2,), "QUERIES,KEYS")
    for small in (masks.causal(), masks.grid((8, 32), 3)):  # what is loaded at the first plan is not the plan's time
        _planned(small, (1, 1, 256, 256), 16, 16, arguments.row_major)
    start = time.perf_counter()
    plan, tiles = _planned(mask, (b, h, m, n), block_q, block_kv, arguments.row_major)
    build_ms = 1e3 * (time.perf_counter() - start)
    light = speed_of_light(plan, mask.kept_pairs(b, h, m, n), (b, h, m, n, d), target_named(arguments.target))
    found: dict[str, Any] = {
        "mask": str(mask),
        "shape": [b, h, m, n, d],
        "tile": [block_q, block_kv],
        "boxes": [list(tiles.rows), list(tiles.columns)] if tiles else None,
        "target": arguments.target,
        "build_ms": build_ms,
        **asdict(light),
    }
    drawn = mask.plan(b, h, m, n, block_q, block_kv) if tiles and (arguments.svg or arguments.png or arguments.picture) else plan
    head = arguments.head
    if head is not None and not 0 <= head < h:
        raise OptionError(f"--head {head}: the shape has {h} heads", do=f"give one from 0 to {h - 1}")
    if arguments.svg:
        Path(arguments.svg).write_text(svg(drawn, head=head))
    if arguments.png:
        Path(arguments.png).write_bytes(png(drawn, head=head))
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print(tabulate([(name.replace("_", " "), number_text(value)) for name, value in found.items()], tablefmt="plain"))
        if arguments.picture:
            print("\n" + picture(drawn, head=head))
        if light.visited_tiles == 0:
            print("\nThis mask keeps no key for any query.")
    return 1 if light.visited_tiles == 0 else 0


def _planned(
    mask: Mask, shape: tuple[int, int, int, int], block_q: int, block_kv: int, row_major: bool
) -> tuple[TilePlan, GridTiles]:
    """The plan, and the boxes that it is made of, if it is."""
    tiles = ROWS if row_major else mask.tiles(*shape, block_q, block_kv)
    return (mask.plan_in(tiles, *shape) if tiles else mask.plan(*shape, block_q, block_kv)), tiles


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
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)

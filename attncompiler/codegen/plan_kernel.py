"""Predicate -> the kernels that plan it on the device (templates/plan.py), from the bounds that tile_bounds.py writes."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from attncompiler.codegen.text import fill, signature
from attncompiler.codegen.tile_bounds import SIZES, Column, FlatNames, TileBounds
from attncompiler.codegen.triton_expr import HELPERS, pointer_name, size_names
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.expr import Expr, Kind, reads_of
from attncompiler.ir.program import Attention, Empty
from attncompiler.passes.plan import kept_by_witness
from attncompiler.templates import plan

MOST_TILES = 256  # a row of more is walked run by run: its columns are then reduced once, not by every row
_KINDS = (("Full", "full", 2), ("Partial", "partial", 1))
_TABLES = [f"{name}{part}" for name, _, _ in _KINDS for part in ("Count", "Begin", "End")]


@dataclass(frozen=True)
class PlanKernels:
    """A generated file: the kernel `rows`, and for rows of many tiles `columns`, which makes the tables that it reads.

    `tables`: their names and kinds; each holds TILES * TILES + TILES numbers for each batch and head with a plan of its own.
    `reads_columns`: parts of the predicate vary along the columns, whose every position is looked at."""

    source: str
    rows: str
    columns: str
    tables: Mapping[str, Kind]
    reads_columns: bool


def emit_plan(program: Attention, row: str, blocks: Mapping[str, int], is_long: bool) -> PlanKernels:
    """The kernels that plan the tiles of axis `row`. `blocks`: positions of a tile along each axis; `is_long`: rows of many tiles.

    Raises: UnsupportedProgram for a predicate that no rule bounds."""
    column = "kv_idx" if row == "q_idx" else "q_idx"
    helpers: set[str] = set()
    row_names, column_names = (
        FlatNames(program, {}, bounds=frozenset(), helpers=helpers, prefix=prefix) for prefix in ("row_", "column_")
    )
    bounds = TileBounds(program, row, column, blocks, row_names, column_names)
    cover, exprs = _cover(bounds)
    axes = {"row_axis": row, "row_size": SIZES[row], "column_axis": column, "column_size": SIZES[column]}
    values = "\n".join(bounds.row_lines)
    loop = fill(plan.COLUMN_LOOP, **axes, column_values="\n".join(bounds.loop_lines)) if bounds.loop_lines else ""
    reduced = {
        "column_start": "\n".join(bounds.start_lines), "column_loop": loop, "column_end": "\n".join(bounds.end_lines),
    }  # fmt: skip
    name = "plan_rows" if row == "q_idx" else "plan_columns"
    row_text = fill(plan.ROW, **axes, row_values=values)
    if is_long:
        kernels = [_column_tables(bounds, exprs, f"{name}_tables", reduced), _long_rows(bounds, exprs, name, row_text, axes, cover)]
    else:
        ranges = _joined(fill(plan.RANGES, name=kind, kind=str(number)) for kind, _, number in _KINDS)
        begin = "tile * COLUMN_BLOCK", "(tile + 1) * COLUMN_BLOCK"
        parameters = signature([*_operands(program, exprs), *_constants()])
        filled = {**reduced, "row": row_text, "cover": cover.call(*begin), "ranges": ranges}
        kernels = [fill(plan.KERNEL, name=name, parameters=parameters, **filled)]
    used = "\n".join(HELPERS[helper] for helper in sorted(helpers))
    source = "\n".join([f"import triton\nimport triton.language as tl\n{used}", cover.source, *kernels])
    return PlanKernels(
        source,
        name,
        f"{name}_tables" if is_long and bounds.columns else "",
        _tables(bounds) if is_long else {},
        bool(bounds.loop_lines),
    )


@dataclass(frozen=True)
class _Cover:
    """The function that says what is proved of parts of a row; `names`: what it takes besides where these begin and end."""

    source: str
    names: tuple[str, ...]

    def call(self, begin: str, end: str) -> str:
        return f"cover({signature((begin, end, *self.names))})"


def _cover(bounds: TileBounds) -> tuple[_Cover, tuple[Expr, ...]]:
    """The function, and the expressions that it bounds."""
    program, row, column = bounds.program, bounds.row, bounds.column
    predicate = program.keep.predicate
    whole = bounds(predicate)
    exprs: tuple[Expr, ...] = (predicate,)
    empty_rows = ""
    if program.keep.empty is Empty.SCORE:
        kept = kept_by_witness(predicate, program.axes.q_idx, program.axes.kv_idx)
        exprs += (kept,)
        proved = bounds(kept)
        empty_rows = f"coverage = tl.where({proved.lo}, coverage, 1)  # a row that may keep nothing sees every key"
    last = "end > N" if column == "kv_idx" else f"{row}_lo + ROW_BLOCK > N"
    holes = {
        "column_axis": column,
        "column_size": SIZES[column],
        "bounds": "\n".join(bounds.lines),
        "may": f"({whole.hi})",
        "sure": f"({whole.lo})",
        "short_tile": f"coverage = tl.where({last}, tl.minimum(coverage, 1), coverage)",
        "empty_rows": empty_rows,
    }
    names = _free_names(fill(plan.COVER, parameters="begin, end", **holes))
    parameters = [f"{name}: tl.constexpr" if name.endswith("_BLOCK") else name for name in ("begin", "end", *names)]
    return _Cover(fill(plan.COVER, parameters=signature(parameters), **holes), names), exprs


def _free_names(source: str) -> tuple[str, ...]:
    """What a function uses and neither takes nor makes; helpers apart."""
    tree = ast.parse(source)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {
        n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)
    }
    return tuple(sorted({node.id for node in names} - made - {"triton", "tl", "float", *HELPERS}))


def _column_tables(bounds: TileBounds, exprs: tuple[Expr, ...], name: str, reduced: Mapping[str, str]) -> str:
    """The kernel that reduces the columns, once for all rows."""
    if not bounds.columns:
        return ""
    stores = _joined(fill(plan.TABLE_STORES, table=_table(column), name=column.name) for column in bounds.columns)
    parameters = [
        *_reads(bounds.program, exprs),
        *_tables(bounds),
        *_sizes(bounds.program, exprs),
        *_constants("RANGES", "ROW_BLOCK"),
    ]
    return fill(plan.COLUMN_TABLES, name=name, parameters=signature(parameters), stores=stores, **reduced)


def _long_rows(
    bounds: TileBounds, exprs: tuple[Expr, ...], name: str, row_text: str, axes: Mapping[str, str], cover: _Cover
) -> str:
    """The kernel that walks a row of tiles run by run."""

    def loads(place: str) -> str:
        return _joined(fill(plan.TABLE_LOADS, table=_table(column), name=column.name, place=place) for column in bounds.columns)

    def ranges(template: str) -> str:
        return _joined(fill(template, name=kind, count=count, kind=str(number)) for kind, count, number in _KINDS)

    operands = _operands(bounds.program, exprs)
    return fill(
        plan.LONG_ROWS,
        **axes,
        name=name,
        parameters=signature([*_tables(bounds), *operands, *_constants("COLUMNS")]),
        row=row_text,
        run_loads=loads("TILES * TILES + lane"),
        run_cover=cover.call("lane * TILES * COLUMN_BLOCK", "(lane + 1) * TILES * COLUMN_BLOCK"),
        tile_loads=loads("tile"),
        tile_cover=cover.call("tile * COLUMN_BLOCK", "(tile + 1) * COLUMN_BLOCK"),
        ranges=ranges(plan.LONG_RANGES),
        last_ranges=ranges(plan.LAST_RANGES),
    )


def _joined(texts: Iterable[str]) -> str:
    return "\n".join(text.strip("\n") for text in texts)


def _tables(bounds: TileBounds) -> dict[str, Kind]:
    """The tables with the columns' bounds, and what they hold."""
    return {f"{_table(column)}{end}": column.kind for column in bounds.columns for end in ("Lo", "Hi")}


def _table(column: Column) -> str:
    """What the tables of one part are called: tensors are capitalised."""
    return column.name.capitalize()


def _reads(program: Attention, exprs: tuple[Expr, ...]) -> list[str]:
    """The operands that expressions read, with their strides."""
    found = []
    for tensor in dict.fromkeys(r.tensor for e in exprs for r in reads_of(e)):
        found.append(pointer_name(tensor))
        found += [f"stride_{tensor}_{place}" for place in range(len(program.decls[tensor].shape))]
    return found


def _sizes(program: Attention, exprs: tuple[Expr, ...]) -> list[str]:
    return ["M", "N", *size_names(program, exprs)]


def _operands(program: Attention, exprs: tuple[Expr, ...]) -> list[str]:
    """The parameters of a kernel that makes the plan's tables, but for its constants."""
    return [*_reads(program, exprs), *_TABLES, "Order", "Work", "NextRow", *_sizes(program, exprs)]


def _constants(*unused: str) -> list[str]:
    names = ("PLAN_H", "RANGES", "ROW_BLOCK", "COLUMN_BLOCK", "COLUMNS", "TILES")
    return [f"{name}: tl.constexpr" for name in names if name not in unused]


def has_plan_kernel(program: Attention, blocks: Mapping[str, int]) -> bool:
    """True where the predicate reads tensors and each of its parts has a rule. `blocks`: positions of a tile along each axis."""
    if not reads_of(program.keep.predicate):
        return False
    try:
        emit_plan(program, "q_idx", blocks, is_long=False)
    except UnsupportedProgram:
        return False
    return True

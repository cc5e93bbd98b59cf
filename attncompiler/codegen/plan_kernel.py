"""Predicate -> the kernel that plans it on the device: the rules of passes/intervals.py as source.

Takes predicates whose tensor reads vary with one of q_idx and kv_idx; those with one value for each pair are left to plan.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from attncompiler.codegen.text import fill, signature
from attncompiler.codegen.triton_expr import HELPERS, Names, number, pointer_name, size_names, triton
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.expr import Apply, Axis, Const, Expr, Kind, Size, axes_of, reads_of
from attncompiler.ir.program import Attention, Dtype, Empty, kind_of
from attncompiler.passes.plan import kept_by_witness
from attncompiler.templates import plan

MOST_TILES = 4096  # a row of the plan is held in the registers of one program
_SIZES = {"q_idx": "M", "kv_idx": "N"}


@dataclass(frozen=True)
class _Bounds:
    """Source of the smallest and largest value on each tile; for booleans of `sure` and `may`."""

    lo: str
    hi: str
    kind: Kind


@dataclass
class _FlatNames(Names):
    """Positions as they stand: each kernel variable already has the shape that it is used in."""

    def axis(self, name: str) -> str:
        return name


@dataclass
class _Writer:
    program: Attention
    row: str
    column: str
    row_names: Names
    column_names: Names
    row_lines: list[str] = field(default_factory=list)
    start_lines: list[str] = field(default_factory=list)
    loop_lines: list[str] = field(default_factory=list)
    end_lines: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    memo: dict[Expr, _Bounds] = field(default_factory=dict)

    def bounds(self, expr: Expr) -> _Bounds:
        if expr not in self.memo:
            self.memo[expr] = self._bounds(expr)
        return self.memo[expr]

    def _bounds(self, expr: Expr) -> _Bounds:
        kind = kind_of(expr, self.program.decls)
        if isinstance(expr, Const):
            text = number(expr.value) if kind is not Kind.BOOL else f"(tile >= 0) & {expr.value}"
            return _Bounds(text, text, kind)
        if isinstance(expr, Size):
            return _Bounds(expr.name, expr.name, kind)
        axes = axes_of(expr)
        if isinstance(expr, Axis) and expr.name in (self.row, self.column):
            return _Bounds(f"{expr.name}_lo", f"{expr.name}_hi", kind)
        if {self.row, self.column} <= axes:
            if not isinstance(expr, Apply):
                raise UnsupportedProgram("the mask has one value for each pair")
            return self._rule(expr, kind)
        return self._column(expr, kind) if self.column in axes else self._row(expr, kind)

    def _row(self, expr: Expr, kind: Kind) -> _Bounds:
        """Exact along the rows' positions, then reduced."""
        name = f"row{len(self.memo)}"
        value = triton(expr, self.row_names)
        self.row_lines += self.row_names.lines
        self.row_names.lines.clear()
        if self.row not in axes_of(expr):
            self.row_lines.append(f"{name} = {value}")
            return _Bounds(name, name, kind)
        if kind is Kind.BOOL:
            self.row_lines += [f"{name} = ({value}).to(tl.int32)"]
            self.row_lines += [f"{name}_lo = tl.min({name}, 0) != 0", f"{name}_hi = tl.max({name}, 0) != 0"]
            return _Bounds(f"{name}_lo", f"{name}_hi", kind)
        self.row_lines.append(f"{name} = {value}")
        low, high = self._without_nan(name, kind)
        self.row_lines += [f"{name}_lo = tl.min({low}, 0)", f"{name}_hi = tl.max({high}, 0)"]
        return _Bounds(f"{name}_lo", f"{name}_hi", kind)

    def _column(self, expr: Expr, kind: Kind) -> _Bounds:
        """Exact along the columns' positions, reduced tile by tile in the loop."""
        name = f"column{len(self.memo)}"
        value = triton(expr, self.column_names)
        self.loop_lines += self.column_names.lines
        self.column_names.lines.clear()
        if kind is Kind.BOOL:
            value, low, high, dtype = f"({value}).to(tl.int32)", "1", "0", "tl.int32"
        elif kind is Kind.INT:
            wide = any(self.program.decls[read.tensor].dtype is Dtype.I64 for read in reads_of(expr))
            bits = 64 if wide else 32
            value, low, high, dtype = (
                f"({value}).to(tl.int{bits})",
                str(2 ** (bits - 1) - 1),
                str(-(2 ** (bits - 1))),
                f"tl.int{bits}",
            )
        else:
            low, high, dtype = 'float("inf")', 'float("-inf")', "tl.float32"
        self.start_lines += [
            f"{name}_{end} = tl.full([TILES, COLUMNS], {start}, {dtype})" for end, start in (("lo", low), ("hi", high))
        ]
        self.loop_lines.append(f"{name} = {value}")
        below, above = self._without_nan(name, kind)
        self.loop_lines += [
            f"{name}_lo = tl.minimum({name}_lo, {below})",
            f"{name}_hi = tl.maximum({name}_hi, {above})",
        ]
        widen = ".to(tl.int64)" if kind is Kind.INT else ""  # what follows may add and subtract
        self.end_lines += [f"{name}_lo = tl.min({name}_lo, 1){widen}", f"{name}_hi = tl.max({name}_hi, 1){widen}"]
        test = " != 0" if kind is Kind.BOOL else ""
        return _Bounds(f"({name}_lo{test})", f"({name}_hi{test})", kind)

    @staticmethod
    def _without_nan(name: str, kind: Kind) -> tuple[str, str]:
        """NaN compares false with everything: nothing may be proved of it."""
        if kind is not Kind.FLOAT:
            return name, name
        known = f"{name} == {name}"
        return f'tl.where({known}, {name}, float("-inf"))', f'tl.where({known}, {name}, float("inf"))'

    # ---------------------------------------------------------------------------------------------------------- rules

    def _rule(self, expr: Apply, kind: Kind) -> _Bounds:
        args = [self.bounds(arg) for arg in expr.args]
        op = expr.op
        if op in ("floordiv", "mod"):
            lo, hi = self._division(op, args[0], expr.args[1])
        elif op == "mul" and expr.args[0] == expr.args[1] and kind is Kind.INT:
            low, high = _RULES["abs"](args[0])
            lo, hi = f"({low}) * ({low})", f"({high}) * ({high})"
        elif op == "mul":
            lo, hi = self._product(args[0], args[1])
        elif op == "where":
            lo, hi = self._where(*args)
        elif op in _RULES:
            lo, hi = _RULES[op](*args)
        else:
            raise UnsupportedProgram(f"the mask uses {op} across queries and keys")
        name = f"pair{len(self.memo)}"
        self.lines += [f"{name}_lo = {lo}", f"{name}_hi = {hi}"]
        return _Bounds(f"{name}_lo", f"{name}_hi", kind)

    def _division(self, op: str, a: _Bounds, divisor: Expr) -> tuple[str, str]:
        if not (isinstance(divisor, Const) and type(divisor.value) is int and divisor.value > 0 and a.kind is Kind.INT):
            raise UnsupportedProgram("the mask divides by what is no positive literal")
        self.row_names.helpers |= {"floor_div", "floor_mod"}
        c = divisor.value
        if op == "floordiv":
            return f"floor_div({a.lo}, {c})", f"floor_div({a.hi}, {c})"
        within = f"floor_div({a.lo}, {c}) == floor_div({a.hi}, {c})"
        return f"tl.where({within}, floor_mod({a.lo}, {c}), 0)", f"tl.where({within}, floor_mod({a.hi}, {c}), {c - 1})"

    @staticmethod
    def _product(a: _Bounds, b: _Bounds) -> tuple[str, str]:
        if Kind.FLOAT in (a.kind, b.kind):
            raise UnsupportedProgram("the mask multiplies floating-point numbers across queries and keys")
        corners = [f"({x}) * ({y})" for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
        nested = "tl.{0}(tl.{0}({1}, {2}), tl.{0}({3}, {4}))"
        return nested.format("minimum", *corners), nested.format("maximum", *corners)

    @staticmethod
    def _where(condition: _Bounds, yes: _Bounds, no: _Bounds) -> tuple[str, str]:
        if yes.kind is Kind.BOOL:
            either = f"({yes.lo}) & ({no.lo})", f"({yes.hi}) | ({no.hi})"
        else:
            either = f"tl.minimum({yes.lo}, {no.lo})", f"tl.maximum({yes.hi}, {no.hi})"
        pick = "tl.where({0}, {1}, tl.where({2}, {3}, {4}))"
        return (
            pick.format(condition.lo, yes.lo, condition.hi, either[0], no.lo),
            pick.format(condition.lo, yes.hi, condition.hi, either[1], no.hi),
        )


_RULES: Mapping[str, Callable[..., tuple[str, str]]] = {
    "add": lambda a, b: (f"({a.lo}) + ({b.lo})", f"({a.hi}) + ({b.hi})"),
    "sub": lambda a, b: (f"({a.lo}) - ({b.hi})", f"({a.hi}) - ({b.lo})"),
    "neg": lambda a: (f"-({a.hi})", f"-({a.lo})"),
    "minimum": lambda a, b: (f"tl.minimum({a.lo}, {b.lo})", f"tl.minimum({a.hi}, {b.hi})"),
    "maximum": lambda a, b: (f"tl.maximum({a.lo}, {b.lo})", f"tl.maximum({a.hi}, {b.hi})"),
    "abs": lambda a: (
        f"tl.maximum(tl.maximum({a.lo}, -({a.hi})), 0)",
        f"tl.maximum(tl.abs({a.lo}), tl.abs({a.hi}))",
    ),
    "lt": lambda a, b: (f"({a.hi}) < ({b.lo})", f"({a.lo}) < ({b.hi})"),
    "le": lambda a, b: (f"({a.hi}) <= ({b.lo})", f"({a.lo}) <= ({b.hi})"),
    "gt": lambda a, b: (f"({a.lo}) > ({b.hi})", f"({a.hi}) > ({b.lo})"),
    "ge": lambda a, b: (f"({a.lo}) >= ({b.hi})", f"({a.hi}) >= ({b.lo})"),
    "eq": lambda a, b: (
        f"(({a.lo}) == ({a.hi})) & (({b.lo}) == ({b.hi})) & (({a.lo}) == ({b.lo}))",
        f"(({a.lo}) <= ({b.hi})) & (({b.lo}) <= ({a.hi}))",
    ),
    "ne": lambda a, b: (
        f"(({a.lo}) > ({b.hi})) | (({b.lo}) > ({a.hi}))",
        f"(({a.lo}) != ({a.hi})) | (({b.lo}) != ({b.hi})) | (({a.lo}) != ({b.lo}))",
    ),
    "and": lambda a, b: (f"({a.lo}) & ({b.lo})", f"({a.hi}) & ({b.hi})"),
    "or": lambda a, b: (f"({a.lo}) | ({b.lo})", f"({a.hi}) | ({b.hi})"),
    "not": lambda a: (f"({a.hi}) == 0", f"({a.lo}) == 0"),
}


def emit_plan(program: Attention, row: str) -> str:
    """The source of the kernel that plans the tiles of axis `row`.

    Raises: UnsupportedProgram for a predicate that no rule here bounds."""
    column = "kv_idx" if row == "q_idx" else "q_idx"
    helpers: set[str] = set()
    row_names, column_names = (
        _FlatNames(program, {}, bounds=frozenset(), helpers=helpers, prefix=prefix) for prefix in ("row_", "column_")
    )
    writer = _Writer(program, row, column, row_names, column_names)
    predicate = program.keep.predicate
    whole = writer.bounds(predicate)
    empty_rows = ""
    exprs: tuple[Expr, ...] = (predicate,)
    if program.keep.empty is Empty.SCORE:
        kept = kept_by_witness(predicate, program.axes.q_idx, program.axes.kv_idx)
        exprs += (kept,)
        proved = writer.bounds(kept)
        empty_rows = f"coverage = tl.where({proved.lo}, coverage, 1)  # a row that may keep nothing sees every key"
    last = "(tile + 1) * COLUMN_BLOCK > N" if column == "kv_idx" else "(row + 1) * ROW_BLOCK > N"
    size = _SIZES[column]
    loop = fill(plan.COLUMN_LOOP, column_axis=column, column_size=size, column_values="\n".join(writer.loop_lines))
    text = fill(
        plan.KERNEL,
        name="plan_rows" if row == "q_idx" else "plan_columns",
        parameters=signature(plan_parameters(program, exprs)),
        row_axis=row,
        row_size=_SIZES[row],
        column_axis=column,
        column_size=size,
        row_values="\n".join(writer.row_lines),
        column_start="\n".join(writer.start_lines),
        column_loop=loop if writer.loop_lines else "",
        column_end="\n".join(writer.end_lines),
        bounds="\n".join(writer.lines),
        may=f"({whole.hi})",
        sure=f"({whole.lo})",
        short_tile=f"coverage = tl.where({last}, tl.minimum(coverage, 1), coverage)",
        empty_rows=empty_rows,
        ranges="\n".join(plan.RANGES.format(name=name, kind=kind) for name, kind in (("Full", 2), ("Partial", 1))),
    )
    used = "\n".join(HELPERS[helper] for helper in sorted(helpers))
    return f"import triton\nimport triton.language as tl\n{used}\n{text}"


def plan_parameters(program: Attention, exprs: tuple[Expr, ...]) -> list[str]:
    """The signature of a plan kernel."""
    found = []
    for tensor in dict.fromkeys(r.tensor for e in exprs for r in reads_of(e)):
        found.append(pointer_name(tensor))
        found += [f"stride_{tensor}_{place}" for place in range(len(program.decls[tensor].shape))]
    sizes = size_names(program, exprs)
    for name in ("Full", "Partial"):
        found += [f"{name}Count", f"{name}Begin", f"{name}End"]
    constants = [f"{name}: tl.constexpr" for name in ("PLAN_H", "RANGES", "ROW_BLOCK", "COLUMN_BLOCK", "COLUMNS", "TILES")]
    return [*found, "Order", "NextRow", "M", "N", *sizes, *constants]


def has_plan_kernel(program: Attention) -> bool:
    """True where the predicate reads tensors and each of its parts has a rule."""
    if not reads_of(program.keep.predicate):
        return False
    try:
        emit_plan(program, "q_idx")
    except UnsupportedProgram:
        return False
    return True

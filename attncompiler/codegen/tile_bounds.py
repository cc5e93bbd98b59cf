"""What a predicate can be on tiles of a plan, as source: the rules of passes/intervals.py for a kernel that plans on the device.

Each part that varies along one side alone is taken exactly at every position and reduced over tiles; parts of both sides are
bounded from these. A tensor or a draw at places of both sides is taken where each tile lies in one cell of it; other parts with one
value for each pair are left to plan.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from attncompiler.codegen.triton_expr import Names, element_address, number, pointer_name, stride_name, triton
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.evaluate import LARGEST_UNIFORM
from attncompiler.ir.expr import Apply, Axis, Const, Expr, Kind, Read, Size, Uniform, axes_of, reads_of, walk
from attncompiler.ir.program import Attention, Dtype, kind_of

SIZES = {"q_idx": "M", "kv_idx": "N"}


@dataclass(frozen=True)
class Bounds:
    """Source of the smallest and largest value on each tile; for booleans of `sure` and `may`."""

    lo: str
    hi: str
    kind: Kind


@dataclass(frozen=True)
class Column:
    """A part that varies along the columns: `name`_lo and `name`_hi hold its bounds, one for each tile."""

    name: str
    kind: Kind


@dataclass
class FlatNames(Names):
    """Positions as they stand: each kernel variable already has the shape that it is used in."""

    def axis(self, name: str) -> str:
        return name


@dataclass
class TileBounds:
    """Writes the bounds of expressions. `blocks`: positions of a tile along each axis.

    `row_lines` reduce what varies along the row of tiles; `start_lines`, `loop_lines` and `end_lines` what varies along the
    columns, [TILES] each; `lines` make the rest of both."""

    program: Attention
    row: str
    column: str
    blocks: Mapping[str, int]
    row_names: Names
    column_names: Names
    row_lines: list[str] = field(default_factory=list)
    start_lines: list[str] = field(default_factory=list)
    loop_lines: list[str] = field(default_factory=list)
    end_lines: list[str] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    memo: dict[Expr, Bounds] = field(default_factory=dict)

    def __call__(self, expr: Expr) -> Bounds:
        if expr not in self.memo:
            self.memo[expr] = self._bounds(expr)
        return self.memo[expr]

    def _bounds(self, expr: Expr) -> Bounds:
        kind = kind_of(expr, self.program.decls)
        if isinstance(expr, Const):
            text = number(expr.value) if kind is not Kind.BOOL else f"({self.column}_lo >= 0) & {expr.value}"
            return Bounds(text, text, kind)
        if isinstance(expr, Size):
            return Bounds(expr.name, expr.name, kind)
        axes = axes_of(expr)
        if isinstance(expr, Axis) and expr.name in (self.row, self.column):
            return Bounds(f"{expr.name}_lo", f"{expr.name}_hi", kind)
        if {self.row, self.column} <= axes or self._is_edge(expr):
            return self._rule(expr, kind) if isinstance(expr, Apply) else self._cell(expr, kind)
        return self._column(expr, kind) if self.column in axes else self._row(expr, kind)

    def _is_edge(self, expr: Expr) -> bool:
        """True where positions of the columns are compared with what all of them share: the ends of a tile say all."""
        if not isinstance(expr, Apply) or expr.op not in ("lt", "le", "gt", "ge"):
            return False
        axis, other = sorted(expr.args, key=lambda arg: not isinstance(arg, Axis))
        return isinstance(axis, Axis) and axis.name == self.column and not axes_of(other) & {self.row, self.column}

    def _row(self, expr: Expr, kind: Kind) -> Bounds:
        """Exact along the rows' positions, then reduced."""
        name = f"row{len(self.memo)}"
        value = triton(expr, self.row_names)
        self.row_lines += self.row_names.lines
        self.row_names.lines.clear()
        if self.row not in axes_of(expr):
            self.row_lines.append(f"{name} = {value}")
            return Bounds(name, name, kind)
        if kind is Kind.BOOL:
            self.row_lines += [f"{name} = ({value}).to(tl.int32)"]
            self.row_lines += [f"{name}_lo = tl.min({name}, 0) != 0", f"{name}_hi = tl.max({name}, 0) != 0"]
            return Bounds(f"{name}_lo", f"{name}_hi", kind)
        self.row_lines.append(f"{name} = {value}")
        low, high = self._without_nan(name, kind)
        self.row_lines += [f"{name}_lo = tl.min({low}, 0)", f"{name}_hi = tl.max({high}, 0)"]
        return Bounds(f"{name}_lo", f"{name}_hi", kind)

    def _column(self, expr: Expr, kind: Kind) -> Bounds:
        """Exact along the columns' positions, reduced tile by tile in the loop; of what ascends the ends of each tile."""
        name = f"column{len(self.memo)}"
        if isinstance(expr, Read) and self._ascends(expr):
            return self._ends(expr, name)
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
        self.columns.append(Column(name, kind))
        test = " != 0" if kind is Kind.BOOL else ""
        return Bounds(f"({name}_lo{test})", f"({name}_hi{test})", kind)

    def _ascends(self, read: Read) -> bool:
        """True for a read along the columns that no number is below the one before of."""
        *others, last = read.index
        along = isinstance(last, Axis) and last.name == self.column
        return self.program.decls[read.tensor].ascending and along and not any(self.column in axes_of(entry) for entry in others)

    def _ends(self, read: Read, name: str) -> Bounds:
        pointer, _ = element_address(read, self.column_names)
        lines = [f"{self.column} = tl.minimum(tile * COLUMN_BLOCK, {SIZES[self.column]} - 1)"]
        lines += [*self.column_names.lines, f"{name}_lo = tl.load({pointer}).to(tl.int64)"]
        lines.append(f"{self.column} = tl.minimum(tile * COLUMN_BLOCK + COLUMN_BLOCK, {SIZES[self.column]}) - 1")
        lines.append(f"{name}_hi = tl.load({pointer}).to(tl.int64)")
        self.column_names.lines.clear()
        self.end_lines += lines
        self.columns.append(Column(name, Kind.INT))
        return Bounds(f"({name}_lo)", f"({name}_hi)", Kind.INT)

    @staticmethod
    def _without_nan(name: str, kind: Kind) -> tuple[str, str]:
        """NaN compares false with everything: nothing may be proved of it."""
        if kind is not Kind.FLOAT:
            return name, name
        known = f"{name} == {name}"
        return f'tl.where({known}, {name}, float("-inf"))', f'tl.where({known}, {name}, float("inf"))'

    # ---------------------------------------------------------------------------------------------------------- cells

    def _cell(self, expr: Expr, kind: Kind) -> Bounds:
        """One element or one draw where the tile lies in one cell of rows and columns, else any. Tiles of the plan always do;
        runs of tiles may not.

        Raises: UnsupportedProgram where a tile may lie in several."""
        places = expr.at if isinstance(expr, Uniform) else expr.index if isinstance(expr, Read) else ()
        if not places or not all(self._is_in_one_cell(place) for place in places):
            raise UnsupportedProgram("the mask has one value for each pair")
        bounds = [self(place) for place in places]
        name = f"cell{len(self.memo)}"
        apart = [b for place, b in zip(places, bounds, strict=True) if axes_of(place) & {self.row, self.column}]
        self.lines.append(f"{name}_is_one = {' & '.join(f'(({b.lo}) == ({b.hi}))' for b in apart)}")
        if isinstance(expr, Uniform):
            self.row_names.helpers.add("uniform")
            seed = self(expr.seed)
            value = f"uniform({seed.lo}, tl.cast({bounds[0].lo}, tl.int64), tl.cast({bounds[1].lo}, tl.int32))"
            low, high = "0.0", repr(LARGEST_UNIFORM)
        else:
            assert isinstance(expr, Read)
            value, (low, high) = self._element(expr, places, bounds), self._any(expr, kind)
        self.lines.append(f"{name} = {value}")
        below, above = self._without_nan(name, kind)
        self.lines += [
            f"{name}_lo = tl.where({name}_is_one, {below}, {low})",
            f"{name}_hi = tl.where({name}_is_one, {above}, {high})",
        ]
        return Bounds(f"{name}_lo", f"{name}_hi", kind)

    def _is_in_one_cell(self, place: Expr) -> bool:
        """Whether a place is the same at all positions of any tile."""
        if isinstance(place, Apply) and place.op == "floordiv" and isinstance(place.args[0], Axis):
            block, size = self.blocks.get(place.args[0].name), place.args[1]
            if block is not None and isinstance(size, Const) and int(size.value) > 0:
                return int(size.value) % block == 0
        if isinstance(place, Axis | Read | Uniform):
            return not axes_of(place) & {self.row, self.column}
        return all(self._is_in_one_cell(child) for child in place.children)

    def _element(self, read: Read, places: tuple[Expr, ...], bounds: list[Bounds]) -> str:
        decl = self.program.decls[read.tensor]
        terms = [pointer_name(read.tensor)]
        for number_, (place, b, size) in enumerate(zip(places, bounds, decl.shape, strict=True)):
            at = b.lo
            if axes_of(place):
                at = f"tl.minimum(tl.maximum({at}, 0), {triton(size, self.row_names)} - 1).to(tl.int64)"
            terms.append(f"{at} * {stride_name(read.tensor, number_)}")
        convert = {Kind.FLOAT: ".to(tl.float32)", Kind.BOOL: " != 0", Kind.INT: ".to(tl.int64)"}[decl.dtype.kind]
        return f"tl.load({' + '.join(terms)}){convert}"

    def _any(self, read: Read, kind: Kind) -> tuple[str, str]:
        """What an element can be."""
        dtype = self.program.decls[read.tensor].dtype
        if dtype is Dtype.I64:
            raise UnsupportedProgram("the mask reads 64-bit integers at places of both sides")
        if kind is Kind.INT:
            return str(-(2**31)), str(2**31 - 1)
        return ("False", "True") if kind is Kind.BOOL else ('float("-inf")', 'float("inf")')

    # ---------------------------------------------------------------------------------------------------------- rules

    def _rule(self, expr: Apply, kind: Kind) -> Bounds:
        args = [self(arg) for arg in expr.args]
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
        return Bounds(f"{name}_lo", f"{name}_hi", kind)

    def _division(self, op: str, a: Bounds, divisor: Expr) -> tuple[str, str]:
        if not (isinstance(divisor, Const) and type(divisor.value) is int and divisor.value > 0 and a.kind is Kind.INT):
            raise UnsupportedProgram("the mask divides by what is no positive literal")
        self.row_names.helpers |= {"floor_div", "floor_mod"}
        c = divisor.value
        if op == "floordiv":
            return f"floor_div({a.lo}, {c})", f"floor_div({a.hi}, {c})"
        within = f"floor_div({a.lo}, {c}) == floor_div({a.hi}, {c})"
        return f"tl.where({within}, floor_mod({a.lo}, {c}), 0)", f"tl.where({within}, floor_mod({a.hi}, {c}), {c - 1})"

    @staticmethod
    def _product(a: Bounds, b: Bounds) -> tuple[str, str]:
        if Kind.FLOAT in (a.kind, b.kind):
            raise UnsupportedProgram("the mask multiplies floating-point numbers across queries and keys")
        corners = [f"({x}) * ({y})" for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
        nested = "tl.{0}(tl.{0}({1}, {2}), tl.{0}({3}, {4}))"
        return nested.format("minimum", *corners), nested.format("maximum", *corners)

    @staticmethod
    def _where(condition: Bounds, yes: Bounds, no: Bounds) -> tuple[str, str]:
        if yes.kind is Kind.BOOL:
            either = f"({yes.lo}) & ({no.lo})", f"({yes.hi}) | ({no.hi})"
        else:
            either = f"tl.minimum({yes.lo}, {no.lo})", f"tl.maximum({yes.hi}, {no.hi})"
        pick = "tl.where({0}, {1}, tl.where({2}, {3}, {4}))"
        return (
            pick.format(condition.lo, yes.lo, condition.hi, either[0], no.lo),
            pick.format(condition.lo, yes.hi, condition.hi, either[1], no.hi),
        )


@dataclass
class EndBounds(TileBounds):
    """Bounds made of the ends of a tile alone, `name`_lo and `name`_hi for each of `ends`: scalars, in `lines`."""

    ends: Mapping[Expr, str] = field(default_factory=dict)

    def _bounds(self, expr: Expr) -> Bounds:
        kind = kind_of(expr, self.program.decls)
        if expr in self.ends:
            return Bounds(f"{self.ends[expr]}_lo", f"{self.ends[expr]}_hi", kind)
        if not any(node in self.ends for node in walk(expr)):
            value = triton(expr, self.row_names)
            return Bounds(value, value, kind)
        if not isinstance(expr, Apply):
            raise UnsupportedProgram("the mask reads a tensor at the positions of a tile")
        return self._rule(expr, kind)


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

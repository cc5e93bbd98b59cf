"""Expressions of the language as Triton source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.expr import (
    AXES,
    OPERATORS,
    Apply,
    Axis,
    Const,
    Dot,
    Expr,
    Kind,
    Read,
    Size,
    Uniform,
    axes_of,
    dots_of,
    reads_of,
    walk,
)
from attncompiler.ir.program import Attention, kind_of
from attncompiler.ir.ranges import range_of
from attncompiler.ir.text import expr_text

_CALLS = {
    "minimum": "tl.minimum", "maximum": "tl.maximum", "abs": "tl.abs", "exp": "tl.exp", "log": "tl.log", "sqrt": "tl.sqrt",
    "rsqrt": "tl.rsqrt", "sigmoid": "tl.sigmoid", "sin": "tl.sin", "cos": "tl.cos", "floor": "tl.floor", "ceil": "tl.ceil",
    "erf": "tl.erf", "tanh": "tanh", "where": "tl.where", "floordiv": "floor_div", "mod": "floor_mod",
}  # fmt: skip
_CASTS = {"to_float": "tl.float32", "to_int": "tl.int32", "to_bool": "tl.int1"}
_ROUNDS = {"round_f16": "tl.float16", "round_bf16": "tl.bfloat16"}


@dataclass
class Names:
    """How positions, dots and reads are called where an expression is written. `transposed` puts keys on rows.

    `lines` collects the loads that an expression needs, in order; a read is loaded once."""

    program: Attention
    dots: Mapping[Dot, str]
    transposed: bool = False
    bounds: frozenset[str] = frozenset({"q_idx", "kv_idx"})  # axes whose positions may lie outside
    loaded: dict[Expr, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    helpers: set[str] = field(default_factory=set)
    prefix: str = ""  # of the variables that hold reads
    tiles: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # axis -> where its tile starts, positions within it
    coordinates: Mapping[Expr, tuple[str, str]] = field(default_factory=dict)  # of a grid: the variable, and the axis that it is of

    def along(self, axis: str) -> str:
        """The subscript that lays a vector of this axis across a tile of scores."""
        row = (axis == "q_idx") != self.transposed
        return "[:, None]" if row else "[None, :]"

    def axis(self, name: str) -> str:
        return name if name in ("b", "h") else f"{name}{self.along(name)}"


def number(value: bool | int | float) -> str:
    """A literal; Triton has no spelling of infinity but float("inf")."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, float) and abs(value) > 3.4028234663852886e38:
        return repr(math.copysign(3.4028234663852886e38, value))
    return repr(value)


def triton(expr: Expr, names: Names) -> str:
    """`expr` as source over tiles. Loads that it needs are appended to `names.lines`."""
    return _write(expr, names)


def _write(expr: Expr, names: Names) -> str:
    if isinstance(expr, Const):
        return number(expr.value)
    if expr in names.coordinates:
        variable, axis = names.coordinates[expr]
        return f"{variable}{names.along(axis)}"
    if isinstance(expr, Axis):
        return names.axis(expr.name)
    if isinstance(expr, Size):
        return expr.name
    if isinstance(expr, Dot):
        return names.dots[expr]
    if isinstance(expr, Read):
        return _read(expr, names)
    if isinstance(expr, Uniform):
        names.helpers.add("uniform")
        seed = _read(expr.seed, names)
        if expr.at:
            row, column = (_write(place, names) for place in expr.at)
            return f"uniform({seed}, tl.cast({row}, tl.int64), tl.cast({column}, tl.int32))"
        return f"uniform({seed}, (b * H + h).to(tl.int64) * M + {names.axis('q_idx')}, {names.axis('kv_idx')})"
    assert isinstance(expr, Apply)
    return _apply(expr, names)


def _apply(expr: Apply, names: Names) -> str:
    args = [_write(arg, names) for arg in expr.args]
    decls = names.program.decls
    if expr.op in ("floordiv", "mod") and kind_of(expr, decls) is Kind.INT:
        names.helpers.add(_CALLS[expr.op])
        return f"{_CALLS[expr.op]}({', '.join(args)})"
    if expr.op == "tanh":
        names.helpers.add("tanh")
    if expr.op in _CASTS:
        return (
            f"({args[0]}).to({_CASTS[expr.op]})" if axes_of(expr) or "tl." in args[0] else f"tl.cast({args[0]}, {_CASTS[expr.op]})"
        )
    if expr.op in _ROUNDS:
        return f"({args[0]}).to({_ROUNDS[expr.op]}).to(tl.float32)"
    if expr.op == "pow":
        return _power(expr, args)
    if expr.op == "not":
        return f"(({args[0]}) == 0)"
    symbol = OPERATORS[expr.op].symbol
    if expr.op in _CALLS and not symbol:
        return f"{_CALLS[expr.op]}({', '.join(args)})"
    if len(args) == 1:
        return f"({symbol}{args[0]})"
    if expr.op == "div" and isinstance(expr.args[1], Const) and dots_of(expr) and float(expr.args[1].value) != 0.0:
        return f"({args[0]} * {1.0 / float(expr.args[1].value)!r})"  # a division is eight instructions
    return f"({args[0]} {symbol} {args[1]})"


def _power(expr: Apply, args: list[str]) -> str:
    exponent = expr.args[1]
    if isinstance(exponent, Const) and float(exponent.value) == 0.5:
        return f"tl.sqrt({args[0]})"
    if isinstance(exponent, Const) and float(exponent.value) in (2.0, 3.0):
        return "(" + " * ".join([args[0]] * int(exponent.value)) + ")"
    raise UnsupportedProgram(f"the kernel has no power {expr_text(expr)}", do="write it with exp and log")


def _read(read: Read, names: Names) -> str:
    """The variable that holds a read, loading it first where it is not there yet."""
    if read not in names.loaded:
        stem = f"{names.prefix}{read.tensor}_value"
        count = sum(name.startswith(stem) for name in names.loaded.values())
        name = stem if not count else f"{stem}{count + 1}"
        pointer, mask = element_address(read, names)
        kind = names.program.decls[read.tensor].dtype.kind
        convert = ".to(tl.float32)" if kind is Kind.FLOAT else " != 0" if kind is Kind.BOOL else ""
        guard = f", mask={mask}, other=0" if mask else ""
        load = f"tl.load({pointer}{guard})"
        names.lines.append(f"{name} = {load}{convert}")
        names.loaded[read] = name
    return names.loaded[read]


def element_address(read: Read, names: Names) -> tuple[str, str]:
    """Pointer expression and bounds mask of one element (or a tile of them)."""
    terms = [pointer_name(read.tensor)]
    for place, entry in enumerate(read.index):
        text = _write(entry, names)
        extent = names.program.decls[read.tensor].shape[place]
        if not _surely_inside(entry, extent, names.program):  # a branch of `where` that is not taken may point outside
            text = f"tl.minimum(tl.maximum({text}, 0), {_write(extent, names)} - 1)"
        if text != "0":
            stride = stride_name(read.tensor, place)
            if isinstance(entry, Axis) and entry.name in names.tiles and text == names.axis(entry.name):
                start, within = names.tiles[entry.name]  # one address for the tile; offsets that the assembler can fold
                terms += [f"({start}).to(tl.int64) * {stride}", f"({within}{names.along(entry.name)}).to(tl.int64) * {stride}"]
            else:
                terms.append(f"({text}).to(tl.int64) * {stride}" if axes_of(entry) else f"{text} * {stride}")
    axes = axes_of(read)
    tests = []
    if "q_idx" in axes and "q_idx" in names.bounds:
        tests.append(f"({names.axis('q_idx')} < M)")
    if "kv_idx" in axes and "kv_idx" in names.bounds:
        tests.append(f"({names.axis('kv_idx')} < N)")
    return " + ".join(terms), " & ".join(tests)


def size_names(program: Attention, exprs: Iterable[Expr]) -> list[str]:
    """The run-time integers that expressions and the tensors that they read are written with."""
    roots = list(exprs)
    roots += [size for e in tuple(roots) for r in reads_of(e) for size in program.decls[r.tensor].shape]
    return [s.name for s in dict.fromkeys(s for root in roots for s in walk(root) if isinstance(s, Size))]


def _surely_inside(entry: Expr, extent: Expr, program: Attention) -> bool:
    """True where 0 <= entry < extent is certain."""
    if isinstance(entry, Axis) and program.axes.size(entry) == extent:
        return True
    sizes = {axis: program.axes.size(axis) for axis in AXES}
    low, high = range_of(entry, {axis: int(size.value) for axis, size in sizes.items() if isinstance(size, Const)})
    return isinstance(extent, Const) and low >= 0 and high < int(extent.value)


_RANGES = {f"{kind}{part}" for kind in ("Full", "Partial") for part in ("Count", "Begin", "End", "_ranges")}
TABLES = frozenset(
    {*_RANGES, "Order", "NextRow", "Shares", "Queue", "Origins"}
)  # parameters that tell a kernel which tiles to visit
_PARAMETERS = TABLES | {
    "B", "H", "M", "N", "O", "DO", "Lse", "Rcp", "Delta", "Reference", "DLse", "Windows", "Work", "Index", "Count", "Gain",
    "Summed",
}  # fmt: skip


def pointer_name(tensor: str) -> str:
    """The kernel's name of an operand: tensors are capitalised, as the literature has them, and never called as what kernels have."""
    name = tensor[0].upper() + tensor[1:]
    return f"{name}_" if name in _PARAMETERS else name


def stride_name(tensor: str, place: int) -> str:
    return f"stride_{tensor}_{place}"


HELPERS: Mapping[str, str] = {
    "to_base2": '''
@triton.jit
def to_base2(x):
    """x * log2(e); a finite mask such as -3.4e38 is left as it is: it would overflow to -inf, which is another mask."""
    return tl.where(x > -1.0e38, x * 1.4426950408889634, x)
''',
    "to_natural": '''
@triton.jit
def to_natural(x):
    """The inverse of to_base2."""
    return tl.where(x > -1.0e38, x * 0.6931471805599453, x)
''',
    "exp2": '''
@triton.jit
def exp2(x):
    """2^x, nearly to the last bit; the instruction for it is exact for whole numbers and errs by two units elsewhere."""
    whole = tl.floor(x + 0.5)
    part = (x - whole) * 0.6931471805599453
    series = 1.0 + part * (1.0 / 7.0)
    series = 1.0 + part * (1.0 / 6.0) * series
    series = 1.0 + part * 0.2 * series
    series = 1.0 + part * 0.25 * series
    series = 1.0 + part * (1.0 / 3.0) * series
    series = 1.0 + part * 0.5 * series
    return tl.where(x < -150.0, 0.0, (1.0 + part * series) * tl.exp2(whole))
''',
    "add_apart": '''
@triton.jit
def add_apart(x, y):
    """x + y; as a plain sum Triton would make the accumulator x the head of the chain of multiply-adds that y is."""
    return tl.sum(tl.join(x, y), 2)
''',
    "bits_before": '''
@triton.jit
def bits_before(end, start, within, WIDTH: tl.constexpr, END_COUNTS: tl.constexpr):
    """A bit for each column of a thread that lies before `end`, or up to it, from the two of every eight that `within` is one of.
    Held to the tile first: `end` may be any number."""
    end = tl.minimum(tl.maximum(end, start - END_COUNTS), start + (WIDTH - END_COUNTS)) - start + END_COUNTS
    end = tl.maximum(end - (within & 6), 0)
    count = (end >> 3) * 2 + tl.minimum(end & 7, 2)
    return tl.inline_asm_elementwise("bmsk.clamp.b32 $0, 0, $1;", "=r,r", [count], dtype=tl.int32, is_pure=True, pack=1)
''',
    "bit_of": '''
@triton.jit
def bit_of(within):
    """The bit of a column among those of its thread."""
    return 1 << ((within >> 3) * 2 + (within & 1))
''',
    "dot_in_parts": '''
@triton.jit
def dot_in_parts(a_rows, a_inside, stride_a, b_rows, b_inside, stride_b, SIZE: tl.constexpr):
    """The products of rows of a with rows of b, which the pointers begin; each is summed in chains of 32 channels."""
    total = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    for part in range(0, SIZE, 32):
        channels = part + tl.arange(0, 32)[None, :]
        a = tl.load(a_rows + channels * stride_a, mask=a_inside & (channels < SIZE), other=0.0).to(tl.float32)
        b = tl.load(b_rows + channels * stride_b, mask=b_inside & (channels < SIZE), other=0.0).to(tl.float32)
        total = add_apart(total, tl.dot(a, tl.trans(b), input_precision="ieee"))
    return total
''',
    "uniform": '''
@triton.jit
def _fmix32(x):
    """The finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def uniform(seed, row, kv_idx):
    """A number in [0, 1) for each (row, kv_idx), the same in forward and backward: the mask is never stored."""
    state = _fmix32(row.to(tl.uint32) ^ seed.to(tl.uint32))
    state = _fmix32(state ^ (row >> 32).to(tl.uint32) ^ (seed >> 32).to(tl.uint32))
    bits = _fmix32(state + kv_idx.to(tl.uint32) * 0x9E3779B9)
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08  # the top 24 bits
''',
    "tanh": '''
@triton.jit
def tanh(x):
    """From one exponential; exact at both ends."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
''',
    "floor_div": '''
@triton.jit
def floor_div(a, b):
    """Rounds down, as Python does; Triton's // rounds towards zero."""
    return a // b - ((a % b != 0) & ((a < 0) != (b < 0))).to(tl.int32)
''',
    "floor_mod": '''
@triton.jit
def floor_mod(a, b):
    """The remainder with the sign of the divisor, as Python has it."""
    rest = a % b
    return rest + tl.where((rest != 0) & ((rest < 0) != (b < 0)), b, 0)
''',
}

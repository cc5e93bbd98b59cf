"""Which pairs of a tile the mask keeps, as one word for each row and thread, with a bit for each of the thread's columns.

Where a row keeps what lies between two ends, both are counted in the thread's own columns once, and the mask is and, or and not of
words; of a pair a test of one bit is left, seven of which the assembler reads at once (R2P). Tests of two positions take an
instruction each, at half rate. For tiles that are runs of tokens, of up to 128 columns: four threads share a row, each has two of
every eight columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncompiler.codegen.emission import Emission
from attncompiler.codegen.triton_expr import Names, triton
from attncompiler.ir.expr import Apply, Axis, Const, Expr, Read, Size, apply, axes_of, transform, walk
from attncompiler.ir.program import Dtype

_FAR = 1 << 30  # numbers that added to a position may not be one of 32 bits
_INTEGER = {"add", "sub", "mul", "neg", "minimum", "maximum", "abs", "floordiv", "mod"}

# How `column <op> end` is made of "lies before end" and, where end itself counts, "lies before end + 1".
ORDERS = {
    "lt": "{before}", "le": "{up_to}", "ge": "~{before}", "gt": "~{up_to}", "eq": "({up_to} & ~{before})",
    "ne": "~({up_to} & ~{before})",
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """The columns of a tile: `axis`, of which a tile has `width` tokens, from the token that `start` names; `within` counts them."""

    axis: Axis
    start: str
    within: str
    width: int

    def alike(self, test: Expr) -> Expr:
        """The test with what all columns of a tile share said of its start: blocks of tokens of which tiles are parts."""

        def visit(node: Expr) -> Expr | None:
            if not (isinstance(node, Apply) and node.op == "floordiv" and node.args[0] == self.axis):
                return None
            divisor = node.args[1]
            if not (isinstance(divisor, Const) and isinstance(divisor.value, int) and divisor.value > 0):
                return None
            return apply("floordiv", Size(self.start), divisor) if divisor.value % self.width == 0 else None

        return transform(test, visit)


def bit(columns: Columns, names: Names) -> str:
    """The bit of each column in a word of `bits`."""
    names.helpers.add("bit_of")
    return f"bit_of({columns.within})"


def are_bits(test: Expr, axis: Axis, e: Emission) -> bool:
    """True where `bits` can say a test, which `Columns.alike` has rewritten: it reads of a column of `axis` in which order it comes."""
    if axis.name not in axes_of(test):
        return True
    if not isinstance(test, Apply):
        return False
    if test.op in ("and", "or", "not"):
        return all(are_bits(arg, axis, e) for arg in test.args)
    if test.op not in ORDERS or test.args[0] != axis:
        return False
    end = test.args[1]
    far = any(isinstance(node, Const) and abs(node.value) >= _FAR for node in walk(end))
    return axis.name not in axes_of(end) and is_int32(end, e) and not far


def bits(test: Expr, columns: Columns, names: Names) -> str:
    """A word for each pair's row and thread, as source."""
    if columns.axis.name not in axes_of(test):
        return f"tl.where({triton(test, names)}, -1, 0)"
    assert isinstance(test, Apply)
    if test.op == "not":
        return f"~({bits(test.args[0], columns, names)})"
    if test.op in ("and", "or"):
        symbol = " & " if test.op == "and" else " | "
        return f"({symbol.join(bits(arg, columns, names) for arg in test.args)})"
    names.helpers.add("bits_before")
    end = triton(test.args[1], names)
    before, up_to = (
        f"bits_before({end}, {columns.start}, {columns.within}, {columns.width}, {end_counts})" for end_counts in (0, 1)
    )
    return ORDERS[test.op].format(before=before, up_to=up_to)


def is_int32(expr: Expr, e: Emission) -> bool:
    """True for what kernels compute in 32-bit integers."""
    if isinstance(expr, Const):
        return isinstance(expr.value, int) and not isinstance(expr.value, bool) and abs(expr.value) < 1 << 31
    if isinstance(expr, Read):
        return e.program.decls[expr.tensor].dtype is Dtype.I32
    if isinstance(expr, Apply):
        return expr.op in _INTEGER and all(is_int32(arg, e) for arg in expr.args)
    return isinstance(expr, Axis) or expr == Size("N")

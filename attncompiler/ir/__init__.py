"""The language of attention: expressions, the program node, its text, its invariants and its meaning."""

from attncompiler.ir.interpreter import Outputs, interpret
from attncompiler.ir.program import Attention, Axes, Dtype, Empty, Keep, Origin, Softmax, TensorDecl
from attncompiler.ir.text import expr_text, parse, parse_expr, to_text
from attncompiler.ir.verify import verify

__all__ = [
    "Attention", "Axes", "Dtype", "Empty", "Keep", "Origin", "Outputs", "Softmax", "TensorDecl",
    "expr_text", "interpret", "parse", "parse_expr", "to_text", "verify",
]  # fmt: skip

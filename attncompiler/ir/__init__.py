"""The language of attention: expressions, the nodes of programs, their text, their invariants and their meaning."""

from attncompiler.ir import verify_phases  # noqa: F401  registers the invariants of its nodes
from attncompiler.ir.interpreter import Outputs, interpret, interpret_program
from attncompiler.ir.phase_text import parse_program, program_line, program_text
from attncompiler.ir.phases import Phase, Program
from attncompiler.ir.program import Attention, Axes, Dtype, Empty, Keep, Origin, Route, Softmax, TensorDecl
from attncompiler.ir.state import State
from attncompiler.ir.tables import Tables
from attncompiler.ir.text import expr_text, parse, parse_expr, to_text
from attncompiler.ir.verify import verify

__all__ = [
    "Attention", "Axes", "Dtype", "Empty", "Keep", "Origin", "Outputs", "Phase", "Program", "Route", "Softmax", "State", "Tables",
    "TensorDecl", "expr_text", "interpret", "interpret_program", "parse", "parse_expr", "parse_program", "program_line",
    "program_text", "to_text", "verify",
]  # fmt: skip

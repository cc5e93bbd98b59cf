"""What the lowerings can take: of all that the language says, one attention, or one state that recurrence.py can read. The rest is
refused here."""

from __future__ import annotations

import functools

from attncompiler.codegen.recurrence import Recurrence, recurrence_of
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.expr import ONE, Kind, Read
from attncompiler.ir.phase_text import parse_program
from attncompiler.ir.phases import Phase, Program
from attncompiler.ir.program import Attention, Route
from attncompiler.ir.state import State
from attncompiler.ir.tables import Tables
from attncompiler.passes.compact_rows import is_plain


@functools.lru_cache(maxsize=4096)
def parse_lowerable(text: str) -> Attention:
    """The attention that a program's text says. Raises: ParseError; UnsupportedProgram as `single_attention` does."""
    return single_attention(parse_program(text))


@functools.lru_cache(maxsize=4096)
def parse_recurrence(text: str) -> Recurrence:
    """The recurrence that a program's text says. Raises: ParseError; UnsupportedProgram for another program, or for a state with a
    clause that has no kernel."""
    program = parse_program(text)
    if len(program.phases) == 1 and isinstance(program.phases[0].work, State):
        return recurrence_of(program.phases[0].work)
    raise UnsupportedProgram(
        "a program that is not one state was given to the op of linear attention",
        where=program.origin.line,
        why="a lowering computes one phase at a time",
        do="call attncompiler::attention for an attention, and one phase after the other for a program of several",
    )


def lowerable(program: Attention) -> Attention:
    """The program itself. Raises: UnsupportedProgram for a route, which the caller takes first (passes/compact_rows.py)."""
    if program.route != Route():
        raise UnsupportedProgram("a kernel knows of no route", where=program.origin.line, do="compact its rows first")
    return single_attention(program)


def single_attention(program: Program | Attention) -> Attention:
    """The attention that a program is. Raises: UnsupportedProgram, naming the first clause that has no kernel."""
    phases = program.phases if isinstance(program, Program) else (Phase(program, ()),)
    for phase in phases:
        what = _not_there(phase)
        if what:
            raise UnsupportedProgram(
                f"{what} has no kernel yet",
                where=phase.work.origin.line or program.origin.line,
                why="it is part of the language, with a meaning (ir.interpret_program), but no lowering computes it",
                do="compute it in plain PyTorch around the attention: what it gives is an operand like any other",
            )
    work = phases[-1].work
    if len(phases) > 1 or not isinstance(work, Attention):
        raise UnsupportedProgram(
            "an attention that reads the result of another has no kernel yet",
            where=program.origin.line,
            why="a lowering computes one attention at a time",
            do="call the attentions one after another",
        )
    return work


def _not_there(phase: Phase) -> str:
    """What no lowering computes, in the words of someone who wrote the attention; "" if there is nothing."""
    work = phase.work
    if isinstance(work, Tables):
        numbers = all(work.decls[table.name].dtype.kind is Kind.FLOAT for table in work.tables)
        return "a sum beside an attention (tables)" if numbers else "a choice of keys made from the data (select)"
    if isinstance(work, State):
        return "linear attention (state)"
    gain = work.route.gain
    known = gain == ONE or (isinstance(gain, Read) and is_plain(gain))
    return "" if known else "a gain of heads that is computed in the attention (route)"

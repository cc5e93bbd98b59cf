"""What no lowering takes is refused in one place, in the same words by whatever meets it first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from attncompiler.codegen import portable
from attncompiler.codegen.lowerable import parse_lowerable, single_attention
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir import Route, parse_program, program_line, to_text
from attncompiler.ir.expr import Const
from attncompiler.runtime import ops as _ops  # noqa: F401  registers the op
from tests.programs import operands, program

ATTENTION = to_text(program("plain", 5, 5, 16, 16)).replace("attention\n", "attention  # model.py:41\n")
STATE = """state  # model.py:7
  axes b=2, h=4, q_idx=5, kv_idx=5, c=16, d=16
  read q: f32[2, 4, 5, 16], k: f32[2, 2, 5, 16], v: f32[2, 2, 5, 16]
  write k[b, h // 2, kv_idx, c], v[b, h // 2, kv_idx, d]
  query q[b, h, q_idx, c] after q_idx
"""
TABLES = "tables  # model.py:8\n  axes b=2\n  read x: f32[2]\n  {} y[b] = {}\n  return y\n"
WORDS = {
    "linear attention": STATE,
    "a choice of keys made from the data": TABLES.format("select", "x[b] > 0.0") + ATTENTION,
    "a sum beside an attention": TABLES.format("let", "x[b] + 1.0") + ATTENTION,
    "reads the result of another": ATTENTION + ATTENTION,
}


@pytest.mark.parametrize("words", WORDS)
def test_what_has_no_lowering_is_named(words: str) -> None:
    with pytest.raises(UnsupportedProgram, match=words) as caught:
        single_attention(parse_program(WORDS[words]))
    assert caught.value.where.startswith("model.py:") and caught.value.why and caught.value.do


def test_an_attention_is_taken() -> None:
    assert parse_lowerable(ATTENTION) == single_attention(parse_program(ATTENTION)) == parse_program(ATTENTION).phases[0].work


def test_the_op_refuses_real_and_fake() -> None:
    made = list(operands(program("plain", 5, 5, 16, 16)).values())
    line = program_line(parse_program(STATE))
    with pytest.raises(UnsupportedProgram, match="linear attention"):
        torch.ops.attncompiler.attention(made, [], line)
    mode = FakeTensorMode()
    with mode, pytest.raises(UnsupportedProgram, match="linear attention"):
        torch.ops.attncompiler.attention([mode.from_tensor(tensor) for tensor in made], [], line)


def test_the_lowering_refuses_a_route() -> None:
    p = replace(program("plain", 5, 5, 16, 16), route=Route(gain=Const(2.0)))
    with pytest.raises(UnsupportedProgram, match="route"):
        portable.forward(p, operands(p), {})

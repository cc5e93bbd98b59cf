"""Programs of several phases: names, declarations, and what each phase hands on."""

from __future__ import annotations

import pytest
import torch

from attncompiler.errors import InvalidProgram, ParseError
from attncompiler.ir import Attention, interpret, interpret_program, parse, parse_program, program_text, to_text, verify
from tests.ir.running import run
from tests.programs import PROGRAMS, program

CHOICE = """tables  # model.py:38
  axes    b=2, h=3, key=9, place=4
  read    weight: f32[2, 3, 9]
  select  picked[b, h, place] = argsort(weight[b, h, key], over=key, into=place, descending=True)
  return  picked
"""
ATTEND = """attention  # model.py:41
  axes    b=2, h=3, q_idx=5, kv_idx=4
  read    q: f32[2, 3, 5, 8], k: f32[2, 3, 9, 8], picked: i64[2, 3, 4], v: f32[2, 3, 9, 8]
  score   dot(q[b, h, q_idx], k[b, h, picked[b, h, kv_idx]])
  weigh   softmax
  sum     v[b, h, picked[b, h, kv_idx]]
"""


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_one_attention_is_that_attention(name: str) -> None:
    attention = program(name, 7, 9, 16, 24)
    found = verify(parse_program(to_text(attention)))
    assert found.phases[0].work == attention == parse(to_text(attention))
    assert program_text(found) == to_text(attention) and list(found.given) == ["o", "lse"]


def test_phases_hand_on_what_they_name() -> None:
    found = verify(parse_program(CHOICE + ATTEND))
    assert program_text(found) == CHOICE + ATTEND and found.origin.line == "model.py:41"
    assert list(found.operands) == ["weight", "q", "k", "v"] and list(found.given) == ["picked", "o", "lse"]
    made = {name: torch.randn([int(s.value) for s in decl.shape]) for name, decl in found.operands.items()}  # type: ignore[attr-defined]
    results = interpret_program(found, made, {})
    attention = found.phases[1].work
    assert isinstance(attention, Attention)
    torch.testing.assert_close(results["o"], interpret(attention, made | {"picked": results["picked"]}, {}).o)


def test_positions_may_be_declared_in_32_bits() -> None:
    verify(parse_program(CHOICE + ATTEND.replace("picked: i64", "picked: i32")))


def test_two_attentions_in_turn() -> None:
    """Agents read the keys, queries read the agents: the first result is the value of the second, names told apart by `return`."""
    a, q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 6, 9, 9))
    text = """attention
      axes b=1, h=2, q_idx=3, kv_idx=9
      read a: f64[1, 2, 3, 4], k: f64[1, 2, 9, 4], v: f64[1, 2, 9, 4]
      score dot(a[b, h, q_idx], k[b, h, kv_idx])
      weigh softmax
      sum v[b, h, kv_idx]
      return agents
    attention
      axes b=1, h=2, q_idx=6, kv_idx=3
      read q: f64[1, 2, 6, 4], a: f64[1, 2, 3, 4], agents: f64[1, 2, 3, 4]
      score dot(q[b, h, q_idx], a[b, h, kv_idx])
      weigh softmax
      sum agents[b, h, kv_idx]"""
    expected = (q @ a.mT).softmax(-1) @ ((a @ k.mT).softmax(-1) @ v)
    torch.testing.assert_close(run(text, a=a, k=k, v=v, q=q)["o"], expected)


BROKEN = {
    "a result of another size": (CHOICE, ATTEND.replace("picked: i64[2, 3, 4]", "picked: i64[2, 3, 5]"), "declared alike"),
    "a result of another type": (CHOICE, ATTEND.replace("picked: i64", "picked: u8"), "declared alike"),
    "a phase that nothing reads": (CHOICE, to_text(program("plain", 7, 9, 16, 24)), "a later one reads"),
    "a result before it is there": (ATTEND, CHOICE, "distinct names"),
    "a table that is not there": (CHOICE.replace("return  picked", "return  picked, other"), ATTEND, "gives what it says"),
    "more names than results": (CHOICE, ATTEND + "  return a, z, y\n", "gives what it says"),
    "a result of the name of an axis": (CHOICE, ATTEND + "  return o, q_idx\n", "distinct names"),
    "the same name twice": (CHOICE, ATTEND + "  return o, o\n", "distinct names"),
    "a phase that is wrong by itself": (CHOICE, ATTEND.replace("v[b, h, picked", "v[b, q_idx, picked"), "over b, h, kv_idx"),
    "tables that give nothing": (CHOICE.replace("  return  picked\n", ""), ATTEND, None),
    "a clause before any phase": ("  axes b=1\n", ATTEND, None),
    "nothing": ("", "", None),
    "a clause of another node": (CHOICE.replace("  return", "  weigh softmax\n  return"), ATTEND, None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_programs_are_refused(name: str) -> None:
    first, second, sentence = BROKEN[name]
    with pytest.raises(InvalidProgram if sentence else ParseError, match=sentence):
        verify(parse_program(first + second))

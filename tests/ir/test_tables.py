"""Tables and selections: text, invariants, and how rows are ranked."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attncompiler.errors import InvalidProgram, ParseError
from attncompiler.ir import Tables, parse_program, program_line, program_text, verify
from attncompiler.ir.interpret_tables import interpret_tables

HEAD = "tables\n  axes    r=3, n=5, place={place}\n  read    x: f64[3, 5], on: bool[3, 5]\n"
ALL = """tables  # model.py:38
  axes    r=3, n=5, place=2, t=2, N=K
  read    x: f64[3, 5], on: bool[3, 5], i: i64[3, K]
  let     total[r] = sum(x[r, n], over=n, where=on[r, n])
  let     mean_of_all[t] = mean(x[r, n] * t, over=(r, n))
  select  many[r] = sum(i[r, N], over=N)
  select  found[r] = any(on[r, n] & (n > 1), over=n)
  let     share[n, r] = softmax(x[r, n] - total[r], over=n)
  select  ends[r, n] = cumsum(to_int(on[r, n]), over=n)
  select  top[r, n] = top_k(x[r, n], many[r] + 1, over=n, where=n != 3)
  select  sure[r, n] = top_sum(share[n, r], 0.9, over=n)
  select  surer[r, n] = top_sum(share[n, r], 0.5, over=(r, n), where=on[r, n], least=2)
  select  best[r, place] = argsort(x[r, n], over=n, into=place, where=on[r, n], descending=True)
  select  order[place, r] = argsort(x[r, n], over=n, into=place)
  select  picked[r, place] = positions(top[r, n] | sure[r, n] & ~surer[r, n], over=n, into=place)
  let     last[r, t] = x[r, maximum(picked[r, t], best[r, 0] + order[0, r])] + mean_of_all[t] + to_float(found[r]) + ends[r, 0]
  return  picked, last
"""


def test_text_parses_back() -> None:
    program = verify(parse_program(ALL))
    assert program_text(program) == ALL
    assert parse_program(program_line(program)) == program and "\n" not in program_line(program)
    assert list(program.sizes) == ["K"] and list(program.given) == ["picked", "last"]
    assert [decl.dtype.value for decl in program.given.values()] == ["i64", "f64"]


def _run(forms: str, x: Tensor, on: Tensor | None = None, place: int = 5) -> dict[str, Tensor]:
    """The tables of some equations over x [3, 5] and on [3, 5]."""
    lines = [f"  {'let' if line.startswith('let') else 'select'}  {line.removeprefix('let ')}" for line in forms.splitlines()]
    text = HEAD.format(place=place) + "\n".join([*lines, "select used[r] = any(on[r, n] | (x[r, n] > 0.0), over=n)", "return used"])
    program = verify(parse_program(text))
    tables = program.phases[0].work
    assert isinstance(tables, Tables)
    return interpret_tables(tables, {"x": x.double(), "on": torch.ones(3, 5, dtype=torch.bool) if on is None else on}, {})


ROWS = torch.tensor([[1, 3, 3, 2, 3], [0, 0, 0, 0, 0], [5, 4, 3, 2, 1]])


def test_ties_go_to_the_lower_position() -> None:
    made = _run(
        "top[r, n] = top_k(x[r, n], 2, over=n)\nup[r, place] = argsort(x[r, n], over=n, into=place)\n"
        "down[r, place] = argsort(x[r, n], over=n, into=place, descending=True)",
        ROWS,
    )
    assert made["top"].int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert made["up"].tolist() == [[0, 3, 1, 2, 4], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]
    assert made["down"].tolist() == [[1, 2, 4, 3, 0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_fewer_candidates_than_asked_for() -> None:
    on = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    made = _run(
        "top[r, n] = top_k(x[r, n], 9, over=n, where=on[r, n])\nnone[r, n] = top_k(x[r, n], -1, over=n)\n"
        "list[r, place] = positions(top[r, n], over=n, into=place)\n"
        "best[r, place] = argsort(x[r, n], over=n, into=place, where=on[r, n], descending=True)",
        ROWS,
        on,
        place=7,
    )
    assert torch.equal(made["top"], on) and not made["none"].any()
    assert made["list"].tolist() == [[1, 2, *[-1] * 5], [-1] * 7, [0, 1, 2, 3, 4, -1, -1]]
    assert made["best"].tolist() == made["list"].tolist()
    short = _run("list[r, place] = positions(on[r, n], over=n, into=place)", ROWS, on, place=1)
    assert short["list"].tolist() == [[1], [-1], [0]]


def test_nan_is_above_every_number_and_outside_is_no_candidate() -> None:
    x = torch.tensor([[1, math.nan, math.inf, -math.inf, 2], [-math.inf] * 5, [math.nan] * 5])
    on = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1], [0, 0, 1, 1, 0]]).bool()
    made = _run(
        "top[r, n] = top_k(x[r, n], 2, over=n)\nfew[r, n] = top_k(x[r, n], 3, over=n, where=on[r, n])\n"
        "up[r, place] = argsort(x[r, n], over=n, into=place, where=on[r, n])\nreach[r, n] = top_sum(x[r, n], 9.0, over=n)",
        x,
        on,
    )
    assert made["top"].int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert made["few"].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [0, 0, 1, 1, 0]]
    assert made["up"].tolist() == [[3, 0, 2, 1, -1], [0, 1, 3, 4, -1], [2, 3, -1, -1, -1]]
    assert made["reach"].int().tolist() == [[0, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]  # after a NaN nothing more


def test_the_last_of_a_sum_is_the_one_that_reaches_it() -> None:
    x = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625], [0.2] * 5, [1.0, 0, 0, 0, 0]])
    made = _run(
        "some[r, n] = top_sum(x[r, n], 0.75, over=n)\nnone[r, n] = top_sum(x[r, n], 0.0, over=n)\n"
        "least[r, n] = top_sum(x[r, n], 0.0, over=n, where=on[r, n], least=2)\nall[r, n] = top_sum(x[r, n], 9.0, over=n)\n"
        "both[r, n] = top_sum(x[r, n], 1.6, over=(r, n))",
        x,
        torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool(),
    )
    assert made["some"].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert not made["none"].any() and made["all"].all()
    assert made["least"].int().tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert made["both"].int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_folds_of_nothing() -> None:
    lines = ["let s[r] = sum(x[r, n]", "let m[r] = mean(x[r, n]", "let high[r] = max(x[r, n]", "let low[r] = min(x[r, n]"]
    lines += ["one[r] = any(on[r, n]", "each[r] = all(on[r, n]", "whole[r] = max(n", "let p[r, n] = softmax(x[r, n]"]
    made = _run("\n".join(f"{line}, over=n, where=n < 0)" for line in lines), ROWS)
    assert made["s"].eq(0).all() and made["m"].isnan().all() and made["p"].eq(0).all()
    assert made["high"].eq(-math.inf).all() and made["low"].eq(math.inf).all() and made["whole"].eq(-(2**63)).all()
    assert not made["one"].any() and made["each"].all()


def test_gradients_pass_numbers_and_stop_at_choices() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    made = _run("top[r, n] = top_k(x[r, n], 2, over=n)\nlet kept[r] = sum(x[r, n], over=n, where=top[r, n])", x)
    made["kept"].sum().backward()
    assert not made["top"].requires_grad
    assert torch.equal(x.grad, made["top"].double())  # type: ignore[arg-type]


EQUATION = "select kept[r, n] = top_k(x[r, n], 2, over=n, where=on[r, n])"
BROKEN = {
    "a table of the name of an axis": ("let n[r] = sum(x[r, n], over=n)", "distinct"),
    "a table that reads itself": ("let y[r, n] = y[r, n] + x[r, n]", "tables above it"),
    "a table that reads what is not there": ("let y[r, n] = z[r, n]", "tables above it"),
    "an index too many": ("let y[r, n] = x[r, n, 0]", "one entry for each dimension"),
    "a dot": ("let y[r, n] = dot(x[r], x[n])", "not `dot`"),
    "an axis twice": ("let y[r, r] = x[r, 0]", "each once"),
    "no axis": ("let y[()] = x[0, 0]", "at least one"),
    "a sum that keeps its axis": ("let y[r, n] = sum(x[r, n], over=n)", "keeps them"),
    "a softmax without its axis": ("let y[r] = softmax(x[r, n], over=n)", "keeps them"),
    "a list without places": ("select y[r] = positions(on[r, n], over=n, into=place)", "axis of its own"),
    "a list into its own axis": ("select y[r, n] = positions(on[r, n], over=n, into=n)", "keeps them"),
    "an axis that is not on the left": ("let y[r] = x[r, n]", "axes on its left"),
    "a limit for each key": ("select y[r, n] = top_k(x[r, n], n, over=n)", "limits over its rows"),
    "a list of numbers": ("select y[r, place] = positions(x[r, n], over=n, into=place)", "predicates"),
    "a rank of truths": ("select y[r, n] = top_k(on[r, n], 2, over=n)", "predicates"),
    "a condition that is a number": ("let y[r] = sum(x[r, n], over=n, where=x[r, n])", "predicates"),
    "half a key": ("select y[r, n] = top_k(x[r, n], 1.5, over=n)", "k and `least` are integers"),
    "an index that is a number": ("let y[r, n] = x[r, x[r, n]]", "indices are integers"),
    "a choice that is let": ("let y[r, n] = top_k(x[r, n], 2, over=n)", None),
    "a number that is selected": ("select y[r, n] = x[r, n]", None),
    "a form that is none": ("let y[r] = sum(x[r, n])", None),
    "an option that is none": ("let y[r] = sum(x[r, n], over=n, least=2)", None),
    "an axis that is none": ("let y[r] = sum(x[r, n], over=m)", None),
    "an equation that is none": ("let y = x[0, 0]", None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tables_are_refused(name: str) -> None:
    line, sentence = BROKEN[name]
    text = HEAD.format(place=2) + f"  {EQUATION}\n  {line}\n  return kept\n"
    with pytest.raises(InvalidProgram if sentence else ParseError, match=sentence):
        verify(parse_program(text))

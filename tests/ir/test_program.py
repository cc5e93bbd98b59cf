"""Text, invariants and the meaning of programs."""

from __future__ import annotations

import math

import pytest
import torch

from attncompiler.errors import InvalidProgram, ParseError
from attncompiler.ir import interpret, parse, verify
from attncompiler.ir.derivative import derivative
from attncompiler.ir.evaluate import uniform, whole
from attncompiler.ir.expr import Dot, axes_of, dots_of
from attncompiler.ir.text import to_line, to_text
from tests.programs import PROGRAMS, operands, program


@pytest.mark.parametrize("name", PROGRAMS)
def test_text_parses_back(name: str) -> None:
    p = program(name, 33, 70, 80, 48, "bf16")
    assert parse(to_text(p)) == p
    assert parse(to_line(p)) == p and "\n" not in to_line(p)


def test_draws_for_cells_parse_back() -> None:
    text = to_text(program("window", 8, 8, 16, 16)).replace("v: f32[2, 2, 8, 16]", "v: f32[2, 2, 8, 16], seed: i64[1]")
    cells = "uniform(seed[0], h * 4 + q_idx // 2, kv_idx // 2) < 0.5"
    p = verify(parse(text.replace("keep    ", f"keep    ({cells}) & ")))
    assert cells in to_text(p) and parse(to_text(p)) == p and axes_of(p.keep.predicate) == {"h", "q_idx", "kv_idx"}


def test_constants_are_part_of_the_text() -> None:
    text = to_text(program("window", 8, 8, 16, 16)).replace("v: f32[2, 2, 8, 16]", "v: f32[2, 2, 8, 16], ids: const(i32[8])")
    p = verify(parse(text.replace("keep    ", "keep    (ids[q_idx] == ids[kv_idx]) & ")))
    assert p.decls["ids"].constant and not p.decls["v"].constant and to_text(parse(to_text(p))) == to_text(p)
    with pytest.raises(ParseError):
        parse(text.replace("const(i32", "static(i32"))


def test_the_line_of_the_user_is_part_of_the_text() -> None:
    text = to_text(program("plain", 4, 4, 16, 16)).replace("attention\n", "attention  # model.py:41\n", 1)
    assert parse(text).origin.line == "model.py:41"
    assert to_text(parse(text)) == text


BROKEN = {
    "no program": ("", ParseError),
    "an unknown clause": ("attention\n  axis b=1", ParseError),
    "an unknown tensor": ("score dot(z[b, h, q_idx], k[b, h // 2, kv_idx])", InvalidProgram),
    "an index of floats": ("score dot(q[b, h, q_idx], k[b, h / 2.0, kv_idx])", InvalidProgram),
    "a score that is a truth value": ("score kv_idx <= q_idx", InvalidProgram),
    "a mask that is a number": ("keep q_idx else nan", InvalidProgram),
    "a mask that reads scores": ("keep dot(q[b, h, q_idx], k[b, h // 2, kv_idx]) > 0.0 else nan", InvalidProgram),
    "a mask that depends on the draw of a pair": ("keep uniform(mask[b, kv_idx]) < 0.5 else nan", InvalidProgram),
    "a draw for each query": ("keep uniform(q[0, 0, 0, 0], q_idx, q_idx) < 0.5 else nan", InvalidProgram),
    "a sink for each key": ("weigh softmax(to_float(kv_idx))", InvalidProgram),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_programs_are_refused(name: str) -> None:
    text, error = BROKEN[name]
    if error is InvalidProgram:
        clause = text.split()[0]
        lines = [line for line in to_text(program("window", 8, 8, 16, 16)).splitlines() if line.split()[0] != clause]
        text = "\n".join([*lines, text])
    with pytest.raises(error):
        verify(parse(text))


def test_the_interpreter_is_softmax() -> None:
    p = program("window", 9, 9, 16, 16)
    made = {name: t.double() for name, t in operands(p).items()}
    k, v = (made[name].repeat_interleave(2, 1) for name in "kv")
    distance = torch.arange(9)[:, None] - torch.arange(9)
    scores = (made["q"] @ k.mT * 0.25).masked_fill((distance < 0) | (distance >= 7), -math.inf)
    out = interpret(p, made, {})
    torch.testing.assert_close(out.o, scores.softmax(-1) @ v)
    torch.testing.assert_close(out.lse, scores.logsumexp(-1))


def test_rows_that_keep_no_key() -> None:
    """-inf gives NaN, scaled_dot_product_attention gives 0, a finite mask the mean over all keys."""
    made = {name: torch.randn(1, 1, 4, 8) for name in "qkv"}
    head = "attention\n axes b=1, h=1, q_idx=4, kv_idx=4\n read q: f32[1, 1, 4, 8], k: f32[1, 1, 4, 8], v: f32[1, 1, 4, 8]\n"
    dot = "dot(q[b, h, q_idx], k[b, h, kv_idx])"
    tail = "\n weigh softmax\n sum v[b, h, kv_idx]"
    for empty, score in (("nan", dot), ("zero", dot), ("score", f"where(kv_idx < q_idx, {dot}, -3.4028234663852886e+38)")):
        row = interpret(verify(parse(f"{head} score {score}\n keep kv_idx < q_idx else {empty}{tail}")), made, {}).o[0, 0, 0]
        expected = {"nan": torch.full((8,), math.nan), "zero": torch.zeros(8), "score": made["v"][0, 0].mean(0)}[empty]
        torch.testing.assert_close(row, expected.double(), equal_nan=True)


def test_derivatives_agree_with_autograd() -> None:
    p = program("softcap", 5, 5, 16, 16)
    (dot,) = dots_of(p.score)
    assert isinstance(dot, Dot)
    sizes = {"b": 2, "h": 4, "q_idx": 5, "kv_idx": 5}
    block = whole(operands(p), {}, sizes, torch.float64, torch.device("cpu"))
    value = block.tensor(dot).clone().requires_grad_()
    block.memo[dot] = value
    torch.autograd.backward(block.tensor(p.score).sum())
    block.memo = {dot: value.detach()}
    torch.testing.assert_close(block.tensor(derivative(p.score, dot)), value.grad)


def test_derivatives_keep_the_precision_of_the_work() -> None:
    """A constant times a factor of integers is float32 in torch, whatever multiplies it."""
    text = to_text(program("softcap", 5, 5, 16, 16, "f64"))
    score = next(line for line in text.splitlines() if line.strip().startswith("score"))
    p = verify(parse(text.replace(score, "  score   dot(q[b, h, q_idx], k[b, h // 2, kv_idx]) * (q_idx - kv_idx) * 0.1")))
    (dot,) = dots_of(p.score)
    block = whole({}, {}, {"b": 1, "h": 1, "q_idx": 5, "kv_idx": 5}, torch.float64, torch.device("cpu"))
    exact = 0.1 * (torch.arange(5.0, dtype=torch.float64)[:, None] - torch.arange(5.0, dtype=torch.float64))
    torch.testing.assert_close(block.tensor(derivative(p.score, dot)).squeeze(), exact, rtol=1e-15, atol=0)


def test_the_random_stream_is_even_and_depends_on_everything() -> None:
    rows, keys = torch.arange(512)[:, None], torch.arange(512)[None, :]
    u = uniform(torch.tensor(7), rows, keys)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean().item() - 0.5) < 5e-3 and abs((u < 0.1).double().mean().item() - 0.1) < 3e-3
    assert abs(torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1].item()) < 5e-3
    assert not torch.equal(u, uniform(torch.tensor(8), rows, keys))
    assert not torch.equal(u, uniform(torch.tensor(7 + 2**33), rows, keys))

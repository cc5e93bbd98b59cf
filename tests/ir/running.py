"""Programs of published systems: their text from the operands at hand, checked on the way to what they mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attncompiler.ir import interpret_program, parse_program, program_line, program_text, verify


def reads(**tensors: Tensor) -> str:
    """The body of a `read` clause for operands as they are."""
    names = {"torch.float64": "f64", "torch.int64": "i64", "torch.bool": "bool"}
    return ", ".join(f"{name}: {names[str(t.dtype)]}[{', '.join(map(str, t.shape))}]" for name, t in tensors.items())


def run(text: str, **tensors: Tensor) -> dict[str, Tensor]:
    """Every named result of a program that is valid and that its text, as lines and as one, gives back."""
    program = verify(parse_program(text))
    assert parse_program(program_text(program)) == program and parse_program(program_line(program)) == program
    assert program.operands.keys() == tensors.keys()
    found = interpret_program(program, tensors, {})
    for name, decl in program.given.items():
        assert [int(size.value) for size in decl.shape] == list(found[name].shape)  # type: ignore[attr-defined]
    return found


def rand(*shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64)


def kept_of(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row, as a mask."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(min(k, scores.shape[-1]), -1).indices, True)


def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Masked softmax attention, 0 for rows that keep nothing."""
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    return scores.masked_fill(~kept, -math.inf).softmax(-1).nan_to_num(0.0) @ v

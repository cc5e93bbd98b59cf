"""Programs of published systems: their text from the operands at hand, checked on the way to what they mean."""

from __future__ import annotations

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

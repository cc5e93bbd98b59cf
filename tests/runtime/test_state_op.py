"""The op of states: its fake and autograd rules, beside the interpreter, eager and compiled."""

from __future__ import annotations

import pytest
import torch

from attncompiler.codegen.lowerable import parse_recurrence
from attncompiler.errors import DeviceError, UnsupportedProgram
from attncompiler.ir import Program, program_line
from attncompiler.ir.phases import Phase, default_results
from attncompiler.ir.state import State
from attncompiler.runtime import state_op as _op  # noqa: F401  registers the op
from attncompiler.runtime.state_lowering import lowering_of
from tests.states import STATES, operands, results, state


def _line(program: State) -> str:
    return program_line(Program((Phase(program, default_results(program)),)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["started", "normalised and started", "all keys, decayed"])
def test_gradients_flow(name: str, compiled: bool) -> None:
    program = state(name, 20, 8, 16, "f64")
    line, made = _line(program), operands(program)
    leaves = {name: tensor.requires_grad_() for name, tensor in made.items()}

    def run(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.ops.attncompiler.state(tensors, [], line))

    found = (torch.compile(run, backend="aot_eager") if compiled else run)(list(leaves.values()))
    weights = {i: torch.randn_like(result) for i, result in enumerate(found)}
    gradients = torch.autograd.grad(sum((found[i] * weights[i]).sum() for i in weights), list(leaves.values()))
    if not program.normalised:
        weights.pop(2)
    exact, exact_gradients = results(program, made, weights, torch.float64)
    for got, right in zip((*found, *gradients), (*exact, *[found[2]] * (len(exact) < 3), *exact_gradients.values()), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("name", ["plain", "normalised and started"])
def test_rules_of_the_op(name: str) -> None:
    program = state(name, 9, 8, 16)
    made = list(operands(program).values())
    torch.library.opcheck(torch.ops.attncompiler.state_forward.default, (made, [], _line(program)))
    o, final, row, rows = torch.ops.attncompiler.state_forward(made, [], _line(program))
    arguments = (made, [], _line(program), o, rows, torch.ones_like(o), torch.ones_like(final), None, list(range(len(made))))
    torch.library.opcheck(torch.ops.attncompiler.state_backward.default, arguments)
    assert o.transpose(1, 2).is_contiguous() and row.numel() == (final.numel() // 16 if program.normalised else 0)


def test_every_state_here_is_lowerable() -> None:
    assert all(parse_recurrence(_line(state(name, 5, 8, 16))).program == state(name, 5, 8, 16) for name in STATES)


HEAD = (
    "state  # model.py:7\n axes b=1, h=2, q_idx=5, kv_idx=5, c=4, d=4\n"
    " read q: f32[1, 2, 5, 4], k: f32[1, 2, 5, 4], v: f32[1, 2, 5, 4]"
)
WRITE, QUERY = "write k[b, h, kv_idx, c], v[b, h, kv_idx, d]", "query q[b, h, q_idx, c] after q_idx"
REFUSED = {
    "corrected": (
        f"{HEAD}, beta: f32[5]",
        "correct -beta[kv_idx] * k[b, h, kv_idx, c], k[b, h, kv_idx, c] after decay",
        WRITE,
        QUERY,
    ),
    "anew": (f"{HEAD}, first: bool[5]", "reset first[kv_idx]", WRITE, QUERY),
    "bonus": (f"{HEAD}, u: f32[2, 4]", WRITE, QUERY, "bonus u[h, c]"),
    "final state other": (HEAD, WRITE, QUERY, "final after 2"),
    "key that is computed": (HEAD, "write maximum(k[b, h, kv_idx, c], 0.0), v[b, h, kv_idx, d]", QUERY),
    "decay of each channel": (f"{HEAD}, w: f32[5, 4]", "decay exp(w[kv_idx, c])", WRITE, QUERY),
    "not exp of its logarithm": (f"{HEAD}, a: f32[2]", "decay a[h]", WRITE, QUERY),
    "step other than its own": (HEAD, WRITE, "query q[b, h, q_idx, c] after q_idx // 2"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_kernel_is_named(words: str) -> None:
    with pytest.raises(UnsupportedProgram, match=words) as caught:
        parse_recurrence("\n".join(REFUSED[words]) + "\n")
    assert caught.value.where == "model.py:7" and caught.value.why and caught.value.do


def test_operands_on_two_devices() -> None:
    program = state("a decay a head", 5, 8, 16)
    made = operands(program)
    made["rate"] = made["rate"].to("meta")
    with pytest.raises(DeviceError, match="rate"):
        lowering_of(parse_recurrence(_line(program)), made)

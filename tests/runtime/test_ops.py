"""The registered op: its fake, its gradients, and what it says of operands that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attncompiler.errors import DeviceError
from attncompiler.ir import parse
from attncompiler.ir.text import to_line
from attncompiler.runtime import lowering
from attncompiler.runtime import ops as _ops  # noqa: F401  registers the op
from tests.programs import operands, program


def arguments(name: str, dtype: str) -> tuple[list[Tensor], list[int], str]:
    p = program(name, 9, 11, 16, 16, dtype)
    made = operands(p)
    return [made[d.name].requires_grad_(d.name in p.differentiable) for d in p.tensors], [], to_line(p)


@pytest.mark.parametrize("name", ["window", "sinks", "dropout", "empty rows are uniform"])
@pytest.mark.parametrize("heads_first", [False, True])
def test_fake_rules(name: str, heads_first: bool) -> None:
    torch.library.opcheck(
        torch.ops.attncompiler.attention_forward.default,
        (*arguments(name, "f32"), heads_first),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("name", ["plain", "pair bias and slopes", "softcap", "sinks"])
def test_gradients_are_derivatives(name: str) -> None:
    """Against finite differences in float64, of O and of lse."""
    tensors, sizes, text = arguments(name, "f64")
    tensors = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    text = text.replace("f32[", "f64[")
    leaves = [t for t in tensors if t.requires_grad]

    def outputs(*values: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(values)
        o, lse, _ = torch.ops.attncompiler.attention([next(given) if t.requires_grad else t for t in tensors], sizes, text)
        return o, lse

    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


def test_operands_on_two_devices_are_named() -> None:
    p = parse(to_line(program("plain", 4, 4, 16, 16)).replace("attention", "attention  # model.py:41", 1))
    made = operands(p)
    made["k"] = made["k"].to("meta")
    with pytest.raises(DeviceError, match=r"operand k .* is on meta, the values are on cpu \(at model.py:41\)"):
        lowering.forward(p, made, {})


@pytest.mark.parametrize(("dtype", "d", "reason"), [("f64", 64, "float64"), ("bf16", 513, "head size of 513")])
def test_what_has_no_kernel_is_left_to_the_portable_lowering(dtype: str, d: int, reason: str) -> None:
    assert reason in lowering.unsupported(program("plain", 4, 4, d, d, dtype))

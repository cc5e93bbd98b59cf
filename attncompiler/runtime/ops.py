"""The registered op: one attention program with its operands, with fake and autograd rules. Everything runs through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attncompiler.codegen.lowerable import parse_lowerable
from attncompiler.ir.program import Route
from attncompiler.runtime.lowering import backward, forward
from attncompiler.runtime.outputs import bind, new_outputs
from attncompiler.runtime.routed_ops import routed_attention

_LIBRARY = torch.library.Library("attncompiler", "DEF")
_FORWARD = "(Tensor[] operands, SymInt[] sizes, str program, bool heads_first=False) -> (Tensor, Tensor, Tensor)"
_LIBRARY.define("attention" + _FORWARD)
_LIBRARY.define("attention_forward" + _FORWARD)
_LIBRARY.define(
    "attention_backward(Tensor[] operands, SymInt[] sizes, str program, Tensor o, Tensor lse, Tensor rcp, "
    "Tensor grad_o, Tensor? grad_lse, int[] wanted) -> Tensor[]"
)


@torch.library.impl(_LIBRARY, "attention", "CompositeImplicitAutograd")
def attention(
    operands: Sequence[Tensor], sizes: Sequence[int], program: str, heads_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """O, lse and rcp of a program given as text, with gradients (docs/design.md, contracts).

    What is compiled calls `attention_forward` and `attention_backward`: past autograd, its rule would only cost time."""
    if parse_lowerable(program).route != Route():
        return routed_attention(operands, sizes, program, heads_first)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        found: tuple[Tensor, Tensor, Tensor] = _Attention.apply(sizes, program, heads_first, *operands)  # type: ignore[no-untyped-call]
        return found
    return torch.ops.attncompiler.attention_forward.default(operands, sizes, program, heads_first)  # type: ignore[no-any-return]


@torch.library.impl(_LIBRARY, "attention_forward", "CompositeExplicitAutograd")
def attention_forward(
    operands: Sequence[Tensor], sizes: Sequence[int], program: str, heads_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """O, lse and rcp, below autograd. In memory O is [b, q_idx, h, Dv], or [b, h, q_idx, Dv] with `heads_first`."""
    parsed = parse_lowerable(program)
    return forward(parsed, *bind(parsed, operands, sizes), heads_first)


@torch.library.impl(_LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def attention_backward(
    operands: Sequence[Tensor],
    sizes: Sequence[int],
    program: str,
    o: Tensor,
    lse: Tensor,
    rcp: Tensor,
    grad_o: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[int],
) -> list[Tensor]:
    """Gradients of the operands whose places are in `wanted`, in that order."""
    parsed = parse_lowerable(program)
    tensors, numbers = bind(parsed, operands, sizes)
    names = [parsed.tensors[place].name for place in wanted]
    found = backward(parsed, tensors, numbers, o, lse, rcp, grad_o, grad_lse, frozenset(names))
    return [found[name] for name in names]


@torch.library.register_fake("attncompiler::attention_forward", lib=_LIBRARY)
def _attention_fake(
    operands: Sequence[Tensor], sizes: Sequence[int], program: str, heads_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = parse_lowerable(program)
    return new_outputs(parsed, *bind(parsed, operands, sizes), heads_first)


@torch.library.register_fake("attncompiler::attention_backward", lib=_LIBRARY)
def _attention_backward_fake(
    operands: Sequence[Tensor],
    sizes: Sequence[int],
    program: str,
    o: Tensor,
    lse: Tensor,
    rcp: Tensor,
    grad_o: Tensor,
    grad_lse: Tensor | None,
    wanted: Sequence[int],
) -> list[Tensor]:
    return [operands[place].new_empty(operands[place].shape) for place in wanted]


class _Attention(torch.autograd.Function):
    """The autograd rule of the op."""

    @staticmethod
    def forward(ctx: Any, sizes: Sequence[int], program: str, heads_first: bool, *operands: Tensor) -> tuple[Tensor, ...]:
        output = torch.ops.attncompiler.attention_forward.default(operands, sizes, program, heads_first)
        ctx.program, ctx.sizes = program, sizes
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*operands, *output)
        return output  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *operands, o, lse, rcp = ctx.saved_tensors
        program = parse_lowerable(ctx.program)
        grad_o = torch.zeros_like(o) if grad_o is None else grad_o
        needed = ctx.needs_input_grad[3:]
        wanted = [i for i, decl in enumerate(program.tensors) if needed[i] and decl.name in program.differentiable]
        found = torch.ops.attncompiler.attention_backward.default(
            operands, ctx.sizes, ctx.program, o, lse, rcp, grad_o, grad_lse, wanted
        )
        gradients: list[Tensor | None] = [None] * len(operands)
        for place, gradient in zip(wanted, found, strict=True):
            gradients[place] = gradient
        return None, None, None, *gradients

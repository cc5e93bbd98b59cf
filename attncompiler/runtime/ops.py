"""The registered op: one attention program with its operands, with fake and autograd rules. Everything runs through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attncompiler.codegen.lowerable import parse_lowerable
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Dtype
from attncompiler.runtime.lowering import backward, forward

_LIBRARY = torch.library.Library("attncompiler", "DEF")
_FORWARD = "(Tensor[] operands, SymInt[] sizes, str program, bool heads_first=False) -> (Tensor, Tensor, Tensor)"
_LIBRARY.define("attention" + _FORWARD)
_LIBRARY.define("attention_forward" + _FORWARD)
_LIBRARY.define(
    "attention_backward(Tensor[] operands, SymInt[] sizes, str program, Tensor o, Tensor lse, Tensor rcp, "
    "Tensor grad_o, Tensor? grad_lse, int[] wanted) -> Tensor[]"
)


def _bind(program: Attention, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, int]]:
    return dict(zip(program.decls, operands, strict=True)), dict(zip(program.sizes, sizes, strict=True))


@torch.library.impl(_LIBRARY, "attention", "CompositeImplicitAutograd")
def attention(
    operands: Sequence[Tensor], sizes: Sequence[int], program: str, heads_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """O, lse and rcp of a program given as text, with gradients (docs/design.md, contracts).

    What is compiled calls `attention_forward` and `attention_backward`: past autograd, its rule would only cost time."""
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
    return forward(parsed, *_bind(parsed, operands, sizes), heads_first)


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
    tensors, numbers = _bind(parsed, operands, sizes)
    names = [parsed.tensors[place].name for place in wanted]
    found = backward(parsed, tensors, numbers, o, lse, rcp, grad_o, grad_lse, frozenset(names))
    return [found[name] for name in names]


@torch.library.register_fake("attncompiler::attention_forward", lib=_LIBRARY)
def _attention_fake(
    operands: Sequence[Tensor], sizes: Sequence[int], program: str, heads_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = parse_lowerable(program)
    tensors, numbers = _bind(parsed, operands, sizes)
    extents = extents_of(parsed, numbers)
    value = tensors[parsed.sum.tensor]
    b, h, m = extents["b"], extents["h"], extents["q_idx"]
    o = value.new_empty((b, h, m, value.shape[-1]) if heads_first else (b, m, h, value.shape[-1]))
    o = o if heads_first else o.transpose(1, 2)
    stats = torch.float64 if parsed.value.dtype is Dtype.F64 else torch.float32
    lse = value.new_empty((b, h, m), dtype=stats)
    rcp = value.new_empty((b, h, m) if parsed.has_rcp else (0,), dtype=stats)
    return o, lse, rcp


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

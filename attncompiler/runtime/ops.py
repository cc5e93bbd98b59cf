"""The registered op: one attention program with its operands, with fake and autograd rules. Everything runs through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Dtype
from attncompiler.ir.text import parse
from attncompiler.runtime.lowering import backward, forward

_LIBRARY = torch.library.Library("attncompiler", "DEF")
_LIBRARY.define("attention(Tensor[] operands, SymInt[] sizes, str program) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "attention_backward(Tensor[] operands, SymInt[] sizes, str program, Tensor o, Tensor lse, Tensor rcp, "
    "Tensor grad_o, Tensor? grad_lse, int[] wanted) -> Tensor[]"
)


def _bind(program: Attention, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, int]]:
    return (
        {decl.name: tensor for decl, tensor in zip(program.tensors, operands, strict=True)},
        dict(zip(program.sizes, sizes, strict=True)),
    )


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def attention(operands: Sequence[Tensor], sizes: Sequence[int], program: str) -> tuple[Tensor, Tensor, Tensor]:
    """O, lse and rcp of a program given as text (docs/design.md, contracts)."""
    parsed = parse(program)
    return forward(parsed, *_bind(parsed, operands, sizes))


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
    parsed = parse(program)
    tensors, numbers = _bind(parsed, operands, sizes)
    names = [parsed.tensors[place].name for place in wanted]
    found = backward(parsed, tensors, numbers, o, lse, rcp, grad_o, grad_lse, frozenset(names))
    return [found[name] for name in names]


@torch.library.register_fake("attncompiler::attention", lib=_LIBRARY)
def _attention_fake(operands: Sequence[Tensor], sizes: Sequence[int], program: str) -> tuple[Tensor, Tensor, Tensor]:
    parsed = parse(program)
    tensors, numbers = _bind(parsed, operands, sizes)
    extents = extents_of(parsed, numbers)
    value = tensors[parsed.sum.tensor]
    b, h, m = extents["b"], extents["h"], extents["q_idx"]
    o = value.new_empty((b, m, h, value.shape[-1])).transpose(1, 2)
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    operands, sizes, program = inputs
    ctx.program, ctx.sizes = program, sizes
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*operands, *output)


def _backward(ctx: Any, grad_o: Tensor | None, grad_lse: Tensor | None, _: Tensor | None) -> tuple[Any, list[Any] | None, None]:
    *operands, o, lse, rcp = ctx.saved_tensors
    needed = ctx.needs_input_grad[0]
    differentiable = set(parse(ctx.program).differentiable)
    decls = parse(ctx.program).tensors
    wanted = [i for i, decl in enumerate(decls) if needed[i] and decl.name in differentiable]
    if grad_o is None:
        grad_o = torch.zeros_like(o)
    found = torch.ops.attncompiler.attention_backward(operands, ctx.sizes, ctx.program, o, lse, rcp, grad_o, grad_lse, wanted)
    gradients: list[Tensor | None] = [None] * len(operands)
    for place, gradient in zip(wanted, found, strict=True):
        gradients[place] = gradient
    return (
        gradients,
        [] if not ctx.sizes else None,
        None,
    )  # torch's autograd rule takes an empty list for a tree, any other for a leaf


torch.library.register_autograd("attncompiler::attention", _backward, setup_context=_setup_context, lib=_LIBRARY)

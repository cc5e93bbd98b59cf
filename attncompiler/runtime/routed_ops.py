"""The registered ops of attention with a route. `attncompiler::attention` (ops.py) calls them for such programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attncompiler.codegen.lowerable import parse_lowerable
from attncompiler.ir.expr import ONE
from attncompiler.runtime import lowering, routed
from attncompiler.runtime.outputs import bind, new_outputs

_LIBRARY = torch.library.Library("attncompiler", "FRAGMENT")
_LIBRARY.define(
    "routed_forward(Tensor[] operands, SymInt[] sizes, str program, bool heads_first=False, bool for_backward=True) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "routed_backward(Tensor[] operands, SymInt[] sizes, str program, Tensor o, Tensor lse, Tensor rcp, Tensor summed, "
    "Tensor lists, Tensor count, Tensor grad_o, Tensor? grad_lse, int[] wanted) -> Tensor[]"
)


def routed_attention(
    operands: Sequence[Tensor], sizes: Sequence[int], program: str, heads_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """O, lse and rcp of a program with a route, with gradients."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        found: tuple[Tensor, ...] = _Routed.apply(sizes, program, heads_first, *operands)  # type: ignore[no-untyped-call]
    else:
        found = torch.ops.attncompiler.routed_forward.default(operands, sizes, program, heads_first, False)
    return found[0], found[1], found[2]


@torch.library.impl(_LIBRARY, "routed_forward", "CompositeExplicitAutograd")
def routed_forward(
    operands: Sequence[Tensor], sizes: Sequence[int], program: str, heads_first: bool = False, for_backward: bool = True
) -> tuple[Tensor, ...]:
    """As `attention_forward`, and what the backward needs besides: the rows that are left before their gain, nothing unless
    `for_backward`, and the lists (routed.py)."""
    parsed = parse_lowerable(program)
    return routed.forward(lowering, parsed, *bind(parsed, operands, sizes), heads_first, for_backward)


@torch.library.impl(_LIBRARY, "routed_backward", "CompositeExplicitAutograd")
def routed_backward(
    operands: Sequence[Tensor], sizes: Sequence[int], program: str, o: Tensor, lse: Tensor, rcp: Tensor, summed: Tensor,
    lists: Tensor, count: Tensor, grad_o: Tensor, grad_lse: Tensor | None, wanted: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the operands whose places are in `wanted`, in that order."""
    parsed = parse_lowerable(program)
    names = [parsed.tensors[place].name for place in wanted]
    given = bind(parsed, operands, sizes)
    found = routed.backward(lowering, parsed, *given, o, lse, rcp, summed, lists, count, grad_o, grad_lse, frozenset(names))
    return [found[name] for name in names]


@torch.library.register_fake("attncompiler::routed_forward", lib=_LIBRARY)
def _forward_fake(
    operands: Sequence[Tensor], sizes: Sequence[int], program: str, heads_first: bool = False, for_backward: bool = True
) -> tuple[Tensor, ...]:
    parsed = parse_lowerable(program)
    tensors, numbers = bind(parsed, operands, sizes)
    o, lse, rcp = new_outputs(parsed, tensors, numbers, heads_first)
    summed = o.new_empty(o.shape if for_backward and parsed.route.gain != ONE else 0)
    return o, lse, rcp, summed, o.new_empty((2, *o.shape[:3]), dtype=torch.int32), o.new_empty(o.shape[:2], dtype=torch.int32)


@torch.library.register_fake("attncompiler::routed_backward", lib=_LIBRARY)
def _backward_fake(
    operands: Sequence[Tensor], sizes: Sequence[int], program: str, o: Tensor, lse: Tensor, rcp: Tensor, summed: Tensor,
    lists: Tensor, count: Tensor, grad_o: Tensor, grad_lse: Tensor | None, wanted: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    return [operands[place].new_empty(operands[place].shape) for place in wanted]


class _Routed(torch.autograd.Function):
    """The autograd rule."""

    @staticmethod
    def forward(ctx: Any, sizes: Sequence[int], program: str, heads_first: bool, *operands: Tensor) -> tuple[Tensor, ...]:
        output = torch.ops.attncompiler.routed_forward.default(operands, sizes, program, heads_first)
        ctx.program, ctx.sizes = program, sizes
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*operands, *output)
        return output  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *operands, o, lse, rcp, summed, lists, count = ctx.saved_tensors
        program = parse_lowerable(ctx.program)
        grad_o = torch.zeros_like(o) if grad_o is None else grad_o
        needed = ctx.needs_input_grad[3:]
        wanted = [i for i, decl in enumerate(program.tensors) if needed[i] and decl.name in program.differentiable]
        found = torch.ops.attncompiler.routed_backward.default(
            operands, ctx.sizes, ctx.program, o, lse, rcp, summed, lists, count, grad_o, grad_lse, wanted
        )
        gradients: list[Tensor | None] = [None] * len(operands)
        for place, gradient in zip(wanted, found, strict=True):
            gradients[place] = gradient
        return None, None, None, *gradients

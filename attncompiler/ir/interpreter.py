"""The meaning of the language: every program evaluated densely, in float64, in plain differentiable torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.ir.evaluate import integer, whole
from attncompiler.ir.expr import AXES, ONE, TRUE
from attncompiler.ir.interpret_state import interpret_state
from attncompiler.ir.interpret_tables import interpret_tables
from attncompiler.ir.phases import Phase, Program
from attncompiler.ir.program import Attention, Empty, Route
from attncompiler.ir.state import State
from attncompiler.ir.tables import Tables


@dataclass(frozen=True)
class Outputs:
    """O [b, h, q_idx, Dv] and lse [b, h, q_idx] (natural log), both float64."""

    o: Tensor
    lse: Tensor


def extents_of(program: Attention, sizes: Mapping[str, int]) -> dict[str, int]:
    """The four axis sizes as numbers."""
    return {axis.name: integer(program.axes.size(axis), sizes) for axis in AXES}


def interpret(
    program: Attention, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], dtype: torch.dtype = torch.float64
) -> Outputs:
    """Run `program` as it is defined. Gradients flow to every floating operand through torch's own autograd.

    Memory grows with q_idx * kv_idx: for tests and for `explain`, not for use. `dtype` other than float64 gives the
    same-precision eager code that kernels are compared with."""
    extents = extents_of(program, sizes)
    device = tensors[program.sum.tensor].device
    block = whole(tensors, sizes, extents, dtype, device)
    shape = tuple(extents[axis.name] for axis in AXES)
    score = block.tensor(program.score).to(dtype).expand(shape)
    keep = program.keep
    if keep.predicate != TRUE and keep.empty is not Empty.SCORE:
        score = score.masked_fill(~block.tensor(keep.predicate), float("-inf"))
    active = None if program.route.active == TRUE else block.tensor(program.route.active).expand(*shape[:3], 1)
    if active is not None:
        score = score.masked_fill(~active, 0.0)  # a row that is not computed holds no NaN that could reach a gradient
    extra = [block.tensor(e).to(dtype).expand(*shape[:3], 1) for e in program.weigh.extra]
    logits = torch.cat([score, *extra], dim=-1) if extra else score
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : shape[3]]
    if keep.zero_if_empty:
        weights = weights.masked_fill((lse == float("-inf")).unsqueeze(-1), 0.0)
    if program.adjust != ONE:
        weights = weights * block.tensor(program.adjust)
    value = block.vectors(program.sum)  # [b, h, 1, kv_idx, Dv]
    o = torch.matmul(weights, value.squeeze(2))
    if program.route != Route():
        gain = block.tensor(program.route.gain)
        o = o * (gain if active is None else torch.where(active, gain, 0))
    if active is not None:
        o, lse = o.masked_fill(~active, 0.0), lse.masked_fill(~active.squeeze(-1), float("-inf"))
    return Outputs(o, lse)


def interpret_program(
    program: Program, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Every named result of every phase; the program's own are those of the last one.

    What one phase gives, the next reads as it is, in `dtype`: no result is rounded to the type that it is declared with."""
    known = dict(tensors)
    results: dict[str, Tensor] = {}
    for phase in program.phases:
        read = {decl.name: known[decl.name] for decl in phase.work.tensors}
        found = dict(zip(phase.results, _run(phase, read, sizes, dtype), strict=False))
        known |= found
        results |= found
    return results


def _run(phase: Phase, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    work = phase.work
    if isinstance(work, Tables):
        made = interpret_tables(work, tensors, sizes, dtype)
        return tuple(made[name] for name in phase.results)
    if isinstance(work, State):
        return interpret_state(work, tensors, sizes, dtype)
    found = interpret(work, tensors, sizes, dtype)
    return found.o, found.lse

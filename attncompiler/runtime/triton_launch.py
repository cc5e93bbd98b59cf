"""The lowering of a GPU: run the emitted kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attncompiler.codegen.emission import Layout, needed_kernels, vector_reads
from attncompiler.codegen.emit import emit
from attncompiler.codegen.vectors import head_group, poison_empty_heads
from attncompiler.ir.expr import Const
from attncompiler.ir.program import Attention
from attncompiler.runtime.gradients import Gradients
from attncompiler.runtime.prepared import describable, prepare
from attncompiler.tuning.schedule import KernelSchedule, choose_schedule
from attncompiler.tuning.target import TARGETS

_DELTA = KernelSchedule(64, 64, 4, 1)


def check(program: Attention) -> None:
    """Raises: UnsupportedProgram, with the reason, for a program that has no kernel."""
    layout = Layout(static_groups(program), frozenset(program.differentiable))
    emit(program, choose_schedule(program, TARGETS["sm_80"]), layout)


def static_groups(program: Attention) -> tuple[int, ...]:
    """How many heads share each vector operand, from the program's text alone (a run-time size counts as 1)."""
    heads = program.axes.h
    count = int(heads.value) if isinstance(heads, Const) else 1
    return tuple(head_group(read, count) for read in vector_reads(program))


def forward(program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """O, lse and rcp, as docs/design.md defines them."""
    call = prepare(program, operands, sizes)
    b, h, m = (call.extents[axis] for axis in ("b", "h", "q_idx"))
    value = operands[program.sum.tensor]
    d = value.shape[-1]
    o = torch.empty_strided((b, h, m, d), (h * m * d, d, h * d, 1), dtype=value.dtype, device=value.device)
    lse = torch.empty((b, h, m), dtype=torch.float32, device=value.device)
    rcp = torch.empty((b, h, m) if program.has_rcp else (0,), dtype=torch.float32, device=value.device)
    if o.numel() == 0:
        return o, lse, rcp
    strides = {"stride_o_b": o.stride(0), "stride_o_h": o.stride(1), "stride_o_m": o.stride(2)}
    tensors = {**call.pointers(operands), "O": o, "Lse": lse, "Rcp": rcp}
    call.run("attention_forward", call.schedule.forward, Layout(call.groups, frozenset()), tensors, operands, strides)
    return o, lse, rcp


def backward(
    program: Attention,
    operands: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    o: Tensor,
    lse: Tensor,
    rcp: Tensor,
    grad_o: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients of the operands in `wanted`."""
    call = prepare(program, operands, sizes)
    if call.schedule.descriptors and not describable(grad_o):
        grad_o = grad_o.contiguous()
    layout = Layout(call.groups, wanted, grad_lse is not None)
    delta, reference = torch.empty((2, *lse.shape), dtype=torch.float32, device=o.device)
    tensors = {**call.pointers(operands), "O": o, "DO": grad_o, "Lse": lse, "Rcp": rcp, "Delta": delta, "Reference": reference}
    if grad_lse is not None:
        tensors["DLse"] = grad_lse.contiguous()
    sums = Gradients(call, operands, wanted)
    tensors |= sums.tensors
    strides = {f"stride_{t}_{a}": x.stride(i) for t, x in (("o", o), ("do", grad_o)) for i, a in enumerate("bhmd")} | sums.strides
    kernels = needed_kernels(program, wanted)
    if o.numel():
        call.run("attention_delta", _DELTA, layout, tensors, operands, strides)
        if "queries" in kernels and call.extents["kv_idx"]:
            call.run("attention_backward_queries", call.schedule.backward_queries, layout, tensors, operands, strides)
        if "keys" in kernels and call.extents["kv_idx"]:
            call.run("attention_backward_keys", call.schedule.backward_keys, layout, tensors, operands, strides)
    found = sums.finish(lse, rcp, delta)
    if program.sum.tensor in wanted:
        poison_empty_heads(program, call.block(operands), lse, found[program.sum.tensor])
    return found

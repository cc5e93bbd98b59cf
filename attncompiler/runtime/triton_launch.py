"""The lowering of a GPU: run the emitted kernels, forward and backward."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from attncompiler.codegen import portable
from attncompiler.codegen.emission import Layout, vector_reads
from attncompiler.codegen.emit import emit
from attncompiler.codegen.vectors import head_group, poison_empty_heads
from attncompiler.ir.expr import Const
from attncompiler.ir.program import Attention
from attncompiler.runtime.gradients import Gradients, pair_bytes, places_of, room
from attncompiler.runtime.launch import describable
from attncompiler.runtime.prepared import prepare
from attncompiler.tuning.schedule import choose_schedule
from attncompiler.tuning.target import TARGETS

log = logging.getLogger(__name__)


def check(program: Attention) -> None:
    """Raises: UnsupportedProgram, with the reason, for a program that has no kernel."""
    layout = Layout(static_groups(program), frozenset(program.differentiable))
    emit(program, choose_schedule(program, TARGETS["sm_80"]), layout)


def static_groups(program: Attention) -> tuple[int, ...]:
    """How many heads share each vector operand, from the program's text alone (a run-time size counts as 1)."""
    heads = program.axes.h
    count = int(heads.value) if isinstance(heads, Const) else 1
    return tuple(head_group(read, count) for read in vector_reads(program))


def forward(
    program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int], heads_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """O, lse and rcp, as docs/design.md defines them."""
    call = prepare(program, operands, sizes)
    b, h, m = (call.extents[axis] for axis in ("b", "h", "q_idx"))
    value = operands[program.sum.tensor]
    d = value.shape[-1]
    strides = (h * m * d, m * d, d, 1) if heads_first else (h * m * d, d, h * d, 1)
    o = torch.empty_strided((b, h, m, d), strides, dtype=value.dtype, device=value.device)
    lse = torch.empty((b, h, m), dtype=torch.float32, device=value.device)
    rcp = torch.empty((b, h, m), dtype=torch.float32, device=value.device) if program.has_rcp else call.no_rcp
    if o.numel() == 0:
        return o, lse, rcp
    tensors = call.pointers(operands)
    tensors |= {"O": o, "Lse": lse, "Rcp": rcp}
    call.run("attention_forward", heads_first, tensors, operands, lambda: (Layout(call.groups, frozenset()), _strides("o", o)))
    return o, lse, rcp


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{axis}": stride for axis, stride in zip("bhmd", tensor.stride(), strict=True)}


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
    places = places_of(call, operands, wanted)
    large = places.large
    if large and pair_bytes(call) * len(large) > room(call.device) / 2:
        # the kernels sum these from a buffer with one number for each pair; without the memory for it, tile after tile in torch
        log.warning(
            "%s: gradients of %s are summed without a kernel: too little memory", program.origin.line, ", ".join(sorted(large))
        )
        found = portable.backward(program, operands, sizes, o, lse, rcp, grad_o, grad_lse, large)
        return found | backward(program, operands, sizes, o, lse, rcp, grad_o, grad_lse, wanted - large)
    if call.schedule.descriptors and not describable(grad_o):
        grad_o = grad_o.contiguous()
    delta, reference = torch.empty((2, *lse.shape), dtype=torch.float32, device=o.device)
    tensors = {**call.pointers(operands), "O": o, "DO": grad_o, "Lse": lse, "Rcp": rcp, "Delta": delta, "Reference": reference}
    if call.schedule.warp_roles:
        tensors["NextRow"] = torch.empty(2, dtype=torch.int32, device=o.device)
    if grad_lse is not None:
        tensors["DLse"] = grad_lse.contiguous()
    sums = Gradients(call, operands, wanted, places)
    tensors |= sums.tensors
    variant = (wanted, grad_lse is None, grad_o.stride())

    def describe() -> tuple[Layout, Mapping[str, int]]:
        layout = Layout(call.groups, wanted, grad_lse is not None, places.described)
        return layout, {**_strides("o", o), **_strides("do", grad_o), **places.strides}

    if o.numel():
        for name in places.kernels:
            call.run(name, variant, tensors, operands, describe)
    found = sums.finish(lse, rcp, delta)
    if program.sum.tensor in wanted and call.may_keep_nothing:
        poison_empty_heads(program, call.block(operands), lse, found[program.sum.tensor])
    return found

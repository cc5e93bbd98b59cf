"""The lowering of a GPU: run the emitted kernels, forward and backward."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from attncompiler.codegen import portable
from attncompiler.codegen.emission import ByList, Layout, vector_reads
from attncompiler.codegen.emit import emit
from attncompiler.codegen.vectors import head_group, poison_empty_heads
from attncompiler.ir.expr import Const
from attncompiler.ir.program import Attention
from attncompiler.runtime.gradients import Gradients, pair_bytes, places_of, room
from attncompiler.runtime.launch import describable
from attncompiler.runtime.outputs import attention_outputs
from attncompiler.runtime.prepared import prepare
from attncompiler.runtime.rows import Rows
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
    shape = tuple(call.extents[axis] for axis in ("b", "h", "q_idx"))
    o, lse = attention_outputs(shape, operands[program.sum.tensor], heads_first)
    rcp = torch.empty_like(lse) if program.has_rcp else call.no_rcp
    if o.numel() == 0:
        return o, lse, rcp
    tensors = {**call.pointers(operands), "O": o, "Lse": lse, "Rcp": rcp}
    call.run("attention_forward", heads_first, tensors, operands, lambda: (Layout(call.groups, frozenset()), _strides("o", o)))
    return o, lse, rcp


def takes_rows(program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> bool:
    """True where `forward_by_list` runs a program. Copies of 16 bytes need strides that Triton knows to be aligned."""
    call = prepare(program, operands, sizes)
    return call.schedule.warp_roles and all(stride % 16 == 0 for stride in call.query_strides)


def forward_by_list(
    program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int], rows: Rows, gain: Tensor | None, o: Tensor, lse: Tensor,
    keeps_sums: bool,
) -> Tensor:  # fmt: skip
    """As `forward`, where `takes_rows`: row i of a list is the query at its place i, whose vector is read, and whose O and lse are written,
    where queries lie; the others stay as they are. O is multiplied by `gain` [b, h, q_idx]. Returns what O was before its gain,
    [b, h, q_idx, Dv] in the order of the lists, or nothing unless `keeps_sums`."""
    call = prepare(program, operands, sizes)
    summed = torch.empty(o.shape if keeps_sums else 0, dtype=o.dtype, device=o.device)
    lists = {"Index": rows.index, "Count": rows.count}
    tensors = {**call.pointers(operands), "O": o, "Lse": lse, "Summed": summed, **lists}
    strides = _strides("o", o)
    if gain is not None:
        tensors["Gain"] = gain
        strides |= dict(zip(("stride_gain_b", "stride_gain_h", "stride_gain_m"), gain.stride(), strict=True))
    layout = Layout(call.groups, frozenset(), by_list=ByList(gain is not None, keeps_sums))
    variant = o.stride(), layout.by_list, None if gain is None else (gain.dtype, gain.stride())
    call.run("attention_forward", variant, tensors, operands, lambda: (layout, strides))
    return summed


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
    if o.numel() == 0:
        return {name: torch.zeros_like(operands[name], memory_format=torch.contiguous_format) for name in wanted}
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
    if call.schedule.descriptors:
        o, grad_o = (x if describable(x) else x.clone(memory_format=torch.contiguous_format) for x in (o, grad_o))
    rows = -(-lse.numel() // 4) * 4  # tensors begin where 16 bytes do
    memory = torch.zeros(2 * rows + 2, dtype=torch.float32, device=o.device)  # rows that no kernel takes have 0
    delta, reference = (memory[rows * place :][: lse.numel()].view(lse.shape) for place in range(2))
    tensors = {**call.pointers(operands), "O": o, "DO": grad_o, "Lse": lse, "Rcp": rcp, "Delta": delta, "Reference": reference}
    if call.schedule.warp_roles:
        tensors["NextRow"] = memory[2 * rows :].view(torch.int32)
    if grad_lse is not None:
        tensors["DLse"] = grad_lse.contiguous()
    sums = Gradients(call, operands, wanted, places)
    tensors |= sums.tensors
    variant = (wanted, grad_lse is None, o.stride(), grad_o.stride())

    def describe() -> tuple[Layout, Mapping[str, int]]:
        layout = Layout(call.groups, wanted, grad_lse is not None, places.described)
        return layout, {**_strides("o", o), **_strides("do", grad_o), **places.strides}

    for name in places.kernels:
        call.run(name, variant, tensors, operands, describe)
    found = sums.finish(lse, rcp, delta)
    if program.sum.tensor in wanted and call.may_keep_nothing:
        poison_empty_heads(program, call.block(operands), lse, found[program.sum.tensor])
    return found

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
from attncompiler.runtime.prepared import Prepared, prepare
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
    o, lse = _outputs(call, operands, heads_first)
    rcp = torch.empty_like(lse) if program.has_rcp else call.no_rcp
    if o.numel() == 0:
        return o, lse, rcp
    tensors = {**call.pointers(operands), "O": o, "Lse": lse, "Rcp": rcp}
    call.run("attention_forward", heads_first, tensors, operands, lambda: (Layout(call.groups, frozenset()), _strides("o", o)))
    return o, lse, rcp


def _outputs(call: Prepared, operands: Mapping[str, Tensor], heads_first: bool) -> tuple[Tensor, Tensor]:
    """O and lse, with nothing in them."""
    b, h, m = (call.extents[axis] for axis in ("b", "h", "q_idx"))
    value = operands[call.program.sum.tensor]
    d = value.shape[-1]
    strides = (h * m * d, m * d, d, 1) if heads_first else (h * m * d, d, h * d, 1)
    o = torch.empty_strided((b, h, m, d), strides, dtype=value.dtype, device=value.device)
    return o, torch.empty((b, h, m), dtype=torch.float32, device=value.device)


def takes_rows(program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> bool:
    """True where `forward_by_list` runs a program. Copies of 16 bytes need strides that Triton knows to be aligned."""
    call = prepare(program, operands, sizes)
    return call.schedule.warp_roles and all(stride % 16 == 0 for stride in call.query_strides)


def forward_by_list(
    program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int], rows: Rows, gain: Tensor | None, heads_first: bool,
    keeps_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `forward`, where `takes_rows`: row i of a list is the query at its place i, whose vector is read, and O and lse written, where
    queries lie. O is multiplied by `gain` [b, h, q_idx]. Queries in no list get O = 0 and lse = -inf. Returns O, lse and what O was
    before its gain, [b, h, q_idx, Dv] in the order of the lists, or nothing unless `keeps_sums`."""
    call = prepare(program, operands, sizes)
    o, lse = _outputs(call, operands, heads_first)
    summed = torch.empty(o.shape if keeps_sums else 0, dtype=o.dtype, device=o.device)
    lists = {"Index": rows.index, "Place": rows.place, "Count": rows.count}
    tensors = {**call.pointers(operands), "O": o, "Lse": lse, "Summed": summed, **lists}
    strides = _strides("o", o)
    if gain is not None:
        tensors["Gain"] = gain
        strides |= dict(zip(("stride_gain_b", "stride_gain_h", "stride_gain_m"), gain.stride(), strict=True))
    layout = Layout(call.groups, frozenset(), by_list=ByList(gain is not None, keeps_sums))
    variant = heads_first, layout.by_list, None if gain is None else (gain.dtype, gain.stride())
    call.run("attention_forward", variant, tensors, operands, lambda: (layout, strides))
    return o, lse, summed


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

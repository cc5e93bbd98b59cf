"""Which lowering runs a program: the Triton kernels on a GPU that they support, the portable one everywhere else."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from attncompiler.codegen import portable
from attncompiler.errors import DeviceError, UnsupportedProgram
from attncompiler.ir.program import Attention, Route
from attncompiler.passes.compact_rows import compact_rows
from attncompiler.runtime import parted, triton_launch
from attncompiler.runtime.gathered import gathered

log = logging.getLogger(__name__)


def forward(
    program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int], heads_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """O, lse and rcp (docs/design.md). Raises: DeviceError for operands on different devices."""
    parts = parted.parts_of(program)
    if parts:
        return parted.forward(parts, forward, program, operands, sizes, heads_first)
    lists = gathered(program)
    given = lists.operands(operands, sizes) if lists.gathers else operands
    lowering = _lowering(lists.program, given, sizes)
    found: tuple[Tensor, Tensor, Tensor] = lowering.forward(lists.program, given, sizes, heads_first)
    return found


def takes_rows(program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> bool:
    """True where a kernel itself takes rows of queries by list, and puts back what they give (triton_launch.forward_by_list)."""
    if gathered(program).gathers or _lowering(program, operands, sizes) is portable:
        return False
    return triton_launch.takes_rows(program, operands, sizes)


forward_by_list = triton_launch.forward_by_list


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
    """Gradients of the operands in `wanted`, by the lowering that ran the forward."""
    parts = parted.parts_of(program)
    if parts:
        return parted.backward(parts, backward, operands, sizes, o, lse, rcp, grad_o, grad_lse, wanted)
    lists = gathered(program)
    given = lists.operands(operands, sizes) if lists.gathers else operands
    lowering, inner = _lowering(lists.program, given, sizes), lists.wanted(wanted)
    found: dict[str, Tensor] = lowering.backward(lists.program, given, sizes, o, lse, rcp, grad_o, grad_lse, inner)
    return lists.gradients(found, wanted, operands, sizes) if lists.gathers else found


def _lowering(program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> ModuleType:
    value = operands[program.sum.tensor]
    if len({tensor.device for tensor in operands.values()}) > 1:
        name, tensor = next((name, tensor) for name, tensor in operands.items() if tensor.device != value.device)
        raise DeviceError(
            f"operand {name} of the attention is on {tensor.device}, the values are on {value.device}",
            where=program.origin.line,
            do="move all operands to one device",
        )
    if not value.is_cuda or value.numel() == 0:  # kernels have tiles of keys
        return portable
    reason = unsupported(program)
    if reason:
        log.debug("portable lowering for %s: %s", program.origin.line, reason)
    return portable if reason else triton_launch


def in_kernels(program: Attention) -> Attention:
    """The program that kernels run: rows of queries and of keys by list are taken together first."""
    routed = program.route != Route()
    return gathered(compact_rows(program, True).program if routed else program).program


@functools.lru_cache(maxsize=4096)
def unsupported(program: Attention) -> str:
    """Why a program has no Triton kernel; "" if it has one."""
    try:
        triton_launch.check(in_kernels(program))
    except UnsupportedProgram as error:
        return error.what
    return ""

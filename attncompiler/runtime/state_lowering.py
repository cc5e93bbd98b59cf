"""Which lowering runs a recurrence: the Triton kernels on a GPU that they support, the portable one everywhere else."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from attncompiler.codegen import portable_state
from attncompiler.codegen.emit_state import state_source
from attncompiler.codegen.recurrence import Recurrence
from attncompiler.errors import DeviceError, UnsupportedProgram
from attncompiler.runtime import state_launch
from attncompiler.tuning.target import TARGETS

log = logging.getLogger(__name__)


def lowering_of(recurrence: Recurrence, operands: Mapping[str, Tensor]) -> ModuleType:
    """A module with `forward` and `backward` (codegen/portable_state.py). Raises: DeviceError for operands on different devices."""
    value = operands[recurrence.value.tensor]
    for name, tensor in operands.items():
        if tensor.device != value.device:
            raise DeviceError(
                f"operand {name} of the linear attention is on {tensor.device}, the values are on {value.device}",
                where=recurrence.program.origin.line,
                do="move all operands to one device",
            )
    if not value.is_cuda or min(tensor.numel() for tensor in operands.values()) == 0:
        return portable_state
    reason = unsupported(recurrence)
    if reason:
        log.debug("portable lowering for %s: %s", recurrence.program.origin.line, reason)
    return portable_state if reason else state_launch


@functools.lru_cache(maxsize=4096)
def unsupported(recurrence: Recurrence) -> str:
    """Why a recurrence has no Triton kernel; "" if it has one."""
    try:
        state_source(recurrence, TARGETS["sm_80"])
    except UnsupportedProgram as error:
        return error.what
    return ""

"""Which lowering runs a recurrence."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from attncompiler.codegen import portable_state
from attncompiler.codegen.recurrence import Recurrence
from attncompiler.errors import DeviceError


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
    return portable_state

"""The operands of a call by name, and the shape of what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Dtype


def bind(program: Attention, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The operands and the run-time integers of a program, by name."""
    return dict(zip(program.decls, operands, strict=True)), dict(zip(program.sizes, sizes, strict=True))


def new_outputs(
    program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int], heads_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """O, lse and rcp without values."""
    extents = extents_of(program, sizes)
    value = operands[program.sum.tensor]
    b, h, m = extents["b"], extents["h"], extents["q_idx"]
    o = value.new_empty((b, h, m, value.shape[-1]) if heads_first else (b, m, h, value.shape[-1]))
    o = o if heads_first else o.transpose(1, 2)
    stats = torch.float64 if program.value.dtype is Dtype.F64 else torch.float32
    lse = value.new_empty((b, h, m), dtype=stats)
    rcp = value.new_empty((b, h, m) if program.has_rcp else (0,), dtype=stats)
    return o, lse, rcp


def attention_outputs(shape: Sequence[int], value: Tensor, heads_first: bool) -> tuple[Tensor, Tensor]:
    """O [b, h, q_idx, Dv] in the dtype of `value` and lse [b, h, q_idx] in float32 for this `shape` of b, h and q_idx, without values, on
    its device."""
    (b, h, m), d = shape, value.shape[-1]
    strides = (h * m * d, m * d, d, 1) if heads_first else (h * m * d, d, h * d, 1)
    o = torch.empty_strided((b, h, m, d), strides, dtype=value.dtype, device=value.device)
    return o, torch.empty((b, h, m), dtype=torch.float32, device=value.device)

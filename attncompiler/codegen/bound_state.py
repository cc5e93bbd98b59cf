"""A recurrence with its operands: what every lowering of it reads, and how gradients become those of whole operands."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attncompiler.codegen.recurrence import KEY_AXES, QUERY_AXES, ROW_AXES, STATE_AXES, VALUE_AXES, Decays, Recurrence
from attncompiler.codegen.strided import StridedView, add_gradient, strided_view
from attncompiler.codegen.vectors import add_elements
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.derivative import derivative
from attncompiler.ir.evaluate import Block, integer, whole
from attncompiler.ir.expr import ONE, Axis, Const, Expr, Read, reads_of
from attncompiler.ir.program import Dtype
from attncompiler.ir.state import ROW
from attncompiler.ir.state import STATE_AXES as ALL_AXES

# A decay of exp of this and below is 0 in the type; one that is stays finite, since differences of logarithms are taken.
_LOWEST_LOG = {torch.float32: -120.0, torch.float64: -800.0}


class StateGradients(NamedTuple):
    """Gradients by what a recurrence is made of: query [b, h, q_idx, c] (scale applied), key [b, h, kv_idx, c], value
    [b, h, kv_idx, d], log_decay [b, h, kv_idx] or [b, h, 1], start [b, h, c, d], start_row [b, h, c]. Empty: not computed."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    start: Tensor
    start_row: Tensor


@dataclass(frozen=True)
class Grouped:
    """Vectors [b, h / group, length, channels]: head h reads entry h // group."""

    tensor: Tensor
    group: int

    def heads(self, h: int) -> Tensor:
        """[b, h, length, channels], a copy where heads share vectors."""
        return self.tensor if self.group == 1 else self.tensor.repeat_interleave(self.group, 1)[:, :h]


class Bound:
    """One call of a recurrence. States and decays are float32, float64 where an operand is f64."""

    def __init__(self, recurrence: Recurrence, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        self.recurrence, self.operands, self.sizes = recurrence, operands, sizes
        axes = recurrence.program.axes
        self.extents = {axis.name: integer(axes.size(axis), sizes) for axis in ALL_AXES}
        self.dtype = torch.float64 if recurrence.program.statistics is Dtype.F64 else torch.float32
        self.device = operands[recurrence.value.tensor].device

    def view(self, read: Read, axes: tuple[Axis, ...]) -> StridedView:
        view = strided_view(read, self.operands[read.tensor], axes, self.extents, self.sizes)
        if view is None:
            raise UnsupportedProgram(
                f"{read.tensor} of shape {list(self.operands[read.tensor].shape)} is read outside its bounds",
                where=self.recurrence.program.origin.line,
                why="the recurrence has more positions than the tensor: "
                + ", ".join(f"{axis.name}={self.extents[axis.name]}" for axis in axes),
                do="give tensors of the sizes that the program says",
            )
        return view

    def vectors(self, read: Read, axes: tuple[Axis, ...]) -> Grouped:
        view = self.view(read, axes)
        return Grouped(view.of(self.operands[read.tensor]), view.group)

    @functools.cached_property
    def query(self) -> Grouped:
        return self.vectors(self.recurrence.query, QUERY_AXES)

    @functools.cached_property
    def key(self) -> Grouped:
        return self.vectors(self.recurrence.key, KEY_AXES)

    @functools.cached_property
    def value(self) -> Grouped:
        return self.vectors(self.recurrence.value, VALUE_AXES)

    def start(self) -> Tensor:
        """S before the first step, [b, h, c, d] in the working precision: not to be written to."""
        return self._initial(self.recurrence.start, STATE_AXES)

    def start_row(self) -> Tensor:
        """z before the first step, [b, h, c]."""
        return self._initial(self.recurrence.start_row, ROW_AXES)

    def _initial(self, reads: tuple[Read, ...], axes: tuple[Axis, ...]) -> Tensor:
        for read in reads:
            return self.vectors(read, axes).heads(self.extents["h"]).to(self.dtype)
        shape = tuple(self.extents[axis.name] for axis in axes)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @functools.cached_property
    def _block(self) -> Block:
        return whole(self.operands, self.sizes, self.extents, self.dtype, self.device)

    @functools.cached_property
    def log_decay(self) -> Tensor:
        """Logarithms [b, h, kv_idx], or [b, h, 1] where they are per head; contiguous."""
        b, h, n = (self.extents[name] for name in ("b", "h", "kv_idx"))
        steps = n if self.recurrence.decays is Decays.BY_TOKEN else 1
        log = self._block.tensor(self.recurrence.log_decay).to(self.dtype).clamp(min=_LOWEST_LOG[self.dtype])
        return log.expand(b, h, 1, steps).squeeze(2).contiguous()

    # ------------------------------------------------------------------------------------------------------ the normaliser

    def divided(self, o: Tensor, rows: Tensor, start: int, stop: int) -> Tensor:
        """O [b, h, stop - start, d] of queries [start, stop) over `weigh`; rows [b, h, q_idx] are those of all queries."""
        if self.recurrence.weigh == ONE:
            return o
        block = self._weigh_block(rows)
        block.positions = {**block.positions, "q_idx": torch.arange(start, stop, device=self.device).reshape(1, 1, -1, 1)}
        return o / _over_queries(block.tensor(self.recurrence.weigh).to(self.dtype), tuple(o.shape[:3])).unsqueeze(-1)

    def _weigh_block(self, rows: Tensor) -> Block:
        return whole({**self.operands, ROW.tensor: rows}, self.sizes, self.extents, self.dtype, self.device)

    def before_division(self, o: Tensor, rows: Tensor, grad_o: Tensor, into: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The gradients of what is divided [b, h, q_idx, d] and of the rows [b, h, q_idx]; those of other tensors that the
        normaliser reads are added to `into`."""
        if self.recurrence.weigh == ONE:
            return grad_o, torch.empty(0)
        weigh = self.recurrence.weigh
        block = self._weigh_block(rows)
        divisor = _over_queries(block.tensor(weigh).to(self.dtype), tuple(o.shape[:3]))
        grad = grad_o.to(self.dtype) / divisor.unsqueeze(-1)
        slope = -(grad * o).sum(-1)  # of the divisor
        grad_rows = torch.zeros_like(slope)
        for read in reads_of(weigh):
            if read == ROW:
                grad_rows = slope * _over_queries(_factor(block, weigh, read), tuple(slope.shape))
            elif read.tensor in into:
                factor = _over_queries(_factor(block, weigh, read), tuple(slope.shape))
                add_elements(read, (slope * factor).unsqueeze(-1), into[read.tensor], block)
        return grad, grad_rows

    # -------------------------------------------------------------------------------------------------------- gradients

    def totals(self, wanted: frozenset[str]) -> dict[str, Tensor]:
        """Where the gradients of the operands in `wanted` are summed."""
        return {name: torch.zeros(self.operands[name].shape, dtype=self.dtype, device=self.device) for name in wanted}

    def add(self, found: StateGradients, into: Mapping[str, Tensor]) -> None:
        """Add gradients to those of the operands in `into`."""
        parts = self.recurrence
        reads: list[tuple[Read, Tensor, tuple[Axis, ...]]] = [
            (parts.query, found.query, QUERY_AXES), (parts.key, found.key, KEY_AXES), (parts.value, found.value, VALUE_AXES),
            *((read, found.start, STATE_AXES) for read in parts.start),
            *((read, found.start_row, ROW_AXES) for read in parts.start_row),
        ]  # fmt: skip
        for read, gradient, axes in reads:
            if read.tensor in into and gradient.numel():
                add_gradient(read, gradient, into[read.tensor], axes, self.sizes)
        if parts.decays is Decays.NEVER or not found.log_decay.numel():
            return
        clamped = self.log_decay <= _LOWEST_LOG[self.dtype]
        slope = found.log_decay.masked_fill(clamped, 0.0).unsqueeze(2)  # [b, h, 1, kv_idx or 1], as the block has it
        for read in reads_of(parts.log_decay):
            if read.tensor in into:
                add_elements(read, slope * _factor(self._block, parts.log_decay, read), into[read.tensor], self._block)


def _factor(block: Block, expr: Expr, read: Read) -> Tensor:
    factor = derivative(expr, read)
    return torch.tensor(float(factor.value), device=_device(block)) if isinstance(factor, Const) else block.tensor(factor)


def _device(block: Block) -> torch.device:
    return next(iter(block.positions.values())).device


def _over_queries(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A value over b, h, q_idx (and a kv_idx that it does not vary with) as [b, h, q_idx]."""
    return (value.squeeze(-1) if value.dim() == 4 else value).expand(shape)

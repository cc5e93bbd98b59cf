"""What calls of a program with a route share where their operands lie alike: made on the first, so that a call only shows its operands
to the kernels that move rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attncompiler.codegen.vectors import view_vectors
from attncompiler.ir.evaluate import Block, whole
from attncompiler.ir.expr import Q_IDX, Axis, B, Const, H, Read
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Empty
from attncompiler.passes.compact_rows import compact_rows, is_plain
from attncompiler.passes.plan import proved_nonempty
from attncompiler.runtime.prepared import Vectors

QUERY_AXES = (B, H, Q_IDX)


class RoutedLayout:
    """A program with a route for operands of one layout. `shape`: b, h, q_idx. `nonempty`: every query surely keeps a key;
    `nan_if_empty`: one that keeps none gives NaN. `reads_all`: what runs over the lists also reads what is far past their ends."""

    def __init__(self, program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        self.program, self.sizes = program, sizes
        self.extents = extents_of(program, sizes)
        self.shape = tuple(self.extents[axis.name] for axis in QUERY_AXES)
        self.nonempty = proved_nonempty(program, sizes, self.extents)
        self.nan_if_empty = program.keep.empty is Empty.NAN and not program.weigh.extra and not self.nonempty
        self.compact = compact_rows(program, self.nonempty)
        # sums of a head take all rows; so do those of keys, where a row that keeps none has weights
        self.reads_all = bool(program.weigh.extra) or self.compact.program.keep.empty is Empty.SCORE
        device = operands[program.sum.tensor].device
        self._positions = whole({}, sizes, self.extents, torch.float32, device).positions
        self._elements: dict[Read, Vectors] = {}
        singles = (program.route.active, self.compact.gain, *(read for _, read in self.compact.elements))
        for read in singles:
            if isinstance(read, Read) and is_plain(read):
                tensor = operands[read.tensor]
                self._elements[read] = _seen(_across(read, tensor, self.extents).expand(self.shape), tensor)
        self._vectors: dict[Read, Vectors] = {}
        # whether the kernel takes rows by list itself; what no kernel of the program does is known at the first call
        self.takes_rows: bool | None = None if device.type == "cuda" and not self.nan_if_empty else False
        self._gradients: dict[Read, Vectors] = {}  # where gradients lie that cover an operand
        for _, read in self.compact.copies:
            tensor = operands[read.tensor]
            view = view_vectors(read, tensor, Q_IDX, self.block(operands))
            if not view.gathered and view.group == 1:
                self._vectors[read] = _seen(view.tensor.expand(*self.shape, -1), tensor)
                fresh = torch.empty(tensor.shape, device="meta")
                whole_view = view_vectors(read, fresh, Q_IDX, self.block(operands)).tensor
                if whole_view.shape[:3] == self.shape and whole_view.numel() == fresh.numel():
                    self._gradients[read] = _seen(whole_view, fresh)
        gain = self.compact.gain
        if isinstance(gain, Read):
            fresh = torch.empty(operands[gain.tensor].shape, device="meta")
            whole_view = _across(gain, fresh, self.extents)
            if whole_view.shape == self.shape and whole_view.numel() == fresh.numel():
                self._gradients[gain] = _seen(whole_view, fresh)

    def block(self, operands: Mapping[str, Tensor]) -> Block:
        """All positions of the program, over the operands of a call."""
        return Block(operands, self.sizes, self.extents, self._positions, torch.float32)

    def elements(self, read: Read, operands: Mapping[str, Tensor]) -> Tensor:
        """What a read of b, h and q_idx gives, [b, h, q_idx], as its operand has it."""
        tensor, known = operands[read.tensor], self._elements.get(read)
        if known is not None:
            return known.show(tensor, always=True)
        found = Block(operands, self.sizes, self.extents, self._positions, tensor.dtype).tensor(read)
        return found.reshape((1,) * (4 - found.dim()) + tuple(found.shape)).squeeze(3).expand(self.shape)

    def vectors(self, read: Read, operands: Mapping[str, Tensor]) -> Tensor:
        """[b, h, q_idx, D]."""
        known = self._vectors.get(read)
        if known is not None:
            return known.show(operands[read.tensor], always=True)
        view = view_vectors(read, operands[read.tensor], Q_IDX, self.block(operands))
        shown = view.tensor.repeat_interleave(view.group, 1)[:, : self.shape[1]] if view.group > 1 else view.tensor
        return shown.expand(*self.shape, -1)

    def gradient(self, read: Read, total: Tensor) -> Tensor | None:
        """Where a dense gradient of the whole operand of a read holds that of each query; None where several share a place, or none
        has it."""
        known = self._gradients.get(read)
        return None if known is None else known.show(total, always=True)

    def gain_sums(self, total: Tensor) -> Tensor:
        """A dense gradient of the operand of gains as [b or 1, h or 1, q_idx or 1]."""
        assert isinstance(self.compact.gain, Read)
        return _across(self.compact.gain, total, self.extents)


def _seen(view: Tensor, tensor: Tensor) -> Vectors:
    return Vectors(int(view.storage_offset() - tensor.storage_offset()), tuple(view.shape), view.stride())


def _across(read: Read, tensor: Tensor, extents: Mapping[str, int]) -> Tensor:
    """The elements of a plain read as a view [b or 1, h or 1, q_idx or 1]."""
    for place in reversed(range(len(read.index))):
        entry = read.index[place]
        if isinstance(entry, Const):
            tensor = tensor.select(place, int(entry.value))
    axes = [entry for entry in read.index if isinstance(entry, Axis)]
    shown = tensor.permute([axes.index(axis) for axis in QUERY_AXES if axis in axes])
    for place, axis in enumerate(QUERY_AXES):
        shown = shown.narrow(place, 0, extents[axis.name]) if axis in axes else shown.unsqueeze(place)
    return shown


_LAYOUTS: dict[tuple[Any, ...], RoutedLayout] = {}
_MOST = 1024  # remembered; a serving process with ever new lengths must not grow for ever


def layout_of(program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> RoutedLayout:
    """What is known for operands of this layout; made on the first call."""
    key = (program, *sizes.values(), *[(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15) for t in operands.values()])
    found = _LAYOUTS.get(key)
    if found is None:
        if len(_LAYOUTS) >= _MOST:
            _LAYOUTS.pop(next(iter(_LAYOUTS)))
        found = _LAYOUTS[key] = RoutedLayout(program, operands, sizes)
    return found

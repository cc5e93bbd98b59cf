"""Attention whose heads are switched and scaled for each query: the rows that are left are taken together, and what runs is a plain
program over them (passes/compact_rows.py). Keys and values are read where they lie."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from attncompiler.codegen.vectors import add_elements, poison_empty_heads, vector_gradient, view_vectors
from attncompiler.ir.evaluate import Block, whole
from attncompiler.ir.expr import Q_IDX, Axis, B, Const, H, Read
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Empty
from attncompiler.passes.compact_rows import LENGTH, Compact, compact_rows, is_plain
from attncompiler.passes.plan import proved_nonempty
from attncompiler.runtime.rows import Rows, rows_of

_QUERY_AXES = (B, H, Q_IDX)


class Routed:
    """One call of a program with a route."""

    def __init__(self, program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        self.program, self.given, self.sizes = program, operands, sizes
        self.extents, self.nonempty, self.compact = _known(program, tuple(sizes.items()))
        self.device = operands[program.sum.tensor].device
        self.rows: Rows = rows_of(self._active())
        self.compact_sizes = {name: self.rows.length if name == LENGTH else sizes[name] for name in self.compact.program.sizes}

    @property
    def shape(self) -> tuple[int, ...]:
        """b, h, q_idx."""
        return tuple(self.extents[axis.name] for axis in _QUERY_AXES)

    @functools.cached_property
    def block(self) -> Block:
        """All positions; what reads an operand as it lies needs none."""
        return whole(self.given, self.sizes, self.extents, torch.float32, self.device)

    def _active(self) -> Tensor:
        """bool [b, h, q_idx]."""
        active = self.program.route.active
        if isinstance(active, Read) and is_plain(active):
            return _across(active, self.given[active.tensor], self.extents).expand(self.shape)
        found: Tensor = self.block.tensor(active).to(torch.bool)
        return found.expand(*self.shape, 1).squeeze(3)

    @property
    def nan_if_empty(self) -> bool:
        """True where a row that keeps no key gives NaN."""
        return self.program.keep.empty is Empty.NAN and not self.program.weigh.extra and not self.nonempty

    @property
    def gain(self) -> Tensor | None:
        """[b, h, q_idx], a view of the operand; None for 1."""
        if not isinstance(self.compact.gain, Read):
            return None
        return _across(self.compact.gain, self.given[self.compact.gain.tensor], self.extents).expand(self.shape)

    def operands(self) -> dict[str, Tensor]:
        """The operands of the compact program."""
        made = {name: self.rows.take_vectors(self._vectors(read)) for name, read in self.compact.copies}
        made |= {name: self.rows.take_elements(self._elements(read)) for name, read in self.compact.elements}
        made |= {self.compact.rows: self.rows.index, self.compact.count: self.rows.count}
        return {decl.name: made[decl.name] if decl.name in made else self.given[decl.name] for decl in self.compact.program.tensors}

    def _vectors(self, read: Read) -> Tensor:
        """[b or 1, h, q_idx, D]."""
        view = view_vectors(read, self.given[read.tensor], Q_IDX, self.block)
        shown = view.tensor.repeat_interleave(view.group, 1)[:, : self.extents["h"]] if view.group > 1 else view.tensor
        return shown.expand(*shown.shape[:2], self.extents["q_idx"], -1)

    def _elements(self, read: Read) -> Tensor:
        """[b or 1, h or 1, q_idx], in float32 where the operand has less."""
        tensor = self.given[read.tensor]
        tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        if is_plain(read):
            return _across(read, tensor, self.extents)
        block = Block({**self.given, read.tensor: tensor}, self.sizes, self.extents, self.block.positions, tensor.dtype)
        found = block.tensor(read)
        return found.reshape((1,) * (4 - found.dim()) + tuple(found.shape)).squeeze(3)


@functools.lru_cache(maxsize=1024)
def _known(program: Attention, sizes: tuple[tuple[str, int], ...]) -> tuple[dict[str, int], bool, Compact]:
    """What calls of one program at one size share: its axes, whether every query surely keeps a key, and what runs."""
    numbers = dict(sizes)
    extents = extents_of(program, numbers)
    nonempty = proved_nonempty(program, numbers, extents)
    return extents, nonempty, compact_rows(program, nonempty)


def forward(
    lowering: ModuleType, program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int], heads_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O, lse and rcp as docs/design.md defines them; and for the backward, where there is a gain, the rows that are left before it,
    [b, h, q_idx, Dv], of which those past the end of a list hold nothing. `lowering` runs the program over these rows."""
    call = Routed(program, operands, sizes)
    summed, lse, rcp = lowering.forward(call.compact.program, call.operands(), call.compact_sizes, True)
    o, lse = call.rows.put_vectors(summed, lse, call.gain, call.nan_if_empty, heads_first)
    if call.gain is None:
        summed = summed.new_empty(0)
    elif missing := call.extents["q_idx"] - call.rows.length:
        summed = torch.nn.functional.pad(summed, (0, 0, 0, missing))
    return o, lse, call.rows.put(rcp, 1.0) if program.has_rcp else rcp, summed


def backward(
    lowering: ModuleType,
    program: Attention,
    operands: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    o: Tensor,
    lse: Tensor,
    rcp: Tensor,
    summed: Tensor,
    grad_o: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients of the operands in `wanted`, from what `forward` gave."""
    call = Routed(program, operands, sizes)
    rows, compact = call.rows, call.compact
    gain = call.gain
    found: dict[str, Tensor] = {}  # without what has no gradient yet
    if gain is None:
        grad_rows, lse_rows, _ = rows.take_gradients(grad_o, lse, None, None)
        summed = rows.take_vectors(o)
        summed = summed.masked_fill((lse_rows == float("-inf"))[..., None], 0.0) if call.nan_if_empty else summed
    else:
        summed = summed[:, :, : rows.length]
        grad_rows, lse_rows, along = rows.take_gradients(grad_o, lse, gain, summed)
        assert isinstance(compact.gain, Read) and along is not None
        name = compact.gain.tensor
        if name in wanted:
            if call.nan_if_empty:
                along = along.masked_fill((lse == float("-inf")) & (rows.place >= 0), torch.nan)
            target = _across(compact.gain, _sums(found, name, operands), call.extents)
            target += along.sum_to_size(target.shape).to(target.dtype)
    rcp_rows = rows.take(rcp) if program.has_rcp else rcp
    grad_lse_rows = None if grad_lse is None else rows.take(grad_lse)
    copies, elements = ({name: read for name, read in of if read.tensor in wanted} for of in (compact.copies, compact.elements))
    inner = frozenset(name for name in compact.program.differentiable if name in wanted or name in copies or name in elements)
    made = lowering.backward(
        compact.program, call.operands(), call.compact_sizes, summed, lse_rows, rcp_rows, grad_rows, grad_lse_rows, inner
    )
    for name, gradient in made.items():
        if name in copies:
            _put_gradient(call, copies[name], gradient, found)
        elif name in elements:
            read = elements[name]
            add_elements(read, rows.put(gradient).unsqueeze(3), _sums(found, read.tensor, operands), call.block)
        elif name in found:
            found[name] += gradient
        else:
            found[name] = gradient
    if program.sum.tensor in wanted and not call.nonempty:
        value_sums = _sums(found, program.sum.tensor, operands)
        poison_empty_heads(program, call.block, lse.masked_fill(rows.place < 0, 0.0), value_sums)
    return {name: _sums(found, name, operands) for name in wanted}


def _sums(found: dict[str, Tensor], name: str, operands: Mapping[str, Tensor]) -> Tensor:
    """The gradient of an operand so far, 0 at first."""
    if name not in found:
        found[name] = operands[name].new_zeros(operands[name].shape)
    return found[name]


def _put_gradient(call: Routed, read: Read, gradient: Tensor, found: dict[str, Tensor]) -> None:
    """Add the gradient of rows by list to that of the operand that they were read from. The first that covers a whole operand is
    written to it at once: every row once, none read."""
    operand = call.given[read.tensor]
    view = view_vectors(read, operand, Q_IDX, call.block)
    whole = (*call.rows.place.shape, gradient.shape[3])
    if read.tensor not in found and not view.gathered and view.tensor.shape == whole and view.tensor.numel() == operand.numel():
        found[read.tensor] = operand.new_empty(operand.shape)
        call.rows.put_into(view_vectors(read, found[read.tensor], Q_IDX, call.block).tensor, gradient)
        return
    sums = vector_gradient(read, view, _sums(found, read.tensor, call.given), Q_IDX, call.block)
    b, h, m = call.shape
    sums.add(call.rows.put(gradient), (0, b), (0, h), ((0, m),))
    sums.scatter(call.block)


def _across(read: Read, tensor: Tensor, extents: Mapping[str, int]) -> Tensor:
    """The elements of a plain read as a view [b or 1, h or 1, q_idx or 1]."""
    for place in reversed(range(len(read.index))):
        entry = read.index[place]
        if isinstance(entry, Const):
            tensor = tensor.select(place, int(entry.value))
    axes = [entry for entry in read.index if isinstance(entry, Axis)]
    shown = tensor.permute([axes.index(axis) for axis in _QUERY_AXES if axis in axes])
    for place, axis in enumerate(_QUERY_AXES):
        shown = shown.narrow(place, 0, extents[axis.name]) if axis in axes else shown.unsqueeze(place)
    return shown

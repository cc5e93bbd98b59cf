"""Attention whose heads are switched and scaled for each query: the rows that are left are taken together, and what runs is a plain
program over them (passes/compact_rows.py). Keys and values are read where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from attncompiler.codegen.vectors import Lines, add_elements, poison_empty_heads, vector_gradient, view_vectors
from attncompiler.ir.expr import Q_IDX, Read
from attncompiler.ir.program import Attention
from attncompiler.passes.compact_rows import LENGTH, is_plain
from attncompiler.runtime.outputs import attention_outputs
from attncompiler.runtime.routed_layout import layout_of
from attncompiler.runtime.rows import Rows, rows_of


class Routed:
    """One call of a program with a route. `lists` and `count`: of its rows, where they were made before (Rows.lists)."""

    def __init__(
        self, program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int], lists: Tensor | None = None,
        count: Tensor | None = None, heads_first: bool = False,
    ) -> None:  # fmt: skip
        self.program, self.given = program, operands
        self.layout = layout_of(program, operands, sizes)
        self.compact = self.layout.compact
        self.outputs: tuple[Tensor, Tensor] | None = None  # O and lse of what is in no list, written as the lists are made
        if lists is None or count is None:
            if self.layout.takes_rows is not False:
                self.outputs = attention_outputs(self.layout.shape, operands[program.sum.tensor], heads_first)
            self.rows = rows_of(self._active(), self.outputs)
        else:
            self.rows = Rows.of(lists, count)
        self.sizes = {name: self.rows.length if name == LENGTH else sizes[name] for name in self.compact.program.sizes}

    def _active(self) -> Tensor:
        """bool [b, h, q_idx]."""
        active = self.program.route.active
        if isinstance(active, Read) and is_plain(active):
            return self.layout.elements(active, self.given)
        found: Tensor = self.layout.block(self.given).tensor(active).to(torch.bool)
        return found.expand(*self.layout.shape, 1).squeeze(3)

    @property
    def gain(self) -> Tensor | None:
        """[b, h, q_idx], a view of the operand; None for 1."""
        gain = self.compact.gain
        return self.layout.elements(gain, self.given) if isinstance(gain, Read) else None

    def operands(self) -> dict[str, Tensor]:
        """The operands of the compact program, but for vectors of queries: these lie as they did."""
        made = {name: self.layout.vectors(read, self.given) for name, read in self.compact.copies}
        made |= {name: self._taken(read) for name, read in self.compact.elements}
        made |= {self.compact.rows: self.rows.index, self.compact.count: self.rows.count}
        return {decl.name: made[decl.name] if decl.name in made else self.given[decl.name] for decl in self.compact.program.tensors}

    def taken(self, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with vectors of queries taken by list."""
        copies = {name: self.rows.take_vectors(operands[name], self.layout.reads_all) for name, _ in self.compact.copies}
        return {**operands, **copies}

    def _taken(self, read: Read) -> Tensor:
        """Single elements by list, in float32 where the operand has less."""
        found = self.rows.take_elements(self.layout.elements(read, self.given))
        return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


def forward(
    lowering: ModuleType, program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int], heads_first: bool,
    for_backward: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """O, lse and rcp as docs/design.md defines them; and `for_backward`, where there is a gain, the rows that are left before it,
    [b, h, q_idx, Dv], of which those past the end of a list hold nothing; and the lists (Rows.lists) and their lengths. `lowering` runs
    the program over these rows."""
    call = Routed(program, operands, sizes, heads_first=heads_first)
    compact, given, gain = call.compact.program, call.operands(), call.gain
    keeps_sums = for_backward and gain is not None
    if call.layout.takes_rows is None:
        call.layout.takes_rows = lowering.takes_rows(compact, given, call.sizes)
    if call.layout.takes_rows and call.outputs is not None:
        o, lse = call.outputs
        summed = lowering.forward_by_list(compact, given, call.sizes, call.rows, gain, o, lse, keeps_sums)
        return o, lse, o.new_empty(0, dtype=lse.dtype), summed, call.rows.lists, call.rows.count
    summed, lse, rcp = lowering.forward(compact, call.taken(given), call.sizes, True)
    o, lse = call.rows.put_vectors(summed, lse, gain, call.layout.nan_if_empty, heads_first)
    if not keeps_sums:
        summed = summed.new_empty(0)
    elif missing := call.layout.shape[2] - call.rows.length:
        summed = torch.nn.functional.pad(summed, (0, 0, 0, missing))
    return o, lse, call.rows.put(rcp, 1.0) if program.has_rcp else rcp, summed, call.rows.lists, call.rows.count


def backward(
    lowering: ModuleType,
    program: Attention,
    operands: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    o: Tensor,
    lse: Tensor,
    rcp: Tensor,
    summed: Tensor,
    lists: Tensor,
    count: Tensor,
    grad_o: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients of the operands in `wanted`, from what `forward` gave."""
    call = Routed(program, operands, sizes, lists, count)
    rows, compact = call.rows, call.compact
    found: dict[str, Tensor] = {}  # without what has no gradient yet
    fill = call.layout.reads_all
    if not isinstance(compact.gain, Read):
        grad_rows, lse_rows = rows.take_gradients(grad_o, lse, None, None, None, fill)
        summed = rows.take_vectors(o, fill)
        summed = summed.masked_fill((lse_rows == float("-inf"))[..., None], 0.0) if call.layout.nan_if_empty else summed
    else:
        summed, along = summed[:, :, : rows.length], None
        if compact.gain.tensor in wanted:
            along = _gain_gradient(call, compact.gain, lse, found)
        grad_rows, lse_rows = rows.take_gradients(grad_o, lse, call.gain, summed, along, fill)
        if along is not None:
            _finish_gain(call, compact.gain, lse, along, found)
    rcp_rows = rows.take(rcp) if program.has_rcp else rcp
    grad_lse_rows = None if grad_lse is None else rows.take(grad_lse)
    copies, elements = ({name: read for name, read in of if read.tensor in wanted} for of in (compact.copies, compact.elements))
    inner = frozenset(name for name in compact.program.differentiable if name in wanted or name in copies or name in elements)
    made = lowering.backward(
        compact.program, call.taken(call.operands()), call.sizes, summed, lse_rows, rcp_rows, grad_rows, grad_lse_rows, inner
    )
    for name, gradient in made.items():
        if name in copies:
            _put_gradient(call, copies[name], gradient, found)
        elif name in elements:
            read = elements[name]
            block = call.layout.block(operands)
            add_elements(read, rows.put(gradient).unsqueeze(3), _sums(found, read.tensor, operands), block)
        elif name in found:
            found[name] += gradient
        else:
            found[name] = gradient
    if program.sum.tensor in wanted and not call.layout.nonempty:
        value_sums = _sums(found, program.sum.tensor, operands)
        poison_empty_heads(program, call.layout.block(operands), lse.masked_fill(rows.place < 0, 0.0), value_sums)
    return {name: _sums(found, name, operands) for name in wanted}


def _sums(found: dict[str, Tensor], name: str, operands: Mapping[str, Tensor]) -> Tensor:
    """The gradient of an operand so far, 0 at first."""
    if name not in found:
        found[name] = operands[name].new_zeros(operands[name].shape)
    return found[name]


def _gain_gradient(call: Routed, gain: Read, lse: Tensor, found: dict[str, Tensor]) -> Tensor:
    """Where the gradient of each gain [b, h, q_idx] goes, 0 now: into that of the operand, if every gain has a place of its own."""
    if not call.layout.nan_if_empty:
        direct = call.layout.gradient(gain, _sums(found, gain.tensor, call.given))
        if direct is not None:
            return direct
    return lse.new_zeros(call.layout.shape)


def _finish_gain(call: Routed, gain: Read, lse: Tensor, along: Tensor, found: dict[str, Tensor]) -> None:
    """Sum the gradients of gains into those of their operand, if they are not there."""
    total = _sums(found, gain.tensor, call.given)
    if along.untyped_storage().data_ptr() == total.untyped_storage().data_ptr():
        return
    if call.layout.nan_if_empty:
        along = along.masked_fill((lse == float("-inf")) & (call.rows.place >= 0), torch.nan)
    target = call.layout.gain_sums(total)
    target += along.sum_to_size(target.shape).to(target.dtype)


def _put_gradient(call: Routed, read: Read, gradient: Tensor, found: dict[str, Tensor]) -> None:
    """Add the gradient of rows by list to that of the operand that they were read from. The first that covers a whole operand is
    written to it at once: every row once, none read."""
    operand = call.given[read.tensor]
    if read.tensor not in found:
        fresh = operand.new_empty(operand.shape)
        whole = call.layout.gradient(read, fresh)
        if whole is not None:
            found[read.tensor] = fresh
            call.rows.put_into(whole, gradient)
            return
    block, (b, h, m) = call.layout.block(call.given), call.layout.shape
    view = view_vectors(read, operand, Q_IDX, block)
    sums = vector_gradient(read, view, _sums(found, read.tensor, call.given), Q_IDX, block)
    sums.add(call.rows.put(gradient), (0, b), (0, h), (Lines(0, m),))
    sums.scatter(block)

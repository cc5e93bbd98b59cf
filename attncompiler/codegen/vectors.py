"""Vector operands as plain [b, h, length, channels] views, and their gradients back in the operand's own shape."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attncompiler.ir.evaluate import Block
from attncompiler.ir.expr import AXES, KV_IDX, Apply, Axis, B, Const, Expr, H, Read, axes_of, mod
from attncompiler.ir.program import Attention, Empty
from attncompiler.passes.plan import proved_nonempty


class Lines(NamedTuple):
    """`number` runs of positions of one length: [start, stop), and each `step` after the one before."""

    start: int
    stop: int
    number: int = 1
    step: int = 0

    @property
    def positions(self) -> int:
        return self.number * (self.stop - self.start)

    def of(self, tensor: Tensor) -> Tensor:
        """Those of the third dimension, which becomes two, number and length: a view."""
        found = tensor[:, :, self.start : self.stop + (self.number - 1) * self.step]
        return found.unsqueeze(2) if self.number == 1 else found.unfold(2, self.stop - self.start, self.step).movedim(-1, 3)


@dataclass(frozen=True)
class VectorView:
    """`tensor` [B', H', L, D] shows the vectors of a read without a copy: B' and H' are the axis sizes, or 1 where shared.

    With `group` > 1 head h reads h // group. `gathered` marks a read that no view can show: it was copied."""

    tensor: Tensor
    group: int
    gathered: bool


def _divisor(entry: Expr, axis: Axis) -> int | None:
    """1 for `axis`, G for `axis // G`, None for anything else."""
    if entry == axis:
        return 1
    if isinstance(entry, Apply) and entry.op == "floordiv" and entry.args[0] == axis and isinstance(entry.args[1], Const):
        return int(entry.args[1].value)
    return None


def simple_places(read: Read, row: Axis) -> tuple[dict[Axis, int], int] | None:
    """Which dimension each of b, h and the row axis indexes, and the group of h; None where the read is not that simple."""
    found: dict[Axis, int] = {}
    group = 1
    for place, entry in enumerate(read.index):
        if isinstance(entry, Const):
            continue
        for axis in (B, H, row):
            divisor = _divisor(entry, axis)
            if divisor is not None and axis not in found and (divisor == 1 or axis == H):
                found[axis] = place
                group = divisor if axis == H else group
                break
        else:
            return None
    return found, group


def head_group(read: Read, heads: int) -> int:
    """How many query heads share one vector of a read: 1 for each its own, `heads` for all."""
    axes = axes_of(read)
    if "h" not in axes:
        return heads
    divisors = [_divisor(entry, H) for entry in read.index if "h" in axes_of(entry)]
    return divisors[0] or 1 if len(divisors) == 1 else 1


def _merged(read: Read, tensor: Tensor) -> tuple[Read, Tensor]:
    """x[.., h // G, h % G, ..] is x[.., h, ..] of a tensor with the two dimensions made one."""
    for place, (first, second) in enumerate(itertools.pairwise(read.index)):
        group = _divisor(first, H)
        if group is not None and group > 1 and second == mod(H, Const(group)) and tensor.shape[place + 1] == group:
            index = (*read.index[:place], H, *read.index[place + 2 :])
            return Read(read.tensor, index), tensor.flatten(place, place + 1)
    return read, tensor


def view_vectors(read: Read, tensor: Tensor, row: Axis, block: Block) -> VectorView:
    """The vectors of a read over b, h and one row axis."""
    read, tensor = _merged(read, tensor)
    simple = simple_places(read, row)
    extents = block.extents
    if simple is None or (row not in simple[0] and extents[row.name] != 1):
        gathered = Block({read.tensor: tensor}, block.sizes, extents, block.positions, tensor.dtype)
        return VectorView(gathered.vectors(read).squeeze(2 if row == KV_IDX else 3), 1, True)
    found, group = simple
    for place in reversed(range(len(read.index))):
        entry = read.index[place]
        if isinstance(entry, Const):
            tensor = tensor.select(place, int(entry.value))
            found = {axis: p - (p > place) for axis, p in found.items()}
    shown = tensor.permute(*(found[axis] for axis in (B, H, row) if axis in found), tensor.dim() - 1)
    for at, (axis, length) in enumerate(((B, extents["b"]), (H, -(-extents["h"] // group)), (row, extents[row.name]))):
        shown = shown.narrow(at, 0, min(length, shown.shape[at])) if axis in found else shown.unsqueeze(at)
    return VectorView(shown, group if H in found else 1, False)


@dataclass(frozen=True)
class VectorGradient:
    """Where the gradients of one vector read are summed: a view of the operand's own, or a copy that is scattered at the end."""

    read: Read
    view: VectorView
    sums: Tensor
    operand: Tensor  # the gradient of the whole operand

    def add(self, grad: Tensor, batch: tuple[int, int], heads: tuple[int, int], ranges: Sequence[Lines]) -> None:
        """Add [b, h or groups, rows, D], the rows being those of `ranges` one after the other."""
        if self.view.group > 1 and grad.shape[1] != -(-heads[1] // self.view.group) - heads[0] // self.view.group:
            b, h, rows, d = grad.shape
            grad = grad.reshape(b, h // self.view.group, self.view.group, rows, d).sum(2)
        target = self.sums
        target = target[batch[0] : batch[1]] if target.shape[0] > 1 else target
        if target.shape[1] > 1:
            target = target[:, heads[0] // self.view.group : -(-heads[1] // self.view.group)]
        at = 0
        for lines in ranges:
            piece = grad[:, :, at : at + lines.positions]
            piece = piece.sum_to_size(target.shape[0], target.shape[1], *piece.shape[2:])
            lines.of(target).add_(piece.unflatten(2, (lines.number, lines.stop - lines.start)))
            at += lines.positions

    def scatter(self, block: Block) -> None:
        """Finish: put gathered gradients back where their vectors were read."""
        if self.view.gathered:
            index = [block.tensor(entry) for entry in self.read.index]
            row = 2 if "kv_idx" in axes_of(self.read) else 3
            grads = self.sums.unsqueeze(row)
            shape = grads.shape[:4]
            self.operand.index_put_(tuple(i.expand(shape) for i in index), grads, accumulate=True)


def vector_gradient(read: Read, view: VectorView, into: Tensor, row: Axis, block: Block) -> VectorGradient:
    """A place to sum the gradients of `read`, whose operand's gradient is `into`."""
    if view.gathered:
        merged, into = _merged(read, into)
        return VectorGradient(merged, view, torch.zeros(view.tensor.shape, dtype=into.dtype, device=into.device), into)
    return VectorGradient(read, view, view_vectors(read, into, row, block).tensor, into)


def add_elements(read: Read, grad: Tensor, into: Tensor, block: Block) -> None:
    """Add the gradient [b, h, q, keys] of single elements to that of their operand, summed where one element serves many pairs."""
    read, grad, positions = _by_group(read, grad, block)
    axes = [axis for axis in AXES if axis in read.index]
    plain = all(isinstance(entry, Const) or entry in axes for entry in read.index) and len(set(axes)) == sum(
        isinstance(entry, Axis) for entry in read.index
    )
    if not plain:
        # a branch of `where` that is not taken may read outside; its gradient is 0
        index = [block.tensor(entry).clamp(0, extent - 1) for entry, extent in zip(read.index, into.shape, strict=True)]
        shape = torch.broadcast_shapes(*(tuple(i.shape) for i in index), (1, 1, 1, 1))
        summed, places = grad.sum_to_size(shape).to(into.dtype), [i.expand(shape) for i in index]
        for b, h in itertools.product(range(shape[0]), range(shape[1])):  # indices of all heads at once would not fit
            into.index_put_(tuple(i[b, h] for i in places), summed[b, h], accumulate=True)
        return
    missing = [place for place, axis in enumerate(AXES) if axis not in axes]
    summed = grad.sum(missing) if missing else grad
    order = [axes.index(entry) for entry in read.index if isinstance(entry, Axis)]
    summed = summed.permute(order)
    spans: list[int | Tensor] = []
    for entry in read.index:
        assert isinstance(entry, Const | Axis)
        spans.append(int(entry.value) if isinstance(entry, Const) else positions[entry.name].reshape(-1))
    target = into
    for place in reversed(range(len(spans))):
        if isinstance(spans[place], int):
            target = target.select(place, spans[place])  # type: ignore[arg-type]
    kept = [span for span in spans if isinstance(span, Tensor)]
    if not kept:
        target.add_(summed)
    else:
        open_index = tuple(span.reshape([-1 if i == j else 1 for j in range(len(kept))]) for i, span in enumerate(kept))
        target[open_index] += summed.to(target.dtype)


def _by_group(read: Read, grad: Tensor, block: Block) -> tuple[Read, Tensor, Mapping[str, Tensor]]:
    """Where all heads are there and h // G is read: the read at h, the gradient summed over each group, and the positions."""
    heads, divisors = block.extents["h"], {_divisor(entry, H) for entry in read.index if "h" in axes_of(entry)}
    group = divisors.pop() if len(divisors) == 1 else None
    if group is None or group == 1 or heads % group or grad.shape[1] != heads or block.positions["h"].numel() != heads:
        return read, grad, block.positions
    index = tuple(H if "h" in axes_of(entry) else entry for entry in read.index)
    positions = {**block.positions, "h": block.positions["h"].reshape(-1)[: heads // group]}
    return Read(read.tensor, index), grad.unflatten(1, (-1, group)).sum(2), positions


def poison_empty_heads(program: Attention, block: Block, lse: Tensor, grad_value: Tensor) -> None:
    """Under `else nan` a row that keeps no key has NaN weights for all keys, so the values of its head have NaN gradients.

    The lowerings leave such rows out; where the mask alone does not prove that there are none, this puts the NaN in."""
    keep = program.keep
    if keep.empty is not Empty.NAN or program.weigh.extra or proved_nonempty(program, block.sizes, block.extents):
        return
    empty = (lse == float("-inf")).any(2)[:, :, None, None]
    if grad_value.device.type == "cpu" and not bool(empty.any()):
        return
    poison = torch.where(empty, torch.nan, 0.0).to(grad_value.dtype)
    row = vector_gradient(program.sum, view_vectors(program.sum, grad_value, KV_IDX, block), grad_value, KV_IDX, block)
    rows = block.extents["kv_idx"]
    row.add(poison.expand(-1, -1, rows, grad_value.shape[-1]), (0, lse.shape[0]), (0, lse.shape[1]), (Lines(0, rows),))
    row.scatter(block)

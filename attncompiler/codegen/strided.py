"""Reads whose index is affine in the axes, as strided views of their operand: no copy, and a gradient goes back the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.ir.evaluate import integer
from attncompiler.ir.expr import Apply, Axis, Const, Expr, H, Read, axes_of


@dataclass(frozen=True)
class Affine:
    """An index entry: the sum of `factor * axis` and a constant. `h // group` stands for `h` in all entries of a read."""

    factors: Mapping[Axis, int]
    constant: int


@dataclass(frozen=True)
class StridedView:
    """A read over some axes as [extent of each axis]; along h there is one entry for each group of heads.

    `strides` are in elements of a tensor with the strides that the view was made for; 0 along an axis that the read does not vary
    with."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    group: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)


def is_affine(read: Read) -> bool:
    """Whether `strided_view` can show the read (for positive strides, which only its operand can tell)."""
    groups = {_group_of(node) for entry in read.index for node in _atoms(entry)} - {0}
    return len(groups) <= 1 and all(_is_affine(entry) for entry in read.index)


def group_of(read: Read) -> int:
    """How many heads share an entry: G of `h // G`; 1 where heads have their own, or all share one."""
    return max((_group_of(atom) for entry in read.index for atom in _atoms(entry)), default=1) or 1


def _atoms(entry: Expr) -> tuple[Expr, ...]:
    """The parts of a sum, factors taken off; what is no sum or product with a number is one part."""
    if isinstance(entry, Apply) and entry.op in ("add", "sub"):
        return _atoms(entry.args[0]) + _atoms(entry.args[1])
    if isinstance(entry, Apply) and entry.op == "mul":
        varying = [arg for arg in entry.args if axes_of(arg)]
        return _atoms(varying[0]) if len(varying) == 1 else (entry,) * bool(varying)
    return (entry,) if axes_of(entry) else ()


def _group_of(atom: Expr) -> int:
    """G of `h // G`, 1 of `h`, 0 of what has no h."""
    if atom == H:
        return 1
    if isinstance(atom, Apply) and atom.op == "floordiv" and atom.args[0] == H and isinstance(atom.args[1], Const):
        return int(atom.args[1].value)
    return 0


def _is_affine(entry: Expr) -> bool:
    return all(isinstance(atom, Axis) or _group_of(atom) for atom in _atoms(entry))


def _affine(entry: Expr, sizes: Mapping[str, int]) -> Affine:
    if not axes_of(entry):
        return Affine({}, integer(entry, sizes))
    if _group_of(entry):
        return Affine({H: 1}, 0)
    if isinstance(entry, Axis):
        return Affine({entry: 1}, 0)
    assert isinstance(entry, Apply)
    left, right = (_affine(arg, sizes) for arg in entry.args)
    if entry.op == "mul":
        scale, scaled = (left, right) if not left.factors else (right, left)
        return Affine({axis: factor * scale.constant for axis, factor in scaled.factors.items()}, scaled.constant * scale.constant)
    sign = 1 if entry.op == "add" else -1
    factors = dict(left.factors)
    for axis, factor in right.factors.items():
        factors[axis] = factors.get(axis, 0) + sign * factor
    return Affine(factors, left.constant + sign * right.constant)


def strided_view(
    read: Read, tensor: Tensor, axes: tuple[Axis, ...], extents: Mapping[str, int], sizes: Mapping[str, int]
) -> StridedView | None:
    """The read over `axes`; None where it would reach outside its operand: there the language reads the nearest element."""
    group = group_of(read)
    shape = tuple(-(-extents[axis.name] // group) if axis == H else extents[axis.name] for axis in axes)
    last = {axis: extent - 1 for axis, extent in zip(axes, shape, strict=True)}
    strides, offset = dict.fromkeys(axes, 0), 0
    for entry, extent, stride in zip(read.index, tensor.shape, tensor.stride(), strict=True):
        affine = _affine(entry, sizes)
        reach = [affine.factors.get(axis, 0) * last[axis] for axis in affine.factors]
        low = affine.constant + sum(min(r, 0) for r in reach)
        high = affine.constant + sum(max(r, 0) for r in reach)
        if min(shape) > 0 and (low < 0 or high >= extent):
            return None
        offset += affine.constant * stride
        for axis, factor in affine.factors.items():
            strides[axis] += factor * stride
    found = tuple(strides[axis] for axis in axes)
    if any(stride < 0 for stride in found):
        return None
    return StridedView(shape, found, offset, group)


def _overlaps(view: StridedView) -> bool:
    reach = 0
    for stride, extent in sorted((s, e) for s, e in zip(view.strides, view.shape, strict=True) if s and e > 1):
        if stride <= reach:
            return True
        reach += stride * (extent - 1)
    return False


def add_gradient(read: Read, gradient: Tensor, into: Tensor, axes: tuple[Axis, ...], sizes: Mapping[str, int]) -> None:
    """Add a gradient [extents of `axes`, h in full] to that of the read's operand: summed over heads of a group, and over axes that
    the read does not vary with."""
    extents = {axis.name: extent for axis, extent in zip(axes, gradient.shape, strict=True)}
    view = strided_view(read, into, axes, extents, sizes)
    assert view is not None, "the forward read it through the same view"
    if view.group > 1:
        at = axes.index(H)
        pad = view.shape[at] * view.group - gradient.shape[at]
        if pad:
            gradient = torch.cat([gradient, gradient.new_zeros(*gradient.shape[:at], pad, *gradient.shape[at + 1 :])], at)
        gradient = gradient.unflatten(at, (view.shape[at], view.group)).sum(at + 1)
    shared = [
        place for place, (stride, extent) in enumerate(zip(view.strides, view.shape, strict=True)) if not stride and extent > 1
    ]
    gradient = gradient.sum(shared, keepdim=True) if shared else gradient
    target = StridedView(tuple(gradient.shape), view.strides, view.offset, view.group).of(into)
    if _overlaps(view):
        places = StridedView(target.shape, view.strides, view.offset, view.group).of(torch.arange(into.numel(), device=into.device))
        into.view(-1).index_add_(0, places.reshape(-1), gradient.reshape(-1).to(into.dtype))
        return
    target.add_(gradient)

"""Dense masks that are constant, out of a program: where a rule explains one it stands for it, as if the user had written the mask
with positions, and no mask is read."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attncompiler.ir.expr import KV_IDX, Q_IDX, Axis, Const, Expr, H, Read, axes_of, reads_of, sub, surely_int, transform
from attncompiler.ir.program import Attention, Dtype, TensorDecl, each_clause
from attncompiler.passes.lift_constant import LiftedTensor, lift_tensor


@dataclass(frozen=True)
class View:
    """A tensor as [M, N] or [heads, M, N]: which of its dimensions these are, and where the others are read: (dimension, index)."""

    heads: int | None
    query: int
    key: int
    fixed: tuple[tuple[int, int], ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor so, on the CPU."""
        for dim, at in sorted(self.fixed, reverse=True):
            tensor = tensor.select(dim, at)
        order = [dim for dim in (self.heads, self.query, self.key) if dim is not None]
        return tensor.permute([sorted(order).index(dim) for dim in order]).cpu()


@dataclass(frozen=True)
class Recovery:
    """An operand, or what a program reads of it, that a rule stands for; and the tensors that the rule reads, by their names there."""

    operand: str
    view: View
    lifted: LiftedTensor
    tables: Mapping[str, Tensor] = field(default_factory=dict)

    def still_holds(self, tensor: Tensor) -> bool:
        """Whether the rule explains what the operand would be now."""
        return self.lifted.explains(self.view.of(tensor))

    def element(self, read: Read) -> Expr:
        """What a read of the operand gives, by the rule."""
        named = dict(zip(self.lifted.rule.tables, self.tables, strict=True))
        at: dict[Expr, Expr] = {Q_IDX: read.index[self.view.query], KV_IDX: read.index[self.view.key]}
        if self.view.heads is not None:
            at[H] = read.index[self.view.heads]

        def visit(expr: Expr) -> Expr | None:
            if isinstance(expr, Read):
                return Read(named[expr.tensor], tuple(transform(entry, visit) for entry in expr.index))
            return at.get(expr)

        return transform(self.lifted.element, visit)


def lift_constants(program: Attention, held: Mapping[str, Tensor]) -> tuple[Attention, tuple[Recovery, ...]]:
    """Needs: what some operands hold. Ensures: where one is read for each pair, the rule that explains it stands, if one does.
    Keeps: the meaning, exactly, as long as they hold the same."""
    instead: dict[Expr, Expr] = {}
    found: dict[tuple[str, View], Recovery | None] = {}
    for read in dict.fromkeys(read for root in program.expressions for read in reads_of(root) if read.tensor in held):
        view = _view(read, held[read.tensor].shape)
        if view is None:
            continue
        if (read.tensor, view) not in found:
            taken = {*program.decls, *(name for recovery in found.values() if recovery for name in recovery.tables)}
            found[read.tensor, view] = _recovery(read.tensor, view, held[read.tensor], taken)
        recovery = found[read.tensor, view]
        if recovery is not None:
            instead[read] = recovery.element(read)
    recovered = tuple(recovery for recovery in found.values() if recovery is not None)
    changed = each_clause(program, lambda clause: transform(clause, instead.get))
    tables = (
        TensorDecl(name, _TABLE_TYPES[table.dtype], tuple(Const(size) for size in table.shape))
        for recovery in recovered
        for name, table in recovery.tables.items()
    )
    return replace(changed, tensors=(*program.tensors, *tables)), recovered


_TABLE_TYPES = {torch.int32: Dtype.I32, torch.bool: Dtype.BOOL}


def _recovery(operand: str, view: View, tensor: Tensor, taken: Collection[str]) -> Recovery | None:
    lifted = lift_tensor(view.of(tensor))
    if lifted is None:
        return None
    return Recovery(operand, view, lifted, {_free_name(name, taken): table for name, table in lifted.rule.tables.items()})


def _free_name(wish: str, taken: Collection[str]) -> str:
    return next(name for name in itertools.chain([wish], (f"{wish}{i}" for i in itertools.count(2))) if name not in taken)


def _view(read: Read, shape: Sequence[int]) -> View | None:
    """How a tensor is read that has an element for each pair, and one matrix of them or one for each head; None for other readings:
    those of a vector, of a table by distance, of a pattern of blocks."""
    dims = dict(enumerate(read.index))
    query = [dim for dim, entry in dims.items() if _steps_with(entry, Q_IDX)]
    key = [dim for dim, entry in dims.items() if _steps_with(entry, KV_IDX)]
    if len(dims) != len(shape) or len(query) != 1 or len(key) != 1:
        return None
    others = {dim: entry for dim, entry in dims.items() if dim not in (query[0], key[0])}
    if any(axes_of(entry) & {"q_idx", "kv_idx"} or reads_of(entry) for entry in others.values()):
        return None
    heads = [dim for dim, entry in others.items() if shape[dim] != 1 and not isinstance(entry, Const)]
    fixed = [(dim, int(entry.value) if isinstance(entry, Const) else 0) for dim, entry in others.items() if dim not in heads]
    return View(heads[0] if heads else None, query[0], key[0], tuple(fixed)) if len(heads) <= 1 else None


def _steps_with(entry: Expr, axis: Axis) -> bool:
    """Whether an index is the axis, plus what varies with no pair."""
    return surely_int(entry) and axis.name in axes_of(entry) and not axes_of(sub(entry, axis)) & {"q_idx", "kv_idx"}

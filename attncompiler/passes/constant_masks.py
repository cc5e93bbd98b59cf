"""Dense masks that are constant, out of a program: where a rule explains one it stands for it, as if the user had written the mask
with positions, and no mask is read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import Node

from attncompiler.ir.expr import KV_IDX, Q_IDX, Axis, Const, Expr, H, Read, axes_of, reads_of, sub, surely_int, transform
from attncompiler.ir.program import Attention, Dtype, TensorDecl, each_clause
from attncompiler.passes.constants import Constants
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
    """What a program reads of an operand, that a rule stands for; and the tensors that the rule reads, by their names there."""

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


class ConstantMasks:
    """The rules of the constants of one graph. Each tensor is looked at once, however many attentions read it."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self.found: dict[tuple[Node, View], LiftedTensor | None] = {}

    def of(self, node: Node, view: View) -> LiftedTensor | None:
        """The rule of a node of the graph; None where it is no constant, or has no rule."""
        if (node, view) not in self.found:
            constant = self.constants.of(node)
            self.found[node, view] = None if constant is None else self._lifted(view.of(constant.value))
        return self.found[node, view]

    def _lifted(self, tensor: Tensor) -> LiftedTensor | None:
        """Layers often hold the same mask: what explained another may explain this one."""
        others = dict.fromkeys(lifted for lifted in self.found.values() if lifted is not None)
        return next((lifted for lifted in others if lifted.explains(tensor)), None) or lift_tensor(tensor)

    def explains(self, node: Node, index: Sequence[Expr]) -> bool:
        """Whether a rule stands for what `node` has at an index."""
        view = view_of(index, node.meta["val"].shape)
        return view is not None and self.of(node, view) is not None


def lift_constants(
    program: Attention, rule_of: Callable[[str, View], LiftedTensor | None]
) -> tuple[Attention, tuple[Recovery, ...]]:
    """Needs: the rules of operands that are constant, by name and view. Ensures: where one is read for each pair, the rule stands.
    Keeps: the meaning, exactly, as long as they hold the same."""
    instead: dict[Expr, Expr] = {}
    found: dict[tuple[str, View], Recovery] = {}
    for read in dict.fromkeys(read for root in program.expressions for read in reads_of(root)):
        view = view_of(read.index, program.decls[read.tensor].shape)
        lifted = rule_of(read.tensor, view) if view is not None else None
        if view is None or lifted is None:
            continue
        if (read.tensor, view) not in found:
            taken = {*program.decls, *(name for recovery in found.values() for name in recovery.tables)}
            tables = {_free_name(name, taken): table for name, table in lifted.rule.tables.items()}
            found[read.tensor, view] = Recovery(read.tensor, view, lifted, tables)
        instead[read] = found[read.tensor, view].element(read)
    changed = each_clause(program, lambda clause: transform(clause, instead.get))
    made = [
        TensorDecl(name, _TABLE_TYPES[table.dtype], tuple(Const(size) for size in table.shape), constant=True)
        for recovery in found.values()
        for name, table in recovery.tables.items()
    ]
    return replace(changed, tensors=(*program.tensors, *made)), tuple(found.values())


_TABLE_TYPES = {torch.int32: Dtype.I32, torch.bool: Dtype.BOOL}


def _free_name(wish: str, taken: Collection[str]) -> str:
    return next(name for name in itertools.chain([wish], (f"{wish}{i}" for i in itertools.count(2))) if name not in taken)


def view_of(index: Sequence[Expr], shape: Sequence[object]) -> View | None:
    """How a tensor is read that has an element for each pair, and one matrix of them or one for each head; None for other readings:
    those of a vector, of a table by distance, of a pattern of blocks."""
    dims = dict(enumerate(index))
    query = [dim for dim, entry in dims.items() if _steps_with(entry, Q_IDX)]
    key = [dim for dim, entry in dims.items() if _steps_with(entry, KV_IDX)]
    if len(dims) != len(shape) or len(query) != 1 or len(key) != 1:
        return None
    others = {dim: entry for dim, entry in dims.items() if dim not in (query[0], key[0])}
    if any(axes_of(entry) & {"q_idx", "kv_idx"} or reads_of(entry) for entry in others.values()):
        return None
    heads = [dim for dim, entry in others.items() if shape[dim] not in (1, Const(1)) and not isinstance(entry, Const)]
    fixed = [(dim, int(entry.value) if isinstance(entry, Const) else 0) for dim, entry in others.items() if dim not in heads]
    return View(heads[0] if heads else None, query[0], key[0], tuple(fixed)) if len(heads) <= 1 else None


def _steps_with(entry: Expr, axis: Axis) -> bool:
    """Whether an index is the axis, plus what varies with no pair."""
    return surely_int(entry) and axis.name in axes_of(entry) and not axes_of(sub(entry, axis)) & {"q_idx", "kv_idx"}

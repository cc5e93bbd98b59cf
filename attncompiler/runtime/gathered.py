"""Attention over listed keys: the rows that a list names are copied together, and what runs is a plain program over them.

A program that reads `k[b, h // 4, picked[b, h // 4, kv_idx]]` becomes one that reads `k_kept[b, h // 4, kv_idx]`. So the kernels and
the portable lowering know of no lists. What is copied is as long as the list, once for all heads that share it; gradients go back
to where the rows lay.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attncompiler.codegen.vectors import simple_places, view_vectors
from attncompiler.ir.evaluate import Block
from attncompiler.ir.expr import (
    KV_IDX,
    ZERO,
    Apply,
    Axis,
    B,
    Const,
    Expr,
    H,
    Read,
    add,
    apply,
    axes_of,
    conjuncts,
    floordiv,
    reads_of,
    transform,
    walk,
)
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Empty, TensorDecl, each_clause
from attncompiler.runtime.key_kernels import put_keys, take_keys


@dataclass(frozen=True)
class Gather:
    """`name` [b or 1, groups of h or 1, kv_idx(, channels)] holds what `read` reads; a group is `group` heads, of which `shared` groups
    read the same.

    `guarded`: the mask keeps out what its list has below 0."""

    name: str
    read: Read
    group: int
    shared: int
    guarded: bool

    def shape(self, extents: Mapping[str, int]) -> tuple[int, int, int]:
        """Batches, groups and keys of the copy."""
        axes = axes_of(self.read)
        return (
            extents["b"] if "b" in axes else 1,
            -(-extents["h"] // self.group) if "h" in axes else 1,
            extents["kv_idx"],
        )

    def index(self, operands: Mapping[str, Tensor], sizes: Mapping[str, int], extents: Mapping[str, int]) -> tuple[Tensor, ...]:
        """Where the rows lie in the operand: an index for each dimension but that of channels, broadcast to the copy's shape."""
        device, shape = operands[self.read.tensor].device, self.shape(extents)
        positions = {}
        for place, (axis, size, step) in enumerate(zip((B, H, KV_IDX), shape, (1, self.group, 1), strict=True)):
            spread = [1, 1, 1]
            spread[place] = size
            positions[axis.name] = torch.arange(0, size * step, step, device=device).view(spread)
        block = Block(operands, sizes, extents, positions, torch.float32)
        lengths = operands[self.read.tensor].shape
        return tuple(
            block.tensor(entry).to(torch.int64).clamp(0, max(length - 1, 0)).expand(shape)
            for entry, length in zip(self.read.index, lengths, strict=False)
        )

    def taken(self, given: Mapping[str, Tensor], sizes: Mapping[str, int], extents: Mapping[str, int]) -> Tensor:
        """The copy."""
        source = given[self.read.tensor]
        rows = self._rows(given, sizes, extents, source) if _has_kernels(source) else None
        if rows is None:
            return source[self.index(given, sizes, extents)]
        copy = take_keys(*rows, self.shape(extents), self.guarded)
        return copy if len(self.read.index) < source.dim() else copy.squeeze(3)

    def put(
        self, into: Tensor, gradient: Tensor, given: Mapping[str, Tensor], sizes: Mapping[str, int], extents: Mapping[str, int],
        is_zero: bool,
    ) -> None:  # fmt: skip
        """Add the gradient of the copy to that of the operand, which `is_zero` so far or not."""
        rows = self._rows(given, sizes, extents, into) if is_zero and _has_kernels(into) else None
        b, groups, keys = self.shape(extents)
        if rows is None or rows[0].shape[:2] != (b, -(-groups // self.shared)):  # else no row of the operand is in two lists
            into.index_put_(self.index(given, sizes, extents), gradient, accumulate=True)
            return
        vectors = gradient.reshape(b, groups, keys, -1)
        if self.shared > 1:
            vectors = vectors.unflatten(1, (-1, self.shared)).sum(2, dtype=torch.promote_types(vectors.dtype, torch.float32))
        put_keys(rows[0], vectors, rows[1], self.guarded)

    def _rows(
        self, given: Mapping[str, Tensor], sizes: Mapping[str, int], extents: Mapping[str, int], source: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """`source` as [b or 1, groups, N, channels] and the lists as [b or 1, groups, kv_idx]; None where they are not so simple."""
        lists = [entry for entry in self.read.index if isinstance(entry, Read)]
        whole = Read(self.read.tensor, tuple(KV_IDX if isinstance(entry, Read) else entry for entry in self.read.index))
        if len(lists) != 1 or not all(simple_places(read, KV_IDX) for read in (whole, lists[0])):
            return None
        place = next(at for at, entry in enumerate(self.read.index) if isinstance(entry, Read))

        def shown(read: Read, tensor: Tensor, length: int) -> Tensor:
            return view_vectors(read, tensor, KV_IDX, Block({}, sizes, {**extents, "kv_idx": length}, {}, torch.float32)).tensor

        vectors = source if len(self.read.index) < source.dim() else source.unsqueeze(-1)
        rows = shown(whole, vectors, source.shape[place])
        keys = shown(lists[0], given[lists[0].tensor].unsqueeze(-1), extents["kv_idx"]).squeeze(-1)
        groups = self.shape(extents)[1]
        return (rows, keys) if groups % rows.shape[1] == 0 and groups % keys.shape[1] == 0 else None


@dataclass(frozen=True)
class Gathered:
    """A program over copied rows, and the copies that it reads."""

    program: Attention
    gathers: tuple[Gather, ...]

    def operands(self, given: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """The operands of `program`, from those of the program that reads through lists."""
        extents = extents_of(self.program, sizes)
        copies = {gather.name: gather.taken(given, sizes, extents) for gather in self.gathers}
        return {decl.name: copies[decl.name] if decl.name in copies else given[decl.name] for decl in self.program.tensors}

    def outlines(self, given: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """As `operands`, of tensors on the meta device."""
        extents = extents_of(self.program, sizes)
        copies = {}
        for gather in self.gathers:
            source = given[gather.read.tensor]
            copies[gather.name] = source.new_empty((*gather.shape(extents), *source.shape[len(gather.read.index) :]))
        return {decl.name: copies[decl.name] if decl.name in copies else given[decl.name] for decl in self.program.tensors}

    def wanted(self, names: frozenset[str]) -> frozenset[str]:
        """The operands of `program` whose gradients those of `names` are made of."""
        return frozenset(name for name in names if name in self.program.decls) | {
            gather.name for gather in self.gathers if gather.read.tensor in names
        }

    def gradients(
        self, found: Mapping[str, Tensor], names: frozenset[str], given: Mapping[str, Tensor], sizes: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """The gradients of the operands `names`, from those of `program`: rows go back to where they lay."""
        extents = extents_of(self.program, sizes)
        totals = {name: found[name] for name in names if name in found}
        for gather in self.gathers:
            name = gather.read.tensor
            if name in names:
                is_zero = name not in totals
                if is_zero:
                    totals[name] = given[name].new_zeros(given[name].shape)
                gather.put(totals[name], found[gather.name], given, sizes, extents, is_zero)
        return totals


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda


@functools.lru_cache(maxsize=4096)
def gathered(program: Attention) -> Gathered:
    """Needs: any program. Ensures: no read at a listed position is left that does not vary with the query. Keeps: the meaning."""
    listed = dict.fromkeys(read for root in program.expressions for read in reads_of(root) if _is_listed(read))
    names = {decl.name for decl in program.tensors}
    gathers = []
    for read in listed:
        wish = f"{read.tensor}_kept"
        name = next(n for i in range(len(listed) + 1) if (n := wish if i == 0 else f"{wish}{i + 1}") not in names)
        names.add(name)
        whole = _group(read)
        group = _split(whole, program) if len(read.index) < len(program.decls[read.tensor].shape) else whole
        gathers.append(Gather(name, read, group, whole // group, _is_guarded(read, program)))
    if not gathers:
        return Gathered(program, ())
    copies: dict[Expr, Expr] = {gather.read: _copy(gather) for gather in gathers}
    changed = each_clause(program, lambda expr: transform(expr, copies.get))
    used = {read.tensor for root in changed.expressions for read in reads_of(root)}
    decls = [decl for decl in program.tensors if decl.name in used] + [_declared(gather, program) for gather in gathers]
    order = {decl.name: place for place, decl in enumerate(program.tensors)}
    by_name = {gather.name: order[gather.read.tensor] for gather in gathers}
    decls.sort(key=lambda decl: by_name.get(decl.name, order.get(decl.name, 0)))
    return Gathered(replace(changed, tensors=tuple(decls)), tuple(gathers))


def _is_listed(read: Read) -> bool:
    """True for a read whose position of the key is itself read, and that all queries share."""
    through = (inner for entry in read.index for inner in walk(entry) if isinstance(inner, Read))
    return "q_idx" not in axes_of(read) and any("kv_idx" in axes_of(inner) for inner in through)


def _is_guarded(read: Read, program: Attention) -> bool:
    """True where `keep` says that the list names a key."""
    parts = conjuncts(program.keep.predicate)
    return program.keep.empty is not Empty.SCORE and any(apply("ge", entry, ZERO) in parts for entry in read.index)


def _group(read: Read) -> int:
    """How many neighbouring heads read the same."""
    divisors: list[int] = []

    def visit(expr: Expr) -> Expr | None:
        if isinstance(expr, Apply) and expr.op == "floordiv" and expr.args[0] == H and isinstance(expr.args[1], Const):
            divisors.append(int(expr.args[1].value))
            return expr
        if expr == H:
            divisors.append(1)
        return None

    for entry in read.index:
        transform(entry, visit)
    return math.gcd(*divisors) if divisors else 1


_KEY_ROWS = 128  # pairs of a tile of keys and a group of heads that keep a large GPU busy
_MANY_QUERIES = 2048


def _split(group: int, program: Attention) -> int:
    """How many heads share a copy of vectors: fewer than could, where a short list would leave most of a GPU without a tile of keys
    while few programs go by all queries. The copies are as short as the list."""
    axes = program.axes.b, program.axes.h, program.axes.q_idx, program.axes.kv_idx
    if not all(isinstance(size, Const) for size in axes):
        return group
    b, h, m, n = (int(size.value) for size in axes if isinstance(size, Const))
    if m < _MANY_QUERIES or h % group:
        return group
    rows = b * -(-n // 128)
    return next((g for g in range(group, 1, -1) if group % g == 0 and rows * (h // g) >= _KEY_ROWS), 1)


def _copy(gather: Gather) -> Read:
    axes = axes_of(gather.read)
    head = (H if gather.group == 1 else floordiv(H, Const(gather.group))) if "h" in axes else ZERO
    return Read(gather.name, (B if "b" in axes else ZERO, head, KV_IDX))


def _declared(gather: Gather, program: Attention) -> TensorDecl:
    axes, decl = axes_of(gather.read), program.decls[gather.read.tensor]
    heads = floordiv(add(program.axes.h, Const(gather.group - 1)), Const(gather.group))
    sizes: dict[Axis, Expr] = {B: program.axes.b, H: heads, KV_IDX: program.axes.kv_idx}
    shape = tuple(sizes[axis] if axis.name in axes else Const(1) for axis in (B, H, KV_IDX))
    return TensorDecl(gather.name, decl.dtype, shape + decl.shape[len(gather.read.index) :])

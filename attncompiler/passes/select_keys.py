"""A mask that is made of `topk` -> a selection and an attention over the keys that it lists.

    keep  mask[b, h // 2, 0, kv_idx] & (kv_idx <= q_idx)          mask = zeros.scatter(-1, rank.topk(w).indices, True)

says that all but w keys weigh nothing, whatever the query. So the keys of the program become the w places of a list, and what was
read at `kv_idx` is read at `picked[b, h // 2, 0, kv_idx]`, in ascending order: what lies behind the query ends the list.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from attncompiler.ir.expr import (
    FALSE,
    KV_IDX,
    TRUE,
    ZERO,
    Axis,
    Const,
    Expr,
    Read,
    apply,
    axes_of,
    conj,
    conjuncts,
    reads_of,
    substitute,
)
from attncompiler.ir.phases import Phase
from attncompiler.ir.program import Attention, Dtype, Empty, Keep, TensorDecl, each_clause
from attncompiler.ir.select import Positions, TopK
from attncompiler.ir.tables import Table, Tables
from attncompiler.passes.contraction import argument
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.nodes import DTYPES, Made, Operand, dtype_of, shape_of
from attncompiler.passes.reader import Reader
from attncompiler.passes.sizes import same, size_expr

# what names a list's tables: the axes of the rows by their place, then the keys and the places of the list
_ROWS = ("b", "g", "row")
_KEY, _PLACE = Axis("key"), Axis("place")


@dataclass(frozen=True)
class Selected:
    """An attention over listed keys, with what computes the list: its operands by name, and the phase in the language."""

    program: Attention
    lists: Mapping[str, Operand]
    phase: Phase


@dataclass(frozen=True)
class _TopK:
    """The `w` positions of largest `rank` along dimension `dim`: `indices` are theirs, `values` what stands there."""

    node: Node
    rank: Node
    dim: int
    w: Expr

    @staticmethod
    def behind(indices: Node) -> _TopK | None:
        """The top-k whose indices these are."""
        if indices.target is not operator.getitem or indices.args[1] != 1:
            return None
        node = indices.args[0]
        assert isinstance(node, Node)
        if base_name(node.target) != "topk" or argument(node, 3, "largest", True) is not True:
            return None
        rank = node.args[0]
        assert isinstance(rank, Node)
        dim = argument(node, 2, "dim", -1) % len(shape_of(rank))
        return _TopK(node, rank, dim, size_expr(shape_of(indices)[dim]))

    def is_values(self, node: Node) -> bool:
        return node.target is operator.getitem and node.args == (self.node, 0)


@dataclass(frozen=True)
class _Member:
    """A part of `keep` that says: the key is among `chosen`, at an index that holds kv_idx at `chosen.dim`."""

    part: Expr
    index: tuple[Expr, ...]
    chosen: _TopK
    indices: Node
    kept: tuple[Node, ...]  # a truth for each index; none where all are kept
    candidate: Expr  # what it says of an element of rank, `_RANK`


_RANK = Read("rank", ())


def select_keys(program: Attention, operands: Mapping[str, Operand], reader: Reader) -> Selected | None:
    """Needs: a finished program. Ensures: its keys are those of a list, where a part of `keep` is one of the w largest of each row.
    Keeps: the meaning. None where nothing is selected."""
    if program.keep.empty is Empty.SCORE:
        return None
    for part in conjuncts(program.keep.predicate):
        member = _member(part, operands, reader)
        if member is not None:
            return _listed(program, member)
    return None


def _member(part: Expr, operands: Mapping[str, Operand], reader: Reader) -> _Member | None:
    """`part` as membership in a list that all queries share."""
    reads = reads_of(part)
    if len(reads) != 1 or "q_idx" in axes_of(part) or KV_IDX not in reads[0].index:
        return None
    (read,) = reads
    place = read.index.index(KV_IDX)
    others = read.index[:place] + read.index[place + 1 :]
    operand = operands[read.tensor]
    if not operand.is_plain or any("kv_idx" in axes_of(entry) for entry in others):
        return None
    node = operand.node
    if base_name(node.target) != "scatter" or node.args[1] % len(read.index) != place:  # type: ignore[operator]
        return None
    base, _, indices, source = node.args[:4]
    assert isinstance(base, Node) and isinstance(indices, Node)
    chosen = _TopK.behind(indices)
    if chosen is None or chosen.dim != place or not _same_rows(node, indices, place):
        return None
    outside = reader.element(base, read.index)
    inside: Expr | None = None
    candidate: Expr = TRUE
    kept: tuple[Node, ...] = ()
    if isinstance(source, bool | int | float):
        inside = Const(_as(outside, source))
    elif isinstance(source, Node):
        element = reader.element(source, read.index)
        test = _test_of(source, chosen)
        if isinstance(element, Const):
            inside = element
        elif test is not None:
            inside, kept, candidate = TRUE, (source,), test
    if inside is None or not isinstance(outside, Const):
        return None
    if (substitute(part, {read: inside}), substitute(part, {read: outside})) != (TRUE, FALSE):
        return None
    return _Member(part, read.index, chosen, indices, kept, candidate)


def _test_of(source: Node, chosen: _TopK) -> Expr | None:
    """What a comparison of the chosen values with a number says of an element of rank."""
    name = base_name(source.target)
    if name not in ("gt", "ge", "ne") or len(source.args) < 2:
        return None
    values, bound = source.args[:2]
    if not isinstance(values, Node) or not chosen.is_values(values) or not isinstance(bound, int | float):
        return None
    return apply(name, _RANK, Const(float(bound)))


def _as(like: Expr, value: bool | int | float) -> bool | int | float:
    """A number as the scattered tensor holds it."""
    return type(like.value)(value) if isinstance(like, Const) else value


def _same_rows(whole: Node, indices: Node, dim: int) -> bool:
    """True where every row of a tensor has its own indices."""
    pairs = enumerate(zip(shape_of(whole), shape_of(indices), strict=True))
    return all(same(a, b) for place, (a, b) in pairs if place != dim)


def _listed(program: Attention, member: _Member) -> Selected:
    names = {decl.name for decl in program.tensors}
    name = next(n for n in ("picked", "picked_keys", "picked_places") if n not in names)
    picked = Read(name, member.index)
    rest = conj(*(part for part in conjuncts(program.keep.predicate) if part != member.part))
    at = {KV_IDX: picked}
    listed = each_clause(replace(program, keep=replace(program.keep, predicate=rest)), lambda e: substitute(e, at))
    predicate = listed.keep.predicate
    if member.kept:
        predicate = conj(apply("ge", picked, ZERO), predicate)
    decl = TensorDecl(name, Dtype.I64, tuple(size_expr(size) for size in shape_of(member.indices)))
    used = {read.tensor for root in (*listed.expressions, predicate) for read in reads_of(root)}
    listed = replace(
        listed,
        axes=replace(program.axes, kv_idx=member.chosen.w),
        tensors=tuple(d for d in (*program.tensors, decl) if d.name in used),
        keep=Keep(predicate, program.keep.empty) if predicate != TRUE else Keep(),
    )
    made = Made("ascending", (member.indices, *member.kept))
    return Selected(listed, {name: Operand(member.indices, made=made)}, _phase(program, member, name))


def _phase(program: Attention, member: _Member, name: str) -> Phase:
    """The selection in the language: what is kept, and its list."""
    chosen = member.chosen
    shape = [size_expr(size) for size in shape_of(chosen.rank)]
    rows = [Axis(_ROWS[place] if len(shape) <= 4 else f"row{place}") for place in range(len(shape) - 1)]
    index = (*rows[: chosen.dim], _KEY, *rows[chosen.dim :])
    sizes = [size for place, size in enumerate(shape) if place != chosen.dim]
    rank = Read("rank", index)
    kept = Read("kept", index)
    places = tuple(_PLACE if axis == _KEY else axis for axis in index)
    tables = (
        Table("kept", index, TopK(rank, chosen.w, (_KEY,), substitute(member.candidate, {_RANK: rank}))),
        Table(name, places, Positions(kept, (_KEY,), _PLACE)),
    )
    axes = (*zip(rows, sizes, strict=True), (_KEY, shape[chosen.dim]), (_PLACE, chosen.w))
    decl = TensorDecl("rank", DTYPES[dtype_of(chosen.rank)], tuple(shape))
    return Phase(Tables(axes, (decl,), tables, program.origin), (name,))

"""A mask that is made of `topk` -> a selection and an attention over the keys that it lists.

    keep  mask[b, h // 2, 0, kv_idx] & (kv_idx <= q_idx)          mask = zeros.scatter(-1, rank.topk(w).indices, True)

says that all but w keys weigh nothing, whatever the query. So the keys of the program become the w places of a list, and what was
read at `kv_idx` is read at `picked[b, h // 2, 0, kv_idx]`, in ascending order: what lies behind the query ends the list.

Where each query ranks the keys that it sees (select_prefix.py), a key is kept by one run of queries; the list has those that any
query keeps, each with the query that drops it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from attncompiler.ir.expr import (
    KV_IDX,
    ONE,
    Q_IDX,
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
from attncompiler.ir.tables import Each, Fold, Form, Reduce, Table, Tables
from attncompiler.passes.nodes import DTYPES, Made, Operand, dtype_of, shape_of
from attncompiler.passes.reader import Reader
from attncompiler.passes.select_prefix import Prefix, prefix
from attncompiler.passes.sizes import size_expr
from attncompiler.passes.topk import ANY_RANK, Member, member
from attncompiler.passes.unkept_rows import UnkeptRows, without_unkept_rows

# the axes of a selection: rows by their place, then keys, the places of a list, and queries
_ROWS = Axis("b"), Axis("g"), Axis("row")
_KEY, _PLACE, _QUERY = Axis("key"), Axis("place"), Axis("i")


@dataclass(frozen=True)
class Selected:
    """An attention over listed keys, with what computes the list: its operands by name, and the phase in the language.

    `unkept`: the attentions of queries that keep no key, at most one: under a finite mask they attend to all."""

    program: Attention
    lists: Mapping[str, Operand]
    phase: Phase
    unkept: tuple[UnkeptRows, ...] = ()


def select_keys(program: Attention, operands: Mapping[str, Operand], reader: Reader) -> Selected | None:
    """Needs: a finished program. Ensures: its keys are those of a list, where a part of `keep` is one of the w largest of each row.
    Keeps: the meaning. None where nothing is selected."""
    if program.keep.empty is not Empty.SCORE:
        return _select(program, operands, reader)
    parted = without_unkept_rows(program, operands)
    if parted is None:
        return None
    kept, unkept = parted
    selected = _select(kept, operands, reader)
    return None if selected is None else replace(selected, unkept=(unkept,))


def _select(program: Attention, operands: Mapping[str, Operand], reader: Reader) -> Selected | None:
    only: Mapping[Expr, Expr] = {Q_IDX: ZERO} if program.axes.q_idx == ONE else {}  # one query: all have what it has
    for part in conjuncts(program.keep.predicate):
        if "kv_idx" not in axes_of(part) or not reads_of(part):
            continue
        found = member(substitute(part, only), operands, reader)
        if found is not None and "q_idx" not in axes_of(found.part):
            return _of_all_queries(program, replace(found, part=part))
        ranked = prefix(program, part, found, operands, reader)
        if ranked is not None:
            return _of_each_query(program, ranked)
    return None


# ----------------------------------------------------------------------------------------------- one list for all queries


def _of_all_queries(program: Attention, chosen: Member) -> Selected:
    name = _fresh("picked", program)
    indices, rank = chosen.topk.indices, chosen.topk.rank
    picked = Read(name, chosen.index)
    places = size_expr(shape_of(indices)[chosen.topk.dim])
    shape = tuple(size_expr(size) for size in shape_of(indices))
    filled = apply("ge", picked, ZERO) if chosen.kept else TRUE
    listed = over_list(_without(program, chosen.part), picked, filled, places, (TensorDecl(name, Dtype.I32, shape),))
    rows, index, sizes = _axes_of_rows(tuple(size_expr(size) for size in shape_of(rank)), chosen.topk.dim)
    largest = TopK(Read("rank", index), places, (_KEY,))
    tables = [Table("largest", index, largest)]
    kept: Expr = Read("largest", index)
    if chosen.test != TRUE:
        kept = conj(kept, substitute(chosen.test, {ANY_RANK: Read("rank", index)}))
    tables.append(Table(name, _with(index, _PLACE), Positions(kept, (_KEY,), _PLACE)))
    axes = (*zip(rows, sizes, strict=True), (_KEY, size_expr(shape_of(rank)[chosen.topk.dim])), (_PLACE, places))
    decl = TensorDecl("rank", DTYPES[dtype_of(rank)], tuple(size_expr(size) for size in shape_of(rank)))
    phase = Phase(Tables(axes, (decl,), tuple(tables), program.origin), (name,))
    return Selected(listed, {name: Operand(indices, made=Made("ascending", (indices, *chosen.kept)))}, phase)


def _fresh(wish: str, program: Attention) -> str:
    names = {decl.name for decl in program.tensors}
    return next(name for name in (wish, f"{wish}_keys", f"{wish}_places") if name not in names)


def _without(program: Attention, part: Expr) -> Attention:
    rest = conj(*(p for p in conjuncts(program.keep.predicate) if p != part))
    return replace(program, keep=replace(program.keep, predicate=rest))


def over_list(program: Attention, picked: Read, kept: Expr, places: Expr, decls: tuple[TensorDecl, ...]) -> Attention:
    """The program over the keys that a list names: what it read at `kv_idx` it reads at `picked`, of which it keeps what is `kept`."""
    at: Mapping[Expr, Expr] = {KV_IDX: picked}
    listed = each_clause(program, lambda expr: substitute(expr, at))
    predicate = conj(*dict.fromkeys((*conjuncts(kept), *conjuncts(listed.keep.predicate))))
    used = {read.tensor for root in (*listed.expressions, predicate) for read in reads_of(root)}
    return replace(
        listed,
        axes=replace(program.axes, kv_idx=places),
        tensors=tuple(decl for decl in (*program.tensors, *decls) if decl.name in used),
        keep=Keep(predicate, program.keep.empty) if predicate != TRUE else Keep(),
    )


def _axes_of_rows(shape: tuple[Expr, ...], dim: int) -> tuple[list[Axis], tuple[Axis, ...], list[Expr]]:
    """The axes of the rows of a tensor whose dimension `dim` is the keys; the index of its elements; the sizes of the rows."""
    rows = [_ROWS[place] if len(shape) <= len(_ROWS) + 1 else Axis(f"row{place}") for place in range(len(shape) - 1)]
    sizes = [size for place, size in enumerate(shape) if place != dim]
    return rows, (*rows[:dim], _KEY, *rows[dim:]), sizes


def _with(index: tuple[Axis, ...], axis: Axis) -> tuple[Axis, ...]:
    return tuple(axis if each == _KEY else each for each in index)


# ------------------------------------------------------------------------------------------------- a set for each query


def _of_each_query(program: Attention, ranked: Prefix) -> Selected:
    picked_name, until_name = _fresh("picked", program), _fresh("until", program)
    place = ranked.rank.index.index(KV_IDX)
    index = (*(entry for at, entry in enumerate(ranked.rank.index) if at != place), KV_IDX)
    picked, until = Read(picked_name, index), Read(until_name, index)
    node = ranked.operand.node
    sizes = [size_expr(size) for at, size in enumerate(shape_of(node)) if at != place]
    decls = tuple(TensorDecl(name, Dtype.I32, (*sizes, ranked.places)) for name in (picked_name, until_name))
    still = conj(apply("ge", picked, ZERO), apply("le", picked, ranked.last), apply("lt", Axis("q_idx"), until))
    listed = over_list(_without(program, ranked.part), picked, still, ranked.places, decls)
    lists = {
        name: Operand(node, made=Made("prefix_top_k", (node, place, *ranked.numbers), result))
        for result, name in enumerate((picked_name, until_name))
    }
    return Selected(listed, lists, _prefix_phase(program, ranked, sizes, place, (picked_name, until_name)))


def _prefix_phase(program: Attention, ranked: Prefix, sizes: list[Expr], place: int, names: tuple[str, str]) -> Phase:
    """The same, densely: which keys each query keeps, the list of those that any does, and what ends the run of each."""
    shape = tuple(size_expr(size) for size in shape_of(ranked.operand.node))
    rows, index, _ = _axes_of_rows(shape, place)
    rank = Read("rank", index)
    seen = substitute(apply("le", _KEY, ranked.last), {Axis("q_idx"): _QUERY})
    pairs = (*rows, _QUERY, _KEY)
    largest: Form = TopK(rank, ranked.w, (_KEY,), seen)
    kept: Expr = Read("largest", pairs)
    if ranked.ties:
        numbers = conj(kept, apply("le", rank, Const(math.inf)))  # a NaN is the least of none
        least = Table("least", (*rows, _QUERY), Reduce(Fold.MIN, rank, (_KEY,), numbers))
        tables = [Table("largest", pairs, largest), least]
        kept = conj(seen, apply("ge", rank, Read("least", (*rows, _QUERY))))
    else:
        tables = [Table("largest", pairs, largest)]
    kept = conj(kept, substitute(ranked.test, {ANY_RANK: rank}))
    tables += [
        Table("ever", (*rows, _KEY), Reduce(Fold.ANY, kept, (_QUERY,))),
        Table(names[0], (*rows, _PLACE), Positions(Read("ever", (*rows, _KEY)), (_KEY,), _PLACE)),
        Table("last", (*rows, _KEY), Reduce(Fold.MAX, _QUERY, (_QUERY,), kept)),
        Table(
            names[1],
            (*rows, _PLACE),
            Each(apply("add", Read("last", (*rows, Read(names[0], (*rows, _PLACE)))), size_expr(1))),
        ),
    ]
    axes = (*zip(rows, sizes, strict=True), (_KEY, shape[place]), (_QUERY, program.axes.q_idx), (_PLACE, ranked.places))
    decl = TensorDecl("rank", DTYPES[dtype_of(ranked.operand.node)], shape)
    return Phase(Tables(axes, (decl,), tuple(tables), program.origin), names)

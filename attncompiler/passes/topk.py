"""What `topk` in a traced graph chose, and the masks that are made of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Graph, Node

from attncompiler.ir.expr import FALSE, KV_IDX, TRUE, Const, Expr, Read, apply, axes_of, reads_of, substitute
from attncompiler.passes.contraction import argument
from attncompiler.passes.elementwise import ELEMENTWISE, base_name
from attncompiler.passes.nodes import CASTS, EXPANDS, PERMUTES, RESHAPES, SAME_ELEMENT, Index, Operand, dtype_of, shape_of
from attncompiler.passes.reader import Reader
from attncompiler.passes.sizes import same


@dataclass(frozen=True)
class TopKOf:
    """The `w` positions of largest `rank` along dimension `dim`."""

    node: Node
    rank: Node
    dim: int

    @property
    def indices(self) -> Node:
        return next(user for user in self.node.users if user.target is operator.getitem and user.args[1] == 1)

    def is_values(self, node: Node) -> bool:
        return node.target is operator.getitem and node.args == (self.node, 0)


def topk_of(result: Node, place: int) -> TopKOf | None:
    """The top-k of which `result` is the values (place 0) or the indices (1)."""
    if result.target is not operator.getitem or result.args[1] != place:
        return None
    node = result.args[0]
    assert isinstance(node, Node)
    if base_name(node.target) != "topk" or argument(node, 3, "largest", True) is not True:
        return None
    rank = node.args[0]
    assert isinstance(rank, Node)
    return TopKOf(node, rank, argument(node, 2, "dim", -1) % len(shape_of(rank)))


ANY_RANK = Read("rank", ())  # an element of what is ranked


@dataclass(frozen=True)
class Member:
    """A part of `keep` that says: the key is one of those that `topk` chose, read at an index that holds kv_idx at `topk.dim`.

    Of these it says so where `test` holds of `ANY_RANK`; `kept` is that for each index that was chosen, if it is computed."""

    part: Expr
    index: Index
    topk: TopKOf
    test: Expr = TRUE
    kept: tuple[Node, ...] = ()


def member(part: Expr, operands: Mapping[str, Operand], reader: Reader) -> Member | None:
    """`part` as a truth (or a number with two values) that is scattered to what `topk` chose."""
    reads = reads_of(part)
    if len(reads) != 1 or KV_IDX not in reads[0].index or not operands[reads[0].tensor].is_plain:
        return None
    (read,) = reads
    place = read.index.index(KV_IDX)
    if any("kv_idx" in axes_of(entry) for at, entry in enumerate(read.index) if at != place):
        return None
    made = _made_of_topk(_through_copies(operands[read.tensor].node), place, reader, read.index)
    if made is None or made.topk.dim != place:
        return None
    if (substitute(part, {read: made.inside}), substitute(part, {read: made.outside})) != (TRUE, FALSE):
        return None
    return Member(part, read.index, made.topk, made.test, made.kept)


@dataclass(frozen=True)
class _Mask:
    """A tensor with one number at the keys that `topk` chose, where `test` holds of their rank, and another at all else."""

    topk: TopKOf
    outside: Const
    inside: Const
    test: Expr = TRUE
    kept: tuple[Node, ...] = ()


def _made_of_topk(node: Node, place: int, reader: Reader, index: Index) -> _Mask | None:
    """`zeros.scatter(dim, indices, source)` or `one_hot(indices, N).sum(-2)`, with the keys along dimension `place`."""
    name, last = base_name(node.target), len(index) - 1
    if name == "sum" and place == last and isinstance(node.args[0], Node) and base_name(node.args[0].target) == "one_hot":
        counted, dims = node.args[0], node.args[1] if len(node.args) == 2 else None  # with keepdim there are three
        indices = counted.args[0]
        topk = topk_of(indices, 1) if isinstance(indices, Node) else None
        along = isinstance(dims, list | tuple) and [d % (last + 2) for d in dims] == [last]
        return _Mask(topk, Const(0), Const(1)) if topk is not None and along and _all_keys(counted, topk) else None
    if name != "scatter" or node.args[1] % len(index) != place:  # type: ignore[operator]
        return None
    base, _, indices, source = node.args[:4]
    assert isinstance(base, Node) and isinstance(indices, Node)
    topk = topk_of(indices, 1)
    if topk is None or not _same_rows(node, indices, place):
        return None
    outside = reader.element(base, index)
    if not isinstance(outside, Const):
        return None
    inside, test, kept = _source(source, type(outside.value), topk, reader, index)
    return None if inside is None else _Mask(topk, outside, inside, test, kept)


def _all_keys(counted: Node, topk: TopKOf) -> bool:
    """True where a one-hot of indices has a place for each key that was ranked."""
    return topk.dim == len(shape_of(topk.rank)) - 1 and same(shape_of(counted)[-1], shape_of(topk.rank)[-1])


def ranked_nodes(graph: Graph) -> frozenset[Node]:
    """What `topk` ranks, and what that is computed from element by element: numbers that score keys. None of them is a mask."""
    found: set[Node] = set()
    waiting = [node.args[0] for node in graph.nodes if base_name(node.target) == "topk"]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Node) and node not in found:
            found.add(node)
            if base_name(node.target) in _SHOWS and node.op == "call_function":
                waiting += node.all_input_nodes
    return frozenset(found)


_SHOWS = frozenset({*SAME_ELEMENT, *RESHAPES, *PERMUTES, *EXPANDS, *CASTS, *ELEMENTWISE, "select", "slice"})


def leaves_some_out(node: Node) -> bool:
    """True for a mask that is scattered to fewer keys than there are."""
    node = _through_copies(node)
    if base_name(node.target) != "scatter":
        return False
    _, dim, indices, *_ = node.args
    assert isinstance(dim, int) and isinstance(indices, Node)
    some, all_keys = shape_of(indices)[dim], shape_of(node)[dim]
    return isinstance(some, int) and isinstance(all_keys, int) and some < all_keys


def _through_copies(node: Node) -> Node:
    while base_name(node.target) in SAME_ELEMENT and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _source(source: object, kind: type, topk: TopKOf, reader: Reader, index: Index) -> tuple[Const | None, Expr, tuple[Node, ...]]:
    """What is scattered: the number where a key is kept, of which elements it is said, and the node that says so."""
    if isinstance(source, bool | int | float):
        return Const(kind(source)), TRUE, ()
    if not isinstance(source, Node):
        return None, TRUE, ()
    element = reader.element(source, index)
    if isinstance(element, Const):
        return element, TRUE, ()
    name = base_name(source.target)
    if name not in ("gt", "ge", "ne") or len(source.args) < 2:
        return None, TRUE, ()
    values, bound = source.args[:2]
    if not isinstance(values, Node) or not topk.is_values(values) or not isinstance(bound, int | float):
        return None, TRUE, ()
    return TRUE, apply(name, ANY_RANK, Const(float(bound))), (source,)


def _same_rows(whole: Node, indices: Node, dim: int) -> bool:
    """True where every row of a tensor has its own indices."""
    pairs = enumerate(zip(shape_of(whole), shape_of(indices), strict=True))
    return all(same(a, b) for place, (a, b) in pairs if place != dim)


def is_floating(node: Node) -> bool:
    return dtype_of(node).is_floating_point

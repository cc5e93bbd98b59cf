"""A running sum of outer products of keys and values, read by a query at each position -> a state.

    S = (k[..., :, None] * v[..., None, :]).cumsum(-3);  o = einsum("bhnc,bhncd->bhnd", q, S)

As written it holds a state for every position, N x C x D a head. A normaliser beside it, made of the running sum of the keys, is as
large as the keys: it stays what it is.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace

from torch.fx import Node

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import KV_IDX, ONE, Q_IDX, ZERO, Axis, Expr, Read, axes_of, substitute
from attncompiler.ir.state import C, D, Moment
from attncompiler.passes.contraction import Contraction, contraction_of
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.nodes import CHANNEL, SAME_ELEMENT, Index, dtype_of, is_tensor, shape_of
from attncompiler.passes.reader import Reader
from attncompiler.passes.sizes import Extent, IndexSpace, same
from attncompiler.passes.state_site import NothingToSay, Parts, StateContext, StateSite, assembled


def query_of_running_sum(context: StateContext, node: Node) -> StateSite:
    """The state that `node` reads with a query. Raises: NothingToSay; Unrecognised."""
    product = contraction_of(node) or _summed_product(node)
    if product is None or len(product.summed) != 1 or product.bias is not None:
        raise NothingToSay
    for query, states in (("left", "right"), ("right", "left")):
        sums = _running_sum_behind(getattr(product, states))
        if sums is not None:
            return _read(context, node, product, query, states, sums)
    raise NothingToSay


def _summed_product(node: Node) -> Contraction | None:
    """(x * y).sum(dim) as a product."""
    if base_name(node.target) != "sum" or not is_tensor(node.args[0]) or len(node.args) < 2 or node.kwargs:
        return None
    inner, dims, *keep = node.args
    assert isinstance(inner, Node)
    dims = dims if isinstance(dims, list | tuple) else [dims]
    if base_name(inner.target) != "mul" or len(dims) != 1 or not all(is_tensor(arg) for arg in inner.args) or any(keep):
        return None
    left, right = inner.args
    assert isinstance(left, Node) and isinstance(right, Node) and isinstance(dims[0], int)
    letters = string.ascii_lowercase[: len(shape_of(inner))]
    if len(shape_of(left)) != len(letters) or len(shape_of(right)) != len(letters):
        return None
    summed = letters[dims[0] % len(letters)]
    return Contraction(left, right, letters, letters, letters.replace(summed, ""), dtype_of(node))


def _running_sum_behind(node: Node) -> Node | None:
    """The cumsum that `node` shows the elements of."""
    while base_name(node.target) in SAME_ELEMENT or base_name(node.target) == "permute" or base_name(node.target) == "transpose":
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node if base_name(node.target) == "cumsum" else None


@dataclass(frozen=True)
class _Side:
    """A factor of the outer product, at the index of one of its elements."""

    node: Node
    index: Index


def _read(context: StateContext, node: Node, product: Contraction, query: str, states: str, sums: Node) -> StateSite:
    states_node: Node = getattr(product, states)
    letters: str = getattr(product, f"{states}_letters")
    query_letters: str = getattr(product, f"{query}_letters")
    channels = [c for c in letters if c in product.out_letters and (c not in query_letters or _size_one(product, query, c))]
    extent = {c: Reader.extent_of(product, c) for c in dict.fromkeys(product.left_letters + product.right_letters)}
    space = IndexSpace()
    reader = Reader(context.module, space, context.trained, context.masks)
    axes: dict[str, Expr] = {c: space.axis(f"batch{i}", extent[c]) for i, c in enumerate(product.out_letters) if c not in channels}
    channels = [c for c in channels if not same(extent[c], 1)] or channels
    if len(channels) != 1:
        raise NothingToSay
    axes |= {channels[0]: D, product.summed: C}
    space.extents[D], space.extents[C] = extent[channels[0]], extent[product.summed]
    found = reader.element(states_node, tuple(axes[c] for c in letters))
    if not isinstance(found, Read) or reader.leaves[found.tensor].node is not sums:
        raise NothingToSay
    source, dim = sums.args[:2]
    assert isinstance(source, Node) and isinstance(dim, int)
    step = found.index[dim % len(found.index)]
    if not isinstance(step, Axis) or step in (C, D) or sum(step.name in axes_of(i) for i in found.index) != 1:
        raise NothingToSay
    key, value = _outer(reader, source, found.index)
    steps = next(c for c, axis in axes.items() if axis == step)
    space.extents[KV_IDX] = space.extents[Q_IDX] = extent[steps]
    read = [
        _vector(reader, side.node, tuple(substitute(i, {step: KV_IDX, channel: CHANNEL}) for i in side.index), role, product)
        for side, channel, role in ((key, C, "key"), (value, D, "value"))
    ]
    query_node: Node = getattr(product, query)
    places = {**axes, steps: Q_IDX, product.summed: CHANNEL}
    index = tuple(ZERO if c in channels else places[c] for c in query_letters)
    q = _vector(reader, query_node, reader_index(reader, query_node, index), "query", product)
    (k, k_scale), (v, v_scale) = read
    if dtype_of(reader.leaves[v.tensor].node) != dtype_of(node):
        raise Unrecognised(
            "a running sum of outer products of two types",
            why=f"the values are {dtype_of(reader.leaves[v.tensor].node)}, the result is {dtype_of(node)}",
            do="cast the values to the type of the result",
        )
    batch = [c for c in product.out_letters if c not in (steps, *channels)]
    order = [*batch, steps, *channels]
    site = assembled(
        context,
        reader,
        node,
        node,
        Parts(
            q[0], k, v, q[1] * k_scale * v_scale * product.alpha, ZERO, ONE, Q_IDX, Moment.AFTER,
            extent[steps], extent[steps], extent[product.summed], extent[channels[0]],
        ),
        [(axes[c], extent[c]) for c in batch],
        f"a state of {_text(extent[product.summed])} x {_text(extent[channels[0]])} a head in place of one for each of "
        f"{_text(extent[steps])} positions",
    )  # fmt: skip
    return replace(
        site,
        split=tuple(extent[c] for c in order),
        permutation=tuple(order.index(c) for c in product.out_letters),
        softmax_nodes=frozenset({sums, source}),
    )


def _size_one(product: Contraction, side: str, letter: str) -> bool:
    node: Node = getattr(product, side)
    return same(shape_of(node)[getattr(product, f"{side}_letters").index(letter)], 1)


def _text(size: Extent) -> str:
    return str(size)


def reader_index(reader: Reader, node: Node, index: Index) -> Index:
    """The index with 0 where the node has but one place."""
    return tuple(
        ZERO if same(size, 1) and at != CHANNEL and not same(reader.space.extent(at), 1) else at
        for size, at in zip(shape_of(node), index, strict=True)
    )


def _outer(reader: Reader, source: Node, index: Index) -> tuple[_Side, _Side]:
    """The factors of an outer product: that of the features, and that of the channels. Raises: NothingToSay."""
    while base_name(source.target) in SAME_ELEMENT and is_tensor(source.args[0]):
        source = source.args[0]  # type: ignore[assignment]
    product = contraction_of(source)
    if product is not None:
        at = dict(zip(product.out_letters, index, strict=True))
        if any(not same(Reader.extent_of(product, c), 1) for c in product.summed):
            raise NothingToSay
        at |= dict.fromkeys(product.summed, ZERO)
        sides = [
            _Side(side, reader_index(reader, side, tuple(at[c] for c in letters)))
            for side, letters in ((product.left, product.left_letters), (product.right, product.right_letters))
        ]
    elif base_name(source.target) == "mul" and all(is_tensor(arg) for arg in source.args):
        sides = [_Side(arg, reader.broadcast(arg, shape_of(source), index)) for arg in source.args if isinstance(arg, Node)]
    else:
        raise NothingToSay
    if len(sides) != 2:
        raise NothingToSay
    for key, value in (sides, sides[::-1]):
        if C in key.index and D not in key.index and D in value.index and C not in value.index:
            return key, value
    raise NothingToSay


def _vector(reader: Reader, node: Node, index: Index, role: str, product: Contraction) -> tuple[Read, float]:
    letters = string.ascii_lowercase[: len(index)]
    return reader.vector(node, letters, dict(zip(letters, index, strict=True)), role, product.dtype, widen=role != "value")

"""Attention that the user calls by name: scaled_dot_product_attention and flex_attention, with every argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import (
    ONE,
    Q_IDX,
    TRUE,
    ZERO,
    Apply,
    Const,
    Dot,
    Expr,
    Read,
    Uniform,
    add,
    apply,
    conj,
    floordiv,
    mul,
    reads_of,
)
from attncompiler.ir.program import Attention, Axes, Empty, Keep, Origin, Softmax
from attncompiler.passes.constant_masks import ConstantMasks
from attncompiler.passes.nodes import CHANNEL, KV, Index, Operand, dtype_of, shape_of
from attncompiler.passes.normalise import source_line
from attncompiler.passes.reader import Reader
from attncompiler.passes.site import Site, finish, name_batch_axes
from attncompiler.passes.sizes import IndexSpace, size_expr
from attncompiler.passes.topk import leaves_some_out, ranked_nodes


def sdpa(module: GraphModule, node: Node, trained: frozenset[Node], masks: ConstantMasks) -> Site:
    """scaled_dot_product_attention with every argument. An empty row gives 0; `is_causal` counts from the first key."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = given["query"], given["key"], given["value"]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    space = IndexSpace()
    reader = Reader(module, space, trained, masks)
    out_shape = shape_of(node)
    letters = "abcdefgh"[: len(out_shape) - 2]
    at: dict[str, Expr] = {c: space.axis(f"batch{i}", out_shape[i]) for i, c in enumerate(letters)}
    space.extents[Q_IDX], space.extents[KV] = shape_of(query)[-2], shape_of(key)[-2]
    kv_at = dict(at)
    if given.get("enable_gqa", False):
        groups = shape_of(query)[-3] // shape_of(key)[-3]
        kv_at[letters[-1]] = floordiv(at[letters[-1]], size_expr(groups))

    def side(tensor: Node, axes: Mapping[str, Expr], role: str, row: Expr) -> Read:
        spelled = letters[len(letters) - len(shape_of(tensor)) + 2 :] + "xy"
        read, factor = reader.vector(tensor, spelled, {**axes, "x": row, "y": CHANNEL}, role, dtype_of(node), widen=False)
        scales.append(factor)
        return read

    scales: list[float] = []
    dot: Expr = Dot(side(query, at, "query", Q_IDX), side(key, kv_at, "key", KV))
    scale = given.get("scale")
    head_size = shape_of(query)[-1]
    if scale is None and not isinstance(head_size, int):
        raise Unrecognised("the head size is not known when compiling", do="mark it static")
    factor = float(scale) if scale is not None else head_size**-0.5  # type: ignore[arg-type]
    score = mul(dot, Const(factor * scales[0] * scales[1]))
    read = side(value, kv_at, "value", KV)
    keep: Expr = TRUE
    if given.get("is_causal", False):
        keep = apply("le", KV, Q_IDX)
    mask = given.get("attn_mask")
    if isinstance(mask, Node):
        element = reader.element(mask, reader.broadcast(mask, (*out_shape[:-1], shape_of(key)[-2]), (*at.values(), Q_IDX, KV)))
        if dtype_of(mask) is torch.bool:
            keep = conj(keep, element)
        else:
            score = add(score, element)
            is_bias = mask in trained or _is_of_chosen_keys(element, reader)
            keep = keep if is_bias else conj(keep, apply("ne", element, Const(-math.inf)))
    adjust: Expr = ONE if scales[2] == 1.0 else Const(scales[2])
    p = given.get("dropout_p", 0.0)
    if isinstance(p, int | float) and p > 0:
        seed = f"seed_{node.name}"
        reader.leaves[seed] = Operand(node, is_seed=True)
        kept = apply("ge", Uniform(Read(seed, (ZERO,))), Const(float(p)))
        adjust = apply("where", kept, Const(scales[2] / (1.0 - p)), Const(0.0))
    draft = Attention(
        axes=Axes(ONE, ONE, size_expr(space.extents[Q_IDX]), size_expr(space.extents[KV])),
        tensors=(),
        score=score,
        keep=Keep(keep, Empty.ZERO) if keep != TRUE else Keep(),
        weigh=Softmax(),
        adjust=adjust,
        sum=read,
        origin=Origin(source_line(node)),
    )
    draft = name_batch_axes(draft, [(at[c], out_shape[i]) for i, c in enumerate(letters)])
    return replace(finish(reader, node, draft, trained), split=out_shape, permutation=tuple(range(len(out_shape))))


def _is_of_chosen_keys(element: Expr, reader: Reader) -> bool:
    """True for `where(chosen, rank, finfo.min)`: as some key is not chosen, no row is all -inf."""
    if not isinstance(element, Apply) or element.op != "where":
        return False
    condition, rank, other = element.args
    chosen = any(leaves_some_out(reader.leaves[read.tensor].node) for read in reads_of(condition))
    is_rank = isinstance(rank, Read) and reader.leaves[rank.tensor].node in ranked_nodes(reader.module.graph)
    return chosen and is_rank and isinstance(other, Const) and math.isfinite(other.value)


# -------------------------------------------------------------------------------------------------- flex_attention


class ModReader(Reader):
    """Reads a score_mod or mask_mod: its placeholders are the score, the positions and the captured tensors."""

    def __init__(self, outer: Reader, module: GraphModule, bound: Sequence[Expr | Node]) -> None:
        super().__init__(module, outer.space, frozenset(), outer.masks)
        self.leaves = outer.leaves
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.bound = dict(zip(placeholders, bound, strict=True))
        for node, value in self.bound.items():
            if isinstance(value, Node):
                node.meta["val"] = value.meta["val"]
            elif "val" not in node.meta:
                raise Unrecognised("the traced mod carries no types")

    def _look_through(self, node: Node, index: Index) -> Expr | None:
        value = self.bound.get(node)
        if isinstance(value, Node):
            self.leaves[value.name] = Operand(value)
            return Read(value.name, index)
        return value if value is not None else super()._look_through(node, index)

    def element(self, node: Node, index: Index) -> Expr:
        key = (node, index)
        if key not in self.memo:
            found = self._look_through(node, index)  # a reason passes on: what it stands in has no expression either
            self.memo[key] = self.leaf(node, index) if found is None else found
        return self.memo[key]

    def leaf(self, node: Node, index: Index) -> Read:
        raise Unrecognised(f"the mod uses {node.target}, which has no expression", where=source_line(node))

    def _better_read(self, node: Node, expr: Expr) -> bool:
        return False

    def _is_of_pairs(self, index: Index) -> bool:
        return True

    def result(self) -> Expr:
        (output,) = (node.args[0] for node in self.module.graph.nodes if node.op == "output")
        if not isinstance(output, Node):
            return Const(output) if isinstance(output, bool | int | float) else ONE
        if shape_of(output):
            raise Unrecognised(
                f"the result has the shape {list(shape_of(output))}",
                why="there is one number for each pair of a query and a key",
                do="read captured tensors at as many places as they have dimensions, as in bias[h, q_idx]",
            )
        return self.element(output, ())


_NO_BLOCKS = 1 << 30  # flex_attention's block size when no block mask is given


def flex(module: GraphModule, node: Node, trained: frozenset[Node], masks: ConstantMasks) -> Site:
    """flex_attention with its mods as programs; the block mask's tables are not used: its mask_mod says the same, exactly."""
    arguments: Sequence[Any] = node.args
    query, key, value, score_mod, block_mask, scale, _, score_captured, mask_captured = arguments[:9]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    assert isinstance(block_mask, Sequence) and isinstance(score_captured, Sequence) and isinstance(mask_captured, Sequence)
    pieces = {user.args[1]: user for user in node.users if user.target is operator.getitem and user.users}
    if 0 not in pieces or set(pieces) - {0, 1}:
        raise Unrecognised("the row maxima of flex_attention are read", do="return the logsumexp instead")
    space = IndexSpace()
    reader = Reader(module, space, trained, masks)
    b, h, m, _d = shape_of(query)
    n = shape_of(key)[2]
    at: dict[str, Expr] = {"b": space.axis("batch0", b), "h": space.axis("batch1", h)}
    space.extents[Q_IDX], space.extents[KV] = m, n
    rows = {**at, "q": Q_IDX, "c": CHANNEL}
    groups = h // shape_of(key)[1]
    columns = {"b": at["b"], "h": floordiv(at["h"], size_expr(groups)), "k": KV, "c": CHANNEL}
    left, left_scale = reader.vector(query, "bhqc", rows, "query", dtype_of(node_output(node)), widen=False)
    right, right_scale = reader.vector(key, "bhkc", columns, "key", dtype_of(node_output(node)), widen=False)
    read, value_scale = reader.vector(value, "bhkc", columns, "value", dtype_of(node_output(node)), widen=False)
    assert isinstance(scale, int | float)
    score: Expr = mul(Dot(left, right), Const(float(scale) * left_scale * right_scale))
    positions: list[Expr | Node] = [at["b"], at["h"], rows["q"], KV]
    score = _mod(reader, module, score_mod, [score, *positions, *score_captured])
    mask = _mod(reader, module, block_mask[-1], [*positions, *mask_captured])
    if mask == TRUE and isinstance(block_mask[-2], int) and block_mask[-2] < _NO_BLOCKS and block_mask[2] is not None:
        raise Unrecognised(
            "a block mask without a mask_mod", why="its tables alone say what is kept", do="give create_block_mask a mask_mod"
        )
    draft = Attention(
        axes=Axes(ONE, ONE, size_expr(m), size_expr(n)),
        tensors=(),
        score=score,
        keep=Keep(mask, Empty.ZERO) if mask != TRUE else Keep(),
        weigh=Softmax(),
        adjust=ONE if value_scale == 1.0 else Const(value_scale),
        sum=read,
        origin=Origin(source_line(node) or source_line(pieces[0])),
    )
    draft = name_batch_axes(draft, [(at["b"], b), (at["h"], h)])
    site = finish(reader, pieces[0], draft, trained)
    shape = (b, h, m, shape_of(value)[-1])
    return replace(site, split=shape, permutation=(0, 1, 2, 3), lse=pieces.get(1), lse_unit=math.log(2.0))


def node_output(node: Node) -> Node:
    """The getitem that holds O: where an operator has several results, the first one's type speaks for them."""
    return next(user for user in node.users if user.target is operator.getitem and user.args[1] == 0)


def _mod(reader: Reader, module: GraphModule, mod: object, bound: Sequence[Expr | Node]) -> Expr:
    assert isinstance(mod, Node)
    graph_module = getattr(module, str(mod.target))
    assert isinstance(graph_module, GraphModule)
    return ModReader(reader, graph_module, bound).result()

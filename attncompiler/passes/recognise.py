"""ATen around two contractions -> an attention program, or a reason.

For each product whose one side holds normalised scores, the element of that side is read back to dot products (`reader.py`), its
normaliser is found (`normaliser.py`), and the axes of the product become b, h, q_idx and kv_idx. By meaning: no template of a
graph is compared with anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from attncompiler.errors import AttnCompilerError, Unrecognised
from attncompiler.ir.expr import ONE, Q_IDX, Const, Expr, axes_of, dots_of, mul, reads_of
from attncompiler.ir.program import Attention, Axes, Empty, Keep, Origin, Softmax, pair_axes
from attncompiler.passes.constant_masks import ConstantMasks
from attncompiler.passes.contraction import Contraction, contraction_of
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.nodes import CHANNEL, KV
from attncompiler.passes.normalise import source_line
from attncompiler.passes.normaliser import normalised
from attncompiler.passes.reader import Reader
from attncompiler.passes.recognise_calls import flex, sdpa
from attncompiler.passes.site import Refusal, Site, finish, name_batch_axes
from attncompiler.passes.sizes import IndexSpace, same, size_expr

aten = torch.ops.aten


def trained_nodes(module: GraphModule, inputs: tuple[object, ...]) -> frozenset[Node]:
    """Nodes whose value depends on an input that requires a gradient."""
    found: set[Node] = set()
    values = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = next(values, None)
            if isinstance(value, torch.Tensor) and value.requires_grad:
                found.add(node)
        elif node.op == "get_attr":
            value = module
            for part in str(node.target).split("."):
                value = getattr(value, part, None)
            if isinstance(value, torch.Tensor) and value.requires_grad:
                found.add(node)
        elif any(source in found for source in node.all_input_nodes) and _is_floating(node):
            found.add(node)
    return frozenset(found)


def _is_floating(node: Node) -> bool:
    value = node.meta.get("val")
    tensors = [value] if isinstance(value, torch.Tensor) else value if isinstance(value, tuple | list) else []
    return any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors)


def recognise(module: GraphModule, trained: frozenset[Node], masks: ConstantMasks) -> tuple[list[Site], list[Refusal]]:
    """Needs: a captured graph. Ensures: every attention is in one of the two lists. Changes nothing."""
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for node in module.graph.nodes:
        behind: set[Node] = set()
        try:
            if node.target in _CALLS:
                sites.append(_CALLS[node.target](module, node, trained, masks))
            elif (product := contraction_of(node)) is not None and product.summed:
                behind = normalisers_behind(product.left) | normalisers_behind(product.right)
                if behind:
                    sites.append(_product(module, node, product, trained, masks))
        except AttnCompilerError as error:
            refusals.append(Refusal(node, error, frozenset(behind)))
    taken = {softmax for site in sites for softmax in site.softmax_nodes}
    return sites, [r for r in refusals if not r.softmax_nodes or not r.softmax_nodes <= taken]


_CALLS = {aten.scaled_dot_product_attention.default: sdpa, torch.ops.higher_order.flex_attention: flex}

# Operators that a search for a normaliser does not cross: behind them stands another layer's attention.
BARRIERS = frozenset({
    "linear", "addmm", "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "convolution", "conv1d", "conv2d", "conv3d",
    "batch_norm", "embedding", "scaled_dot_product_attention", "topk", "sort", "gather", "index", "argmax", "cumsum", "gelu",
    "silu",
})  # fmt: skip
NORMALISERS = frozenset({"softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"})


def cone(nodes: Iterable[Node], ends: frozenset[str] = frozenset()) -> set[Node]:
    """The calls that reach `nodes`, these included, through elementwise operators and views alone: products, operators of `ends` and
    barriers are in it, and nothing behind them."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack and len(seen) < _MOST_SEEN:
        current = stack.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if base_name(current.target) not in BARRIERS | ends and contraction_of(current) is None:
            stack.extend(current.all_input_nodes)
    return seen


_MOST_SEEN = 400


def normalisers_behind(node: Node) -> set[Node]:
    """Normalisers that reach `node` through elementwise operators and views alone."""
    return {n for n in cone([node], NORMALISERS) if base_name(n.target) in NORMALISERS | {"exp"}}


# --------------------------------------------------------------------------------------- a product of weights and values


@dataclass(frozen=True)
class Letters:
    """The role of every letter of a product: weights [batch, q, kv] times values [batch, kv, channel]."""

    batch: str
    query: str  # "" when the product has no query axis
    key: str
    channel: str


def _product(module: GraphModule, node: Node, product: Contraction, trained: frozenset[Node], masks: ConstantMasks) -> Site:
    first = Unrecognised("no side of the product is a softmax")
    for weights, value in (("left", "right"), ("right", "left")):
        weights_node: Node = getattr(product, weights)
        if not normalisers_behind(weights_node):
            continue
        try:
            return _oriented(module, node, product, weights, value, trained, masks)
        except Unrecognised as error:
            first = error
    raise first


def roles_of(product: Contraction, weights_letters: str, value_letters: str) -> Letters:
    if len(product.summed) != 1:
        raise Unrecognised("the product sums over more than one axis", do="reshape the summed axes into one")
    key = product.summed
    channels = [c for c in value_letters if c in product.out_letters and c not in weights_letters]
    rows = [c for c in weights_letters if c in product.out_letters and c not in value_letters]
    if key not in weights_letters or key not in value_letters or len(channels) != 1:
        raise Unrecognised("the values have no single channel axis", do="write the values as [..., keys, channels]")
    query = rows[-1] if rows else ""
    return Letters("".join(c for c in product.out_letters if c not in (query, channels[0])), query, key, channels[0])


def _oriented(
    module: GraphModule,
    node: Node,
    product: Contraction,
    weights_side: str,
    value_side: str,
    trained: frozenset[Node],
    masks: ConstantMasks,
) -> Site:
    weights_node: Node = getattr(product, weights_side)
    value_node: Node = getattr(product, value_side)
    weights_letters: str = getattr(product, f"{weights_side}_letters")
    value_letters: str = getattr(product, f"{value_side}_letters")
    roles = roles_of(product, weights_letters, value_letters)
    space = IndexSpace()
    reader = Reader(module, space, trained, masks)
    extent = {c: Reader.extent_of(product, c) for c in dict.fromkeys(product.left_letters + product.right_letters)}
    at: dict[str, Expr] = {c: space.axis(f"batch{i}", extent[c]) for i, c in enumerate(roles.batch)}
    space.extents[KV], space.extents[Q_IDX] = extent[roles.key], extent[roles.query] if roles.query else 1
    at[roles.key], at[roles.channel] = KV, CHANNEL
    if roles.query:
        at[roles.query] = Q_IDX

    weights_index = reader.broadcast_letters(weights_node, weights_letters, at)
    parts = normalised(reader, reader.element(weights_node, weights_index), extent[roles.key])
    value, value_scale = reader.vector(value_node, value_letters, at, "value", product.dtype, widen=False)
    scale = value_scale * product.alpha
    adjust = parts.adjust if scale == 1.0 else Const(scale) if parts.adjust == ONE else mul(parts.adjust, Const(scale))
    if product.bias is not None:
        raise Unrecognised("a bias is added to the product with the values")
    if not any(all(pair_axes(dot)) or _single(space) for dot in dots_of(parts.score)):
        raise Unrecognised(
            "the scores are not a product of queries and keys that can be followed",
            why=f"between the product and the softmax stands {obstacle(reader, parts.score)}",
        )
    draft = Attention(
        axes=Axes(ONE, ONE, size_expr(space.extents[Q_IDX]), size_expr(extent[roles.key])),
        tensors=(),
        score=parts.score,
        keep=Keep(),
        weigh=Softmax(parts.extra),
        adjust=adjust,
        sum=value,
        origin=Origin(source_line(node)),
    )
    if parts.nan_to_zero:
        draft = replace(draft, keep=Keep(draft.keep.predicate, Empty.ZERO))
    batch = [(at[c], extent[c]) for c in roles.batch]
    draft = name_batch_axes(draft, batch)
    letters = roles.batch + roles.query + roles.channel
    site = finish(reader, node, draft, trained)
    if site.program.keep.empty is Empty.SCORE and not parts.stable:
        raise Unrecognised(
            "a finite mask under an exponential without a row maximum",
            why="a row that keeps no key then gives neither a mean nor zero",
            do="subtract the row maximum, or use torch.softmax",
        )
    out = [c for c in product.out_letters]
    return replace(
        site,
        split=tuple(extent[c] for c in letters),
        permutation=tuple(letters.index(c) for c in out),
        softmax_nodes=frozenset(normalisers_behind(weights_node)),
        lse=None
        if parts.extra
        else _logsumexp_beside(node, weights_node, [at[c] for c in roles.batch + roles.query], weights_index),
    )


def _logsumexp_beside(output: Node, weights: Node, rows: list[Expr], index: tuple[Expr, ...]) -> Node | None:
    """A logsumexp of the very scores that the softmax behind `weights` normalises, where its rows are those of the product."""
    softmaxes = [n for n in normalisers_behind(weights) if base_name(n.target) in NORMALISERS]
    if len(softmaxes) != 1 or KV not in index or [i for i in index if i != KV] != rows:
        return None
    scores, dim = softmaxes[0].args[:2]
    if not isinstance(scores, Node) or softmaxes[0].meta["val"].shape != weights.meta["val"].shape:
        return None
    for user in scores.users:
        if base_name(user.target) == "logsumexp" and list(user.args[1]) in ([dim], [index.index(KV)]) and user.users:  # type: ignore[arg-type]
            return user if output < min(user.users) else None
    return None


def _single(space: IndexSpace) -> bool:
    """One query or one key: its axis is the constant 0, so that a dot product does not show it."""
    return same(space.extents[Q_IDX], 1) or same(space.extents[KV], 1)


def obstacle(reader: Reader, score: Expr) -> str:
    """The operator that hides the product from the softmax, in the user's words."""
    for read in reads_of(score):
        node = reader.leaves[read.tensor].node
        if {"q_idx", "kv_idx"} & axes_of(read):
            if node.op == "placeholder":
                return "a graph break: the scores come from another graph"
            line = source_line(node)
            return f"{base_name(node.target) or node.name}{f' at {line}' if line else ''}"
    return "nothing that depends on both"

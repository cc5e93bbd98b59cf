"""ATen around two contractions -> an attention program, or a reason.

For each product whose one side holds normalised scores, the element of that side is read back to dot products (`reader.py`), its
normaliser is found (`normaliser.py`), and the axes of the product become b, h, q_idx and kv_idx. By meaning: no template of a
graph is compared with anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.fx import GraphModule, Node

from attncompiler.errors import AttnCompilerError, Unrecognised
from attncompiler.ir.expr import (
    ONE,
    TRUE,
    ZERO,
    Apply,
    Axis,
    B,
    Const,
    Dot,
    Expr,
    H,
    Q_IDX,
    Read,
    Uniform,
    add,
    apply,
    axes_of,
    conj,
    dots_of,
    floordiv,
    mod,
    mul,
    reads_of,
    substitute,
    transform,
)
from attncompiler.ir.program import Attention, Axes, Dtype, Empty, Keep, Origin, Softmax, TensorDecl, pair_axes
from attncompiler.ir.verify import verify
from attncompiler.passes.contraction import Contraction, contraction_of
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.lift_mask import lift_mask
from attncompiler.passes.normalise import source_line
from attncompiler.passes.normaliser import normalised
from attncompiler.passes.reader import CHANNEL, KV, Operand, Reader, dtype_of, is_tensor, shape_of
from attncompiler.passes.sizes import Extent, IndexSpace, same, size_expr

aten = torch.ops.aten
DTYPES: Mapping[torch.dtype, Dtype] = {
    torch.float64: Dtype.F64, torch.float32: Dtype.F32, torch.bfloat16: Dtype.BF16, torch.float16: Dtype.F16,
    torch.bool: Dtype.BOOL, torch.uint8: Dtype.U8, torch.int8: Dtype.I8, torch.int16: Dtype.I16, torch.int32: Dtype.I32,
    torch.int64: Dtype.I64,
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One attention of the graph: `output` is replaced by the program's O, viewed as `out_shape` after `permutation`.

    O [b, h, q_idx, Dv] is first viewed as the sizes of `split` (one entry for each letter of the product's output), then permuted."""

    output: Node
    program: Attention
    operands: tuple[Operand, ...]
    sizes: Mapping[str, Extent]
    split: tuple[Extent, ...]
    permutation: tuple[int, ...]
    softmax_nodes: frozenset[Node] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Refusal:
    """A product of normalised scores that was not taken, and why."""

    output: Node
    error: AttnCompilerError
    softmax_nodes: frozenset[Node]


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


def recognise(module: GraphModule, trained: frozenset[Node]) -> tuple[list[Site], list[Refusal]]:
    """Needs: a captured graph. Ensures: every attention is in one of the two lists. Changes nothing."""
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for node in module.graph.nodes:
        if node.op != "call_function" or not is_tensor(node):
            continue
        if node.target is aten.scaled_dot_product_attention.default:
            product: Contraction | None = None
        else:
            product = contraction_of(node)
            if product is None or not any(normalisers_behind(side) for side in (product.left, product.right)):
                continue
        try:
            sites.append(_sdpa(module, node, trained) if product is None else _product(module, node, product, trained))
        except AttnCompilerError as error:
            behind = set() if product is None else normalisers_behind(product.left) | normalisers_behind(product.right)
            refusals.append(Refusal(node, error, frozenset(behind)))
    taken = {softmax for site in sites for softmax in site.softmax_nodes}
    return sites, [r for r in refusals if not r.softmax_nodes or not r.softmax_nodes <= taken]


# Operators that a search for a normaliser does not cross: behind them stands another layer's attention.
_BARRIERS = frozenset({
    "linear", "addmm", "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "convolution", "conv1d", "conv2d", "conv3d",
    "batch_norm", "embedding", "scaled_dot_product_attention", "topk", "sort", "gather", "index", "argmax", "cumsum", "gelu", "silu",
})  # fmt: skip
NORMALISERS = frozenset({"softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"})


def normalisers_behind(node: Node) -> set[Node]:
    """Normalisers that reach `node` through elementwise operators and views alone."""
    found: set[Node] = set()
    seen: set[Node] = set()
    stack = [node]
    while stack and len(seen) < 400:
        current = stack.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        name = base_name(current.target)
        if name in NORMALISERS:
            found.add(current)
        elif name == "exp":
            found.add(current)
        elif name not in _BARRIERS and contraction_of(current) is None:
            stack.extend(current.all_input_nodes)
    return found


# --------------------------------------------------------------------------------------- a product of weights and values


@dataclass(frozen=True)
class _Letters:
    """The role of every letter of a product: weights [batch, q, kv] times values [batch, kv, channel]."""

    batch: str
    query: str  # "" when the product has no query axis
    key: str
    channel: str


def _product(module: GraphModule, node: Node, product: Contraction, trained: frozenset[Node]) -> Site:
    first = Unrecognised("no side of the product is a softmax")
    for weights, value in (("left", "right"), ("right", "left")):
        weights_node: Node = getattr(product, weights)
        if not normalisers_behind(weights_node):
            continue
        try:
            return _oriented(module, node, product, weights, value, trained)
        except Unrecognised as error:
            first = error
    raise first


def _roles(product: Contraction, weights_letters: str, value_letters: str) -> _Letters:
    if len(product.summed) != 1:
        raise Unrecognised("the product sums over more than one axis", do="reshape the summed axes into one")
    key = product.summed
    channels = [c for c in value_letters if c in product.out_letters and c not in weights_letters]
    rows = [c for c in weights_letters if c in product.out_letters and c not in value_letters]
    if key not in weights_letters or key not in value_letters or len(channels) != 1:
        raise Unrecognised("the values have no single channel axis", do="write the values as [..., keys, channels]")
    query = rows[-1] if rows else ""
    return _Letters("".join(c for c in product.out_letters if c not in (query, channels[0])), query, key, channels[0])


def _oriented(
    module: GraphModule, node: Node, product: Contraction, weights_side: str, value_side: str, trained: frozenset[Node]
) -> Site:
    weights_node: Node = getattr(product, weights_side)
    value_node: Node = getattr(product, value_side)
    weights_letters: str = getattr(product, f"{weights_side}_letters")
    value_letters: str = getattr(product, f"{value_side}_letters")
    roles = _roles(product, weights_letters, value_letters)
    space = IndexSpace()
    reader = Reader(module, space, trained)
    extent = {c: Reader.extent_of(product, c) for c in dict.fromkeys(product.left_letters + product.right_letters)}
    at: dict[str, Expr] = {c: space.axis(f"batch{i}", extent[c]) for i, c in enumerate(roles.batch)}
    space.extents[KV], space.extents[Q_IDX] = extent[roles.key], extent[roles.query] if roles.query else 1
    at[roles.key], at[roles.channel] = KV, CHANNEL
    if roles.query:
        at[roles.query] = Q_IDX if not same(extent[roles.query], 1) else ZERO

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
            why=f"between the product and the softmax stands {_obstacle(reader, parts.score)}",
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
    draft = _name_batch_axes(draft, batch)
    letters = roles.batch + roles.query + roles.channel
    site = _finish(reader, node, draft, trained)
    out = [c for c in product.out_letters]
    return replace(
        site,
        split=tuple(extent[c] for c in letters),
        permutation=tuple(letters.index(c) for c in out),
        softmax_nodes=frozenset(normalisers_behind(weights_node)),
    )


def _single(space: IndexSpace) -> bool:
    """One query or one key: its axis is the constant 0, so that a dot product does not show it."""
    return same(space.extents[Q_IDX], 1) or same(space.extents[KV], 1)


def _obstacle(reader: Reader, score: Expr) -> str:
    """The operator that hides the product from the softmax, in the user's words."""
    for read in reads_of(score):
        node = reader.leaves[read.tensor].node
        if {"q_idx", "kv_idx"} & axes_of(read):
            line = source_line(node)
            return f"{base_name(node.target) or node.name}{f' at {line}' if line else ''}"
    return "nothing that depends on both"


# ------------------------------------------------------------------------------------------------- axes and names


def _rewrite(program: Attention, change: Mapping[Expr, Expr]) -> Attention:
    """Substitute axes in every clause."""

    def go(expr: Expr) -> Expr:
        return substitute(expr, change)

    value = go(program.sum)
    assert isinstance(value, Read)
    return replace(
        program,
        score=go(program.score),
        keep=replace(program.keep, predicate=go(program.keep.predicate)),
        weigh=Softmax(tuple(go(e) for e in program.weigh.extra)),
        adjust=go(program.adjust),
        sum=value,
    )


def _name_batch_axes(program: Attention, batch: list[tuple[Expr, Extent]]) -> Attention:
    """The batch axes of the product become b and h: the last one is h, all others b; a lone one is split where every use splits it."""
    live = [(axis, extent) for axis, extent in batch if isinstance(axis, Axis)]
    if len(live) == 1:
        axis, extent = live[0]
        divisor = _common_divisor(program, axis)
        if divisor is not None:
            program = _rewrite(program, {floordiv(axis, divisor): B, mod(axis, divisor): H})
            return replace(program, axes=replace(program.axes, b=floordiv(size_expr(extent), divisor), h=divisor))
        return replace(_rewrite(program, {axis: B}), axes=replace(program.axes, b=size_expr(extent)))
    if not live:
        return program
    grouped = _group_size(program, [axis for axis, _ in live])
    outer, inner = live[: len(live) - grouped], live[len(live) - grouped :]
    change: dict[Expr, Expr] = {}
    sizes = []
    for name, part in ((B, outer), (H, inner)):
        total: Expr = ONE
        rest: Expr = name
        for axis, extent in reversed(part[1:]):
            size = size_expr(extent)
            change[axis] = mod(rest, size)
            rest = floordiv(rest, size)
            total = mul(total, size)
        change[part[0][0]] = rest
        sizes.append(mul(total, size_expr(part[0][1])))
    return replace(_rewrite(program, change), axes=replace(program.axes, b=sizes[0], h=sizes[1]))


def _group_size(program: Attention, axes: list[Axis]) -> int:
    """How many of the last batch axes make up h: two when the value does not vary with the last (a group of query heads)."""
    if len(axes) >= 3 and axes[-1].name not in axes_of(program.sum):
        return 2
    return 1


def _common_divisor(program: Attention, axis: Axis) -> Expr | None:
    """c, if `axis` occurs only as axis // c and axis % c for one c."""
    divisors: set[Expr] = set()
    plain = False

    def visit(expr: Expr) -> Expr | None:
        nonlocal plain
        if isinstance(expr, Apply) and expr.op in ("floordiv", "mod") and expr.args[0] == axis:
            divisors.add(expr.args[1])
            return expr
        plain = plain or expr == axis
        return None

    for root in program.expressions:
        transform(root, visit)
    return next(iter(divisors)) if len(divisors) == 1 and not plain else None


def _finish(reader: Reader, node: Node, draft: Attention, trained: frozenset[Node]) -> Site:
    """Name the operands, declare them, lift the masks and verify."""
    names = _operand_names(draft, reader)
    renamed = _rename(draft, names)
    operands, decls = [], []
    for old, new in names.items():
        operand = reader.leaves[old]
        shape = list(shape_of(operand.node)) if not operand.is_seed else [1]
        if operand.channel_place is not None:
            shape.append(shape.pop(operand.channel_place))
        dtype = torch.int64 if operand.is_seed else operand.dtype or dtype_of(operand.node)
        if dtype not in DTYPES:
            raise Unrecognised(f"an operand of dtype {dtype}")
        decls.append(TensorDecl(new, DTYPES[dtype], tuple(size_expr(s) for s in shape)))
        operands.append(operand)
    program = replace(renamed, tensors=tuple(decls))
    carrying = frozenset(names[old] for old in names if reader.leaves[old].node in trained)
    program = verify(_prune(lift_mask(program, carrying)))
    kept = {decl.name for decl in program.tensors}
    operands = [operand for operand, decl in zip(operands, decls, strict=True) if decl.name in kept]
    sizes = _size_values(node.graph, program)
    return Site(node, program, tuple(operands), sizes, (), ())


def _prune(program: Attention) -> Attention:
    used = {read.tensor for root in program.expressions for read in reads_of(root)}
    return replace(program, tensors=tuple(decl for decl in program.tensors if decl.name in used))


def _operand_names(draft: Attention, reader: Reader) -> dict[str, str]:
    """q, k, v for the main product and the values; mask, bias, seed or table for the rest, numbered when there are several."""
    names: dict[str, str] = {}
    taken: set[str] = set()

    def give(old: str, wish: str) -> None:
        if old not in names:
            new, count = wish, 1
            while new in taken:
                count += 1
                new = f"{wish}{count}"
            names[old] = new
            taken.add(new)

    for dot in dots_of(draft.score):
        give(dot.left.tensor, "q")
        give(dot.right.tensor, "k")
    give(draft.sum.tensor, "v")
    for root in draft.expressions:
        for read in reads_of(root):
            if reader.leaves[read.tensor].is_seed:
                give(read.tensor, "seed")
            elif read.tensor not in names:
                boolean = dtype_of(reader.leaves[read.tensor].node) is torch.bool
                give(read.tensor, "mask" if boolean else "bias" if {"q_idx", "kv_idx"} & axes_of(read) else "param")
    return names


def _rename(program: Attention, names: Mapping[str, str]) -> Attention:
    def visit(expr: Expr) -> Expr | None:
        if isinstance(expr, Read):
            return Read(names[expr.tensor], tuple(transform(i, visit) for i in expr.index))
        return None

    def go(expr: Expr) -> Expr:
        return transform(expr, visit)

    value = go(program.sum)
    assert isinstance(value, Read)
    return replace(
        program,
        score=go(program.score),
        keep=replace(program.keep, predicate=go(program.keep.predicate)),
        weigh=Softmax(tuple(go(e) for e in program.weigh.extra)),
        adjust=go(program.adjust),
        sum=value,
    )


def _size_values(graph: torch.fx.Graph, program: Attention) -> dict[str, Extent]:
    """The graph's own symbols for the run-time integers of a program."""
    wanted = set(program.sizes)
    found: dict[str, Extent] = {}
    for extent in _extents(graph):
        if not isinstance(extent, int) and str(extent.node.expr) in wanted:
            found.setdefault(str(extent.node.expr), extent)
    missing = wanted - found.keys()
    if missing:
        raise Unrecognised(f"the size {sorted(missing)[0]} is not available where the attention runs")
    return found


def _extents(graph: torch.fx.Graph) -> Iterator[Extent]:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            yield value
        elif isinstance(value, torch.Tensor):
            yield from value.shape


# -------------------------------------------------------------------------------------------------------------- SDPA


def _sdpa(module: GraphModule, node: Node, trained: frozenset[Node]) -> Site:
    """scaled_dot_product_attention with every argument. An empty row gives 0; `is_causal` counts from the first key."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = given["query"], given["key"], given["value"]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    space = IndexSpace()
    reader = Reader(module, space, trained)
    out_shape = shape_of(node)
    letters = "abcdefgh"[: len(out_shape) - 2]
    at: dict[str, Expr] = {c: space.axis(f"batch{i}", out_shape[i]) for i, c in enumerate(letters)}
    space.extents[Q_IDX], space.extents[KV] = shape_of(query)[-2], shape_of(key)[-2]
    q_idx: Expr = Q_IDX if not same(shape_of(query)[-2], 1) else ZERO
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
    dot: Expr = Dot(side(query, at, "query", q_idx), side(key, kv_at, "key", KV))
    scale = given.get("scale")
    head_size = shape_of(query)[-1]
    if scale is None and not isinstance(head_size, int):
        raise Unrecognised("the head size is not known when compiling", do="mark it static")
    factor = float(scale) if scale is not None else head_size**-0.5  # type: ignore[arg-type, operator]
    score = mul(dot, Const(factor * scales[0] * scales[1]))
    read = side(value, kv_at, "value", KV)
    keep: Expr = TRUE
    if given.get("is_causal", False):
        keep = apply("le", KV, q_idx)
    mask = given.get("attn_mask")
    if isinstance(mask, Node):
        element = reader.element(mask, reader.broadcast(mask, out_shape[:-1] + (shape_of(key)[-2],), (*at.values(), q_idx, KV)))
        if dtype_of(mask) is torch.bool:
            keep = conj(keep, element)
        else:
            score = add(score, element)
            keep = conj(keep, apply("ne", element, Const(-math.inf))) if mask not in trained else keep
    adjust: Expr = ONE if scales[2] == 1.0 else Const(scales[2])
    p = given.get("dropout_p", 0.0)
    if isinstance(p, int | float) and p > 0:
        seed = f"seed_{node.name}"
        reader.leaves[seed] = Operand(node, is_seed=True)
        kept = apply("ge", Uniform(Read(seed, (ZERO,))), Const(float(p)))
        adjust = mul(adjust, apply("where", kept, Const(1.0 / (1.0 - p)), Const(0.0)))
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
    draft = _name_batch_axes(draft, [(at[c], out_shape[i]) for i, c in enumerate(letters)])
    return replace(_finish(reader, node, draft, trained), split=out_shape, permutation=tuple(range(len(out_shape))))

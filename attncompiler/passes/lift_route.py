"""An attention's output times a gate that is 0 by construction where a head is off -> the clause `route`.

o.transpose(1, 2) * gates[..., None]        gates: zeros.scatter(-1, chosen, 1.0), times what they weigh
torch.where(on[..., None], o, 0)            or o.masked_fill(off, 0): no number is multiplied
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from attncompiler.ir.evaluate import integer
from attncompiler.ir.expr import ONE, Q_IDX, ZERO, Axis, B, Expr, H, Read
from attncompiler.ir.program import Route, TensorDecl
from attncompiler.ir.verify import verify
from attncompiler.passes.active_share import active_share
from attncompiler.passes.activity import Builder, activity, is_zero, spread_einsum
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.memory import memory_root, writes
from attncompiler.passes.nodes import DTYPES, PERMUTES, Operand, dtype_of, shape_of
from attncompiler.passes.site import Site, size_values
from attncompiler.passes.sizes import same, size_expr

_LETTERS: tuple[Axis, ...] = (B, H, Q_IDX)
_CHANNEL = 3  # the dimension of O [b, h, q_idx, Dv] after those
# Keys from which leaving rows out saves more than taking rows together costs, on a GPU and elsewhere.
_FEWEST_KEYS = {"cuda": 1024, "cpu": 128}


@dataclass(frozen=True)
class _Gated:
    """`node` is O times `gate`, or O where the bool `gate` is `on`, else 0; all have O's dimensions, in the order `order` of
    [b, h, q_idx, channel]."""

    node: Node
    gate: Node
    order: tuple[int, ...]
    on: bool | None = None  # None for a gate that multiplies


def lift_route(graph: Graph, site: Site) -> Site:
    """Needs: a site of this graph. Ensures: the same, with the multiplication by its gate if that switches heads. Adds nodes that
    only the route reads. Keeps: values and gradients, if what is not computed would have been finite."""
    if not _in_order(site) or site.lse is not None or site.unkept or _is_short(site):
        return site
    gated = _gated(graph, site)
    if gated is None or gated.node.meta["val"].dtype != site.output.meta["val"].dtype:
        return site
    build = Builder(graph, gated.node)
    active = activity(gated.gate, build) if gated.on is None else _switched(gated, build)
    if active is None or _changes_in_place(graph, gated):
        return site
    program, operands = site.program, list(site.operands)
    decls, reads = list(program.tensors), []
    for wish, node in (*((("gate", gated.gate),) if gated.on is None else ()), ("active", active)):
        shown, index = _element(node, gated.order, build)
        taken = {decl.name for decl in decls}
        name = next(n for i in range(1, len(taken) + 2) if (n := wish if i == 1 else f"{wish}{i}") not in taken)
        decls.append(TensorDecl(name, DTYPES[dtype_of(shown)], tuple(size_expr(size) for size in shape_of(shown))))
        operands.append(Operand(shown))
        reads.append(Read(name, index))
    gain = reads[0] if gated.on is None else ONE
    routed = verify(replace(program, tensors=tuple(decls), route=Route(active=reads[-1], gain=gain)))
    return replace(
        site,
        output=gated.node,
        program=routed,
        operands=tuple(operands),
        permutation=gated.order,
        active_share=active_share(active),
        sizes=size_values(graph, routed.sizes),
    )


def _switched(gated: _Gated, build: Builder) -> Node | None:
    """Where O is kept, if that differs from head to head or is known to be rare: most queries that are not padding are on, and taking
    them together would cost more than it saves."""
    active = gated.gate if gated.on else build(torch.ops.aten.logical_not.default, gated.gate)
    shape = shape_of(active)
    of_heads = gated.order.index(1) - (4 - len(shape))
    differs = of_heads >= 0 and not same(shape[of_heads], 1)
    return active if differs or active_share(active) < 1 else None


def _in_order(site: Site) -> bool:
    """True where the output's letters are b, h, q_idx and the channel."""
    sizes = [site.program.axes.size(axis) for axis in _LETTERS]
    return len(site.split) == 4 and [size_expr(size) for size in site.split[:3]] == sizes


def _is_short(site: Site) -> bool:
    """True for so few keys that rows are better computed than sorted out."""
    hints = {name: size if isinstance(size, int) else int(size.node.hint) for name, size in site.sizes.items()}
    device = site.output.meta["val"].device.type
    return integer(site.program.axes.kv_idx, hints) < _FEWEST_KEYS.get(device, _FEWEST_KEYS["cpu"])


def _changes_in_place(graph: Graph, gated: _Gated) -> bool:
    """True where something that the gate may be made of is written to before it is used: what is 0 then is not known from here."""
    made: set[Node] = set()
    stack = [gated.gate]
    while stack:
        node = stack.pop()
        if node not in made:
            made.add(node)
            stack.extend(node.all_input_nodes)
    roots = {memory_root(node) for node in made}
    written = (node.args[0] for node in graph.nodes if node < gated.node and writes(node))
    return any(isinstance(target, Node) and memory_root(target) in roots for target in written)


def _gated(graph: Graph, site: Site) -> _Gated | None:
    """The multiplication that O goes into, through permutations alone, and into nothing else."""
    node, order = site.output, site.permutation
    while len(readers := [user for user in node.users if not _is_idle(user)]) == 1:
        (user,) = readers
        name = base_name(user.target)
        if name in PERMUTES and user.args[0] is node and user.meta["val"].dim() == 4:
            moved = user.target(torch.empty(2, 3, 5, 7), *user.args[1:], **user.kwargs)  # type: ignore[operator]
            order = tuple(order[(2, 3, 5, 7).index(size)] for size in moved.shape)
        elif name in ("mul", "einsum"):
            return _product(graph, node, user, order)
        elif name in ("where", "masked_fill"):
            return _choice(node, user, order)
        elif name not in ("contiguous", "clone", "alias", "to") or user.meta["val"].dtype != node.meta["val"].dtype:
            return None
        node = user
    return None


def _is_idle(user: Node) -> bool:
    """True for what does not use numbers: what nothing reads, zeros of a shape that are chosen, and views for these."""
    if user.op == "output" or writes(user):
        return False
    if is_zero(user):
        return all(base_name(reader.target) in ("where", "masked_fill") for reader in user.users)
    return (base_name(user.target) in PERMUTES or not user.users) and all(map(_is_idle, user.users))


def _product(graph: Graph, o: Node, user: Node, order: tuple[int, ...]) -> _Gated | None:
    if base_name(user.target) == "mul":
        sides = list(user.args[:2])
        if sides.count(o) != 1:
            return None
        gate = sides[1 - sides.index(o)]
        if not isinstance(gate, Node) or user.meta["val"].dim() != 4:
            return None
        return _Gated(user, gate, order) if _broadcasts(gate, user, o, order) else None
    operands = user.args[1]
    assert isinstance(operands, list | tuple)
    spread = spread_einsum(user, Builder(graph, user))
    if spread is None or list(operands).count(o) != 1:
        return None
    mine = list(operands).index(o)
    letters = str(user.args[0]).replace(" ", "").partition("->")
    inputs = letters[0].split(",")
    order = tuple(order[inputs[mine].index(letter)] for letter in letters[2])
    gate = spread[1 - mine]
    return _Gated(user, gate, order) if _broadcasts(gate, user, user, order) else None


def _choice(o: Node, user: Node, order: tuple[int, ...]) -> _Gated | None:
    """O where a condition holds, or does not, and else 0."""
    if base_name(user.target) == "where":
        condition, yes, no = user.args[:3]
        on = yes is o
        other = no if on else yes
    else:
        (mine, condition, other), on = user.args[:3], False
        if mine is not o:
            return None
    if not is_zero(other) or not isinstance(condition, Node) or condition is o or dtype_of(condition) is not torch.bool:
        return None
    return _Gated(user, condition, order, on) if _broadcasts(condition, user, o, order) else None


def _broadcasts(gate: Node, user: Node, o: Node, order: tuple[int, ...]) -> bool:
    """True for a gate that has one number for all channels, and widens nothing."""
    shape = shape_of(gate)
    channel = order.index(_CHANNEL) - (4 - len(shape))
    if channel >= 0 and not same(shape[channel], 1):
        return False
    return all(same(a, b) for a, b in zip(shape_of(user), shape_of(o), strict=True))


def _element(node: Node, order: tuple[int, ...], build: Builder) -> tuple[Node, tuple[Expr, ...]]:
    """A gate without its channel, as a view [b or 1, h or 1, q_idx or 1], and how it is read over b, h and q_idx."""
    dims = list(order[4 - len(shape_of(node)) :])
    if _CHANNEL in dims:
        node = build(torch.ops.aten.select.int, node, dims.index(_CHANNEL), 0)
        dims.remove(_CHANNEL)
    if dims != sorted(dims):
        node = build(torch.ops.aten.permute.default, node, [dims.index(dim) for dim in sorted(dims)])
    for letter in range(len(_LETTERS)):
        if letter not in dims:
            node = build(torch.ops.aten.unsqueeze.default, node, letter)
    return node, tuple(ZERO if same(size, 1) else axis for axis, size in zip(_LETTERS, shape_of(node), strict=True))

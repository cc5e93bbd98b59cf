"""Replace recognised attentions in the graph by the registered op."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node

from attncompiler.errors import Unrecognised
from attncompiler.ir.program import Attention
from attncompiler.ir.text import to_line
from attncompiler.passes.elementwise import base_name
from attncompiler.passes.memory import inherit_line, memory_root, writes
from attncompiler.passes.nodes import PERMUTES, Operand
from attncompiler.passes.site import Site
from attncompiler.passes.state_site import StateSite
from attncompiler.passes.unkept_rows import UNKEPT

aten = torch.ops.aten
AnySite = Site | StateSite


def rewrite(module: GraphModule, sites: Sequence[AnySite]) -> list[tuple[AnySite, str]]:
    """Needs: sites of this graph. Ensures: each taken site's product is the op, and what only it used is gone.

    Returns: the sites that were left, with the reason: their weights or scores are read by other code too, or an operand changes in
    place in between."""
    left: list[tuple[AnySite, str]] = [(site, reason) for site in sites if (reason := _changed_in_place(module.graph, site))]
    dropped = {id(site) for site, _ in left}
    wanted = [site for site in sites if id(site) not in dropped]
    while True:  # leaving one site can keep the weights of another alive
        alive = _alive_without(module.graph, {site.output for site in wanted}, wanted)
        kept = [site for site in wanted if not (site.softmax_nodes & alive)]
        if len(kept) == len(wanted):
            break
        left += [(site, _WEIGHTS_READ if isinstance(site, Site) else _SCORES_READ) for site in wanted if site.softmax_nodes & alive]
        wanted = kept
    replaced: dict[Node, Node] = {}
    for site in sorted(wanted, key=lambda site: site.output):
        replaced[site.output] = _replace(module.graph, site, replaced)
    _drop_dead_code(module.graph)
    module.graph.lint()
    module.recompile()
    return left


_WEIGHTS_READ = "the attention weights are read by other code, so they are materialised anyway"
_SCORES_READ = "the scores of a linear attention are read by other code, so they are materialised anyway"


def _changed_in_place(graph: Graph, site: AnySite) -> str:
    """A reason, if an operand's memory is written between where it is first read and the op; "" if not."""
    read = [node for operand in site.operands for node in (operand.nodes or (operand.node,))]
    roots = {memory_root(node) for node in read}
    first = min((user for node in read for user in node.users), default=site.output)
    for node in graph.nodes:
        if first < node < site.output and writes(node):
            target = node.args[0]
            if isinstance(target, Node) and memory_root(target) in roots:
                return f"an operand is changed in place by {base_name(node.target)} before it is used"
    return ""


def _alive_without(graph: Graph, outputs: set[Node], sites: Sequence[AnySite]) -> set[Node]:
    """Nodes still needed once the products in `outputs` take their operands directly."""
    operands = {site.output: [node for operand in site.operands for node in operand.nodes] for site in sites}
    alive: set[Node] = set()
    stack = [n for n in graph.nodes if n.op == "output" or (n.op == "call_function" and _has_effect(n))]
    while stack:
        node = stack.pop()
        if node in alive:
            continue
        alive.add(node)
        stack.extend(operands[node] if node in outputs else node.all_input_nodes)
    return alive


def _has_effect(node: Node) -> bool:
    return writes(node) or (not isinstance(node.target, torch._ops.OpOverload) and node.is_impure())


def _drop_dead_code(graph: Graph) -> None:
    def needed(node: Node) -> bool:
        return node.op in ("placeholder", "output") or _has_effect(node)

    graph.eliminate_dead_code(is_impure_node=needed)


# ------------------------------------------------------------------------------------------------- building the op


def _replace(graph: Graph, site: AnySite, replaced: Mapping[Node, Node]) -> Node:
    """What stands for the site's product. `replaced`: what stands for those before it, whose results it may read."""
    node = site.output
    with graph.inserting_before(node):
        calls: dict[tuple[str, tuple[object, ...]], Node] = {}
        operands = [_operand(graph, operand, replaced, calls) for operand in site.operands]
        # where the next operator wants queries first, as a projection does, O lies so; else as the product that it stands for
        turned = all(base_name(user.target) in PERMUTES for user in node.users)
        heads_first = not turned and site.permutation == tuple(range(len(site.permutation)))
        if isinstance(site, StateSite):
            sizes = [_symbolic(graph, node, name) for name in site.program.sizes]
            result = graph.call_function(torch.ops.attncompiler.state.default, (operands, sizes, site.line))
            inherit_line(result, node)
            o = lse = graph.call_function(operator.getitem, (result, 0))
        else:
            o, lse = _softmax(graph, site, operands, heads_first, replaced, calls)
        split = [_extent(graph, node, extent) for extent in site.split]
        o = graph.call_function(aten.reshape.default, (o, split))
        if site.permutation != tuple(range(len(site.permutation))):
            o = graph.call_function(aten.permute.default, (o, list(site.permutation)))
        if isinstance(site, Site) and site.lse is not None:
            site.lse.replace_all_uses_with(_lse(graph, site, site.lse, lse))
        if not turned:
            o = graph.call_function(aten.contiguous.default, (o,))  # as the product was: a view of it must stay a view
    inherit_line(o, node)
    o.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(o)
    graph.erase_node(node)
    return o


def _softmax(
    graph: Graph, site: Site, operands: list[Node], heads_first: bool, replaced: Mapping[Node, Node],
    calls: dict[tuple[str, tuple[object, ...]], Node],
) -> tuple[Node, Node]:  # fmt: skip
    """O and lse of a softmax attention; queries that keep no key are another one, of all keys."""
    node = site.output
    o, lse = _attention(graph, node, site.program, operands, heads_first)
    for rows in site.unkept:
        unkept = graph.call_function(aten.eq.Scalar, (lse, -math.inf))
        given = {name: _operand(graph, operand, replaced, calls) for name, operand in rows.operands.items()} | {UNKEPT: unkept}
        rest, rest_lse = _attention(graph, node, rows.program, [given[d.name] for d in rows.program.tensors], heads_first)
        o = graph.call_function(aten.where.self, (graph.call_function(aten.unsqueeze.default, (unkept, -1)), rest, o))
        lse = graph.call_function(aten.where.self, (unkept, rest_lse, lse))
    return o, lse


def _attention(graph: Graph, before: Node, program: Attention, operands: list[Node], heads_first: bool) -> tuple[Node, Node]:
    """O and lse of a program."""
    sizes = [_symbolic(graph, before, name) for name in program.sizes]
    result = graph.call_function(torch.ops.attncompiler.attention.default, (operands, sizes, to_line(program), heads_first))
    inherit_line(result, before)
    return graph.call_function(operator.getitem, (result, 0)), graph.call_function(operator.getitem, (result, 1))


def _lse(graph: Graph, site: Site, node: Node, lse: Node) -> Node:
    """The op's second result in the unit, shape and dtype of the node that it stands for."""
    value = node.meta["val"]
    if site.lse_unit != 1.0:
        lse = graph.call_function(aten.div.Tensor, (lse, site.lse_unit))
    lse = graph.call_function(aten.reshape.default, (lse, [_extent(graph, site.output, size) for size in value.shape]))
    return graph.call_function(aten.to.dtype, (lse, value.dtype))


def _operand(
    graph: Graph, operand: Operand, replaced: Mapping[Node, Node], calls: dict[tuple[str, tuple[object, ...]], Node]
) -> Node:
    """An operand of a program, made of nodes as they are now. `calls`: what ops of ours were called for other operands."""
    node = replaced.get(operand.node, operand.node)
    made = operand.made
    if made is not None:
        arguments = tuple(replaced.get(a, a) if isinstance(a, Node) else a for a in made.arguments)
        key = made.name, arguments
        if key not in calls:
            calls[key] = graph.call_function(made.op, arguments)
        return graph.call_function(operator.getitem, (calls[key], made.result)) if made.has_several else calls[key]
    if operand.is_seed:
        device = node.meta["val"].device
        return graph.call_function(
            aten.randint.low, (-(2**62), 2**62, [1]), {"dtype": torch.int64, "device": device, "pin_memory": False}
        )
    if operand.table is not None:
        return _table(graph, operand.table.to(node.meta["val"].device))
    if operand.channel_place is not None:
        order = [d for d in range(node.meta["val"].dim()) if d != operand.channel_place] + [operand.channel_place]
        node = graph.call_function(aten.permute.default, (node, order))
    if operand.dtype is not None:
        node = graph.call_function(aten.to.dtype, (node, operand.dtype))
    return node


def _table(graph: Graph, table: torch.Tensor) -> Node:
    """A tensor as a buffer of the graph's module."""
    module = graph.owning_module
    assert module is not None
    name = next(name for i in itertools.count() if not hasattr(module, name := f"attention_table{i}"))
    module.register_buffer(name, table, persistent=False)
    found = graph.get_attr(name)
    found.meta["val"] = table
    return found


def _extent(graph: Graph, before: Node, extent: int | torch.SymInt) -> int | Node:
    if isinstance(extent, int):
        return extent
    return _symbolic(graph, before, str(extent.node.expr))


def _symbolic(graph: Graph, before: Node, text: str) -> Node:
    """A node of the graph whose value is the symbolic size that prints as `text`."""

    def matches(value: object) -> bool:
        return isinstance(value, torch.SymInt) and str(value.node.expr) == text

    for node in graph.nodes:
        if node is before:
            break
        value = node.meta.get("val")
        if matches(value):
            return cast(Node, node)
        if isinstance(value, torch.Tensor) and node.op != "output":
            for dim, size in enumerate(value.shape):
                if matches(size):
                    return graph.call_function(aten.sym_size.int, (node, dim))
    raise Unrecognised(f"the size {text} is not available where the attention runs")

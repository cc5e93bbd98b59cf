"""Who shares memory with whom in a traced graph, and in-place operators made out of place where nobody can tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
_MAY_VIEW = frozenset({"reshape", "contiguous", "to", "flatten", "expand_as", "view_as", "type_as"})


def writes(node: Node) -> bool:
    """True for an operator that changes its first operand."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_view(node: Node) -> bool:
    """True where the result may share memory with an operand, or where nothing is known."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return True
    if node.target._schema.name.split("::")[1] in _MAY_VIEW:
        return True
    return any(result.alias_info is not None for result in node.target._schema.returns)


def inherit_line(new: Node, old: Node) -> None:
    """Give a new node the user's line of the one that it stands for; code without a file, as at a prompt, has none."""
    if old.meta.get("stack_trace"):
        new.meta["stack_trace"] = old.meta["stack_trace"]


def memory_root(node: Node) -> Node:
    """The tensor whose memory `node` may show."""
    while node.op == "call_function" and is_view(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def written_roots(graph: Graph) -> frozenset[Node]:
    """The tensors of a graph whose memory is changed after they are made."""
    return frozenset(
        memory_root(node.args[0]) for node in graph.nodes if writes(node) and node.args and isinstance(node.args[0], Node)
    )


def out_of_place(module: GraphModule) -> None:
    """Needs: a captured graph. Ensures: no in-place operator, nor assignment to a slice, on a fresh tensor whose older views are
    no longer read. Keeps: values."""
    for node in list(module.graph.nodes):
        if writes(node) and node.args and isinstance(node.args[0], Node):
            _rewrite(module.graph, node)
    module.recompile()


_BY_INDEX = frozenset({"scatter_", "scatter_add_", "index_fill_", "index_add_", "index_copy_"})  # integers that promote nothing
_SCATTERS: Mapping[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def _functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """aten.add.Tensor for aten.add_.Tensor; None for what is not the in-place form of an operator."""
    name = target._schema.name.split("::")[1]
    if target.namespace != "aten" or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, target._schema.overload_name or "default", None) if packet is not None else None


def _rewrite(graph: Graph, write: Node) -> None:
    """x.add_(y) becomes x2 = add(x, y); x[a:b] = y, a chain of slices and a copy_, becomes x2 = slice_scatter(x, y, a, b)."""
    changed = write.args[0]
    assert isinstance(changed, Node)
    chain: list[Node] = []
    root = changed
    if not _unseen_elsewhere(graph, write, changed):
        while root.target in _SCATTERS:
            chain.append(root)
            root = root.args[0]  # type: ignore[assignment]
        older = {user for owner in (root, *chain) for user in owner.users if user < write and is_view(user)}
        if is_view(root) or any(_read_after(view, write) for view in older):
            return
    with graph.inserting_before(write):
        value = None if _promotes(write, changed.meta["val"]) else _new_value(graph, write, changed)
        if value is None:
            return
        written = value
        for view in chain:
            value = graph.call_function(_SCATTERS[view.target], (view.args[0], value, *view.args[1:]))
            value.meta["val"] = view.args[0].meta["val"]  # type: ignore[union-attr]
            inherit_line(value, write)
    for user in [user for user in root.users if write < user]:
        user.replace_input_with(root, value)
    write.replace_all_uses_with(written)
    graph.erase_node(write)


def _unseen_elsewhere(graph: Graph, write: Node, changed: Node) -> bool:
    """True where no other name of the written memory is read after the write, so that only its result counts."""
    base = memory_root(changed)
    if is_view(base):
        return False  # an input, or memory of unknown origin
    older = [node for node in graph.nodes if node < write and node is not changed and memory_root(node) is base]
    return not any(write < user for node in older for user in node.users)


def _new_value(graph: Graph, write: Node, changed: Node) -> Node | None:
    """What stands in the written place afterwards."""
    if write.target is aten.copy_.default:
        source = write.args[1]
        assert isinstance(source, Node)
        if source.meta["val"].shape == changed.meta["val"].shape and source.meta["val"].dtype == changed.meta["val"].dtype:
            return source
        if source.meta["val"].dtype != changed.meta["val"].dtype:
            return None
        value = graph.call_function(aten.expand_as.default, (source, changed))
    else:
        functional = _functional(write.target)  # type: ignore[arg-type]
        if functional is None:
            return None
        value = graph.call_function(functional, write.args, write.kwargs)
    value.meta["val"] = changed.meta["val"]
    inherit_line(value, write)
    return value


def _read_after(view: Node, write: Node) -> bool:
    """True where a view taken before the write is read after it."""
    return any(
        write < user or (user is not write and is_view(user) and user.op != "output" and _read_after(user, write))
        for user in view.users
    )


def _promotes(write: Node, before: torch.Tensor) -> bool:
    """True where the out-of-place operator would have another dtype than the tensor it writes to."""
    if write.target._schema.name.split("::")[1] in _BY_INDEX:  # type: ignore[union-attr]
        return False
    others = [a.meta["val"] for a in write.args[1:] if isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor)]
    return any(o.dim() > 0 and o.dtype != torch.bool and torch.promote_types(before.dtype, o.dtype) != before.dtype for o in others)

"""Dynamo's graph -> pre-dispatch ATen with the user's lines, true dtypes and no local in-place operator."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp


def fake_mode_of(inputs: Sequence[Any]) -> FakeTensorMode:
    """Dynamo's own fake mode, so that symbolic sizes keep their meaning; that of the inputs where there is no Dynamo."""
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    return next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), FakeTensorMode(allow_non_fake_inputs=True))


def capture(module: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """Needs: Dynamo's graph and its example inputs. Ensures: a flat graph of ATen operators, whole ones such as softmax and
    matmul included, `meta["val"]` on every node and `meta["stack_trace"]` from the user's code. Keeps: what it computes."""
    mode = fake_mode_of(inputs)
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) else x for x in inputs]
    with fx_traceback.preserve_node_meta(), mode:
        graph_module = make_fx(Interpreter(module).run, pre_dispatch=True)(*fakes)
    out_of_place(graph_module)
    if any(node.target is torch.amp.autocast_mode._enter_autocast for node in graph_module.graph.nodes):
        # tracing records an operator before autocast casts its operands: run the graph once more for the true dtypes
        FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*fakes)
    return graph_module


def source_line(node: Node) -> str:
    """ "model.py:41": the innermost line of the user's code that made `node`; "" if it is not known."""
    trace = node.meta.get("stack_trace") or ""
    found = re.findall(r'File "([^"]+)", line (\d+)', trace)
    if not found:
        return ""
    path, line = found[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}"


# ------------------------------------------------------------------------------------------- in-place operators


def _functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """aten.add.Tensor for aten.add_.Tensor; None for what is not the in-place form of an operator."""
    name = target._schema.name.split("::")[1]
    if target.namespace != "aten" or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    overload = target._schema.overload_name or "default"
    return getattr(packet, overload, None) if packet is not None else None


def is_view(node: Node) -> bool:
    """True where the result may share memory with an operand."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return node.op != "call_function"
    if node.target._schema.name.split("::")[1] in ("reshape", "contiguous", "to", "flatten", "expand_as", "view_as", "type_as"):
        return True
    return any(result.alias_info is not None for result in node.target._schema.returns)


def out_of_place(module: GraphModule) -> None:
    """Needs: a captured graph. Ensures: no in-place operator on a fresh tensor that nothing else aliases, and no assignment to a
    slice of one. Keeps: values."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not node.args:
            continue
        if node.target is torch.ops.aten.copy_.default:
            _scatter_instead(module.graph, node)
            continue
        functional = _functional(node.target) if node.target._schema.is_mutable else None
        changed = node.args[0]
        if functional is None or not isinstance(changed, Node) or not _sole_owner(changed, node):
            continue
        before, after = changed.meta.get("val"), node.meta.get("val")
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or _promotes(node, before):
            continue
        node.target = functional
        later = [user for user in changed.users if user is not node and _comes_after(user, node)]
        for user in later:
            user.replace_input_with(changed, node)
    module.recompile()


_SCATTERS = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}


def _scatter_instead(graph: Graph, write: Node) -> None:
    """x[a:b] = y, as Dynamo writes it (a chain of slices and a copy_), becomes x2 = slice_scatter(x, y, a, b); x[:] = y becomes y."""
    target, source = write.args[:2]
    assert isinstance(target, Node) and isinstance(source, Node)
    written = target
    chain = []
    while target.target in _SCATTERS:
        chain.append(target)
        base = target.args[0]
        assert isinstance(base, Node)
        target = base
    others = {user for owner in (target, *chain) for user in owner.users if user < write and is_view(user)}
    if source.meta["val"].dtype != target.meta["val"].dtype or is_view(target) or any(_seen_later(view, write) for view in others):
        return
    with graph.inserting_before(write):
        value = source
        if source.meta["val"].shape != written.meta["val"].shape:
            value = graph.call_function(torch.ops.aten.expand_as.default, (source, written))
            value.meta.update(val=written.meta["val"], stack_trace=write.meta.get("stack_trace"))
        copied = value
        for view in chain:
            base = view.args[0]
            assert isinstance(base, Node)
            value = graph.call_function(_SCATTERS[view.target], (base, value, *view.args[1:]))
            value.meta.update(val=base.meta["val"], stack_trace=write.meta.get("stack_trace"))
    for user in [user for user in target.users if _comes_after(user, write)]:
        user.replace_input_with(target, value)
    write.replace_all_uses_with(copied)
    graph.erase_node(write)


def _seen_later(view: Node, write: Node) -> bool:
    """True where a view taken before the write is read after it."""
    return any(_comes_after(user, write) or (is_view(user) and _seen_later(user, write)) for user in view.users)


def _sole_owner(tensor: Node, writer: Node) -> bool:
    """True where no other name for the memory of `tensor` exists when `writer` changes it."""
    if is_view(tensor):
        return False
    return not any(is_view(user) and user is not writer and user.op != "output" and not _comes_after(user, writer) for user in tensor.users)


def _promotes(node: Node, before: torch.Tensor) -> bool:
    """True where the out-of-place operator would have another dtype than the tensor it writes to."""
    others = [a.meta["val"] for a in node.args[1:] if isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor)]
    return any(o.dim() > 0 and o.dtype != torch.bool and torch.promote_types(before.dtype, o.dtype) != before.dtype for o in others)


def _comes_after(node: Node, other: Node) -> bool:
    return other < node

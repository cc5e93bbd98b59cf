"""A user's function of positions -> an expression, with the tensors that it captures: FlexAttention's mods, unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attncompiler.errors import InvalidProgram, Unrecognised
from attncompiler.ir.expr import Axis, Expr
from attncompiler.passes.constant_masks import ConstantMasks
from attncompiler.passes.constants import Constants
from attncompiler.passes.reader import Reader
from attncompiler.passes.recognise_calls import ModReader
from attncompiler.passes.sizes import IndexSpace

aten = torch.ops.aten


def traced(
    function: Callable[..., Any], bound: Sequence[Expr], examples: Sequence[Tensor], extents: Mapping[Axis, int]
) -> tuple[Expr, dict[str, Tensor]]:
    """The expression that `function` computes of `bound` on axes of these sizes, and the tensors that it reads, by name.

    `examples` are 0-d tensors of the dtypes of its arguments. Raises: InvalidProgram where it does more than elementwise
    arithmetic and reading captured tensors."""
    name = getattr(function, "__name__", "the function")
    try:
        with TransformGetItemToIndex():  # captured[q_idx] of a 0-d tensor is an indexing, not a number
            module = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    except Exception as error:
        reason = str(error).splitlines()[0]
        do = "" if isinstance(error, IndexError) else "use operations of torch alone"
        raise InvalidProgram(f"{name} can't be traced", why=reason, do=do) from error
    _inline_numbers(module)
    outer = Graph()
    captured: dict[str, Tensor] = {}
    values: list[Any] = list(bound)
    last = [node for node in module.graph.nodes if node.op == "placeholder"][-1]
    for node in [n for n in module.graph.nodes if n.op == "get_attr"]:
        tensor = getattr(module, str(node.target))
        known = next((held for held, value in captured.items() if value is tensor), None)
        held = known or f"captured{len(captured) or ''}"
        captured[held] = tensor
        with module.graph.inserting_after(last):
            last = module.graph.placeholder(held + "_" + node.name)
        last.meta["val"] = tensor
        node.replace_all_uses_with(last)
        module.graph.erase_node(node)
        place = next((n for n in outer.nodes if n.name == held), None) or outer.placeholder(held)
        place.meta["val"] = tensor
        values.append(place)
    outer.output(())
    space = IndexSpace()
    space.extents.update(extents)
    empty = GraphModule({}, outer)
    reader = Reader(empty, space, frozenset(), ConstantMasks(Constants(empty, empty, ())))
    try:
        return ModReader(reader, module, values).result(), captured
    except Unrecognised as error:
        what = f"{name} is no expression of positions: {error.what}"
        raise InvalidProgram(what, where=error.where, why=error.why, do=error.do) from error


def _inline_numbers(module: GraphModule) -> None:
    """Numbers that tracing made tensors of (the 0 of `captured[0]`) as numbers again."""
    for node in module.graph.nodes:
        source = node.args[0] if node.target is aten.lift_fresh_copy.default else None
        if not isinstance(source, Node) or source.op != "get_attr":
            continue
        tensor = getattr(module, str(source.target))
        if tensor.dim() == 0:
            with module.graph.inserting_before(node):
                number = module.graph.call_function(aten.full.default, ([], tensor.item()), {"dtype": tensor.dtype})
            number.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(number)
            module.graph.erase_node(node)
            if not source.users:
                module.graph.erase_node(source)

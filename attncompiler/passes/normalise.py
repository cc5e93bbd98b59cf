"""Dynamo's graph -> pre-dispatch ATen with the user's lines, true dtypes and no local in-place operator."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from attncompiler.errors import Unrecognised
from attncompiler.passes.memory import out_of_place


def fake_mode_of(inputs: Sequence[Any]) -> FakeTensorMode:
    """Dynamo's own fake mode, so that symbolic sizes keep their meaning; that of the inputs where there is no Dynamo."""
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    return next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), FakeTensorMode(allow_non_fake_inputs=True))


_NOTHING = Graph()
# Calls that hold a part of the graph: what they are, why nothing of the graph is taken, and what to do.
_HOLDERS = {
    "autograd_function_apply": (
        "the graph calls a torch.autograd.Function", "its own backward would be lost in our trace",
        "call it outside of what is compiled, as by torch.compiler.disable",
    ),
    "activation_checkpoint": (
        "the graph has a part that is checkpointed", "what is computed again in the backward is a graph of its own, which is not looked at",
        "compile the block that is checkpointed: checkpoint(torch.compile(block, backend=\"attncompiler\"), ...)",
    ),
}  # fmt: skip


def capture(module: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """Needs: Dynamo's graph and its example inputs. Ensures: a flat graph of ATen operators, whole ones such as softmax and
    matmul included, `meta["val"]` on every node, `meta["stack_trace"]` from the user's code, `meta["user_name"]` on inputs.
    Keeps: what it computes. Raises: Unrecognised for a graph of which nothing can be taken."""
    for part in module.modules():
        for node in getattr(part, "graph", _NOTHING).nodes:
            for holder, (what, why, do) in _HOLDERS.items():
                if holder in str(node.target):
                    raise Unrecognised(what, where=source_line(node), why=why, do=do)
    mode = fake_mode_of(inputs)
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) else x for x in inputs]
    with fx_traceback.preserve_node_meta(), mode:
        graph_module = make_fx(Interpreter(module).run, pre_dispatch=True)(*fakes)
    named = ([n for n in g.graph.nodes if n.op == "placeholder"] for g in (module, graph_module))
    for theirs, ours in zip(*named, strict=True):
        ours.meta["user_name"] = theirs.name
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(graph_module, str(node.target), None), FakeTensor):
            raise Unrecognised(
                "the graph makes a tensor that tracing can't follow", where=source_line(node), why="a scan or a custom op holds it"
            )
    out_of_place(graph_module)
    if any(node.target is torch.amp.autocast_mode._enter_autocast for node in graph_module.graph.nodes):
        # tracing records an operator before autocast casts its operands: run the graph once more for the true dtypes
        FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*fakes)
    return graph_module


_TORCH = torch.__path__[0] + "/"
_OURS = str(Path(__file__).parents[1]) + "/"  # what declares an attention is not the user's line


def source_line(node: Node) -> str:
    """ "model.py:41": the innermost line of the user's code that made `node`; "" if it is not known."""
    trace = node.meta.get("stack_trace") or ""
    found = re.findall(r'File "([^"]+)", line (\d+)', trace)
    if not found:
        return ""
    path, line = next((frame for frame in reversed(found) if not frame[0].startswith((_TORCH, _OURS))), found[-1])
    return f"{path.rsplit('/', 1)[-1]}:{line}"

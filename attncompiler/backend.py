"""What torch.compile calls: capture, recognise, replace, and hand the rest to the inner compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

import attncompiler.runtime.ops  # noqa: F401  registers the op
from attncompiler.config import parse_options
from attncompiler.explanation import Missed
from attncompiler.passes.pipeline import CompiledGraph, compile_graph

log = logging.getLogger(__name__)


def attncompiler(
    module: GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend `torch.compile(f, backend="attncompiler", options={"inner": "inductor" | "aot_eager" | "eager"})`.

    Raises: OptionError for an unknown option or a bad value."""
    inner = parse_options(options, mode).inner
    return INNER[inner](compile_or_leave(module, inputs).module, inputs)


def compile_or_leave(module: GraphModule, inputs: Sequence[Any]) -> CompiledGraph:
    """The compiled graph; the given one, with a reason, where compiling fails: a mistake of ours must not stop the user."""
    try:
        return compile_graph(module, inputs)
    except Exception as error:
        log.warning("attncompiler left a graph to the inner compiler: %s: %s", type(error).__name__, error, exc_info=log.isEnabledFor(10))
        return CompiledGraph(module, (), (Missed(f"the graph could not be analysed: {type(error).__name__}: {error}", ""),))


INNER: Mapping[str, Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]] = {
    "inductor": compile_fx,
    "aot_eager": aot_eager,
    "eager": lambda module, inputs: module.forward,
}

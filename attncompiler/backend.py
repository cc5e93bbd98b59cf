"""What torch.compile calls: capture, recognise, replace, and hand the rest to the inner compiler."""

from __future__ import annotations

import functools
import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.compile_fx import compile_fx
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule, Node

from attncompiler.assumed import checked
from attncompiler.codegen.recurrence import why_not_lowered
from attncompiler.config import Inner, parse_options
from attncompiler.errors import Unrecognised
from attncompiler.explanation import Missed
from attncompiler.passes.nothing_kept import warning_of_nothing
from attncompiler.passes.pipeline import CompiledGraph, compile_graph
from attncompiler.runtime import ops, selection, state_op  # noqa: F401  register the ops that compiled graphs call

log = logging.getLogger(__name__)


def attncompiler(
    module: GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend of `torch.compile(f, backend="attncompiler", options={"inner": "inductor" | "aot_eager" | "eager"})`.

    Raises: OptionError for an unknown option or a bad value."""
    inner = parse_options(options, mode).inner
    graph = compile_or_leave(module, inputs)
    for warning in filter(None, (warning_of_nothing(site.program) for site in graph.sites)):
        warnings.warn(warning, stacklevel=2)
    compiled: Callable[..., Any] = _INNER[inner](graph.module, inputs)
    if not graph.assumed:
        return compiled

    def read() -> Callable[..., Any]:
        """The same graph as a function of its own, whose arguments are no constants to Dynamo: all masks are read."""
        return torch.compile(module, backend="attncompiler", options={"inner": inner.value})

    return checked(compiled, graph.assumed, read)


def _as_it_is(tensor: Any) -> Any:
    return tensor


def compile_or_leave(module: GraphModule, inputs: Sequence[Any]) -> CompiledGraph:
    """The compiled graph; the given one, with a reason, where compiling fails: a mistake of ours must not stop the user."""
    try:
        with saved_tensors_hooks(_as_it_is, _as_it_is):  # a checkpoint around the first call must not count what tracing saves
            return compile_graph(module, inputs, why_not_lowered)
    except Unrecognised as error:
        log.warning("a graph is left to the inner compiler: %s", error)
        return CompiledGraph(module, (), (Missed(error.reason, error.where, error.do),))
    except Exception as error:
        log.warning("a graph is left to the inner compiler: %s: %s", type(error).__name__, error, exc_info=log.isEnabledFor(10))
        return CompiledGraph(module, (), (Missed(f"the graph could not be analysed: {type(error).__name__}: {error}", ""),))


def _inductor(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor; where a graph samples (attention over drawn keys, say) with eager's random numbers: a seed then means the same."""
    samples = any(_draws(node) for node in module.graph.nodes)
    settings: Any = torch.compiler.config
    with settings.patch(cache_key_tag=f"{settings.cache_key_tag}{_cache_tag()}"):
        compiled = compile_fx(module, inputs, config_patches={"fallback_random": True} if samples else None)
    return cast(Callable[..., Any], compiled)


@functools.cache
def _cache_tag() -> str:
    """Of the signatures of our ops: graphs that Inductor's cache on disk has from another version of ours call other ops."""
    schemas = sorted(str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("attncompiler::"))
    return f"attncompiler {hashlib.sha256(repr(schemas).encode()).hexdigest()[:16]}"


_SAMPLERS = ("rand", "normal", "bernoulli", "multinomial", "uniform", "exponential", "geometric", "cauchy", "log_normal", "poisson")


def _draws(node: Node) -> bool:
    """True for an operator or a torch function that takes random numbers, other than dropout."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name.startswith(_SAMPLERS)


_INNER: Mapping[Inner, Callable[[GraphModule, Sequence[Any]], Any]] = {
    Inner.INDUCTOR: _inductor,
    Inner.AOT_EAGER: lambda module, inputs: aot_eager(module, list(inputs)),
    Inner.EAGER: lambda module, inputs: module.forward,
}

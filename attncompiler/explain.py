"""`explain`: run a function once under Dynamo, without the inner compiler, and say what was taken and what was not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from attncompiler.backend import compile_or_leave
from attncompiler.explanation import Explanation, Missed, Region
from attncompiler.ir.expr import TRUE
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.text import expr_text, to_text
from attncompiler.passes.site import Site


def explain(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What `torch.compile(f, backend="attncompiler")` does with these inputs. Never needs a GPU; `f` runs once, on its own device.

    `f` may be a function, a module, or either of them compiled already."""
    regions: list[Region] = []
    missed: list[Missed] = []
    graphs = 0

    def record(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        compiled = compile_or_leave(module, inputs)
        regions.extend(_region(site) for site in compiled.sites)
        missed.extend(compiled.missed)
        return module.forward

    original = getattr(f, "_orig_mod", getattr(f, "_torchdynamo_orig_callable", f))
    with torch._dynamo.config.patch(recompile_limit=max(64, torch._dynamo.config.recompile_limit)):
        torch.compile(original, backend=record)(*args, **kwargs)
    return Explanation(tuple(regions), tuple(missed), graphs)


def _region(site: Site) -> Region:
    program = site.program
    predicate = program.keep.predicate
    return Region(
        family="softmax",
        ir=to_text(program),
        mask="all pairs" if predicate == TRUE else expr_text(predicate),
        density=1.0,
        template="portable",
        source_location=program.origin.line,
    )


def hinted_sizes(site: Site) -> Mapping[str, int]:
    """The run-time integers of a site at the inputs it was traced with."""
    return {name: size if isinstance(size, int) else int(size.node.hint) for name, size in site.sizes.items()}


def hinted_extents(site: Site) -> Mapping[str, int]:
    return extents_of(site.program, hinted_sizes(site))

"""`explain`: run a function once under Dynamo, without the inner compiler, and say what was taken and what was not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from attncompiler.backend import compile_or_leave
from attncompiler.codegen.emission import Layout
from attncompiler.codegen.emit import emit
from attncompiler.explanation import Explanation, Missed, Region
from attncompiler.ir.expr import TRUE, Const, conj, conjuncts, reads_of
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Keep
from attncompiler.ir.text import expr_text, to_text
from attncompiler.passes.lift_mask import weak_mask
from attncompiler.passes.plan import TilePlan, build_plan
from attncompiler.passes.site import Site
from attncompiler.runtime.lowering import unsupported
from attncompiler.runtime.triton_launch import static_groups
from attncompiler.tuning.schedule import choose_schedule
from attncompiler.tuning.speed_of_light import speed_of_light
from attncompiler.tuning.target import TARGETS, Target

TILE_Q, TILE_KV = 128, 64  # tiles that densities and pictures are counted in


def explain(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What `torch.compile(f, backend="attncompiler")` does with these inputs. Never needs a GPU; `f` runs once, on its own device.

    `f` may be a function, a module, or either of them compiled already. Raises: what `f` itself raises."""
    sites, explanation = trace(f, *args, **kwargs)
    return replace(explanation, regions=tuple(_region(site) for site in sites))


def trace(f: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[list[Site], Explanation]:
    """The sites of `f`, and everything of its explanation but the regions."""
    sites: list[Site] = []
    missed: list[Missed] = []
    graphs = 0

    def record(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        compiled = compile_or_leave(module, inputs)
        sites.extend(compiled.sites)
        missed.extend(compiled.missed)
        return module.forward

    original = getattr(f, "_orig_mod", getattr(f, "_torchdynamo_orig_callable", f))
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    with torch._dynamo.config.patch(recompile_limit=max(64, torch._dynamo.config.recompile_limit)):
        torch.compile(original, backend=record)(*args, **kwargs)
    after = torch._dynamo.utils.counters["graph_break"]
    new_breaks = tuple(reason for reason, count in after.items() if count > breaks.get(reason, 0))
    return sites, Explanation((), tuple(missed), graphs, new_breaks)


def _region(site: Site) -> Region:
    program = site.program
    predicate = program.keep.predicate
    density, notes = plan_of(program, hinted_sizes(site))
    notes = (*notes, *map(str, site.recovered))
    fill = weak_mask(program.score)
    if fill is not None:
        why = f"where the mask puts {fill:g} a score may still count, so those pairs are computed"
        notes = (*notes, f"{why}; -inf or torch.finfo(dtype).min lets them be skipped")
    reason = unsupported(program)
    if reason:
        notes = (*notes, f"no GPU kernel: {reason}")
    sizes = hinted_sizes(site)
    value = program.value.shape[-1]
    channels = int(value.value) if isinstance(value, Const) else 64
    extents = extents_of(program, sizes)
    shape = extents["b"], extents["h"], extents["q_idx"], extents["kv_idx"], channels
    return Region(
        family="softmax",
        ir=to_text(program),
        mask="all pairs" if predicate == TRUE else expr_text(predicate),
        density=density.density,
        template="portable" if reason else "softmax (Triton); portable without a GPU",
        source_location=program.origin.line,
        kernels={} if reason else {"attention": kernel_source(program)},
        notes=notes,
        speed_of_light=speed_of_light(density, None, shape, TARGETS["sm_90"]) if min(shape) > 0 else None,
    )


def kernel_source(program: Attention, target: Target = TARGETS["sm_90"]) -> str:
    """The generated file of a program for a target, forward and backward. Raises: UnsupportedProgram."""
    layout = Layout(static_groups(program), frozenset(program.differentiable))
    return emit(program, choose_schedule(program, target, target.descriptors), layout)


def plan_of(program: Attention, sizes: Mapping[str, int]) -> tuple[TilePlan, tuple[str, ...]]:
    """The tile plan at given sizes. Parts of the mask that read tensors count as kept: then the density is an upper bound, and a
    note says so."""
    parts = conjuncts(program.keep.predicate)
    static = [part for part in parts if not reads_of(part)]
    names = sorted({read.tensor for part in parts for read in reads_of(part)})
    bounded = replace(program, keep=Keep(conj(*static), program.keep.empty))
    plan = build_plan(bounded, {program.sum.tensor: torch.empty(0)}, sizes, TILE_Q, TILE_KV)
    notes = (f"at most: what {', '.join(names)} skips is found at run time",) if names else ()
    return plan, notes


def hinted_sizes(site: Site) -> Mapping[str, int]:
    """The run-time integers of a site at the inputs that it was traced with."""
    return {name: size if isinstance(size, int) else int(size.node.hint) for name, size in site.sizes.items()}

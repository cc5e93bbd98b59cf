"""`explain`: run a function once under Dynamo, without the inner compiler, and say what was taken and what was not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attncompiler.backend import compile_or_leave
from attncompiler.codegen.emission import Layout
from attncompiler.codegen.emit import emit
from attncompiler.explanation import Explanation, Missed, Region
from attncompiler.ir.expr import ONE, TRUE
from attncompiler.ir.phase_text import program_text
from attncompiler.ir.program import Attention, Route
from attncompiler.ir.text import expr_text
from attncompiler.passes.lift_mask import weak_mask
from attncompiler.passes.nodes import Operand
from attncompiler.passes.site import Site
from attncompiler.passes.sizes import Extent
from attncompiler.runtime.lowering import in_kernels, unsupported
from attncompiler.runtime.prepared import target_of
from attncompiler.runtime.preview import Preview, preview
from attncompiler.runtime.triton_launch import static_groups
from attncompiler.selection_note import chosen_keys
from attncompiler.state_region import StateUse, declared_uses, region_of_state, use_of_site
from attncompiler.tuning.schedule import Schedule
from attncompiler.tuning.strides import strides_text
from attncompiler.tuning.target import TARGETS, Target


def explain(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What `torch.compile(f, backend="attncompiler")` does with these inputs. Never needs a GPU; `f` runs once, on its own device.

    `f` may be a function, a module, or either of them compiled already. Raises: what `f` itself raises."""
    sites, states, explanation = _traced(f, args, kwargs)
    return replace(explanation, regions=(*map(_region, sites), *map(region_of_state, states)))


def trace(f: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[list[Site], list[StateUse]]:
    """The softmax attentions of `f`, and its linear ones."""
    sites, states, _ = _traced(f, args, kwargs)
    return sites, states


def _traced(
    f: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Site], list[StateUse], Explanation]:
    sites: list[Site] = []
    states: list[StateUse] = []
    declared: list[StateUse] = []
    missed: list[Missed] = []
    graphs = 0

    def record(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        compiled = compile_or_leave(module, inputs)
        sites.extend(compiled.sites)
        states.extend(map(use_of_site, compiled.states))
        missed.extend(compiled.missed)
        declared.extend(declared_uses(module))
        return module.forward

    original = getattr(f, "_orig_mod", getattr(f, "_torchdynamo_orig_callable", f))
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    with torch._dynamo.config.patch(recompile_limit=max(64, torch._dynamo.config.recompile_limit)):
        torch.compile(original, backend=record)(*args, **kwargs)
    after = torch._dynamo.utils.counters["graph_break"]
    new_breaks = tuple(reason for reason, count in after.items() if count > breaks.get(reason, 0))
    return sites, [*states, *declared], Explanation((), tuple(missed), graphs, new_breaks)


def _region(site: Site) -> Region:
    program = site.program
    predicate = program.keep.predicate
    found = preview_site(site)
    notes = (*found.notes, *map(str, site.recovered))
    fill = weak_mask(program.score)
    if fill is not None:
        why = f"where the mask puts {fill:g} a score may still count, so those pairs are computed"
        notes = (*notes, f"{why}; -inf or torch.finfo(dtype).min lets them be skipped")
    if found.light is not None and found.light.partial_tiles and found.light.full_strides:
        stride = strides_text(found.light.full_strides)
        notes = (*notes, f"with a stride of {stride} no tile would be partial; `attncompiler plan --strides` has the others")
    chosen = chosen_keys(site)
    if chosen is not None:
        notes = (str(chosen), *notes)
    if program.route != Route():
        notes = (*notes, _route_note(site))
    reason = unsupported(program)
    if reason:
        notes = (*notes, f"no GPU kernel: {reason}")
    return Region(
        family="softmax",
        ir=program_text(site.whole),
        mask="all pairs" if predicate == TRUE else expr_text(predicate),
        density=found.density * site.active_share * (1.0 if chosen is None else chosen.share),
        template="portable" if reason else "softmax (Triton); portable without a GPU",
        source_location=program.origin.line,
        kernels={} if reason else kernel_sources(program, found),
        notes=notes,
        speed_of_light=found.light,
    )


def _route_note(site: Site) -> str:
    route, share = site.program.route, site.active_share
    what = "switched" if route.gain == ONE else f"routed by {expr_text(route.gain)}"
    many = f"{share:.3g} of queries and heads" if share < 1.0 else "how many is known at run time"
    counted = "; tiles visited counts these, predicted ms all" if share < 1.0 else ""
    return (
        f"heads are {what}: one that is off for a query is not computed, forward or backward. Expected to be on: {many}"
        f"{counted}. Of each head the queries that use it are taken together; keys and values are those of all"
    )


def kernel_source(program: Attention, schedule: Schedule) -> str:
    """The generated file of a program, forward and backward. Raises: UnsupportedProgram."""
    if program.route != Route():
        schedule = schedule.in_rows()
    program = in_kernels(program)
    return emit(program, schedule, Layout.of(static_groups(program), frozenset(program.differentiable)))


def kernel_sources(program: Attention, found: Preview) -> dict[str, str]:
    """The generated files of a program by what they compute: one, or one for each of its parts. Raises: UnsupportedProgram."""
    if not found.parts:
        return {"attention": kernel_source(program, found.schedule)}
    return {
        f"attention of queries {q}:{q + m} and keys {k}:{k + n}": kernel_source(part.program, shown.schedule)
        for part, shown in found.parts
        for (q, m), (k, n) in ((part.queries, part.keys),)
    }


def preview_site(site: Site, target: Target | None = None) -> Preview:
    """What runs of a site at the inputs that it was traced with. `target`: by default the GPU that the operands are on, else an
    H100."""
    operands = dict(zip((decl.name for decl in site.program.tensors), map(outline, site.operands), strict=True))
    device = site.operands[0].node.meta["val"].device
    chosen = target or (target_of(device) if device.type == "cuda" else TARGETS["sm_90"])
    pairs = zip(site.program.tensors, site.operands, strict=True)
    known = {decl.name: operand.table for decl, operand in pairs if operand.table is not None}
    return preview(site.program, hinted_sizes(site), operands, chosen, known)


def outline(operand: Operand) -> Tensor:
    """An operand of a site without its values: shape, strides and offset, on the meta device."""
    if operand.is_seed:
        return torch.empty(1, dtype=torch.int64, device="meta")
    if operand.table is not None:
        return operand.table.to("meta")
    if operand.made is not None:
        found = operand.made.op(*(_outline(a) if isinstance(a, Node) else a for a in operand.made.arguments))
        made: Tensor = found[operand.made.result] if operand.made.has_several else found
        return made
    shown = _outline(operand.node)
    if operand.channel_place is not None:
        shown = shown.movedim(operand.channel_place, -1)
    return shown if operand.dtype is None else shown.to(operand.dtype)


def _outline(node: Node) -> Tensor:
    traced = node.meta["val"]
    shape, strides = ([hinted(size) for size in sizes] for sizes in (traced.shape, traced.stride()))
    offset = hinted(traced.storage_offset())
    span = offset + 1 + sum(max(size - 1, 0) * stride for size, stride in zip(shape, strides, strict=True))
    memory = torch.empty(span, dtype=traced.dtype, device="meta")
    return memory.as_strided(shape, strides, offset)


def hinted_sizes(site: Site) -> Mapping[str, int]:
    """The run-time integers of a site at the inputs that it was traced with."""
    return {name: hinted(size) for name, size in site.sizes.items()}


def hinted(size: Extent) -> int:
    """A size, or the one that a symbolic size was traced with."""
    return size if isinstance(size, int) else int(size.node.hint)

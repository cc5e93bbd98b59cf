"""The programs that the two forms of a system end in, and whether they are one."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from attncompiler.backend import compile_or_leave
from attncompiler.explain import hinted_sizes
from attncompiler.explanation import Missed
from attncompiler.ir.expr import (
    AXES,
    ZERO,
    Apply,
    Const,
    Dot,
    Expr,
    Read,
    axes_of,
    conj,
    conjuncts,
    disjuncts,
    reads_of,
    substitute,
    transform,
)
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Route
from attncompiler.ir.text import expr_text, parse
from attncompiler.passes.plan import TilePlan, build_plan, count_kept
from attncompiler.passes.site import Site
from attncompiler.zoo.system import Example, Form, System, bound


@dataclass(frozen=True)
class Call:
    """One attention that a form ran: its program, operands and run-time sizes, by name."""

    program: Attention
    operands: Mapping[str, Tensor]
    sizes: Mapping[str, int]

    @property
    def extents(self) -> tuple[int, int, int, int]:
        """b, h, q_idx, kv_idx."""
        b, h, m, n = (extents_of(self.program, self.sizes)[axis.name] for axis in AXES)
        return b, h, m, n

    @property
    def keys(self) -> int:
        """How many keys there are, listed or not."""
        entries = self.program.sum.index
        lengths = zip(entries, self.operands[self.program.sum.tensor].shape, strict=False)
        return next((length for entry, length in lengths if isinstance(entry, Read)), self.extents[3])

    def plan(self, block_q: int = 128, block_kv: int = 128) -> TilePlan:
        return build_plan(self.program, self.operands, self.sizes, block_q, block_kv)

    def tiles(self) -> tuple[int, int]:
        """How many tiles of 128 x 128 it visits, and of how many, over all batches and heads."""
        plan = self.plan()
        copies = self.extents[0] * self.extents[1] // (plan.plan_b * plan.plan_h)
        return copies * int(plan.visited.lengths.sum()), copies * plan.plan_b * plan.plan_h * plan.q_tiles * -(
            -self.keys // plan.block_kv
        )

    def kept_pairs(self) -> int | None:
        """Over all batches and heads; None where that takes too long to count."""
        return count_kept(self.program.keep.predicate, self.operands, self.extents)


class _Watch(TorchDispatchMode):
    """Takes down every attention, and runs none: its results are zeros without memory. All else runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        routed = func is torch.ops.attncompiler.routed_forward.default
        if not routed and func is not torch.ops.attncompiler.attention_forward.default:
            return func(*args, **(kwargs or {}))
        operands, sizes, text = args[:3]
        program = parse(text)
        names = (decl.name for decl in program.tensors)
        call = Call(program, dict(zip(names, operands, strict=True)), dict(zip(program.sizes, sizes, strict=True)))
        self.calls.append(call)
        b, h, m, _ = call.extents
        value = call.operands[program.sum.tensor]
        zero = value.new_zeros(())
        o, lse, rcp = zero.expand(b, h, m, value.shape[-1]), zero.float().expand(b, h, m), zero.float().expand(0)
        return (o, lse, rcp, o, lse, lse) if routed else (o, lse, rcp)  # the rest serves a backward alone


def declared(system: System, example: Example) -> list[Call]:
    """The attentions of a system's declared form, in order. Takes no memory or time for the floating operands, but where these choose
    keys."""
    watch = _Watch()
    inputs = example.drawn(torch.float32, torch.device("cpu")) if system.selects else example.outlined()
    with torch.no_grad(), watch:
        bound(system.declared, example.numbers)(*inputs)
    return watch.calls


@dataclass(frozen=True)
class Recognised:
    """What the compiler finds in a form."""

    programs: tuple[Attention, ...]
    sizes: tuple[Mapping[str, int], ...]
    missed: tuple[Missed, ...]


def recognised(form: Form, example: Example) -> Recognised:
    """What `torch.compile(form, backend="attncompiler")` finds, with gradients; nothing runs, whatever the size."""
    sites: list[Site] = []
    missed: list[Missed] = []

    def record(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = compile_or_leave(module, inputs)
        sites.extend(compiled.sites)
        missed.extend(compiled.missed)
        results = next(node for node in module.graph.nodes if node.op == "output").args[0]
        shapes = [node.meta["example_value"] for node in results]
        return lambda *_: [torch.zeros((), dtype=made.dtype).expand(made.shape) for made in shapes]

    inputs = [t.detach().requires_grad_() if t.is_floating_point() else t for t in example.outlined()]
    torch.compiler.reset()
    torch.compile(bound(form, example.numbers), backend=record, dynamic=False)(*inputs)
    return Recognised(tuple(site.program for site in sites), tuple(hinted_sizes(site) for site in sites), tuple(missed))


class Likeness(enum.Enum):
    """How two lists of programs compare."""

    SAME = "the same program"
    THROUGH_VIEWS = "the same program, q, k and v read through views"
    DIFFERENT = "another program"


def likeness(found: Sequence[Attention], expected: Sequence[Attention]) -> Likeness:
    for through_views, answer in ((False, Likeness.SAME), (True, Likeness.THROUGH_VIEWS)):
        if [essence(p, through_views) for p in found] == [essence(p, through_views) for p in expected]:
            return answer
    return Likeness.DIFFERENT


def essence(program: Attention, through_views: bool = False) -> str:
    """The clauses without what does not make them another program: the names of operands, the order of the parts of a mask, an axis
    of one, what a row without keys gives, which masked_fill and scaled_dot_product_attention have differently, and that a list of keys
    may end early.

    `through_views`: nor how vectors lie in q, k and v and elements in other tensors, only which axes they vary with: a window may be
    read where it lies, or cut out first."""
    ones: dict[Expr, Expr] = {axis: ZERO for axis in AXES if program.axes.size(axis) == Const(1)}
    names: dict[str, str] = {}

    def lone(expr: Expr) -> Expr | None:
        if isinstance(expr, Apply) and expr.op in ("and", "or"):
            parts = conjuncts(expr) if expr.op == "and" else disjuncts(expr)
            ordered = sorted((transform(part, lone) for part in parts), key=expr_text)
            joined = ordered[0]
            for part in ordered[1:]:
                joined = Apply(expr.op, (joined, part))
            return joined
        if isinstance(expr, Dot):
            return Dot(vector(expr.left), vector(expr.right))
        if isinstance(expr, Read):
            index = tuple(transform(entry, lone) for entry in expr.index)
            if through_views:
                index = tuple(sorted((entry for entry in index if not isinstance(entry, Const)), key=expr_text))
            return Read(names[expr.tensor], index)
        return None

    def vector(read: Read) -> Read:
        index = tuple(transform(entry, lone) for entry in read.index)
        if through_views:
            index = tuple(axis for axis in AXES if any(axis.name in axes_of(entry) for entry in index))
        return Read(names[read.tensor], index)

    predicate = substitute(program.keep.predicate, ones)
    plain = replace(
        program,
        score=substitute(program.score, ones),
        keep=replace(program.keep, predicate=conj(*(p for p in conjuncts(predicate) if not _says_listed(p)))),
        route=Route(substitute(program.route.active, ones), substitute(program.route.gain, ones)),
    )
    for root in (
        plain.score,
        plain.sum,
        plain.keep.predicate,
        *plain.weigh.extra,
        plain.adjust,
        plain.route.gain,
        plain.route.active,
    ):
        for read in reads_of(root):
            names.setdefault(read.tensor, f"t{len(names)}")
    value = substitute(plain.sum, ones)
    assert isinstance(value, Read)
    clauses = {
        "axes": ", ".join(expr_text(program.axes.size(axis)) for axis in AXES),
        "score": expr_text(transform(plain.score, lone)),
        "keep": expr_text(transform(plain.keep.predicate, lone)),
        "weigh": ", ".join(expr_text(transform(extra, lone)) for extra in plain.weigh.extra),
        "adjust": expr_text(transform(plain.adjust, lone)),
        "sum": expr_text(vector(value)),
        "route": " where ".join(expr_text(transform(e, lone)) for e in (plain.route.gain, plain.route.active)),
    }
    return "\n".join(f"{name:8}{text}" for name, text in clauses.items())


def _says_listed(part: Expr) -> bool:
    """True for `picked[..] >= 0`."""
    return isinstance(part, Apply) and part.op == "ge" and isinstance(part.args[0], Read) and part.args[1] == ZERO

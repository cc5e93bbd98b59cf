"""A recognised attention: its program, how its operands are made, and what it replaces in the graph."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, Node

from attncompiler.errors import AttnCompilerError, Unrecognised
from attncompiler.ir.expr import (
    AXES,
    KV_IDX,
    ONE,
    OPERATORS,
    TRUE,
    Apply,
    Axis,
    B,
    Const,
    Expr,
    H,
    Read,
    axes_of,
    dots_of,
    floordiv,
    mod,
    mul,
    reads_of,
    settled,
    substitute,
    transform,
)
from attncompiler.ir.phases import Phase, Program, default_results
from attncompiler.ir.program import Attention, Keep, TensorDecl, each_clause
from attncompiler.ir.ranges import within
from attncompiler.ir.text import expr_text, to_text
from attncompiler.ir.verify import verify
from attncompiler.passes.constant_masks import Recovery, View, lift_constants
from attncompiler.passes.constants import Recipe
from attncompiler.passes.lift_constant import LiftedTensor
from attncompiler.passes.lift_mask import lift_mask, zero_empty_rows
from attncompiler.passes.nodes import DTYPES, Operand, dtype_of, shape_of
from attncompiler.passes.reader import Reader
from attncompiler.passes.select_keys import select_keys
from attncompiler.passes.sizes import Extent, size_expr
from attncompiler.passes.topk import ranked_nodes
from attncompiler.passes.unkept_rows import UnkeptRows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovered:
    """A constant mask that a rule stands for in a program, and how it is made."""

    node: Node
    recipe: Recipe
    recovery: Recovery

    def __str__(self) -> str:
        shape = ", ".join(map(str, shape_of(self.node)))
        rule = expr_text(settled(self.recovery.lifted.kept, KV_IDX))
        how = "it is made of constants" if self.recipe.source is None else "checked at each call"
        if self.recovery.lifted.rule.is_copy:
            return f"no rule explains the constant mask {self.recovery.operand} [{shape}]: its tiles are planned once; {how}"
        return f"the constant mask {self.recovery.operand} [{shape}] is lifted to {rule}; {how}"


@dataclass(frozen=True)
class Site:
    """One attention of the graph: `output` is replaced by the program's O, viewed as `out_shape` after `permutation`.

    O [b, h, q_idx, Dv] is first viewed as the sizes of `split` (one for each letter of the output), then permuted."""

    output: Node
    program: Attention
    operands: tuple[Operand, ...]
    sizes: Mapping[str, Extent]
    split: tuple[Extent, ...]
    permutation: tuple[int, ...]
    softmax_nodes: frozenset[Node] = field(default_factory=frozenset)
    lse: Node | None = None  # a node that holds lse / lse_unit, viewed as its own shape; replaced too
    lse_unit: float = 1.0
    recovered: tuple[Recovered, ...] = ()
    before: tuple[Phase, ...] = ()  # what computes the operands that the compiler made: selections
    unkept: tuple[UnkeptRows, ...] = ()  # what queries that keep no key give instead of 0, at most one
    active_share: float = 1.0  # of pairs of a query and a head, how many are expected to be on, as far as is known

    @property
    def whole(self) -> Program:
        """All phases: what is selected, the attention, what follows it."""
        after = (phase for rows in self.unkept for phase in rows.phases(self.program))
        return Program((*self.before, Phase(self.program, default_results(self.program)), *after))


@dataclass(frozen=True)
class Refusal:
    """A product of normalised scores that was not taken, and why."""

    output: Node
    error: AttnCompilerError
    softmax_nodes: frozenset[Node]


# ------------------------------------------------------------------------------------------------- axes and names


def _rewrite(program: Attention, change: Mapping[Expr, Expr]) -> Attention:
    """Substitute axes in every clause."""
    return each_clause(program, lambda expr: substitute(expr, change))


def name_batch_axes(program: Attention, batch: list[tuple[Expr, Extent]]) -> Attention:
    """The batch axes of the product become b and h: the last is h, the others b; a lone one is split if all its uses do."""
    live = [(axis, extent) for axis, extent in batch if isinstance(axis, Axis)]
    if len(live) == 1:
        axis, extent = live[0]
        divisor = common_divisor(program.expressions, axis)
        if divisor is not None:
            program = _rewrite(program, {floordiv(axis, divisor): B, mod(axis, divisor): H})
            return replace(program, axes=replace(program.axes, b=floordiv(size_expr(extent), divisor), h=divisor))
        return replace(_rewrite(program, {axis: H}), axes=replace(program.axes, h=size_expr(extent)))
    if not live:
        return program
    grouped = _group_size(program, [axis for axis, _ in live])
    outer, inner = live[: len(live) - grouped], live[len(live) - grouped :]
    change: dict[Expr, Expr] = {}
    sizes = []
    for name, part in ((B, outer), (H, inner)):
        total: Expr = ONE
        rest: Expr = name
        for axis, extent in reversed(part[1:]):
            size = size_expr(extent)
            change[axis] = mod(rest, size)
            rest = floordiv(rest, size)
            total = mul(total, size)
        change[part[0][0]] = rest
        sizes.append(mul(total, size_expr(part[0][1])))
    return replace(_rewrite(program, change), axes=replace(program.axes, b=sizes[0], h=sizes[1]))


def _group_size(program: Attention, axes: list[Axis]) -> int:
    """How many of the last batch axes make up h: two when the value does not vary with the last (a group of query heads)."""
    if len(axes) >= 3 and axes[-1].name not in axes_of(program.sum):
        return 2
    return 1


def common_divisor(roots: Iterable[Expr], axis: Axis) -> Expr | None:
    """c, if in all `roots` the `axis` occurs only as axis // c and axis % c for one c."""
    divisors: set[Expr] = set()
    plain = False

    def visit(expr: Expr) -> Expr | None:
        nonlocal plain
        if isinstance(expr, Apply) and expr.op in ("floordiv", "mod") and expr.args[0] == axis:
            divisors.add(expr.args[1])
            return expr
        plain = plain or expr == axis
        return None

    for root in roots:
        transform(root, visit)
    return next(iter(divisors)) if len(divisors) == 1 and not plain else None


def finish(reader: Reader, node: Node, draft: Attention, trained: frozenset[Node]) -> Site:
    """Name the operands, declare them, lift the masks and verify."""
    names = _operand_names(draft, reader)
    renamed = _rename(draft, names)
    operands, decls = [], []
    for old, new in names.items():
        operand = reader.leaves[old]
        shape: list[int | torch.SymInt] = list(shape_of(operand.node)) if not operand.is_seed else [1]
        if operand.channel_place is not None:
            shape.append(shape.pop(operand.channel_place))
        dtype = torch.int64 if operand.is_seed else operand.dtype or dtype_of(operand.node)
        if dtype not in DTYPES:
            raise Unrecognised(f"an operand of dtype {dtype}")
        decls.append(TensorDecl(new, DTYPES[dtype], tuple(size_expr(s) for s in shape)))
        operands.append(operand)
    program = replace(renamed, tensors=tuple(decls))
    program, recovered = _recover(reader, names, program)
    values = reader.leaves[draft.sum.tensor].node
    operands += [Operand(values, table=table) for known in recovered for table in known.recovery.tables.values()]
    declared = [decl.name for decl in program.tensors]
    biases = trained | ranked_nodes(node.graph)  # of which none is a mask
    carrying = frozenset(names[old] for old in names if reader.leaves[old].node in biases)
    passes: tuple[tuple[str, Callable[[Attention], Attention]], ...] = (
        ("recognise", lambda p: p),
        ("lift_mask", lambda p: lift_mask(p, carrying)),
        ("zero_empty_rows", zero_empty_rows),
        ("settle", _settle),
        ("prune", _prune),
    )
    for name, change in passes:
        program = change(program)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("after %s:\n%s", name, to_text(program))
    verify(program)
    known = dict(zip(declared, operands, strict=True))
    before: tuple[Phase, ...] = ()
    unkept: tuple[UnkeptRows, ...] = ()
    selected = select_keys(program, known, reader)
    if selected is not None:
        program, before, unkept = verify(selected.program), (selected.phase,), selected.unkept
        known |= selected.lists
    sizes = size_values(node.graph, program.sizes)
    given = tuple(known[decl.name] for decl in program.tensors)
    return Site(node, program, given, sizes, (), (), recovered=recovered, before=before, unkept=unkept)


def _recover(reader: Reader, names: Mapping[str, str], program: Attention) -> tuple[Attention, tuple[Recovered, ...]]:
    """The program with rules for its constant masks. `names`: of the reader's leaves in the program."""
    nodes = {new: reader.leaves[old].node for old, new in names.items() if reader.leaves[old].is_plain}

    def rule_of(name: str, view: View) -> LiftedTensor | None:
        return reader.masks.of(nodes[name], view) if name in nodes else None

    program, recoveries = lift_constants(program, rule_of)
    recovered = []
    for recovery in recoveries:
        node = nodes[recovery.operand]
        constant = reader.masks.constants.of(node)
        assert constant is not None
        recovered.append(Recovered(node, constant.recipe, recovery))
    return program, tuple(recovered)


def _settle(program: Attention) -> Attention:
    """The one form of a mask: what is declared has it too."""
    sizes = {axis: program.axes.size(axis) for axis in AXES}
    known = {axis: int(size.value) for axis, size in sizes.items() if isinstance(size, Const)}
    predicate = settled(within(program.keep.predicate, known), KV_IDX)
    return replace(program, keep=Keep() if predicate == TRUE else Keep(predicate, program.keep.empty))


def _prune(program: Attention) -> Attention:
    used = {read.tensor for root in program.expressions for read in reads_of(root)}
    return replace(program, tensors=tuple(decl for decl in program.tensors if decl.name in used))


def _operand_names(draft: Attention, reader: Reader) -> dict[str, str]:
    """q, k, v for the main product and the values; for the rest the user's own names, else mask, ids, bias, param or seed."""
    names: dict[str, str] = {}
    taken: set[str] = set()

    def give(old: str, wish: str) -> None:
        if old not in names:
            new, count = wish, 1
            while new in taken:
                count += 1
                new = f"{wish}{count}"
            names[old] = new
            taken.add(new)

    for dot in dots_of(draft.score):
        give(dot.left.tensor, "q")
        give(dot.right.tensor, "k")
    give(draft.sum.tensor, "v")
    for root in draft.expressions:
        for read in reads_of(root):
            if reader.leaves[read.tensor].is_seed:
                give(read.tensor, "seed")
            elif read.tensor not in names:
                node = reader.leaves[read.tensor].node
                give(read.tensor, users_name(node) or _role(dtype_of(node), axes_of(read)))
    return names


# Dynamo's names of a module's tensors and of arguments: l_self_modules_norm_parameters_scale_, l_slopes_
_USERS_NAME = re.compile(r"l_(?:.*_(?:parameters|buffers)_|(?!.*(?:self|modules|kwargs|args)_))([a-z][a-z0-9_]{2,}?)_?")
_RESERVED = {"lse", "rcp", "delta", "reference", "order", "coverage", "dlse", "dot", "uniform", "axes", *OPERATORS}


def users_name(node: Node) -> str:
    """What the user called an input of the graph; "" where that is not known or means something else in a program or a kernel."""
    found = _USERS_NAME.fullmatch(node.meta.get("user_name", "").lower())
    name = found.group(1) if found else ""
    return "" if name in _RESERVED or name.endswith(("_idx", "_value")) or name.startswith(("stride_", "grad_")) else name


def _role(dtype: torch.dtype, axes: frozenset[str]) -> str:
    if dtype is torch.bool:
        return "mask"
    if not dtype.is_floating_point:
        return "ids"
    return "bias" if {"q_idx", "kv_idx"} & axes else "param"


def _rename(program: Attention, names: Mapping[str, str]) -> Attention:
    def visit(expr: Expr) -> Expr | None:
        if isinstance(expr, Read):
            return Read(names[expr.tensor], tuple(transform(i, visit) for i in expr.index))
        return None

    return each_clause(program, lambda expr: transform(expr, visit))


def size_values(graph: Graph, names: Iterable[str]) -> dict[str, Extent]:
    """The graph's own symbols for the run-time integers of a program."""
    wanted = set(names)
    found: dict[str, Extent] = {}
    for extent in _extents(graph):
        if not isinstance(extent, int) and str(extent.node.expr) in wanted:
            found.setdefault(str(extent.node.expr), extent)
    missing = wanted - found.keys()
    if missing:
        raise Unrecognised(f"the size {sorted(missing)[0]} is not available where the attention runs")
    return found


def _extents(graph: Graph) -> Iterator[Extent]:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            yield value
        elif isinstance(value, torch.Tensor):
            yield from value.shape

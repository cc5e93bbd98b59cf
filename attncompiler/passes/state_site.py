"""A recognised linear attention: its program, how its operands are made, what was proved, and what it replaces in the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import (
    ONE,
    ZERO,
    Axis,
    B,
    Const,
    Expr,
    H,
    Read,
    apply,
    axes_of,
    floordiv,
    mod,
    mul,
    reads_of,
    sub,
    substitute,
    transform,
)
from attncompiler.ir.phase_text import program_line, program_text
from attncompiler.ir.phases import Phase, Program, default_results
from attncompiler.ir.program import Origin, TensorDecl
from attncompiler.ir.state import ROW, C, Correction, D, Moment, Query, Start, State, StateAxes
from attncompiler.ir.text import expr_text
from attncompiler.ir.verify import verify
from attncompiler.passes.constant_masks import ConstantMasks
from attncompiler.passes.constants import Recipe
from attncompiler.passes.lift_decay import DecayMatrix
from attncompiler.passes.nodes import DTYPES, Operand, dtype_of, shape_of
from attncompiler.passes.normalise import source_line
from attncompiler.passes.reader import Reader
from attncompiler.passes.separable import Growth, Separated
from attncompiler.passes.site import Recovered, common_divisor, size_values, users_name
from attncompiler.passes.sizes import Extent, size_expr


@dataclass(frozen=True)
class RecoveredDecay:
    """A constant matrix that rates stand for in a program, and how it is made."""

    node: Node
    recipe: Recipe
    recovery: DecayMatrix

    def __str__(self) -> str:
        shape = ", ".join(map(str, shape_of(self.node)))
        how = "it is made of constants" if self.recipe.source is None else "checked at each call"
        rates = f"{len(self.recovery.rates)} rates of decay, by evaluation of every element"
        return f"the constant matrix [{shape}] is lifted to {rates}; {how}"


@dataclass(frozen=True)
class Proof:
    """That the factor of a pair is a product over the steps between its key and its query."""

    factor: Expr
    step: Expr
    growth: Growth
    own_excluded: bool

    def __str__(self) -> str:
        if self.step == ZERO:
            return "proved: a causal mask, under which every key before counts the same"
        until = "q_idx - 1" if self.own_excluded else "q_idx"
        steps = f"the product of exp({expr_text(self.step)}) over the steps kv_idx + 1 .. {until}"
        return f"proved with sympy: {expr_text(self.factor)} is {steps}; {self.growth.value}"


@dataclass(frozen=True)
class StateSite:
    """One linear attention of the graph: `output` is replaced by the program's O, as a `Site`'s is.

    `softmax_nodes` are the nodes that hold a number for each pair (or a state for each step), which must not be read elsewhere;
    `products` the products of scores and values that end here; `saves` what the program is worth, in words."""

    output: Node
    program: State
    operands: tuple[Operand, ...]
    sizes: Mapping[str, Extent]
    split: tuple[Extent, ...]
    permutation: tuple[int, ...]
    softmax_nodes: frozenset[Node]
    products: frozenset[Node]
    saves: str
    proof: tuple[Proof, ...] = ()
    recovered: tuple[Recovered | RecoveredDecay, ...] = ()

    @property
    def line(self) -> str:
        """The program as the op takes it."""
        return program_line(_alone(self.program))

    @property
    def text(self) -> str:
        return program_text(_alone(self.program))


def _alone(state: State) -> Program:
    return Program((Phase(state, default_results(state)),))


Lowerable = Callable[[State], str]  # why no lowering computes a state; "" where one does


@dataclass(frozen=True)
class StateContext:
    """What every look at one graph needs. `equal`: for each node the first one that computes the same."""

    module: GraphModule
    trained: frozenset[Node]
    masks: ConstantMasks
    equal: Mapping[Node, Node]
    lowerable: Lowerable


class NothingToSay(Exception):
    """A product that no one would call linear attention."""


@dataclass(frozen=True)
class Parts:
    """A state whose tensors are still the reader's leaves: vectors without their channel, exp(`step`) the decay, `at` and `moment` what
    a query reads."""

    query: Read
    key: Read
    value: Read
    scale: float
    step: Expr
    weigh: Expr
    at: Expr
    moment: Moment
    queries: Extent
    keys: Extent
    features: Extent
    channels: Extent


def assembled(
    context: StateContext,
    reader: Reader,
    node: Node,
    output: Node,
    parts: Parts,
    batch: Sequence[tuple[Expr, Extent]],
    saves: str,
    proofs: Sequence[Proof] = (),
) -> StateSite:
    """The site that `parts` are, but for how its result lies in the graph; `batch`: the batch axes of `node`, the last the heads.
    Raises: Unrecognised where no lowering computes it."""
    query = _with_channel(parts.query, C)
    last = sub(size_expr(parts.keys), ONE)
    state = State(
        axes=StateAxes(ONE, ONE, *map(size_expr, (parts.queries, parts.keys, parts.features, parts.channels))),
        tensors=(),
        key=_with_channel(parts.key, C),
        value=_with_channel(parts.value, D),
        query=Query(query if parts.scale == 1.0 else mul(query, Const(parts.scale)), parts.moment, parts.at),
        final=last,
        decay=ONE if parts.step == ZERO else apply("exp", parts.step),
        weigh=parts.weigh,
        origin=Origin(source_line(node)),
    )
    change, b, h = _batch_axes(state.expressions, batch)
    state = every_clause(replace(state, axes=replace(state.axes, b=b, h=h)), lambda expr: substitute(expr, change))
    names = _names(reader, state, (parts.query.tensor, parts.key.tensor, parts.value.tensor))

    def renamed(expr: Expr) -> Expr:
        return _renamed(substitute(expr, change), names)

    operands = tuple(reader.leaves[old] for old in names)
    state = every_clause(replace(state, tensors=tuple(map(_declaration, names.values(), operands))), lambda e: _renamed(e, names))
    verify(_alone(state))
    reason = context.lowerable(state)
    if reason:
        raise Unrecognised("a linear attention that no lowering computes", where=state.origin.line, why=reason)
    proved = tuple(replace(proof, factor=renamed(proof.factor), step=renamed(proof.step)) for proof in proofs)
    sizes = size_values(node.graph, state.sizes)
    saved = f"O(N) instead of O(N x N): {saves}"
    return StateSite(output, state, operands, sizes, (), (), frozenset(), frozenset({node}), saved, proved)


def _with_channel(read: Read, channel: Axis) -> Read:
    return Read(read.tensor, (*read.index, channel))


def _batch_axes(roots: Iterable[Expr], batch: Sequence[tuple[Expr, Extent]]) -> tuple[Mapping[Expr, Expr], Expr, Expr]:
    """What the batch axes of the product are in terms of b and h, and the sizes of these: the last is h; a lone one is split if all
    its uses do."""
    live = [(axis, extent) for axis, extent in batch if isinstance(axis, Axis)]
    if not live:
        return {}, ONE, ONE
    if len(live) == 1:
        axis, extent = live[0]
        divisor = common_divisor(roots, axis)
        if divisor is None:
            return {axis: H}, ONE, size_expr(extent)
        return {floordiv(axis, divisor): B, mod(axis, divisor): H}, floordiv(size_expr(extent), divisor), divisor
    if len(live) == 2:
        return {live[0][0]: B, live[1][0]: H}, size_expr(live[0][1]), size_expr(live[1][1])
    raise Unrecognised(
        f"scores with {len(live)} batch axes",
        why="a state has a batch and heads",
        do="flatten the axes of batch, and those of heads",
    )


def every_clause(state: State, change: Callable[[Expr], Expr]) -> State:
    """The state with `change` made in every expression."""
    correct = Correction(change(state.correct.left), change(state.correct.right), state.correct.moment)
    return replace(
        state,
        key=change(state.key), value=change(state.value), decay=change(state.decay), correct=correct,
        query=Query(change(state.query.value), state.query.moment, change(state.query.step)),
        final=change(state.final), start=Start(change(state.start.state), change(state.start.row)), reset=change(state.reset),
        bonus=change(state.bonus), weigh=change(state.weigh),
    )  # fmt: skip


def _declaration(name: str, operand: Operand) -> TensorDecl:
    dtype = operand.dtype or (operand.table.dtype if operand.table is not None else dtype_of(operand.node))
    shape: list[Extent] = list(operand.table.shape if operand.table is not None else shape_of(operand.node))
    if operand.channel_place is not None:
        shape.append(shape.pop(operand.channel_place))
    if dtype not in DTYPES:
        raise Unrecognised(f"an operand of dtype {dtype}")
    return TensorDecl(name, DTYPES[dtype], tuple(map(size_expr, shape)))


def _renamed(expr: Expr, names: Mapping[str, str]) -> Expr:
    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Read) and node != ROW:
            return Read(names.get(node.tensor, node.tensor), tuple(transform(entry, visit) for entry in node.index))
        return None

    return transform(expr, visit)


def _names(reader: Reader, state: State, vectors: tuple[str, str, str]) -> dict[str, str]:
    """q, k and v; for what decays the user's own names, else rate for one number a head and g for one a token."""
    names: dict[str, str] = {}
    for old, wish in zip(vectors, ("q", "k", "v"), strict=True):
        names.setdefault(old, wish)
    for root in state.expressions:
        for read in reads_of(root):
            if read.tensor in names or read == ROW:
                continue
            operand = reader.leaves[read.tensor]
            wish = (users_name(operand.node) if operand.table is None else "") or ("g" if "kv_idx" in axes_of(read) else "rate")
            taken = {*names.values(), ROW.tensor}
            names[read.tensor] = next(n for n in (wish, *(f"{wish}{i}" for i in range(2, 99))) if n not in taken)
    return names


def proof_of(factor: Expr, found: Separated) -> Proof:
    """The proof of what was separated."""
    return Proof(factor, found.step, found.growth, found.own_excluded)


def table_dtype(values: torch.dtype) -> torch.dtype:
    """The type of rates that the compiler makes: wide enough for the states beside values of this type."""
    return torch.float64 if values is torch.float64 else torch.float32

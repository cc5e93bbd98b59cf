"""A recognised linear attention: its program, how its operands are made, what was proved, and what it replaces in the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import ZERO, Expr, Read, axes_of, reads_of, transform
from attncompiler.ir.phase_text import program_line, program_text
from attncompiler.ir.phases import Phase, Program, default_results
from attncompiler.ir.program import TensorDecl
from attncompiler.ir.state import ROW, Correction, Query, Start, State
from attncompiler.ir.text import expr_text
from attncompiler.ir.verify import verify
from attncompiler.passes.constants import Recipe
from attncompiler.passes.lift_decay import DecayMatrix
from attncompiler.passes.nodes import Operand, dtype_of, shape_of
from attncompiler.passes.reader import Reader
from attncompiler.passes.separable import Growth, Separated
from attncompiler.passes.site import DTYPES, Recovered, size_values, users_name
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
        return f"the constant matrix [{shape}] is lifted to {len(self.recovery.rates)} rates of decay, by evaluation of every element; {how}"


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


@dataclass(frozen=True)
class Draft:
    """A state whose tensors are still the reader's leaves. `first`: q, k and v, in order."""

    program: State
    first: tuple[str, str, str]
    proof: tuple[Proof, ...] = ()
    recovered: Mapping[str, RecoveredDecay] = field(default_factory=dict)  # by the leaf that holds the rates


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


def declared(reader: Reader, draft: Draft) -> tuple[State, tuple[Operand, ...], Callable[[Expr], Expr]]:
    """The program with named and declared operands, the operands, and the renaming. Raises: Unrecognised, InvalidProgram."""
    names = _names(reader, draft)

    def visit(expr: Expr) -> Expr | None:
        if isinstance(expr, Read) and expr != ROW:
            return Read(names.get(expr.tensor, expr.tensor), tuple(transform(entry, visit) for entry in expr.index))
        return None

    def renamed(expr: Expr) -> Expr:
        return transform(expr, visit)

    decls, operands = [], []
    for old, new in names.items():
        operand = reader.leaves[old]
        dtype = operand.dtype or (operand.table.dtype if operand.table is not None else dtype_of(operand.node))
        shape: list[Extent] = list(operand.table.shape if operand.table is not None else shape_of(operand.node))
        if operand.channel_place is not None:
            shape.append(shape.pop(operand.channel_place))
        if dtype not in DTYPES:
            raise Unrecognised(f"an operand of dtype {dtype}")
        decls.append(TensorDecl(new, DTYPES[dtype], tuple(map(size_expr, shape))))
        operands.append(operand)
    program = replace(every_clause(draft.program, renamed), tensors=tuple(decls))
    verify(_alone(program))
    return program, tuple(operands), renamed


def finish(reader: Reader, node: Node, draft: Draft) -> tuple[State, tuple[Operand, ...], Mapping[str, Extent], tuple[Proof, ...]]:
    """A declared program, its operands, its run-time sizes and its proofs in the names of the program."""
    program, operands, renamed = declared(reader, draft)
    proof = tuple(replace(p, factor=renamed(p.factor), step=renamed(p.step)) for p in draft.proof)
    return program, operands, size_values(node.graph, program.sizes), proof


def _names(reader: Reader, draft: Draft) -> dict[str, str]:
    """q, k and v; for what decays the user's own names, else rate for one number a head and g for one a token."""
    names: dict[str, str] = {}
    for old, wish in zip(draft.first, ("q", "k", "v"), strict=True):
        names.setdefault(old, wish)
    for root in draft.program.expressions:
        for read in reads_of(root):
            if read.tensor in names or read == ROW:
                continue
            operand = reader.leaves[read.tensor]
            wish = (users_name(operand.node) if operand.table is None else "") or ("g" if "kv_idx" in axes_of(read) else "rate")
            names[read.tensor] = next(n for n in (wish, *(f"{wish}{i}" for i in range(2, 99))) if n not in (*names.values(), "row"))
    return names


def proof_of(factor: Expr, found: Separated, step: Expr) -> Proof:
    """The proof of what was separated, with `factor` and `step` in the program's axes."""
    return Proof(factor, step, found.growth, found.own_excluded)


def table_dtype(values: torch.dtype) -> torch.dtype:
    """The type of rates that the compiler makes: wide enough for the states beside values of this type."""
    return torch.float64 if values is torch.float64 else torch.float32

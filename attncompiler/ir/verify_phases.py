"""The invariants of tables, of states and of programs of several phases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from attncompiler.ir.expr import AXES, KV_IDX, Q_IDX, B, Dot, Expr, H, Kind, Read, Uniform, axes_of, reads_of, walk
from attncompiler.ir.phases import Program
from attncompiler.ir.program import Dtype, TensorDecl, kind_of
from attncompiler.ir.select import Positions, TopSum
from attncompiler.ir.state import ROW, SEGMENT, STATE_AXES, C, D, State
from attncompiler.ir.tables import Each, Fold, Reduce, Table, Tables
from attncompiler.ir.verify import invariant, verify

# ----------------------------------------------------------------------------------------------------------- tables


@invariant(Tables, "names of tensors, tables, axes and sizes are distinct")
def distinct_names(program: Tables) -> bool:
    names = [decl.name for decl in program.tensors] + [table.name for table in program.tables]
    names += [axis.name for axis, _ in program.axes] + list(program.sizes)
    return len(set(names)) == len(names)


@invariant(Tables, "a table reads declared tensors and tables above it, and every declared tensor is read")
def read_in_order(program: Tables) -> bool:
    known = {decl.name for decl in program.tensors}
    read: set[str] = set()
    for table in program.tables:
        found = {node.tensor for node in _reads(table)}
        if not found <= known:
            return False
        known.add(table.name)
        read |= found
    return {decl.name for decl in program.tensors} <= read


@invariant(Tables, "an equation has declared axes, each once, at least one on its left")
def declared_axes(program: Tables) -> bool:
    axes = {axis for axis, _ in program.axes}
    return all(
        table.axes
        and {*table.axes, *table.form.over} <= axes
        and len(set(table.axes)) == len(table.axes)
        and len(set(table.form.over)) == len(table.form.over)
        for table in program.tables
    )


@invariant(Tables, "a table reads elements: an index has one entry for each dimension; products are sums over an axis, not `dot`")
def elements(program: Tables) -> bool:
    nodes = [node for root in program.expressions for node in walk(root)]
    return not any(isinstance(node, Dot) for node in nodes) and all(
        len(node.index) == len(program.decls[node.tensor].shape) for node in nodes if isinstance(node, Read)
    )


@invariant(Tables, "the axes that a form runs along are on the left if it keeps them (softmax, cumsum, top_k, top_sum), else not")
def sides_of_axes(program: Tables) -> bool:
    return all((axis in table.axes) == table.form.keeps for table in program.tables for axis in table.form.over)


@invariant(Tables, "a form other than a plain value runs along an axis, and a list has an axis of its own on the left")
def runs_along(program: Tables) -> bool:
    forms = [(table, table.form) for table in program.tables if not isinstance(table.form, Each)]
    return all(
        form.over and (form.into is None or (form.into in table.axes and form.into not in form.over)) for table, form in forms
    )


@invariant(Tables, "what an equation computes varies over the axes on its left and those it runs along, its limits over its rows")
def axes_of_equations(program: Tables) -> bool:
    def within(expr: Expr, names: set[str]) -> bool:
        return axes_of(expr) <= names and not any(isinstance(n, Uniform) and not n.at for n in walk(expr))

    for table in program.tables:
        rows = {axis.name for axis in table.rows}
        inside = rows | {axis.name for axis in table.form.over}
        if not all(within(expr, inside) for expr in table.form.inputs):
            return False
        if not all(within(expr, rows) for expr in table.form.limits):
            return False
    return True


@invariant(Tables, "`where`, what any and all fold, and what positions lists are predicates; what the other forms take are numbers")
def kinds_of_inputs(program: Tables) -> bool:
    def right(table: Table) -> bool:
        form, decls = table.form, program.decls
        kinds = [kind_of(expr, decls) for expr in form.inputs]
        if isinstance(form, Each):
            return True
        truth = isinstance(form, Positions) or (isinstance(form, Reduce) and form.by in (Fold.ANY, Fold.ALL))
        return (kinds[0] is Kind.BOOL) == truth and all(kind is Kind.BOOL for kind in kinds[1:])

    return all(right(table) for table in program.tables)


@invariant(Tables, "k and `least` are integers, and `need` is a number")
def kinds_of_limits(program: Tables) -> bool:
    def right(table: Table) -> bool:
        kinds = [kind_of(expr, program.decls) for expr in table.form.limits]
        if isinstance(table.form, TopSum):
            return kinds[0] is not Kind.BOOL and kinds[1] is Kind.INT
        return all(kind is Kind.INT for kind in kinds)

    return all(right(table) for table in program.tables)


@invariant(Tables, "indices are integers")
def integer_indices(program: Tables) -> bool:
    return _integer_indices(tuple(program.expressions), dict(program.decls))


def _integer_indices(roots: tuple[Expr, ...], decls: dict[str, TensorDecl]) -> bool:
    nodes = (node for root in roots for node in walk(root))
    return all(kind_of(entry, decls) is Kind.INT for node in nodes if isinstance(node, Read) for entry in node.index)


def _reads(table: Table) -> Iterator[Read]:
    for expr in (*table.form.inputs, *table.form.limits):
        yield from reads_of(expr)


# ------------------------------------------------------------------------------------------------------------ state

_VARIES = {
    "key": (B, H, KV_IDX, C), "value": (B, H, KV_IDX, D), "query": (B, H, Q_IDX, C), "the step of a query": (B, H, Q_IDX),
    "decay": (B, H, KV_IDX, C, D), "the left side of a correction": (B, H, KV_IDX, C),
    "the right side of a correction": (B, H, KV_IDX, C), "start": (B, H, KV_IDX, C, D), "the start of rows": (B, H, KV_IDX, C),
    "reset": (B, H, KV_IDX), "bonus": (B, H, KV_IDX, C), "weigh": (B, H, Q_IDX), "final": (B, SEGMENT),
}  # fmt: skip


@invariant(State, "names of tensors are distinct, and are no names of axes, of sizes or `row`")
def state_names(program: State) -> bool:
    names = [decl.name for decl in program.tensors]
    taken = {axis.name for axis in STATE_AXES} | {ROW.tensor, *program.sizes}
    return len(set(names)) == len(names) and not set(names) & taken


@invariant(State, "every tensor that is read is declared, and every declared tensor is read; `row` is read by weigh alone")
def state_declared(program: State) -> bool:
    used = {read.tensor for name, root in program.clauses.items() for read in reads_of(root) if (name, read) != ("weigh", ROW)}
    return used == {decl.name for decl in program.tensors}


@invariant(State, "a state reads elements: an index has one integer for each dimension, and there is no `dot` and no draw")
def state_elements(program: State) -> bool:
    nodes = [node for root in program.expressions for node in walk(root)]
    ranks = (len(node.index) == len(program.decls[node.tensor].shape) for node in nodes if isinstance(node, Read))
    drawn = any(isinstance(node, Dot | Uniform) for node in nodes)
    return not drawn and all(ranks) and _integer_indices(program.expressions, dict(program.decls))


def _varies(clause: str) -> None:
    axes = _VARIES[clause]

    @invariant(State, f"{clause} varies over {', '.join(axis.name for axis in axes)} only")
    def holds(program: State) -> bool:
        return axes_of(program.clauses[clause]) <= {axis.name for axis in axes}


for _clause in _VARIES:
    _varies(_clause)


@invariant(State, "reset is a predicate, the steps of query and final are integers, and all else are numbers")
def kinds_of_clauses(program: State) -> bool:
    kinds = {name: kind_of(expr, program.decls) for name, expr in program.clauses.items()}
    steps = {kinds.pop("the step of a query"), kinds.pop("final")}
    return kinds.pop("reset") is Kind.BOOL and steps == {Kind.INT} and Kind.BOOL not in kinds.values()


@invariant(State, "a state with a normaliser decays alike in all channels of the value, since rows have none")
def rows_decay(program: State) -> bool:
    return not program.normalised or D.name not in axes_of(program.decay)


# ---------------------------------------------------------------------------------------------------------- phases


@invariant(Program, "a program has a phase, and every phase is valid by itself")
def valid_phases(program: Program) -> bool:
    return bool(program.phases) and all(verify(phase.work) is phase.work for phase in program.phases)


@invariant(Program, "a phase gives what it says: tables that it defines, or as many names as an attention or a state has results")
def given(program: Program) -> bool:
    return all(phase.results and len(phase.given) == len(phase.results) for phase in program.phases)


@invariant(Program, "what phases give has distinct names, which are no names of axes, sizes or operands")
def distinct_results(program: Program) -> bool:
    names = [name for phase in program.phases for name in phase.results]
    taken = {*program.sizes, *(axis.name for axis in (*AXES, *STATE_AXES)), ROW.tensor}
    for place, phase in enumerate(program.phases):
        given = {name for earlier in program.phases[:place] for name in earlier.results}
        taken |= {decl.name for decl in phase.work.tensors} - given
    return len(set(names)) == len(names) and not set(names) & taken


@invariant(
    Program, "a tensor is declared alike in all phases, a result with its sizes and its type, or as an i32 that is given as i64"
)
def one_declaration(program: Program) -> bool:
    known = dict(program.operands) | dict(program.given)
    return all(_fits(decl, known[decl.name], program) for phase in program.phases for decl in phase.work.tensors)


def _fits(decl: TensorDecl, known: TensorDecl, program: Program) -> bool:
    """Positions of tokens fit 32 bits: a lowering may hand these on."""
    narrow = decl.name in program.given and known.dtype is Dtype.I64 and decl.dtype is Dtype.I32
    return replace(decl, dtype=known.dtype) == known if narrow else decl == known


@invariant(Program, "every phase but the last gives something that a later one reads")
def phases_are_used(program: Program) -> bool:
    later: set[str] = set()
    for place, phase in reversed(list(enumerate(program.phases))):
        if place < len(program.phases) - 1 and not set(phase.results) & later:
            return False
        later |= {decl.name for decl in phase.work.tensors}
    return True

"""Tables, states and programs of several phases as text, and back. The text of one attention is what text.py makes of it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from attncompiler.errors import ParseError
from attncompiler.ir.expr import FALSE, ONE, TRUE, ZERO, Axis, Expr, Kind, sub
from attncompiler.ir.phases import Phase, Program, Work, default_results
from attncompiler.ir.program import Attention
from attncompiler.ir.select import Argsort, Positions, TopK, TopSum
from attncompiler.ir.state import SEGMENT, STATE_AXES, Correction, Moment, Query, Start, State, StateAxes
from attncompiler.ir.tables import Along, Each, Fold, Form, Reduce, Run, Table, Tables
from attncompiler.ir.text import (
    attention_of,
    build,
    clauses_of,
    declarations,
    declarations_text,
    expr_text,
    header_text,
    keywords,
    lines_of,
    origin_of,
    parse_expr,
    sizes_text,
    syntax,
    to_text,
)


def program_text(program: Program) -> str:
    """The phases one after another; `parse_program` gives them back."""
    return "".join(map(_phase_text, program.phases))


def program_line(program: Program) -> str:
    """The program on one line, as an operator's argument."""
    return program_text(program).replace("\n", "\\n")


def _phase_text(phase: Phase) -> str:
    text = work_text(phase.work)
    if isinstance(phase.work, Tables) or phase.results != default_results(phase.work):
        text += f"  return  {', '.join(phase.results)}\n"
    return text


def work_text(work: Work) -> str:
    """One phase, without the names of its results."""
    if isinstance(work, Attention):
        return to_text(work)
    return _tables_text(work) if isinstance(work, Tables) else _state_text(work)


def _tables_text(tables: Tables) -> str:
    lines = [header_text("tables", tables.origin)]
    lines.append(f"  axes    {', '.join(f'{axis.name}={expr_text(size)}' for axis, size in tables.axes)}")
    lines.append(f"  read    {declarations_text(tables.tensors)}")
    for table in tables.tables:
        lines.append(f"  {_keyword(tables, table):7} {table.name}[{sizes_text(table.axes)}] = {_form_text(table.form)}")
    return "\n".join(lines) + "\n"


def _keyword(tables: Tables, table: Table) -> str:
    return "let" if tables.decls[table.name].dtype.kind is Kind.FLOAT else "select"


def _form_text(form: Form) -> str:
    match form:
        case Each():
            return expr_text(form.value)
        case Reduce() | Along():
            name, values = (form.by if isinstance(form, Reduce) else form.run).value, [form.value]
        case TopK():
            name, values = "top_k", [form.value, form.k]
        case TopSum():
            name, values = "top_sum", [form.value, form.need]
        case Argsort():
            name, values = "argsort", [form.value]
        case Positions():
            name, values = "positions", [form.predicate]
    words = [expr_text(value) for value in values]
    words.append(f"over={form.over[0].name}" if len(form.over) == 1 else f"over=({sizes_text(form.over)})")
    words += [f"into={form.into.name}"] if form.into is not None else []
    words += [f"where={expr_text(form.inputs[1])}"] if form.inputs[1:] and form.inputs[1] != TRUE else []
    words += [f"least={expr_text(form.limits[1])}"] if form.limits[1:] and form.limits[1] != ZERO else []
    words += ["descending=True"] if isinstance(form, Argsort) and form.descending else []
    return f"{name}({', '.join(words)})"


def _state_text(state: State) -> str:
    axes = [f"{axis.name}={expr_text(state.axes.size(axis))}" for axis in STATE_AXES if axis != SEGMENT]
    axes += [f"segment={expr_text(state.axes.segment)}"] if state.axes.segment != ONE else []
    lines = [header_text("state", state.origin), f"  axes    {', '.join(axes)}", f"  read    {declarations_text(state.tensors)}"]
    start, correct, query = state.start, state.correct, state.query
    if start != Start():
        row = f", {expr_text(start.row)}" if start.row != Start().row else ""
        lines.append(f"  start   {expr_text(start.state)}{row}")
    if state.reset != FALSE:
        lines.append(f"  reset   {expr_text(state.reset)}")
    if state.decay != ONE:
        lines.append(f"  decay   {expr_text(state.decay)}")
    if correct != Correction():
        lines.append(f"  correct {expr_text(correct.left)}, {expr_text(correct.right)} {correct.moment.value} decay")
    lines.append(f"  write   {expr_text(state.key)}, {expr_text(state.value)}")
    lines.append(f"  query   {expr_text(query.value)} {query.moment.value} {expr_text(query.step)}")
    if state.bonus != ZERO:
        lines.append(f"  bonus   {expr_text(state.bonus)}")
    if state.weigh != ONE:
        lines.append(f"  weigh   {expr_text(state.weigh)}")
    if state.final != _last(state.axes.kv_idx):
        lines.append(f"  final   after {expr_text(state.final)}")
    return "\n".join(lines) + "\n"


def _last(keys: Expr) -> Expr:
    return sub(keys, ONE)


# ---------------------------------------------------------------------------------------------------------- parsing


@functools.lru_cache(maxsize=4096)
def parse_program(text: str) -> Program:
    """The program that `program_text` or `to_text` printed, as lines or as one. Raises: ParseError naming the clause."""
    blocks: list[list[str]] = []
    for line in lines_of(text):
        if line.split("#")[0].strip() in ("attention", "tables", "state"):
            blocks.append([line])
        elif blocks:
            blocks[-1].append(line)
        else:
            raise ParseError("a program begins with the line 'attention', 'tables' or 'state'")
    if not blocks:
        raise ParseError("a program begins with the line 'attention', 'tables' or 'state'")
    return Program(tuple(map(_phase, blocks)))


def _phase(lines: Sequence[str]) -> Phase:
    kind = lines[0].split("#")[0].strip()
    returns = [line.split(maxsplit=1)[1] for line in lines if line.split()[0] == "return" and len(line.split()) > 1]
    others = [line for line in lines if line.split()[0] != "return"]
    work: Work = attention_of(others) if kind == "attention" else _tables(others) if kind == "tables" else _state(others)
    if len(returns) > 1 or (isinstance(work, Tables) and not returns):
        raise ParseError(f"the clause 'return' is {'repeated' if returns else 'missing'}", where=work.origin.line)
    if returns:
        return Phase(work, tuple(name.strip() for name in returns[0].split(",")))
    assert not isinstance(work, Tables)
    return Phase(work, default_results(work))


def _tables(lines: Sequence[str]) -> Tables:
    equations = [line.split(maxsplit=1) for line in lines if line.split()[0] in ("let", "select")]
    clauses = clauses_of([line for line in lines[1:] if line.split()[0] not in ("let", "select")], ("axes", "read"), ())
    sizes = keywords(clauses["axes"])
    axes = {name: Axis(name) for name in sizes}
    found = tuple(_table(words[1] if len(words) > 1 else "", axes) for words in equations)
    sized = tuple((axes[name], size) for name, size in sizes.items())
    tables = Tables(sized, declarations(clauses["read"]), found, origin_of(lines[0]))
    for words, table in zip(equations, found, strict=True):
        if _is_known(tables, table) and words[0] != _keyword(tables, table):
            holds = "numbers" if words[0] == "select" else "truths or integers"
            raise ParseError(f"{table.name} holds {holds}: it is defined by {_keyword(tables, table)}, not {words[0]}")
    return tables


def _is_known(tables: Tables, table: Table) -> bool:
    """Whether what a table holds can be said; where it reads what nothing declares, the verifier says so."""
    try:
        return table.name in tables.decls
    except KeyError:
        return False


def _table(text: str, axes: Mapping[str, Axis]) -> Table:
    try:
        statement = ast.parse(text).body
    except SyntaxError as error:
        raise ParseError(f"not an equation: {text!r}", why=str(error)) from None
    match statement:
        case [ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name), slice=index)], value=value)]:
            return Table(name, _axes(index, axes), _form(value, axes))
    raise ParseError(f"a table is defined as name[axes] = ..., not {text!r}")


def _axes(node: ast.expr, axes: Mapping[str, Axis]) -> tuple[Axis, ...]:
    names = [build(entry, axes) for entry in (node.elts if isinstance(node, ast.Tuple) else [node])]
    found = tuple(name for name in names if isinstance(name, Axis))
    if len(found) < len(names):
        raise ParseError(f"{ast.unparse(node)!r} is no axis, nor several of them", do=f"the axes are {', '.join(axes)}")
    return found


_FOLDS = {fold.value: fold for fold in Fold}
_RUNS = {run.value: run for run in Run}
_OPTIONS = {
    **dict.fromkeys((*_FOLDS, *_RUNS), (1, {"where"})),
    "top_k": (2, {"where"}), "top_sum": (2, {"where", "least"}), "argsort": (1, {"into", "where", "descending"}),
    "positions": (1, {"into"}),
}  # fmt: skip


def _form(node: ast.expr, axes: Mapping[str, Axis]) -> Form:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _OPTIONS):
        return Each(build(node, axes))
    name, words = node.func.id, {str(word.arg): word.value for word in node.keywords}
    count, known = _OPTIONS[name]
    if len(node.args) != count or "over" not in words or words.keys() - known - {"over"} or ("into" in known) > ("into" in words):
        given = ", ".join(("over", *sorted(known)))
        raise ParseError(f"not a form: {ast.unparse(node)!r}", why=f"{name} takes {count} values and {given}")
    values = [build(arg, axes) for arg in node.args]
    over = _axes(words["over"], axes)
    where = build(words["where"], axes) if "where" in words else TRUE
    if name in _FOLDS:
        return Reduce(_FOLDS[name], values[0], over, where)
    if name in _RUNS:
        return Along(_RUNS[name], values[0], over, where)
    if name == "top_k":
        return TopK(values[0], values[1], over, where)
    if name == "top_sum":
        cut = TopSum(values[0], values[1], over, where)
        return replace(cut, least=build(words["least"], axes)) if "least" in words else cut
    (into,) = _axes(words["into"], axes)
    if name == "argsort":
        return Argsort(values[0], over, into, where, build(words["descending"]) == TRUE if "descending" in words else False)
    return Positions(values[0], over, into)


_OF_STATE = {axis.name: axis for axis in STATE_AXES}


def _state(lines: Sequence[str]) -> State:
    others = ("start", "reset", "decay", "correct", "bonus", "weigh", "final")
    clauses = clauses_of(lines[1:], ("axes", "read", "write", "query"), others)
    sizes = keywords(clauses["axes"])
    if not sizes.keys() <= _OF_STATE.keys() <= sizes.keys() | {"segment"}:
        raise ParseError(f"axes are {', '.join(_OF_STATE)}, segment or not", where=clauses["axes"])
    axes = StateAxes(**sizes)
    start = _pair(clauses["start"]) if "start" in clauses else ()
    write = _pair(clauses["write"])
    if len(write) != 2:
        raise ParseError(f"write is 'KEY, VALUE', not {clauses['write']!r}")
    final = clauses.get("final", f"after {expr_text(_last(axes.kv_idx))}")
    if not final.startswith("after "):
        raise ParseError(f"final is 'after STEP', not {final!r}")

    def optional(name: str, without: Expr) -> Expr:
        return parse_expr(clauses[name], _OF_STATE) if name in clauses else without

    return State(
        axes=axes,
        tensors=declarations(clauses["read"]),
        key=write[0],
        value=write[1],
        query=_query(clauses["query"]),
        final=parse_expr(final.removeprefix("after "), _OF_STATE),
        decay=optional("decay", ONE),
        correct=_correction(clauses["correct"]) if "correct" in clauses else Correction(),
        start=Start(*start),
        reset=optional("reset", FALSE),
        bonus=optional("bonus", ZERO),
        weigh=optional("weigh", ONE),
        origin=origin_of(lines[0]),
    )


def _pair(text: str) -> tuple[Expr, ...]:
    node = syntax(text)
    parts = tuple(build(part, _OF_STATE) for part in (node.elts if isinstance(node, ast.Tuple) else [node]))
    if len(parts) > 2:
        raise ParseError(f"at most two expressions, not {text!r}")
    return parts


def _correction(text: str) -> Correction:
    for moment in Moment:
        sides, separator, rest = text.rpartition(f" {moment.value} decay")
        if separator and not rest and len(pair := _pair(sides)) == 2:
            return Correction(pair[0], pair[1], moment)
    raise ParseError(f"correct is 'LEFT, RIGHT after decay' or 'before decay', not {text!r}")


def _query(text: str) -> Query:
    for moment in Moment:
        value, separator, step = text.partition(f" {moment.value} ")
        if separator:
            return Query(parse_expr(value, _OF_STATE), moment, parse_expr(step, _OF_STATE))
    raise ParseError(f"query is 'EXPRESSION after STEP' or 'before STEP', not {text!r}")

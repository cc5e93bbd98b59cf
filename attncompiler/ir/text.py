"""A program as text, and back. The text is what `explain` shows, what tests compare and what the registered op carries.

attention                                              # model.py:41
  axes    b=B, h=8, q_idx=M, kv_idx=N
  read    q: bf16[B, 8, M, 64], k: bf16[B, 2, N, 64], v: bf16[B, 2, N, 64]
  score   dot(q[b, h, q_idx], k[b, h // 4, kv_idx]) * 0.125
  keep    kv_idx <= q_idx else nan
  weigh   softmax
  sum     v[b, h // 4, kv_idx]

`weigh softmax(sink[h], 0.0)` lists extra scores; `adjust` is printed when it is not 1, `keep` when it drops a pair, and
`route gain[b, q_idx, h] where active[b, q_idx, h]` where heads are routed. Other nodes, and programs of phases: phase_text.py.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Mapping, Sequence

from attncompiler.errors import ParseError
from attncompiler.ir.expr import (
    AXES,
    ONE,
    OPERATORS,
    Apply,
    Axis,
    Const,
    Dot,
    Expr,
    Read,
    Size,
    Uniform,
    apply,
)
from attncompiler.ir.program import Attention, Axes, Dtype, Empty, Keep, Origin, Route, Softmax, TensorDecl

# Python's own precedences, so that the text reads and parses as Python.
_PRECEDENCE = {
    "or": 4, "xor": 5, "and": 6, "eq": 3, "ne": 3, "lt": 3, "le": 3, "gt": 3, "ge": 3,
    "add": 8, "sub": 8, "mul": 9, "div": 9, "floordiv": 9, "mod": 9, "neg": 10, "not": 10, "pow": 11,
}  # fmt: skip
_COMPARISON = 3
_AXES_BY_NAME = {axis.name: axis for axis in AXES}


def expr_text(expr: Expr) -> str:
    """`expr` as Python source over the axes, sizes and tensors by name."""
    return _print(expr)[0]


def _print(expr: Expr) -> tuple[str, int]:
    atom = 100
    if isinstance(expr, Const):
        text = _number(expr.value)
        return text, atom if not text.startswith("-") else _PRECEDENCE["neg"]
    if isinstance(expr, Axis | Size):
        return expr.name, atom
    if isinstance(expr, Read):
        return f"{expr.tensor}[{sizes_text(expr.index)}]", atom
    if isinstance(expr, Dot):
        return f"dot({expr_text(expr.left)}, {expr_text(expr.right)})", atom
    if isinstance(expr, Uniform):
        return f"uniform({sizes_text(expr.children)})", atom
    assert isinstance(expr, Apply)
    symbol = OPERATORS[expr.op].symbol
    if not symbol:
        return f"{expr.op}({', '.join(expr_text(arg) for arg in expr.args)})", atom
    level = _PRECEDENCE[expr.op]
    if len(expr.args) == 1:
        return f"{symbol}{_wrapped(expr.args[0], level)}", level
    left, right = expr.args
    tight = level + 1
    if level == _COMPARISON or expr.op == "pow":  # neither chains to the left
        return f"{_wrapped(left, tight)} {symbol} {_wrapped(right, tight)}", level
    return f"{_wrapped(left, level)} {symbol} {_wrapped(right, tight)}", level


def _wrapped(expr: Expr, minimum: int) -> str:
    text, level = _print(expr)
    return text if level >= minimum else f"({text})"


def _number(value: bool | int | float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return repr(value)


def to_text(program: Attention) -> str:
    """The whole program; `parse` gives it back, origin included."""
    axes = ", ".join(f"{axis.name}={expr_text(program.axes.size(axis))}" for axis in AXES)
    extra = ", ".join(expr_text(e) for e in program.weigh.extra)
    lines = [
        header_text("attention", program.origin),
        f"  axes    {axes}",
        f"  read    {declarations_text(program.tensors)}",
        f"  score   {expr_text(program.score)}",
    ]
    if program.keep != Keep():
        lines.append(f"  keep    {expr_text(program.keep.predicate)} else {program.keep.empty.value}")
    lines.append(f"  weigh   softmax({extra})" if extra else "  weigh   softmax")
    if program.adjust != ONE:
        lines.append(f"  adjust  {expr_text(program.adjust)}")
    lines.append(f"  sum     {expr_text(program.sum)}")
    if program.route != Route():
        lines.append(f"  route   {expr_text(program.route.gain)} where {expr_text(program.route.active)}")
    return "\n".join(lines) + "\n"


def header_text(kind: str, origin: Origin) -> str:
    """The first line of a program or of a phase."""
    return kind + (f"  # {origin.line}" if origin.line else "")


def declarations_text(tensors: Sequence[TensorDecl]) -> str:
    """The body of a `read` clause."""
    return ", ".join(f"{d.name}: {_declared(d)}" for d in tensors)


def _declared(decl: TensorDecl) -> str:
    text = f"{decl.dtype.value}[{sizes_text(decl.shape)}]"
    for fact, holds in (("ascending", decl.ascending), ("const", decl.constant)):
        text = f"{fact}({text})" if holds else text
    return text


def sizes_text(shape: tuple[Expr, ...]) -> str:
    """Sizes or index entries, separated by commas."""
    return ", ".join(expr_text(size) for size in shape) or "()"


# ---------------------------------------------------------------------------------------------------------- parsing

_BINARY = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod", ast.Pow: "pow",
    ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor",
}  # fmt: skip
_UNARY = {ast.USub: "neg", ast.Invert: "not"}
_COMPARE = {ast.Eq: "eq", ast.NotEq: "ne", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge"}


def parse_expr(text: str, axes: Mapping[str, Axis] = _AXES_BY_NAME) -> Expr:
    """The expression that `text` prints. Names that are not axes are run-time sizes.

    Raises: ParseError with the offending piece."""
    return build(syntax(text), axes)


def syntax(text: str) -> ast.expr:
    """`text` as an expression of Python. Raises: ParseError."""
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ParseError(f"not an expression: {text.strip()!r}", why=str(error)) from None


def build(node: ast.expr, axes: Mapping[str, Axis] = _AXES_BY_NAME) -> Expr:
    """The expression that a piece of Python's syntax says. Raises: ParseError."""

    def go(node: ast.expr) -> Expr:
        match node:
            case ast.Constant(value=bool() | int() | float() as value):
                return Const(value)
            case ast.Name(id=name):
                if name in axes:
                    return axes[name]
                if name in ("inf", "nan"):
                    return Const(float(name))
                return Size(name)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return apply(_UNARY[type(op)], go(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return apply(_BINARY[type(op)], go(left), go(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                return apply(_COMPARE[type(op)], go(left), go(right))
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                entries = index.elts if isinstance(index, ast.Tuple) else [index]
                return Read(name, tuple(go(entry) for entry in entries))
            case ast.Call(func=ast.Name(id="dot"), args=[left, right], keywords=[]):
                a, b = go(left), go(right)
                if isinstance(a, Read) and isinstance(b, Read):
                    return Dot(a, b)
            case ast.Call(func=ast.Name(id="uniform"), args=[seed, *at], keywords=[]) if len(at) in (0, 2):
                read = go(seed)
                if isinstance(read, Read):
                    return Uniform(read, tuple(go(place) for place in at))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in OPERATORS:
                if len(args) == OPERATORS[name].arity:
                    return apply(name, *(go(arg) for arg in args))
        raise ParseError(f"not in the language: {ast.unparse(node)!r}", do="see docs/language.md for the operators")

    return go(node)


def to_line(program: Attention) -> str:
    """The program on one line, as an operator's argument: compilers print arguments into comments."""
    return to_text(program).replace("\n", "\\n")


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Attention:
    """The attention that `to_text` or `to_line` printed. Raises: ParseError naming the clause."""
    lines = lines_of(text)
    if not lines or lines[0].split("#")[0].strip() != "attention":
        raise ParseError("a program begins with the line 'attention'")
    return attention_of(lines)


def lines_of(text: str) -> list[str]:
    """The lines of a program, printed as lines or as one."""
    return [line for line in text.replace("\\n", "\n").splitlines() if line.strip()]


def attention_of(lines: Sequence[str]) -> Attention:
    """The attention of these lines, header and clauses."""
    needed, others = ("axes", "read", "score", "weigh", "sum"), ("keep", "adjust", "route")
    clauses = clauses_of(lines[1:], needed, others)
    sizes = keywords(clauses["axes"])
    if sizes.keys() != _AXES_BY_NAME.keys():
        raise ParseError(f"axes are {', '.join(_AXES_BY_NAME)}", where=clauses["axes"])
    value = parse_expr(clauses["sum"])
    if not isinstance(value, Read):
        raise ParseError(f"sum takes one tensor read, not {clauses['sum']!r}")
    return Attention(
        axes=Axes(**sizes),
        tensors=declarations(clauses["read"]),
        score=parse_expr(clauses["score"]),
        keep=_keep(clauses.get("keep", "True else nan")),
        weigh=_weigh(clauses["weigh"]),
        adjust=parse_expr(clauses.get("adjust", "1")),
        sum=value,
        route=_route(clauses.get("route", "1 where True")),
        origin=origin_of(lines[0]),
    )


def origin_of(header: str) -> Origin:
    """The user's line that a header names."""
    return Origin(header.partition("#")[2].strip())


def clauses_of(lines: Sequence[str], needed: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """The body of each clause by its name. Raises: ParseError for a clause that is unknown, repeated or missing."""
    clauses: dict[str, str] = {}
    for line in lines:
        name, _, body = line.strip().partition(" ")
        if name not in (*needed, *others) or name in clauses:
            raise ParseError(f"unknown or repeated clause {name!r}")
        clauses[name] = body.strip()
    missing = sorted(set(needed) - clauses.keys())
    if missing:
        raise ParseError(f"the program has no clause {missing[0]!r}")
    return clauses


def keywords(text: str) -> dict[str, Expr]:
    """The body of an `axes` clause."""
    call = syntax(f"axes({text})")
    assert isinstance(call, ast.Call)
    return {str(word.arg): build(word.value) for word in call.keywords}


def declarations(text: str) -> tuple[TensorDecl, ...]:
    """The body of a `read` clause."""
    mapping = syntax("{" + text + "}")
    decls = []
    for key, spec in zip(mapping.keys, mapping.values, strict=True) if isinstance(mapping, ast.Dict) else ():
        facts = set()
        while isinstance(spec, ast.Call) and ast.unparse(spec.func) in ("const", "ascending") and len(spec.args) == 1:
            facts.add(ast.unparse(spec.func))
            spec = spec.args[0]
        if not (isinstance(key, ast.Name) and isinstance(spec, ast.Subscript) and isinstance(spec.value, ast.Name)):
            raise ParseError(f"a tensor is declared as name: dtype[sizes], not {text!r}")
        entries = spec.slice.elts if isinstance(spec.slice, ast.Tuple) else [spec.slice]
        shape = tuple(build(entry) for entry in entries)
        decls.append(TensorDecl(key.id, Dtype(spec.value.id), shape, "const" in facts, "ascending" in facts))
    return tuple(decls)


def _keep(text: str) -> Keep:
    predicate, separator, empty = text.rpartition(" else ")
    if not separator or empty not in {e.value for e in Empty}:
        raise ParseError(f"keep is written 'PREDICATE else nan|zero|score', not {text!r}")
    return Keep(parse_expr(predicate), Empty(empty))


def _route(text: str) -> Route:
    gain, separator, active = text.partition(" where ")
    if not separator:
        raise ParseError(f"route is written 'GAIN where PREDICATE', not {text!r}")
    return Route(parse_expr(active), parse_expr(gain))


def _weigh(text: str) -> Softmax:
    call = syntax(text)
    if isinstance(call, ast.Name) and call.id == "softmax":
        return Softmax()
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "softmax":
        return Softmax(tuple(build(arg) for arg in call.args))
    raise ParseError(f"weigh is softmax or softmax(extra scores), not {text!r}")

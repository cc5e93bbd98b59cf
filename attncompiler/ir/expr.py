"""Scalar expressions over the axes of an attention: the language of the score, keep and adjust clauses.

An expression has one value for each (b, h, q_idx, kv_idx). Smart constructors simplify what is exact on integers, so that equal
index arithmetic has equal trees; floating-point arithmetic is kept as the user wrote it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce


class Kind(enum.Enum):
    """What an expression evaluates to."""

    BOOL = "bool"
    INT = "int"
    FLOAT = "float"


class Expr:
    """Base of all expressions. Frozen, compared by value; the hash is computed once."""

    __slots__ = ()

    @property
    def children(self) -> tuple[Expr, ...]:
        return ()

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        """The same node over other children; simplifies as the constructors do."""
        return self


@dataclass(frozen=True, slots=True)
class Const(Expr):
    """A literal. Floats keep -inf, inf and nan."""

    value: bool | int | float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and type(self.value) is type(other.value) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash((type(self.value), repr(self.value)))


@dataclass(frozen=True, slots=True)
class Axis(Expr):
    """One of the four axes: b, h, q_idx or kv_idx, an integer that counts from 0."""

    name: str


@dataclass(frozen=True, slots=True)
class Size(Expr):
    """A run-time integer: a dimension or a position offset."""

    name: str


@dataclass(frozen=True, slots=True)
class Read(Expr):
    """tensor[index]: one element where there are as many entries as dimensions, else the vector along the last dimension."""

    tensor: str
    index: tuple[Expr, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.tensor, self.index)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.index

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return Read(self.tensor, children)


@dataclass(frozen=True, slots=True)
class Dot(Expr):
    """Inner product of two vectors; `left` may depend on b, h, q_idx and `right` on b, h, kv_idx."""

    left: Read
    right: Read

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.left, self.right)

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        left, right = children
        assert isinstance(left, Read) and isinstance(right, Read)
        return Dot(left, right)


@dataclass(frozen=True, slots=True)
class Uniform(Expr):
    """A number in [0, 1) from a counter-based stream; `seed` reads one int64.

    One for each (b, h, q_idx, kv_idx), or for each `at` = (row, column): integers that vary with q_idx and with kv_idx."""

    seed: Read
    at: tuple[Expr, ...] = ()

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.seed, *self.at)

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        seed, *at = children
        assert isinstance(seed, Read)
        return Uniform(seed, tuple(at))


@dataclass(frozen=True, slots=True)
class Apply(Expr):
    """An operator of `OPERATORS` over its operands."""

    op: str
    args: tuple[Expr, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.op, self.args)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.args

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return apply(self.op, *children)


@dataclass(frozen=True, slots=True)
class Operator:
    """A row of the operator table: name, how it prints ("" = as a call), number of operands and the kind of the result."""

    name: str
    symbol: str
    arity: int
    kind: Kind | None  # None: the widest kind among the operands (`where`: among the two branches)


_ROWS = (
    ("add", "+", 2, None), ("sub", "-", 2, None), ("mul", "*", 2, None), ("div", "/", 2, Kind.FLOAT),
    ("floordiv", "//", 2, None), ("mod", "%", 2, None), ("pow", "**", 2, None), ("neg", "-", 1, None),
    ("eq", "==", 2, Kind.BOOL), ("ne", "!=", 2, Kind.BOOL), ("lt", "<", 2, Kind.BOOL), ("le", "<=", 2, Kind.BOOL),
    ("gt", ">", 2, Kind.BOOL), ("ge", ">=", 2, Kind.BOOL),
    ("and", "&", 2, Kind.BOOL), ("or", "|", 2, Kind.BOOL), ("xor", "^", 2, Kind.BOOL), ("not", "~", 1, Kind.BOOL),
    ("where", "", 3, None), ("minimum", "", 2, None), ("maximum", "", 2, None), ("abs", "", 1, None),
    ("exp", "", 1, Kind.FLOAT), ("log", "", 1, Kind.FLOAT), ("sqrt", "", 1, Kind.FLOAT), ("rsqrt", "", 1, Kind.FLOAT),
    ("tanh", "", 1, Kind.FLOAT), ("sigmoid", "", 1, Kind.FLOAT), ("sin", "", 1, Kind.FLOAT), ("cos", "", 1, Kind.FLOAT),
    ("floor", "", 1, Kind.FLOAT), ("ceil", "", 1, Kind.FLOAT), ("erf", "", 1, Kind.FLOAT),
    ("to_float", "", 1, Kind.FLOAT), ("to_int", "", 1, Kind.INT), ("to_bool", "", 1, Kind.BOOL),
    ("round_f16", "", 1, Kind.FLOAT), ("round_bf16", "", 1, Kind.FLOAT),
)  # fmt: skip
OPERATORS: Mapping[str, Operator] = {name: Operator(name, symbol, arity, kind) for name, symbol, arity, kind in _ROWS}

B, H, Q_IDX, KV_IDX = Axis("b"), Axis("h"), Axis("q_idx"), Axis("kv_idx")
AXES = (B, H, Q_IDX, KV_IDX)
TRUE, FALSE, ZERO, ONE = Const(True), Const(False), Const(0), Const(1)


def walk(expr: Expr) -> Iterator[Expr]:
    """Every distinct node of `expr`, parents before children."""
    seen: set[Expr] = set()
    stack = [expr]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack.extend(reversed(node.children))


def axes_of(expr: Expr) -> frozenset[str]:
    """The axes that the value of `expr` varies with."""
    names = {node.name for node in walk(expr) if isinstance(node, Axis)}
    if any(isinstance(node, Uniform) and not node.at for node in walk(expr)):
        names |= {axis.name for axis in AXES}
    return frozenset(names)


def reads_of(expr: Expr) -> tuple[Read, ...]:
    """Every distinct tensor read in `expr`, those of dot products included."""
    return tuple(node for node in walk(expr) if isinstance(node, Read))


def dots_of(expr: Expr) -> tuple[Dot, ...]:
    """Every distinct dot product in `expr`."""
    return tuple(node for node in walk(expr) if isinstance(node, Dot))


def transform(expr: Expr, visit: Callable[[Expr], Expr | None]) -> Expr:
    """Rebuild `expr` from the root; where `visit` returns an expression it stands for that subtree, untouched."""
    memo: dict[Expr, Expr] = {}

    def go(node: Expr) -> Expr:
        if node not in memo:
            replaced = visit(node)
            if replaced is None:
                children = tuple(go(child) for child in node.children)
                replaced = node.rebuild(children) if children != node.children else node
            memo[node] = replaced
        return memo[node]

    return go(expr)


def substitute(expr: Expr, values: Mapping[Expr, Expr]) -> Expr:
    """`expr` with every occurrence of a key of `values` replaced by its value."""
    return transform(expr, values.get)


# ---------------------------------------------------------------------------------------------- smart constructors


def _int(expr: Expr) -> int | None:
    return expr.value if isinstance(expr, Const) and type(expr.value) is int else None


def surely_int(expr: Expr) -> bool:
    """True where the value is an integer whatever the tensors hold; reads are not known here."""
    if isinstance(expr, Axis | Size):
        return True
    if isinstance(expr, Const):
        return type(expr.value) is int
    if isinstance(expr, Apply):
        if expr.op == "to_int":
            return True
        operands = expr.args[1:] if expr.op == "where" else expr.args
        return expr.op in INTEGER_CLOSED and all(surely_int(arg) for arg in operands)
    return False


INTEGER_CLOSED = frozenset({"add", "sub", "mul", "floordiv", "mod", "neg", "minimum", "maximum", "abs", "where"})


def _linear(expr: Expr) -> tuple[dict[Expr, int], int]:
    """An integer expression as a sum of terms with integer factors, plus a constant."""
    if (value := _int(expr)) is not None:
        return {}, value
    if isinstance(expr, Apply) and expr.op in ("add", "sub"):
        (left, c0), (right, c1) = _linear(expr.args[0]), _linear(expr.args[1])
        sign = 1 if expr.op == "add" else -1
        terms = dict(left)
        for term, factor in right.items():
            terms[term] = terms.get(term, 0) + sign * factor
        return _recomposed({term: factor for term, factor in terms.items() if factor}), c0 + sign * c1
    if isinstance(expr, Apply) and expr.op == "neg":
        terms, constant = _linear(expr.args[0])
        return {term: -factor for term, factor in terms.items()}, -constant
    if isinstance(expr, Apply) and expr.op == "mul":
        for scale, other in (expr.args, expr.args[::-1]):
            if (value := _int(scale)) is not None:
                terms, constant = _linear(other)
                return {term: factor * value for term, factor in terms.items() if value}, constant * value
    return {expr: 1}, 0


def _recomposed(terms: dict[Expr, int]) -> dict[Expr, int]:
    """x // c * c + x % c is x."""
    for low, factor in list(terms.items()):
        if isinstance(low, Apply) and low.op == "mod" and (divisor := _int(low.args[1])) is not None:
            high = apply("floordiv", *low.args)
            if terms.get(high) == factor * divisor:
                rest = {term: f for term, f in terms.items() if term not in (low, high)}
                rest[low.args[0]] = rest.get(low.args[0], 0) + factor
                return rest
    return terms


def _from_linear(terms: dict[Expr, int], constant: int) -> Expr:
    total: Expr | None = None
    for term, factor in sorted(terms.items(), key=lambda item: item[1] < 0):  # positive terms first: `q_idx - kv_idx`
        size = abs(factor)
        piece = term if size == 1 else Apply("mul", (term, Const(size)))
        if total is None:
            total = piece if factor > 0 else Apply("neg", (piece,))
        else:
            total = Apply("add" if factor > 0 else "sub", (total, piece))
    if total is None:
        return Const(constant)
    if constant:
        total = Apply("add" if constant > 0 else "sub", (total, Const(abs(constant))))
    return total


def add(left: Expr, right: Expr) -> Expr:
    return apply("add", left, right)


def sub(left: Expr, right: Expr) -> Expr:
    return apply("sub", left, right)


def mul(left: Expr, right: Expr) -> Expr:
    return apply("mul", left, right)


def floordiv(left: Expr, right: Expr) -> Expr:
    return apply("floordiv", left, right)


def mod(left: Expr, right: Expr) -> Expr:
    return apply("mod", left, right)


def conj(*parts: Expr) -> Expr:
    """The conjunction of `parts`; TRUE when there are none."""
    total: Expr = TRUE
    for part in parts:
        total = apply("and", total, part)
    return total


def conjuncts(expr: Expr) -> tuple[Expr, ...]:
    """`expr` as a flat tuple of parts that must all hold."""
    if isinstance(expr, Apply) and expr.op == "and":
        return conjuncts(expr.args[0]) + conjuncts(expr.args[1])
    return () if expr == TRUE else (expr,)


def disjuncts(expr: Expr) -> tuple[Expr, ...]:
    """`expr` as a flat tuple of parts of which one must hold."""
    if isinstance(expr, Apply) and expr.op == "or":
        return disjuncts(expr.args[0]) + disjuncts(expr.args[1])
    return (expr,)


_NEGATED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}


def apply(op: str, *args: Expr) -> Expr:
    """Build `op(*args)`; folds constants and what is exact on integers and booleans, and nothing that changes a float."""
    operator = OPERATORS[op]
    assert len(args) == operator.arity, f"{op} takes {operator.arity} operands"
    folded = _fold_constants(op, args)
    if folded is not None:
        return folded
    chosen = _choose_constants(op, args)
    if chosen is not None:
        return chosen
    if op in ("and", "or", "xor", "not", "where"):
        return _logic(op, args)
    if op in _NEGATED and args[0] == args[1] and surely_int(args[0]):
        return Const(op in ("eq", "le", "ge"))
    if op == "to_int" and surely_int(args[0]):
        return args[0]
    if op == "to_bool" and isinstance(args[0], Apply) and OPERATORS[args[0].op].kind is Kind.BOOL:
        return args[0]
    if op in ("minimum", "maximum") and args[0] == args[1]:
        return args[0]
    if all(surely_int(arg) for arg in args):
        if op in ("add", "sub", "mul", "neg"):
            return _integer_sum(op, args)
        if op in ("floordiv", "mod"):
            return _integer_division(op, args[0], args[1])
    return Apply(op, args)


_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}


def with_axis_alone(expr: Expr, axis: Axis) -> Expr:
    """Every comparison of integers in `expr` with what depends on `axis` by itself on the left, where it can be.

    q - kv <= 7 as kv >= q - 7, and q // 4 - kv // 4 < 2 as kv // 4 > q // 4 - 2: the right side is then one value a row."""

    def visit(node: Expr) -> Expr | None:
        if not (isinstance(node, Apply) and node.op in _MIRRORED and all(surely_int(arg) for arg in node.args)):
            return None
        terms, constant = _linear(Apply("sub", node.args))
        mine = {term: factor for term, factor in terms.items() if axis.name in axes_of(term)} or dict(terms)
        if not mine or any(axes_of(term) >= {"q_idx", "kv_idx"} for term in mine):
            return None
        sign = 1 if next(iter(mine.values())) > 0 else -1
        op, constant = (node.op if sign == 1 else _MIRRORED[node.op]), -sign * constant
        others = {term: -sign * factor for term, factor in terms.items() if term not in mine}
        if others and op == "lt" and constant > 0:  # kv < q + 1 is kv <= q
            op, constant = "le", constant - 1
        elif others and op == "gt" and constant < 0:
            op, constant = "ge", constant + 1
        left = _from_linear({term: sign * factor for term, factor in mine.items()}, 0)
        return Apply(op, (left, _from_linear(others, constant)))

    return transform(expr, visit)


def settled(predicate: Expr, axis: Axis) -> Expr:
    """The predicate with `axis` alone in its comparisons, of bounds that differ by a constant only the tightest, and in
    alternatives nothing that must hold anyway."""
    parts = conjuncts(with_axis_alone(predicate, axis))
    tightest: dict[object, tuple[int, Expr]] = {}
    for part in parts:
        bound = _bound(part, axis)
        if bound is not None:
            key, reach = bound
            if key not in tightest or reach < tightest[key][0]:
                tightest[key] = reach, part

    def holds(part: Expr) -> bool:
        bound = _bound(part, axis)
        return part in parts or (bound is not None and bound[0] in tightest and bound[1] >= tightest[bound[0]][0])

    def shortened(part: Expr) -> Expr:
        alternatives = [conj(*(p for p in conjuncts(each) if not holds(p))) for each in disjuncts(part)]
        return reduce(lambda one, other: apply("or", one, other), alternatives)

    kept = [part for part in parts if (bound := _bound(part, axis)) is None or tightest[bound[0]][1] == part]
    return conj(*dict.fromkeys(shortened(part) if len(disjuncts(part)) > 1 else part for part in kept))


def _bound(part: Expr, axis: Axis) -> tuple[object, int] | None:
    """What an upper or lower bound of `axis` is beyond a constant, and how far it reaches: the smaller, the tighter."""
    if not (isinstance(part, Apply) and part.op in ("lt", "le", "gt", "ge") and part.args[0] == axis and surely_int(part.args[1])):
        return None
    terms, constant = _linear(part.args[1])
    upper = part.op in ("lt", "le")
    reach = constant - (part.op == "lt") if upper else -(constant + (part.op == "gt"))
    return (upper, frozenset(terms.items())), reach


def _choose_constants(op: str, args: tuple[Expr, ...]) -> Expr | None:
    """op(where(c, 1.0, 0.0), 2) is where(c, op(1.0, 2), op(0.0, 2)): masks made of numbers stay masks."""
    picks = [arg for arg in args if isinstance(arg, Apply) and arg.op == "where"]
    if op == "where" or len(picks) != 1 or not all(isinstance(arg, Const) for arg in args if arg is not picks[0]):
        return None
    condition, yes, no = picks[0].args
    if not (isinstance(yes, Const) and isinstance(no, Const)):
        return None
    branches = [_fold_constants(op, tuple(value if arg is picks[0] else arg for arg in args)) for value in (yes, no)]
    if any(branch is None for branch in branches):
        return None
    return apply("where", condition, *(branch for branch in branches if branch is not None))


def _integer_sum(op: str, args: tuple[Expr, ...]) -> Expr:
    if op == "mul":
        if ZERO in args:
            return ZERO
        if ONE in args:
            return args[0] if args[1] == ONE else args[1]
        if _int(args[0]) is None and _int(args[1]) is None:
            return Apply("mul", args)
    return _from_linear(*_linear(Apply(op, args)))


def _integer_division(op: str, left: Expr, right: Expr) -> Expr:
    divisor = _int(right)
    if divisor == 1:
        return left if op == "floordiv" else ZERO
    if left == right:
        return ONE if op == "floordiv" else ZERO
    if divisor is not None and divisor > 1:
        terms, constant = _linear(left)
        whole = {term: factor // divisor for term, factor in terms.items() if factor % divisor == 0}
        rest = {term: factor for term, factor in terms.items() if factor % divisor}
        if whole or constant // divisor:
            if rest or constant % divisor:
                remainder = Apply(op, (_from_linear(rest, constant % divisor), right)) if rest else ZERO
                if not rest:
                    remainder = ZERO if op == "floordiv" else Const(constant % divisor)
                if op == "mod":
                    return remainder
                return add(_from_linear(whole, constant // divisor), remainder)
            return _from_linear(whole, constant // divisor) if op == "floordiv" else ZERO
        if (
            op == "floordiv"
            and isinstance(left, Apply)
            and left.op == op
            and (inner := _int(left.args[1])) is not None
            and inner > 0
        ):
            return apply(op, left.args[0], Const(inner * divisor))
    return Apply(op, (left, right))


def _is_truth(expr: Expr) -> bool:
    return isinstance(expr, Apply) and OPERATORS[expr.op].kind is Kind.BOOL


def _logic(op: str, args: tuple[Expr, ...]) -> Expr:
    if op == "not":
        (inner,) = args
        if isinstance(inner, Apply) and inner.op == "not":
            return inner.args[0]
        if isinstance(inner, Apply) and inner.op in _NEGATED and all(surely_int(arg) for arg in inner.args):
            return apply(_NEGATED[inner.op], *inner.args)
        if isinstance(inner, Apply) and inner.op in ("and", "or"):  # so that what must hold stands as separate parts
            return apply("or" if inner.op == "and" else "and", *(apply("not", arg) for arg in inner.args))
        return Apply(op, args)
    if op == "where":
        condition, yes, no = args
        if condition in (TRUE, FALSE):
            return yes if condition == TRUE else no
        if isinstance(condition, Apply) and condition.op == "not":
            return _logic("where", (condition.args[0], no, yes))
        if (yes, no) == (TRUE, FALSE):
            return condition
        if (yes, no) == (FALSE, TRUE):
            return apply("not", condition)
        if yes in (TRUE, FALSE) and _is_truth(no):
            return apply("or", condition, no) if yes == TRUE else apply("and", apply("not", condition), no)
        if no in (TRUE, FALSE) and _is_truth(yes):
            return apply("or", apply("not", condition), yes) if no == TRUE else apply("and", condition, yes)
        return yes if yes == no else Apply(op, args)
    left, right = args
    if left == right:
        return FALSE if op == "xor" else left
    if op == "and":
        if FALSE in args:
            return FALSE
        return right if left == TRUE else left if right == TRUE else Apply(op, args)
    if op == "or":
        if TRUE in args:
            return TRUE
        return right if left == FALSE else left if right == FALSE else Apply(op, args)
    return right if left == FALSE else left if right == FALSE else Apply(op, args)


def _fold_constants(op: str, args: tuple[Expr, ...]) -> Expr | None:
    if not all(isinstance(arg, Const) for arg in args):
        return None
    values = [arg.value for arg in args if isinstance(arg, Const)]
    try:
        return Const(PYTHON[op](*values))
    except (KeyError, ArithmeticError, ValueError):
        return None


PYTHON: Mapping[str, Callable[..., bool | int | float]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "neg": lambda a: -a, "pow": lambda a, b: a**b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "and": lambda a, b: bool(a and b), "or": lambda a, b: bool(a or b), "xor": lambda a, b: bool(a) != bool(b),
    "not": lambda a: not a, "where": lambda c, a, b: a if c else b, "minimum": min, "maximum": max, "abs": abs,
    "exp": math.exp, "log": math.log, "sqrt": math.sqrt, "rsqrt": lambda a: 1.0 / math.sqrt(a), "tanh": math.tanh,
    "to_float": float, "to_int": int, "to_bool": bool,
}  # fmt: skip

"""A factor of query and key that is a product over the steps between them: the proof, by sympy.

With t the logarithm of the factor, expanded: if each of its terms varies with the query alone, f(q_idx), or with the key alone,
g(kv_idx), and g = -f, then the factor is exp(f(q_idx) - f(kv_idx)), which is the product of exp(f(t) - f(t - 1)) over the steps
t = kv_idx + 1 .. q_idx. That difference is the logarithm of a decay, and a recurrence needs no more: it never forms f itself, whose
exponential may overflow.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import sympy

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import KV_IDX, Q_IDX, ZERO, Apply, Axis, Const, Expr, Read, Size, apply, axes_of, mul, substitute
from attncompiler.ir.text import expr_text
from attncompiler.passes.signs import Sign

_I, _J = sympy.Symbol("q_idx", integer=True, nonnegative=True), sympy.Symbol("kv_idx", integer=True, nonnegative=True)
_MIXED = "the factor between scores and values does not separate into one of the query and one of the key"
_SIGNS: Mapping[Sign, dict[str, bool]] = {
    Sign.POSITIVE: {"positive": True}, Sign.NEGATIVE: {"negative": True}, Sign.NOT_NEGATIVE: {"nonnegative": True},
    Sign.NOT_POSITIVE: {"nonpositive": True}, Sign.ANY: {"real": True},
}  # fmt: skip


class Growth(enum.Enum):
    """Whether the exponents that a recurrence takes are at most 0."""

    NEVER = "every exponent is at most 0"
    UNKNOWN = "the sign of the exponents is known at run time alone: they are sums of those between key and query, never more"


@dataclass(frozen=True)
class Separated:
    """factor(q_idx, kv_idx) = scale * product of exp(step(t)) over t = kv_idx + 1 .. q_idx, for keys up to the query.

    `step` is over b, h and kv_idx, ZERO where the factor is a constant. With `own_excluded` the product ends at q_idx - 1 and the own
    key has factor 0."""

    step: Expr
    scale: float
    own_excluded: bool
    growth: Growth


class Facts(Protocol):
    """What is known: the sign of a read, the read that a running sum sums (None for what is no running sum), and the sign of an
    expression of positions alone, where its values can be looked at."""

    def sign(self, read: Read) -> Sign: ...

    def summand(self, read: Read) -> Expr | None: ...

    def sign_of_numbers(self, expr: Expr) -> Sign: ...


def separate(past: Expr, own: Expr, facts: Facts) -> Separated:
    """Needs: a factor for keys before the query, and at its own position (0: the own key is left out), dot products taken out.
    Ensures: what it separates into. Raises: Unrecognised with the term that mixes query and key, or that grows."""
    algebra = _Algebra(facts)
    scale, logarithm = algebra.logarithm(past)
    logarithm = sympy.expand(logarithm)
    row, column, constant = _parted(logarithm, algebra)
    unpaired = sympy.simplify(sympy.expand(row.subs(_I, _J) + column))
    if unpaired != 0:
        raise Unrecognised(
            "the factor between scores and values also weighs each query or key by itself",
            why=f"beside a decay its logarithm holds {algebra.text(unpaired)}",
            do="multiply the queries or the values by it",
        )
    step = algebra.difference(row.subs(_I, _J))
    if step.is_positive or (step.is_nonnegative and step != 0):
        raise Unrecognised(
            "the factor between scores and values grows with the distance",
            why=f"its logarithm grows by {algebra.text(step)} a step, which is not below 0: a state would overflow",
        )
    own_excluded = own in (ZERO, Const(0.0))
    if own_excluded and step != 0:
        constant = sympy.expand(constant + step)  # the own step does not count
    if constant.free_symbols or constant.atoms(sympy.Function) - {f for f in constant.atoms(sympy.Function) if f.is_number}:
        raise Unrecognised(
            "the factor between scores and values does not separate into steps",
            why=f"the exponent holds {algebra.text(constant)} whatever the distance",
            do="multiply the values by the exponential of it",
        )
    scale *= float(sympy.exp(constant))
    if not own_excluded:
        own_scale, own_logarithm = algebra.logarithm(own)
        ratio = sympy.simplify(sympy.expand(own_logarithm - logarithm).subs(_I, _J))
        if not ratio.is_number or not math.isclose(own_scale * float(sympy.exp(ratio)), float(scale), rel_tol=1e-12):
            raise Unrecognised(
                "the own key of a query has a factor of its own",
                why=f"it is {expr_text(own)}, where the keys before it have {expr_text(past)}",
            )
    growth = Growth.NEVER if step.is_nonpositive else Growth.UNKNOWN
    return Separated(algebra.expr(step), scale, own_excluded, growth)


def _parted(logarithm: Any, algebra: _Algebra) -> tuple[Any, Any, Any]:
    """The terms of a sum that vary with the query alone, with the key alone, and with neither."""
    row = column = constant = sympy.Integer(0)
    for term in sympy.Add.make_args(logarithm):
        if term.has(_I) and term.has(_J):
            raise Unrecognised(
                _MIXED,
                why=f"its logarithm holds {algebra.text(term)}, which mixes them",
            )
        if term.has(_I):
            row += term
        elif term.has(_J):
            column += term
        else:
            constant += term
    return row, column, constant


_SAME_VALUE = frozenset({"to_float", "round_f16", "round_bf16"})
_SYMPY: Mapping[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "neg": lambda a: -a, "pow": lambda a, b: a**b, "exp": sympy.exp, "log": sympy.log, "sqrt": sympy.sqrt,
    "rsqrt": lambda a: 1 / sympy.sqrt(a), "abs": sympy.Abs,
}  # fmt: skip


@dataclass
class _Algebra:
    """Expressions of the language as sympy's and back: what sympy need not look into is a symbol, or a function of the position."""

    facts: Facts
    atoms: dict[Any, Expr] = field(default_factory=dict)  # symbols, and functions of kv_idx, by what they stand for
    names: dict[Expr, Any] = field(default_factory=dict)

    def logarithm(self, expr: Expr) -> tuple[float, Any]:
        """scale, t with expr = scale * exp(t)."""
        if isinstance(expr, Const):
            if float(expr.value) <= 0:
                raise Unrecognised("the factor between scores and values is not positive", why=f"it is {expr_text(expr)}")
            return float(expr.value), sympy.Integer(0)
        if isinstance(expr, Apply):
            if expr.op in _SAME_VALUE:
                return self.logarithm(expr.args[0])
            if expr.op in ("mul", "div"):
                (left, one), (right, other) = map(self.logarithm, expr.args)
                return (left * right, one + other) if expr.op == "mul" else (left / right, one - other)
            if expr.op == "exp":
                return 1.0, self.value(expr.args[0])
            if expr.op == "pow":
                return 1.0, self.value(expr.args[1]) * self._log(expr.args[0])
        return 1.0, self._log(expr)

    def _log(self, expr: Expr) -> Any:
        value = self.value(expr)
        if value.has(_I) and value.has(_J):
            raise Unrecognised(_MIXED, why=f"{expr_text(expr)} mixes them")
        if self._is_positive_of_heads(expr):
            return self._atom(apply("log", expr))
        # exact, so that what cancels does: a base that rounds to 0 is a decay of exp(-inf), as the traced code has it
        if not (value.is_positive or value.is_nonnegative):
            raise Unrecognised(
                "the factor between scores and values is not known to be positive",
                why=f"{expr_text(expr)} may be negative",
                do="give the logarithm of a decay, and exp of it",
            )
        return sympy.expand_log(sympy.log(value), force=True)

    def _is_positive_of_heads(self, expr: Expr) -> bool:
        """Whether an expression is a positive number of each head: then its logarithm stays whole, as its sign may be known too."""
        return not axes_of(expr) & {"q_idx", "kv_idx"} and bool(axes_of(expr)) and self.facts.sign_of_numbers(expr) is Sign.POSITIVE

    def value(self, expr: Expr) -> Any:
        """The expression in sympy's terms."""
        if isinstance(expr, Const):
            if isinstance(expr.value, float) and not math.isfinite(expr.value):
                raise Unrecognised("an infinite factor between scores and values")
            return sympy.Rational(expr.value)
        if isinstance(expr, Axis) and expr in (Q_IDX, KV_IDX):
            return _I if expr == Q_IDX else _J
        if isinstance(expr, Apply) and expr.op in _SAME_VALUE:
            return self.value(expr.args[0])
        if isinstance(expr, Apply) and expr.op == "log" and self._is_positive_of_heads(expr.args[0]):
            return self._atom(expr)
        if isinstance(expr, Apply) and expr.op in _SYMPY:
            return _SYMPY[expr.op](*map(self.value, expr.args))
        return self._atom(expr)

    def _atom(self, expr: Expr) -> Any:
        varies = axes_of(expr) & {"q_idx", "kv_idx"}
        if len(varies) == 2:
            raise Unrecognised(
                _MIXED,
                why=f"{expr_text(expr)} mixes them",
            )
        known = substitute(expr, {Q_IDX: KV_IDX})
        if known not in self.names:
            name = f"atom{len(self.names)}"
            signs = self._assumptions(known)
            self.names[known] = sympy.Function(name, **signs) if varies else sympy.Symbol(name, **signs)
            self.atoms[self.names[known](_J) if varies else self.names[known]] = known
        found = self.names[known]
        return found(_I if "q_idx" in varies else _J) if varies else found

    def _assumptions(self, expr: Expr) -> dict[str, bool]:
        if isinstance(expr, Size):
            return {"integer": True, "positive": True}
        if isinstance(expr, Axis):
            return {"integer": True, "nonnegative": True}
        return _SIGNS[self.facts.sign(expr) if isinstance(expr, Read) else self.facts.sign_of_numbers(expr)]

    def difference(self, row: Any) -> Any:
        """row(kv_idx) - row(kv_idx - 1), with what running sums sum in place of their differences."""
        functions = [f for f in row.atoms(sympy.Function) if f in self.atoms]
        total = row.subs({f: 0 for f in functions})
        total = sympy.expand(total - total.subs(_J, _J - 1))
        for function in functions:
            slope = sympy.diff(row, function)
            if slope.has(_J):
                raise Unrecognised(
                    "a decay that is no sum over steps",
                    why=f"its logarithm is {self.text(row)}",
                    do="use a running sum of logarithms",
                )
            read = self.atoms[function]
            summand = self.facts.summand(read) if isinstance(read, Read) else None
            if summand is None:
                raise Unrecognised(
                    "the decay between query and key is not known step by step",
                    why=f"{expr_text(read)} is no running sum (torch.cumsum) over the positions",
                    do="compute it as the cumsum of a logarithm for each token",
                )
            total += slope * self._atom(summand)
        return total

    def expr(self, value: Any) -> Expr:
        """An expression of the language, over kv_idx."""
        if value == _J:
            return KV_IDX
        if value in self.atoms:
            return self.atoms[value]
        if value.is_Integer or value.is_Rational:
            return ZERO if value == 0 else Const(float(value))
        if value.func in _BACK:
            op, *_ = _BACK[value.func]
            args = [self.expr(arg) for arg in value.args]
            if value.func is sympy.Mul:
                return self._product(value)
            total = args[0]
            for arg in args[1:]:
                total = apply(op, total, arg)
            return total if len(args) > 1 else apply(op, total)
        if value.is_number:
            return Const(float(value))
        raise Unrecognised("a decay that the language has no words for", why=f"its logarithm is {value}")

    def _product(self, value: Any) -> Expr:
        number, rest = value.as_coeff_Mul()
        factors = [apply("to_float", f) if f == KV_IDX else f for f in map(self.expr, sympy.Mul.make_args(rest))]
        total = factors[0]
        for factor in factors[1:]:
            total = mul(total, factor)
        return total if number == 1 else apply("neg", total) if number == -1 else mul(total, Const(float(number)))

    def text(self, value: Any) -> str:
        """A term of a logarithm in the language's words."""
        named = {atom: sympy.Symbol(expr_text(expr)) for atom, expr in self.atoms.items()}
        shown = {atom.subs(_J, _I): sympy.Symbol(expr_text(substitute(expr, {KV_IDX: Q_IDX}))) for atom, expr in self.atoms.items()}
        return str(value.subs({**shown, **named}))


_BACK: Mapping[Any, tuple[str]] = {
    sympy.Add: ("add",), sympy.Mul: ("mul",), sympy.Pow: ("pow",), sympy.exp: ("exp",), sympy.log: ("log",), sympy.Abs: ("abs",),
}  # fmt: skip

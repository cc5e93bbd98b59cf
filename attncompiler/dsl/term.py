"""Expressions written with Python's operators: what the rules of masks.py are made of, for programs and for plain torch alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attncompiler.ir.expr import KV_IDX, Q_IDX, B, Const, Expr, H, Read, apply


@dataclass(frozen=True, eq=False)
class Term:
    """An expression of positions. Comparisons make terms; `&`, `|` and `~` join them."""

    expr: Expr

    def __add__(self, other: Term | int) -> Term:
        return Term(apply("add", self.expr, _expr(other)))

    def __sub__(self, other: Term | int) -> Term:
        return Term(apply("sub", self.expr, _expr(other)))

    def __mul__(self, other: Term | int) -> Term:
        return Term(apply("mul", self.expr, _expr(other)))

    def __floordiv__(self, other: int) -> Term:
        return Term(apply("floordiv", self.expr, _expr(other)))

    def __mod__(self, other: int) -> Term:
        return Term(apply("mod", self.expr, _expr(other)))

    def __lt__(self, other: Term | int) -> Term:
        return Term(apply("lt", self.expr, _expr(other)))

    def __le__(self, other: Term | int) -> Term:
        return Term(apply("le", self.expr, _expr(other)))

    def __gt__(self, other: Term | int) -> Term:
        return Term(apply("gt", self.expr, _expr(other)))

    def __ge__(self, other: Term | int) -> Term:
        return Term(apply("ge", self.expr, _expr(other)))

    def __and__(self, other: Term) -> Term:
        return Term(apply("and", self.expr, other.expr))

    def __or__(self, other: Term) -> Term:
        return Term(apply("or", self.expr, other.expr))

    def __abs__(self) -> Term:
        return Term(apply("abs", self.expr))

    def __invert__(self) -> Term:
        return Term(apply("not", self.expr))


def _expr(value: Term | int) -> Expr:
    return value.expr if isinstance(value, Term) else Const(value)


class _Elements:
    """A captured tensor, of which a rule reads elements."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, index: Term | tuple[Term, ...]) -> Term:
        entries = index if isinstance(index, tuple) else (index,)
        return Term(Read(self._name, tuple(_expr(entry) for entry in entries)))

    def element(self, place: int) -> Read:
        """The read of one element of a vector."""
        return Read(self._name, (Const(place),))


@dataclass(frozen=True)
class Positions:
    """What a rule is a function of: batch, head, query and key, and the tensors that it captures, by name.

    Either terms, for a program, or index tensors, for plain torch: a rule is written once for both."""

    b: Any
    h: Any
    q: Any
    k: Any
    captured: Mapping[str, Any]


def terms(captured: Iterable[str]) -> Positions:
    """The positions as terms."""
    return Positions(Term(B), Term(H), Term(Q_IDX), Term(KV_IDX), {name: _Elements(name) for name in captured})


def equal(x: Any, y: Any) -> Any:
    """x == y, elementwise; on terms `==` would promise an answer."""
    if isinstance(x, Term) or isinstance(y, Term):
        return Term(apply("eq", _expr(x), _expr(y)))
    return x == y


def larger(x: Any, y: Any) -> Any:
    """The larger of the two; `x` is no literal."""
    if isinstance(x, Term):
        return Term(apply("maximum", x.expr, _expr(y)))
    return x.clamp(min=y) if isinstance(y, int) else torch.maximum(x, y)


def smaller(x: Any, y: Any) -> Any:
    """The smaller of the two; `x` is no literal."""
    if isinstance(x, Term):
        return Term(apply("minimum", x.expr, _expr(y)))
    return x.clamp(max=y) if isinstance(y, int) else torch.minimum(x, y)

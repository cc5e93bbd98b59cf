"""The smart constructors change no value: all small integers, negatives too."""

from __future__ import annotations

import itertools
import random

import pytest

from attncompiler.ir.expr import (
    KV_IDX,
    PYTHON,
    Q_IDX,
    Apply,
    Axis,
    Const,
    Expr,
    Read,
    Uniform,
    apply,
    conj,
    conjuncts,
    settled,
    substitute,
    with_axis_alone,
)
from attncompiler.ir.ranges import within

INTEGER = ("add", "sub", "mul", "floordiv", "mod", "minimum", "maximum")
COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")
VALUES = range(-4, 9)


def value(expr: Expr, q: int, kv: int) -> bool | int | float:
    """By Python's own operators, without the constructors."""
    if isinstance(expr, Const):
        return expr.value
    if isinstance(expr, Axis):
        return q if expr == Q_IDX else kv
    assert isinstance(expr, Apply)
    return PYTHON[expr.op](*(value(arg, q, kv) for arg in expr.args))


def raw(r: random.Random, depth: int, boolean: bool) -> Expr:
    """A random tree that no constructor has touched."""
    if boolean and depth > 0:
        op = r.choice([*COMPARE, "and", "or", "not", "xor"])
        if op in COMPARE:
            return Apply(op, (raw(r, depth - 1, False), raw(r, depth - 1, False)))
        return Apply(op, tuple(raw(r, depth - 1, True) for _ in range(1 if op == "not" else 2)))
    if boolean:
        return Const(r.random() < 0.5)
    if depth == 0:
        return r.choice([Q_IDX, KV_IDX, Const(r.randint(-3, 5))])
    op = r.choice([*INTEGER, "neg", "where"])
    if op == "where":
        return Apply(op, (raw(r, depth - 1, True), raw(r, depth - 1, False), raw(r, depth - 1, False)))
    if op in ("floordiv", "mod"):
        return Apply(op, (raw(r, depth - 1, False), Const(r.randint(1, 5))))
    return Apply(op, tuple(raw(r, depth - 1, False) for _ in range(1 if op == "neg" else 2)))


def built(expr: Expr) -> Expr:
    return apply(expr.op, *(built(arg) for arg in expr.args)) if isinstance(expr, Apply) else expr


@pytest.mark.parametrize("seed", range(300))
def test_simplifying_keeps_the_value(seed: int) -> None:
    r = random.Random(seed)
    expr = raw(r, r.randint(1, 4), r.random() < 0.5)
    simple = built(expr)
    for q, kv in itertools.product(VALUES, VALUES):
        assert value(simple, q, kv) == value(expr, q, kv), (expr, simple, q, kv)


@pytest.mark.parametrize("seed", range(100))
def test_an_axis_alone_keeps_the_value(seed: int) -> None:
    r = random.Random(f"alone {seed}")
    expr = built(raw(r, r.randint(1, 4), True))
    alone = with_axis_alone(expr, KV_IDX)
    for q, kv in itertools.product(VALUES, VALUES):
        assert value(alone, q, kv) == value(expr, q, kv), (expr, alone, q, kv)


@pytest.mark.parametrize("seed", range(100))
def test_within_sizes_the_value_is_kept(seed: int) -> None:
    r = random.Random(f"within {seed}")
    expr = built(raw(r, r.randint(1, 4), True))
    sizes = {Q_IDX: r.randint(1, 7), KV_IDX: r.randint(1, 7)}
    shorter = within(expr, sizes)
    for q, kv in itertools.product(range(sizes[Q_IDX]), range(sizes[KV_IDX])):
        assert value(shorter, q, kv) == value(expr, q, kv), (expr, shorter, q, kv)


def test_within_sizes_idle_arithmetic_is_gone() -> None:
    row, column = apply("mod", apply("floordiv", Q_IDX, Const(8)), Const(6)), apply("mod", Q_IDX, Const(8))
    assert within(row, {Q_IDX: 48}) == apply("floordiv", Q_IDX, Const(8)) and within(row, {Q_IDX: 49}) == row
    assert within(apply("minimum", row, Const(5)), {}) == row
    assert within(apply("maximum", column, Const(1)), {Q_IDX: 48}) == apply("maximum", column, Const(1))
    assert within(apply("floordiv", Q_IDX, Const(8)), {Q_IDX: 8}) == Const(0)
    drawn = Uniform(Read("seed", (Const(0),)), (apply("floordiv", Q_IDX, Const(8)), apply("floordiv", KV_IDX, Const(8))))
    assert within(drawn, {Q_IDX: 8, KV_IDX: 8}) == drawn


def test_an_axis_alone() -> None:
    window = apply("le", apply("sub", Q_IDX, KV_IDX), Const(7))
    assert with_axis_alone(window, KV_IDX) == Apply("ge", (KV_IDX, apply("sub", Q_IDX, Const(7))))


def test_blocks_of_keys_stand_alone_too() -> None:
    near = apply("lt", apply("sub", apply("floordiv", Q_IDX, Const(4)), apply("floordiv", KV_IDX, Const(4))), Const(2))
    expected = Apply("ge", (apply("floordiv", KV_IDX, Const(4)), apply("sub", apply("floordiv", Q_IDX, Const(4)), Const(1))))
    assert with_axis_alone(near, KV_IDX) == expected
    apart = apply("eq", apply("mod", apply("sub", Q_IDX, KV_IDX), Const(3)), Const(0))
    assert with_axis_alone(apart, KV_IDX) == apart


@pytest.mark.parametrize("seed", range(200))
def test_settling_keeps_the_value(seed: int) -> None:
    r = random.Random(f"settled {seed}")
    bounds = [apply(r.choice(COMPARE), built(raw(r, 1, False)), built(raw(r, 1, False))) for _ in range(4)]
    expr = bounds[0]
    for _ in range(r.randint(1, 6)):
        expr = apply(r.choice(["and", "or"]), *r.sample([expr, r.choice(bounds)], 2))
    short = settled(expr, KV_IDX)
    for q, kv in itertools.product(VALUES, VALUES):
        assert value(short, q, kv) == value(expr, q, kv), (expr, short, q, kv)


def test_what_must_hold_is_said_once() -> None:
    causal, recent = apply("le", KV_IDX, Q_IDX), apply("ge", KV_IDX, apply("sub", Q_IDX, Const(6)))
    first, ahead = apply("lt", KV_IDX, Const(2)), apply("le", KV_IDX, apply("add", Q_IDX, Const(6)))
    expected = apply("and", causal, apply("or", recent, first))
    assert settled(apply("and", causal, apply("or", apply("and", recent, causal), first)), KV_IDX) == expected
    assert settled(apply("and", causal, apply("or", apply("and", recent, ahead), first)), KV_IDX) == expected
    lone = apply("or", apply("and", recent, causal), first)
    assert settled(lone, KV_IDX) == lone


def test_a_choice_between_truths_is_logic() -> None:
    inside, near = apply("ge", Q_IDX, Const(4)), apply("le", KV_IDX, Q_IDX)
    assert apply("where", inside, near, Const(True)) == apply("or", apply("lt", Q_IDX, Const(4)), near)
    assert apply("where", inside, near, Const(False)) == apply("and", inside, near)


def test_equal_index_arithmetic_has_equal_trees() -> None:
    left = apply("sub", apply("add", Q_IDX, Const(3)), apply("add", KV_IDX, Const(3)))
    assert left == apply("sub", Q_IDX, KV_IDX)
    back = apply("add", apply("mul", apply("floordiv", Q_IDX, Const(4)), Const(4)), apply("mod", Q_IDX, Const(4)))
    assert back == Q_IDX
    frame = apply("floordiv", apply("floordiv", Q_IDX, Const(8)), Const(6))
    assert frame == apply("floordiv", Q_IDX, Const(48))
    row = apply("mod", apply("floordiv", Q_IDX, Const(8)), Const(6))
    assert apply("add", apply("mul", frame, Const(6)), row) == apply("floordiv", Q_IDX, Const(8))


def test_a_negated_mask_falls_apart_into_what_must_hold() -> None:
    hidden = apply("or", apply("gt", KV_IDX, Q_IDX), apply("ge", apply("sub", Q_IDX, KV_IDX), Const(7)))
    kept = apply("not", hidden)
    assert set(conjuncts(kept)) == {apply("le", KV_IDX, Q_IDX), apply("lt", apply("sub", Q_IDX, KV_IDX), Const(7))}
    assert conjuncts(conj()) == ()


def test_a_truth_value_made_a_truth_value_is_itself() -> None:
    kept = apply("le", KV_IDX, Q_IDX)
    assert apply("not", apply("to_bool", apply("not", kept))) == kept


def test_floating_point_is_kept_as_written() -> None:
    total = apply("add", apply("add", Const(0.1), Apply("to_float", (Q_IDX,))), Const(0.2))
    assert isinstance(total, Apply) and total.args[1] == Const(0.2)
    assert substitute(total, {Q_IDX: Const(1)}) == Const(0.1 + 1.0 + 0.2)

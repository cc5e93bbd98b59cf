"""A dense mask -> the rule that keeps the same pairs, where one is known; else, if tiles can be skipped by it, a copy of it.

What `mask_rules.py` and `block_rules.py` guess from some rows is compared with every pair of the mask before it is believed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from attncompiler.ir.expr import Const, Expr, H, apply, conj
from attncompiler.passes.block_rules import copied, patterns, stripes
from attncompiler.passes.mask_rules import Plane, Rule, holds, rules_of


def rule_of(mask: Tensor) -> Rule | None:
    """The simplest known rule that keeps exactly the pairs of a mask, bool [M, N] or [heads, M, N], on the CPU; None without."""
    heads = mask.reshape(-1, *mask.shape[-2:])
    if min(heads.shape) == 0:
        return None
    if bool((heads[1:] == heads[:1]).all()):
        heads = heads[:1]
    planes = [Plane(head.contiguous()) for head in heads]
    own = rules_of(planes[0]) if len(planes) == 1 else _rule_each(planes)
    guesses = itertools.chain(own, stripes(heads, planes), patterns(heads, planes), copied(heads))
    plausible = (rule for rule in guesses if all(plane.looks_like(rule, head) for head, plane in enumerate(planes)))
    return next((rule for rule in plausible if holds(rule, heads)), None)


def _rule_each(planes: list[Plane]) -> Iterator[Rule]:
    """Joined as `masks.per_head` joins them; rules that read tables stay out."""
    of: dict[Expr, list[int]] = {}
    for number, plane in enumerate(planes):
        rules = (rule for rule in rules_of(plane) if not rule.tables and plane.looks_like(rule))
        found = next((rule for rule in rules if holds(rule, plane.mask.unsqueeze(0))), None)
        if found is None:
            return
        of.setdefault(found.predicate, []).append(number)
    parts = []
    for predicate, numbers in of.items():
        which = reduce(lambda one, other: apply("or", one, other), (apply("eq", H, Const(number)) for number in numbers))
        parts.append(conj(which, predicate))
    yield Rule(reduce(lambda one, other: apply("or", one, other), parts))


# ------------------------------------------------------------------------------------------------ tensors of two values


@dataclass(frozen=True, eq=False)
class LiftedTensor:
    """A tensor that is `on` where the rule holds and `off` elsewhere: bool, 0 and -inf, 1 and 0."""

    rule: Rule
    on: bool | int | float
    off: bool | int | float

    def explains(self, tensor: Tensor) -> bool:
        """Whether every element of a tensor, [M, N] or [heads, M, N], is as this says."""
        found = _kept(tensor, self.on, self.off)
        return found is not None and holds(self.rule, found.reshape(-1, *found.shape[-2:]))

    @property
    def kept(self) -> Expr:
        """Where it is True, 1, or 0 beside a large negative number: the larger of the two."""
        return self.rule.predicate if self.on > self.off else apply("not", self.rule.predicate)

    @property
    def element(self) -> Expr:
        """One element at h, q_idx, kv_idx."""
        return apply("where", self.rule.predicate, Const(self.on), Const(self.off))


def lift_tensor(tensor: Tensor) -> LiftedTensor | None:
    """The rule of a tensor [M, N] or [heads, M, N] of two values; None where it has more, or no rule is known.

    What is kept is tried before what is hidden; but a rule of positions is better than ids, and ids than a pattern."""
    best: LiftedTensor | None = None
    for on, off in _two_values(tensor):
        kept = _kept(tensor, on, off)
        rule = None if kept is None else rule_of(kept)
        if rule is not None and (best is None or _rank_read(rule) < _rank_read(best.rule)):
            best = LiftedTensor(rule, on, off)
        if kept is None or (best is not None and not best.rule.tables):
            break
    return best


def _rank_read(rule: Rule) -> int:
    """The rank of the largest table: 0 where the rule reads none."""
    return max((table.dim() for table in rule.tables.values()), default=0)


def _two_values(tensor: Tensor) -> Iterator[tuple[bool | int | float, bool | int | float]]:
    """The two values, the one that keeps first: True, 1 before 0, 0 before a large negative one."""
    if tensor.dtype == torch.bool:
        yield from ((True, False), (False, True))
        return
    if not tensor.numel():
        return
    one = tensor.reshape(-1)[:1]
    unlike = (tensor != one).reshape(-1)
    other = tensor.reshape(-1)[unlike.to(torch.int8).argmax()] if bool(unlike.any()) else one[0]
    values = sorted({one.item(), other.item()}, reverse=True)
    if len(values) == 2:
        yield values[0], values[1]
        yield values[1], values[0]


def _kept(tensor: Tensor, on: bool | int | float, off: bool | int | float) -> Tensor | None:
    """Where the tensor is `on`; None where it is anything but the two."""
    if tensor.dtype == torch.bool:
        return tensor if on else ~tensor
    kept = tensor == on
    return kept if bool((kept | (tensor == off)).all()) else None

"""Dense masks and the rules that explain them: each rule as declared, and none for a mask that is one pair away from it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from attncompiler import masks
from attncompiler.dsl.masks import Mask
from attncompiler.ir.expr import AXES, KV_IDX, settled
from attncompiler.ir.ranges import within
from attncompiler.ir.text import expr_text
from attncompiler.passes.lift_constant import lift_tensor, rule_of
from attncompiler.passes.mask_rules import Rule, holds
from attncompiler.passes.plan import plan_predicate

N = 144
IDS = torch.repeat_interleave(torch.arange(5), torch.tensor([20, 30, 4, 50, 40]))
LABELS = torch.randint(0, 5, (N,), generator=torch.Generator().manual_seed(1))
PATTERN = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) > 0.5

OF_ALL_HEADS: tuple[Mask, ...] = (
    masks.full(), masks.causal(), masks.causal(3), masks.causal(-3), masks.window(5, 0), masks.window(7, 3), masks.prefix(11),
    masks.causal() | masks.prefix(9), masks.causal() & (masks.window(10, 0) | masks.sink(4)), masks.window(5, 0) | masks.sink(2),
    masks.window(5) | masks.sink(3) | masks.where(lambda b, h, q_idx, kv_idx: q_idx < 3),
    masks.document(IDS), masks.causal() & masks.document(IDS), masks.causal() & masks.document(every=12), masks.document(every=12),
    masks.window(4) & masks.document(IDS), masks.window(4, 0) & masks.document(IDS), masks.regions(LABELS),
    masks.causal() & masks.regions(LABELS), masks.blocks(24), ~masks.document(every=12),
    masks.dilated(3, 4), masks.causal() & masks.dilated(3, 4),
    masks.grid((N,), 7), masks.grid((N,), 7, 3), masks.grid((N,), 7, 3, 2), masks.grid((N,), 7, 3, 2, True),
    masks.grid((12, 12), 5), masks.grid((9, 16), (3, 6), (1, 2), (2, 1)),
    masks.grid((9, 16), (3, 6), (1, 2), (2, 1), (True, False)),
    masks.grid((4, 6, 6), (3, 3, 5)), masks.grid((4, 6, 6), (2, 3, 3), (1, 1, 2), (2, 1, 1), (True, False, False)),
    masks.halo((12, 12), 3, 1), masks.halo((N,), 12, 4),
    masks.blocks(16, PATTERN), masks.causal() & masks.blocks(16, PATTERN | torch.eye(9, dtype=torch.bool)),
    masks.strided(8, 2, 3, 1),
)  # fmt: skip
RULES: tuple[tuple[Mask, int], ...] = (
    *((mask, 1) for mask in OF_ALL_HEADS),
    (masks.strided(8, 2, 3, 4), 4), (masks.strided(4, 2, 4, 8), 8), (masks.strided(4, 2, 4, 8, kv_heads=4), 8),
    (masks.per_head([masks.causal(), masks.window(3, 0), masks.causal(), masks.full()]), 4),
)  # fmt: skip


def dense(mask: Mask, heads: int) -> Tensor:
    return mask.dense(1, heads, N, N)[0]


@pytest.mark.parametrize(("mask", "heads"), RULES, ids=str)
def test_a_mask_is_the_rule_that_declares_it(mask: Mask, heads: int) -> None:
    """The same text, tables and tiles."""
    found = lift_tensor(dense(mask, heads))
    assert found is not None
    extents = dict(zip(AXES, (1, heads, N, N), strict=True))
    declared, captured = mask.rule(extents)
    predicate, declared = (settled(within(x, extents), KV_IDX) for x in (found.kept if found.on else found.element, declared))
    assert expr_text(predicate) == expr_text(declared)  # as a region has both
    assert found.rule.tables.keys() == captured.keys()
    plan = plan_predicate(predicate, found.rule.tables, (1, heads, N, N), 16, 32)
    assert torch.equal(plan.coverage, mask.plan(1, heads, N, N, 16, 32).coverage)


@pytest.mark.parametrize(("mask", "heads"), RULES, ids=str)
def test_one_pair_away_it_is_another_mask(mask: Mask, heads: int) -> None:
    kept = dense(mask, heads)
    places = torch.randint(0, kept.numel(), (4,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in (0, kept.numel() - 1, kept.numel() // 2 + N // 2, *places):
        flipped = kept.clone().reshape(-1)
        flipped[place] = ~flipped[place]
        rule = rule_of(flipped.view_as(kept))
        assert rule is None or holds(rule, flipped.view_as(kept)), "what explains it explains all of it"


def test_every_pair_counts() -> None:
    """Of a larger mask the guess looks at some rows only; no flipped pair of another row passes."""
    kept = masks.causal().dense(1, 1, 512, 512)[0, 0]
    assert rule_of(kept) is not None
    for row, key in itertools.product((129, 254, 387), (0, 100, 400, 511)):
        kept[row, key] = ~kept[row, key]
        found = rule_of(kept)
        assert found is not None and found.is_copy
        kept[row, key] = ~kept[row, key]


def test_a_mask_of_no_rule_is_copied_where_tiles_can_be_skipped() -> None:
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(200, 300, generator=generator) < 0.5
    assert rule_of(some) is None
    some[:, :64] = False
    found = rule_of(some)
    assert found is not None and found.is_copy and holds(found, some[None])
    some[199, 299] = ~some[199, 299]
    assert not holds(found, some[None]), "whoever writes to the mask does not write to the copy"
    of_heads = torch.stack([some, ~some])
    found = rule_of(of_heads)
    assert found is not None and found.is_copy and holds(found, of_heads)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3), (4, 4), (6, 6), (12, 12), (5, 16), (2, 6, 6), (3, 4, 4)])
def test_any_mask_has_its_own_rule_or_none(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(math.prod(shape))
    for density in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0) * 4:
        mask = torch.rand(shape, generator=generator) < density
        rule = rule_of(mask)
        assert rule is None or holds(rule, mask.reshape(-1, *shape[-2:]))


def test_holds_looks_at_heads_and_at_the_last_rows() -> None:
    causal = rule_of(torch.ones(40, 40, dtype=torch.bool).tril())
    assert causal is not None
    heads = torch.ones(3, 40, 40, dtype=torch.bool).tril()
    assert holds(causal, heads)
    heads[2, 39, 5] = False
    assert not holds(causal, heads)
    assert not holds(Rule(causal.predicate), torch.ones(1, 40, 40, dtype=torch.bool))


CAUSAL = torch.ones(24, 24, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "tensor",
    [
        CAUSAL, ~CAUSAL, CAUSAL.float(), CAUSAL.to(torch.uint8), 1 - CAUSAL.long(),
        torch.zeros(24, 24).masked_fill(~CAUSAL, -math.inf), torch.zeros(24, 24, dtype=torch.bfloat16).masked_fill(~CAUSAL, -1e38),
    ],
    ids=["keeps", "hides", "float", "uint8", "long", "-inf", "bfloat16"],
)  # fmt: skip
def test_tensors_of_two_values(tensor: Tensor) -> None:
    found = lift_tensor(tensor)
    assert found is not None and found.explains(tensor)
    assert {found.on, found.off} == {tensor[0, 0].item(), tensor[0, 1].item()}
    changed = tensor.clone()
    changed[3, 4] = tensor[0, 0]
    assert not found.explains(changed)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(16.0).view(4, 4), torch.full((4, 4), math.nan), torch.zeros(4, 4), torch.empty(0, 4),
        torch.tensor([[0.0, -1.0], [-2.0, 0.0]]), torch.tensor([[0.0, math.nan], [0.0, 0.0]]),
    ],
    ids=["many", "nan", "one", "empty", "three", "one and nan"],
)  # fmt: skip
def test_other_tensors_have_no_rule(tensor: Tensor) -> None:
    assert lift_tensor(tensor) is None

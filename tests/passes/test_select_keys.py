"""Masks made of topk, as people write them, become lists of keys; masks that only look like them stay masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

import attncompiler
from attncompiler.passes.pipeline import compile_graph

B, HEADS, M, N, D, W = 2, 4, 33, 50, 16, 7
Chosen = Callable[[Tensor, Tensor], Tensor]  # q, rank [B, HEADS, N] -> a mask, or what is added to the scores


def causal(q: Tensor) -> Tensor:
    return torch.arange(N) <= torch.arange(q.shape[2])[:, None] + (N - q.shape[2])


def scattered(q: Tensor, rank: Tensor) -> Tensor:
    kept = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, rank.topk(W, -1).indices, True)
    return kept[:, :, None] & causal(q)


def scattered_in_place(q: Tensor, rank: Tensor) -> Tensor:
    kept = torch.zeros(B, HEADS, N, dtype=torch.bool)
    kept.scatter_(-1, rank.topk(W, -1)[1], True)
    return kept[:, :, None] & causal(q)


def scattered_where_finite(q: Tensor, rank: Tensor) -> Tensor:
    values, indices = rank.masked_fill(rank < 0.2, -torch.inf).topk(20, -1)
    return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, indices, values > -torch.inf)[:, :, None]


def one_hot(q: Tensor, rank: Tensor) -> Tensor:
    return F.one_hot(rank.topk(W, -1).indices, N).sum(-2).bool()[:, :, None] & causal(q)


def one_hot_counted(q: Tensor, rank: Tensor) -> Tensor:
    return (F.one_hot(rank.topk(W, -1).indices, N).sum(dim=-2) > 0).unsqueeze(2)


def of_pooled_queries(q: Tensor, rank: Tensor) -> Tensor:
    """Ranked by the queries' mean: one number for each key all the same."""
    return scattered(q, rank * q.mean((2, 3))[..., None].sigmoid())


def of_each_query(q: Tensor, rank: Tensor) -> Tensor:
    seen = rank[:, :, None].expand(-1, -1, q.shape[2], -1).masked_fill(~causal(q), -torch.inf)
    return torch.zeros_like(seen, dtype=torch.bool).scatter(-1, seen.topk(W, -1).indices, True) & causal(q)


def of_each_query_compared(q: Tensor, rank: Tensor) -> Tensor:
    seen = rank[:, :, None].expand(-1, -1, q.shape[2], -1).masked_fill(~causal(q), -torch.inf)
    return (seen >= seen.topk(W, -1).values[..., -1:]) & causal(q)


LISTS: tuple[Chosen, ...] = (
    scattered, scattered_in_place, scattered_where_finite, one_hot, one_hot_counted, of_pooled_queries, of_each_query,
    of_each_query_compared,
)  # fmt: skip


def compared(q: Tensor, rank: Tensor) -> Tensor:
    """Ties may keep any number of keys."""
    return (rank >= rank.topk(W, -1).values[..., -1:])[:, :, None]


def majority(q: Tensor, rank: Tensor) -> Tensor:
    """Blocks of 5 keys where more than half was chosen: how many keys that makes is open."""
    kept = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, rank.topk(20, -1).indices, True)
    return (kept.unflatten(-1, (-1, 5)).sum(-1) * 2 > 5).repeat_interleave(5, -1)[:, :, None]


def added(q: Tensor, rank: Tensor) -> Tensor:
    """What is added is scattered: not told from any mask that is added."""
    return torch.full_like(rank, -torch.inf).scatter(-1, rank.topk(W, -1).indices, 0.0)[:, :, None]


def of_pairs(q: Tensor, rank: Tensor) -> Tensor:
    """Each query ranks numbers of its own."""
    own = rank[:, :, None] + q.sum(-1, keepdim=True) * torch.arange(N)
    return torch.zeros_like(own, dtype=torch.bool).scatter(-1, own.topk(W, -1).indices, True)


def smallest(q: Tensor, rank: Tensor) -> Tensor:
    return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, rank.topk(W, -1, largest=False).indices, True)[:, :, None]


def dropped(q: Tensor, rank: Tensor) -> Tensor:
    """The chosen keys are the ones that are left out."""
    return torch.ones_like(rank, dtype=torch.bool).scatter(-1, rank.topk(W, -1).indices, False)[:, :, None]


def twice(q: Tensor, rank: Tensor) -> Tensor:
    """Indices that are changed: several may be one."""
    return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, rank.topk(W, -1).indices // 2, True)[:, :, None]


def of_heads(q: Tensor, rank: Tensor) -> Tensor:
    """Each key chooses heads."""
    return torch.zeros_like(rank, dtype=torch.bool).scatter(1, rank.topk(2, 1).indices, True)[:, :, None]


def over_others(q: Tensor, rank: Tensor) -> Tensor:
    """What is scattered into already keeps keys."""
    return (rank > 1.0).scatter(-1, rank.topk(W, -1).indices, True)[:, :, None]


def one_hot_of_classes(q: Tensor, rank: Tensor) -> Tensor:
    """Counts how often, not whether."""
    return F.one_hot(rank.topk(W, -1).indices % 25, N).sum(-2)[:, :, None] >= 2


MASKS: tuple[Chosen, ...] = (
    compared, majority, added, of_pairs, smallest, dropped, twice, of_heads, over_others, one_hot_of_classes,
)  # fmt: skip


def attending(chosen: Chosen, with_bias: bool = True) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, rank: Tensor) -> Tensor:
        scores = q @ k.mT * D**-0.5 + (rank[:, :, None] if with_bias else 0.0)
        mask = chosen(q, rank.detach())
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).nan_to_num(0.0) @ v

    return attend


def inputs(grad: bool = True, m: int = M) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = (B, HEADS, m, D), (B, HEADS, N, D), (B, HEADS, N, D), (B, HEADS, N)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad) for shape in shapes)


def agree(attend: Callable[..., Tensor], given: tuple[Tensor, ...]) -> None:
    expected = attend(*given)
    torch._dynamo.reset()
    ours = torch.compile(attend, backend="attncompiler", options={"inner": "aot_eager"})(*given)
    torch.testing.assert_close(ours, expected)
    if expected.requires_grad:
        grad = torch.randn_like(expected)
        for mine, right in zip(*(torch.autograd.grad(o, given, grad, allow_unused=True) for o in (ours, expected)), strict=True):
            torch.testing.assert_close(mine, right)


def has_list(attend: Callable[..., Tensor], given: tuple[Tensor, ...]) -> bool:
    (region,) = attncompiler.explain(attend, *given).regions
    return "picked" in region.ir


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chosen", LISTS, ids=lambda f: f.__name__)
def test_lists(chosen: Chosen, with_bias: bool) -> None:
    attend = attending(chosen, with_bias)
    for grad in (True, False):  # in inference too: what is ranked is a bias, not a mask
        assert has_list(attend, inputs(grad))
        agree(attend, inputs(grad))


@pytest.mark.parametrize("chosen", MASKS, ids=lambda f: f.__name__)
def test_masks(chosen: Chosen) -> None:
    attend = attending(chosen)
    assert not has_list(attend, inputs())
    agree(attend, inputs())


@pytest.mark.parametrize("chosen", [*LISTS, compared, majority], ids=lambda f: f.__name__)
def test_one_query(chosen: Chosen) -> None:
    """Decoding reads the chosen keys alone."""
    attend = attending(chosen)
    assert has_list(attend, inputs(False, 1)) == (chosen in LISTS and chosen is not of_each_query_compared)
    agree(attend, inputs(False, 1))
    agree(attend, inputs(True, 1))


@pytest.mark.parametrize("chosen", LISTS, ids=lambda f: f.__name__)
def test_nothing_of_all_pairs_is_left(chosen: Chosen) -> None:
    """The graph that is compiled holds no tensor with a number for each query and key."""
    shapes: list[tuple[int, ...]] = []

    def record(module: GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        compiled = compile_graph(module, given).module
        compiled.graph.eliminate_dead_code()
        vals = [node.meta.get("val") for node in compiled.graph.nodes]
        shapes.extend(tuple(val.shape) for val in vals if isinstance(val, Tensor))
        return module.forward

    torch.compile(attending(chosen), backend=record)(*inputs())
    assert shapes and not any({M, N} <= set(shape) for shape in shapes)


def test_a_gradient_through_what_is_ranked_elsewhere() -> None:
    """The values of topk and the rank are used again, with gradients."""

    def attend(q: Tensor, k: Tensor, v: Tensor, rank: Tensor) -> Tensor:
        values, indices = rank.topk(W, -1)
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, indices, True)[:, :, None]
        o = (q @ k.mT + rank[:, :, None]).masked_fill(~kept, -torch.inf).softmax(-1) @ v
        return o * values.mean(-1)[..., None, None] + rank.gather(-1, indices).sum()

    assert has_list(attend, inputs())
    agree(attend, inputs())


def test_ends() -> None:
    """All keys are chosen; NaN ranks above inf; of equal ranks as many as asked are kept."""

    def all_keys(q: Tensor, rank: Tensor) -> Tensor:
        return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, rank.topk(N, -1).indices, True)[:, :, None]

    agree(attending(all_keys), inputs())
    given = list(inputs(False))
    given[3] = given[3].clone()
    given[3][0, 0, 5], given[3][1, 2, 7], given[3][1, 3] = torch.nan, torch.inf, 0.25
    agree(attending(scattered, with_bias=False), tuple(given))

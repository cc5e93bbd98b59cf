"""Every way of writing softmax attention ends in the same few clauses; near misses do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attncompiler

B, H, N, D = 2, 4, 12, 16
PLAIN = "dot(q[b, h, q_idx], k[b, h, kv_idx])"


def operands(heads_kv: int = H, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, N, D, generator=generator)
    k, v = (torch.randn(B, heads_kv, n, D, generator=generator) for _ in range(2))
    return q, k, v


def program_of(f: Callable[..., object], *args: object) -> str:
    """The text of the one region of `f`."""
    torch._dynamo.reset()
    explanation = attncompiler.explain(f, *(args or operands()))
    assert not explanation.missed, explanation.missed
    (region,) = explanation.regions
    return region.ir


def clause(text: str, name: str) -> str:
    """The body of a clause; "" if the program has none."""
    bodies = [line.strip().partition(" ")[2].strip() for line in text.splitlines() if line.strip().startswith(name + " ")]
    return bodies[0] if bodies else ""


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1) @ v,
    "mT": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "einsum": lambda q, k, v: torch.einsum("xyab,xybc->xyac", torch.einsum("xyad,xybd->xyab", q, k).softmax(-1), v),
    "einsum ellipsis": lambda q, k, v: torch.einsum("...ab,...bc->...ac", torch.einsum("...ad,...bd->...ab", q, k).softmax(-1), v),
    "transposed scores": lambda q, k, v: (k @ q.mT).softmax(dim=-2).mT @ v,
    "transposed output": lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).mT,
    "bmm": lambda q, k, v: torch.bmm(
        torch.bmm(q.reshape(B * H, N, D), k.reshape(B * H, N, D).transpose(1, 2)).softmax(-1), v.reshape(B * H, N, D)
    ),
    "baddbmm": lambda q, k, v: torch.bmm(
        torch.baddbmm(torch.empty(B * H, N, N), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0).softmax(-1), v.flatten(0, 1)
    ),
    "exp and sum": lambda q, k, v: _over_row_sum((q @ k.mT).exp()) @ v,
    "exp, max and sum": lambda q, k, v: _over_row_sum((q @ k.mT - (q @ k.mT).amax(-1, keepdim=True)).exp()) @ v,
    "log_softmax": lambda q, k, v: (q @ k.mT).log_softmax(-1).exp() @ v,
    "logsumexp": lambda q, k, v: (q @ k.mT - (q @ k.mT).logsumexp(-1, keepdim=True)).exp() @ v,
    "float32": lambda q, k, v: F.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype) @ v,
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0),
}


def _over_row_sum(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_are_one_program(spelling: str) -> None:
    text = program_of(SPELLINGS[spelling])
    assert clause(text, "score").removesuffix(" * 1.0") == PLAIN
    assert clause(text, "weigh") == "softmax"
    assert clause(text, "sum") == "v[b, h, kv_idx]"
    assert not clause(text, "keep")
    assert clause(text, "axes") == f"b={B}, h={H}, q_idx={N}, kv_idx={N}"


@pytest.mark.parametrize("how", ["expand", "repeat_interleave", "grouped", "enable_gqa"])
def test_grouped_heads_are_read_where_they_lie(how: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if how == "enable_gqa":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if how == "grouped":
            scores = torch.einsum("bcgqd,bckd->bcgqk", q.view(B, 2, 2, N, D), k)
            return torch.einsum("bcgqk,bckd->bqcgd", scores.softmax(-1), v)
        if how == "expand":
            k, v = (x[:, :, None].expand(B, 2, 2, N, D).reshape(B, H, N, D) for x in (k, v))
        else:
            k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return (q @ k.mT).softmax(-1) @ v

    text = program_of(attention, *operands(heads_kv=2))
    assert "k[b, h // 2, kv_idx]" in clause(text, "score")
    assert clause(text, "sum") == "v[b, h // 2, kv_idx]"
    assert f"k: f32[{B}, 2, {N}, {D}]" in text  # not repeated


MASKS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "tril": (lambda s: s.masked_fill(torch.tril(torch.ones(N, N)) == 0, -math.inf), "kv_idx <= q_idx else nan"),
    "triu": (lambda s: s + torch.triu(torch.full((N, N), -math.inf), 1), "kv_idx <= q_idx"),
    "arange": (
        lambda s: torch.where(torch.arange(N)[:, None] >= torch.arange(N)[None], s, -math.inf),
        "kv_idx <= q_idx else nan",
    ),
    "finite": (
        lambda s: torch.where(torch.arange(N)[:, None] >= torch.arange(N)[None], s, torch.finfo(s.dtype).min),
        "kv_idx <= q_idx else score",
    ),
    "window": (
        lambda s: s.masked_fill((torch.arange(N)[:, None] - torch.arange(N)).abs() > 3, torch.finfo(torch.float32).min),
        "else score",
    ),
    "added": (
        lambda s: s + torch.zeros(N, N).masked_fill(torch.arange(N)[None] > torch.arange(N)[:, None], torch.finfo(s.dtype).min),
        "kv_idx <= q_idx else score",
    ),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_made_of_positions_become_predicates(mask: str) -> None:
    apply, expected = MASKS[mask]
    text = program_of(lambda q, k, v: apply(q @ k.mT).softmax(-1) @ v)
    assert expected in clause(text, "keep")
    assert "mask" not in clause(text, "read") and "bias" not in clause(text, "read")


def test_a_padding_mask_is_read_one_value_a_key() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~pad[:, None, None, :], -math.inf).softmax(-1) @ v

    text = program_of(attention, *operands(), torch.ones(B, N, dtype=torch.bool))
    assert f"bool[{B}, {N}]" in clause(text, "read")
    assert "[b, kv_idx] else nan" in clause(text, "keep")


def test_keys_before_a_length_stay_a_rule() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        kept = torch.arange(N) < lengths[:, None, None, None]
        return (q @ k.mT).masked_fill(~kept, -math.inf).softmax(-1) @ v

    assert clause(program_of(attention, *operands(), torch.tensor([5, 9])), "keep") == "kv_idx < lengths[b] else nan"


def test_a_mask_assigned_in_part_is_a_rule_of_positions() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept = torch.ones(N, N, dtype=torch.bool)
        kept[4:, 4:] = torch.ones(N - 4, N - 4, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept)

    assert clause(program_of(attention), "keep") == "(q_idx < 4) | (kv_idx < 4) | (kv_idx <= q_idx) else zero"


def test_an_additive_mask_of_the_caller_is_a_proved_fact_beside_the_score() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT + mask).softmax(-1) @ v

    text = program_of(attention, *operands(), torch.zeros(B, 1, N, N))
    assert clause(text, "keep") == "mask[b, 0, q_idx, kv_idx] > -1e+30 else score"


def test_a_learned_bias_is_never_read_as_a_mask() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias).softmax(-1) @ v

    text = program_of(attention, *operands(), torch.zeros(1, H, N, N, requires_grad=True))
    assert not clause(text, "keep")
    assert clause(text, "score") == f"{PLAIN} + bias[0, h, q_idx, kv_idx]"


def test_sinks_are_extra_scores() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        scores = torch.cat([q @ k.mT, sink.reshape(1, -1, 1, 1).expand(B, H, N, 1)], -1)
        scores = scores - scores.max(-1, keepdim=True).values
        return scores.softmax(-1)[..., :-1] @ v

    assert clause(program_of(attention, *operands(), torch.randn(H)), "weigh") == "softmax(sink[h])"


def test_softmax_plus_one_is_an_extra_score_of_zero() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return e / (1 + e.sum(-1, keepdim=True)) @ v

    assert clause(program_of(attention), "weigh") == "softmax(0.0)"


def test_dropout_is_a_factor_from_a_counter() -> None:
    text = program_of(lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.25) @ v)
    assert clause(text, "adjust") == f"where(uniform(seed[0]) >= 0.25, {1 / 0.75!r}, 0.0)"


def test_two_score_terms_and_a_softcap() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, a: Tensor, c: Tensor) -> Tensor:
        return ((q @ k.mT + a @ c.mT) / 5).tanh().mul(5).softmax(-1) @ v

    text = program_of(attention, *operands(), torch.randn(B, H, N, 4), torch.randn(B, H, N, 4))
    assert clause(text, "score").count("dot(") == 2 and "tanh" in clause(text, "score")


NEAR_MISSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax over queries": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "squared weights": lambda q, k, v: (q @ k.mT).softmax(-1) ** 2 @ v,
    "talking heads": lambda q, k, v: torch.einsum("bhqk,hg->bgqk", (q @ k.mT).softmax(-1), torch.ones(H, H)) @ v,
    "renormalised over heads": lambda q, k, v: _over_heads((q @ k.mT).softmax(-1)) @ v,
}


def _over_heads(x: Tensor) -> Tensor:
    return x / x.sum(1, keepdim=True)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_with_a_reason(name: str) -> None:
    torch._dynamo.reset()
    explanation = attncompiler.explain(NEAR_MISSES[name], *operands())
    assert not explanation.regions
    assert explanation.missed and explanation.missed[0].source_location.startswith("test_recognise.py:")


def test_weights_that_are_returned_are_left() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights

    torch._dynamo.reset()
    (missed,) = attncompiler.explain(attention, *operands()).missed
    assert "weights are read" in missed.reason and missed.advice


def test_sizes_stay_symbolic() -> None:
    seen: list[str] = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.arange(k.shape[2])[None] <= torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2])
        return (q @ k.mT).masked_fill(~keep, -math.inf).softmax(-1) @ v

    def backend(module, inputs):  # type: ignore[no-untyped-def]
        from attncompiler.backend import compile_or_leave
        from attncompiler.ir import to_text

        compiled = compile_or_leave(module, inputs)
        seen.extend(to_text(site.program) for site in compiled.sites)
        return compiled.module.forward

    torch._dynamo.reset()
    compiled = torch.compile(attention, backend=backend, dynamic=True)
    for m, n in ((5, 9), (7, 7), (3, 20)):
        q, k, v = torch.randn(B, H, m, D), torch.randn(B, H, n, D), torch.randn(B, H, n, D)
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    assert seen and all("kv_idx=s" in text for text in seen)
    assert len(seen) <= 2


def test_lse_comes_from_the_same_kernel() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT
        return scores.softmax(-1) @ v, torch.logsumexp(scores, dim=-1, keepdim=True)

    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="attncompiler", options={"inner": "aot_eager"})
    for ours, eager in zip(compiled(*operands()), attention(*operands()), strict=True):
        torch.testing.assert_close(ours, eager)
    assert len(attncompiler.explain(attention, *operands()).regions) == 1


def test_a_mask_too_weak_to_skip_by_is_noted() -> None:
    """-1e9 is not proved to beat every score: the pairs are computed, and the user is told."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
        return (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1) @ v

    explanation = attncompiler.explain(attention, *operands())
    assert "-1e+09 a score may still count" in str(explanation) and explanation.regions[0].mask == "all pairs"


def _zeroed(name: str) -> Callable[..., Tensor]:
    """Weights set to 0 after the softmax, of queries past a length too, which keep no key."""

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        real = i < lengths[:, None]
        keep = (real[:, None, :] & real[:, :, None])[:, None]
        left = {
            "the mask": keep, "real queries": real[:, None, :, None], "queries with keys": keep.any(-1, keepdim=True),
            "late queries": (i > 20)[:, None], "more than the mask": keep | (i < 3), "a band": (i[:, None] - i).abs() < 30,
        }[name]  # fmt: skip
        weights = (q @ k.mT / 3).masked_fill(~keep, -math.inf).softmax(-1)
        return torch.where(left, weights * 2, 0.0) @ v

    return attend


@pytest.mark.parametrize(
    ("left", "taken"),
    [
        ("the mask", True), ("real queries", True), ("queries with keys", False), ("late queries", False), ("more than the mask", False),
        ("a band", False),
    ],
)  # fmt: skip
def test_nan_weights_that_become_0(left: str, taken: bool) -> None:
    """As eager: 0 where the NaN of a row without keys is not chosen, which a factor of 0 would not make it."""
    attend, lengths = _zeroed(left), torch.tensor([40, 60])
    qkv = [torch.randn(2, 2, 60, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert bool(attncompiler.explain(attend, *qkv, lengths).regions) == taken
    compiled = torch.compile(attend, backend="attncompiler", options={"inner": "aot_eager"})
    expected, found = attend(*qkv, lengths), compiled(*qkv, lengths)
    torch.testing.assert_close(found, expected, equal_nan=True)
    for mine, right in zip(*(torch.autograd.grad(o.sum(), qkv) for o in (found, expected)), strict=True):
        torch.testing.assert_close(mine, right, equal_nan=True)

"""Linear attention as people write it is taken as states, with its gradients; what is none, or can't be proved, is left with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attncompiler

B, H, N, D = 2, 4, 48, 8
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, H, N, D], g: rates [H] or logarithms [B, H, N]


def positions(like: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.arange(like.shape[-2], device=like.device)
    return i[:, None], i[None, :]


def times(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    return (q @ k.mT * factor) @ v


# ------------------------------------------------------------------------------------------------------- taken: rates of heads


def tril_of_exponential(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, torch.exp(-g[:, None, None] * (i - j)).tril())


def clamped_and_masked(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, torch.exp(-g[:, None, None] * (i - j).clamp(min=0)) * (i >= j))


def absolute_distance_filled(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, torch.exp(-g[:, None, None] * (i - j).abs()).masked_fill(i < j, 0.0))


def infinite_above_the_diagonal(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    exponent = (-g[:, None, None] * (i - j)).masked_fill(j > i, -torch.inf)
    return times(q, k, v, exponent.exp())


def power_of_gamma(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    gamma = torch.sigmoid(g)[:, None, None]
    return times(q, k, v, torch.where(i >= j, gamma ** (i - j), 0.0))


def one_gamma_for_all(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, (0.9 ** (i - j).to(q.dtype)).tril())


def by_einsum(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * torch.exp(-g[:, None, None] * (i - j)).tril()
    return torch.einsum("bhij,bhjd->bhid", scores, v)


def own_key_left_out_of_steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, torch.exp(-g[:, None, None] * (i - j - 1)).tril(-1))


def retnet(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype))
    return times(q, k, v, torch.where(i >= j, gamma[:, None, None] ** (i - j), 0.0))


def retnet_by_logarithms(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    decay = torch.log(1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64)))
    return times(q, k, v, torch.exp((i - j) * decay[:, None, None]).masked_fill(i < j, 0.0))


def rate_of_any_sign(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, torch.exp((-g)[:, None, None] * (i - j)).tril())


def scaled(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q * D**-0.5, k, v, torch.exp(-g[:, None, None] * (i - j)).tril()) * 2.0


def causal_without_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


# ------------------------------------------------------------------------------------------------ taken: logarithms of tokens


def differences_of_sums(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    total = F.logsigmoid(g).cumsum(-1)
    return times(q, k, v, torch.exp(total[..., :, None] - total[..., None, :]).tril())


def differences_that_are_masked_first(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    total = torch.cumsum(-F.softplus(g), -1)
    exponent = (total[..., :, None] - total[..., None, :]).masked_fill(i < j, -torch.inf)
    return times(q, k, v, exponent.exp())


# ------------------------------------------------------------------------------------------------------------ taken: normalisers


def over_its_row(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    scores = (F.relu(q) @ F.relu(k).mT).tril()
    return scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)


def weights_over_their_row(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    scores = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    return (scores / scores.sum(-1, keepdim=True)) @ v


def over_at_least_one(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    scores = q @ k.mT * torch.exp(-g[:, None, None] * (i - j)).tril()
    return scores / scores.sum(-1, keepdim=True).abs().clamp(min=1.0) @ v


# ------------------------------------------------------------------------------------------ taken: all keys, and running sums


def all_keys(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (F.relu(q) @ F.relu(k).mT) @ v


def running_sum_of_outer_products(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    states = (k[..., :, None] * v[..., None, :]).cumsum(-3)
    return torch.einsum("bhnc,bhncd->bhnd", q, states)


def running_sum_by_einsum(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (q.unsqueeze(-2) @ torch.einsum("bhnc,bhnd->bhncd", k, v).cumsum(2)).squeeze(-2)


def running_sum_over_its_row(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    states = torch.einsum("bhnc,bhnd->bhncd", k, v).cumsum(2)
    row = torch.einsum("bhnc,bhnc->bhn", q, k.cumsum(2))
    return torch.einsum("bhnc,bhncd->bhnd", q, states) / row[..., None]


BY_HEAD = [
    tril_of_exponential, clamped_and_masked, absolute_distance_filled, infinite_above_the_diagonal, power_of_gamma,
    one_gamma_for_all, own_key_left_out_of_steps, retnet, retnet_by_logarithms, rate_of_any_sign, by_einsum, scaled,
    causal_without_decay, over_its_row, weights_over_their_row,
    over_at_least_one, all_keys, running_sum_of_outer_products, running_sum_by_einsum, running_sum_over_its_row,
]  # fmt: skip
BY_TOKEN = [differences_of_sums, differences_that_are_masked_first]


def inputs(of_token: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    made = [torch.randn(B, H, N, D, dtype=dtype) for _ in range(3)]
    g = torch.randn(B, H, N, dtype=dtype) if of_token else torch.tensor([0.0, 0.02, 0.3, 2.0], dtype=dtype)
    return tuple(tensor.requires_grad_() for tensor in (*made, g))


def results(form: Form, leaves: tuple[Tensor, ...]) -> list[Tensor | None]:
    out = form(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight, allow_unused=True)]


@pytest.mark.parametrize("form", [*BY_HEAD, *BY_TOKEN], ids=lambda form: form.__name__)
def test_taken_with_its_gradients(form: Form) -> None:
    leaves = inputs(form in BY_TOKEN)
    found = attncompiler.explain(form, *leaves)
    assert [region.family for region in found.regions] == ["state"], str(found)
    torch.compiler.reset()
    compiled = torch.compile(form, backend="attncompiler", options={"inner": "eager"}, dynamic=False)
    for ours, eager in zip(results(compiled, leaves), results(form, leaves), strict=True):
        assert (ours is None) == (eager is None)
        if ours is not None:
            torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------------- left


def grows(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, torch.exp(F.softplus(g)[:, None, None] * (i - j)).tril())


def grows_by_numbers(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    gamma = 1 + 2.0 ** (-5 - torch.arange(H))
    return times(q, k, v, (gamma[:, None, None] ** (i - j)).tril())


def falls_with_the_square(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, torch.exp(-g[:, None, None] * (i - j) ** 2).tril())


def falls_as_a_fraction(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, (1 / (1 + (i - j).abs())).tril())


def own_key_left_out(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, torch.exp(-g[:, None, None] * (i - j)).tril(-1))


def no_running_sum(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return times(q, k, v, torch.exp(g[..., :, None] - g[..., None, :]).tril())


def sums_that_are_added(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    total = g.cumsum(-1)
    return times(q, k, v, torch.exp(total[..., :, None] + total[..., None, :]).tril())


def both_sides(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, torch.exp(-g[:, None, None] * (i - j).abs()))


def later_keys(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, torch.exp(-g[:, None, None] * (j - i)).triu())


def window(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, torch.exp(-g[:, None, None] * (i - j)) * ((i >= j) & (i - j < 16)))


def base_of_any_sign(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return times(q, k, v, (g[:, None, None] ** (i - j)).tril())


def base_of_two_signs(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    gamma = 1 - 0.5 * torch.arange(H)
    return times(q, k, v, (gamma[:, None, None] ** (i - j)).tril())


def relu_of_scores(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    i, j = positions(q)
    return F.relu(q @ k.mT * torch.exp(-g[:, None, None] * (i - j)).tril()) @ v


def squared_scores(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return (q @ k.mT).square().tril() @ v


def dropped_scores(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).tril(), 0.5) @ v


def scores_that_are_read(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    scores = (q @ k.mT).tril()
    return scores @ v + scores.sum(-1, keepdim=True)


def over_columns(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    scores = (q @ k.mT).tril()
    return scores / scores.sum(-2, keepdim=True).abs() @ v


def keys_and_values_first(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return F.relu(q) @ (F.relu(k).mT @ v * 0.5)


LEFT: list[tuple[Form, bool, str]] = [  # form, whether g is of tokens, words of the reason
    (grows, False, "grows with the distance"),
    (grows_by_numbers, False, "grows with the distance"),
    (falls_with_the_square, False, "does not separate into one of the query and one of the key"),
    (falls_as_a_fraction, False, "q_idx - kv_idx + 1 mixes them"),
    (own_key_left_out, False, "whatever the distance"),
    (no_running_sum, True, "is no running sum (torch.cumsum)"),
    (sums_that_are_added, True, "also weighs each query or key by itself"),
    (both_sides, False, "the keys after a query are not proved to weigh nothing"),
    (later_keys, False, "is not causal"),
    (window, False, "q_idx - kv_idx < 16"),
    (base_of_any_sign, False, "not known to be positive"),
    (base_of_two_signs, False, "not known to be positive"),
    (relu_of_scores, False, "stands maximum"),
    (squared_scores, False, "not a product of queries and keys times a factor"),
    (dropped_scores, False, "stands dropout"),
    (scores_that_are_read, False, "are read by other code"),
    (over_columns, False, "kv_idx"),
    (keys_and_values_first, False, "as written it takes time and memory linear in the tokens"),
]


@pytest.mark.parametrize(("form", "of_token", "reason"), LEFT, ids=lambda x: getattr(x, "__name__", None))
def test_left_with_its_reason(form: Form, of_token: bool, reason: str) -> None:
    found = attncompiler.explain(form, *inputs(of_token))
    assert not found.regions
    (missed,) = found.missed
    assert reason in missed.reason, missed.reason


def test_what_is_no_linear_attention_is_not_spoken_of() -> None:
    """Low-rank layers and Gram matrices are chains of products too."""

    def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ (a.mT @ b)

    def gram(x: Tensor) -> Tensor:
        return x.mT @ x

    x = torch.randn(2, 64, 8)
    for form, leaves in ((low_rank, (x, torch.randn(2, 4, 8), torch.randn(2, 4, 8))), (gram, (x,))):
        found = attncompiler.explain(form, *leaves)
        assert not found.regions and not found.missed, str(found)


# -------------------------------------------------------------------------------------------------------- operands that change


def values_change_between(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    v = v * 1.0
    scores = (q @ k.mT).tril()
    v.mul_(2.0)
    return scores @ v


def keys_change_after_their_product(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    k = k * 1.0
    scores = (q @ k.mT).tril()
    k.add_(1.0)
    return scores @ v + k


def scores_change(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    scores = (q @ k.mT).tril()
    scores.mul_(0.5)
    return scores @ v


@pytest.mark.parametrize("form", [values_change_between, keys_change_after_their_product, scores_change], ids=lambda f: f.__name__)
def test_writes_in_place_keep_their_order(form: Form) -> None:
    leaves = inputs(False)
    torch.compiler.reset()
    compiled = torch.compile(form, backend="attncompiler", options={"inner": "eager"}, dynamic=False)
    with torch.no_grad():  # eager itself has no gradient of most
        torch.testing.assert_close(compiled(*leaves), form(*leaves), rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------- what was proved


def test_signs_of_few_numbers_are_looked_at() -> None:
    """1 - 2 ** (-5 - h) is positive and below 1 for the heads that there are, which no rule of signs says."""
    (region,) = attncompiler.explain(retnet, *inputs(False)).regions
    assert any("every exponent is at most 0" in note for note in region.notes), region.notes

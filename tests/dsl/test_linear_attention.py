"""Linear attention as it is declared: against its definition, eager and compiled, in pieces, and its errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attncompiler import RowSum, StateValue, explain, linear_attention
from attncompiler.errors import OptionError

B, H, N, D, E = 2, 4, 37, 8, 6


def _inputs(heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.randn(B, H, N, D), torch.randn(B, heads, N, D), torch.randn(B, heads, N, E)
    return tuple(tensor.double().requires_grad_() for tensor in made)  # type: ignore[return-value]


def _dense(q: Tensor, k: Tensor, v: Tensor, log: Tensor | None = None, causal: bool = True, scale: float = 1.0) -> Tensor:
    """The definition, quadratic; `log` [B | 1, H, N]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    n, m = k.shape[2], q.shape[2]
    total = torch.zeros(1, 1, n, dtype=q.dtype) if log is None else log.cumsum(-1)
    end = total if causal else total[..., -1:].expand(*total.shape[:-1], m)
    difference = end[..., :, None] - total[..., None, :]
    if causal:
        difference = difference.masked_fill(torch.ones(n, n).tril() == 0, float("-inf"))
    return (q @ k.mT * difference.exp() * scale) @ v


def _same(found: Tensor, right: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, right)
    weight = torch.randn_like(right)
    for got, exact in zip(torch.autograd.grad(found, inputs, weight), torch.autograd.grad(right, inputs, weight), strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "attncompiler"])
def test_decay_of_heads(backend: str) -> None:
    inputs = *_inputs(), -torch.rand(H).double().requires_grad_()

    def layer(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
        return linear_attention(q, k, v, decay=log, feature_map=F.silu, scale=0.5)

    run: Callable[..., Any] = layer if backend == "eager" else torch.compile(layer, backend=backend, fullgraph=True)
    right = _dense(F.silu(inputs[0]), F.silu(inputs[1]), inputs[2], inputs[3].reshape(1, H, 1).expand(1, H, N), scale=0.5)
    _same(run(*inputs), right, inputs)


@pytest.mark.parametrize("causal", [True, False])
def test_decay_of_tokens_and_groups_of_heads(causal: bool) -> None:
    inputs = *_inputs(2), (-torch.rand(B, H, N).double()).requires_grad_()
    q, k, v, log = inputs
    found = linear_attention(q, k, v, decay=log, causal=causal, enable_gqa=True)
    _same(found, _dense(q, k, v, log, causal), inputs)


def test_normaliser() -> None:
    inputs = _inputs()
    q, k, v = inputs
    feature = lambda x: F.elu(x) + 1.0
    found = linear_attention(q, k, v, feature_map=feature, normaliser=RowSum(eps=1e-4))
    row = _dense(feature(q), feature(k), torch.ones_like(v[..., :1]))
    _same(found, _dense(feature(q), feature(k), v) / (row + 1e-4), inputs)
    found = linear_attention(q, k, v, normaliser=RowSum(0.0, absolute=True, least=1.0))
    row = _dense(q, k, torch.ones_like(v[..., :1]))
    _same(found, _dense(q, k, v) / row.abs().clamp(min=1.0), inputs)


def test_more_queries_than_keys_see_all() -> None:
    q, k, v = torch.randn(B, H, 11, D).double(), *_inputs()[1:]
    torch.testing.assert_close(linear_attention(q, k, v, causal=False), _dense(q, k, v, causal=False))


@pytest.mark.parametrize("normaliser", [None, RowSum(absolute=True, least=1.0)])
def test_a_prompt_and_then_tokens(normaliser: RowSum | None) -> None:
    inputs = *_inputs(), -torch.rand(B, H, N).double().requires_grad_()
    whole = linear_attention(*inputs[:3], decay=inputs[3], normaliser=normaliser)
    state: StateValue | None = None
    parts = []
    for start, stop in [(0, 20), *((i, i + 1) for i in range(20, N))]:
        piece = [x[:, :, start:stop] for x in inputs]
        o, state = linear_attention(*piece[:3], decay=piece[3], normaliser=normaliser, initial_state=state, return_state=True)  # type: ignore[misc]
        parts.append(o)
    _same(torch.cat(parts, 2), whole, inputs)


def test_lengths_may_change_without_a_new_graph() -> None:
    counted = torch._dynamo.testing.CompileCounter()
    run = torch.compile(lambda q, k, v: linear_attention(q, k, v), backend=counted, dynamic=True)
    for n in (5, 9, 300):
        q = torch.randn(1, 2, n, 8)
        torch.testing.assert_close(run(q, q, q), _dense(q, q, q), rtol=1e-4, atol=1e-3)
    assert counted.frame_count == 1


def test_explain_shows_the_program_and_its_kernels() -> None:
    found = explain(lambda q: linear_attention(q, q, q, decay=-torch.ones(2)), torch.randn(1, 2, 64, 16))
    (region,) = found.regions
    assert (region.family, region.mask) == ("state", "kv_idx <= q_idx") and region.ir.startswith("state")
    assert "def state_outputs(" in region.kernels["state"] and region.source_location.startswith("test_linear_attention.py:")
    assert "kv_idx <= q_idx" in str(found)


X = torch.zeros(1, 2, 5, 8)
WRONG: dict[str, dict[str, Any]] = {
    "dimensions": {"q": X[0]},
    "k is torch.float64": {"k": X.double()},
    "do not fit": {"k": X[..., :4]},
    "4 heads of queries and 2 of keys": {"q": X.repeat(1, 2, 1, 1)},
    "3 queries and 5 keys": {"q": X[:, :, :3]},
    "positive logarithm": {"decay": torch.ones(2)},
    "decay is torch.float32 of shape": {"decay": torch.zeros(3)},
    "initial_state.state is": {"initial_state": StateValue(torch.zeros(1, 2, 8))},
    "has no row": {"initial_state": StateValue(torch.zeros(1, 2, 8, 8)), "normaliser": RowSum()},
    "has a row": {"initial_state": StateValue(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8))},
}


@pytest.mark.parametrize("words", WRONG)
def test_what_does_not_fit_is_said(words: str) -> None:
    with pytest.raises(OptionError, match=words):
        linear_attention(**{"q": X, "k": X, "v": X, **WRONG[words]})

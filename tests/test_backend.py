"""The backend as a user meets it: options, training, autocast, dynamic lengths, and code that it leaves alone."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import attncompiler
from attncompiler.backend import attncompiler as backend


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf).softmax(-1) @ v


def qkv(n: int = 40, grad: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 16, generator=g).to(dtype).requires_grad_(grad) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_every_inner_compiler(inner: str) -> None:
    inputs = qkv(grad=True)
    out = torch.compile(causal, backend="attncompiler", options={"inner": inner})(*inputs)
    torch.testing.assert_close(out, causal(*inputs))
    found = torch.autograd.grad(out.square().sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(causal(*inputs).square().sum(), inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"iner": "eager"}}, r"unknown option 'iner'[\s\S]*did you mean 'inner'"),
        ({"options": {"inner": "xla"}}, r"inner='xla' is not one of 'inductor', 'aot_eager', 'eager'"),
        ({"options": {"inner": "eager"}, "mode": "max-autotune"}, r"given together"),
        ({"mode": "max-autotune"}, r"mode='max-autotune' is not known"),
    ],
)
def test_wrong_options_are_explained(given: dict[str, Any], message: str) -> None:
    with pytest.raises(attncompiler.errors.OptionError, match=message):
        backend(mock.Mock(), [], **given)


def test_it_is_found_without_an_import() -> None:
    """The entry point alone; and code that has no file, as at a prompt."""
    code = """
import torch
def f(q, k, v): return (q @ k.mT).softmax(-1) @ v
x = torch.randn(1, 1, 8, 16, requires_grad=True)
torch.compile(f, backend="attncompiler", options={"inner": "aot_eager"})(x, x.cos(), x.sin()).sum().backward()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_lengths_that_change_recompile_no_more_than_eager() -> None:
    """One graph for the first length, one for all others: what Dynamo does by itself."""

    def graphs(compiler: str | Callable[..., Any]) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(compiler)
        compiled = torch.compile(causal, backend=counter)
        for n in (40, 56, 72, 33):
            inputs = qkv(n)
            torch.testing.assert_close(compiled(*inputs), causal(*inputs))
        return int(counter.frame_count)

    assert graphs("attncompiler") == graphs("eager")


def test_autocast() -> None:
    inputs = qkv(grad=True)
    compiled = torch.compile(causal, backend="attncompiler", options={"inner": "aot_eager"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = compiled(*inputs), causal(*inputs)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    out.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in inputs)


def test_dropout_has_one_mask_in_forward_and_backward() -> None:
    """With v the identity the output is the dropped weights, and the gradient of v shows the same mask."""

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.dropout((q @ k.mT).softmax(-1), 0.5) @ v

    n = 32
    q, k = torch.randn(1, 1, n, 16), torch.randn(1, 1, n, 16)
    v = torch.eye(n).reshape(1, 1, n, n).requires_grad_()
    compiled = torch.compile(dropped, backend="attncompiler", options={"inner": "aot_eager"})
    assert len(attncompiler.explain(dropped, q, k, v).regions) == 1
    torch._dynamo.reset()
    torch.manual_seed(3)
    weights = compiled(q, k, v)
    (grad,) = torch.autograd.grad(weights, v, torch.eye(n).reshape(1, 1, n, n))
    torch.testing.assert_close(grad, weights.detach().mT)
    assert 0.4 < (weights == 0).double().mean() < 0.6
    torch.manual_seed(3)
    assert torch.equal(compiled(q, k, v), weights), "the same seed gives the same mask"
    assert not torch.equal(compiled(q, k, v), weights), "and the next call another"


def test_flex_attention_is_taken_with_its_mods() -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - slopes[h] * (q_idx - kv_idx)

    def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < 30)

    mask = create_block_mask(window, None, None, 256, 256, device="cpu")

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex_attention(q, k, v, score_mod=alibi, block_mask=mask)
        assert isinstance(out, Tensor)
        return out

    inputs = qkv(256)
    (region,) = attncompiler.explain(f, *inputs).regions
    assert "kv_idx" in region.mask and "slopes" not in region.mask
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(f, backend="attncompiler", options={"inner": "aot_eager"})(*inputs)
        torch.testing.assert_close(found, f(*inputs), atol=1e-5, rtol=1e-5)


def test_a_mistake_of_ours_leaves_the_graph_to_the_inner_compiler() -> None:
    inputs = qkv()
    with mock.patch("attncompiler.backend.compile_graph", side_effect=RuntimeError("a bug")):
        torch.testing.assert_close(torch.compile(causal, backend="attncompiler")(*inputs), causal(*inputs))
        torch._dynamo.reset()
        (missed,) = attncompiler.explain(causal, *inputs).missed
    assert "a bug" in missed.reason


def test_no_graph_break_of_ours() -> None:
    counters.clear()
    torch.compile(causal, backend="attncompiler", fullgraph=True)(*qkv())
    assert not counters["graph_break"]


def test_programs_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="attncompiler"):
        torch.compile(causal, backend="attncompiler", options={"inner": "eager"})(*qkv())
    for name in ("normalise", "recognise", "lift_mask", "zero_empty_rows"):
        assert f"after {name}:" in caplog.text
    assert "keep    kv_idx" in caplog.text


def _causal_rectangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    later = torch.arange(scores.shape[3]) > torch.arange(scores.shape[2])[:, None]
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


def _sunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, q.new_zeros(*q.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize(("m", "n"), [(5, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize(
    "attend",
    [
        torch.nn.functional.scaled_dot_product_attention, _causal_rectangle, _sunk,
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
        lambda q, k, v: attncompiler.attention(q, k, v, keep=attncompiler.masks.causal()),
    ],
    ids=["sdpa", "causal", "sink", "plain", "declared"],
)  # fmt: skip
def test_no_keys_give_zero_and_no_queries_nothing(attend: Callable[..., Tensor], m: int, n: int) -> None:
    inputs = [torch.randn(1, 2, length, 16, requires_grad=True) for length in (m, n, n)]
    out = torch.compile(attend, backend="attncompiler", options={"inner": "eager"})(*inputs)
    assert torch.equal(out, torch.zeros(1, 2, m, 16))
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert not gradient.any()


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_compiled_block_may_be_checkpointed() -> None:
    """Also at its first call, which compiles it while the checkpoint counts what is saved."""
    qkv = [torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(_attend, backend="attncompiler", options={"inner": "aot_eager"})
    found, expected = checkpoint(compiled, *qkv, use_reentrant=False), _attend(*qkv)
    for mine, right in zip(*(torch.autograd.grad(o.sum(), qkv) for o in (found, expected)), strict=True):
        torch.testing.assert_close(mine, right)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


@pytest.mark.parametrize(
    ("attend", "reason", "advice"),
    [
        (lambda *qkv: checkpoint(_attend, *qkv, use_reentrant=False), "is checkpointed", "checkpoint(torch.compile(block"),
        (lambda q, k, v: _attend(_Straight.apply(q), k, v), "torch.autograd.Function", "torch.compiler.disable"),
    ],
    ids=["checkpoint", "function"],
)
def test_graphs_that_are_left_say_why(attend: Callable[..., Tensor], reason: str, advice: str) -> None:
    qkv = [torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3)]
    (missed,) = attncompiler.explain(attend, *qkv).missed
    assert reason in missed.reason and advice in missed.advice and missed.source_location.startswith("test_backend.py:")

"""Declared routes of heads: against plain torch, and against the same attention recognised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attncompiler
from attncompiler import masks, select
from attncompiler.dsl.attention import declare
from attncompiler.errors import DeviceError, OptionError
from attncompiler.ir.text import to_text
from tests.dsl.test_attention import agree, operands

SHAPES = [(2, 4, 24), (2, 4), (4,), (1, 4, 24), (2, 1, 24), (1, 1, 1)]


def gains(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Some of them 0."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).relu().to(dtype).requires_grad_()


def across(x: Tensor) -> Tensor:
    """[B, H, M, 1], by hand."""
    return x[(*[None] * (x.dim() == 1), ..., *[None] * (4 - max(x.dim(), 2)))]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gains_of_every_shape(shape: tuple[int, ...]) -> None:
    q, k, v = operands()
    gain = gains(*shape)
    ours = attncompiler.attention(q, k, v, keep=masks.causal(), route=attncompiler.route(gain), enable_gqa=True)
    agree(ours, causal(q, k, v) * across(gain), (q, k, v))
    on = across(gain) != 0
    expected = torch.where(on, causal(q, k, v), 0.0) * across(gain)
    ours = attncompiler.attention(q, k, v, keep=masks.causal(), route=attncompiler.route(gain), enable_gqa=True)
    agree(ours, expected, (q, k, v, gain))


@pytest.mark.parametrize(("shape", "of_active"), [((2, 4, 24), (4,)), ((4,), (2, 4, 24)), ((2, 4), (2, 4, 24))], ids=str)
def test_what_is_active(shape: tuple[int, ...], of_active: tuple[int, ...]) -> None:
    """A gain that is 0 and on has a gradient, one that is not and off has none."""
    q, k, v = operands()
    gain, active = gains(*shape), torch.rand(of_active) > 0.4
    ours = attncompiler.attention(q, k, v, keep=masks.causal(), route=attncompiler.route(gain, active), enable_gqa=True)
    agree(ours, causal(q, k, v) * torch.where(across(active), across(gain), 0.0), (q, k, v, gain))


def test_a_query_without_heads_and_a_head_without_queries() -> None:
    q, k, v = (t.detach().clone() for t in operands())
    active = torch.ones(2, 4, 24, dtype=torch.bool)
    active[0, 1], active[:, :, 7] = False, False
    q[~active] = torch.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    gain = torch.where(active, 1.0, torch.nan).double()
    o, lse = attncompiler.attention(*leaves, route=attncompiler.route(gain, active), enable_gqa=True, return_lse=True)
    assert o.isfinite().all() and not o[~active].any() and (lse[~active] == -torch.inf).all() and lse[active].isfinite().all()
    grads = torch.autograd.grad(o.sum() + lse[active].sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads) and not grads[0][~active].any()
    nothing = attncompiler.attention(*leaves, route=attncompiler.route(torch.zeros(4)), enable_gqa=True)
    assert not nothing.any() and not any(grad.any() for grad in torch.autograd.grad(nothing.sum(), leaves))


def test_lse_compiled() -> None:
    q, k, v = (t.detach() for t in operands())
    gain = gains(2, 4, 24).detach()

    def f(q: Tensor, k: Tensor, v: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        return attncompiler.attention(q, k, v, route=attncompiler.route(gain), enable_gqa=True, return_lse=True)

    compiled = torch.compile(f, backend="attncompiler", options={"inner": "aot_eager"})
    torch.testing.assert_close(compiled(q, k, v, gain), f(q, k, v, gain))


def test_beside_other_clauses() -> None:
    q, k, v = operands()
    gain, rank = gains(2, 4, 24), torch.randn(2, 2, 24, dtype=torch.float64)
    chosen = select.top_k(rank, 9)
    given = {"keep": masks.causal(), "select": chosen, "enable_gqa": True}
    routed = attncompiler.attention(q, k, v, route=attncompiler.route(gain), **given)  # type: ignore[call-overload]
    agree(routed, attncompiler.attention(q, k, v, **given) * across(gain), (q, k, v))  # type: ignore[call-overload]
    torch.manual_seed(3)
    dropped = attncompiler.attention(q, k, v, route=attncompiler.route(gain), dropout_p=0.3, enable_gqa=True)
    torch.manual_seed(3)
    agree(dropped, attncompiler.attention(q, k, v, dropout_p=0.3, enable_gqa=True) * across(gain), (q, k, v))


@pytest.mark.parametrize("shape", [(2, 4, 150), (4,), (1, 4, 150)], ids=str)
def test_what_is_compiled_is_the_declared_program(shape: tuple[int, ...]) -> None:
    q, k, v = (t.detach() for t in operands(m=150, n=150))
    gain, active = gains(*shape).detach(), gains(*shape).detach() > 0.3

    def f(q: Tensor, k: Tensor, v: Tensor, gain: Tensor, active: Tensor) -> Tensor:
        return attncompiler.attention(q, k, v, keep=masks.causal(), route=attncompiler.route(gain, active), enable_gqa=True)

    found = attncompiler.explain(f, q, k, v, gain, active).regions[0].ir
    program = declare(q, k, v, keep=masks.causal(), route=attncompiler.route(gain, active), enable_gqa=True).program
    assert found.split("\n", 1)[1].strip() == to_text(program).split("\n", 1)[1].strip()
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="attncompiler", options={"inner": "aot_eager"})
    torch.testing.assert_close(compiled(q, k, v, gain, active), f(q, k, v, gain, active))


def test_gains_are_rounded_to_the_queries_dtype() -> None:
    q, k, v = (t.detach().bfloat16() for t in operands())
    route = attncompiler.route(gains(4, dtype=torch.float32))
    assert "gate: bf16[1, 4, 1]" in declare(q, k, v, route=route, enable_gqa=True).text


Q = torch.zeros(2, 4, 24, 16)
MISTAKES = {
    "the gain of route is float": lambda: attncompiler.route(1.0),  # type: ignore[arg-type]
    "the gain of route is torch.bool": lambda: attncompiler.route(torch.ones(4, dtype=torch.bool)),
    "active of route is torch.float32": lambda: attncompiler.route(torch.ones(4), torch.ones(4)),
    "the gain of route has 4 dimensions": lambda: attncompiler.route(torch.ones(2, 4, 24, 1)),
    "the active of route has 0 dimensions": lambda: attncompiler.route(torch.ones(4), torch.tensor(True)),
    r"the gain of route is \[24, 4\], for q": lambda: attncompiler.attention(Q, Q, Q, route=attncompiler.route(torch.ones(24, 4))),
    r"the active of route is \[3\], for q": lambda: attncompiler.attention(
        Q, Q, Q, route=attncompiler.route(torch.ones(4), torch.ones(3, dtype=torch.bool))
    ),
    "route is tensor": lambda: attncompiler.attention(Q, Q, Q, route=torch.ones(4)),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MISTAKES[message]()


def test_another_device_is_named() -> None:
    with pytest.raises(DeviceError, match="gain of route is on cpu, q is on meta"):
        attncompiler.attention(Q.to("meta"), Q.to("meta"), Q.to("meta"), route=attncompiler.route(torch.ones(4)))

"""Gates that switch heads, as MoH writes them, are routes; gates that only scale are left where they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attncompiler

HEADS, CHOSEN, N, D = 8, 2, 200, 16
Gate = Callable[[Tensor], Tensor]


def attend(x: Tensor, w: Tensor, causal: bool = True) -> Tensor:
    q, k, v = (x @ w).view(2, N, 3, HEADS, D).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # [2, HEADS, N, D]


def router(x: Tensor) -> Tensor:
    return x[..., :HEADS].softmax(-1)


def scattered(x: Tensor) -> Tensor:
    p = router(x)
    kept = p * torch.zeros_like(p).scatter(-1, p.topk(CHOSEN, -1).indices, 1.0)
    return CHOSEN * kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).eps)


def added(x: Tensor) -> Tensor:
    found = router(x).topk(CHOSEN, -1)
    return torch.zeros_like(x[..., :HEADS]).scatter_add(-1, found.indices, found.values)


def one_hot(x: Tensor) -> Tensor:
    p = router(x)
    return F.one_hot(p.topk(CHOSEN, -1).indices, HEADS).sum(-2) * p


def shared_and_routed(x: Tensor) -> Tensor:
    """Two heads are always on; two shares weigh both kinds."""
    p = x[..., : HEADS - 2].softmax(-1)
    routed = p * torch.zeros_like(p).scatter(-1, p.topk(CHOSEN, -1).indices, 1.0)
    mix = 2 * x[..., -2:].softmax(-1)
    return torch.cat([mix[..., :1] * x[..., 8:10].softmax(-1), torch.einsum("bn,bne->bne", mix[..., 1], routed)], -1)


def zero_or_one(x: Tensor) -> Tensor:
    p = router(x.detach())
    return torch.zeros_like(p).scatter(-1, p.topk(CHOSEN, -1).indices, 1.0)


def compared(x: Tensor) -> Tensor:
    p = router(x)
    return torch.where(p >= p.topk(CHOSEN, -1).values[..., -1:], p, 0.0)


def masked_softmax(x: Tensor) -> Tensor:
    logits = x[..., :HEADS]
    off = logits < logits.topk(CHOSEN, -1).values[..., -1:]
    return logits.masked_fill(off, -torch.inf).softmax(-1)


def of_heads(x: Tensor) -> Tensor:
    return torch.where(torch.arange(HEADS) % 2 == 0, x.mean((0, 1))[:HEADS], 0.0)


# and how many heads are expected to be on; "": known at run time
GATES: dict[Gate, str] = {
    scattered: "0.25", added: "0.25", one_hot: "0.25", shared_and_routed: "0.5", zero_or_one: "0.25", compared: "0.25",
    masked_softmax: "0.25", of_heads: "",
}  # fmt: skip


def by_mul(o: Tensor, gate: Tensor) -> Tensor:
    return (o.transpose(1, 2) * gate[..., None]).reshape(2, N, -1)


def by_einsum(o: Tensor, gate: Tensor) -> Tensor:
    return torch.einsum("bne,bned->bned", gate.expand(2, N, HEADS), o.transpose(1, 2)).reshape(2, N, -1)


def by_where(o: Tensor, gate: Tensor) -> Tensor:
    return torch.where(gate[..., None] != 0, o.transpose(1, 2), 0.0).reshape(2, N, -1)


def by_where_not(o: Tensor, gate: Tensor) -> Tensor:
    return torch.where((gate == 0).transpose(1, 2)[..., None], torch.zeros_like(o), o)


def by_where_of_views(o: Tensor, gate: Tensor) -> Tensor:
    b, n, h, d = o.transpose(1, 2).shape
    return torch.where(gate[..., None] != 0, o.transpose(1, 2), torch.zeros_like(o.transpose(1, 2))).reshape(b, n, h * d)


def by_masked_fill(o: Tensor, gate: Tensor) -> Tensor:
    return o.transpose(1, 2).contiguous().masked_fill(gate[..., None] == 0, 0).reshape(2, N, -1)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (2, N, HEADS * D), (HEADS * D, 3 * HEADS * D)
    x, w = (torch.randn(shape, dtype=torch.float64) * 0.3 for shape in shapes)
    return x.requires_grad_(), w.requires_grad_()


def agrees(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> None:
    """Compiled as it is in eager, forward and gradients."""
    right, ours = (g(x, w) for g in (f, torch.compile(f, backend="attncompiler", options={"inner": "aot_eager"})))
    torch.testing.assert_close(ours, right)
    grads = (torch.autograd.grad(out.square().sum(), (x, w)) for out in (ours, right))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("apply", [by_mul, by_einsum])
@pytest.mark.parametrize("gate", GATES)
def test_taken(gate: Gate, apply: Callable[[Tensor, Tensor], Tensor]) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return apply(attend(x, w), gate(x))

    x, w = inputs()
    torch._dynamo.reset()
    (region,) = attncompiler.explain(f, x, w).regions
    assert "  route " in region.ir and any("not computed" in note for note in region.notes)
    expected = f"{GATES[gate]} of queries and heads" if GATES[gate] else "how many is known at run time"
    assert any(f"Expected to be on: {expected}" in note for note in region.notes)
    agrees(f, x, w)


@pytest.mark.parametrize("apply", [by_where, by_where_not, by_where_of_views, by_masked_fill])
def test_outputs_may_be_chosen_and_not_multiplied(apply: Callable[[Tensor, Tensor], Tensor]) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return apply(attend(x, w), scattered(x))

    x, w = inputs()
    torch._dynamo.reset()
    (region,) = attncompiler.explain(f, x, w).regions
    assert "  route   1 where active[b, h, q_idx]" in region.ir and any("heads are switched" in note for note in region.notes)
    agrees(f, x, w)


def scaled(x: Tensor) -> Tensor:
    return x[..., :HEADS].sigmoid()


def relu(x: Tensor) -> Tensor:
    """0 where a number happens to be negative: its gradient there is relu's affair, not a proof."""
    return x[..., :HEADS].relu()


def scattered_into_ones(x: Tensor) -> Tensor:
    p = router(x)
    return torch.ones_like(p).scatter(-1, p.topk(CHOSEN, -1).indices, 2.0)


LEFT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a gate that scales": lambda x, w: by_mul(attend(x, w), scaled(x)),
    "relu": lambda x, w: by_mul(attend(x, w), relu(x)),
    "no zeros": lambda x, w: by_mul(attend(x, w), scattered_into_ones(x)),
    "a gate of channels": lambda x, w: attend(x, w).transpose(1, 2) * torch.zeros(D).scatter(0, torch.arange(3), 1.0).to(x),
    "the output is read as it is too": lambda x, w: (lambda o: by_mul(o, scattered(x)) + o.mean())(attend(x, w)),
    "queries that are padding": lambda x, w: attend(x, w).masked_fill((x[..., 0] > 2)[:, None, :, None], 0.0),
    "something else where it is off": lambda x, w: torch.where(scattered(x).transpose(1, 2)[..., None] != 0, attend(x, w), 1.0),
    "a choice of channels": lambda x, w: torch.where(x[0, 0, :D] > 0, attend(x, w), 0.0),
    "another dtype": lambda x, w: by_mul(attend(x.float(), w.float()), scattered(x)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    x, w = inputs()
    torch._dynamo.reset()
    (region,) = attncompiler.explain(LEFT[name], x, w).regions
    assert "  route " not in region.ir
    compiled = torch.compile(LEFT[name], backend="attncompiler", options={"inner": "aot_eager"})
    bound = 1e-5 if name == "another dtype" else 1e-9  # its attention is float32
    torch.testing.assert_close(compiled(x, w), LEFT[name](x, w), rtol=bound, atol=bound)


def test_few_keys_are_left() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (x[:, :32] @ w).view(2, 32, 3, HEADS, D).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2) * scattered(x[:, :32])[..., None]

    torch._dynamo.reset()
    assert "  route " not in attncompiler.explain(f, *inputs()).regions[0].ir


def test_a_number_of_heads_that_changes() -> None:
    """A gate times a run-time integer."""

    def f(x: Tensor, w: Tensor, chosen: int) -> Tensor:
        return by_mul(attend(x, w), scattered(x) * chosen)

    x, w = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="attncompiler", options={"inner": "aot_eager"}, dynamic=True, fullgraph=True)
    for chosen in (2, 3):
        torch.testing.assert_close(compiled(x, w, chosen), f(x, w, chosen))
    assert not attncompiler.explain(f, x, w, 5).missed


def test_what_changes_in_place_is_left() -> None:
    """What a gate was made of is another thing by the time that it is used."""

    def f(x: Tensor, w: Tensor, off: Tensor) -> Tensor:
        gate = x[..., :HEADS].masked_fill(off, 0.0)
        off.fill_(True)
        return by_mul(attend(x, w), gate)

    x, w = inputs()
    off = torch.rand(2, N, HEADS) > 0.5
    torch._dynamo.reset()
    assert "  route " not in attncompiler.explain(f, x, w, off.clone()).regions[0].ir
    with torch.no_grad():
        expected = f(x, w, off.clone())
        torch.testing.assert_close(torch.compile(f, backend="attncompiler")(x, w, off.clone()), expected)


def test_a_router_is_not_an_attention_that_was_missed() -> None:
    class Routed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.router = torch.nn.Linear(HEADS * D, 3 * HEADS * D), torch.nn.Linear(HEADS * D, HEADS)
            self.shares, self.out = torch.nn.Linear(HEADS * D, 2), torch.nn.Linear(HEADS * D, HEADS * D)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(2, N, 3, HEADS, D).permute(2, 0, 3, 1, 4)
            p = self.router(x).softmax(-1)
            kept = p * torch.zeros_like(p).scatter(-1, p.topk(CHOSEN, -1).indices, 1.0)
            gate = torch.einsum("bn,bne->bne", self.shares(x).softmax(-1)[..., 0], kept)
            o: Tensor = self.out(by_mul(F.scaled_dot_product_attention(q, k, v), gate))
            return o

    torch._dynamo.reset()
    found = attncompiler.explain(Routed(), torch.randn(2, N, HEADS * D))
    assert "  route " in found.regions[0].ir and not found.missed


@pytest.mark.parametrize("product", [lambda x, w: x @ w.T, lambda x, w: torch.einsum("bnc,ec->bne", x, w)])
def test_a_router_may_be_a_product_with_a_matrix(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, x: Tensor, w: Tensor) -> Tensor:
        p = product(x, w).softmax(-1)
        kept = p * torch.zeros_like(p).scatter(-1, p.topk(CHOSEN, -1).indices, 1.0)
        return by_mul(F.scaled_dot_product_attention(q, k, v), kept)

    torch._dynamo.reset()
    q = torch.randn(2, HEADS, N, D)
    found = attncompiler.explain(f, q, q, q, torch.randn(2, N, 12), torch.randn(HEADS, 12))
    assert "  route " in found.regions[0].ir and not found.missed

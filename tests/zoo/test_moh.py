"""Mixture of heads as a layer that is trained: what is routed, what is expected of it, and the loss beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attncompiler
from attncompiler.zoo import SYSTEMS, Size
from attncompiler.zoo.moh import moh_balance_loss, moh_routed
from attncompiler.zoo.system import bound


@pytest.mark.parametrize(("name", "share"), [("moh", 5 / 8), ("moh-routed", 1 / 2), ("moh-llama", 6 / 8)])
def test_explain_says_what_is_routed_and_expected(name: str, share: float) -> None:
    example = SYSTEMS[name].example(Size.SMALL)
    inputs = example.drawn(torch.float32, torch.device("cpu"))
    found = attncompiler.explain(bound(SYSTEMS[name].plain, example.numbers), *inputs)
    (region,) = found.regions
    assert f"Expected to be on: {share:.3g} of queries and heads" in str(found) and "is not computed" in str(found)
    dense = attncompiler.explain(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=name == "moh-llama"),
                                 *(torch.zeros(1, 8, 160, 16) for _ in range(3)))  # fmt: skip
    assert region.density == pytest.approx(share * dense.regions[0].density)


class Layer(nn.Module):
    """Collects the loss of its router as the published code does, beside its output."""

    def __init__(self, heads: int = 6, d: int = 16, chosen: int = 2) -> None:
        super().__init__()
        self.heads, self.chosen = heads, chosen
        self.qkv, self.router, self.out = (nn.Linear(heads * d, size) for size in (3 * heads * d, heads, heads * d))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        p = self.router(x).softmax(-1)
        gates, chosen = moh_routed(p, self.chosen)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2) * gates[..., None]
        return self.out(o.flatten(2)), moh_balance_loss(p, chosen)


def test_the_balance_loss_is_untouched() -> None:
    layer, x = Layer().double(), torch.randn(2, 150, 96, dtype=torch.float64)

    def trained(form: nn.Module) -> list[Tensor]:
        out, loss = form(x)
        return [out, loss, *torch.autograd.grad(out.square().mean() + 0.01 * loss, layer.parameters())]  # type: ignore[list-item]

    expected = trained(layer)
    found = attncompiler.explain(layer, x)
    assert "  route " in found.regions[0].ir and not found.missed
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="attncompiler", options={"inner": "aot_eager"}, fullgraph=True)
    for ours, right in zip(trained(compiled), expected, strict=True):
        torch.testing.assert_close(ours, right)

"""Lightning Attention and TransNormerLLM: causal linear attention whose heads forget at rates of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attncompiler
from attncompiler.zoo.system import Example, Size, System


def slopes(heads: int, layer: int, layers: int) -> Tensor:
    """The rates [heads] of a layer: ALiBi's for a power of two of heads, lower the deeper the layer. Code and paper differ: pass
    the rates that a model was trained with."""
    rates = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
    return rates * (1 - layer / (layers - 1) + 1e-5)


# --------------------------------------------------------------------------------------------------------- as users write it


def lightning(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """q, k [B, H, N, D], v [B, H, N, Dv]; rate [H], at least 0."""
    n = q.shape[2]
    distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)[None, :]
    decay = torch.exp(-rate[:, None, None] * distance.clamp(min=0)) * (distance >= 0)
    return ((q @ k.transpose(-1, -2)) * decay.to(q.dtype)) @ v


class TransNormer(nn.Module):
    """The token mixer of one layer: SiLU features, the heads' rates, a norm over the channels of all heads, a gate."""

    rate: Tensor

    def __init__(self, width: int, heads: int, layer: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.register_buffer("rate", slopes(heads, layer, layers))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning(F.silu(q), F.silu(k), v, self.rate.to(q.dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """Projections [B, N, C] of one token sequence -> [B, N, C], before the last projection."""
        b, n, width = q.shape
        q, k, v = (x.view(b, n, self.heads, -1).transpose(1, 2) for x in (q, k, v))
        out = self.mix(q, k, v).transpose(1, 2).reshape(b, n, width)
        return out / (out.norm(dim=-1, keepdim=True) * width**-0.5 + 1e-8) * gate


# ------------------------------------------------------------------------------------------------------------------ declared


def lightning_declared(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return attncompiler.linear_attention(q, k, v, decay=-rate)


class TransNormerDeclared(TransNormer):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attncompiler.linear_attention(q, k, v, decay=-self.rate, feature_map=F.silu)


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size) -> Example:
    if size is Size.SMALL:
        return Example([(2, 4, 300, 32), (2, 4, 300, 32), (2, 4, 300, 24), slopes(4, 1, 12)])
    return Example([(1, 16, 16384, 128)] * 3 + [slopes(16, 1, 24)])


def _layer(size: Size) -> Example:
    b, n, heads, d = (2, 200, 4, 16) if size is Size.SMALL else (4, 8192, 32, 128)
    return Example([(b, n, heads * d)] * 4, {"width": heads * d, "heads": heads, "layer": 3, "layers": 12})


SYSTEMS = (
    System(
        "lightning", "Lightning Attention-2", "Qin et al. 2024, Lightning Attention-2, arXiv 2401.04658",
        lightning, lightning_declared, _example,
        note="no softmax, no normaliser and no scale; the rates are data, so that layers share a kernel",
    ),
    System(
        "transnormer", "TransNormerLLM, one layer's token mixer",
        "Qin et al. 2024, Various Lengths, Constant Speed, arXiv 2405.17381", TransNormer, TransNormerDeclared, _layer,
    ),
)  # fmt: skip

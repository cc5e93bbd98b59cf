"""S2-Attention: each head keeps the blocks near the query and every so many blocks of the whole context, another residue a head."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

import attncompiler
from attncompiler import masks
from attncompiler.masks import Mask
from attncompiler.zoo.system import Example, Size, System

# --------------------------------------------------------------------------------------------------------- as users write it


class S2Attention(nn.Module):
    """q [B, heads, N, D], k and v [B, kv_heads, N, D]: the heads of a group share keys, and a pattern."""

    def __init__(self, heads: int, kv_heads: int, block: int, local: int, stride: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.block, self.local, self.stride = heads, kv_heads, block, local, stride

    def mask(self, n: int, device: torch.device) -> Tensor:
        i = torch.arange(math.ceil(n / self.block), device=device)
        shard = torch.arange(self.kv_heads, device=device)[:, None, None]
        stripe = (i + shard * max(1, self.stride // self.heads)) % self.stride == 0
        blocks = (stripe | (i[:, None] - i < self.local)).repeat_interleave(self.heads // self.kv_heads, 0)
        return blocks.repeat_interleave(self.block, 1)[:, :n].repeat_interleave(self.block, 2)[:, :, :n].tril()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return scores.masked_fill(~self.mask(q.shape[2], q.device), -math.inf).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------------------ declared


@cache
def s2_mask(heads: int, kv_heads: int, block: int, local: int, stride: int) -> Mask:
    return masks.strided(block, local, stride, heads, kv_heads=kv_heads)


def s2_declared(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, block: int, local: int, stride: int) -> Tensor:
    return attncompiler.attention(q, k, v, keep=s2_mask(heads, kv_heads, block, local, stride), enable_gqa=True)


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size) -> Example:
    heads, kv_heads, n, channels, block, local = (4, 2, 500, 32, 16, 4) if size is Size.SMALL else (32, 8, 8192, 128, 64, 16)
    shapes = [(1, heads, n, channels)] + [(1, kv_heads, n, channels)] * 2  # the larger one: Phi-3-small
    return Example(shapes, {"heads": heads, "kv_heads": kv_heads, "block": block, "local": local, "stride": 8})


SYSTEMS = (
    System(
        "s2", "S2-Attention, stripes by head",
        "Lin et al. 2024, Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
        S2Attention, s2_declared, _example, s2_mask,
    ),
)  # fmt: skip

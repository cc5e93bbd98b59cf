"""PrFlashAttention: of blocks of tokens each pair is kept by chance, the less likely the farther apart; causal, anew in each round.

The paper's text says no more; the probability is 1 / (1 + distance) here, a query's own block is always kept, and what is kept does
not stand for what is dropped. The draw is a tensor in both forms, so that they can be compared; declared as `masks.causal() &
masks.sampled(seed, probability, block)`, it is made inside of the kernels and nothing is stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.masks import Mask
from attncompiler.zoo.system import Example, Size, System

# --------------------------------------------------------------------------------------------------------- as users write it


def prflash(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int) -> Tensor:
    """q, k, v [B, H, N, D]; kept bool [H, blocks, blocks]: the round's draw, as `torch.rand(...) < probability` makes it."""
    n = q.shape[2]
    keep = kept.repeat_interleave(block, 1)[:, :n].repeat_interleave(block, 2)[:, :, :n]
    keep = keep & torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------------------ declared


def prflash_mask(kept: Tensor, block: int) -> Mask:
    return masks.causal() & masks.blocks(block, kept)


def prflash_declared(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int) -> Tensor:
    return attncompiler.attention(q, k, v, keep=prflash_mask(kept, block))


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size) -> Example:
    batch, heads, n, channels, block = (2, 2, 400, 32, 32) if size is Size.SMALL else (4, 16, 4096, 64, 128)
    i = torch.arange(math.ceil(n / block))
    distance = (i[:, None] - i).clamp(min=0)
    kept = torch.rand(heads, len(i), len(i), generator=torch.Generator().manual_seed(0)) < 1 / (1 + distance)
    return Example([(batch, heads, n, channels)] * 3 + [kept], {"block": block})


SYSTEMS = (
    System(
        "prflash", "PrFlashAttention, blocks by chance",
        "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI, 2024",
        prflash, prflash_declared, _example, prflash_mask,
    ),
)  # fmt: skip

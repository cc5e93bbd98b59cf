"""RAT: tokens of a medical image see those of their own region of a segmentation, wherever they lie.

The authors add -1000 between regions, which no gap of scores that occurs outweighs; here a pair is left out, as most write it. The
scale is one over the root of the number of heads, not of channels, as in their code.
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


def region_attention(q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    """q, k, v [B, H, N, D]; labels int [B, N]: the region of each token."""
    same = labels[:, None, :, None] == labels[:, None, None, :]
    scores = q @ k.transpose(-2, -1) * q.shape[1] ** -0.5
    return scores.masked_fill(~same, -math.inf).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------------------ declared


def region_mask(labels: Tensor) -> Mask:
    return masks.regions(labels)


def region_attention_declared(q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> Tensor:
    return attncompiler.attention(q, k, v, keep=region_mask(labels), scale=q.shape[1] ** -0.5)


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size) -> Example:
    batch, heads, side, regions = (2, 2, 18, 6) if size is Size.SMALL else (8, 8, 64, 40)
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(batch, regions, 2, generator=generator) * side
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    labels = torch.cdist(at.expand(batch, -1, -1), centres).argmin(-1)  # each token belongs to the nearest centre
    return Example([(batch, heads, side * side, 32)] * 3 + [labels])


SYSTEMS = (
    System(
        "rat", "Region attention transformer", "Yang et al. 2024, Region Attention Transformer for Medical Image Restoration",
        region_attention, region_attention_declared, _example, region_mask,
    ),
)  # fmt: skip

"""Attention sinks: a sliding window that never loses sight of the first tokens, on which weight piles up.

Without a cache that is moved along: positions are those of the text.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.masks import Mask
from attncompiler.zoo.system import Example, Size, System

# --------------------------------------------------------------------------------------------------------- as users write it


def attention_sinks(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
    """q, k, v [B, H, N, D]."""
    i = torch.arange(q.shape[2], device=q.device)
    back = i[:, None] - i
    keep = (back >= 0) & ((back < window) | (i < sinks))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return torch.where(keep, scores, -math.inf).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------------------ declared


@cache
def attention_sinks_mask(window: int, sinks: int) -> Mask:
    return masks.causal() & (masks.window(window - 1, 0) | masks.sink(sinks))


def attention_sinks_declared(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
    return attncompiler.attention(q, k, v, keep=attention_sinks_mask(window, sinks))


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size) -> Example:
    shape, window, sinks = ((2, 2, 500, 32), 60, 4) if size is Size.SMALL else ((1, 32, 32768, 128), 1020, 4)  # Llama-2-7B
    return Example([shape] * 3, {"window": window, "sinks": sinks})


SYSTEMS = (
    System(
        "attention-sinks", "Attention sinks and a sliding window",
        "Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks",
        attention_sinks, attention_sinks_declared, _example, attention_sinks_mask,
    ),
)  # fmt: skip

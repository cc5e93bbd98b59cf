"""Sliding window attention of causal language models: a token sees itself and the tokens just before it."""

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


def sliding_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q, k, v [B, H, N, D]; `window` tokens, the query's own among them."""
    n = q.shape[2]
    keep = torch.ones(n, n, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------------------ declared


@cache
def sliding_window_mask(window: int) -> Mask:
    return masks.causal() & masks.window(window - 1, 0)


def sliding_window_declared(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return attncompiler.attention(q, k, v, keep=sliding_window_mask(window))


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size) -> Example:
    shape, window = ((2, 2, 500, 32), 70) if size is Size.SMALL else ((1, 32, 16384, 128), 4096)  # Mistral 7B
    return Example([shape] * 3, {"window": window})


SYSTEMS = (
    System(
        "sliding-window", "Sliding window, causal", "Jiang et al. 2023, Mistral 7B; Beltagy et al. 2020, Longformer",
        sliding_window, sliding_window_declared, _example, sliding_window_mask,
    ),
)  # fmt: skip

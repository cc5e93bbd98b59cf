"""Neighborhood attention: each query of an image sees the window around it, shifted at the borders so that it is never smaller.

`fna` is the rule with a dilation. `fna-bias` is the layer of the NAT models, with a learned bias for each head and each offset from
query to key: at a border the true offset, not the place in the window.
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


def near(at: Tensor, length: int, window: int, dilation: int) -> Tensor:
    """Which tokens are in each other's window along one axis, where they have the coordinates `at` of `length`."""
    group, place = at % dilation, at // dilation
    count = (length - group + dilation - 1) // dilation
    first = torch.minimum((place - window // 2).clamp(min=0), count - window)[:, None]
    return (place >= first) & (place < first + window) & (group == group[:, None])


def fna(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, window: int, dilation: int) -> Tensor:
    """q, k, v [B, H, rows * columns, D]."""
    token = torch.arange(rows * columns, device=q.device)
    keep = near(token // columns, rows, window, dilation) & near(token % columns, columns, window, dilation)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v


def offsets(at: Tensor, window: int) -> Tensor:
    """From query to key, counted from the window's farthest; those out of reach are clamped: they are masked anyway."""
    return (at - at[:, None] + window - 1).clamp(0, 2 * window - 2)


def fna_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rows: int, columns: int, window: int) -> Tensor:
    """q, k, v [B, H, rows * columns, D]; bias [H, 2 * window - 1, 2 * window - 1]."""
    token = torch.arange(rows * columns, device=q.device)
    y, x = token // columns, token % columns
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias[:, offsets(y, window), offsets(x, window)]
    return scores.masked_fill(~(near(y, rows, window, 1) & near(x, columns, window, 1)), -math.inf).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------------------ declared


@cache
def fna_mask(rows: int, columns: int, window: int, dilation: int = 1) -> Mask:
    return masks.grid((rows, columns), window, dilation=dilation)


def fna_declared(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, window: int, dilation: int) -> Tensor:
    return attncompiler.attention(q, k, v, keep=fna_mask(rows, columns, window, dilation))


def fna_bias_declared(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rows: int, columns: int, window: int) -> Tensor:
    token = torch.arange(rows * columns, device=q.device)
    gathered = bias[:, offsets(token // columns, window), offsets(token % columns, window)]

    def score(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return s + gathered[h, q_idx, kv_idx]

    return attncompiler.attention(q, k, v, keep=fna_mask(rows, columns, window), score=score)


# ------------------------------------------------------------------------------------------------------------------ examples


def _fna(size: Size) -> Example:
    if size is Size.SMALL:
        return Example([(2, 2, 20 * 14, 32)] * 3, {"rows": 20, "columns": 14, "window": 5, "dilation": 2})
    return Example([(128, 2, 56 * 56, 32)] * 3, {"rows": 56, "columns": 56, "window": 7, "dilation": 8})  # DiNAT, first stage


def _fna_bias(size: Size) -> Example:
    batch, heads, side, window = (2, 2, 16, 7) if size is Size.SMALL else (128, 4, 28, 7)  # NAT-T, second stage
    table = (heads, 2 * window - 1, 2 * window - 1)
    return Example([(batch, heads, side * side, 32)] * 3 + [table], {"rows": side, "columns": side, "window": window})


_SOURCE = "Hassani et al. 2024, Faster Neighborhood Attention"
SYSTEMS = (
    System("fna", "Neighborhood attention, dilated", _SOURCE, fna, fna_declared, _fna, fna_mask),
    System(
        "fna-bias", "Neighborhood attention with a bias by offset", _SOURCE, fna_bias, fna_bias_declared, _fna_bias, fna_mask,
        note="A learned table is gathered to [H, N, N] before the attention, in both forms: what is recognised reads it so.",
    ),
)  # fmt: skip

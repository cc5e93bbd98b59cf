"""Generalized neighborhood attention over a grid of one to three axes: a query sees the window of its group's leader.

For each axis: `window` keys, shifted at the borders and never shrunk; `stride` queries share their leader's window; with `dilation`
each residue class is a grid of its own; `causal` windows end at the query itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.masks import Mask
from attncompiler.zoo.system import Example, Size, System

# --------------------------------------------------------------------------------------------------------- as users write it


def axis_mask(length: int, window: int, stride: int, dilation: int, causal: bool, device: torch.device) -> Tensor:
    """Which keys of one axis each of its queries sees, bool [length, length]."""
    i = torch.arange(length, device=device)
    group, place = i % dilation, i // dilation
    last = (length - group + dilation - 1) // dilation - 1  # within the residue class
    if causal:
        leader = torch.minimum(place // stride * stride + stride - 1, last)
        low, high = (leader - (window - 1)).clamp(min=0), place + 1
    else:
        leader = torch.minimum(place // stride * stride + stride // 2, last)
        low = torch.minimum((leader - window // 2).clamp(min=0), last + 1 - window)
        high = low + window
    return (group[:, None] == group) & (place >= low[:, None]) & (place < high[:, None])


def gna(
    q: Tensor, k: Tensor, v: Tensor, shape: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    causal: Sequence[bool],
) -> Tensor:  # fmt: skip
    """q, k, v [B, H, N, D], the N tokens of the grid `shape` in row-major order."""
    keep = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    for length, w, s, d, c in zip(shape, window, stride, dilation, causal, strict=True):
        axis = axis_mask(length, w, s, d, c, q.device)
        keep = (keep[:, None, :, None] & axis[None, :, None, :]).reshape(len(keep) * length, len(keep) * length)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------------------ declared


@cache
def gna_mask(
    shape: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], causal: tuple[bool, ...]
) -> Mask:
    return masks.grid(shape, window, stride, dilation, causal)


def gna_declared(
    q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...],
    dilation: tuple[int, ...], causal: tuple[bool, ...],
) -> Tensor:  # fmt: skip
    return attncompiler.attention(q, k, v, keep=gna_mask(shape, window, stride, dilation, causal))


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(
    heads: int, channels: int, shape: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    causal: Sequence[bool], batch: int = 1,
) -> Example:  # fmt: skip
    numbers = {"shape": shape, "window": window, "stride": stride, "dilation": dilation, "causal": causal}
    return Example([(batch, heads, math.prod(shape), channels)] * 3, {name: tuple(value) for name, value in numbers.items()})


def _sequence(size: Size) -> Example:
    if size is Size.SMALL:
        return _example(2, 32, [512], [63], [4], [2], [True])
    return _example(24, 128, [32768], [2048], [256], [1], [False])


def _image(size: Size) -> Example:
    if size is Size.SMALL:
        return _example(2, 32, [20, 24], [7, 6], [2, 3], [1, 2], [False, True])
    return _example(24, 128, [256, 256], [80, 80], [16, 16], [1, 1], [False, False])  # FLUX at 4096 pixels


def _video(size: Size) -> Example:
    if size is Size.SMALL:
        return _example(2, 32, [6, 8, 12], [4, 4, 6], [2, 1, 2], [1, 2, 1], [True, False, False])
    return _example(24, 128, [30, 48, 80], [18, 24, 24], [16, 8, 8], [1, 1, 1], [False] * 3)  # HunyuanVideo


_SOURCE = "Hassani et al. 2025, Generalized Neighborhood Attention"
SYSTEMS = tuple(
    System(f"gna-{axes}d", f"Generalized neighborhood attention, {what}", _SOURCE, gna, gna_declared, example, gna_mask)
    for axes, what, example in ((1, "sequences", _sequence), (2, "images", _image), (3, "video", _video))
)

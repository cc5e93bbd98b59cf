"""DaViT: attention within windows of an image, and attention between channels, in turn.

Windows are cut by views, so either form is a batch of small attentions without a mask. Between channels, keys and values of the
published code play the queries and keys: their channels attend to one another by products over all tokens, and mix the channels of
its queries.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import attncompiler
from attncompiler.zoo.system import Example, Size, System

# --------------------------------------------------------------------------------------------------------- as users write it


def window_partition(x: Tensor, window: int) -> Tensor:
    """[B, Y, X, C] -> [B * windows, window * window, C]."""
    b, rows, columns, c = x.shape
    x = x.view(b, rows // window, window, columns // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, c)


def window_reverse(x: Tensor, window: int, rows: int, columns: int) -> Tensor:
    """[B * windows, window * window, C] -> [B, Y, X, C]."""
    x = x.view(-1, rows // window, columns // window, window, window, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(x.shape[0], rows, columns, x.shape[-1])


def padded_windows(x: Tensor, rows: int, columns: int, window: int) -> tuple[Tensor, int, int]:
    """[B, N, C] -> windows, and the image's size with zeros below and to the right, up to whole windows: they take part."""
    x = F.pad(x.view(x.shape[0], rows, columns, -1), (0, 0, 0, -columns % window, 0, -rows % window))
    return window_partition(x, window), x.shape[1], x.shape[2]


def heads_of(x: Tensor, weight: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, C] and weight [3 C, C] -> queries, keys, values [B, heads, N, C / heads]."""
    q, k, v = F.linear(x, weight).reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def window_attention(x: Tensor, weight: Tensor, rows: int, columns: int, window: int, heads: int) -> Tensor:
    """x [B, rows * columns, C], weight [3 C, C]."""
    cut, padded_rows, padded_columns = padded_windows(x, rows, columns, window)
    q, k, v = heads_of(cut, weight, heads)
    o = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    o = window_reverse(o.transpose(1, 2).reshape(cut.shape), window, padded_rows, padded_columns)
    return o[:, :rows, :columns].reshape(x.shape)


def channel_attention(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """x [B, N, C], weight [3 C, C]; channels attend within their group."""
    q, k, v = heads_of(x, weight, groups)
    weights = ((k * q.shape[-1] ** -0.5).transpose(-2, -1) @ v).softmax(-1)
    o = (weights @ q.transpose(-2, -1)).transpose(-2, -1)
    return o.transpose(1, 2).reshape(x.shape)


# ------------------------------------------------------------------------------------------------------------------ declared


def window_attention_declared(x: Tensor, weight: Tensor, rows: int, columns: int, window: int, heads: int) -> Tensor:
    cut, padded_rows, padded_columns = padded_windows(x, rows, columns, window)
    o = attncompiler.attention(*heads_of(cut, weight, heads))
    o = window_reverse(o.transpose(1, 2).reshape(cut.shape), window, padded_rows, padded_columns)
    return o[:, :rows, :columns].reshape(x.shape)


def channel_attention_declared(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    q, k, v = heads_of(x, weight, groups)
    o = attncompiler.attention(k.mT, v.mT, q.mT, scale=q.shape[-1] ** -0.5)  # channels are the tokens
    return o.transpose(-2, -1).transpose(1, 2).reshape(x.shape)


# ------------------------------------------------------------------------------------------------------------------ examples


def _windows(size: Size) -> Example:
    batch, side, channels, heads, window = (2, 13, 32, 2, 5) if size is Size.SMALL else (128, 56, 96, 3, 7)  # DaViT-T, first stage
    numbers = {"rows": side, "columns": side, "window": window, "heads": heads}
    return Example([(batch, side * side, channels), (3 * channels, channels)], numbers)


def _channels(size: Size) -> Example:
    batch, tokens, channels, groups = (2, 100, 32, 2) if size is Size.SMALL else (128, 3136, 96, 3)
    return Example([(batch, tokens, channels), (3 * channels, channels)], {"groups": groups})


_SOURCE = "Ding et al. 2022, DaViT: Dual Attention Vision Transformers"
SYSTEMS = (
    System("davit-window", "DaViT, attention in windows", _SOURCE, window_attention, window_attention_declared, _windows,
           note="Declared over windows as a batch, as the plain form is."),
    System("davit-channel", "DaViT, attention between channels", _SOURCE, channel_attention, channel_attention_declared, _channels),
)  # fmt: skip

"""CLEAR: tokens of an image see those within a circle around them; text tokens, which come first, see all and are seen by all."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.masks import Mask
from attncompiler.zoo.system import Example, Size, System

# --------------------------------------------------------------------------------------------------------- as users write it


def clear(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, radius: int, text: int) -> Tensor:
    """q, k, v [B, H, text + rows * columns, D]."""
    token = torch.arange(rows * columns, device=q.device)
    y, x = token // columns, token % columns
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
    seen[text:, text:] = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


# ------------------------------------------------------------------------------------------------------------------ declared


@cache
def clear_mask(rows: int, columns: int, radius: int, text: int) -> Mask:
    return masks.disc((rows, columns), radius, text)


def clear_declared(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, radius: int, text: int) -> Tensor:
    return attncompiler.attention(q, k, v, keep=clear_mask(rows, columns, radius, text))


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size, text: int) -> Example:
    heads, side, radius, channels = (2, 20, 5, 32) if size is Size.SMALL else (24, 128, 16, 128)  # FLUX.1 at 2048 pixels
    shape = (1, heads, text + side * side, channels)
    return Example([shape] * 3, {"rows": side, "columns": side, "radius": radius, "text": text})


def _joint(size: Size) -> Example:
    return _example(size, 16 if size is Size.SMALL else 512)


def _image(size: Size) -> Example:
    return _example(size, 0)


_SOURCE = "Liu et al. 2024, CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up"
SYSTEMS = (
    System("clear", "CLEAR, text and image", _SOURCE, clear, clear_declared, _joint, clear_mask),
    System("clear-image", "CLEAR, image alone", _SOURCE, clear, clear_declared, _image, clear_mask),
)

"""Radial attention over video: bands between frames that narrow, and thin out, as the frames are farther apart.

The rule is the authors' code's. Frames are `frame` tokens each, one after the other. Blocks of `block` tokens are kept whole or not
at all; the block mask is made once for a shape, on the host.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attncompiler
from attncompiler import masks
from attncompiler.masks import Mask
from attncompiler.zoo.system import Example, Size, System

# --------------------------------------------------------------------------------------------------------- as users write it


def band(i: int, j: int, frame: int, block: int, decay: float) -> int | None:
    """How far apart in their frames tokens of frames i and j may be; None for a pair of frames that is left out."""
    if i == j or j == 0:  # all see the first frame
        return frame
    span = 2 ** (frame.bit_length() - abs(i - j).bit_length())
    if span < 128 and abs(i - j) % int(128 / span) != 0:
        return None
    return frame if abs(i - j) == 1 else math.floor(max(span * decay, block))


def block_mask(frames: int, frame: int, block: int, decay: float) -> Tensor:
    """Which blocks see which, bool [blocks, blocks]: where most of the columns that a band meets are more than a third full."""
    blocks, side = frames * frame // block, math.ceil(frame / block)
    kept = torch.zeros(blocks, blocks, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            width = band(i, j, frame, block, decay)
            if width is None:
                continue
            top, left = i * frame // block, j * frame // block
            row = (torch.arange(top, top + side) * block - i * frame)[:, None]  # where each block of rows begins in its frame
            column = torch.arange(left * block, (left + side) * block) - j * frame
            first, last = (
                torch.maximum(row.clamp(min=0), column - width),
                torch.minimum((row + block).clamp(max=frame), column + width + 1),
            )
            met = ((last - first).clamp(min=0) * ((column >= 0) & (column < frame))).view(side, side, block)  # rows of a column
            cell = (met * 3 > block).sum(-1) > 0.6 * (met > 0).sum(-1)
            kept[top : top + side, left : left + side] |= cell[: blocks - top, : blocks - left]
    return kept


class RadialAttention(nn.Module):
    """q, k, v [B, H, frames * frame, D]."""

    blocks: Tensor

    def __init__(self, frames: int, frame: int, block: int, decay: float) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("blocks", block_mask(frames, frame, block, decay))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.blocks.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# ------------------------------------------------------------------------------------------------------------------ declared


@cache
def radial_mask(frames: int, frame: int, block: int, decay: float, device: str | torch.device = "cpu") -> Mask:
    return masks.radial(frames, frame, block=block, decay=decay).to(device)


def radial_declared(q: Tensor, k: Tensor, v: Tensor, frames: int, frame: int, block: int, decay: float) -> Tensor:
    return attncompiler.attention(q, k, v, keep=radial_mask(frames, frame, block, decay, q.device))


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size) -> Example:
    if size is Size.SMALL:
        return Example([(1, 2, 8 * 64, 32)] * 3, {"frames": 8, "frame": 64, "block": 16, "decay": 0.5})
    return Example([(1, 40, 18 * 3840, 128)] * 3, {"frames": 18, "frame": 3840, "block": 128, "decay": 0.2})  # Wan2.1-14B


SYSTEMS = (
    System(
        "radial",
        "Radial attention, video",
        "Li et al. 2025, Radial Attention",
        RadialAttention,
        radial_declared,
        _example,
        radial_mask,
    ),
)

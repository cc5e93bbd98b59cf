"""HaloNet: an image in blocks of queries; all queries of a block see the block and a halo of keys around it.

`halonet` is the layer as the networks have it: keys and values are padded with zeros and cut into overlapping windows, and a score
has a relative term for rows and one for columns. The padding takes part: its score is the relative term. `halonet-masked` is the
same neighbourhood as a mask, within the image.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.masks import Mask
from attncompiler.zoo.system import Example, Size, System

# --------------------------------------------------------------------------------------------------------- as users write it


def query_blocks(q: Tensor, block: int) -> Tensor:
    """[B, H, Y, X, D] -> [B * H, blocks, block * block, D]."""
    b, h, y, x, d = q.shape
    q = q.reshape(b * h, y // block, block, x // block, block, d)
    return q.transpose(2, 3).reshape(b * h, -1, block * block, d)


def windows(t: Tensor, block: int, halo: int) -> Tensor:
    """[B, H, Y, X, D] -> [B * H, blocks, window * window, D]: each block with what is around it, zeros outside of the image."""
    size = block + 2 * halo
    t = F.pad(t, (0, 0, halo, halo, halo, halo)).flatten(0, 1)
    t = t.unfold(1, size, block).unfold(2, size, block)  # [B * H, Y / block, X / block, D, window, window]
    return t.permute(0, 1, 2, 4, 5, 3).reshape(t.shape[0], -1, size * size, t.shape[3])


def relative_scores(q: Tensor, rel_rows: Tensor, rel_columns: Tensor, block: int, halo: int) -> tuple[Tensor, Tensor]:
    """Each query with the vector of each offset, by rows and by columns: both [B * H, blocks, block, block, window]."""
    size = block + 2 * halo
    grid = q.unflatten(2, (block, block))
    offset = torch.arange(size, device=q.device) - torch.arange(block, device=q.device)[:, None] + size - 1
    by_rows = torch.einsum("nbyxd,yid->nbyxi", grid, rel_rows[offset])
    return by_rows, torch.einsum("nbyxd,xjd->nbyxj", grid, rel_columns[offset])


def join_blocks(o: Tensor, b: int, rows: int, columns: int, block: int) -> Tensor:
    """[B * H, blocks, block * block, D] -> [B, H, Y, X, D]."""
    o = o.reshape(b, -1, rows // block, columns // block, block, block, o.shape[-1])
    return o.transpose(3, 4).reshape(b, -1, rows, columns, o.shape[-1])


def halonet(q: Tensor, k: Tensor, v: Tensor, rel_rows: Tensor, rel_columns: Tensor, block: int, halo: int) -> Tensor:
    """q, k, v [B, H, Y, X, D], Y and X multiples of `block`; rel_rows and rel_columns [2 * (block + 2 * halo) - 1, D]."""
    b, _, rows, columns, d = q.shape
    q = query_blocks(q, block)
    k, v = windows(k, block, halo), windows(v, block, halo)
    by_rows, by_columns = relative_scores(q, rel_rows, rel_columns, block, halo)
    relative = by_rows[..., :, None] + by_columns[..., None, :]
    scores = q @ k.transpose(-2, -1) * d**-0.5 + relative.reshape(*q.shape[:3], -1)
    return join_blocks(scores.softmax(-1) @ v, b, rows, columns, block)


def halonet_masked(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, block: int, halo: int) -> Tensor:
    """q, k, v [B, H, rows * columns, D]."""
    token = torch.arange(rows * columns, device=q.device)
    y, x = token // columns, token % columns
    top, left = (y // block * block)[:, None], (x // block * block)[:, None]
    keep = (y >= top - halo) & (y < top + block + halo) & (x >= left - halo) & (x < left + block + halo)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------------------ declared


def halonet_declared(q: Tensor, k: Tensor, v: Tensor, rel_rows: Tensor, rel_columns: Tensor, block: int, halo: int) -> Tensor:
    """Windows are heads, as in the plain form: of the padding a mask over the image knows nothing."""
    b, _, rows, columns, _ = q.shape
    size = block + 2 * halo
    q = query_blocks(q, block)
    by_rows, by_columns = relative_scores(q, rel_rows, rel_columns, block, halo)

    def score(s: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        y, x = q_idx // block, q_idx % block
        return s + (by_rows[b, h, y, x, kv_idx // size] + by_columns[b, h, y, x, kv_idx % size])

    o = attncompiler.attention(q, windows(k, block, halo), windows(v, block, halo), score=score)
    return join_blocks(o, b, rows, columns, block)


@cache
def halonet_mask(rows: int, columns: int, block: int, halo: int) -> Mask:
    return masks.halo((rows, columns), block, halo)


def halonet_masked_declared(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, block: int, halo: int) -> Tensor:
    return attncompiler.attention(q, k, v, keep=halonet_mask(rows, columns, block, halo))


# ------------------------------------------------------------------------------------------------------------------ examples


def _windows(size: Size) -> Example:
    batch, heads, side, channels, block, halo = (2, 2, 12, 16, 4, 1) if size is Size.SMALL else (128, 8, 32, 16, 8, 3)
    table = (2 * (block + 2 * halo) - 1, channels)
    return Example([(batch, heads, side, side, channels)] * 3 + [table] * 2, {"block": block, "halo": halo})


def _masked(size: Size) -> Example:
    batch, heads, side, channels, block, halo = (2, 2, 18, 16, 6, 2) if size is Size.SMALL else (128, 8, 32, 16, 8, 3)
    numbers = {"rows": side, "columns": side, "block": block, "halo": halo}
    return Example([(batch, heads, side * side, channels)] * 3, numbers)


_SOURCE = "Vaswani et al. 2021, Scaling Local Self-Attention for Parameter Efficient Visual Backbones"
SYSTEMS = (
    System(
        "halonet", "HaloNet, windows with relative terms", _SOURCE, halonet, halonet_declared, _windows,
        note="Declared over windows as the plain form is; what is recognised reads them through the views that cut them.",
    ),
    System(
        "halonet-masked", "HaloNet's neighbourhood as a mask", _SOURCE, halonet_masked, halonet_masked_declared, _masked,
        halonet_mask,
    ),
)  # fmt: skip

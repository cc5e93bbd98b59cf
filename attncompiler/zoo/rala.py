"""RALA: linear attention over all tokens of an image, keys weighed by what the mean query says, rotated in the numerator alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import attncompiler
from attncompiler.zoo.system import Example, Size, System


def _angles(rows: int, columns: int, d: int, like: Tensor) -> Tensor:
    """[rows * columns, d]: the first half of the channels turns with the row, the second with the column."""
    speed = (10000.0 ** -torch.linspace(0, 1, d // 4, dtype=like.dtype, device=like.device)).repeat_interleave(2)
    row = torch.arange(rows, device=like.device).repeat_interleave(columns)
    column = torch.arange(columns, device=like.device).repeat(rows)
    return torch.cat([row[:, None] * speed, column[:, None] * speed], -1)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


def _weighed(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features of queries, of keys by their weights, and what each query's output is divided by [B, H, N, 1]."""
    n, d = q.shape[-2:]
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weight = torch.softmax(d**-0.5 * (q.mean(-2, keepdim=True) @ k.transpose(-1, -2)), -1).transpose(-1, -2) * n
    k = k * weight
    return q, k, q @ k.mean(-2, keepdim=True).transpose(-1, -2) + 1e-6


# --------------------------------------------------------------------------------------------------------- as users write it


def rala(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """q, k, v [B, H, rows * columns, D], as projected."""
    n, d = q.shape[-2:]
    q, k, divisor = _weighed(q, k)
    angles = _angles(rows, n // rows, d, q)
    state = (_rotated(k, angles).transpose(-1, -2) * n**-0.5) @ (v * n**-0.5)
    return _rotated(q, angles) @ state / divisor


# ------------------------------------------------------------------------------------------------------------------ declared


def rala_declared(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    n, d = q.shape[-2:]
    q, k, divisor = _weighed(q, k)
    angles = _angles(rows, n // rows, d, q)
    return attncompiler.linear_attention(_rotated(q, angles), _rotated(k, angles), v, causal=False, scale=1.0 / n) / divisor


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size) -> Example:
    if size is Size.SMALL:
        return Example([(2, 2, 7 * 9, 16)] * 3, {"rows": 7})
    return Example([(128, 1, 3136, 64)] * 3, {"rows": 56})


SYSTEMS = (
    System(
        "rala", "RALA, rank-augmented linear attention", "Fan et al. 2025, Breaking the Low-Rank Dilemma of Linear Attention, CVPR",
        rala, rala_declared, _example, note="the divisor has features of its own, so that it is computed beside the state",
    ),
)  # fmt: skip

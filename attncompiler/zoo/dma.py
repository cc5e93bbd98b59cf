"""Dynamic mask attention: a bias for each key, made of the values, is added to the scores and says which keys are kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import attncompiler
from attncompiler import masks, select
from attncompiler.zoo.system import Example, Size, System

# --------------------------------------------------------------------------------------------------------- as users write it


def dma_bias(v: Tensor, w_dt: Tensor, a: Tensor) -> Tensor:
    """v [B, kv_heads, N, D], w_dt [kv_heads, kv_heads D], a [kv_heads] -> [B, kv_heads, N]; a cache holds it beside v."""
    b, heads, n, d = v.shape
    dt = v.transpose(1, 2).reshape(b, n, heads * d) @ w_dt.T
    return (a * F.softplus(dt)).transpose(1, 2)


def dma_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, w: int) -> Tensor:
    """q [B, heads, M, D] of the last M positions; the w keys of largest bias for all queries of a batch and group of heads."""
    (m, d), (n, groups) = q.shape[2:], (k.shape[2], q.shape[1] // k.shape[1])
    bias = bias.unsqueeze(2)
    kept = torch.ones_like(bias, dtype=torch.bool)
    if n > w:
        chosen = bias.detach().topk(w, dim=-1)
        kept = torch.zeros_like(kept).scatter(-1, chosen.indices, chosen.values > -torch.inf)
    causal = torch.arange(n, device=q.device) <= torch.arange(n - m, n, device=q.device)[:, None]
    kept, bias, k, v = (t.repeat_interleave(groups, 1) for t in (kept & causal, bias, k, v))
    scores = q @ k.transpose(-1, -2) * d**-0.5 + bias
    return scores.masked_fill(~kept, -torch.inf).softmax(-1).nan_to_num(0.0) @ v


def dma_attend_row_by_row(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, w: int) -> Tensor:
    """The same, each query choosing among the keys up to its own."""
    (m, d), (n, groups) = q.shape[2:], (k.shape[2], q.shape[1] // k.shape[1])
    bias = bias.unsqueeze(2)
    causal = torch.arange(n, device=q.device) <= torch.arange(n - m, n, device=q.device)[:, None]
    kept = causal.expand(*k.shape[:2], m, n)
    if n > w:
        chosen = bias.detach().expand(-1, -1, m, -1).masked_fill(~causal, -torch.inf).topk(w, dim=-1)
        kept = torch.zeros_like(kept).scatter(-1, chosen.indices, chosen.values > -torch.inf)
    kept, bias, k, v = (t.repeat_interleave(groups, 1) for t in (kept, bias, k, v))
    scores = q @ k.transpose(-1, -2) * d**-0.5 + bias
    return scores.masked_fill(~kept, -torch.inf).softmax(-1) @ v


def dma_attend_by_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, w: int) -> Tensor:
    """As models call it: a float mask of the bias, and of the lowest number where a key is not kept."""
    m, n, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    bias = bias.unsqueeze(2)
    kept = torch.ones_like(bias, dtype=torch.bool)
    if n > w:
        kept = torch.zeros_like(kept).scatter(-1, bias.detach().topk(w, dim=-1).indices, True)
    kept = kept & (torch.arange(n, device=q.device) <= torch.arange(n - m, n, device=q.device)[:, None])
    mask = torch.where(kept, bias, torch.finfo(q.dtype).min)
    k, v, mask = (t.repeat_interleave(groups, 1) for t in (k, v, mask))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dma(q: Tensor, k: Tensor, v: Tensor, w_dt: Tensor, a: Tensor, w: int) -> Tensor:
    return dma_attend(q, k, v, dma_bias(v, w_dt, a), w)


def dma_row_by_row(q: Tensor, k: Tensor, v: Tensor, w_dt: Tensor, a: Tensor, w: int) -> Tensor:
    return dma_attend_row_by_row(q, k, v, dma_bias(v, w_dt, a), w)


# ------------------------------------------------------------------------------------------------------------------ declared


def dma_attend_declared(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, w: int, per_row: bool = False) -> Tensor:
    groups, before = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    return attncompiler.attention(
        q, k, v,
        keep=masks.causal(before),
        score=lambda score, b, h, i, j: score + bias[b, h // groups, j],
        select=select.top_k(bias, w, per_row=per_row),
        enable_gqa=True,
    )  # fmt: skip


def dma_declared(q: Tensor, k: Tensor, v: Tensor, w_dt: Tensor, a: Tensor, w: int) -> Tensor:
    return dma_attend_declared(q, k, v, dma_bias(v, w_dt, a), w)


def dma_rows_declared(q: Tensor, k: Tensor, v: Tensor, w_dt: Tensor, a: Tensor, w: int) -> Tensor:
    return dma_attend_declared(q, k, v, dma_bias(v, w_dt, a), w, per_row=True)


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size) -> Example:
    heads, kv_heads, n, d, w = _sizes(size)
    return Example([(1, heads, n, d), *[(1, kv_heads, n, d)] * 2, (kv_heads, kv_heads * d), (kv_heads,)], {"w": w})


def _decoded(size: Size) -> Example:
    heads, kv_heads, n, d, w = _sizes(size)
    return Example([(1, heads, 1, d), *[(1, kv_heads, n, d)] * 2, (1, kv_heads, n)], {"w": w})


def _sizes(size: Size) -> tuple[int, int, int, int, int]:
    """Heads, of keys, tokens, channels and kept keys; the larger ones are the authors' benchmark."""
    return (4, 2, 500, 32, 60) if size is Size.SMALL else (2, 1, 32768, 128, 1024)


_PAPER = "Shi et al. 2025, Trainable Dynamic Mask Sparse Attention"
SYSTEMS = (
    System(
        "dma", "Dynamic mask attention", _PAPER, dma, dma_declared, _example,
        note="a query that sees none of the chosen keys gives 0", selects=True,
    ),
    System(
        "dma-rows", "Dynamic mask attention, each query choosing among the keys that it sees", _PAPER,
        dma_row_by_row, dma_rows_declared, _example, selects=True,
    ),
    System(
        "dma-decode", "Dynamic mask attention, one query and a cache with biases", _PAPER,
        dma_attend, dma_attend_declared, _decoded, selects=True,
    ),
)  # fmt: skip

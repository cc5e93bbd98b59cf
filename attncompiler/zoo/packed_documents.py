"""Packed documents: several texts in one training sequence, each token sees the tokens before it of its own document."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.masks import Mask
from attncompiler.zoo.system import Example, Size, System

# --------------------------------------------------------------------------------------------------------- as users write it


def packed_documents(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """q, k, v [B, H, N, D]; documents int [B, N]: which one each token belongs to."""
    n = q.shape[2]
    causal = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    keep = causal & (documents[:, None, :, None] == documents[:, None, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


# ------------------------------------------------------------------------------------------------------------------ declared


def packed_documents_mask(documents: Tensor) -> Mask:
    return masks.causal() & masks.document(documents)


def packed_documents_declared(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    return attncompiler.attention(q, k, v, keep=packed_documents_mask(documents))


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size) -> Example:
    batch, heads, n, channels, mean = (2, 2, 400, 32, 60) if size is Size.SMALL else (2, 32, 16384, 128, 2000)
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(batch, n, generator=generator) < 1 / mean
    return Example([(batch, heads, n, channels)] * 3 + [starts.cumsum(1)])


SYSTEMS = (
    System(
        "packed-documents", "Packed documents, causal", "Krell et al. 2021, Efficient Sequence Packing without Cross-contamination",
        packed_documents, packed_documents_declared, _example, packed_documents_mask,
    ),
)  # fmt: skip

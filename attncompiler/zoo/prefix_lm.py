"""Prefix language models: the tokens of a prompt see one another, what follows is causal; each sequence has its own prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.masks import Mask
from attncompiler.zoo.system import Example, Size, System

# --------------------------------------------------------------------------------------------------------- as users write it


def prefix_lm(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """q, k, v [B, H, N, D]; lengths int [B]: the prompts'."""
    i = torch.arange(q.shape[2], device=q.device)
    keep = (i <= i[:, None]) | (i < lengths[:, None, None, None])
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------------------ declared


def prefix_lm_mask(lengths: Tensor) -> Mask:
    return masks.causal() | masks.prefix(lengths)


def prefix_lm_declared(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return attncompiler.attention(q, k, v, keep=prefix_lm_mask(lengths))


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size) -> Example:
    if size is Size.SMALL:
        return Example([(3, 2, 300, 32)] * 3 + [torch.tensor([0, 40, 170])])
    return Example([(4, 16, 8192, 128)] * 3 + [torch.tensor([512, 1024, 3000, 6000])])


SYSTEMS = (
    System(
        "prefix-lm", "Prefix language model", "Raffel et al. 2020, Exploring the Limits of Transfer Learning (T5)",
        prefix_lm, prefix_lm_declared, _example, prefix_lm_mask,
    ),
)  # fmt: skip

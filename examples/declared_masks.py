"""Masks as rules: a video block whose tokens see their neighbourhood in the grid and, of the text before it, everything.

    python examples/declared_masks.py

The mask is declared, drawn and planned; the block trains compiled, beside the same block run eagerly; and `explain` shows that what
was declared is what was compiled.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import attncompiler
from attncompiler import masks

TEXT, FRAMES, ROWS, COLUMNS, HEADS, SIZE = 64, 4, 12, 16, 4, 32
TOKENS = TEXT + FRAMES * ROWS * COLUMNS


def near(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Video tokens at most one frame, three rows and three columns apart."""
    i, j = q_idx - TEXT, kv_idx - TEXT
    frames = i // (ROWS * COLUMNS) - j // (ROWS * COLUMNS)
    rows = i // COLUMNS % ROWS - j // COLUMNS % ROWS
    columns = i % COLUMNS - j % COLUMNS
    return (frames.abs() <= 1) & (rows.abs() <= 3) & (columns.abs() <= 3)


def text_query(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx < TEXT


MASK = masks.sink(TEXT) | masks.where(text_query) | masks.where(near)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HEADS * SIZE, 3 * HEADS * SIZE)
        self.out = nn.Linear(HEADS * SIZE, HEADS * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        o = attncompiler.attention(q, k, v, keep=MASK)
        assert isinstance(o, Tensor)
        return self.out(o.transpose(1, 2).flatten(2))


def main() -> int:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, TOKENS, HEADS * SIZE)
    print(f"{MASK}\n\n{MASK.show(2, HEADS, TOKENS, TOKENS)}\n")
    kept = MASK.kept_pairs(2, HEADS, TOKENS, TOKENS)
    print(f"{kept:,} of {2 * HEADS * TOKENS**2:,} pairs are kept\n")
    print(attncompiler.explain(block, x))
    compiled = torch.compile(block, backend="attncompiler")
    gradients = []
    for model in (compiled, block):
        loss = model(x).square().mean()
        gradients.append(torch.autograd.grad(loss, block.project.weight)[0])
    gap = float((gradients[0] - gradients[1]).abs().max())
    print(f"\nlargest difference between the gradients, compiled and eager: {gap:.1e}")
    return 0 if gap < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())

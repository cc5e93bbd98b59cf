"""A variant of one's own, written as the formula says: no mask language, no kernel, no import of ours in the model.

    python examples/custom_variant.py

Cosine attention with a learned temperature for each head, two learned sinks, a tanh cap, and a mask of documents with a prefix that
everyone sees. It trains; all of it becomes one program, whose text is printed.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attncompiler


class Mixer(nn.Module):
    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 8.0))
        self.sinks = nn.Parameter(torch.zeros(heads, 2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        """q, k, v [batch, heads, tokens, size]; documents [batch, tokens]: equal numbers are one document."""
        b, h, n, _ = q.shape
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature
        scores = 10.0 * torch.tanh(scores / 10.0)
        place = torch.arange(n, device=q.device)
        same = documents[:, None, :, None] == documents[:, None, None, :]
        seen = (place[None, :] <= place[:, None]) & (same | (place[None, :] < 16))
        scores = scores.masked_fill(~seen, float("-inf"))
        sinks = self.sinks[None, :, None, :].expand(b, h, n, 2)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :n]
        return weights @ v


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 700, 32, requires_grad=True) for _ in range(3))
    return q, k, v, torch.arange(700).div(150, rounding_mode="floor").expand(2, 700)


def main() -> int:
    model, arguments = Mixer(), inputs()
    explanation = attncompiler.explain(model, *arguments)
    print(explanation, "\n")
    for region in explanation.regions:
        print(region.ir)
    leaves = [*arguments[:3], *model.parameters()]
    expected = torch.autograd.grad(model(*arguments).square().sum(), leaves)
    found = torch.autograd.grad(torch.compile(model, backend="attncompiler")(*arguments).square().sum(), leaves)
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))
    print(f"largest difference of a gradient from eager, relative: {worst:.1e}")
    return 0 if worst < 1e-4 and not explanation.missed else 1


if __name__ == "__main__":
    sys.exit(main())

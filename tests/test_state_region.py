"""Linear attention in `explain`: recognised and called by name, it shows the same things."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attncompiler
from attncompiler.explanation import Region

B, H, N, D = 1, 2, 96, 16


def plain(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    decay = torch.exp(-rate[:, None, None] * (i[:, None] - i)).tril()
    return (q @ k.mT * decay) @ v


def named(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return attncompiler.linear_attention(q, k, v, decay=-rate)


def region(form: Any, dtype: torch.dtype = torch.float32) -> Region:
    inputs = [torch.randn(B, H, N, D, dtype=dtype) for _ in range(3)]
    (found,) = attncompiler.explain(form, *inputs, torch.tensor([0.1, 0.3], dtype=dtype)).regions
    return found


@pytest.mark.parametrize("form", [plain, named])
def test_kernels_and_work_are_shown(form: Any) -> None:
    found = region(form)
    assert found.family == "state" and found.mask == "kv_idx <= q_idx" and found.template.startswith("chunks of a recurrence")
    assert "def state_outputs" in found.kernels["state"] and "def state_backward" in found.kernels["state"]
    work = 2 * N * (4 * D * D + 2 * 64 * 2 * D)  # reading and writing the state, and the pairs of each chunk
    assert f"{work / 1e9:.3g} GFLOP, linear in the tokens; all pairs: {2 * B * H * N * N * 2 * D / 1e9:.3g}" in found.notes[-1]


def test_what_was_proved_is_shown() -> None:
    notes = region(plain).notes
    assert any(note.startswith("proved with sympy: exp(") for note in notes)
    assert any(note.startswith("O(N) instead of O(N x N)") for note in notes)


def test_what_has_no_kernel_says_so() -> None:
    found = region(plain, torch.float64)
    assert not found.kernels and found.template == "portable" and found.notes[-1].startswith("no GPU kernel: ")


def test_sizes_may_be_symbolic() -> None:
    inputs = [torch.randn(B, H, N, D) for _ in range(3)]
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 2)
    (found,) = attncompiler.explain(plain, *inputs, torch.tensor([0.1, 0.3])).regions
    assert found.kernels and "q_idx=s" in found.ir.replace("q_idx=N", "q_idx=s")
    assert "GFLOP" in found.notes[-1]

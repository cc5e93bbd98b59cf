"""Declared masks through the emitted kernels, forward and backward, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from attncompiler import masks
from attncompiler.dsl.attention import declare
from attncompiler.masks import Mask
from attncompiler.runtime import triton_launch
from tests.programs import judge


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "mask",
    [
        masks.causal() & (masks.window(7) | masks.sink(3)), masks.dilated(2, 5), masks.strided(8, 2, 3, 4),
        masks.grid((6, 12), (3, 5), (1, 2), (2, 1)), masks.grid((2, 6, 6), (2, 3, 3), causal=(True, False, False)),
        masks.disc((8, 8), 3, 8), masks.halo((8, 9), 4, 1), masks.per_head([masks.causal(), ~masks.document(every=20)] * 2),
        masks.where(lambda b, h, q_idx, kv_idx: (q_idx * 3 + kv_idx) % 5 < 2),
    ],
    ids=str,
)  # fmt: skip
def test_declared_masks(mask: Mask) -> None:
    q, k, v = (torch.empty(2, 4, 72, 16) for _ in range(3))
    judge(triton_launch, declare(q, k, v, keep=mask).program, "cpu", False)

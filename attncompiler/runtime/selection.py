"""Ops that say which keys are kept, as lists: below autograd, on the device, without waiting for it.

A list holds positions in ascending order and then -1, which is what `positions` of the language gives (ir/select.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("attncompiler", "FRAGMENT")
_LIBRARY.define("ascending(Tensor indices, Tensor? kept=None) -> Tensor")


@torch.library.impl(_LIBRARY, "ascending", "CompositeExplicitAutograd")
def ascending(indices: Tensor, kept: Tensor | None = None) -> Tensor:
    """The positions `indices` [..., w], which are distinct in a row, in ascending order; those that are not `kept` [..., w] are left
    out. Returns int64 [..., w]: positions, then -1."""
    if kept is None:
        return indices.sort(-1).values
    past = torch.iinfo(torch.int64).max
    ordered = torch.where(kept, indices, past).sort(-1).values
    return ordered.masked_fill_(ordered == past, -1)


@torch.library.register_fake("attncompiler::ascending", lib=_LIBRARY)
def _ascending_fake(indices: Tensor, kept: Tensor | None = None) -> Tensor:
    return indices.new_empty(indices.shape)

"""Rows of queries by list: which are active, taken together and put back. On a GPU a kernel each, else torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The active queries of each batch and head: the first `count` [b, h] of `index` [b, h, rows_length], ascending; past these
    comes the last again (0 where there is none). `place` [b, h, q_idx]: where a query stands in its list, -1 if in none. int32."""

    index: Tensor
    count: Tensor
    place: Tensor

    @property
    def length(self) -> int:
        return self.index.shape[2]

    def take(self, x: Tensor) -> Tensor:
        """[b or 1, h or 1, q_idx(, D)] -> [b, h, rows_length(, D)], zero past the end of a list."""
        b, h = self.count.shape
        index = self.index.long()
        ended = torch.arange(self.length, device=x.device) >= self.count[..., None]
        if x.dim() == 4:
            index, ended = index[..., None].expand(-1, -1, -1, x.shape[3]), ended[..., None]
        return x.expand(b, h, *x.shape[2:]).gather(2, index).masked_fill_(ended, 0.0)

    def put(self, x: Tensor, elsewhere: float = 0.0) -> Tensor:
        """[b, h, rows_length(, D)] -> [b, h, q_idx(, D)], `elsewhere` where a query is in no list."""
        place, absent = self.place.clamp(min=0).long(), self.place < 0
        if self.length == 0:
            return x.new_full((*self.place.shape, *x.shape[3:]), elsewhere)
        if x.dim() == 4:
            place, absent = place[..., None].expand(-1, -1, -1, x.shape[3]), absent[..., None]
        return x.gather(2, place).masked_fill_(absent, elsewhere)


def rows_of(active: Tensor) -> Rows:
    """The lists of `active`, bool [b, h, q_idx]. On a GPU they are as long as there are queries, so that nothing waits."""
    number = active.cumsum(2, dtype=torch.int32)
    m = active.shape[2]
    count = number[..., -1] if m else number.new_zeros(active.shape[:2])
    length = m if active.is_cuda else int(count.max()) if count.numel() else 0
    place = torch.where(active, number - 1, -1)
    slot = torch.where(active, place, length).long()
    tokens = torch.arange(m, dtype=torch.int32, device=active.device).expand_as(place)
    index = torch.zeros(*active.shape[:2], length + 1, dtype=torch.int32, device=active.device).scatter_(2, slot, tokens)
    index = index[..., :length].cummax(2).values  # ascending, so the last goes on
    return Rows(index.contiguous(), count.contiguous(), place)

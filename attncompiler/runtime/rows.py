"""Rows of queries by list: which are active, taken together and put back. On a GPU a kernel each, else torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.runtime import row_kernels


@dataclass(frozen=True)
class Rows:
    """The active queries of each batch and head: the first `count` [b, h] of `index` [b, h, rows_length], ascending; past these
    comes the last again (0 where there is none). `place` [b, h, q_idx]: where a query stands in its list, -1 if in none. int32.
    `lists`: what `of` takes."""

    index: Tensor
    count: Tensor
    place: Tensor
    lists: Tensor

    @staticmethod
    def of(lists: Tensor, count: Tensor) -> Rows:
        """From `lists` [2, b, h, q_idx]: the index as long as there are queries, and the places. On a GPU all of the index is used, so
        that nothing waits for a length."""
        index, place = lists
        if not count.is_cuda:
            index = index[..., : int(count.max()) if count.numel() else 0]
        return Rows(index, count, place, lists)

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

    def take_elements(self, x: Tensor) -> Tensor:
        """[b or 1, h or 1, q_idx or 1] -> [b, h, rows_length]; past the end of a list the last again, so that what is proved of a tile
        is proved of its rows."""
        b, h = self.count.shape
        x = x.expand(b, h, self.place.shape[2])
        over_b, over_h = torch.arange(b, device=x.device)[:, None, None], torch.arange(h, device=x.device)[:, None]
        return x[over_b, over_h, self.index]

    def put(self, x: Tensor, elsewhere: float = 0.0) -> Tensor:
        """[b, h, rows_length(, D)] -> [b, h, q_idx(, D)], `elsewhere` where a query is in no list."""
        place, absent = self.place.clamp(min=0).long(), self.place < 0
        if self.length == 0:
            return x.new_full((*self.place.shape, *x.shape[3:]), elsewhere)
        if x.dim() == 4:
            place, absent = place[..., None].expand(-1, -1, -1, x.shape[3]), absent[..., None]
        return x.gather(2, place).masked_fill_(absent, elsewhere)

    def put_into(self, out: Tensor, x: Tensor) -> None:
        """Fill `out` [b, h, q_idx, D], dense in its channels, with the rows x by list; 0 where a query is in no list."""
        if x.is_cuda:
            row_kernels.put_rows_into(out, x, self.place)
        else:
            out.copy_(self.put(x))

    def take_vectors(self, x: Tensor, fill: bool) -> Tensor:
        """As `take`, of x [b, h, q_idx, D]; without `fill` it may hold anything further past the end of a list than a tile."""
        return row_kernels.take_rows(x, self.index, self.count, fill=fill)[0] if x.is_cuda else self.take(x)

    def put_vectors(
        self, x: Tensor, lse_rows: Tensor, gain: Tensor | None = None, nan_if_empty: bool = False, heads_first: bool = True
    ) -> tuple[Tensor, Tensor]:
        """O, in x's dtype, and lse of what the rows that are left give."""
        if x.is_cuda:
            o, lse = row_kernels.put_rows(x, self.place, gain, lse_rows, nan_if_empty, heads_first)
            assert lse is not None
            return o, lse
        o = x if gain is None else (x * self.take(gain)[..., None]).to(x.dtype)
        o = self.put(o.masked_fill((lse_rows == float("-inf"))[..., None], torch.nan) if nan_if_empty else o)
        return o if heads_first else o.transpose(1, 2).contiguous().transpose(1, 2), self.put(lse_rows, float("-inf"))

    def take_gradients(
        self, grad: Tensor, lse: Tensor, gain: Tensor | None, summed: Tensor | None, along: Tensor | None, fill: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradients of O by list, each times its gain, and lse by list. For `summed`, O before the gain by list, the gradients of the
        gains are put into `along` [b, h, q_idx], which is 0 before. Without `fill` the gradients may hold anything further past the end
        of a list than a tile."""
        if grad.is_cuda:
            taken, lse_rows = row_kernels.take_rows(grad, self.index, self.count, gain, summed, along, lse, fill)
            assert lse_rows is not None
            return taken, lse_rows
        taken = self.take(grad)
        if along is not None and summed is not None:
            along.copy_(self.put((taken.to(lse.dtype) * summed.to(lse.dtype)).sum(-1)))
        return taken if gain is None else (taken * self.take(gain)[..., None]).to(grad.dtype), self.take(lse)


def rows_of(active: Tensor, outputs: tuple[Tensor, Tensor] | None = None) -> Rows:
    """The lists of `active`, bool [b, h, q_idx]. `outputs`: on a GPU O and lse, where those of queries in no list are written."""
    if active.is_cuda:
        return Rows.of(*row_kernels.list_rows(active, outputs))
    number = active.cumsum(2, dtype=torch.int32)
    m = active.shape[2]
    count = number[..., -1].contiguous() if m else number.new_zeros(active.shape[:2])
    place = torch.where(active, number - 1, -1)
    slot = torch.where(active, place, m).long()
    tokens = torch.arange(m, dtype=torch.int32, device=active.device).expand_as(place)
    index = torch.zeros(*active.shape[:2], m + 1, dtype=torch.int32, device=active.device).scatter_(2, slot, tokens)
    index = index[..., :m].cummax(2).values if m else index[..., :m]  # ascending, so the last goes on
    return Rows.of(torch.stack([index, place]), count)

"""Ops that say which keys are kept, as lists: below autograd, on the device, without waiting for it.

A list holds positions in ascending order and then -1, which is what `positions` of the language gives (ir/select.py). They are int32:
kernels compare them with the positions of queries, and 64 bits of each key would spill.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("attncompiler", "FRAGMENT")
_LIBRARY.define("ascending(Tensor indices, Tensor? kept=None) -> Tensor")
_LIBRARY.define(
    "prefix_top_k(Tensor rank, int dim, SymInt w, SymInt first, SymInt queries, float above, bool drop_nan, bool ties, SymInt places) "
    "-> (Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "ascending", "CompositeExplicitAutograd")
def ascending(indices: Tensor, kept: Tensor | None = None) -> Tensor:
    """The positions `indices` [..., w], which are distinct in a row, in ascending order; those that are not `kept` [..., w] are
    left out. Returns int32 [..., w]: positions, then -1."""
    positions = indices.to(torch.int32)
    if kept is None:
        return positions.sort(-1).values
    past = torch.iinfo(torch.int32).max
    ordered = torch.where(kept, positions, past).sort(-1).values
    return ordered.masked_fill_(ordered == past, -1)


@torch.library.register_fake("attncompiler::ascending", lib=_LIBRARY)
def _ascending_fake(indices: Tensor, kept: Tensor | None = None) -> Tensor:
    return indices.new_empty(indices.shape, dtype=torch.int32)


@torch.library.impl(_LIBRARY, "prefix_top_k", "CompositeExplicitAutograd")
def prefix_top_k(
    rank: Tensor, dim: int, w: int, first: int, queries: int, above: float, drop_nan: bool, ties: bool, places: int
) -> tuple[Tensor, Tensor]:
    """Which keys are among the `w` of largest rank that a query sees, for each query: query i sees the keys up to first + i.

    A key that is kept by one query and not by the next is kept by none after: as more keys are seen, its place among them only falls.
    So a key is kept by one run of queries, from the first that sees it. `rank` holds the N keys along `dim`. Of them only what is not
    `above` or less is kept, nor a NaN with `drop_nan`; what is not kept still takes its place among the w. `ties`: what equals the
    w-th is kept too.

    Returns: picked int32 [..., places], the keys that any query keeps, ascending, then -1; until int32 [..., places], the first query
    that no longer keeps each. Without ties there are at most w + queries - 1 such keys."""
    rank = rank.movedim(dim, -1)
    n = rank.shape[-1]
    position = torch.arange(n, device=rank.device)
    dropped = _dropped(rank, w, ties)
    until = torch.where(dropped == n, queries, dropped - first)
    kept = until.clamp(max=queries) > torch.clamp(position - first, min=0)
    kept = kept & ~(rank <= above)
    if drop_nan:
        kept = kept & ~rank.isnan()
    picked = ascending(position.expand(rank.shape), kept)[..., :places]
    return picked, until.gather(-1, picked.clamp(min=0).long()).to(torch.int32)


@torch.library.register_fake("attncompiler::prefix_top_k", lib=_LIBRARY)
def _prefix_top_k_fake(
    rank: Tensor, dim: int, w: int, first: int, queries: int, above: float, drop_nan: bool, ties: bool, places: int
) -> tuple[Tensor, Tensor]:
    shape = (*rank.movedim(dim, -1).shape[:-1], places)
    return rank.new_empty(shape, dtype=torch.int32), rank.new_empty(shape, dtype=torch.int32)


def _dropped(rank: Tensor, w: int, ties: bool) -> Tensor:
    """For each key of [..., N] the last key of the shortest prefix in which `w` keys rank before it; N where none does.

    Ties go to the lower position, or with `ties` are no reason to drop a key; NaN is above all. The place of the w-th key of each
    prefix never grows, so what drops a key is found by bisection."""
    n = rank.shape[-1]
    sorted_rank, order = torch.sort(rank, dim=-1, descending=True, stable=True)
    position = torch.arange(n, device=rank.device).expand_as(order)
    if w <= 0:
        return position
    if n <= w:
        return torch.full_like(order, n)
    place = torch.empty_like(order).scatter_(-1, order, position)
    last = torch.nn.functional.pad(_prefix_places(place, w), (w - 1, 0), value=n)  # of a prefix with fewer keys: past all
    if ties:  # a key counts as the first of those that equal it
        begins = torch.nn.functional.pad(sorted_rank[..., 1:] != sorted_rank[..., :-1], (1, 0), value=True)
        place = torch.where(begins, position, 0).cummax(-1).values.gather(-1, place)
    return torch.searchsorted((-last).contiguous(), (-place).contiguous(), right=True)


def _prefix_places(place: Tensor, w: int) -> Tensor:
    """The w-th smallest of the first e + 1 elements of a permutation [..., N], for each e from w - 1 on: [..., N - w + 1].

    By a wavelet matrix: one bit of all answers a step, from the highest. A step knows how many elements of each prefix have a 0
    there, among those that share the higher bits; then the elements are parted by that bit, in order."""
    n = place.shape[-1]
    begin = torch.zeros_like(place[..., w - 1 :])
    end = torch.arange(w, n + 1, device=place.device).expand_as(begin)
    wanted, found = torch.full_like(begin, w - 1), torch.zeros_like(begin)
    for bit in reversed(range((n - 1).bit_length())):
        ones = (place >> bit) & 1
        zeros_before = torch.nn.functional.pad((1 - ones).cumsum(-1), (1, 0))
        zeros = zeros_before[..., -1:]
        at_begin, at_end = zeros_before.gather(-1, begin), zeros_before.gather(-1, end)
        count = at_end - at_begin
        low = wanted < count
        begin = torch.where(low, at_begin, zeros + begin - at_begin)
        end = torch.where(low, at_end, zeros + end - at_end)
        wanted = torch.where(low, wanted, wanted - count)
        found = found | (~low).to(found.dtype) << bit
        before = zeros_before[..., :-1]
        target = torch.where(ones == 0, before, zeros + torch.arange(n, device=place.device) - before)
        place = torch.empty_like(place).scatter_(-1, target, place)
    return found

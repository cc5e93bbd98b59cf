"""Rules of blocks that may explain dense masks [heads, M, N]: S2-Attention's stripes, patterns of blocks; and masks of no rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attncompiler.ir.expr import KV_IDX, Q_IDX, Const, Expr, H, Read, add, apply, conj, floordiv, mod, mul, sub
from attncompiler.passes.mask_rules import Plane, Rule

_SMALLEST_BLOCK = 16  # of smaller ones the pattern is nearly as large as the mask


def stripes(heads: Tensor, planes: Sequence[Plane]) -> Iterator[Rule]:
    """S2-Attention as `masks.strided` has it: the nearest blocks and every so many-th, shifted from head to head."""
    size = _block_size(planes, causal=True)
    if size < 2:
        return
    pattern = _pattern(heads, size, causal=True)
    count, last = len(pattern), pattern[:, -1]
    changes = [i for i in range(1, count) if bool((pattern[i] != pattern[i - 1]).any())]
    group = changes[0] if changes else count
    near = int((~last).flip(1).to(torch.int8).argmax(1).min())
    gaps = [int(gap) for row in last[:, : last.shape[1] - near] for gap in row.nonzero().squeeze(1).diff()]
    if count % group or not near or not gaps:
        return
    stride = min(gaps)
    column, shard = floordiv(KV_IDX, Const(size)), floordiv(H, Const(group))
    for local in range(near, max(near - 2, 0), -1):  # a stripe may touch the nearest blocks
        beside = apply("gt", column, sub(floordiv(Q_IDX, Const(size)), Const(local)))
        for offset in range(stride):
            place = add(add(column, mul(shard, Const(max(1, stride // count)))), Const(offset))
            stripe = apply("eq", mod(place, Const(stride)), Const(0))
            yield Rule(conj(apply("or", beside, stripe), apply("le", KV_IDX, Q_IDX)))


def patterns(heads: Tensor, planes: Sequence[Plane]) -> Iterator[Rule]:
    """Blocks that are kept whole or not at all, perhaps cut at the diagonal: `masks.blocks` with a pattern."""
    for causal in (False, True):
        size = _block_size(planes, causal)
        if size >= _SMALLEST_BLOCK:
            pattern = _pattern(heads, size, causal)
            of_head: tuple[Expr, ...] = (H,) if len(heads) > 1 else ()
            block = Read("pattern", (*of_head, floordiv(Q_IDX, Const(size)), floordiv(KV_IDX, Const(size))))
            kept = conj(apply("le", KV_IDX, Q_IDX), block) if causal else block
            yield Rule(kept, {"pattern": pattern if of_head else pattern[0]})


def copied(heads: Tensor) -> Iterator[Rule]:
    """The mask itself, where enough tiles keep all of their pairs or none that a plan of them pays for the copy.

    The copy has a byte for each pair, and nobody writes to it: so it is scanned for a plan once, not at each call."""
    padded = torch.nn.functional.pad(heads.view(torch.uint8), (0, -heads.shape[2] % _TILE, 0, -heads.shape[1] % _TILE), value=2)
    tiles = padded.unflatten(2, (-1, _TILE)).unflatten(1, (-1, _TILE))
    some, every = (tiles == 1).any(4).any(2), (tiles != 0).all(4).all(2)
    if min(some.shape[1:]) > 1 and float((every | ~some).double().mean()) >= _SETTLED:
        of_head: tuple[Expr, ...] = (H,) if len(heads) > 1 else ()
        kept = heads.clone(memory_format=torch.contiguous_format)
        yield Rule(Read("mask", (*of_head, Q_IDX, KV_IDX)), {"mask": kept if of_head else kept[0]})


_TILE = 64  # of queries, and of keys
_SETTLED = 1 / 8  # of all tiles


def _block_size(planes: Sequence[Plane], causal: bool) -> int:
    """The side of blocks at whose edges alone the sampled rows change; 0 without any. `causal`: but for the diagonal."""
    places: set[int] = set()
    for plane in planes:
        edges = (plane.sample[:, 1:] != plane.sample[:, :-1]).nonzero()
        at = edges[:, 1] + 1
        places |= {int(place) for place in (at[at != plane.row[edges[:, 0]] + 1] if causal else at).unique()}
    size = math.gcd(*places)
    return size if size < min(planes[0].m, planes[0].n) else 0


def _pattern(heads: Tensor, size: int, causal: bool) -> Tensor:
    """Which blocks are kept, bool [heads, query blocks, key blocks]; only the last row of a block is not cut at the diagonal."""
    rows = torch.arange(0, heads.shape[1], size)
    if causal:
        rows = (rows + size - 1).clamp(max=heads.shape[1] - 1)
    return heads[:, rows, ::size].contiguous()

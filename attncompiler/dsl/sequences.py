"""Rules of positions in a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attncompiler.dsl.masks import Mask, Sized, make_rule, pickled
from attncompiler.dsl.term import Positions, equal, larger
from attncompiler.errors import OptionError
from attncompiler.ir.expr import B, H


@pickled
def full() -> Mask:
    """Every key."""
    return make_rule("full()", lambda p: equal(p.k, p.k))


@pickled
def causal(offset: int = 0) -> Mask:
    """Keys up to the query's own position, kv_idx <= q_idx + offset. With a cache of n keys before the queries: offset n."""
    whole("causal", offset=offset)
    return make_rule(f"causal({offset or ''})", lambda p: p.k <= p.q + offset)


@pickled
def window(left: int, right: int | None = None) -> Mask:
    """`left` keys before the query, itself, and `right` (default: as many) after it."""
    right = left if right is None else right
    whole("window", left=left, right=right)
    if min(left, right) < 0:
        raise OptionError(f"a window of {left} and {right} keys has a negative side")
    return make_rule(f"window({left}, {right})", lambda p: (p.k >= p.q - left) & (p.k <= p.q + right))


@pickled
def sink(count: int) -> Mask:
    """The first `count` keys."""
    whole("sink", count=count)
    return make_rule(f"sink({count})", lambda p: p.k < count)


@pickled
def prefix(length: int | Tensor) -> Mask:
    """The first `length` keys, for all queries: `causal() | prefix(n)` is a prefix language model. One a batch: int [B]."""
    if isinstance(length, int):
        return make_rule(f"prefix({length})", lambda p: p.k < length)
    return _of_batches(
        "prefix(lengths)", lambda p: p.k < p.captured["lengths"][p.b], lengths=_integers(length, "prefix lengths", 1)
    )


@pickled
def padding(lengths: Tensor) -> Mask:
    """Keys before the end of their sequence. `lengths`: int [B]."""
    return _of_batches("padding(lengths)", lambda p: p.k < p.captured["lengths"][p.b], lengths=_integers(lengths, "lengths", 1))


@pickled
def document(
    ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None, lengths: Sequence[int] | None = None, every: int | None = None
) -> Mask:
    """Keys of the query's own document. One of: `ids` int [N] or [B, N]; `cu_seqlens` int [documents + 1], from 0 to N; the
    documents' `lengths`; or documents of `every` tokens."""
    given = [value is not None for value in (ids, cu_seqlens, lengths, every)]
    if sum(given) != 1:
        raise OptionError("document takes one of ids, cu_seqlens, lengths and every")
    if every is not None:
        whole("document", every=every)
        if every < 1:
            raise OptionError(f"documents of {every} tokens")
        return make_rule(f"document(every={every})", lambda p: equal(p.q // every, p.k // every))
    formula = "document(ids)"
    if lengths is not None:
        formula = f"document(lengths={list(lengths)})" if len(lengths) <= 8 else f"document({len(lengths)} lengths)"
        ids = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.as_tensor(lengths))
    if cu_seqlens is not None:
        ends = _integers(cu_seqlens, "cu_seqlens", 1)
        places = torch.arange(int(ends[-1]), device=ends.device, dtype=ends.dtype)
        ids, formula = torch.searchsorted(ends, places, right=True).to(torch.int32), "document(cu_seqlens)"
    if _tensor(ids, "ids").dim() == 2:
        two = _integers(ids, "ids", 2)
        return _of_batches("document(ids)", lambda p: equal(p.captured["doc"][p.b, p.q], p.captured["doc"][p.b, p.k]), doc=two)
    one = _integers(ids, "ids", 1)
    return make_rule(formula, lambda p: equal(p.captured["doc"][p.q], p.captured["doc"][p.k]), doc=one)


@pickled
def regions(labels: Tensor) -> Mask:
    """RAT: keys of the query's own region. `labels`: int [N] or [B, N], in any order."""
    if _tensor(labels, "labels").dim() == 2:
        two = _integers(labels, "labels", 2)
        return _of_batches(
            "regions(labels)", lambda p: equal(p.captured["label"][p.b, p.q], p.captured["label"][p.b, p.k]), label=two
        )
    one = _integers(labels, "labels", 1)
    return make_rule("regions(labels)", lambda p: equal(p.captured["label"][p.q], p.captured["label"][p.k]), label=one)


@pickled
def dilated(reach: int, dilation: int) -> Mask:
    """Every `dilation`-th key, `reach` of them on either side of the query."""
    whole("dilated", reach=reach, dilation=dilation)
    if reach < 0 or dilation < 1:
        raise OptionError(f"dilated({reach}, {dilation}): reach must be 0 or more, dilation 1 or more")
    reached = reach * dilation

    def kept(p: Positions) -> Any:
        return (p.k >= p.q - reached) & (p.k <= p.q + reached) & equal(p.q % dilation, p.k % dilation)

    return make_rule(f"dilated({reach}, {dilation})", kept)


@pickled
def blocks(size: int, pattern: Tensor | None = None) -> Mask:
    """Blocks of `size` tokens: those on the diagonal, or those that `pattern` marks.

    `pattern`: bool [query blocks, key blocks], or [heads, query blocks, key blocks]."""
    whole("blocks", size=size)
    if size < 1:
        raise OptionError(f"blocks of {size} tokens")
    if pattern is None:
        return make_rule(f"blocks({size})", lambda p: equal(p.q // size, p.k // size))
    if not isinstance(pattern, Tensor) or pattern.dtype != torch.bool or pattern.dim() not in (2, 3):
        raise OptionError("the pattern of blocks is bool [query blocks, key blocks] or [heads, query blocks, key blocks]")

    def kept(p: Positions) -> Any:
        index = (p.q // size, p.k // size)
        return p.captured["pattern"][index if len(pattern.shape) == 2 else (p.h, *index)]

    rule = make_rule(f"blocks({size}, pattern)", kept, pattern=pattern)
    return rule if pattern.dim() == 2 else Sized(rule, {H: pattern.shape[0]})


@pickled
def strided(
    block: int, local: int, stride: int, heads: int = 1, *, kv_heads: int | None = None, dense_heads: int = 0, offset: int = 0,
    causal: bool = True,
) -> Mask:  # fmt: skip
    """S2-Attention: of blocks of `block` tokens the `local` nearest and every `stride`-th, another residue for each head.

    `heads` query heads share `kv_heads` shards, the last `dense_heads` of which see all. Not causal, stripes are relative to the
    window and the same for all heads."""
    whole("strided", block=block, local=local, stride=stride, heads=heads, dense_heads=dense_heads, offset=offset)
    if min(block, local, stride, heads) < 1:
        raise OptionError("strided: block, local, stride and heads must be 1 or more")
    formula = f"strided(block={block}, local={local}, stride={stride}, heads={heads})"
    shards = kv_heads or heads
    if heads % shards:
        raise OptionError(f"{shards} shards do not divide {heads} heads")

    def relative(p: Positions) -> Any:
        away = p.q // block - p.k // block
        beyond = larger(away - (local - 1), 0) + larger(away * -1 - (local - 1), 0)
        return equal(beyond % stride, 0)

    def absolute(p: Positions) -> Any:
        shard, column = p.h // (heads // shards), p.k // block
        kept = (column > p.q // block - local) | equal((column + shard * max(1, stride // heads) + offset) % stride, 0)
        if dense_heads:
            kept = kept | (shard >= shards - dense_heads)
        return kept & (p.k <= p.q)

    return Sized(make_rule(formula, absolute), {H: heads} if heads > 1 else {}) if causal else make_rule(formula, relative)


def _of_batches(formula: str, kept: Callable[[Positions], Any], **captured: Tensor) -> Mask:
    """A rule that reads tensors with an entry for each batch."""
    (tensor,) = captured.values()
    return Sized(make_rule(formula, kept, **captured), {B: tensor.shape[0]})


def whole(rule: str, **numbers: object) -> None:
    """Raises: OptionError for what is no integer."""
    for name, value in numbers.items():
        if not isinstance(value, int | torch.SymInt):
            raise OptionError(f"{rule}: {name} is {value!r}", do="give a whole number")


def _tensor(value: object, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise OptionError(f"{what} is {value!r}", do="give a tensor of integers, on the device of q")
    return value


def _integers(value: object, what: str, rank: int) -> Tensor:
    tensor = _tensor(value, what)
    if tensor.dtype.is_floating_point or tensor.dtype == torch.bool or tensor.dim() != rank:
        raise OptionError(
            f"{what} must be integers with {rank} dimension{'s' * (rank > 1)}, not {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor

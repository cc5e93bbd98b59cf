"""Masks as an algebra: rules of positions, joined by `&`, `|` and `~`.

A mask says which keys a query sees. It is a rule, never a matrix: nothing here is as large as queries times keys. Positions are
those of FlexAttention's mods: b, h, q_idx, kv_idx. A query that sees no key gives zero, as in scaled_dot_product_attention."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from attncompiler.dsl.pictures import picture
from attncompiler.dsl.term import Positions, equal, larger, smaller, terms
from attncompiler.dsl.trace import traced
from attncompiler.errors import OptionError
from attncompiler.ir.expr import AXES, KV_IDX, Axis, Const, Expr, H, Read, apply, settled, transform
from attncompiler.passes.plan import TilePlan, count_kept, plan_predicate

Extents = Mapping[Axis, int]
Captured = dict[str, Tensor]


class Mask(ABC):
    """Which keys a query sees. `str` shows the rule as a formula."""

    @abstractmethod
    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        """The predicate on axes of these sizes, and the tensors that it reads, by name.

        Raises: OptionError where the sizes don't fit."""

    @abstractmethod
    def on(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The mask at positions that are index tensors, in plain torch: what other backends compile, and ours recognises."""

    def __and__(self, other: Mask) -> Mask:
        return _Joined("and", (self, as_mask(other)))

    def __or__(self, other: Mask) -> Mask:
        return _Joined("or", (self, as_mask(other)))

    def __invert__(self) -> Mask:
        return _Joined("not", (self,))

    def plan(self, b: int, h: int, m: int, n: int, block_q: int = 128, block_kv: int = 128) -> TilePlan:
        """The tiles of `block_q` queries by `block_kv` keys that it keeps something of."""
        predicate, captured = self.rule(dict(zip(AXES, (b, h, m, n), strict=True)))
        return plan_predicate(predicate, captured, (b, h, m, n), block_q, block_kv)

    def kept_pairs(self, b: int, h: int, m: int, n: int) -> int | None:
        """How many (query, key) pairs it keeps, over all batches and heads; None where that takes too long to count."""
        predicate, captured = self.rule(dict(zip(AXES, (b, h, m, n), strict=True)))
        return count_kept(predicate, captured, (b, h, m, n))

    def show(self, b: int, h: int, m: int, n: int, columns: int = 64) -> str:
        """A picture in text: queries downwards, keys to the right, of the first batch and head."""
        return picture(self.plan(b, h, m, n), columns)

    def dense(self, b: int, h: int, m: int, n: int) -> Tensor:
        """The mask itself, bool [b or 1, h or 1, m, n]: for tests and pictures of small cases."""
        from attncompiler.ir.evaluate import whole

        extents = dict(zip(AXES, (b, h, m, n), strict=True))
        predicate, captured = self.rule(extents)
        block = whole(captured, {}, {axis.name: size for axis, size in extents.items()}, torch.float64, torch.device("cpu"))
        found = block.tensor(predicate).to(torch.bool)
        return found.expand(*found.shape[:2], m, n) if found.dim() == 4 else found.expand(1, 1, m, n)


def as_mask(value: Mask | Callable[..., Any]) -> Mask:
    """A mask as it is, or a function of positions as a mask."""
    if isinstance(value, Mask):
        return value
    if callable(value):
        return where(value)
    raise OptionError(f"{value!r} is no mask", do="use attncompiler.masks, or a function (b, h, q_idx, kv_idx) -> bool")


@dataclass(frozen=True, eq=False)
class _Rule(Mask):
    """A rule that is the same for all sizes."""

    formula: str
    kept: Callable[[Positions], Any]
    captured: Mapping[str, Tensor]

    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        return settled(self.kept(terms(self.captured)).expr, KV_IDX), dict(self.captured)

    def on(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found: Tensor = self.kept(Positions(b, h, q_idx, kv_idx, self.captured))
        return found

    def __str__(self) -> str:
        return self.formula


@dataclass(frozen=True, eq=False)
class _Sized(Mask):
    """A rule for one number of keys, and of queries."""

    mask: Mask
    size: int
    count: Callable[[], int]

    def kept_pairs(self, b: int, h: int, m: int, n: int) -> int | None:
        self.rule(dict(zip(AXES, (b, h, m, n), strict=True)))
        return b * h * self.count()

    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        for axis in AXES[2:]:
            if extents[axis] != self.size:
                what = "queries" if axis.name == "q_idx" else "keys"
                raise OptionError(f"{self.mask} is for {self.size} tokens, not {extents[axis]} {what}")
        return self.mask.rule(extents)

    def on(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.mask.on(b, h, q_idx, kv_idx)

    def __str__(self) -> str:
        return str(self.mask)


@dataclass(frozen=True, eq=False)
class _Traced(Mask):
    """A user's function of positions."""

    function: Callable[..., Any]

    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        examples = [torch.zeros((), dtype=torch.int64) for _ in AXES]
        expr, captured = traced(self.function, AXES, examples, extents)
        return settled(expr, KV_IDX), captured

    def on(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found: Tensor = self.function(b, h, q_idx, kv_idx)
        return found

    def __str__(self) -> str:
        return f"where({getattr(self.function, '__name__', 'a function')})"


@dataclass(frozen=True, eq=False)
class _Joined(Mask):
    operator: str
    parts: tuple[Mask, ...]

    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        captured: Captured = {}
        exprs = []
        for part in self.parts:
            expr, tensors = part.rule(extents)
            exprs.append(rename(expr, adopt(captured, tensors)))
        return settled(apply(self.operator, *exprs), KV_IDX), captured

    def on(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        parts = [part.on(b, h, q_idx, kv_idx) for part in self.parts]
        return ~parts[0] if self.operator == "not" else parts[0] & parts[1] if self.operator == "and" else parts[0] | parts[1]

    def __str__(self) -> str:
        texts = [str(part) if isinstance(part, _Rule | _Sized | _Traced) else f"({part})" for part in self.parts]
        return f"~{texts[0]}" if self.operator == "not" else {"and": " & ", "or": " | "}[self.operator].join(texts)


def adopt(captured: Captured, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Take `tensors` into `captured`; what each is called there. One tensor has one name, and one name one tensor."""
    names = {}
    for name, tensor in tensors.items():
        held = next((known for known, value in captured.items() if value is tensor), None)
        count = 2
        fresh = name
        while held is None and fresh in captured:
            fresh, count = f"{name}{count}", count + 1
        names[name] = held or fresh
        captured[names[name]] = tensor
    return names


def rename(expr: Expr, names: Mapping[str, str]) -> Expr:
    """`expr` with its tensors under other names."""

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Read) and names.get(node.tensor, node.tensor) != node.tensor:
            return Read(names[node.tensor], tuple(transform(entry, visit) for entry in node.index))
        return None

    return transform(expr, visit)


def _rule(formula: str, kept: Callable[[Positions], Any], **captured: Tensor) -> Mask:
    return _Rule(formula, kept, captured)


# ------------------------------------------------------------------------------------------------------------ sequences


def full() -> Mask:
    """Every key."""
    return _rule("full()", lambda p: equal(p.k, p.k))


def causal(offset: int = 0) -> Mask:
    """Keys up to the query's own position, kv_idx <= q_idx + offset. With a cache of n keys before the queries: offset n."""
    return _rule(f"causal({offset or ''})", lambda p: p.k <= p.q + offset)


def window(left: int, right: int | None = None) -> Mask:
    """`left` keys before the query, itself, and `right` (default: as many) after it."""
    right = left if right is None else right
    if min(left, right) < 0:
        raise OptionError(f"a window of {left} and {right} keys has a negative side")
    return _rule(f"window({left}, {right})", lambda p: (p.k >= p.q - left) & (p.k <= p.q + right))


def sink(count: int) -> Mask:
    """The first `count` keys."""
    return _rule(f"sink({count})", lambda p: p.k < count)


def prefix(length: int | Tensor) -> Mask:
    """The first `length` keys, for all queries: `causal() | prefix(n)` is a prefix language model. One a batch: int [B]."""
    if isinstance(length, int):
        return _rule(f"prefix({length})", lambda p: p.k < length)
    return _rule("prefix(lengths)", lambda p: p.k < p.captured["lengths"][p.b], lengths=_integers(length, "prefix lengths", 1))


def padding(lengths: Tensor) -> Mask:
    """Keys before the end of their sequence. `lengths`: int [B]."""
    return _rule("padding(lengths)", lambda p: p.k < p.captured["lengths"][p.b], lengths=_integers(lengths, "lengths", 1))


def document(
    ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None, lengths: Sequence[int] | None = None, every: int | None = None
) -> Mask:
    """Keys of the query's own document. One of: `ids` int [N] or [B, N]; `cu_seqlens` int [documents + 1], from 0 to N; the
    documents' `lengths`; or documents of `every` tokens."""
    given = [value is not None for value in (ids, cu_seqlens, lengths, every)]
    if sum(given) != 1:
        raise OptionError("document takes one of ids, cu_seqlens, lengths and every")
    if every is not None:
        if every < 1:
            raise OptionError(f"documents of {every} tokens")
        return _rule(f"document(every={every})", lambda p: equal(p.q // every, p.k // every))
    formula = "document(ids)"
    if lengths is not None:
        formula = f"document(lengths={list(lengths)})" if len(lengths) <= 8 else f"document({len(lengths)} lengths)"
        ids = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    if cu_seqlens is not None:
        ends = _integers(cu_seqlens, "cu_seqlens", 1)
        places = torch.arange(int(ends[-1]), device=ends.device, dtype=ends.dtype)
        ids, formula = torch.searchsorted(ends, places, right=True).to(torch.int32), "document(cu_seqlens)"
    assert ids is not None
    if ids.dim() == 2:
        two = _integers(ids, "ids", 2)
        return _rule("document(ids)", lambda p: equal(p.captured["doc"][p.b, p.q], p.captured["doc"][p.b, p.k]), doc=two)
    one = _integers(ids, "ids", 1)
    return _rule(formula, lambda p: equal(p.captured["doc"][p.q], p.captured["doc"][p.k]), doc=one)


def dilated(reach: int, dilation: int) -> Mask:
    """Every `dilation`-th key, `reach` of them on either side of the query."""
    if reach < 0 or dilation < 1:
        raise OptionError(f"dilated({reach}, {dilation}): reach must be 0 or more, dilation 1 or more")
    reached = reach * dilation

    def kept(p: Positions) -> Any:
        return (p.k >= p.q - reached) & (p.k <= p.q + reached) & equal(p.q % dilation, p.k % dilation)

    return _rule(f"dilated({reach}, {dilation})", kept)


def blocks(size: int, pattern: Tensor | None = None) -> Mask:
    """Blocks of `size` tokens: those on the diagonal, or those that `pattern` marks.

    `pattern`: bool [query blocks, key blocks], or [heads, query blocks, key blocks]."""
    if size < 1:
        raise OptionError(f"blocks of {size} tokens")
    if pattern is None:
        return _rule(f"blocks({size})", lambda p: equal(p.q // size, p.k // size))
    if pattern.dtype != torch.bool or pattern.dim() not in (2, 3):
        raise OptionError("the pattern of blocks is bool [query blocks, key blocks] or [heads, query blocks, key blocks]")

    def kept(p: Positions) -> Any:
        index = (p.q // size, p.k // size)
        return p.captured["pattern"][index if len(pattern.shape) == 2 else (p.h, *index)]

    return _rule(f"blocks({size}, pattern)", kept, pattern=pattern)


def strided(
    block: int, local: int, stride: int, heads: int = 1, *, kv_heads: int | None = None, dense_heads: int = 0, offset: int = 0,
    causal: bool = True,
) -> Mask:  # fmt: skip
    """S2-Attention: of blocks of `block` tokens the `local` nearest and every `stride`-th, another residue for each head.

    `heads` query heads share `kv_heads` shards, the last `dense_heads` of which see all. Not causal, stripes are relative to the
    window and the same for all heads."""
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

    return _rule(formula, absolute if causal else relative)


def per_head(masks: Sequence[Mask]) -> Mask:
    """Another mask for each head."""
    if not masks:
        raise OptionError("per_head takes one mask for each head")
    return _PerHead(tuple(as_mask(mask) for mask in masks))


@dataclass(frozen=True, eq=False)
class _PerHead(Mask):
    masks: tuple[Mask, ...]

    def rule(self, extents: Extents) -> tuple[Expr, Captured]:
        if extents[AXES[1]] != len(self.masks):
            raise OptionError(f"per_head has {len(self.masks)} masks for {extents[AXES[1]]} heads")
        captured: Captured = {}
        of: dict[Expr, list[int]] = {}
        for number, mask in enumerate(self.masks):
            expr, tensors = mask.rule(extents)
            of.setdefault(rename(expr, adopt(captured, tensors)), []).append(number)
        if len(of) == 1:
            return next(iter(of)), captured
        parts = []
        for expr, heads in of.items():
            which = reduce(lambda a, b: apply("or", a, b), (apply("eq", H, Const(number)) for number in heads))
            parts.append(apply("and", which, expr))
        return reduce(lambda a, b: apply("or", a, b), parts), captured

    def on(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found = (h == 0) & self.masks[0].on(b, h, q_idx, kv_idx)
        for number, mask in enumerate(self.masks[1:], 1):
            found = found | (h == number) & mask.on(b, h, q_idx, kv_idx)
        return found

    def __str__(self) -> str:
        return f"per_head([{', '.join(map(str, self.masks))}])"


def where(function: Callable[..., Any]) -> Mask:
    """Keys for which `function(b, h, q_idx, kv_idx)` holds; it may read tensors by these. FlexAttention's mask_mods, unchanged."""
    return _Traced(function)


# ---------------------------------------------------------------------------------------------------------------- grids


def grid(
    shape: Sequence[int], window: int | Sequence[int], stride: int | Sequence[int] = 1, dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Mask:  # fmt: skip
    """(Generalised) neighbourhood attention over a grid of tokens in row-major order, as NATTEN defines it.

    For each axis: `window` keys around the query, shifted at the borders and never shrunk; `stride` queries share the window of
    their leader; with `dilation` each residue class is a grid of its own; `causal` windows end at the query."""
    sizes = tuple(shape)
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise OptionError(f"a grid of {sizes}: one to three axes of one token or more")
    each = [_for_each_axis(value, len(sizes), name) for value, name in (
        (window, "window"), (stride, "stride"), (dilation, "dilation"), (causal, "causal"))]  # fmt: skip
    axes: list[tuple[int, int, int, int, int, bool]] = []
    for axis, (length, w, s, d, c) in enumerate(zip(sizes, *each, strict=True)):
        if not (1 <= s <= w and d >= 1 and w * d <= length):
            raise OptionError(
                f"axis {axis} of {length} tokens can't have window {w}, stride {s}, dilation {d}",
                why="1 <= stride <= window and window * dilation <= length must hold",
            )
        axes.append((math.prod(sizes[axis + 1 :]), length, w, s, d, bool(c)))

    def kept(p: Positions) -> Any:
        seen = [
            _axis_window(p.q // inner % length, p.k // inner % length, length, w, s, d, c) for inner, length, w, s, d, c in axes
        ]
        return reduce(lambda one, other: one & other, seen)

    text = ", ".join(f"{name}={value}" for name, value, default in (
        ("stride", stride, 1), ("dilation", dilation, 1), ("causal", causal, False)) if value != default)  # fmt: skip
    formula = f"grid({sizes}, window={window}{', ' + text if text else ''})"
    return _Sized(_rule(formula, kept), math.prod(sizes), lambda: math.prod([_axis_pairs(*axis[1:]) for axis in axes]))


def _axis_pairs(length: int, w: int, s: int, d: int, causal: bool) -> int:
    """How many pairs one axis keeps."""
    i = torch.arange(length)
    kept = 0
    for keys in i.split(1024):
        terms = _axis_window(i[:, None], keys[None, :], length, w, s, d, causal)
        kept += int(terms.sum())
    return kept


def _axis_window(i: Any, j: Any, length: int, w: int, s: int, d: int, causal: bool) -> Any:
    place, count = i // d, ((i % d) * -1 + (length + d - 1)) // d  # within the residue class, and the class's length
    last = count - 1
    if causal:
        leader = smaller(place // s * s + (s - 1), last)
        low, high = larger(leader - (w - 1), 0), place + 1
    else:
        leader = smaller(place // s * s + s // 2, last)
        low = smaller(larger(leader - w // 2, 0), count - w)
        high = low + w
    seen = (j // d >= low) & (j // d < high)
    return seen if d == 1 else seen & equal(i % d, j % d)


def _for_each_axis(value: Any, axes: int, name: str) -> tuple[Any, ...]:
    if isinstance(value, bool | int):
        return (value,) * axes
    if len(value) != axes:
        raise OptionError(f"{name} has {len(value)} numbers for {axes} axes")
    return tuple(value)


def disc(shape: Sequence[int], radius: int, text: int = 0) -> Mask:
    """CLEAR: image tokens on a grid [rows, columns] nearer than `radius` (strictly, Euclidean).

    `text` tokens come first; they see all and are seen by all."""
    rows, columns = shape
    if min(rows, columns, radius) < 1 or text < 0:
        raise OptionError(f"disc({(rows, columns)}, {radius}, {text}) has a size below 1")

    def kept(p: Positions) -> Any:
        i, j = p.q - text, p.k - text
        down, across = i // columns - j // columns, i % columns - j % columns
        near = down * down + across * across < radius * radius
        return near if text == 0 else (p.q < text) | (p.k < text) | near

    formula = f"disc({(rows, columns)}, {radius}{f', text={text}' if text else ''})"

    def count() -> int:
        down, across = torch.arange(-rows + 1, rows)[:, None], torch.arange(-columns + 1, columns)
        pairs = (rows - down.abs()) * (columns - across.abs()) * (down * down + across * across < radius * radius)
        return int(pairs.sum()) + 2 * text * rows * columns + text * text

    return _Sized(_rule(formula, kept), rows * columns + text, count)


def _integers(tensor: Tensor, what: str, rank: int) -> Tensor:
    if tensor.dtype.is_floating_point or tensor.dtype == torch.bool or tensor.dim() != rank:
        raise OptionError(
            f"{what} must be integers with {rank} dimension{'s' * (rank > 1)}, not {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor

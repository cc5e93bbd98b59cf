"""Random configurations of each mask rule, each beside its definition: one pair at a time, from the published descriptions.

`case(rule, seed)` is the same for the same seed. Nothing here comes from the package but the masks that are judged."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler import masks
from attncompiler.masks import Mask

Keeps = Callable[[int, int, int, int], bool]  # of batch, head, query, key


@dataclass(frozen=True)
class Sizes:
    """Batches, heads, queries, keys."""

    b: int
    h: int
    m: int
    n: int


@dataclass(frozen=True)
class Rule:
    """A mask, and what it should keep."""

    mask: Mask
    keeps: Keeps


@dataclass(frozen=True)
class Case:
    """A mask at its sizes. `expected`: bool [b, h, m, n]."""

    rule: str
    seed: int
    mask: Mask
    sizes: Sizes
    expected: Tensor

    def __str__(self) -> str:
        return f"{self.rule} {self.seed}: {self.mask} at {self.sizes}"


def case(rule: str, seed: int) -> Case:
    """A configuration of a rule of RULES."""
    r = random.Random(f"{rule} {seed}")
    if rule in OF_ANY_SIZES:
        sizes = _sizes(r)
        drawn = OF_ANY_SIZES[rule](r, sizes)
    else:
        drawn, sizes = OF_THEIR_SIZES[rule](r)
    axes = (range(size) for size in (sizes.b, sizes.h, sizes.m, sizes.n))
    flat = torch.tensor([drawn.keeps(*at) for at in itertools.product(*axes)], dtype=torch.bool)
    return Case(rule, seed, drawn.mask, sizes, flat.reshape(sizes.b, sizes.h, sizes.m, sizes.n))


def _sizes(r: random.Random, most: int = 24) -> Sizes:
    m = r.randint(1, most)
    return Sizes(r.randint(1, 2), r.choice([1, 2, 3, 4]), m, r.choice([m, m, r.randint(1, most)]))


def _ints(r: random.Random, count: int, low: int, high: int) -> list[int]:
    return [r.randint(low, high) for _ in range(count)]


# -------------------------------------------------------------------------------------------------- rules of sequences


def _full(r: random.Random, s: Sizes) -> Rule:
    return Rule(masks.full(), lambda b, h, i, j: True)


def _causal(r: random.Random, s: Sizes) -> Rule:
    offset = r.choice([0, r.randint(-9, 20)])
    return Rule(masks.causal(offset), lambda b, h, i, j: j <= i + offset)


def _window(r: random.Random, s: Sizes) -> Rule:
    left, right = r.randint(0, 12), r.randint(0, 12)
    if r.random() < 0.4:
        return Rule(masks.window(left), lambda b, h, i, j: abs(i - j) <= left)
    return Rule(masks.window(left, right), lambda b, h, i, j: i - left <= j <= i + right)


def _sink(r: random.Random, s: Sizes) -> Rule:
    count = r.randint(0, 30)
    return Rule(masks.sink(count), lambda b, h, i, j: j < count)


def _prefix(r: random.Random, s: Sizes) -> Rule:
    if r.random() < 0.5:
        length = r.randint(0, s.n)
        return Rule(masks.prefix(length), lambda b, h, i, j: j < length)
    lengths = _ints(r, s.b, 0, s.n)
    return Rule(masks.prefix(torch.tensor(lengths)), lambda b, h, i, j: j < lengths[b])


def _padding(r: random.Random, s: Sizes) -> Rule:
    lengths = _ints(r, s.b, 0, s.n)
    dtype = r.choice([torch.int32, torch.int64])
    return Rule(masks.padding(torch.tensor(lengths, dtype=dtype)), lambda b, h, i, j: j < lengths[b])


def _document(r: random.Random, s: Sizes) -> Rule:
    tokens = max(s.m, s.n)
    how = r.choice(["ids", "batch", "lengths", "cu_seqlens", "every"])
    if how == "every":
        every = r.randint(1, tokens)
        return Rule(masks.document(every=every), lambda b, h, i, j: i // every == j // every)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(r.randint(1 if how != "lengths" else 0, 7))
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    if how == "batch":
        each = [ids[:tokens] if r.random() < 0.5 else sorted(_ints(r, tokens, 0, 4)) for _ in range(s.b)]
        return Rule(masks.document(torch.tensor(each)), lambda b, h, i, j: each[b][i] == each[b][j])
    made = {
        "ids": lambda: masks.document(torch.tensor(ids)),
        "lengths": lambda: masks.document(lengths=lengths),
        "cu_seqlens": lambda: masks.document(cu_seqlens=torch.tensor(list(itertools.accumulate(lengths, initial=0)))),
    }
    return Rule(made[how](), lambda b, h, i, j: ids[i] == ids[j])


def _regions(r: random.Random, s: Sizes) -> Rule:
    tokens = max(s.m, s.n)
    if r.random() < 0.5:
        labels = _ints(r, tokens, -2, 3)
        return Rule(masks.regions(torch.tensor(labels)), lambda b, h, i, j: labels[i] == labels[j])
    each = [_ints(r, tokens, 0, 3) for _ in range(s.b)]
    return Rule(masks.regions(torch.tensor(each)), lambda b, h, i, j: each[b][i] == each[b][j])


def _dilated(r: random.Random, s: Sizes) -> Rule:
    reach, dilation = r.randint(0, 6), r.randint(1, 5)
    return Rule(
        masks.dilated(reach, dilation), lambda b, h, i, j: j in range(i - reach * dilation, i + reach * dilation + 1, dilation)
    )


def _blocks(r: random.Random, s: Sizes) -> Rule:
    size, how = r.randint(1, 9), r.choice(["diagonal", "pattern", "by head"])
    if how == "diagonal":
        return Rule(masks.blocks(size), lambda b, h, i, j: i // size == j // size)
    shape = (s.h if how == "by head" else 1, -(-s.m // size), -(-s.n // size))
    marked = {at for at in itertools.product(*map(range, shape)) if r.random() < 0.4}
    pattern = torch.zeros(shape, dtype=torch.bool)
    for at in marked:
        pattern[at] = True
    if how == "pattern":
        return Rule(masks.blocks(size, pattern[0]), lambda b, h, i, j: (0, i // size, j // size) in marked)
    return Rule(masks.blocks(size, pattern), lambda b, h, i, j: (h, i // size, j // size) in marked)


def _strided(r: random.Random, s: Sizes) -> Rule:
    """S2-Attention: local blocks, and stripes at absolute places, one residue for each shard; or relative ones for all heads."""
    block, local, stride, offset = r.randint(1, 5), r.randint(1, 4), r.randint(1, 6), r.randint(0, 3)
    if r.random() < 0.3:

        def relative(b: int, h: int, i: int, j: int) -> bool:
            blocks_away = abs(i // block - j // block)
            return blocks_away < local or (blocks_away - local + 1) % stride == 0

        return Rule(masks.strided(block, local, stride, causal=False), relative)
    shards = r.choice([d for d in (1, 2, 3, 4) if s.h % d == 0])
    dense, step, group = r.randint(0, min(shards, 2)), max(1, stride // s.h), s.h // shards

    def absolute(b: int, h: int, i: int, j: int) -> bool:
        shard, row, column = h // group, i // block, j // block
        stripe = (column + shard * step + offset) % stride == 0
        return j <= i and (shard >= shards - dense or row - column < local or stripe)

    mask = masks.strided(block, local, stride, s.h, kv_heads=shards, dense_heads=dense, offset=offset)
    return Rule(mask, absolute)


def _where(r: random.Random, s: Sizes) -> Rule:
    """Functions as FlexAttention takes them: arithmetic, tables by distance, tables by head, ids."""
    a, c, d = r.randint(-3, 3), r.randint(1, 5), r.randint(1, 7)
    tokens, how = max(s.m, s.n), r.choice(["arithmetic", "distance", "ids", "numbers"])
    if how == "arithmetic":
        mask = masks.where(lambda b, h, q_idx, kv_idx: (a * q_idx + c * kv_idx + h) % d < 2)
        return Rule(mask, lambda b, h, i, j: (a * i + c * j + h) % d < 2)
    if how == "ids":
        ids = _ints(r, tokens, 0, 3)
        held = torch.tensor(ids)
        mask = masks.where(lambda b, h, q_idx, kv_idx: (held[q_idx] == held[kv_idx]) | (kv_idx - q_idx > a))
        return Rule(mask, lambda b, h, i, j: ids[i] == ids[j] or j - i > a)
    table = [_ints(r, 2 * tokens, 0, 4) for _ in range(s.h)]
    numbers = torch.tensor(table)
    if how == "numbers":
        mask = masks.where(lambda b, h, q_idx, kv_idx: numbers[h, q_idx - kv_idx + tokens] <= 2)
        return Rule(mask, lambda b, h, i, j: table[h][i - j + tokens] <= 2)
    kept = numbers > 1
    mask = masks.where(lambda b, h, q_idx, kv_idx: kept[h, q_idx - kv_idx + tokens] & (kv_idx <= q_idx + c))
    return Rule(mask, lambda b, h, i, j: table[h][i - j + tokens] > 1 and j <= i + c)


_WORD = 0xFFFFFFFF


def _mixed(x: int) -> int:
    """MurmurHash3's finaliser of a 32-bit word."""
    x = (x ^ x >> 16) * 0x85EBCA6B & _WORD
    x = (x ^ x >> 13) * 0xC2B2AE35 & _WORD
    return x ^ x >> 16


def _sampled(r: random.Random, s: Sizes) -> Rule:
    """PrFlashAttention: a draw for each pair of blocks, its probability by their distance, the own block always."""
    block, per_head = r.randint(1, 6), r.random() < 0.7
    seed = r.choice([r.randint(0, 9), r.randint(-(2**62), 2**62)])
    chances = [r.choice([0.0, 1.0, r.random()]) for _ in range(r.randint(1, 6))]
    held = torch.tensor([seed]) if r.random() < 0.5 else seed

    def keeps(b: int, h: int, i: int, j: int) -> bool:
        row, column = i // block, j // block
        row_number = row + (h << 20 if per_head else 0)
        state = _mixed((row_number & _WORD) ^ (seed & _WORD))
        state = _mixed(state ^ (row_number >> 32) ^ (seed >> 32 & _WORD))
        drawn = (_mixed(state + column * 0x9E3779B9 & _WORD) >> 8) / 2**24
        chance = torch.tensor(chances[min(abs(row - column), len(chances) - 1)], dtype=torch.float32).item()
        return row == column or drawn < chance

    return Rule(masks.sampled(held, chances, block, per_head=per_head), keeps)


# ------------------------------------------------------------------------------------------------------ rules of grids


def _row_major(at: int, shape: tuple[int, ...]) -> list[int]:
    places = []
    for size in reversed(shape):
        at, place = divmod(at, size)
        places.append(place)
    return places[::-1]


def _shape(r: random.Random, axes: int, most: int = 48) -> tuple[int, ...]:
    while True:
        shape = tuple(_ints(r, axes, 1, {1: 40, 2: 9, 3: 6}[axes]))
        if math.prod(shape) <= most:
            return shape


def _grid(r: random.Random) -> tuple[Rule, Sizes]:
    """NATTEN: on each axis the keys of the own residue class in the window of the stride group's leader."""
    shape = _shape(r, r.randint(1, 3))
    seen: list[dict[int, set[int]]] = []
    each: list[tuple[int, int, int, bool]] = []
    for length in shape:
        d = r.randint(1, min(3, length))
        w = r.randint(1, length // d)
        s, causal = r.randint(1, w), r.random() < 0.3
        each.append((w, s, d, causal))
        of: dict[int, set[int]] = {}
        for i in range(length):
            members = list(range(i % d, length, d))
            place, last = members.index(i), len(members) - 1
            first = place - place % s
            if causal:
                leader = min(first + s - 1, last)
                of[i] = set(members[max(leader - w + 1, 0) : place + 1])
            else:
                leader = min(first + s // 2, last)
                low = min(max(leader - w // 2, 0), len(members) - w)
                of[i] = set(members[low : low + w])
        seen.append(of)

    def keeps(b: int, h: int, i: int, j: int) -> bool:
        return all(k in of[q] for of, q, k in zip(seen, _row_major(i, shape), _row_major(j, shape), strict=True))

    window, stride, dilation, causals = zip(*each, strict=True)
    tokens = math.prod(shape)
    return Rule(masks.grid(shape, window, stride, dilation, causals), keeps), Sizes(1, r.choice([1, 2]), tokens, tokens)


def _halo(r: random.Random) -> tuple[Rule, Sizes]:
    shape, block, around = _shape(r, r.randint(1, 3)), r.randint(1, 5), r.randint(0, 3)

    def keeps(b: int, h: int, i: int, j: int) -> bool:
        return all(
            q // block * block - around <= k < (q // block + 1) * block + around
            for q, k in zip(_row_major(i, shape), _row_major(j, shape), strict=True)
        )

    return Rule(masks.halo(shape, block, around), keeps), Sizes(1, 1, math.prod(shape), math.prod(shape))


def _disc(r: random.Random) -> tuple[Rule, Sizes]:
    """CLEAR: text sees all and is seen by all; image tokens strictly nearer than the radius."""
    shape, radius, text = _shape(r, 2), r.randint(1, 7), r.choice([0, 0, 1, 5])

    def keeps(b: int, h: int, i: int, j: int) -> bool:
        if i < text or j < text:
            return True
        (y, x), (v, u) = _row_major(i - text, shape), _row_major(j - text, shape)
        return (y - v) ** 2 + (x - u) ** 2 < radius**2

    tokens = text + math.prod(shape)
    return Rule(masks.disc(shape, radius, text), keeps), Sizes(1, r.choice([1, 2]), tokens, tokens)


def _radial(r: random.Random) -> tuple[Rule, Sizes]:
    """Token by token between two frames, then the rule of thirds on every block that they meet."""
    frame, block = r.choice([3, 5, 8, 12] * 2 + [130, 140]), r.choice([2, 4, 8, 16])
    frames = r.randint(1, 2 if frame > 100 else 6)
    decay, sink = r.choice([0.2, 0.8, 1.0]), r.random() < 0.5
    tokens = -(-frames * frame // block) * block + r.choice([0, block])
    blocks, video = tokens // block, frames * frame // block
    kept = torch.zeros(blocks, blocks, dtype=torch.bool)
    kept[video:], kept[:, video:] = True, True
    side = -(-frame // block)
    for i, j in itertools.product(range(frames), repeat=2):
        rule = _between_frames(frame, abs(i - j), block, decay, sink and j == 0)
        pair = torch.zeros(tokens + frame, tokens + frame, dtype=torch.bool)
        pair[i * frame : (i + 1) * frame, j * frame : (j + 1) * frame] = rule
        filled = pair[:tokens, :tokens].view(blocks, block, blocks, block).sum(1)  # [row, column, token of the column]
        dense, hit = (filled * 3 > block).sum(-1), (filled > 0).sum(-1)
        rows, columns = (slice(x * frame // block, x * frame // block + side) for x in (i, j))
        kept[rows, columns] |= (dense > 0.6 * hit)[rows, columns]
    marked = {(int(y), int(x)) for y, x in kept.nonzero()}
    mask = masks.radial(frames, frame, tokens, block=block, decay=decay, sink=sink)
    return Rule(mask, lambda b, h, i, j: (i // block, j // block) in marked), Sizes(1, 1, tokens, tokens)


def _between_frames(frame: int, distance: int, block: int, decay: float, seen_by_all: bool) -> Tensor | bool:
    if distance == 0 or seen_by_all:
        return True
    span = 2 ** (frame.bit_length() - distance.bit_length())
    if span < 128 and distance % int(128 / span):
        return False
    r, c = torch.arange(frame)[:, None], torch.arange(frame)
    return (r - c).abs() <= (frame if distance == 1 else max(span * decay, block))


# ------------------------------------------------------------------------------------------------------- rules of rules


def _segments(r: random.Random) -> tuple[Rule, Sizes]:
    """Runs of queries and keys, named or numbered, of no tokens too; rules of any kind in the runs' own positions."""
    shape = _shape(r, 2, 16)
    image = math.prod(shape)
    named = {"text": r.randint(0, 5), "image": image, "more": r.randint(0, 4)}
    order = r.sample(list(named), r.randint(1, 3))
    if all(named[name] == 0 for name in order):
        order = ["image"]
    queries: dict[str | int, int] = {name: named[name] for name in order}
    keys: dict[str | int, int] = dict(queries)
    if r.random() < 0.5:
        keys = {**queries, "extra": r.randint(1, 6)}
        keys = dict(r.sample(list(keys.items()), len(keys)))
    if r.random() < 0.3:
        queries, keys = ({number: count for number, count in enumerate(runs.values())} for runs in (queries, keys))
    b, h = r.randint(1, 2), r.choice([1, 2])
    rules: dict[tuple[str | int, str | int], Mask | bool] = {}
    meant: dict[tuple[str | int, str | int], Keeps] = {}
    otherwise = r.random() < 0.5
    for pair in itertools.product(queries, keys):
        size = Sizes(b, h, queries[pair[0]], keys[pair[1]])
        choice = r.random()
        if choice < 0.4 or 0 in (size.m, size.n):
            meant[pair] = lambda *at: otherwise
        elif choice < 0.6:
            rules[pair] = decided = r.random() < 0.5
            meant[pair] = lambda *at, decided=decided: decided
        elif size.m == size.n == image and r.random() < 0.5:
            drawn = _image(r, shape)
            rules[pair], meant[pair] = drawn.mask, drawn.keeps
        else:
            drawn = OF_ANY_SIZES[r.choice(_SIMPLE)](r, size)
            rules[pair], meant[pair] = drawn.mask, drawn.keeps
    rows = [(name, at) for name, count in queries.items() for at in range(count)]
    columns = [(name, at) for name, count in keys.items() for at in range(count)]

    def keeps(batch: int, head: int, i: int, j: int) -> bool:
        (row, q), (column, k) = rows[i], columns[j]
        return meant[row, column](batch, head, q, k)

    alike = keys == queries and list(keys) == list(queries)
    mask = masks.segments(queries, rules, **({} if alike else {"keys": keys}), otherwise=otherwise)  # type: ignore[arg-type]
    return Rule(mask, keeps), Sizes(b, h, len(rows), len(columns))


def _image(r: random.Random, shape: tuple[int, ...]) -> Rule:
    radius = r.randint(1, 4)

    def keeps(b: int, h: int, i: int, j: int) -> bool:
        (y, x), (v, u) = _row_major(i, shape), _row_major(j, shape)
        return (y - v) ** 2 + (x - u) ** 2 < radius**2

    return Rule(masks.disc(shape, radius), keeps)


def _per_head(r: random.Random, s: Sizes) -> Rule:
    each = [OF_ANY_SIZES[r.choice(_SIMPLE)](r, s) for _ in range(s.h)]
    if r.random() < 0.5:
        each[-1] = each[0]
    return Rule(masks.per_head([rule.mask for rule in each]), lambda b, h, i, j: each[h].keeps(b, h, i, j))


def _algebra(r: random.Random, s: Sizes, depth: int = 2) -> Rule:
    if depth == 0 or r.random() < 0.2:
        return OF_ANY_SIZES[r.choice(_SIMPLE)](r, s)
    one = _algebra(r, s, depth - 1)
    if r.random() < 0.3:
        return Rule(~one.mask, lambda *at: not one.keeps(*at))
    other = _algebra(r, s, depth - 1)
    if r.random() < 0.5:
        return Rule(one.mask & other.mask, lambda *at: one.keeps(*at) and other.keeps(*at))
    return Rule(one.mask | other.mask, lambda *at: one.keeps(*at) or other.keeps(*at))


_SIMPLE = (
    "full", "causal", "window", "sink", "prefix", "padding", "document", "regions", "dilated", "blocks", "where", "sampled",
    "strided",
)  # fmt: skip
OF_ANY_SIZES: Mapping[str, Callable[[random.Random, Sizes], Rule]] = {
    "full": _full, "causal": _causal, "window": _window, "sink": _sink, "prefix": _prefix, "padding": _padding,
    "document": _document, "regions": _regions, "dilated": _dilated, "blocks": _blocks, "strided": _strided, "where": _where,
    "sampled": _sampled, "per_head": _per_head, "algebra": _algebra,
}  # fmt: skip
OF_THEIR_SIZES: Mapping[str, Callable[[random.Random], tuple[Rule, Sizes]]] = {
    "grid": _grid,
    "halo": _halo,
    "disc": _disc,
    "radial": _radial,
    "segments": _segments,
}
RULES = (*OF_ANY_SIZES, *OF_THEIR_SIZES)

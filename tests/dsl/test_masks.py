"""Every mask against its definition, pair by pair."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.errors import InvalidProgram, OptionError
from attncompiler.masks import Mask


def positions(m: int, n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(m)[:, None], torch.arange(n)[None, :]


def same(mask: Mask, expected: Tensor, b: int = 1, h: int = 1) -> bool:
    m, n = expected.shape[-2:]
    return torch.equal(mask.dense(b, h, m, n).expand(b, h, m, n), expected.expand(b, h, m, n))


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal() & (masks.window(3) | masks.sink(2)), ~masks.document(torch.arange(24) // 7), masks.grid((4, 6), (3, 3), (1, 2)),
        masks.disc((4, 5), 2, 4), masks.radial(3, 6, 24, block=4), masks.sampled(3, [1.0, 0.5, 0.2], 3), masks.causal().after(3),
        masks.per_head([masks.causal(), masks.window(1)]), masks.padding(torch.tensor([3, 9])).to("cpu"),
    ],
    ids=str,
)  # fmt: skip
def test_masks_are_pickled(mask: Mask) -> None:
    again = pickle.loads(pickle.dumps(mask))
    assert str(again) == str(mask) and again.same_as(mask, 2, 2, 24, 24)
    assert pickle.loads(pickle.dumps(again)).same_as(copy.deepcopy(mask), 2, 2, 24, 24)


def test_a_pickled_mask_is_the_mask_whatever_its_arguments_have_become() -> None:
    ends, shape, rules = torch.tensor([0, 20, 64]), [8, 8], {(1, 1): masks.causal()}
    made = [masks.document(cu_seqlens=ends), masks.grid(shape, 3), masks.segments([24, 40], rules)]
    ends[1], shape[0] = 40, 4
    rules.clear()
    for mask in made:
        for again in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
            assert again.same_as(mask, 1, 1, 64, 64)


def test_a_pickled_mask_reads_what_a_module_shares_with_it() -> None:
    seed = torch.tensor([3])
    again, other = copy.deepcopy((masks.sampled(seed, [1.0, 0.5], 3), seed))
    other.fill_(4)
    assert again.same_as(masks.sampled(4, [1.0, 0.5], 3), 1, 1, 24, 24)


@pytest.mark.parametrize("seed", range(20))
def test_sequences(seed: int) -> None:
    r = random.Random(seed)
    m, n = r.randint(1, 30), r.randint(1, 30)
    q, k = positions(m, n)
    a, c, d = r.randint(0, 9), r.randint(0, 9), r.randint(1, 4)
    lengths = torch.tensor([r.randint(0, n) for _ in range(3)])
    assert same(masks.full(), torch.ones(m, n, dtype=torch.bool))
    assert same(masks.causal(a), k <= q + a)
    assert same(masks.window(a), (q - k).abs() <= a)
    assert same(masks.window(a, c), (q - k <= a) & (k - q <= c))
    assert same(masks.sink(a), (k < a).expand(m, n))
    assert same(masks.prefix(a) | masks.causal(), (k < a) | (k <= q))
    assert same(masks.prefix(lengths), (k < lengths[:, None, None, None]).expand(3, 1, m, n), b=3)
    assert same(masks.padding(lengths) & ~masks.causal(), (k < lengths[:, None, None, None]) & (k > q), b=3)
    assert same(masks.dilated(a, d), ((q - k).abs() <= a * d) & ((q - k) % d == 0))
    assert same(masks.blocks(d), q // d == k // d)


@pytest.mark.parametrize("seed", range(20))
def test_documents(seed: int) -> None:
    r = random.Random(seed)
    lengths = [r.randint(1, 6) for _ in range(r.randint(1, 6))]
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    expected = ids[:, None] == ids[None, :]
    assert same(masks.document(ids), expected)
    assert same(masks.document(lengths=lengths), expected)
    assert same(masks.document(cu_seqlens=ends), expected)
    two = torch.stack([ids, ids.flip(0)])
    assert same(masks.document(two), (two[:, :, None] == two[:, None, :])[:, None], b=2)
    every = r.randint(1, 5)
    q, k = positions(len(ids), len(ids))
    assert same(masks.document(every=every), q // every == k // every)


def axis_mask(length: int, w: int, s: int, d: int, causal: bool) -> Tensor:
    """NATTEN's rule for one axis, from its definition."""
    found = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        members = list(range(i % d, length, d))
        place, last = members.index(i), len(members) - 1
        first = place // s * s
        if causal:
            leader = min(first + s - 1, last)
            seen = members[max(leader - w + 1, 0) : place + 1]
        else:
            leader = min(first + s // 2, last)
            low = min(max(leader - w // 2, 0), len(members) - w)
            seen = members[low : low + w]
        found[i, seen] = True
    return found


@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_grids(first: int) -> None:
    for seed in range(first, first + 100):
        r = random.Random(seed)
        shape, window, stride, dilation, causal = [], [], [], [], []
        expected = torch.ones(1, 1, dtype=torch.bool)
        for _ in range(r.randint(1, 3)):
            length, d = r.randint(1, 9), r.randint(1, 3)
            d = min(d, length)
            w = r.randint(1, length // d)
            s, c = r.randint(1, w), r.random() < 0.3
            for values, value in zip((shape, window, stride, dilation, causal), (length, w, s, d, c), strict=True):
                values.append(value)
            one = axis_mask(length, w, s, d, c)
            expected = (expected[:, None, :, None] & one[None, :, None, :]).reshape(len(expected) * length, -1)
        assert same(masks.grid(shape, window, stride, dilation, causal), expected), (shape, window, stride, dilation, causal)


@pytest.mark.parametrize("seed", range(50))
def test_discs(seed: int) -> None:
    r = random.Random(seed)
    rows, columns, radius, text = r.randint(1, 9), r.randint(1, 9), r.randint(1, 6), r.choice([0, 0, 3])
    n = torch.arange(rows * columns)
    y, x = n // columns, n % columns
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    expected = torch.ones(text + rows * columns, text + rows * columns, dtype=torch.bool)
    expected[text:, text:] = near
    assert same(masks.disc((rows, columns), radius, text), expected)


@pytest.mark.parametrize("seed", range(50))
def test_halos(seed: int) -> None:
    """Each block of queries with the keys that its window covers, one block after the other."""
    r = random.Random(seed)
    rows, columns, block, around = r.randint(1, 9), r.randint(1, 9), r.randint(1, 5), r.randint(0, 3)
    expected = torch.zeros(rows, columns, rows, columns, dtype=torch.bool)
    for y in range(0, rows, block):
        for x in range(0, columns, block):
            window = slice(max(y - around, 0), y + block + around), slice(max(x - around, 0), x + block + around)
            expected[y : y + block, x : x + block, window[0], window[1]] = True
    mask = masks.halo((rows, columns), block, around)
    assert same(mask, expected.reshape(rows * columns, -1))
    assert mask.kept_pairs(2, 3, rows * columns, rows * columns) == 6 * int(expected.sum())


@pytest.mark.parametrize("seed", range(30))
def test_regions(seed: int) -> None:
    labels = torch.randint(0, 4, (2, 17), generator=torch.Generator().manual_seed(seed))
    assert same(masks.regions(labels), (labels[:, :, None] == labels[:, None, :])[:, None], b=2)
    assert same(masks.regions(labels[0]), labels[0][:, None] == labels[0])


def band(frame: int, distance: int, block: int, decay: float, seen_by_all: bool) -> Tensor | None:
    """The token rule of Radial attention between two frames."""
    r, c = torch.arange(frame)[:, None], torch.arange(frame)
    if distance == 0 or seen_by_all:
        return torch.ones(frame, frame, dtype=torch.bool)
    span = 2 ** (frame.bit_length() - distance.bit_length())
    if span < 128 and distance % (128 // span):
        return None
    return (r - c).abs() <= (frame if distance == 1 else max(span * decay, block))


@pytest.mark.parametrize("seed", range(40))
def test_radial(seed: int) -> None:
    """Token by token, then the rule of thirds on every block."""
    r = random.Random(seed)
    frames, frame, block = r.randint(1, 6), r.choice([5, 8, 130, 140]), r.choice([4, 8, 16])
    decay, sink = r.choice([0.2, 0.8, 1.0]), r.random() < 0.5
    tokens = -(-frames * frame // block) * block + r.choice([0, block])
    blocks = tokens // block
    expected = torch.zeros(blocks, blocks, dtype=torch.bool)
    expected[frames * frame // block :] = True
    expected[:, frames * frame // block :] = True
    for i in range(frames):
        for j in range(frames):
            rule = band(frame, abs(i - j), block, decay, sink and j == 0)
            if rule is None:
                continue
            pair = torch.zeros(tokens + frame, tokens + frame, dtype=torch.bool)
            pair[i * frame : (i + 1) * frame, j * frame : (j + 1) * frame] = rule
            side, top, left = -(-frame // block), i * frame // block, j * frame // block
            for y in range(top, min(top + side, blocks)):
                for x in range(left, min(left + side, blocks)):
                    filled = pair[y * block : (y + 1) * block, x * block : (x + 1) * block].sum(0)
                    expected[y, x] |= bool((filled * 3 > block).sum() > 0.6 * (filled > 0).sum())
    mask = masks.radial(frames, frame, tokens, block=block, decay=decay, sink=sink)
    assert same(mask, expected.repeat_interleave(block, 0).repeat_interleave(block, 1))


@pytest.mark.parametrize("seed", range(100))
def test_strided(seed: int) -> None:
    r = random.Random(seed)
    block, local, stride, tokens = r.randint(1, 4), r.randint(1, 4), r.randint(1, 6), r.randint(1, 40)
    shards = r.randint(1, 3)
    heads, dense, offset = shards * r.randint(1, 2), r.randint(0, 1), r.randint(0, 3)
    q, k = positions(tokens, tokens)
    rows, columns = q // block, k // block
    one_a_shard = []
    for shard in range(shards):
        stripes = (columns + shard * max(1, stride // heads) + offset) % stride == 0
        kept = (stripes | (rows - columns < local)) & (k <= q)
        one_a_shard += [k <= q if shard >= shards - dense else kept] * (heads // shards)
    mask = masks.strided(block, local, stride, heads, kv_heads=shards, dense_heads=dense, offset=offset)
    assert same(mask, torch.stack(one_a_shard)[None], h=heads)
    away = (rows - columns - local + 1).clamp(min=0) + (columns - rows - local + 1).clamp(min=0)
    assert same(masks.strided(block, local, stride, causal=False), away % stride == 0)


LATER = {
    "causal": masks.causal(), "window": masks.causal() & masks.window(5), "sink": masks.sink(3) | masks.window(2, 0),
    "documents": masks.document(torch.arange(24) // 7) & masks.causal(), "lengths": masks.padding(torch.tensor([9, 24])),
    "stripes": masks.strided(4, 2, 3, 4, kv_heads=2), "grid": masks.grid((4, 6), (3, 3)), "outside": ~masks.window(3),
    "a function": masks.where(lambda b, h, q_idx, kv_idx: (q_idx * 3 + h) % 5 >= kv_idx % 5),
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_queries_that_come_after_others(name: str) -> None:
    """One query and a cache, a chunk, all: rows of the mask of all tokens."""
    mask, b = LATER[name], 2 if name == "lengths" else 1
    whole = mask.dense(b, 4, 24, 24).expand(b, 4, 24, 24)
    for before in (0, 5, 23):
        later = mask.after(before)
        assert same(later, whole[..., before:, :], b=b, h=4)
        q, k, v = torch.randn(b, 4, 24 - before, 8), torch.randn(b, 4, 24, 8), torch.randn(b, 4, 24, 8)
        found = attncompiler.attention(q, k, v, keep=later)
        weights = (q @ k.mT * 8**-0.5).masked_fill(~whole[..., before:, :], -torch.inf).softmax(-1).nan_to_num()
        torch.testing.assert_close(found, weights @ v)
    assert str(mask.after(5)).endswith(".after(5)")
    for wrong in (-1, 2.5):
        with pytest.raises(OptionError, match="give the number of tokens before the first query"):
            mask.after(wrong)  # type: ignore[arg-type]


def test_one_mask_a_head() -> None:
    q, k = positions(9, 9)
    mask = masks.per_head([masks.causal(), masks.window(2), masks.causal()])
    assert same(mask, torch.stack([k <= q, (q - k).abs() <= 2, k <= q])[None], h=3)
    assert same(masks.per_head([masks.causal()] * 2), k <= q, h=2)
    with pytest.raises(OptionError, match="3 masks for 2 heads"):
        mask.dense(1, 2, 9, 9)


def test_functions_of_positions() -> None:
    """FlexAttention's mask_mods as they are, with captured tensors."""
    doc, table = torch.tensor([0, 0, 1, 1, 1]), torch.rand(2, 9) > 0.4
    q, k = positions(5, 5)
    expected = (doc[q] == doc[k]) & (q >= k)
    assert same(masks.where(lambda b, h, q_idx, kv_idx: (doc[q_idx] == doc[kv_idx]) & (q_idx >= kv_idx)), expected)
    assert same(masks.causal() & (lambda b, h, q_idx, kv_idx: doc[q_idx] == doc[kv_idx]), expected)  # type: ignore[operator]
    relative = masks.where(lambda b, h, q_idx, kv_idx: table[h, q_idx - kv_idx + 4])
    assert same(relative, torch.stack([table[0][q - k + 4], table[1][q - k + 4]])[None], h=2)


@pytest.mark.parametrize(
    "mask",
    [
        masks.full(), masks.causal(), masks.causal() & masks.window(9), masks.sink(3) | masks.window(20), masks.document(every=50),
        masks.causal() & ~masks.document(every=50), masks.dilated(3, 7), masks.strided(16, 2, 3, 4), masks.disc((10, 29), 6, 10),
        masks.grid((5, 5, 12), (3, 5, 4), (1, 5, 2), (1, 1, 3), (False, True, False)), masks.blocks(37) | masks.sink(1),
        masks.per_head([masks.causal(), masks.window(5), masks.sink(2), masks.document(every=9)]),
    ],
    ids=str,
)  # fmt: skip
def test_kept_pairs_are_counted(mask: Mask) -> None:
    assert mask.kept_pairs(2, 4, 300, 300) == int(mask.dense(2, 4, 300, 300).expand(2, 4, -1, -1).sum())


def test_segments_are_counted_without_looking_at_pairs() -> None:
    """CLEAR at 8192 pixels, with a number of tokens whose pairs nobody looks at."""
    disc = masks.disc((512, 512), 16)
    image, text = 512 * 512, 512
    mask = masks.disc((512, 512), 16, text)
    assert mask.kept_pairs(2, 3, text + image, text + image) == disc.kept_pairs(2, 3, image, image) + 6 * (
        2 * text * image + text**2
    )


def test_draws_follow_their_probability() -> None:
    tokens, chances = 4096, torch.tensor([1.0, 0.5, 0.25, 0.1])
    kept = masks.sampled(11, chances, 4).dense(1, 4, tokens, tokens)[0, :, ::4, ::4].double()
    distance = (torch.arange(tokens // 4)[:, None] - torch.arange(tokens // 4)).abs()
    for away, chance in enumerate(chances):
        cells = kept[:, distance == away] if away < 3 else kept[:, distance >= 3]
        assert abs(cells.mean() - chance) <= 4 * (chance * (1 - chance) / cells.numel()) ** 0.5
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[0].mT)
    alike = masks.sampled(11, chances, 4, per_head=False).dense(1, 4, 64, 64)
    assert alike.shape[1] == 1 or torch.equal(alike[:, 0], alike[:, 1])


def test_large_patterns_of_blocks_are_planned_from_the_pattern() -> None:
    """Radial attention over HunyuanVideo: 115200 tokens, of which no matrix could be made. Densities are the published ones."""
    mask = masks.radial(30, 3840, decay=0.95, sink=False)
    assert abs(mask.plan(1, 1, 115200, 115200).density - 0.275) < 5e-4


def test_two_tensors_of_one_name_stay_two() -> None:
    first, second = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 0])
    both = masks.document(first) & masks.document(second)
    assert same(both, (first[:, None] == first) & (second[:, None] == second))


def test_a_mask_prints_as_a_formula() -> None:
    assert str(masks.causal() & (masks.window(128) | masks.sink(4))) == "causal() & (window(128, 128) | sink(4))"
    assert str(~masks.grid((4, 4), 3, stride=2)) == "~grid((4, 4), window=3, stride=2)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.window(-1), "negative side"),
        (lambda: masks.grid((4, 4), 5), "axis 0 of 4 tokens can't have window 5"),
        (lambda: masks.grid((4, 4), (2, 2, 2)), "3 numbers for 2 axes"),
        (lambda: masks.grid((4, 4), 3).dense(1, 1, 15, 16), "is for 16 tokens, not 15 queries"),
        (lambda: masks.document(), "one of ids"),
        (lambda: masks.document(torch.ones(3)), "must be integers"),
        (lambda: masks.causal() & 3, "is no mask"),
        (lambda: masks.where(lambda b, h, q, k: bool(q)).dense(1, 1, 3, 3), "can't be traced"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make: object, message: str) -> None:
    with pytest.raises((OptionError, InvalidProgram), match=message):
        make()  # type: ignore[operator]


def test_masks_are_compared_by_what_they_keep() -> None:
    causal = masks.causal()
    assert (causal & masks.window(5)).same_as(masks.window(5, 0), 1, 2, 40, 40)
    assert (causal | ~causal).same_as(masks.full(), 1, 2, 40, 40)
    assert not causal.same_as(masks.causal(1), 1, 2, 40, 40)
    assert causal.same_as(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, 1, 1, 1 << 20, 1 << 20)  # type: ignore[arg-type]
    assert masks.dilated(3, 2).same_as(masks.blocks(7), 1, 1, 1 << 20, 1 << 20) is None
    assert masks.document(torch.tensor([3, 3, 1])).same_as(masks.document(torch.tensor([0, 0, 1])), 1, 1, 3, 3)

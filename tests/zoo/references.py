"""The published systems once more, from their papers' mathematics: row by row, window by window, without a mask.

For each system of the zoo a random small configuration with what it must give. Nothing here is shared with the package but the form
of an example."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attncompiler.zoo import Example

Reference = Callable[..., Tensor]
Case = tuple[Example, Reference]
Seen = Callable[[int, int, int], Sequence[int]]


def rows(
    q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float | None = None, bias: Callable[..., Tensor] | None = None
) -> Tensor:
    """softmax over the keys `seen(b, h, i)` of each query; `bias(b, h, i, keys)` is added to its scores."""
    group = q.shape[1] // k.shape[1]
    out = []
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        keys = list(seen(b, h, i))
        scores = k[b, h // group, keys] @ q[b, h, i] * (q.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias(b, h, i, keys)
        out.append(scores.softmax(-1) @ v[b, h // group, keys])
    return torch.stack(out).reshape(*q.shape[:3], v.shape[-1])


def qkv(r: random.Random, n: int, heads: int = 2, kv_heads: int | None = None, batch: int = 1) -> list[tuple[int, ...]]:
    d = r.choice([4, 8])
    return [(batch, heads, n, d)] + [(batch, kv_heads or heads, n, d)] * 2


# ---------------------------------------------------------------------------------------------------------------- grids


def axis_neighbours(length: int, window: int, stride: int, dilation: int, causal: bool) -> list[list[int]]:
    """The keys of one axis that each of its queries sees, from members of its residue class."""
    found = []
    for i in range(length):
        members = list(range(i % dilation, length, dilation))
        place, last = members.index(i), len(members) - 1
        group = place // stride * stride
        if causal:
            leader = min(group + stride - 1, last)
            found.append(members[max(leader - window + 1, 0) : place + 1])
        else:
            leader = min(group + stride // 2, last)
            low = min(max(leader - window // 2, 0), len(members) - window)
            found.append(members[low : low + window])
    return found


def grid_keys(shape: Sequence[int], axes: Sequence[list[list[int]]], i: int) -> list[int]:
    """Flat keys of the flat query i of a row-major grid, from those of each axis."""
    places = []
    for length in reversed(shape):
        places.append(i % length)
        i //= length
    keys = [0]
    for length, neighbours, place in zip(shape, axes, reversed(places), strict=True):
        keys = [key * length + j for key in keys for j in neighbours[place]]
    return keys


def gna(axes: int) -> Callable[[random.Random], Case]:
    def case(r: random.Random) -> Case:
        numbers: dict[str, list[int]] = {name: [] for name in ("shape", "window", "stride", "dilation", "causal")}
        for _ in range(axes):
            length = r.randint(4, {1: 40, 2: 8, 3: 5}[axes])
            dilation = r.randint(1, 2)
            window = r.randint(2, length // dilation)
            for name, value in zip(numbers, (length, window, r.randint(1, window), dilation, r.random() < 0.4), strict=True):
                numbers[name].append(value)
        near = [axis_neighbours(*axis) for axis in zip(*numbers.values(), strict=True)]  # type: ignore[arg-type]
        shape = numbers["shape"]

        def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return rows(q, k, v, lambda b, h, i: grid_keys(shape, near, i))

        return Example(qkv(r, math.prod(shape)), {name: tuple(value) for name, value in numbers.items()}), reference

    return case


def fna(r: random.Random) -> Case:
    dilation, window = r.randint(1, 2), r.randint(2, 3)
    shape = [r.randint(window * dilation, 8) for _ in range(2)]
    near = [axis_neighbours(length, window, 1, dilation, False) for length in shape]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rows(q, k, v, lambda b, h, i: grid_keys(shape, near, i))

    return Example(
        qkv(r, math.prod(shape)), {"rows": shape[0], "columns": shape[1], "window": window, "dilation": dilation}
    ), reference


def fna_bias(r: random.Random) -> Case:
    window = r.randint(2, 4)
    shape = [r.randint(window, 7) for _ in range(2)]
    near = [axis_neighbours(length, window, 1, 1, False) for length in shape]

    def reference(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        def bias(b: int, h: int, i: int, keys: list[int]) -> Tensor:
            down = [j // shape[1] - i // shape[1] + window - 1 for j in keys]
            across = [j % shape[1] - i % shape[1] + window - 1 for j in keys]
            return table[h, down, across]

        return rows(q, k, v, lambda b, h, i: grid_keys(shape, near, i), bias=bias)

    inputs = [*qkv(r, math.prod(shape)), (2, 2 * window - 1, 2 * window - 1)]
    return Example(inputs, {"rows": shape[0], "columns": shape[1], "window": window}), reference


def clear(with_text: bool) -> Callable[[random.Random], Case]:
    def case(r: random.Random) -> Case:
        height, width, radius, text = r.randint(2, 7), r.randint(2, 7), r.randint(1, 4), r.randint(1, 5) * with_text

        def seen(b: int, h: int, i: int) -> list[int]:
            n = text + height * width
            if i < text:
                return list(range(n))
            y, x = divmod(i - text, width)
            image = itertools.product(range(height), range(width))
            return list(range(text)) + [text + a * width + c for a, c in image if math.dist((y, x), (a, c)) < radius]

        numbers = {"rows": height, "columns": width, "radius": radius, "text": text}
        return Example(qkv(r, text + height * width), numbers), lambda q, k, v: rows(q, k, v, seen)

    return case


def radial(r: random.Random) -> Case:
    """Token by token: the band of each pair of frames, then each cell of a pair by the share of its columns that are full."""
    block, frames, decay = r.choice([4, 8]), r.randint(2, 6), r.choice([0.2, 0.5, 1.0])
    frame = block * r.randint(1, 5)
    n = frames * frame
    kept = [[False] * (n // block) for _ in range(n // block)]
    for i, j in itertools.product(range(frames), repeat=2):
        t = abs(i - j)
        span = 2 ** (len(f"{frame:b}") - len(f"{t:b}")) if t else 0
        if t and j and span < 128 and t % (128 // span):
            continue
        width = frame if t <= 1 or j == 0 else max(span * decay, block)
        for top, left in itertools.product(range(0, frame, block), repeat=2):
            columns = [sum(abs(a - c) <= width for a in range(top, top + block)) for c in range(left, left + block)]
            full, hit = sum(3 * count > block for count in columns), sum(count > 0 for count in columns)
            if full > 0.6 * hit:
                kept[(i * frame + top) // block][(j * frame + left) // block] = True

    def seen(b: int, h: int, i: int) -> list[int]:
        return [j for j in range(n) if kept[i // block][j // block]]

    numbers = {"frames": frames, "frame": frame, "block": block, "decay": decay}
    return Example(qkv(r, n, heads=1), numbers), lambda q, k, v: rows(q, k, v, seen)


# -------------------------------------------------------------------------------------------------------------- windows


def halonet(r: random.Random) -> Case:
    """Block by block: its window, zeros outside of the image taking part."""
    block, halo = r.randint(1, 3), r.randint(0, 2)
    size = block + 2 * halo
    height, width, d = block * r.randint(1, 3), block * r.randint(1, 3), 4

    def reference(q: Tensor, k: Tensor, v: Tensor, down: Tensor, across: Tensor) -> Tensor:
        out = torch.zeros_like(v)
        for b, h, top, left in itertools.product(*map(range, q.shape[:2]), range(0, height, block), range(0, width, block)):
            window = list(itertools.product(range(top - halo, top + block + halo), range(left - halo, left + block + halo)))
            inside = [0 <= y < height and 0 <= x < width for y, x in window]
            zero = q.new_zeros(d)
            keys, values = (
                torch.stack([t[b, h, y, x] if within else zero for (y, x), within in zip(window, inside, strict=True)])
                for t in (k, v)
            )
            for p, c in itertools.product(range(block), repeat=2):
                query = q[b, h, top + p, left + c]
                relative = [down[m // size - p + size - 1] + across[m % size - c + size - 1] for m in range(size * size)]
                weights = (keys @ query * d**-0.5 + torch.stack(relative) @ query).softmax(0)
                out = out.index_put([torch.tensor(i) for i in (b, h, top + p, left + c)], weights @ values)
        return out

    table = (2 * size - 1, d)
    return Example([(1, 2, height, width, d)] * 3 + [table] * 2, {"block": block, "halo": halo}), reference


def halonet_masked(r: random.Random) -> Case:
    height, width, block, halo = r.randint(2, 8), r.randint(2, 8), r.randint(1, 4), r.randint(0, 2)

    def seen(b: int, h: int, i: int) -> list[int]:
        y, x = divmod(i, width)
        top, left = y - y % block, x - x % block
        down, across = (
            range(max(top - halo, 0), min(top + block + halo, height)),
            range(max(left - halo, 0), min(left + block + halo, width)),
        )
        return [a * width + c for a, c in itertools.product(down, across)]

    numbers = {"rows": height, "columns": width, "block": block, "halo": halo}
    return Example(qkv(r, height * width), numbers), lambda q, k, v: rows(q, k, v, seen)


def davit_window(r: random.Random) -> Case:
    """Window by window, zeros below and to the right taking part."""
    height, width, window, heads, d = r.randint(2, 7), r.randint(2, 7), r.randint(2, 4), 2, 4

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        image = x.reshape(len(x), height, width, -1)
        down, across = -(-height // window) * window, -(-width // window) * window
        padded = torch.cat([image, image.new_zeros(len(x), height, across - width, heads * d)], 2)
        padded = torch.cat([padded, image.new_zeros(len(x), down - height, across, heads * d)], 1)
        strips = []
        for top in range(0, down, window):
            cells = []
            for left in range(0, across, window):
                tokens = padded[:, top : top + window, left : left + window].flatten(1, 2)
                q, k, v = (t.unflatten(-1, (heads, d)).transpose(1, 2) for t in (tokens @ weight.T).chunk(3, -1))
                o = rows(q, k, v, lambda b, h, i: range(window * window))
                cells.append(o.transpose(1, 2).reshape(len(x), window, window, -1))
            strips.append(torch.cat(cells, 2))
        return torch.cat(strips, 1)[:, :height, :width].reshape(x.shape)

    inputs = [(1, height * width, heads * d), (3 * heads * d, heads * d)]
    return Example(inputs, {"rows": height, "columns": width, "window": window, "heads": heads}), reference


def davit_channel(r: random.Random) -> Case:
    """Channel c of the output is a mean of the queries' channels, weighed by softmax of key channel c with every value channel."""
    groups, d, n = r.randint(1, 3), r.randint(2, 5), r.randint(1, 20)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight.T).chunk(3, -1)
        out = []
        for c in range(groups * d):
            own = range(c // d * d, c // d * d + d)
            scores = torch.stack([(k[..., c] * v[..., other]).sum(1) * d**-0.5 for other in own], -1)  # [B, d]
            out.append((q[..., list(own)] * scores.softmax(-1)[:, None]).sum(-1))
        return torch.stack(out, -1)

    return Example([(2, n, groups * d), (3 * groups * d, groups * d)], {"groups": groups}), reference


# ------------------------------------------------------------------------------------------------------------ sequences


def rat(r: random.Random) -> Case:
    n, batch = r.randint(1, 30), 2
    labels = torch.tensor([[r.randint(0, 4) for _ in range(n)] for _ in range(batch)])

    def reference(q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        return rows(q, k, v, lambda b, h, i: [j for j in range(n) if labels[b, j] == labels[b, i]], q.shape[1] ** -0.5)

    return Example([*qkv(r, n, batch=batch), labels]), reference


def s2(r: random.Random) -> Case:
    block, local, stride, n = r.randint(1, 5), r.randint(1, 3), r.randint(1, 5), r.randint(1, 40)
    kv_heads = r.choice([1, 2])
    heads = kv_heads * r.choice([1, 2])

    def seen(b: int, h: int, i: int) -> list[int]:
        shard = h // (heads // kv_heads)
        kept = []
        for j in range(i + 1):
            striped = (j // block + shard * max(1, stride // heads)) % stride == 0
            if striped or i // block - j // block < local:
                kept.append(j)
        return kept

    numbers = {"heads": heads, "kv_heads": kv_heads, "block": block, "local": local, "stride": stride}
    return Example(qkv(r, n, heads, kv_heads), numbers), lambda q, k, v: rows(q, k, v, seen)


def sliding_window(r: random.Random) -> Case:
    n, window = r.randint(1, 50), r.randint(1, 20)
    return Example(qkv(r, n), {"window": window}), lambda q, k, v: rows(
        q, k, v, lambda b, h, i: range(max(0, i - window + 1), i + 1)
    )


def attention_sinks(r: random.Random) -> Case:
    n, window, sinks = r.randint(1, 50), r.randint(1, 10), r.randint(0, 5)

    def seen(b: int, h: int, i: int) -> list[int]:
        return sorted({*range(min(sinks, i + 1)), *range(max(0, i - window + 1), i + 1)})

    return Example(qkv(r, n), {"window": window, "sinks": sinks}), lambda q, k, v: rows(q, k, v, seen)


def prefix_lm(r: random.Random) -> Case:
    n = r.randint(1, 40)
    lengths = [r.randint(0, n) for _ in range(3)]

    def reference(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return rows(q, k, v, lambda b, h, i: range(max(i + 1, lengths[b])))

    return Example([*qkv(r, n, batch=3), torch.tensor(lengths)]), reference


def packed_documents(r: random.Random) -> Case:
    n, batch = r.randint(1, 40), 2
    ends = [[r.random() < 0.2 for _ in range(n)] for _ in range(batch)]
    documents = torch.tensor(ends).cumsum(1)

    def reference(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        def seen(b: int, h: int, i: int) -> range:
            first = i
            while first > 0 and not ends[b][first]:
                first -= 1
            return range(first, i + 1)

        return rows(q, k, v, seen)

    return Example([*qkv(r, n, batch=batch), documents]), reference


def prflash(r: random.Random) -> Case:
    n, block, heads = r.randint(1, 40), r.randint(1, 9), 2
    count = -(-n // block)
    kept = [[[i == j or r.random() < 1 / (1 + abs(i - j)) for j in range(count)] for i in range(count)] for _ in range(heads)]

    def reference(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return rows(q, k, v, lambda b, h, i: [j for j in range(i + 1) if kept[h][i // block][j // block]])

    return Example([*qkv(r, n, heads), torch.tensor(kept)], {"block": block}), reference


def head_gates(p: Tensor, k: int, total: float) -> Tensor:
    """The k largest of p [.., R], scaled to sum to `total`, one token after the other; 0 elsewhere."""
    flat = p.reshape(-1, p.shape[-1])
    out = []
    for token in flat:
        chosen = sorted(range(len(token)), key=lambda r: -token[r].item())[:k]
        sum_of_chosen = sum(token[r] for r in chosen)
        out.append(torch.stack([total * token[r] / sum_of_chosen if r in chosen else 0.0 * token[r] for r in range(len(token))]))
    return torch.stack(out).reshape(p.shape)


def moh(with_shared: bool) -> Callable[[random.Random], Case]:
    def case(r: random.Random) -> Case:
        n, routed, shared, c = r.randint(1, 30), r.randint(2, 5), r.randint(1, 3) * with_shared, 8
        chosen = r.randint(1, routed)

        def reference(q: Tensor, k: Tensor, v: Tensor, x: Tensor, w_routed: Tensor, *others: Tensor) -> Tensor:
            o = rows(q, k, v, lambda b, h, i: range(n))
            gates = head_gates((x @ w_routed.mT).softmax(-1), chosen, chosen)
            if with_shared:
                shares, mix = ((x @ w.mT).softmax(-1) for w in others)
                gates = torch.cat([2 * mix[..., :1] * shared * shares, 2 * mix[..., 1:] * gates], -1)
            heads = [gates[:, :, h, None] * o[:, h] for h in range(q.shape[1])]
            return torch.cat(heads, -1)

        weights = [(routed, c), *[(shared, c), (2, c)] * with_shared]
        return Example([*qkv(r, n, shared + routed, batch=2), (2, n, c), *weights], {"chosen": chosen}), reference

    return case


def moh_llama(r: random.Random) -> Case:
    n, group, shared, routed, d = r.randint(1, 30), 2, 4, r.choice([4, 6]), 8
    heads, chosen = shared + routed, r.randint(1, routed)

    def turned(x: Tensor) -> Tensor:
        """Channels c and c + d / 2 are a complex number."""
        number = torch.complex(*x.chunk(2, -1))
        turns = [[i * 500000.0 ** -(2 * c / d) for c in range(d // 2)] for i in range(n)]
        number = number * torch.polar(torch.ones(n, 1, d // 2, dtype=x.dtype), torch.tensor(turns, dtype=x.dtype)[:, None])
        return torch.cat([number.real, number.imag], -1)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths = q[:, :, shared:].square().sum(-1).sqrt().detach()
        deviation = ((lengths - lengths.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / (routed - 1)).sqrt()
        on = head_gates((lengths / deviation).softmax(-1), chosen, 1.0) > 0
        given = (t.transpose(1, 2) for t in (turned(q), turned(k), v))
        o = rows(*given, lambda b, h, i: range(i + 1))
        parts = [o[:, h] if h < shared else torch.where(on[:, :, h - shared, None], o[:, h], 0.0) for h in range(heads)]
        return torch.cat(parts, -1)

    return Example([(1, n, heads, d), *[(1, n, heads // group, d)] * 2], {"shared": shared, "chosen": chosen}), reference


CASES: dict[str, Callable[[random.Random], Case]] = {
    "gna-1d": gna(1), "gna-2d": gna(2), "gna-3d": gna(3), "fna": fna, "fna-bias": fna_bias, "clear": clear(True),
    "clear-image": clear(False), "radial": radial, "halonet": halonet, "halonet-masked": halonet_masked,
    "davit-window": davit_window, "davit-channel": davit_channel, "rat": rat, "s2": s2, "sliding-window": sliding_window,
    "attention-sinks": attention_sinks, "prefix-lm": prefix_lm, "packed-documents": packed_documents, "prflash": prflash,
    "moh": moh(True), "moh-routed": moh(False), "moh-llama": moh_llama,
}  # fmt: skip

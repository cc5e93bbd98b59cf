"""Heads and blocks of keys that are chosen from the data, as published, written as programs, against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ir.running import attend, kept_of, rand, reads, run

DMA_SIZES = 2, 4, 2, 23, 8  # b, h, heads of keys g, tokens, channels; 6 keys are kept
BIAS = """let    dt[b, g, key] = sum(w[g, src * 8 + c] * v[b, src, key, c], over=(src, c))
      let    bias[b, g, key] = a[g] * log(1.0 + exp(dt[b, g, key]))"""
DMA_KEPT = {
    # how the tables end, what they give beside the bias, the index of a key, and what an attention keeps
    "one list for all queries": (
        "select kept[b, g, key] = top_k(bias[b, g, key], 6, over=key)\n"
        "      select picked[b, g, place] = positions(kept[b, g, key], over=key, into=place)",
        "picked", ("i64", 6), "picked[b, h // 2, kv_idx]", "picked[b, h // 2, kv_idx] <= q_idx",
    ),
    "a set for each query": (
        "select kept[b, g, i, key] = top_k(bias[b, g, key], 6, over=key, where=key <= i)",
        "kept", ("bool", 23, 23), "kv_idx", "kept[b, h // 2, q_idx, kv_idx]",
    ),
    "a comparison with a threshold of each query": (
        "select kept[b, g, i, key] = top_k(bias[b, g, key], 6, over=key, where=key <= i)\n"
        "      let    least[b, g, i] = min(bias[b, g, key], over=key, where=kept[b, g, i, key])",
        "least", ("f64", 23), "kv_idx", "(kv_idx <= q_idx) & (bias[b, h // 2, kv_idx] >= least[b, h // 2, q_idx])",
    ),
    "blocks by majority": (
        "select kept[b, g, key] = top_k(bias[b, g, key], 6, over=key)\n"
        "      select count[b, g, block] = sum(to_int(kept[b, g, block * 4 + t]), over=t, where=block * 4 + t < 23)\n"
        "      select block_kept[b, g, block] = count[b, g, block] * 2 > minimum(4, 23 - block * 4)",
        "block_kept", ("bool", 6), "kv_idx", "block_kept[b, h // 2, kv_idx // 4] & (kv_idx <= q_idx)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DMA_KEPT)
def test_dynamic_mask_attention(name: str) -> None:
    """Keys by a bias that is made of the values and is added to the scores; gradients through the bias alone."""
    select, given, (dtype, *shape), key, keep = DMA_KEPT[name]
    b, h, g, n, d = DMA_SIZES
    torch.manual_seed(0)
    made = {"q": rand(b, h, n, d), "k": rand(b, g, n, d), "v": rand(b, g, n, d), "w": rand(g, g * d), "a": rand(g)}
    keys = 6 if given == "picked" else n
    sizes = ", ".join(map(str, (b, g, *shape)))
    text = f"""tables
      axes   b={b}, g={g}, src={g}, c={d}, key={n}, i={n}, place=6, block=6, t=4
      read   {reads(w=made["w"], v=made["v"], a=made["a"])}
      {BIAS}
      {select}
      return bias, {given}
    attention
      axes   b={b}, h={h}, q_idx={n}, kv_idx={keys}
      read   {reads(q=made["q"], k=made["k"], v=made["v"])}, bias: f64[{b}, {g}, {n}], {given}: {dtype}[{sizes}]
      score  dot(q[b, h, q_idx], k[b, h // 2, {key}]) * {d**-0.5} + bias[b, h // 2, {key}]
      keep   {keep} else zero
      weigh  softmax
      sum    v[b, h // 2, {key}]"""
    mine = {name: tensor.clone().requires_grad_() for name, tensor in made.items()}
    theirs = {name: tensor.clone().requires_grad_() for name, tensor in made.items()}
    dt = torch.einsum("bnc,gc->bgn", theirs["v"].transpose(1, 2).reshape(b, n, g * d), theirs["w"])
    bias = theirs["a"][:, None] * F.softplus(dt)
    causal = torch.ones(n, n).tril().bool()
    rank = bias.detach()[:, :, None].expand(-1, -1, n, -1)
    if given in ("kept", "least"):
        rank = rank.masked_fill(~causal, -math.inf)
    kept = kept_of(rank, 6)
    if given == "block_kept":
        blocks = [part.sum(-1, keepdim=True) * 2 > part.shape[-1] for part in kept.split(4, -1)]
        kept = torch.cat([part.expand(-1, -1, -1, 4) for part in blocks], -1)[..., :n]
    kept, bias, k, v = ((x.repeat_interleave(h // g, 1)) for x in (kept & causal, bias[:, :, None], theirs["k"], theirs["v"]))
    expected = attend(theirs["q"], k, v, kept, bias)
    found = run(text, **{name: mine[name] for name in ("w", "v", "a", "q", "k")})
    torch.testing.assert_close(found["o"], expected)
    if kept.any(-1).all():  # eager's gradients of a row that keeps nothing are NaN
        upstream = torch.randn_like(expected)
        ours = torch.autograd.grad(found["o"], list(mine.values()), upstream)
        for one, other in zip(ours, torch.autograd.grad(expected, list(theirs.values()), upstream), strict=True):
            torch.testing.assert_close(one, other)


def test_mixture_of_heads() -> None:
    """3 shared heads, 2 of 5 routed ones for each token; gains renormalised and mixed in two stages."""
    torch.manual_seed(0)
    b, n, c, heads, shared, top = 2, 9, 12, 8, 3, 2
    x, q, k, v = rand(b, n, c), *(rand(b, heads, n, 4) for _ in range(3))
    wr, ws, w0 = rand(heads - shared, c), rand(shared, c), rand(2, c)
    made = {"x": x, "wr": wr, "ws": ws, "w0": w0}
    text = f"""tables
      axes   b={b}, i={n}, ch={c}, r={heads - shared}, s={shared}, two=2, head={heads}
      read   {reads(**made)}
      let    routed[b, i, r] = sum(wr[r, ch] * x[b, i, ch], over=ch)
      let    p[b, i, r] = softmax(routed[b, i, r], over=r)
      select kept[b, i, r] = top_k(p[b, i, r], {top}, over=r)
      let    total[b, i] = sum(p[b, i, r], over=r, where=kept[b, i, r])
      let    common[b, i, s] = sum(ws[s, ch] * x[b, i, ch], over=ch)
      let    ps[b, i, s] = softmax(common[b, i, s], over=s)
      let    mixed[b, i, two] = sum(w0[two, ch] * x[b, i, ch], over=ch)
      let    mix[b, i, two] = softmax(mixed[b, i, two], over=two)
      let    of_shared[b, i, head] = mix[b, i, 0] * ps[b, i, head]
      let    of_routed[b, i, head] = mix[b, i, 1] * p[b, i, head - {shared}] / total[b, i]
      let    gate[b, i, head] = where(head < {shared}, of_shared[b, i, head] * {2.0 * shared}, of_routed[b, i, head] * {2.0 * top})
      select on[b, i, head] = (head < {shared}) | kept[b, i, head - {shared}]
      return gate, on
    attention
      axes   b={b}, h={heads}, q_idx={n}, kv_idx={n}
      read   {reads(q=q, k=k, v=v)}, gate: f64[{b}, {n}, {heads}], on: bool[{b}, {n}, {heads}]
      score  dot(q[b, h, q_idx], k[b, h, kv_idx]) * 0.5
      weigh  softmax
      sum    v[b, h, kv_idx]
      route  gate[b, q_idx, h] where on[b, q_idx, h]"""
    p = (x @ wr.T).softmax(-1)
    chosen = p * kept_of(p, top)
    a = 2 * (x @ w0.T).softmax(-1)
    gate = torch.cat([a[..., :1] * shared * (x @ ws.T).softmax(-1), a[..., 1:] * top * chosen / chosen.sum(-1, keepdim=True)], -1)
    found = run(text, **made, q=q, k=k, v=v)
    assert torch.equal(found["on"].sum(-1), torch.full((b, n), shared + top))
    expected = (q @ k.mT * 0.5).softmax(-1) @ v * gate.transpose(1, 2)[..., None]
    torch.testing.assert_close(found["o"], expected)


def test_heads_reinforced_by_their_divergence() -> None:
    """A gain of each head, for the half whose output changes most with the image."""
    torch.manual_seed(0)
    b, h, n, d = 2, 6, 5, 4
    with_, without, q, k, v = rand(b, h, d), rand(b, h, d), *(rand(b, h, n, d) for _ in range(3))
    text = f"""tables
      axes   b={b}, head={h}, c={d}
      read   {reads(seen=with_, unseen=without)}
      let    far[b, head] = sum((seen[b, head, c] - unseen[b, head, c]) ** 2, over=c)
      select aware[b, head] = top_k(far[b, head], {h // 2}, over=head)
      return aware
    attention
      axes   b={b}, h={h}, q_idx={n}, kv_idx={n}
      read   {reads(q=q, k=k, v=v)}, aware: bool[{b}, {h}]
      score  dot(q[b, h, q_idx], k[b, h, kv_idx]) * 0.5
      weigh  softmax
      sum    v[b, h, kv_idx]
      route  where(aware[b, h], 2.0, 1.0) where True"""
    gain = 1.0 + kept_of((with_ - without).norm(dim=-1), h // 2)
    expected = (q @ k.mT * 0.5).softmax(-1) @ v * gain[..., None, None]
    torch.testing.assert_close(run(text, seen=with_, unseen=without, q=q, k=k, v=v)["o"], expected)


def test_informed_tokens_of_the_last_query() -> None:
    """K of a top-k is a count of outliers, a quartile is a place in an order; the scores of chosen keys are edited."""
    torch.manual_seed(0)
    b, h, n, d, image, first = 1, 2, 30, 4, 17, 5
    early, late = torch.rand(3, image).double(), torch.rand(3, image).double()
    late[:, [2, 11]] += 5
    q, k, v = (rand(b, h, n, d) for _ in range(3))
    local = image // 4
    dot = "dot(q[b, h, q_idx], k[b, h, kv_idx]) * 0.5"
    edited = f"(q_idx == {n - 1}) & (kv_idx >= {first}) & (kv_idx < {first + image})"
    text = f"""tables
      axes   one=1, hv=3, t={image}, place={image}
      read   {reads(early=early, late=late)}
      let    at_first[t] = sum(early[hv, t], over=hv)
      let    at_last[t] = sum(late[hv, t], over=hv)
      select order[place] = argsort(at_last[t], over=t, into=place)
      select outliers[t] = at_last[t] > at_last[order[12]] * 2.5 - at_last[order[4]] * 1.5
      select counted[one] = sum(to_int(outliers[t]), over=t)
      select summary[t] = top_k(at_last[t], counted[0], over=t)
      select near[t] = top_k(at_first[t], {local}, over=t)
      let    strength[t] = where(summary[t], 0.3, where(near[t], 0.7, 0.0))
      return strength
    attention
      axes   b={b}, h={h}, q_idx={n}, kv_idx={n}
      read   {reads(q=q, k=k, v=v)}, strength: f64[{image}]
      score  {dot} + where({edited}, abs({dot}) * strength[kv_idx - {first}], 0.0)
      keep   kv_idx <= q_idx else nan
      weigh  softmax
      sum    v[b, h, kv_idx]"""
    a, z = early.sum(0), late.sum(0)
    low, high = z.quantile(0.25), z.quantile(0.75)
    count = int((z > high + 1.5 * (high - low)).sum())
    assert count == 2
    factor = torch.zeros(n, dtype=torch.float64)
    factor[first : first + image] = torch.where(kept_of(z, count), 0.3, torch.where(kept_of(a, local), 0.7, 0.0))
    scores = q @ k.mT * 0.5
    scores = torch.cat([scores[:, :, :-1], scores[:, :, -1:] + factor * scores[:, :, -1:].abs()], 2)
    expected = scores.masked_fill(~torch.ones(n, n).tril().bool(), -math.inf).softmax(-1) @ v
    torch.testing.assert_close(run(text, early=early, late=late, q=q, k=k, v=v)["o"], expected)


def test_sharded_stripes_as_lists_of_blocks() -> None:
    """The pattern of each head as CSR, read by one attention for each block of queries; and as a predicate alone."""
    torch.manual_seed(0)
    b, h, g, n, d, size, local, stride = 2, 4, 2, 24, 4, 4, 2, 3
    q, k, v = rand(b, h, n, d), rand(b, g, n, d), rand(b, g, n, d)
    blocks = n // size
    table = f"i64[{g}, {blocks}]"
    slot = f"slots[begin[h // 2, b % {blocks}] + kv_idx // {size}] % {blocks}"
    text = f"""tables
      axes   shard={g}, qb={blocks}, kb={blocks}, slot={g * blocks * blocks}
      read
      select kept[shard, qb, kb] = (kb <= qb) & ((qb - kb < {local}) | ((kb + shard) % {stride} == 0))
      select count[shard, qb] = sum(to_int(kept[shard, qb, kb]), over=kb)
      select end[shard, qb] = cumsum(count[shard, qb], over=(shard, qb))
      select begin[shard, qb] = end[shard, qb] - count[shard, qb]
      select slots[slot] = positions(kept[shard, qb, kb], over=(shard, qb, kb), into=slot)
      return begin, count, slots
    attention
      axes   b={b * blocks}, h={h}, q_idx={size}, kv_idx={n}
      read   {reads(q=q, k=k, v=v)}, begin: {table}, count: {table}, slots: i64[{g * blocks * blocks}]
      score  dot(q[b // {blocks}, h, b % {blocks} * {size} + q_idx], k[b // {blocks}, h // 2, KEY]) * 0.5
      keep   (kv_idx // {size} < count[h // 2, b % {blocks}]) & (KEY <= b % {blocks} * {size} + q_idx) else nan
      weigh  softmax
      sum    v[b // {blocks}, h // 2, KEY]""".replace("KEY", f"({slot}) * {size} + kv_idx % {size}")
    i, j = torch.arange(n)[:, None], torch.arange(n)
    distance = i // size - j // size
    kept = torch.stack([(j <= i) & ((distance < local) | ((j // size + shard) % stride == 0)) for shard in (0, 0, 1, 1)])
    expected = attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), kept)
    found = run(text, q=q, k=k, v=v)["o"].view(b, blocks, h, size, d).transpose(1, 2).flatten(2, 3)
    torch.testing.assert_close(found, expected)
    visible = f"((q_idx // {size} - kv_idx // {size} < {local}) | ((kv_idx // {size} + h // 2) % {stride} == 0))"
    plain = f"""attention
      axes   b={b}, h={h}, q_idx={n}, kv_idx={n}
      read   {reads(q=q, k=k, v=v)}
      score  dot(q[b, h, q_idx], k[b, h // 2, kv_idx]) * 0.5
      keep   (kv_idx <= q_idx) & {visible} else nan
      weigh  softmax
      sum    v[b, h // 2, kv_idx]"""
    torch.testing.assert_close(run(plain, q=q, k=k, v=v)["o"], expected)


def test_bilevel_routing() -> None:
    """Regions of an image by pooled queries and keys of all heads, 3 regions of keys for each region of queries."""
    torch.manual_seed(0)
    b, height, width, side, heads, d, top = 2, 8, 12, 4, 2, 3, 3
    hh, ww = height // side, width // side
    regions, size = side * side, hh * ww
    q, k, v = (rand(b, height, width, heads, d) for _ in range(3))
    scale = (heads * d) ** -0.5
    row, column = f"r // {side} * {hh} + t // {ww}", f"r % {side} * {ww} + t % {ww}"
    picked = f"picked[b // {regions}, b % {regions}, kv_idx // {size}]"
    at = f"{picked} // {side} * {hh} + kv_idx % {size} // {ww}, {picked} % {side} * {ww} + kv_idx % {size} % {ww}"
    own = f"b % {regions} // {side} * {hh} + q_idx // {ww}, b % {regions} % {side} * {ww} + q_idx % {ww}"
    text = f"""tables
      axes   b={b}, r={regions}, s={regions}, t={size}, h={heads}, c={d}, place={top}
      read   {reads(q=q, k=k)}
      let    mean_q[b, r, h, c] = mean(q[b, {row}, {column}, h, c], over=t)
      let    mean_k[b, r, h, c] = mean(k[b, {row}, {column}, h, c], over=t)
      let    affinity[b, r, s] = sum(mean_q[b, r, h, c] * mean_k[b, s, h, c], over=(h, c))
      select picked[b, r, place] = argsort(affinity[b, r, s], over=s, into=place, descending=True)
      return picked
    attention
      axes   b={b * regions}, h={heads}, q_idx={size}, kv_idx={top * size}
      read   {reads(q=q, k=k)}, picked: i64[{b}, {regions}, {top}], {reads(v=v)}
      score  dot(q[b // {regions}, {own}, h], k[b // {regions}, {at}, h]) * {scale}
      weigh  softmax
      sum    v[b // {regions}, {at}, h]"""

    def split(x: Tensor) -> Tensor:  # [b, regions, tokens of a region, heads, d]
        return x.view(b, side, hh, side, ww, heads, d).transpose(2, 3).reshape(b, regions, size, heads, d)

    wq, wk, wv = map(split, (q, k, v))
    best = torch.einsum("brhc,bshc->brs", wq.mean(2), wk.mean(2)).topk(top, -1).indices
    expected = torch.empty(b, regions, heads, size, d, dtype=torch.float64)
    for i in range(b):
        for r in range(regions):
            keys, values = (x[i, best[i, r]].flatten(0, 1).transpose(0, 1) for x in (wk, wv))
            expected[i, r] = (wq[i, r].transpose(0, 1) @ keys.mT * scale).softmax(-1) @ values
    torch.testing.assert_close(run(text, q=q, k=k, v=v)["o"].view_as(expected), expected)


def _gated(text: str, q: Tensor, k: Tensor, v: Tensor, size: int, causal: bool) -> Tensor:
    """An attention over the blocks that `text` makes `kept` from the gate of each query with the mean key of each block."""
    h, n, d = q.shape
    blocks = -(-n // size)
    within = " & (kv_idx <= q_idx)" if causal else ""
    program = f"""tables
      axes   h={h}, s={n}, block={blocks}, t={size}, c={d}, one=1
      read   {reads(q=q, k=k)}
      let    mean_k[h, block, c] = mean(k[h, block * {size} + t, c], over=t, where=block * {size} + t < {n})
      let    gate[h, s, block] = sum(q[h, s, c] * mean_k[h, block, c], over=c)
      {text}
      return kept
    attention
      axes   b=1, h={h}, q_idx={n}, kv_idx={n}
      read   {reads(q=q, k=k)}, kept: bool[{h}, {n}, {blocks}], {reads(v=v)}
      score  dot(q[h, q_idx], k[h, kv_idx]) * {d**-0.5}
      keep   kept[h, q_idx, kv_idx // {size}]{within} else nan
      weigh  softmax
      sum    v[h, kv_idx]"""
    return run(program, q=q, k=k, v=v)["o"][0]


def _block_gate(q: Tensor, k: Tensor, size: int) -> Tensor:
    return q @ torch.stack([part.mean(1) for part in k.split(size, 1)], 1).mT


def test_mixture_of_block_attention() -> None:
    """MoBA: the own block and the best past ones; queries with few past blocks take all."""
    torch.manual_seed(0)
    h, n, d, size, top = 3, 22, 4, 5, 3
    q, k, v = (rand(h, n, d) for _ in range(3))
    text = f"""select past[h, s, block] = top_k(gate[h, s, block], {top - 1}, over=block, where=block < s // {size})
      select kept[h, s, block] = past[h, s, block] | (block == s // {size})"""
    own = torch.arange(n)[:, None] // size
    gate, block = _block_gate(q, k, size), torch.arange(5)
    chosen = kept_of(gate.masked_fill(block >= own, -math.inf), top - 1) & (block < own) | (block == own)
    kept = chosen.repeat_interleave(size, -1)[..., :n] & torch.ones(n, n).tril().bool()
    torch.testing.assert_close(_gated(text, q, k, v, size, True), attend(q, k, v, kept))


@pytest.mark.parametrize("scope", ["query_head", "head_global", "overall"])
def test_video_block_attention_by_share(scope: str) -> None:
    """VMoBA: gates as shares of a group, own blocks counted first, the others until the share is reached."""
    torch.manual_seed(0)
    h, n, d, size, tau = 3, 22, 4, 5, 0.6
    q, k, v = (rand(h, n, d) for _ in range(3))
    over, row = {"query_head": ("block", "h, s"), "head_global": ("(s, block)", "h"), "overall": ("(h, s, block)", "one")}[scope]
    index = row if scope != "overall" else "0"
    own = f"block == s // {size}"
    text = f"""let    low[{row}] = min(gate[h, s, block], over={over})
      let    high[{row}] = max(gate[h, s, block], over={over})
      let    share[h, s, block] = (gate[h, s, block] - low[{index}]) / (high[{index}] - low[{index}])
      let    total[{row}] = sum(share[h, s, block], over={over})
      let    had[{row}] = sum(share[h, s, block], over={over}, where={own})
      let    need[{row}] = {tau} * (total[{row}] + 1e-06) - had[{row}]
      select far[h, s, block] = top_sum(share[h, s, block], need[{index}], over={over}, where=block != s // {size}, least=1)
      select kept[h, s, block] = far[h, s, block] | ({own})"""
    gate = _block_gate(q, k, size)
    mine = (torch.arange(5) == torch.arange(n)[:, None] // size).expand_as(gate)
    dims = {"query_head": -1, "head_global": (1, 2), "overall": (0, 1, 2)}[scope]
    low, high = gate.amin(dims, keepdim=True), gate.amax(dims, keepdim=True)
    flat = (h * n, 5) if scope == "query_head" else (h, n * 5) if scope == "head_global" else (1, h * n * 5)
    share, own_flat = ((gate - low) / (high - low)).reshape(flat), mine.reshape(flat)
    kept = own_flat.clone()
    for values, taken in zip(share, kept, strict=True):
        need, total = tau * (values.sum() + 1e-6) - values[taken].sum(), 0.0
        for place, at in enumerate(values.masked_fill(taken, -1.0).argsort(descending=True).tolist()):
            if taken[at] or (place and total >= need):
                break
            taken[at] = True
            total += values[at]
    pairs = kept.view_as(gate).repeat_interleave(size, -1)[..., :n]
    torch.testing.assert_close(_gated(text, q, k, v, size, False), attend(q, k, v, pairs))

"""Single tokens that are chosen from the data, as published, written as programs, against plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ir.running import attend, rand, reads, run


def test_snapkv_compacts_the_cache() -> None:
    """Votes of the last queries, pooled, the best keys in order of importance and the last ones as a buffer."""
    torch.manual_seed(0)
    b, h, n, d, obs, cap, kernel = 2, 3, 20, 4, 4, 10, 5
    q, k, v, new = rand(b, h, n, d), rand(b, h, n, d), rand(b, h, n, d), rand(b, h, 1, d)
    far, lowest = n - obs, torch.finfo(torch.float64).min
    text = f"""tables
      axes   b={b}, h={h}, i={obs}, j={n}, c={d}, m={far}, o={kernel}, place={cap - obs}, n={cap}
      read   {reads(q=q, k=k, v=v)}
      let    dots[b, h, i, j] = sum(q[b, h, i + {far}, c] * k[b, h, j, c], over=c)
      let    p[b, h, i, j] = softmax(where(j > i + {far}, {lowest!r}, dots[b, h, i, j] * {d**-0.5}), over=j)
      let    vote[b, h, m] = sum(p[b, h, i, m], over=i)
      let    smooth[b, h, m] = sum(vote[b, h, m + o - 2], over=o, where=(m + o >= 2) & (m + o - 2 < {far}))
      select picked[b, h, place] = argsort(smooth[b, h, m], over=m, into=place, descending=True)
      select at[b, h, n] = where(n < {cap - obs}, picked[b, h, n], n + {n - cap})
      let    kc[b, h, n, c] = k[b, h, at[b, h, n], c]
      let    vc[b, h, n, c] = v[b, h, at[b, h, n], c]
      return kc, vc
    attention
      axes   b={b}, h={h}, q_idx=1, kv_idx={cap}
      read   {reads(new=new, kc=k[:, :, :cap], vc=v[:, :, :cap])}
      score  dot(new[b, h, q_idx], kc[b, h, kv_idx]) * {d**-0.5}
      weigh  softmax
      sum    vc[b, h, kv_idx]"""
    scores = q[:, :, -obs:] @ k.mT * d**-0.5
    corner = torch.ones(obs, n).triu(n - obs + 1).bool()
    vote = scores.masked_fill(corner, lowest).softmax(-1)[..., :far].sum(2)
    at = F.avg_pool1d(vote, kernel, stride=1, padding=kernel // 2).topk(cap - obs, -1).indices
    at = torch.cat([at, torch.arange(far, n).expand(b, h, -1)], -1)[..., None].expand(-1, -1, -1, d)
    expected = (new @ k.gather(2, at).mT * d**-0.5).softmax(-1) @ v.gather(2, at)
    found = run(text, q=q, k=k, v=v, new=new)
    assert torch.equal(found["kc"], k.gather(2, at))
    torch.testing.assert_close(found["o"], expected)


def test_stripes_near_an_anchor() -> None:
    """Single keys for a super-block of queries, by a pooled score against a pooled maximum; no ranking."""
    torch.manual_seed(0)
    b, h, n, d, blk, step, theta = 1, 2, 48, 4, 4, 3, 1.0
    q, k, v = rand(b, h, n, d), rand(b, h, n, d), rand(b, h, n, d)
    span, scale = blk * step, d**-0.5
    near = f"((kv_idx < {blk}) | (kv_idx // {span} == q_idx // {span}))"
    text = f"""tables
      axes   b={b}, h={h}, i={n}, j={n}, c={d}, block={n // blk}, t={blk}, span={n // span}, u={step}
      read   {reads(q=q, k=k)}
      let    dots[b, h, i, j] = sum(q[b, h, i, c] * k[b, h, j, c], over=c)
      select base[i, j] = ((j < {blk}) | (j // {span} == i // {span})) & (j <= i)
      let    anchor[b, h, i] = max(dots[b, h, i, j] * {scale}, over=j, where=base[i, j])
      let    high[b, h, block] = mean(anchor[b, h, block * {blk} + t], over=t)
      let    mean_q[b, h, block, c] = mean(q[b, h, block * {blk} + t, c], over=t)
      let    cheap[b, h, block, j] = sum(mean_q[b, h, block, c] * k[b, h, j, c], over=c)
      select hit[b, h, block, j] = cheap[b, h, block, j] * {scale} + {theta} >= high[b, h, block]
      select stripe[b, h, span, j] = any(hit[b, h, span * {step} + u, j], over=u, where=j < span * {span})
      return stripe
    attention
      axes   b={b}, h={h}, q_idx={n}, kv_idx={n}
      read   {reads(q=q, k=k)}, stripe: bool[{b}, {h}, {n // span}, {n}], {reads(v=v)}
      score  dot(q[b, h, q_idx], k[b, h, kv_idx]) * {scale}
      keep   stripe[b, h, q_idx // {span}, kv_idx] | {near} & (kv_idx <= q_idx) else nan
      weigh  softmax
      sum    v[b, h, kv_idx]"""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    base = ((j < blk) | (j // span == i // span)) & (j <= i)
    anchor = (q @ k.mT * scale).masked_fill(~base, -math.inf).amax(-1)
    hit = q.unflatten(2, (-1, blk)).mean(3) @ k.mT * scale + theta >= anchor.unflatten(2, (-1, blk)).mean(3)[..., None]
    kept = base | hit.unflatten(2, (-1, step)).any(3).repeat_interleave(span, 2) & (j < i // span * span)
    assert 0.1 < (kept & ~base).double().mean() < 0.5
    torch.testing.assert_close(run(text, q=q, k=k, v=v)["o"], attend(q, k, v, kept))


def test_hierarchical_pruning_is_a_chain_of_cuts() -> None:
    """The tree search of one block of queries, a few equations a level; then its keys and a window."""
    torch.manual_seed(0)
    rows, far, window, d, bk, budget = 4, 46, 6, 4, 2, 12
    n, blocks, m = far + window, -(-far // bk), budget // bk
    q, k, v = rand(rows, d), rand(n, d), rand(n, d)
    edge = torch.tensor([int(blocks / m * i) for i in range(m + 1)])
    levels, left = [], blocks / m
    while left > 1:
        now, then = len(levels), len(levels) + 1
        first = f"minimum(child{now}[w] * {bk} + t, {far - 1})"
        levels.append(f"""select child{now}[w] = start{now}[w // 2] + w % 2 * (size{now}[w // 2] // 2)
      select width{now}[w] = where(w % 2 == 0, size{now}[w // 2] // 2, size{now}[w // 2] - size{now}[w // 2] // 2)
      let    score{now}[w] = max(dots[i, {first}], over=(i, t), where=(i % 2 == 1) & (width{now}[w] > 0))
      select order{now}[place] = argsort(score{now}[w], over=w, into=place, descending=True)
      select start{then}[place] = child{now}[order{now}[place]]
      select size{then}[place] = width{now}[order{now}[place]]""")
        left /= 2
    steps = "\n      ".join(levels)
    text = f"""tables
      axes   i={rows}, j={n}, c={d}, t={bk}, w={2 * m}, place={m}
      read   {reads(q=q, k=k, edge=edge)}
      let    dots[i, j] = sum(q[i, c] * k[j, c], over=c)
      select start0[place] = edge[place]
      select size0[place] = edge[place + 1] - edge[place]
      {steps}
      select found[j] = any(start{len(levels)}[place] == j // {bk}, over=place)
      select kept[j] = found[j] | (j >= {far})
      return kept
    attention
      axes   b=1, h=1, q_idx={rows}, kv_idx={n}
      read   {reads(q=q, k=k)}, kept: bool[{n}], {reads(v=v)}
      score  dot(q[q_idx], k[kv_idx]) * {d**-0.5}
      keep   kept[kv_idx] & (kv_idx <= q_idx + {n - rows}) else nan
      weigh  softmax
      sum    v[kv_idx]"""
    start, size = edge[:-1], edge[1:] - edge[:-1]
    for _ in levels:
        start, size = torch.stack([start, start + size // 2], 1).flatten(), torch.stack([size // 2, size - size // 2], 1).flatten()
        scores = torch.stack([(q[1::2] @ k[torch.arange(s * bk, s * bk + bk).clamp(max=far - 1)].mT).amax() for s in start])
        best = scores.masked_fill(size < 1, -math.inf).argsort(descending=True, stable=True)[:m]
        start, size = start[best], size[best]
    kept = torch.isin(torch.arange(n) // bk, start) | (torch.arange(n) >= far)
    expected = attend(q, k, v, kept & (torch.arange(n) <= torch.arange(rows)[:, None] + n - rows))
    found = run(text, q=q, k=k, edge=edge, v=v)
    assert torch.equal(found["kept"], kept) and kept.sum() == budget + window
    torch.testing.assert_close(found["o"][0, 0], expected)


def test_routing_by_clusters() -> None:
    """Each cluster takes its best queries and its best keys; causal by original positions, a finite mask, memory keys, and
    the mean over the clusters that hold a token."""
    torch.manual_seed(0)
    b, h, n, d, clusters, w, m, eps = 2, 2, 20, 4, 5, 4, 1, 1e-5
    q, k, v, means = rand(b, h, n, d), rand(b, h, n, d), rand(b, h, n, d), rand(h, clusters, d)
    mem_k, mem_v = rand(h, clusters, m, d), rand(h, clusters, m, d)
    lowest, hc = -torch.finfo(torch.float64).max, h * clusters
    cluster = f"h // {clusters}, h % {clusters}"
    text = f"""tables
      axes   b={b}, h={h}, x={clusters}, i={n}, c={d}, place={w}, n={m + w}
      read   {reads(q=q, k=k, v=v, means=means, mem_k=mem_k, mem_v=mem_v)}
      let    norm_q[b, h, i] = sum(q[b, h, i, c] ** 2, over=c)
      let    norm_k[b, h, i] = sum(k[b, h, i, c] ** 2, over=c)
      let    near_q[b, h, x, i] = sum(q[b, h, i, c] * rsqrt(norm_q[b, h, i]) * means[h, x, c], over=c)
      let    near_k[b, h, x, i] = sum(k[b, h, i, c] * rsqrt(norm_k[b, h, i]) * means[h, x, c], over=c)
      select qi[b, h, x, place] = argsort(near_q[b, h, x, i], over=i, into=place, descending=True)
      select ki[b, h, x, place] = argsort(near_k[b, h, x, i], over=i, into=place, descending=True)
      let    kc[b, h, x, n, c] = where(n < {m}, mem_k[h, x, n, c], k[b, h, ki[b, h, x, n - {m}], c])
      let    vc[b, h, x, n, c] = where(n < {m}, mem_v[h, x, n, c], v[b, h, ki[b, h, x, n - {m}], c])
      return qi, ki, kc, vc
    attention
      axes   b={b}, h={hc}, q_idx={w}, kv_idx={m + w}
      read   {reads(q=q)}, qi: i64[{b}, {h}, {clusters}, {w}], ki: i64[{b}, {h}, {clusters}, {w}], KV
      score  where((kv_idx >= {m}) & (qi[b, {cluster}, q_idx] < ki[b, {cluster}, kv_idx - {m}]), {lowest!r}, DOT * {d**-0.5})
      weigh  softmax
      sum    vc[b, {cluster}, kv_idx]
      return o
    tables
      axes   b={b}, h={h}, x={clusters}, i={n}, c={d}, place={w}
      read   o: f64[{b}, {hc}, {w}, {d}], qi: i64[{b}, {h}, {clusters}, {w}]
      select visits[b, h, i] = sum(1, over=(x, place), where=qi[b, h, x, place] == i)
      let    total[b, h, i, c] = sum(o[b, h * {clusters} + x, place, c], over=(x, place), where=qi[b, h, x, place] == i)
      let    out[b, h, i, c] = total[b, h, i, c] / (visits[b, h, i] + {eps})
      return out"""
    sizes = f"f64[{b}, {h}, {clusters}, {m + w}, {d}]"
    text = text.replace("KV\n", f"kc: {sizes}, vc: {sizes}\n")
    text = text.replace("DOT", f"dot(q[b, h // {clusters}, qi[b, {cluster}, q_idx]], kc[b, {cluster}, kv_idx])")
    qi, ki = (torch.einsum("bhnd,hcd->bhcn", F.normalize(t, dim=-1), means).topk(w, -1).indices for t in (q, k))

    def take(x: Tensor, at: Tensor) -> Tensor:
        return x.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, d)).view(b, h, clusters, w, d)

    kc, vc = (torch.cat([mem.expand(b, -1, -1, -1, -1), take(x, ki)], 3) for mem, x in ((mem_k, k), (mem_v, v)))
    late = F.pad(qi[..., :, None] < ki[..., None, :], (m, 0))
    o = (take(q, qi) @ kc.mT * d**-0.5).masked_fill(late, lowest).softmax(-1) @ vc
    at = qi.flatten(2)[..., None].expand(-1, -1, -1, d)
    total = torch.zeros_like(q).scatter_add(2, at, o.flatten(2, 3))
    expected = total / (torch.zeros_like(q).scatter_add(2, at, torch.ones_like(at, dtype=torch.float64)) + eps)
    found = run(text, q=q, k=k, v=v, means=means, mem_k=mem_k, mem_v=mem_v)["out"]
    torch.testing.assert_close(found, expected)
    assert (found == 0).all(-1).any()  # a token in no cluster


def test_sorted_hashes_and_samples() -> None:
    """Both sides sorted by hash, blocks that pair by place, and sampled keys with a weight in the same softmax."""
    torch.manual_seed(0)
    b, h, n, d, r, size, samples = 2, 2, 24, 4, 3, 6, 5
    q, k, v, proj = rand(b, h, n, d), rand(b, h, n, d), rand(b, h, n, d), rand(d, r)
    pick = torch.randint(0, n, (b, h, samples))
    gray = torch.tensor([0, 1, 3, 2, 7, 6, 4, 5])
    nb = n // size
    bits = "sum(to_int(side_{0}[b, h, i, bit] > 0.0) * power[bit], over=bit)"
    power = torch.tensor([1, 2, 4])
    where_k = f"where(kv_idx < {size}, ki[b // {nb}, h, b % {nb} * {size} + kv_idx], ki[b // {nb}, h, DRAW])"
    where_k = where_k.replace("DRAW", f"pick[b // {nb}, h, kv_idx - {size}]")
    text = f"""tables
      axes   b={b}, h={h}, i={n}, c={d}, bit={r}, place={n}
      read   {reads(q=q, k=k, proj=proj, power=power, gray=gray)}
      let    side_q[b, h, i, bit] = sum(q[b, h, i, c] * proj[c, bit], over=c)
      let    side_k[b, h, i, bit] = sum(k[b, h, i, c] * proj[c, bit], over=c)
      select code_q[b, h, i] = {bits.format("q")}
      select code_k[b, h, i] = {bits.format("k")}
      select qi[b, h, place] = argsort(gray[code_q[b, h, i]], over=i, into=place)
      select ki[b, h, place] = argsort(gray[code_k[b, h, i]], over=i, into=place)
      return qi, ki
    attention
      axes   b={b * nb}, h={h}, q_idx={size}, kv_idx={size + samples}
      read   {reads(q=q, k=k)}, qi: i64[{b}, {h}, {n}], ki: i64[{b}, {h}, {n}], {reads(pick=pick, v=v)}
      score  dot(q[b // {nb}, h, qi[b // {nb}, h, b % {nb} * {size} + q_idx]], k[b // {nb}, h, {where_k}]) * 0.5 + WEIGHT
      keep   (kv_idx < {size}) | (pick[b // {nb}, h, kv_idx - {size}] // {size} != b % {nb}) else nan
      weigh  softmax
      sum    v[b // {nb}, h, {where_k}]
      return o
    tables
      axes   b={b}, h={h}, i={n}, c={d}, place={n}
      read   o: f64[{b * nb}, {h}, {size}, {d}], qi: i64[{b}, {h}, {n}]
      select back[b, h, i] = argsort(qi[b, h, place], over=place, into=i)
      let    out[b, h, i, c] = o[b * {nb} + back[b, h, i] // {size}, h, back[b, h, i] % {size}, c]
      return out""".replace("WEIGHT", f"where(kv_idx < {size}, 0.0, {math.log(n / samples)!r})")
    orders = [gray[((x @ proj > 0).long() * power).sum(-1)].sort(dim=-1, stable=True).indices for x in (q, k)]

    def take(x: Tensor, at: Tensor) -> Tensor:
        return x.gather(2, at[..., None].expand(-1, -1, -1, d))

    qs, ks, vs = take(q, orders[0]), take(k, orders[1]), take(v, orders[1])
    own = torch.arange(n)[:, None] // size
    block = (qs @ ks.mT * 0.5).masked_fill(own != torch.arange(n) // size, -math.inf)
    drawn = (qs @ take(ks, pick).mT * 0.5 + math.log(n / samples)).masked_fill((pick // size)[:, :, None] == own, -math.inf)
    o = torch.cat([block, drawn], -1).softmax(-1) @ torch.cat([vs, take(vs, pick)], 2)
    found = run(text, q=q, k=k, proj=proj, power=power, gray=gray, pick=pick, v=v)["out"]
    torch.testing.assert_close(found, take(o, orders[0].argsort(-1)))

"""A declared attention in plain torch: what Dynamo sees of `attention`. This backend recognises it, others get what they can read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attncompiler.dsl.masks import Mask
from attncompiler.dsl.routing import HeadRoute
from attncompiler.dsl.selection import TopKeys, check

Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(
    q: Tensor, k: Tensor, v: Tensor, keep: Mask | None, score: Score | None, select: TopKeys | None, route: HeadRoute | None,
    scale: float | None, dropout_p: float, return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """As `attention`, whose checks were made."""
    b, h, m, d = q.shape
    n, groups = k.shape[2], h // k.shape[1]
    if groups > 1:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (d**-0.5 if scale is None else float(scale))
    batch = torch.arange(b, device=q.device)[:, None, None, None]
    head = torch.arange(h, device=q.device)[:, None, None]
    query, key = torch.arange(m, device=q.device)[:, None], torch.arange(n, device=q.device)
    if score is not None:
        scores = score(scores, batch, head, query, key)
    if select is not None:
        check(select, q, k)
    if keep is None and select is None:
        weights = torch.softmax(scores, -1)
    else:
        kept = torch.ones((), dtype=torch.bool, device=q.device) if keep is None else keep.on(batch, head, query, key)
        if select is not None:
            kept = select.on(h, m) if keep is None else kept & select.on(h, m)
        scores = torch.where(kept, scores, float("-inf"))
        weights = torch.where(kept, torch.softmax(scores, -1), 0.0)  # a query without keys: zero, not NaN
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, True)
    out = weights.to(v.dtype) @ v  # a score may read wider numbers than q holds
    if route is not None:
        gate, active = route.operands(q)
        out = out * torch.where(active, gate, 0.0)[..., None]
    if not return_lse:
        return out
    lse = torch.logsumexp(scores, -1)
    return out, lse if route is None else torch.where(active, lse, float("-inf"))

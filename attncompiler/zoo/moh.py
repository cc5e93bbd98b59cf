"""Mixture-of-head attention: a router switches heads on for each token, and weighs them before the output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.zoo.system import Example, Size, System

# --------------------------------------------------------------------------------------------------------- as users write it


def moh_routed(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """p [B, N, R], of a softmax -> gates that sum to k, 0 outside the k largest; and which these are."""
    chosen = F.one_hot(p.topk(k, dim=-1).indices, p.shape[-1]).sum(-2)
    kept = p * chosen
    return k * kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps), chosen


def moh_gates(x: Tensor, w_routed: Tensor, w_shared: Tensor, w_mix: Tensor, k: int) -> Tensor:
    """x [B, N, C], w_routed [R, C], w_shared [S, C], w_mix [2, C] -> [B, N, S + R]: shared heads come first, and are always on."""
    routed, _ = moh_routed(F.linear(x, w_routed).softmax(-1), k)
    shared = w_shared.shape[0] * F.linear(x, w_shared).softmax(-1)
    mix = 2 * F.linear(x, w_mix).softmax(-1)
    return torch.cat([torch.einsum("bn,bne->bne", mix[..., 0], shared), torch.einsum("bn,bne->bne", mix[..., 1], routed)], dim=2)


def moh_balance_loss(p: Tensor, chosen: Tensor) -> Tensor:
    """What training adds for each layer, of what `moh_routed` takes and gives."""
    heads = p.shape[-1]
    return heads * (p.flatten(0, 1).mean(0) * chosen.flatten(0, 1).to(p.dtype).mean(0)).sum()


def moh(q: Tensor, k: Tensor, v: Tensor, x: Tensor, w_routed: Tensor, w_shared: Tensor, w_mix: Tensor, chosen: int) -> Tensor:
    """q, k, v [B, H, N, D] -> [B, N, H D], for the output projection."""
    o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    gates = moh_gates(x, w_routed, w_shared, w_mix, chosen)
    return torch.einsum("bne,bned->bned", gates, o).flatten(2)


def moh_no_shared(q: Tensor, k: Tensor, v: Tensor, x: Tensor, w_routed: Tensor, chosen: int) -> Tensor:
    """Every head is routed."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    o = scores.softmax(-1) @ v
    gates, _ = moh_routed(F.linear(x, w_routed).softmax(-1), chosen)
    return (o.transpose(1, 2) * gates.unsqueeze(-1)).flatten(2)


def moh_llama_mask(q: Tensor, shared: int, chosen: int) -> Tensor:
    """A router without parameters, of queries before their rotation [B, N, H, D] -> 0 or 1 [B, N, H]."""
    z = q[:, :, shared:].norm(dim=-1)
    p = (z / z.std(-1, keepdim=True)).softmax(-1)
    routed = torch.zeros_like(p).scatter(-1, p.topk(chosen, dim=-1).indices, 1.0)
    return torch.cat([torch.ones_like(q[:, :, :shared, 0]), routed], dim=-1)


def rotated(x: Tensor, base: float = 500000.0) -> Tensor:
    """Rotary positions of [B, N, H, D]."""
    n, d = x.shape[1], x.shape[3]
    rates = base ** -(torch.arange(0, d, 2, device=x.device).double() / d)
    angles = torch.cat([torch.outer(torch.arange(n, device=x.device).double(), rates)] * 2, -1)[:, None]
    first, second = x.chunk(2, -1)
    return x * angles.cos().to(x.dtype) + torch.cat([-second, first], -1) * angles.sin().to(x.dtype)


def moh_llama(q: Tensor, k: Tensor, v: Tensor, shared: int, chosen: int) -> Tensor:
    """q [B, N, H, D] and k, v [B, N, Hk, D] as projections give them; heads of queries share keys."""
    mask = moh_llama_mask(q, shared, chosen)
    q, k, v = (t.transpose(1, 2) for t in (rotated(q), rotated(k), v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return (o.transpose(1, 2) * mask[..., None]).flatten(2)


# ------------------------------------------------------------------------------------------------------------------ declared


def moh_declared(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, w_routed: Tensor, w_shared: Tensor, w_mix: Tensor, chosen: int
) -> Tensor:
    gates = moh_gates(x, w_routed, w_shared, w_mix, chosen)
    return attncompiler.attention(q, k, v, route=attncompiler.route(gates.transpose(1, 2))).transpose(1, 2).flatten(2)


def moh_no_shared_declared(q: Tensor, k: Tensor, v: Tensor, x: Tensor, w_routed: Tensor, chosen: int) -> Tensor:
    gates, _ = moh_routed(F.linear(x, w_routed).softmax(-1), chosen)
    return attncompiler.attention(q, k, v, route=attncompiler.route(gates.transpose(1, 2))).transpose(1, 2).flatten(2)


def moh_llama_declared(q: Tensor, k: Tensor, v: Tensor, shared: int, chosen: int) -> Tensor:
    route = attncompiler.route(moh_llama_mask(q, shared, chosen).transpose(1, 2))
    q, k, v = (t.transpose(1, 2) for t in (rotated(q), rotated(k), v))
    return attncompiler.attention(q, k, v, keep=masks.causal(), route=route, enable_gqa=True).transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------------------------------------------ examples


def _example(size: Size) -> Example:
    heads, n, d, shared, chosen = (8, 160, 16, 3, 2) if size is Size.SMALL else (16, 1024, 72, 8, 4)
    c = heads * d
    router = [(1, n, c), (heads - shared, c), (shared, c), (2, c)]
    return Example([*[(1, heads, n, d)] * 3, *router], {"chosen": chosen})


def _no_shared(size: Size) -> Example:
    heads, n, d, chosen = (6, 150, 16, 3) if size is Size.SMALL else (12, 4096, 64, 6)
    return Example([*[(1, heads, n, d)] * 3, (1, n, heads * d), (heads, heads * d)], {"chosen": chosen})


def _llama(size: Size) -> Example:
    heads, kv_heads, n, d, shared, chosen = (8, 2, 160, 16, 4, 2) if size is Size.SMALL else (32, 8, 8192, 128, 16, 8)
    return Example([(1, n, heads, d), *[(1, n, kv_heads, d)] * 2], {"shared": shared, "chosen": chosen})


_PAPER = "Jin et al. 2024, MoH: Multi-Head Attention as Mixture-of-Head Attention"
_PLAN = "the plan is that of all heads: of each only the queries that use it are computed"
SYSTEMS = (
    System("moh", "Mixture of heads, some of which every token shares", _PAPER, moh, moh_declared, _example, note=_PLAN),
    System(
        "moh-routed", "Mixture of heads, every one of which is routed", _PAPER,
        moh_no_shared, moh_no_shared_declared, _no_shared, note=_PLAN,
    ),
    System(
        "moh-llama", "Mixture of heads, by the length of their queries", _PAPER, moh_llama, moh_llama_declared, _llama, note=_PLAN,
    ),
)  # fmt: skip

"""Seeded random attention programs in plain PyTorch: idiom x mask x score x normaliser x shape x dtype, with near-miss decoys.

`Program(seed)` is a callable of its own `inputs()`; the same seed gives the same program. It is written the way people write
attention, so that what the compiler sees is what it would see in a model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

FINITE = {torch.float64: -3e38, torch.float32: torch.finfo(torch.float32).min, torch.bfloat16: torch.finfo(torch.bfloat16).min}


@dataclass
class Program:
    """One random program. `decoy` names the near-miss it contains, "" for a plain attention."""

    seed: int
    choice: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        r = random.Random(self.seed)
        heads = r.choice([1, 2, 3, 4, 6])
        m = r.choice([1, 2, 5, 16, 33])
        self.choice = {
            "dtype": r.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64]),
            "b": r.choice([1, 2, 3]), "h": heads, "groups": r.choice([g for g in (1, 1, 2, 3) if heads % g == 0]),
            "m": m, "n": r.choice([m, m, 1, 7, 24, 40]), "d": r.choice([4, 8, 20]), "dv": r.choice([4, 8, 12]),
            "product": r.choice(["matmul", "einsum", "bmm", "baddbmm", "transposed", "bnhd", "grouped"]),
            "repeat": r.choice(["expand", "repeat_interleave"]),
            "scale": r.choice(["none", "div", "mul", "q", "k", "tensor"]),
            "score": r.choice(["plain", "plain", "softcap", "alibi", "bias_h", "bias_full", "temperature", "cosine", "two_terms"]),
            "mask": r.choice(["none", "causal", "causal_offset", "window", "padding", "boolean", "document", "additive", "tril"]),
            "fill": r.choice(["-inf", "finite", "add_inf", "add_finite", "where_finite", "-1e9"]),
            "softmax": r.choice(["softmax", "f32", "manual", "manual_nomax", "log", "sink", "plus_one", "lse"]),
            "tail": r.choice(["none", "none", "keep_rows", "gate", "zero_masked"]),
            "decoy": r.choice([""] * 6
                              + ["square", "wrong_axis", "relu", "row_scale", "renormalise", "scores_mask", "reuse_weights"]),
            "out": r.choice(["plain", "transpose", "residual"]),
        }  # fmt: skip

    def __getattr__(self, name: str) -> object:
        if name in self.__dict__.get("choice", {}):
            return self.choice[name]
        raise AttributeError(name)

    def __str__(self) -> str:
        return f"seed {self.seed}: " + ", ".join(f"{k}={v}" for k, v in self.choice.items())

    # ------------------------------------------------------------------------------------------------------ inputs

    def inputs(self, dtype: torch.dtype | None = None, salt: int = 0) -> dict[str, Tensor]:
        """Operands; those of floating dtype require gradients, but for masks."""
        c = self.choice
        dtype = dtype or c["dtype"]
        generator = torch.Generator().manual_seed(self.seed * 7 + salt)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(c["dtype"]).to(dtype)

        b, h, g, m, n, d, dv = (c[k] for k in ("b", "h", "groups", "m", "n", "d", "dv"))
        made = {
            "q": normal(b, h, m, d), "k": normal(b, h // g, n, d), "v": normal(b, h // g, n, dv),
            "bias_h": normal(1, h, m, n), "bias_full": normal(b, h, m, n), "temperature": normal(h, 1, 1).abs() + 0.5,
            "q2": normal(b, h, m, 4), "k2": normal(b, h, n, 4), "gate": normal(b, h, m, 1), "sink": normal(h),
        }  # fmt: skip
        for tensor in made.values():
            tensor.requires_grad_(True)
        made["lengths"] = torch.randint(1, n + 1, (b,), generator=generator)
        made["boolean"] = torch.rand(b, 1, m, n, generator=generator) > 0.3
        made["ids"] = torch.randint(0, 3, (b, max(m, n)), generator=generator)
        made["additive"] = torch.where(torch.rand(b, 1, m, n, generator=generator) > 0.3, 0.0, FINITE[c["dtype"]]).to(dtype)
        return made

    # ------------------------------------------------------------------------------------------------------ program

    def __call__(self, t: dict[str, Tensor]) -> Tensor:
        c = self.choice
        q, k, v = t["q"], t["k"], t["v"]
        if c["product"] != "grouped" and c["groups"] > 1:
            k, v = _repeat(k, c["groups"], c["repeat"]), _repeat(v, c["groups"], c["repeat"])
        if c["score"] == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        d = c["d"]
        if c["scale"] == "q":
            q = q * d**-0.5
        elif c["scale"] == "k":
            k = k / math.sqrt(d)
        scores = _scores(c["product"], q, k, c["groups"])
        if c["scale"] == "div":
            scores = scores / math.sqrt(d)
        elif c["scale"] == "mul":
            scores = scores * 0.125
        elif c["scale"] == "tensor":
            scores = scores * torch.tensor(d**-0.5, dtype=scores.dtype)
        scores = self._modified(scores, t)
        keep = self._keep(t)
        if keep is not None:
            scores = self._masked(scores, keep)
        elif c["mask"] == "additive":
            scores = scores + t["additive"]
        weights = self._weights(scores, t)
        weights = self._decoyed(weights, scores, t)
        if c["tail"] == "zero_masked" and keep is not None:
            weights = weights.masked_fill(~keep, 0.0)
        if c["tail"] == "gate":
            weights = weights * torch.sigmoid(t["gate"])
        out = _combine(c["product"], weights, v, c["groups"])
        if c["decoy"] == "reuse_weights":
            out = out + weights.sum(-1, keepdim=True)
        if c["out"] == "transpose":
            return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)
        return out + out.mean() if c["out"] == "residual" else out

    def _modified(self, scores: Tensor, t: dict[str, Tensor]) -> Tensor:
        kind = self.choice["score"]
        if kind == "softcap":
            return torch.tanh(scores / 3.0) * 3.0
        if kind == "alibi":
            i, j = _positions(scores)
            slopes = 2.0 ** -torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype)
            return scores - slopes[:, None, None] * (i - j).abs()
        if kind in ("bias_h", "bias_full"):
            return scores + t[kind]
        if kind == "temperature":
            return scores * t["temperature"]
        if kind == "two_terms":
            return scores + t["q2"] @ t["k2"].mT
        return scores

    def _keep(self, t: dict[str, Tensor]) -> Tensor | None:
        c = self.choice
        m, n = c["m"], c["n"]
        i, j = torch.arange(m)[:, None], torch.arange(n)[None, :]
        kinds: dict[str, Callable[[], Tensor]] = {
            "causal": lambda: j <= i,
            "causal_offset": lambda: j <= i + (n - m),
            "window": lambda: (j <= i) & (i - j < 4),
            "padding": lambda: (torch.arange(n) < t["lengths"][:, None])[:, None, None, :],
            "boolean": lambda: t["boolean"],
            "document": lambda: (t["ids"][:, :m, None] == t["ids"][:, None, :n])[:, None] & (j <= i),
            "tril": lambda: torch.tril(torch.ones(m, n, dtype=torch.bool)),
        }
        return kinds[c["mask"]]() if c["mask"] in kinds else None

    def _masked(self, scores: Tensor, keep: Tensor) -> Tensor:
        fill, lowest = self.choice["fill"], torch.finfo(scores.dtype).min
        if fill == "-inf":
            return scores.masked_fill(~keep, float("-inf"))
        if fill == "finite":
            return scores.masked_fill(~keep, lowest)
        if fill == "where_finite":
            return torch.where(keep, scores, lowest)
        if fill == "-1e9":
            return scores.masked_fill(~keep, -1e9)
        value = float("-inf") if fill == "add_inf" else lowest
        return scores + torch.zeros(keep.shape, dtype=scores.dtype).masked_fill(~keep, value)

    def _weights(self, scores: Tensor, t: dict[str, Tensor]) -> Tensor:
        kind = self.choice["softmax"]
        if kind == "f32":
            return F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
        if kind == "manual":
            e = (scores - scores.amax(-1, keepdim=True)).exp()
            return e / e.sum(-1, keepdim=True)
        if kind == "manual_nomax":
            e = scores.exp()
            return e / e.sum(dim=-1, keepdim=True)
        if kind == "log":
            return torch.log_softmax(scores, -1).exp()
        if kind == "lse":
            return (scores - torch.logsumexp(scores, -1, keepdim=True)).exp()
        if kind == "plus_one":
            e = scores.exp()
            return e / (1 + e.sum(-1, keepdim=True))
        if kind == "sink":
            sink = t["sink"].reshape(1, -1, 1, 1).expand(scores.shape[0], scores.shape[1], scores.shape[2], 1)
            both = torch.cat([scores, sink], dim=-1)
            return (both - both.max(dim=-1, keepdim=True).values).softmax(-1)[..., :-1]
        return scores.softmax(dim=-1)

    def _decoyed(self, weights: Tensor, scores: Tensor, t: dict[str, Tensor]) -> Tensor:
        kind = self.choice["decoy"]
        if kind == "square":
            return weights * weights
        if kind == "wrong_axis":
            return scores.softmax(dim=-2)
        if kind == "relu":
            return F.relu(scores) / (F.relu(scores).sum(-1, keepdim=True) + 1.0)
        if kind == "row_scale":
            return weights * scores.clamp(-9, 9).mean(-1, keepdim=True)
        if kind == "renormalise":
            return weights / weights.sum(dim=1, keepdim=True).clamp(min=0.1)
        if kind == "scores_mask":
            return scores.masked_fill(scores < 0, (-30.0)).softmax(-1)
        return weights


def _positions(scores: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])[None, :]


def _repeat(x: Tensor, groups: int, how: object) -> Tensor:
    if how == "repeat_interleave":
        return x.repeat_interleave(groups, dim=1)
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, groups, n, d).reshape(b, h * groups, n, d)


def _scores(product: object, q: Tensor, k: Tensor, groups: int) -> Tensor:
    b, h, m, d = q.shape
    n = k.shape[2]
    if product == "einsum":
        return torch.einsum("bhqd,bhkd->bhqk", q, k)
    if product == "bmm":
        return torch.bmm(q.reshape(b * h, m, d), k.reshape(b * h, n, d).transpose(1, 2)).view(b, h, m, n)
    if product == "baddbmm":
        empty = torch.empty(b * h, m, n, dtype=q.dtype)
        return torch.baddbmm(empty, q.reshape(b * h, m, d), k.reshape(b * h, n, d).mT, beta=0, alpha=0.5).view(b, h, m, n)
    if product == "transposed":
        return (k @ q.mT).mT
    if product == "bnhd":
        return torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous())
    if product == "grouped":
        grouped = q.view(b, h // groups, groups, m, d)
        return torch.einsum("bcgqd,bckd->bcgqk", grouped, k).reshape(b, h, m, n)
    return torch.matmul(q, k.transpose(-2, -1))


def _combine(product: object, weights: Tensor, v: Tensor, groups: int) -> Tensor:
    b, h, m, n = weights.shape
    if product in ("einsum", "bnhd"):
        return torch.einsum("bhqk,bhkd->bqhd", weights, v).transpose(1, 2)
    if product in ("bmm", "baddbmm"):
        return torch.bmm(weights.reshape(b * h, m, n), v.reshape(b * h, n, v.shape[-1])).view(b, h, m, -1)
    if product == "grouped":
        grouped = weights.reshape(b, h // groups, groups, m, n)
        return torch.einsum("bcgqk,bckd->bcgqd", grouped, v).reshape(b, h, m, -1)
    return weights @ v

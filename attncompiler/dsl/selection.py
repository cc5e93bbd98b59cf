"""Keys chosen from the data: `attention(q, k, v, select=select.top_k(rank, 1024))`.

As an attention it is a mask in plain torch, which this backend takes back to a list of keys; called outside of a compiled function it
makes the list at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.dsl.masks import Captured, adopt
from attncompiler.errors import DeviceError, OptionError
from attncompiler.ir.expr import KV_IDX, Q_IDX, TRUE, ZERO, B, Const, Expr, H, Read, add, apply, floordiv
from attncompiler.ir.program import Attention, Empty, Keep, TensorDecl
from attncompiler.passes.nodes import DTYPES
from attncompiler.passes.select_keys import over_list
from attncompiler.runtime import selection as _ops  # noqa: F401  registers the ops


@dataclass(frozen=True, eq=False)
class TopKeys:
    """The `w` keys of largest `rank` [B or 1, heads, N] for each batch and group of heads; what is chosen carries no gradient.

    With `per_row` each query ranks the keys up to its own position, the queries being the last M of the N positions. With `block` > 1
    a block of so many keys is kept as a whole where more than half of it was chosen, and else dropped."""

    rank: Tensor
    w: int
    per_row: bool
    block: int

    def on(self, heads: int, queries: int) -> Tensor:
        """What is kept, bool [B or 1, heads, M or 1, N], in plain torch."""
        rank = self.rank.detach()
        n = rank.shape[-1]
        if self.per_row:
            i = torch.arange(n - queries, n, device=rank.device)
            seen = torch.arange(n, device=rank.device) <= i[:, None]
            rank = rank[:, :, None].expand(-1, -1, queries, -1).masked_fill(~seen, float("-inf"))
            kept = seen.expand(rank.shape) if self.w >= n else _scattered(rank, self.w) & seen
        else:
            kept = torch.ones_like(rank, dtype=torch.bool) if self.w >= n else _scattered(rank, self.w)
            kept = (self.blocks(kept).repeat_interleave(self.block, -1)[..., :n] if self.block > 1 else kept)[:, :, None]
        return kept.repeat_interleave(heads // kept.shape[1], 1)

    def blocks(self, kept: Tensor) -> Tensor:
        """Which blocks are kept, of keys kept or not [..., N]."""
        n = kept.shape[-1]
        padded = torch.nn.functional.pad(kept.to(torch.int32), (0, -n % self.block)).unflatten(-1, (-1, self.block))
        length = (n - torch.arange(0, n, self.block, device=kept.device)).clamp(max=self.block)
        majority: Tensor = padded.sum(-1) * 2 > length
        return majority

    def listed(self, program: Attention, heads: int, queries: int, captured: Captured) -> Attention:
        """The program over the keys that are chosen, with the lists among the tensors that it reads."""
        rank, n = self.rank.detach(), self.rank.shape[-1]
        head: Expr = H if rank.shape[1] == heads else floordiv(H, Const(heads // rank.shape[1])) if rank.shape[1] > 1 else ZERO
        row: tuple[Expr, Expr] = (B if rank.shape[0] > 1 else ZERO, head)
        if self.per_row:
            first, places = n - queries, min(n, self.w + queries - 1)
            numbers = (self.w, first, queries, float("nan"), False, False, places)
            picked, until = torch.ops.attncompiler.prefix_top_k.default(rank, -1, *numbers)
            here = _reads({"picked": picked, "until": until}, row, captured)
            still = apply("and", apply("ge", here[0], ZERO), apply("le", here[0], add(Q_IDX, Const(first))))
            still = apply("and", still, apply("lt", Q_IDX, here[1]))
            return over_list(program, here[0], still, Const(places), _declared(here, captured))
        if self.w >= n:
            return program
        indices = rank.topk(self.w, -1).indices
        if self.block > 1:
            kept = torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, indices, True)
            (block,) = _reads({"block_kept": self.blocks(kept)}, (*row, floordiv(KV_IDX, Const(self.block))), captured, ())
            predicate = apply("and", block, program.keep.predicate) if program.keep.predicate != TRUE else block
            tensors = (*program.tensors, *_declared((block,), captured))
            return Attention(
                program.axes, tensors, program.score, Keep(predicate, Empty.ZERO), program.weigh, program.adjust, program.sum,
                program.route, program.origin,
            )  # fmt: skip
        here = _reads({"picked": torch.ops.attncompiler.ascending.default(indices)}, row, captured)
        return over_list(program, here[0], TRUE, Const(self.w), _declared(here, captured))


def _scattered(rank: Tensor, w: int) -> Tensor:
    return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, rank.topk(w, -1).indices, True)


def _reads(
    tensors: Mapping[str, Tensor], row: tuple[Expr, ...], captured: Captured, last: tuple[Expr, ...] = (KV_IDX,)
) -> list[Read]:
    """A read of each tensor at a row and a key, under the name that it has among `captured`."""
    names = adopt(captured, tensors)
    return [Read(names[name], (*row, *last)) for name in tensors]


def _declared(reads: list[Read] | tuple[Read, ...], captured: Captured) -> tuple[TensorDecl, ...]:
    tensors = ((read.tensor, captured[read.tensor]) for read in reads)
    return tuple(TensorDecl(name, DTYPES[t.dtype], tuple(Const(size) for size in t.shape)) for name, t in tensors)


def top_k(rank: Tensor, w: int, *, per_row: bool = False, block: int = 1) -> TopKeys:
    """The `w` keys of largest `rank` [B or 1, heads, N], for the queries of each batch and group of heads; all if there are no more.

    `heads` divides the heads of the queries. NaN ranks above inf; which of equal ranks are kept is open, as in torch.topk. `per_row`:
    each query ranks the keys up to its own position; the queries are the last M of the N positions. `block`: blocks of so many keys are
    kept by majority. What is chosen carries no gradient: a bias of the score does (`score=`).

    Raises: OptionError."""
    if not isinstance(rank, Tensor) or rank.dim() != 3 or not rank.is_floating_point():
        what = f"{rank.dtype} {list(rank.shape)}" if isinstance(rank, Tensor) else type(rank).__name__
        raise OptionError(f"select.top_k ranks {what}", do="give floating numbers [B, heads, N], one for each key")
    if w < 1 or block < 1:
        raise OptionError(f"select.top_k(w={w}, block={block})", do="give 1 or more keys, and blocks of 1 or more")
    if per_row and block > 1:
        raise OptionError(
            "select.top_k with per_row and blocks",
            why="each query would have blocks of its own",
            do="choose one of them",
        )
    return TopKeys(rank, w, per_row, block)


def check(chosen: TopKeys, q: Tensor, k: Tensor) -> None:
    """Raises: OptionError where what is ranked does not fit the attention; DeviceError."""
    if not isinstance(chosen, TopKeys):
        raise OptionError(f"select is {chosen!r}", do="give what attncompiler.select makes: select=select.top_k(rank, w)")
    (b, h, m, _), n, rank = q.shape, k.shape[2], chosen.rank
    if rank.shape[0] not in (1, b) or rank.shape[1] == 0 or h % rank.shape[1] or rank.shape[2] != n:
        raise OptionError(
            f"select.top_k ranks {list(rank.shape)}, for q {list(q.shape)} and {n} keys",
            do=f"give [{b} or 1, heads, {n}], where heads divides {h}",
        )
    if chosen.per_row and m > n:
        raise OptionError(
            f"select.top_k with per_row, of {m} queries and {n} keys", why="the queries are the last of the positions"
        )
    if rank.device != q.device:
        raise DeviceError(f"what select.top_k ranks is on {rank.device}, q is on {q.device}", do="move all operands to one device")

"""Blocks kept or dropped at random, by distance: the same ones in every lowering, in forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attncompiler.dsl.masks import Mask, make_rule, pickled
from attncompiler.dsl.term import Positions, Term, smaller
from attncompiler.errors import OptionError
from attncompiler.ir.evaluate import uniform
from attncompiler.ir.expr import Uniform


@pickled
def sampled(seed: int | Tensor, probability: Sequence[float] | Tensor, block: int = 128, *, per_head: bool = True) -> Mask:
    """PrFlashAttention: of blocks of `block` tokens each pair (query block, key block) is kept or dropped by chance.

    `probability[t]` is that of blocks t apart, the last one holds for all beyond; a query's own block is always kept. `per_head`:
    another draw for each head; all batches share one. `seed`: an integer, or an int64 tensor with one element, which is read at
    each call: write another number into it for another draw, and nothing is compiled anew."""
    chances = torch.as_tensor(probability, dtype=torch.float32).detach().clone()
    if chances.dim() != 1 or not len(chances) or not _are_probabilities(chances):
        raise OptionError("probability holds one number from 0 to 1 for each distance of blocks, from 0 on")
    if block < 1:
        raise OptionError(f"sampled takes blocks of 1 token or more, not {block}")
    if isinstance(seed, Tensor) and (seed.numel() != 1 or seed.dtype != torch.int64):
        raise OptionError(f"the seed is {seed.dtype} {list(seed.shape)}", do="give an integer, or an int64 tensor with one element")
    beyond = chances[1:] if len(chances) > 1 else chances  # the last number holds from its distance on
    chances = torch.cat([torch.ones(1), beyond])
    last = len(chances) - 1

    def kept(p: Positions) -> Any:
        row, column = p.q // block, p.k // block
        distance = smaller(abs(row - column), last)
        drawn = _drawn(p.captured["mask_seed"], p.h * _ROWS + row if per_head else row, column)
        return drawn < p.captured["probability"][distance]

    shown = "seed" if isinstance(seed, Tensor) else str(seed)
    held = seed.view(1) if isinstance(seed, Tensor) else torch.tensor([seed])
    formula = f"sampled({shown}, block={block}{'' if per_head else ', per_head=False'})"
    return make_rule(formula, kept, mask_seed=held, probability=chances)


def _are_probabilities(chances: Tensor) -> bool:
    """A graph that is being traced has no values to look at."""
    return torch.compiler.is_dynamo_compiling() or bool(((chances >= 0) & (chances <= 1)).all())


_ROWS = 1 << 20  # of blocks for each head: rows of two heads don't meet


def _drawn(seed: Any, row: Any, column: Any) -> Any:
    """A number in [0, 1) for each cell (row, column)."""
    if isinstance(row, Term):
        return Term(Uniform(seed.element(0), (row.expr, column.expr)))
    return torch.ops.attncompiler.uniform_at.default(seed, row, column)


@torch.library.custom_op("attncompiler::uniform_at", mutates_args=())
def uniform_at(seed: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The stream of the language's `uniform` as an operator, so that every backend draws the same numbers. float32, broadcast."""
    return uniform(seed.reshape(()), row, column)


@uniform_at.register_fake
def _(seed: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return row.new_empty(torch.broadcast_shapes(row.shape, column.shape), dtype=torch.float32)

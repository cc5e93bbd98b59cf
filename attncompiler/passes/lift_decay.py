"""A constant matrix of decays -> the decay of each head, where every element is explained by it.

Model code builds [H, N, N] or [N, N] tensors once: `exp(-s_h (i - j))` under a triangle, or its logarithm with -inf above it. The rate
is read off the longest distance that has not underflowed, and compared with every element before it is believed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncompiler.errors import Unrecognised
from attncompiler.ir.expr import KV_IDX, Q_IDX, Const, Expr, Read, apply, mul, sub
from attncompiler.passes.constant_masks import View


class Holds(enum.Enum):
    """What the matrix has for a key up to the query: its factor, or the logarithm of it (after it then stands a large negative number)."""

    FACTOR = "factor"
    LOGARITHM = "logarithm"


@dataclass(frozen=True, eq=False)
class DecayMatrix:
    """A constant [H, N, N] (or [1, N, N]) tensor that is exp(-rate[h] * (q_idx - kv_idx)) for keys up to the query, or its logarithm."""

    view: View
    holds: Holds
    rates: Tensor  # [H] or [1], float64

    def still_holds(self, tensor: Tensor) -> bool:
        """Whether the rates explain what the matrix would be now."""
        try:
            matrix = self.view.of(tensor)
        except (RuntimeError, IndexError):
            return False
        matrix = matrix.reshape(-1, *matrix.shape[-2:])
        return matrix.shape[0] in (1, len(self.rates)) and _explains(matrix, self.holds, self.rates)

    def element(self, read: Read, rates: str) -> Expr:
        """What a read of the matrix gives; `rates` names the tensor of the rates, read as a vector over heads."""
        query, key = read.index[self.view.query], read.index[self.view.key]
        head = Const(0) if self.view.heads is None else read.index[self.view.heads]
        exponent = mul(apply("neg", Read(rates, (head,))), apply("to_float", sub(query, key)))
        if not bool(self.rates.any()):
            exponent = Const(0.0)
        past = apply("exp", exponent) if self.holds is Holds.FACTOR else exponent
        return apply("where", apply("le", KV_IDX, Q_IDX), past, Const(0.0 if self.holds is Holds.FACTOR else float("-inf")))


def decay_matrix(tensor: Tensor, view: View) -> DecayMatrix | None:
    """The rates of a constant that is lower triangular; None for a matrix of another kind. Raises: Unrecognised for a triangle of
    factors that do not fall by one rate a step."""
    matrix = view.of(tensor)
    if matrix.dtype == torch.bool or not matrix.is_floating_point() or matrix.shape[-1] != matrix.shape[-2] or not matrix.numel():
        return None
    matrix = matrix.reshape(-1, *matrix.shape[-2:])
    holds = _kind(matrix)
    if holds is None:
        return None
    rates = torch.stack([_rate(head, holds) for head in matrix.double()])
    if not _explains(matrix, holds, rates):
        raise Unrecognised(
            "a constant factor between scores and values is no decay of one rate a head",
            why=f"{matrix.shape[0]} matrices of {matrix.shape[1]} x {matrix.shape[2]} were compared with exp(-rate * (q_idx - kv_idx))",
        )
    if bool((rates < 0).any()):
        raise Unrecognised(
            "the factor between scores and values grows with the distance",
            why=f"its logarithm grows by {-float(rates.min()):.4g} a step",
        )
    return DecayMatrix(view, holds, rates)


_HIDDEN = -1e4  # a logarithm whose exponential is 0 in every floating type


def _kind(matrix: Tensor) -> Holds | None:
    future = torch.ones(matrix.shape[-2:], dtype=torch.bool).triu(1)
    above = matrix[:, future]
    if bool((above == 0).all()) and bool((matrix.diagonal(dim1=-2, dim2=-1) == 1).all()):
        return Holds.FACTOR
    if bool((above <= _HIDDEN).all()) and bool((matrix.diagonal(dim1=-2, dim2=-1) == 0).all()):
        return Holds.LOGARITHM
    return None


def _rate(head: Tensor, holds: Holds) -> Tensor:
    """From the first column, at the greatest distance that still says something."""
    column = head[:, 0]
    logarithm = column.clamp(min=0).log() if holds is Holds.FACTOR else column
    known = (logarithm > -80.0).nonzero().reshape(-1)
    far = int(known[-1]) if len(known) else 0
    return -logarithm[far] / far if far else torch.tensor(800.0 if len(column) > 1 else 0.0, dtype=torch.float64)


def _explains(matrix: Tensor, holds: Holds, rates: Tensor) -> bool:
    """Whether every element is as the rates say, to the rounding of its exponent and of itself."""
    n = matrix.shape[-1]
    if matrix.shape[-2] != n or not matrix.is_floating_point():
        return False
    position = torch.arange(n, dtype=torch.float64)
    distance = position[:, None] - position
    eps: Any = torch.finfo(matrix.dtype)
    for head, rate in zip(matrix, rates.expand(matrix.shape[0]), strict=True):
        exponent = -rate * distance
        past = distance >= 0
        found = head.double()
        if holds is Holds.LOGARITHM:
            right = (found - exponent).abs() <= 4 * eps.eps * exponent.abs()
            hidden = found <= _HIDDEN
        else:
            expected = exponent.clamp(max=0.0).exp() if rate >= 0 else exponent.exp()
            right = (found - expected).abs() <= eps.eps * (4 + 2 * exponent.abs()) * expected + eps.tiny
            hidden = found == 0
        if not bool(torch.where(past, right, hidden).all()):
            return False
    return True

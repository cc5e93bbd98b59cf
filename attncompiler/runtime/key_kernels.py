# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Kernels that copy the rows of keys that a list names, and put gradients back: nothing is added by atomics, nothing waits.

A list holds positions; where it is `guarded`, the program keeps out what is below 0. gathered.py has in torch what they compute."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attncompiler.runtime.row_kernels import ROWS, run, tile_of


@triton.jit
def _row(key, N):
    """The row that a position of a list names."""
    return tl.minimum(tl.maximum(key, 0), N - 1).to(tl.int64)


@triton.jit
def _take_keys(X, Out, Keys, G, L, N, D, x_b, x_g, x_n, x_d, x_group, k_b, k_g, k_n, k_group,
               ROWS: tl.constexpr, CHANNELS: tl.constexpr, GUARDED: tl.constexpr):  # fmt: skip
    pair = tl.program_id(1)
    b = (pair // G).to(tl.int64)
    g = (pair % G).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    listed = place < L
    position = tl.load(Keys + b * k_b + g // k_group * k_g + place.to(tl.int64) * k_n, mask=listed, other=0)
    named = listed & (position >= 0) if GUARDED else listed
    key = _row(position, N)
    channels = tl.arange(0, CHANNELS).to(tl.int64)
    inside = channels[None, :] < D
    at = b * x_b + g // x_group * x_g + key[:, None] * x_n + channels[None, :] * x_d
    x = tl.load(X + at, mask=named[:, None] & inside, other=0)  # a row that is kept out is computed with: no NaN
    rows = pair.to(tl.int64) * L + place
    tl.store(Out + rows[:, None] * D + channels[None, :], x, mask=listed[:, None] & inside)


def take_keys(x: Tensor, keys: Tensor, shape: tuple[int, int, int], guarded: bool) -> Tensor:
    """Rows of x [b or 1, g', N, D] by the lists `keys` [b or 1, g'', L], as [b, g, L, D] with `shape` (b, g, L): each of g' and g''
    serves g / g' or g / g'' neighbours. Zeros where a list names no row."""
    b, g, length = shape
    out = torch.empty((b, g, length, x.shape[3]), dtype=x.dtype, device=x.device)
    if out.numel():
        plain, filled = (t.view(torch.uint8) if t.dtype == torch.bool else t for t in (x, out))
        constants = {"G": g, "L": length, "N": x.shape[2], "D": x.shape[3], **_strides("x", x, g), **_strides("k", keys, g),
                     "GUARDED": guarded}  # fmt: skip
        constants |= tile_of(x.shape[3])
        run(_take_keys, (-(-length // ROWS), b * g), {"X": plain, "Out": filled, "Keys": keys}, constants)
    return out


@triton.jit
def _put_keys(X, Out, Keys, Places, G, L, N, D, o_b, o_g, o_n, o_d,
              ROWS: tl.constexpr, CHANNELS: tl.constexpr, GUARDED: tl.constexpr):  # fmt: skip
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    pair = tl.program_id(1)
    b = (pair // G).to(tl.int64)
    g = (pair % G).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lists = pair.to(tl.int64) * L
    position = tl.load(Keys + lists + place, mask=place < L, other=0)
    before = tl.load(Keys + lists + place - 1, mask=(place > 0) & (place < L), other=0)
    key = _row(position, N)
    first = (place == 0) | (_row(before, N) != key)
    # Of the positions below 0 the last speaks for all: their gradients are alike, 0 or the NaN of a head with an empty row.
    if GUARDED:
        after = tl.load(Keys + lists + place + 1, mask=place + 1 < L, other=0)
        first = (first | (position < 0)) & ((position >= 0) | (after >= 0))
    first = first & (place < L)
    channels = tl.arange(0, CHANNELS).to(tl.int64)
    inside = channels[None, :] < D
    total = tl.zeros([ROWS, CHANNELS], wide)
    again = first  # a row that is named several times is summed by the program of the first, in their order
    step = 0
    while tl.max(again.to(tl.int32), 0) > 0:
        row = tl.load(Places + lists + place + step, mask=again, other=0).to(tl.int64)
        x = tl.load(X + (lists + row)[:, None] * D + channels[None, :], mask=again[:, None] & inside, other=0.0)
        total += x.to(wide)
        step += 1
        again = again & (place + step < L)
        again = again & (_row(tl.load(Keys + lists + place + step, mask=again, other=0), N) == key)
    at = b * o_b + g * o_g + key[:, None] * o_n + channels[None, :] * o_d
    tl.store(Out + at, total.to(Out.dtype.element_ty), mask=first[:, None] & inside)


def put_keys(out: Tensor, x: Tensor, keys: Tensor, guarded: bool) -> None:
    """Rows x [b, g, L, D] to where the lists `keys` [b or 1, g', L] say in out [b, g, N, D], which holds zeros: what is named several
    times is summed, in the order of the list. A position below 0 names row 0; where it is `guarded`, all such rows of x are alike."""
    b, g, length, d = x.shape
    if x.numel() == 0:
        return
    lists = keys.repeat_interleave(g // keys.shape[1], 1) if keys.shape[1] < g else keys
    ordered, places = lists.expand(b, g, length).sort(dim=-1, stable=True)
    tensors = {"X": x, "Out": out, "Keys": ordered, "Places": places}
    strides = dict(zip(("o_b", "o_g", "o_n", "o_d"), out.stride(), strict=True))
    constants = {"G": g, "L": length, "N": out.shape[2], "D": d, **strides, "GUARDED": guarded, **tile_of(d)}
    run(_put_keys, (-(-length // ROWS), b * g), tensors, constants)


def _strides(letter: str, tensor: Tensor, groups: int) -> dict[str, int]:
    """Of b, g, n (and channels), 0 for what all share; and how many groups share one."""
    of_b, of_g, *rest = tensor.stride()
    names = [f"{letter}_{axis}" for axis in ("b", "g", "n", "d")]
    strides = (of_b if tensor.shape[0] > 1 else 0, of_g if tensor.shape[1] > 1 else 0, *rest)
    return {**dict(zip(names, strides, strict=False)), f"{letter}_group": groups // tensor.shape[1]}

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The kernels of rows by list and of rows in parts, for a GPU. rows.py and parted.py have in torch what they
compute."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attncompiler.runtime.launch import Constants, Launch
from attncompiler.tuning.schedule import KernelSchedule

ROWS = 64  # of one program
TILE = 256  # what reads rows by list reads whole tiles, of at most so many
_LISTED = 8192  # queries that a program lists at once: it waits for the count of those before
_LAUNCHES: dict[Hashable, Launch] = {}
_MOST = 512  # launches remembered


def run(kernel: Any, grid: tuple[int, int], tensors: Mapping[str, Tensor | None], constants: Constants, num_warps: int = 4) -> None:
    """Launch a kernel; a tensor that is None is an argument that this variant does not look at."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    device = next(iter(given.values())).device
    key = kernel, grid, device, tuple(constants.values()), tuple((name, tensor.dtype) for name, tensor in given.items())
    launch = _LAUNCHES.get(key)
    if launch is None:
        if len(_LAUNCHES) >= _MOST:
            _LAUNCHES.pop(next(iter(_LAUNCHES)))
        absent = {name: None for name in tensors if name not in given}
        schedule = KernelSchedule(ROWS, ROWS, num_warps, 1)
        launch = Launch(kernel, kernel.__name__, grid, {**constants, **absent}, given, schedule, None, {})
        _LAUNCHES[key] = launch
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(given)
    else:
        launch(given)


@triton.jit
def _list_rows(Active, Index, Count, Place, O, Lse, H, M, D, PAIRS, stride_b, stride_h, stride_m, o_b, o_h, o_m,
               BLOCK: tl.constexpr, WRITES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """One program lists the queries of a batch and head. The others, which run beside these, write what ROWS queries give that are in
    no list."""
    if WRITES and tl.program_id(0) >= PAIRS:
        tiles = tl.cdiv(M, ROWS)
        pair = (tl.program_id(0) - PAIRS) // tiles
        b = (pair // H).to(tl.int64)
        h = (pair % H).to(tl.int64)
        query = (tl.program_id(0) - PAIRS) % tiles * ROWS + tl.arange(0, ROWS)
        at = Active + b * stride_b + h * stride_h + query.to(tl.int64) * stride_m
        absent = tl.load(at, mask=query < M, other=1) == 0
        tl.store(Lse + pair.to(tl.int64) * M + query, float("-inf"), mask=absent)
        channels = tl.arange(0, CHANNELS)
        rows = O + b * o_b + h * o_h + query.to(tl.int64)[:, None] * o_m + channels[None, :]
        nothing = tl.zeros([ROWS, CHANNELS], O.dtype.element_ty)
        tl.store(rows, nothing, mask=absent[:, None] & (channels[None, :] < D))
        return
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    lists = tl.program_id(0).to(tl.int64) * M
    found = 0
    last = 0
    for start in range(0, M, BLOCK):
        query = start + tl.arange(0, BLOCK)
        at = Active + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + query.to(tl.int64) * stride_m
        active = (tl.load(at, mask=query < M, other=0) != 0).to(tl.int32)
        place = found + tl.cumsum(active, 0) - 1
        tl.store(Place + lists + query, tl.where(active != 0, place, -1), mask=query < M)
        tl.store(Index + lists + place, query, mask=active != 0)
        found += tl.sum(active, 0)
        last = tl.maximum(last, tl.max(query * active, 0))
    tl.store(Count + tl.program_id(0), found)
    for start in range(found // BLOCK * BLOCK, M, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(Index + lists + place, tl.zeros([BLOCK], tl.int32) + last, mask=(place >= found) & (place < M))


def list_rows(active: Tensor, outputs: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The lists [2, b, h, q_idx] of `active`, bool [b, h, q_idx], index and places, and their lengths [b, h]; int32. `outputs`: O
    [b, h, q_idx, D] with dense channels, and lse [b, h, q_idx]; those of queries in no list become 0 and -inf."""
    b, h, m = active.shape
    lists = torch.empty((2, b, h, m), dtype=torch.int32, device=active.device)
    index, place = lists
    count = torch.empty((b, h), dtype=torch.int32, device=active.device)
    if active.numel():
        o, lse = outputs or (None, None)
        d = 1 if o is None else o.shape[3]
        strides = dict(zip(("stride_b", "stride_h", "stride_m"), active.stride(), strict=True)) | _strides("o", _or_none(o)[:3])
        tensors = {"Active": active.view(torch.uint8), "Index": index, "Count": count, "Place": place, "O": o, "Lse": lse}
        block = min(_LISTED, 1 << (m - 1).bit_length())
        warps = max(1, min(block // 512, 8))
        constants = {"H": h, "M": m, "D": d, "PAIRS": b * h, **strides, "BLOCK": block, "WRITES": o is not None, **tile_of(d)}
        programs = b * h * (1 if o is None else 1 + -(-m // ROWS))
        run(_list_rows, (programs, 1), tensors, constants, num_warps=warps)
    return lists, count


@triton.jit
def _take_rows(X, Out, Index, Count, Gain, Summed, GradGain, Lse, LseRows, H, M, D, x_b, x_h, x_m, x_d, g_b, g_h, g_m, a_b, a_h, a_m,
               ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, GAINS: tl.constexpr, GRADS: tl.constexpr,
               STATISTICS: tl.constexpr, FILL: tl.constexpr):  # fmt: skip
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    pair = tl.program_id(1)
    b = (pair // H).to(tl.int64)
    h = (pair % H).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = tl.load(Count + pair)
    listed = place < count
    written = place < (M if FILL else tl.minimum((count + TILE - 1) // TILE * TILE, M))
    rows = pair.to(tl.int64) * M + place
    query = tl.load(Index + rows, mask=listed, other=0).to(tl.int64)
    if STATISTICS:
        lse = tl.load(Lse + pair.to(tl.int64) * M + query, mask=listed, other=0.0 if FILL else float("-inf"))
        tl.store(LseRows + rows, lse, mask=place < M)
    channels = tl.arange(0, CHANNELS)
    inside = channels[None, :] < D
    at = X + b * x_b + h * x_h + query[:, None] * x_m + channels[None, :] * x_d
    x = tl.load(at, mask=listed[:, None] & inside, other=0.0)
    if GRADS:
        summed = tl.load(Summed + rows[:, None] * D + channels[None, :], mask=listed[:, None] & inside, other=0.0)
        along = tl.sum(x.to(wide) * summed.to(wide), 1)
        tl.store(GradGain + b * a_b + h * a_h + query * a_m, along.to(GradGain.dtype.element_ty), mask=listed)
    if GAINS:
        gain = tl.load(Gain + b * g_b + h * g_h + query * g_m, mask=listed, other=0.0)
        x = x.to(wide) * gain.to(wide)[:, None]
    tl.store(Out + rows[:, None] * D + channels[None, :], x.to(Out.dtype.element_ty), mask=written[:, None] & inside)


def take_rows(
    x: Tensor, index: Tensor, count: Tensor, gain: Tensor | None = None, summed: Tensor | None = None, along: Tensor | None = None,
    lse: Tensor | None = None, fill: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Rows of x [b, h, q_idx, D] by list, times a gain of each [b, h, q_idx]; and lse by list, as [b, h, q_idx]. Past the end of a list
    both are 0; without `fill` rows only as far as what reads tiles can come, and lse is -inf. For `summed` [b, h, q_idx, D], by list,
    its product with each row before the gain is put into `along` [b, h, q_idx], where the row came from."""
    b, h, m, d = x.shape
    out = torch.empty((b, h, m, d), dtype=x.dtype, device=x.device)
    lse_rows = None if lse is None else torch.empty_like(lse)
    if x.numel():
        tensors = {"X": x, "Out": out, "Index": index, "Count": count, "Gain": gain, "Summed": summed, "GradGain": along,
                   "Lse": lse, "LseRows": lse_rows}  # fmt: skip
        strides = {**_strides("x", x.stride()), **_strides("g", _or_none(gain)), **_strides("a", _or_none(along))}
        variant = {"GAINS": gain is not None, "GRADS": along is not None, "STATISTICS": lse is not None, "FILL": fill}
        constants = {"H": h, "M": m, "D": d, **strides, "TILE": TILE, **variant, **tile_of(d)}
        run(_take_rows, (-(-m // ROWS), b * h), tensors, constants)
    return out, lse_rows


@triton.jit
def _put_rows(X, Out, Place, Gain, LseRows, Lse, H, M, D, o_b, o_h, o_m, g_b, g_h, g_m,
              ROWS: tl.constexpr, CHANNELS: tl.constexpr, GAINS: tl.constexpr, STATISTICS: tl.constexpr,
              NAN_IF_EMPTY: tl.constexpr):  # fmt: skip
    wide = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    pair = tl.program_id(1)
    b = (pair // H).to(tl.int64)
    h = (pair % H).to(tl.int64)
    query = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    place = tl.load(Place + pair.to(tl.int64) * M + query, mask=query < M, other=-1)
    listed = place >= 0
    rows = pair.to(tl.int64) * M + place
    channels = tl.arange(0, CHANNELS)
    inside = channels[None, :] < D
    x = tl.load(X + rows[:, None] * D + channels[None, :], mask=listed[:, None] & inside, other=0.0)
    if GAINS:
        gain = tl.load(Gain + b * g_b + h * g_h + query * g_m, mask=listed, other=0.0)
        x = tl.where(listed[:, None], x.to(wide) * gain.to(wide)[:, None], 0.0)
    if STATISTICS:
        lse = tl.load(LseRows + rows, mask=listed, other=float("-inf"))
        tl.store(Lse + pair.to(tl.int64) * M + query, lse, mask=query < M)
        if NAN_IF_EMPTY:
            x = tl.where((listed & (lse == float("-inf")))[:, None], float("nan"), x)
    at = Out + b * o_b + h * o_h + query[:, None] * o_m + channels[None, :]
    tl.store(at, x.to(Out.dtype.element_ty), mask=(query[:, None] < M) & inside)


def put_rows(
    x: Tensor, place: Tensor, gain: Tensor | None = None, lse_rows: Tensor | None = None, nan_if_empty: bool = False,
    heads_first: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Rows of x [b, h, q_idx, D] back to where they came from, times a gain of each, 0 elsewhere; `lse_rows` [b, h, q_idx]
    likewise, -inf elsewhere. `nan_if_empty`: a row whose lse is -inf is NaN. In memory
    [b, h, q_idx, D], or [b, q_idx, h, D] without `heads_first`."""
    b, h, m, d = x.shape
    strides = (h * m * d, m * d, d, 1) if heads_first else (h * m * d, d, h * d, 1)
    out = torch.empty_strided((b, h, m, d), strides, dtype=x.dtype, device=x.device)
    lse = put_rows_into(out, x, place, gain, lse_rows, nan_if_empty)
    return out, lse


def put_rows_into(
    out: Tensor, x: Tensor, place: Tensor, gain: Tensor | None = None, lse_rows: Tensor | None = None, nan_if_empty: bool = False
) -> Tensor | None:
    """As `put_rows`, into `out` [b, h, q_idx, D] of any strides with dense channels, every row of which is written. Returns lse."""
    b, h, m, d = x.shape
    lse = None if lse_rows is None else torch.empty_like(lse_rows)
    if x.numel():
        tensors = {"X": x, "Out": out, "Place": place, "Gain": gain, "LseRows": lse_rows, "Lse": lse}
        constants = {"H": h, "M": m, "D": d, **_strides("o", out.stride()[:3]), **_strides("g", _or_none(gain)), "GAINS": gain is not None,
                     "STATISTICS": lse is not None, "NAN_IF_EMPTY": nan_if_empty}  # fmt: skip
        run(_put_rows, (-(-m // ROWS), b * h), tensors, {**constants, **tile_of(d)})
    return lse


def _or_none(x: Tensor | None) -> tuple[int, ...]:
    """Strides over b, h and q_idx; 0 for what is not there."""
    return (0, 0, 0) if x is None else x.stride()


def _strides(letter: str, strides: Sequence[int]) -> dict[str, int]:
    return {f"{letter}_{axis}": stride for axis, stride in zip("bhmd", strides, strict=False)}


def tile_of(channels: int) -> dict[str, int]:
    """How many rows a program of a kernel moves, and how many channels it holds of each."""
    return {"ROWS": ROWS, "CHANNELS": 1 << (channels - 1).bit_length()}


@triton.jit
def _join_rows(First, FirstLse, Second, SecondLse, Out, Lse, H, M, D, f_b, f_h, f_m, s_b, s_h, s_m, o_b, o_h, o_m, l_b, l_h,
               ROWS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < M
    at = tl.program_id(1).to(tl.int64) * M + row
    first = tl.load(FirstLse + at, mask=inside, other=float("-inf"))
    second = tl.load(SecondLse + at, mask=inside, other=float("-inf"))
    most = tl.maximum(first, second)
    shift = tl.where(most == float("-inf"), 0.0, most)
    first = tl.exp(first - shift)
    second = tl.exp(second - shift)
    total = first + second
    tl.store(Lse + b * l_b + h * l_h + row, most + tl.log(total), mask=inside)
    scale = tl.where(total > 0.0, 1.0 / total, 0.0)
    channels = tl.arange(0, CHANNELS)[None, :]
    there = inside[:, None] & (channels < D)
    row = row.to(tl.int64)[:, None]
    x = tl.load(First + b * f_b + h * f_h + row * f_m + channels, mask=there, other=0.0).to(total.dtype)
    y = tl.load(Second + b * s_b + h * s_h + row * s_m + channels, mask=there, other=0.0).to(total.dtype)
    joined = x * (first * scale)[:, None] + y * (second * scale)[:, None]
    tl.store(Out + b * o_b + h * o_h + row * o_m + channels, joined.to(Out.dtype.element_ty), mask=there)


def join_rows_into(out: Tensor, lse: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
    """O and lse of all keys from those of some and of the others, into `out` [b, h, q_idx, D] and `lse` [b, h, q_idx] of any strides with
    dense channels and rows. The lse of the parts are contiguous."""
    (x, x_lse), (y, y_lse) = first, second
    b, h, m, d = out.shape
    if out.numel():
        tensors = {"First": x, "FirstLse": x_lse, "Second": y, "SecondLse": y_lse, "Out": out, "Lse": lse}
        strides = {**_strides("f", x.stride()[:3]), **_strides("s", y.stride()[:3]), **_strides("o", out.stride()[:3])}
        constants = {"H": h, "M": m, "D": d, **strides, **_strides("l", lse.stride()[:2])}
        run(_join_rows, (-(-m // ROWS), b * h), tensors, {**constants, **tile_of(d)})


@triton.jit
def _add_rows(First, Second, Out, H, M, D, f_b, f_h, f_m, s_b, s_h, s_m, o_b, o_h, o_m,
              ROWS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    channels = tl.arange(0, CHANNELS)[None, :]
    there = (row < M) & (channels < D)
    row = row.to(tl.int64)
    x = _wide(tl.load(First + b * f_b + h * f_h + row * f_m + channels, mask=there))
    y = _wide(tl.load(Second + b * s_b + h * s_h + row * s_m + channels, mask=there))
    tl.store(Out + b * o_b + h * o_h + row * o_m + channels, (x + y).to(Out.dtype.element_ty), mask=there)


@triton.jit
def _wide(x):
    if x.dtype.primitive_bitwidth < 32:
        return x.to(tl.float32)
    else:
        return x


def add_rows_into(out: Tensor, first: Tensor, second: Tensor) -> None:
    """The sum of two tensors [b, h, rows, D] into `out`, in float32 where they are narrower; dense channels, any strides else."""
    b, h, m, d = out.shape
    if out.numel():
        tensors = {"First": first, "Second": second, "Out": out}
        strides = {**_strides("f", first.stride()[:3]), **_strides("s", second.stride()[:3]), **_strides("o", out.stride()[:3])}
        run(_add_rows, (-(-m // ROWS), b * h), tensors, {"H": h, "M": m, "D": d, **strides, **tile_of(d)})

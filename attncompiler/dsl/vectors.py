"""What every declared attention asks of its queries, keys and values."""

from __future__ import annotations

from torch import Tensor

from attncompiler.errors import DeviceError, OptionError


def check_vectors(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    """q [B, H, M, D], k [B, Hk, N, D], v [B, Hk, N, Dv], of one floating dtype, on one device; Hk is H, or divides it with
    `enable_gqa`. Raises: OptionError, DeviceError."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise OptionError(f"{name} has {tensor.dim()} dimensions", do=f"give {name} as [B, H, N, D], as SDPA takes it")
        if tensor.dtype != q.dtype or not tensor.dtype.is_floating_point:
            raise OptionError(f"{name} is {tensor.dtype}, q is {q.dtype}", do="give q, k and v in one floating dtype")
        if tensor.device != q.device:
            raise DeviceError(f"{name} is on {tensor.device}, q is on {q.device}", do="move all operands to one device")
    (b, h, _, d), shapes = q.shape, f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if k.shape[0] != b or v.shape[0] != b or k.shape[3] != d or k.shape[1:3] != v.shape[1:3]:
        raise OptionError(
            f"shapes that do not fit: {shapes}", why="q [B, H, M, D], k [B, Hk, N, D] and v [B, Hk, N, Dv] are needed"
        )
    if k.shape[1] != h and (not enable_gqa or k.shape[1] == 0 or h % k.shape[1]):
        do = "pass enable_gqa=True to share keys between heads" if k.shape[1] and h % k.shape[1] == 0 else ""
        raise OptionError(f"{h} heads of queries and {k.shape[1]} of keys: {shapes}", do=do)

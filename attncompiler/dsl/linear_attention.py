"""The declared form of linear attention: `linear_attention(q, k, v, decay=..., feature_map=...)`. It calls the op of states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from attncompiler.dsl.vectors import check_vectors
from attncompiler.errors import DeviceError, OptionError
from attncompiler.passes.nodes import DTYPES
from attncompiler.runtime import state_op as _op  # noqa: F401  registers the op


@dataclass(frozen=True)
class RowSum:
    """A normaliser: O is divided by max(row, least) + eps, row being the sum over the keys that a query sees of its product with
    each, decayed as these are; `absolute`: |row| in its place."""

    eps: float = 1e-6
    absolute: bool = False
    least: float = -math.inf


@dataclass(frozen=True)
class StateValue:
    """What the keys so far have left: `state` [B, H, D, Dv], and with a normaliser `row`, the sum of keys [B, H, D]."""

    state: Tensor
    row: Tensor | None = None


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor | None = ..., feature_map: Callable[[Tensor], Tensor] | None = ...,
    normaliser: RowSum | None = ..., scale: float = ..., causal: bool = ..., initial_state: StateValue | None = ...,
    enable_gqa: bool = ..., return_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor | None = ..., feature_map: Callable[[Tensor], Tensor] | None = ...,
    normaliser: RowSum | None = ..., scale: float = ..., causal: bool = ..., initial_state: StateValue | None = ...,
    enable_gqa: bool = ..., return_state: Literal[True],
) -> tuple[Tensor, StateValue]: ...  # fmt: skip
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    feature_map: Callable[[Tensor], Tensor] | None = None,
    normaliser: RowSum | None = None,
    scale: float = 1.0,
    causal: bool = True,
    initial_state: StateValue | None = None,
    enable_gqa: bool = False,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, StateValue]:
    """O[i] = scale * sum over the keys j of exp(sum of decay[j + 1 .. i]) (q[i] . k[j]) v[j], in time and memory linear in N.

    q [B, H, M, D], k [B, Hk, N, D], v [B, Hk, N, Dv], of one floating dtype; with `enable_gqa` Hk may divide H. `decay`: natural
    logarithms, of each head [H] or of each head and token [B, H, N], at most 0; differentiable, as are q, k, v and the initial
    state. `feature_map` is applied to q and k. `causal`: a query sees the keys up to its own, and M = N; else all keys, decayed to
    the last. `initial_state` is what earlier keys left, as `return_state` gave it: a prompt and then one token at a time is the
    same as the whole sequence at once. Returns O [B, H, M, Dv], and with `return_state` the state after the last key, float32.

    Raises: OptionError for shapes, dtypes or options that do not fit, and on a CPU for a positive decay; DeviceError for tensors on
    different devices."""
    if feature_map is not None:
        q, k = feature_map(q), feature_map(k)
    _check(q, k, v, causal, enable_gqa)
    operands = [q, k, v]
    (b, h, m, c), (hk, n), d = q.shape, k.shape[1:3], v.shape[3]
    steps = "N" if causal else "M"
    declared = [f"q: {_name(q)}[B, {h}, {steps}, {c}]", f"k: {_name(k)}[B, {hk}, N, {c}]", f"v: {_name(v)}[B, {hk}, N, {d}]"]
    clauses = ""
    if initial_state is not None:
        extra, clauses = _start(initial_state, normaliser, q, (b, h, c, d))
        for name, tensor, shape in extra:
            operands.append(tensor)
            declared.append(f"{name}: {_name(tensor)}[{shape}]")
    if decay is not None:
        _check_decay(decay, q, n)
        operands.append(decay)
        by_head = decay.dim() == 1
        declared.append(f"g: {_name(decay)}[{f'{h}' if by_head else f'B, {h}, N'}]")
        clauses += f"  decay exp(g[{'h' if by_head else 'b, h, kv_idx'}])\n"
    head = "h" if hk == h else f"h // {h // hk}"
    scaled = "" if scale == 1.0 else f" * {float(scale)!r}"
    text = (
        f"state\n  axes b=B, h={h}, q_idx={steps}, kv_idx=N, c={c}, d={d}\n  read {', '.join(declared)}\n{clauses}"
        f"  write k[b, {head}, kv_idx, c], v[b, {head}, kv_idx, d]\n"
        f"  query q[b, h, q_idx, c]{scaled} after {'q_idx' if causal else 'N - 1'}\n"
    )
    if normaliser is not None:
        text += f"  weigh {_weigh(normaliser)}\n"
    sizes = [b, n] if causal else [b, m, n]
    o: Tensor
    o, final, row = torch.ops.attncompiler.state(operands, sizes, text.replace("\n", "\\n"))
    if not return_state:
        return o
    return o, StateValue(final.squeeze(1), row.squeeze(1) if normaliser is not None else None)


def _name(tensor: Tensor) -> str:
    return DTYPES[tensor.dtype].value


def _weigh(normaliser: RowSum) -> str:
    row = "row[b, h, q_idx]"
    row = f"abs({row})" if normaliser.absolute else row
    row = row if normaliser.least == -math.inf else f"maximum({row}, {float(normaliser.least)!r})"
    return f"{row} + {float(normaliser.eps)!r}" if normaliser.eps else row


def _start(
    initial: StateValue, normaliser: RowSum | None, q: Tensor, shape: tuple[int, int, int, int]
) -> tuple[list[tuple[str, Tensor, str]], str]:
    """The operands of an initial state: name, tensor and declared shape; and the clause that reads them."""
    _, h, c, d = shape
    _check_tensor("initial_state.state", initial.state, q, shape)
    found = [("s0", initial.state, f"B, {h}, {c}, {d}")]
    clause = "s0[b, h, c, d]"
    if (initial.row is None) != (normaliser is None):
        has, needs = ("no row", "a normaliser needs one") if initial.row is None else ("a row", "only a normaliser has one")
        raise OptionError(f"initial_state has {has}", why=needs, do="give what a call with the same normaliser returned")
    if initial.row is not None:
        _check_tensor("initial_state.row", initial.row, q, shape[:3])
        found.append(("z0", initial.row, f"B, {h}, {c}"))
        clause += ", z0[b, h, c]"
    return found, f"  start {clause}\n"


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, enable_gqa: bool) -> None:
    check_vectors(q, k, v, enable_gqa)
    if causal and q.shape[2] != k.shape[2]:
        raise OptionError(
            f"causal=True with {q.shape[2]} queries and {k.shape[2]} keys",
            why="each query sees the keys up to its own",
            do="give what earlier keys left as initial_state, or causal=False for queries that see all keys",
        )


def _check_decay(decay: Tensor, q: Tensor, keys: int) -> None:
    b, h = q.shape[:2]
    if decay.dim() != 1:
        _check_tensor("decay", decay, q, (b, h, keys))
    else:
        _check_tensor("decay", decay, q, (h,))
    if not torch.compiler.is_compiling() and decay.device.type == "cpu" and bool((decay > 0).any()):
        raise OptionError(
            "decay has a positive logarithm",
            why="decay is the natural logarithm of the factor of each step: above 0 the state grows with the length",
            do="give -rate for a rate, or factor.log() for a factor",
        )


def _check_tensor(name: str, tensor: Tensor, q: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape) or not tensor.dtype.is_floating_point:
        needed = f"a floating tensor of shape {list(shape)}" + (" or [H]" if name == "decay" and len(shape) == 3 else "")
        raise OptionError(f"{name} is {tensor.dtype} of shape {list(tensor.shape)}", why=f"{needed} is needed")
    if tensor.device != q.device:
        raise DeviceError(f"{name} is on {tensor.device}, q is on {q.device}", do="move all operands to one device")

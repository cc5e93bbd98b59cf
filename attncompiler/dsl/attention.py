"""The declared form: `attention(q, k, v, keep=..., score=...)`. It builds the program that recognition would, and runs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from attncompiler.dsl.masks import Captured, Mask, adopt, as_mask, check_reads, rename
from attncompiler.dsl.plain import Score, plain
from attncompiler.dsl.routing import HeadRoute, with_route
from attncompiler.dsl.selection import TopKeys, check
from attncompiler.dsl.trace import traced
from attncompiler.dsl.vectors import check_vectors
from attncompiler.errors import DeviceError, OptionError
from attncompiler.ir.expr import (
    AXES,
    KV_IDX,
    ONE,
    Q_IDX,
    TRUE,
    B,
    Const,
    Dot,
    Expr,
    H,
    Read,
    Uniform,
    apply,
    floordiv,
    mul,
    reads_of,
)
from attncompiler.ir.program import Attention, Axes, Empty, Keep, Softmax, TensorDecl
from attncompiler.ir.text import to_line
from attncompiler.ir.verify import verify
from attncompiler.passes.nodes import DTYPES
from attncompiler.passes.nothing_kept import nothing_kept, nothing_kept_by_positions
from attncompiler.runtime import ops as _ops  # noqa: F401  registers the op


@dataclass(frozen=True)
class Declared:
    """A program with the tensors that its mask and score read, in the order of its operands."""

    program: Attention
    text: str
    captured: tuple[Tensor, ...]


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, keep: Mask | Callable[..., Any] | None = ..., score: Score | None = ...,
    select: TopKeys | None = ..., route: HeadRoute | None = ..., scale: float | None = ..., dropout_p: float = ..., enable_gqa: bool = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, keep: Mask | Callable[..., Any] | None = ..., score: Score | None = ...,
    select: TopKeys | None = ..., route: HeadRoute | None = ..., scale: float | None = ..., dropout_p: float = ..., enable_gqa: bool = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Mask | Callable[..., Any] | None = None,
    score: Score | None = None,
    select: TopKeys | None = None,
    route: HeadRoute | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the keys that `keep` keeps, differentiable in q, k, v and the floating tensors that `score` reads.

    q [B, H, M, D], k [B, Hk, N, D], v [B, Hk, N, Dv], of one floating dtype and on one device. `keep`: a mask of
    `attncompiler.masks`, or a function (b, h, q_idx, kv_idx) -> bool. `score`: (score, b, h, q_idx, kv_idx) -> score, of the scaled
    product. `select`: keys chosen from the data (`attncompiler.select`), of which those that `keep` keeps. `route`: heads switched and
    scaled for each query (`attncompiler.route`), differentiable in the gains. `scale`: default D ** -0.5. With `enable_gqa` Hk may
    divide H. A query that keeps no key gives zero. Returns O [B, H, M, Dv], and with `return_lse` the natural log of each row's sum,
    float32 [B, H, M], -inf where a head is off.

    Raises: OptionError for shapes or options that do not fit, DeviceError for tensors on different devices, InvalidProgram for a
    `keep` or `score` that is no function of positions."""
    if torch.compiler.is_dynamo_compiling():
        _check(q, k, v, route, scale, dropout_p, enable_gqa)
        return plain(q, k, v, None if keep is None else as_mask(keep), score, select, route, scale, dropout_p, return_lse)
    declared = declare(
        q, k, v, keep=keep, score=score, select=select, route=route, scale=scale, dropout_p=dropout_p, enable_gqa=enable_gqa
    )
    operands = [q, k, v, *declared.captured]
    if dropout_p > 0.0:
        operands.append(torch.randint(-(2**62), 2**62, [1], dtype=torch.int64, device=q.device))
    o, lse, _ = torch.ops.attncompiler.attention.default(operands, [], declared.text, True)
    return (o, lse) if return_lse else o


def declare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Mask | Callable[..., Any] | None = None,
    score: Score | None = None,
    select: TopKeys | None = None,
    route: HeadRoute | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
) -> Declared:
    """The program of a call of `attention`."""
    _check(q, k, v, route, scale, dropout_p, enable_gqa)
    unrouted = _unrouted(q, k, v, keep, score, select, scale, dropout_p)
    if route is None:
        return unrouted
    gate, active = route.operands(q)
    program, text = with_route(unrouted.program, DTYPES[gate.dtype], tuple(gate.shape), tuple(active.shape))
    return Declared(program, text, (*unrouted.captured, gate, active))


def _unrouted(
    q: Tensor, k: Tensor, v: Tensor, keep: Mask | Callable[..., Any] | None, score: Score | None, select: TopKeys | None,
    scale: float | None, dropout_p: float,
) -> Declared:  # fmt: skip
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    key = (_shape(q), _shape(k), _shape(v), scale, dropout_p)
    if score is not None or select is not None or not (keep is None or (isinstance(keep, Mask) and keep.is_fixed)):
        return _declare(
            q, k, v, keep, score, select, scale, dropout_p
        )  # a function may read other tensors or numbers than last time
    known = _KNOWN.get((id(keep), key))
    if known is not None:
        return known[0]
    declared = _declare(q, k, v, keep, score, None, scale, dropout_p)
    if len(_KNOWN) >= _MOST:
        _KNOWN.pop(next(iter(_KNOWN)))
    _KNOWN[(id(keep), key)] = declared, keep
    return declared


# programs by the very mask, which is held, so that no other object gets its id meanwhile
_KNOWN: dict[Hashable, tuple[Declared, object]] = {}
_MOST = 256


def _shape(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype


def _declare(
    q: Tensor, k: Tensor, v: Tensor, keep: Mask | Callable[..., Any] | None, score: Score | None, select: TopKeys | None, scale: float,
    dropout_p: float,
) -> Declared:  # fmt: skip
    b, h, m, _ = q.shape
    n, groups = k.shape[2], h // k.shape[1]
    extents = dict(zip(AXES, (b, h, m, n), strict=True))
    kv_head: Expr = H if groups == 1 else floordiv(H, Const(groups))
    product: Expr = Dot(Read("q", (B, H, Q_IDX)), Read("k", (B, kv_head, KV_IDX)))
    scores = mul(product, Const(scale)) if scale != 1.0 else product
    captured: dict[str, Tensor] = {"q": q, "k": k, "v": v}
    if score is not None:
        examples = [torch.zeros(()), *(torch.zeros((), dtype=torch.int64) for _ in AXES)]
        changed, tensors = traced(score, [scores, *AXES], examples, extents)
        scores = rename(changed, adopt(captured, tensors))
    predicate: Expr = TRUE
    if keep is not None:
        found, tensors = as_mask(keep).rule(extents)
        predicate = rename(found, adopt(captured, tensors))
    adjust: Expr = ONE
    if dropout_p > 0.0:
        dropped = apply("ge", Uniform(Read("seed", (Const(0),))), Const(float(dropout_p)))
        adjust = apply("where", dropped, Const(1.0 / (1.0 - dropout_p)), Const(0.0))
    used = [name for name in captured if name in "qkv" or any(r.tensor == name for r in reads_of(scores) + reads_of(predicate))]
    _check_captured(captured, used, q, scores, predicate, extents)
    if keep is not None:
        _warn_of_nothing(
            as_mask(keep), predicate, {name: captured[name] for name in {r.tensor for r in reads_of(predicate)}}, extents
        )
    decls = [TensorDecl(name, DTYPES[captured[name].dtype], tuple(Const(size) for size in captured[name].shape)) for name in used]
    if dropout_p > 0.0:
        decls.append(TensorDecl("seed", DTYPES[torch.int64], (Const(1),)))
    program = Attention(
        axes=Axes(*(Const(extents[axis]) for axis in AXES)),
        tensors=tuple(decls),
        score=scores,
        keep=Keep(predicate, Empty.ZERO) if predicate != TRUE else Keep(),
        weigh=Softmax(),
        adjust=adjust,
        sum=Read("v", (B, kv_head, KV_IDX)),
    )
    if select is not None:
        check(select, q, k)
        program = replace(program, keep=replace(program.keep, empty=Empty.ZERO))
        program = select.listed(program, h, m, captured)
        program = replace(program, tensors=tuple(sorted(program.tensors, key=lambda decl: decl.name == "seed")))  # the last operand
    verify(program)
    read = (decl.name for decl in program.tensors if decl.name not in ("q", "k", "v", "seed"))
    return Declared(program, to_line(program), tuple(captured[name] for name in read))


def _warn_of_nothing(mask: Mask, predicate: Expr, read: Captured, extents: dict[Any, int]) -> None:
    """A warning, once for a mask and its sizes, where no query keeps a key. A mask on a GPU is not looked at: that would wait."""
    b, h, m, n = (extents[axis] for axis in AXES)
    shape = b, h, m, n
    if any(tensor.device.type != "cpu" for tensor in read.values()) or (str(mask), shape) in _WARNED:
        return
    if read and not mask.is_fixed:
        return  # read anew at each call: looking at each would cost more than the warning is worth
    if nothing_kept_by_positions(predicate, shape) if not read else nothing_kept(predicate, read, shape):
        _WARNED.add((str(mask), shape))
        warnings.warn(
            f"the mask {mask} keeps no key for any of {b} x {h} x {m} queries over {n} keys: the output is zero\n"
            "  do:  see mask.show(B, H, M, N) of its parts; parts that exclude one another are joined by |, not &",
            stacklevel=6,
        )


_WARNED: set[Hashable] = set()


def _check(
    q: Tensor, k: Tensor, v: Tensor, route: HeadRoute | None, scale: float | None, dropout_p: float, enable_gqa: bool
) -> None:
    check_vectors(q, k, v, enable_gqa)
    if isinstance(scale, Tensor):
        raise OptionError("scale is a tensor", why="as a number it would have no gradient", do="multiply q by it, with scale=1.0")
    if not 0.0 <= dropout_p < 1.0:
        raise OptionError(f"dropout_p is {dropout_p}", do="give a probability from 0 to below 1")
    if isinstance(route, HeadRoute):
        route.check(q)
    elif route is not None:
        raise OptionError(f"route is {route!r}", do="give what attncompiler.route makes: route=attncompiler.route(gain)")


def _check_captured(
    captured: dict[str, Tensor], used: list[str], q: Tensor, scores: Expr, predicate: Expr, extents: dict[Any, int]
) -> None:
    """Captured tensors must lie on q's device and be long enough for the positions that they are read at."""
    for name in used:
        if captured[name].device != q.device:
            where = captured[name].device
            raise DeviceError(f"{name} of the mask or score is on {where}, q is on {q.device}", do="mask.to(q.device) moves it")
    check_reads((scores, predicate), {name: captured[name] for name in used if name not in "qkv"}, extents)

"""Heads switched and scaled for each query: `attention(q, k, v, route=route(gain, active))`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attncompiler.errors import DeviceError, OptionError
from attncompiler.ir.expr import Q_IDX, ZERO, B, Const, Expr, H, Read
from attncompiler.ir.program import Attention, Dtype, Route, TensorDecl
from attncompiler.ir.text import to_line
from attncompiler.ir.verify import verify

_Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class HeadRoute:
    """What `route` makes: a gain for each batch, head and query, and where a head is used at all."""

    gain: Tensor
    active: Tensor | None

    def operands(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The gains in q's dtype, and where a head is on, bool; each [B or 1, H or 1, M or 1], the gains as wide as what is on."""
        gain = _spread(self.gain)
        active = gain != 0 if self.active is None else _spread(self.active)
        return gain.to(q.dtype).expand(torch.broadcast_shapes(gain.shape, active.shape)), active

    def check(self, q: Tensor) -> None:
        """Raises: OptionError where a gain or `active` does not fit q [B, H, M, D]; DeviceError."""
        wide = q.shape[:3]
        for name, tensor in (("gain", self.gain), ("active", self.active)):
            if tensor is None:
                continue
            if any(size not in (1, whole) for size, whole in zip(_spread(tensor).shape, wide, strict=True)):
                b, h, m = wide
                raise OptionError(
                    f"the {name} of route is {list(tensor.shape)}, for q {list(q.shape)}",
                    do=f"give [{b}, {h}, {m}] (batch, head, query), [{b}, {h}] or [{h}]; 1 stands for all",
                )
            if tensor.device != q.device:
                raise DeviceError(
                    f"the {name} of route is on {tensor.device}, q is on {q.device}", do="move all operands to one device"
                )


def route(gain: Tensor, active: Tensor | None = None) -> HeadRoute:
    """Which heads a query uses, and how strongly: O is `gain` times the attention where `active`, elsewhere 0, with lse -inf.

    `gain`: floating, [B, H, M], [B, H] or [H]; a size may be 1. It has a gradient, and is rounded to the dtype of q. `active`: bool, of
    such a shape; by default where the gain is not 0, so a gain that is to be learnt from 0 needs `active`. A head that is off for a
    query is not computed for it: nothing gets a gradient through it, its gain neither, and NaN in its query or gain reaches nothing. A
    query may use no head, and a head no query. Keys and values are not routed. Source: Jin et al. 2024, MoH.

    Raises: OptionError."""
    if not isinstance(gain, Tensor) or not gain.is_floating_point():
        raise OptionError(f"the gain of route is {_named(gain)}", do="give a floating tensor; of a 0/1 mask, mask.to(q.dtype)")
    if active is not None and (not isinstance(active, Tensor) or active.dtype != torch.bool):
        raise OptionError(f"active of route is {_named(active)}", do="give a bool tensor, True where a query uses a head")
    for name, tensor in (("gain", gain), ("active", active)):
        if tensor is not None and tensor.dim() not in (1, 2, 3):
            raise OptionError(f"the {name} of route has {tensor.dim()} dimensions", do="give [B, H, M], [B, H] or [H]")
    return HeadRoute(gain, active)


def _named(given: object) -> str:
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


def _spread(x: Tensor) -> Tensor:
    """[B, H, M], [B, H] or [H] -> [B, H, M], with 1 for what is not there."""
    return x[None, :, None] if x.dim() == 1 else x[:, :, None] if x.dim() == 2 else x


@functools.lru_cache(maxsize=1024)
def with_route(program: Attention, dtype: Dtype, gain: _Shape, active: _Shape) -> tuple[Attention, str]:
    """The program with a route, and its text. `gain` and `active`: shapes of what `HeadRoute.operands` gives, which are the operands
    after those of the program, but before the seed of its dropout."""
    taken, reads, decls = set(program.decls), [], []
    for wish, kind, shape in (("gate", dtype, gain), ("active", Dtype.BOOL, active)):
        name = next(n for i in range(1, len(taken) + 2) if (n := wish if i == 1 else f"{wish}{i}") not in taken)
        decls.append(TensorDecl(name, kind, tuple(Const(size) for size in shape)))
        index: list[Expr] = [axis if size != 1 else ZERO for axis, size in zip((B, H, Q_IDX), shape, strict=True)]
        reads.append(Read(name, tuple(index)))
    tensors = sorted((*program.tensors, *decls), key=lambda decl: decl.name == "seed")
    routed = verify(replace(program, tensors=tuple(tensors), route=Route(active=reads[1], gain=reads[0])))
    return routed, to_line(routed)

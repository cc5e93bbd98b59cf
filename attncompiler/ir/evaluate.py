"""Evaluate an expression over a block of positions with torch: the one evaluator of the interpreter and the portable lowering."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attncompiler.errors import InvalidProgram
from attncompiler.ir.expr import AXES, Apply, Axis, Const, Dot, Expr, Read, Size, Uniform, axes_of

Value = Tensor | bool | int | float


def _filled(value: Value, device: torch.device | None, dtype: torch.dtype | None = None) -> Tensor:
    """A number on a device; written there, since a copy to a GPU waits for it."""
    assert not isinstance(value, Tensor)
    return torch.full((), value, dtype=dtype, device=device)


def _as_tensor(value: Value) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)


def _rounded(dtype: torch.dtype) -> Callable[[Value], Value]:
    def run(value: Value) -> Value:
        exact = _as_tensor(value)
        return exact.to(dtype).to(exact.dtype)

    return run


def _to_float(value: Value) -> Value:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else value.to(torch.float64)
    return float(value)


TORCH: Mapping[str, Callable[..., Value]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "neg": lambda a: -a, "pow": lambda a, b: a**b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a if isinstance(a, Tensor) else not a,
    "where": lambda c, a, b: torch.where(c, a, b) if isinstance(c, Tensor) else (a if c else b),
    "minimum": lambda a, b: torch.minimum(*_pair(a, b)), "maximum": lambda a, b: torch.maximum(*_pair(a, b)),
    "abs": abs,
    "exp": lambda a: torch.exp(_as_tensor(a)), "log": lambda a: torch.log(_as_tensor(a)),
    "sqrt": lambda a: torch.sqrt(_as_tensor(a)),
    "rsqrt": lambda a: torch.rsqrt(_as_tensor(a)), "tanh": lambda a: torch.tanh(_as_tensor(a)),
    "sigmoid": lambda a: torch.sigmoid(_as_tensor(a)), "sin": lambda a: torch.sin(_as_tensor(a)),
    "cos": lambda a: torch.cos(_as_tensor(a)), "floor": lambda a: torch.floor(_as_tensor(a)),
    "ceil": lambda a: torch.ceil(_as_tensor(a)), "erf": lambda a: torch.erf(_as_tensor(a)),
    "to_float": _to_float, "to_int": lambda a: a.to(torch.int64) if isinstance(a, Tensor) else int(a),
    "to_bool": lambda a: a.to(torch.bool) if isinstance(a, Tensor) else bool(a),
    "round_f16": _rounded(torch.float16), "round_bf16": _rounded(torch.bfloat16),
}  # fmt: skip


def _pair(left: Value, right: Value) -> tuple[Tensor, Tensor]:
    device = next((x.device for x in (left, right) if isinstance(x, Tensor)), None)
    a, b = torch.broadcast_tensors(*(x if isinstance(x, Tensor) else _filled(x, device) for x in (left, right)))
    common = torch.promote_types(a.dtype, b.dtype)
    return a.to(common), b.to(common)


_MASK32 = 0xFFFFFFFF


def _fmix32(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on 32-bit words held in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


LARGEST_UNIFORM = 1.0 - 2.0**-24


def uniform(seed: Tensor, row: Tensor, kv_idx: Tensor) -> Tensor:
    """The stream of `Uniform`: float32 in [0, 1), the same on every lowering and device.

    `row` is (b * H + h) * M + q_idx. One 32-bit hash per row, one more per pair; the top 24 bits make the number."""
    seed = seed.to(torch.int64)
    state = _fmix32((row & _MASK32) ^ (seed & _MASK32))
    state = _fmix32(state ^ ((row >> 32) & _MASK32) ^ ((seed >> 32) & _MASK32))
    bits = _fmix32((state + kv_idx * 0x9E3779B9) & _MASK32)
    return (bits >> 8).to(torch.float32) * 2.0**-24


@dataclass
class Block:
    """A box of positions and the operands, over which expressions are evaluated.

    `positions` maps an axis name to an int64 tensor of shape [.., 1, ..] along that axis' place; in an attention that is its place
    in (b, h, q_idx, kv_idx). Results broadcast to the box. Floating operands are read in `dtype`; `sizes` holds the run-time
    integers, `extents` those of the axes.
    """

    tensors: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    extents: Mapping[str, int]
    positions: Mapping[str, Tensor]
    dtype: torch.dtype
    memo: dict[Expr, Value] = field(default_factory=dict)

    def __call__(self, expr: Expr) -> Value:
        if expr not in self.memo:
            self.memo[expr] = self._evaluate(expr)
        return self.memo[expr]

    def tensor(self, expr: Expr) -> Tensor:
        """The value as a tensor that broadcasts to the box."""
        value = self(expr)
        if isinstance(value, Tensor):
            return value
        device = next((tensor.device for tensor in (*self.positions.values(), *self.tensors.values())), None)
        dtype = self.dtype if isinstance(value, float) else None
        return _filled(value, device, dtype)

    def _evaluate(self, expr: Expr) -> Value:
        if isinstance(expr, Const):
            return self._held(expr.value)
        if isinstance(expr, Axis):
            return self.positions[expr.name]
        if isinstance(expr, Size):
            return self.sizes[expr.name]
        if isinstance(expr, Read):
            return self._element(expr)
        if isinstance(expr, Dot):
            left, right = self.vectors(expr.left), self.vectors(expr.right)
            return torch.matmul(left.squeeze(3), right.squeeze(2).transpose(-1, -2))
        if isinstance(expr, Uniform):
            extents, at = self.extents, self.positions
            row, column = (at["b"] * extents["h"] + at["h"]) * extents["q_idx"] + at["q_idx"], at["kv_idx"]
            if expr.at:
                row, column = (self.tensor(place) for place in expr.at)
            return uniform(self.tensors[expr.seed.tensor].reshape(()), row, column).to(self.dtype)
        assert isinstance(expr, Apply)
        args = [self(arg) for arg in expr.args]
        if expr.op == "to_float" and isinstance(args[0], Tensor):
            return args[0].to(self.dtype)
        if expr.op == "where" and isinstance(args[0], Tensor) and not any(isinstance(a, Tensor) for a in args[1:]):
            args[1:] = [_filled(a, args[0].device, self.dtype if isinstance(a, float) else None) for a in args[1:]]
        if expr.op == "div":
            args = [a.to(self.dtype) if isinstance(a, Tensor) and not a.is_floating_point() else a for a in args]
        if expr.op == "pow" and isinstance(args[0], float) and isinstance(args[1], Tensor) and not args[1].is_floating_point():
            args[1] = args[1].to(self.dtype)  # torch would give float32 whatever the working precision
        return TORCH[expr.op](*args)

    def _held(self, value: Value) -> Value:
        """A finite literal stays finite in the working precision: float32's lowest number would be -inf in bfloat16."""
        if not isinstance(value, float) or not math.isfinite(value):
            return value
        largest = torch.finfo(self.dtype).max
        return min(max(value, -largest), largest)

    def _element(self, read: Read) -> Tensor:
        value = self._at(read)
        return value.to(self.dtype) if value.is_floating_point() else value

    def vectors(self, read: Read) -> Tensor:
        """A vector read over its box: [b, h, q_idx, kv_idx, D], with size 1 along axes that it does not vary with."""
        value = self._at(read).to(self.dtype)
        return value.reshape((1,) * (5 - value.dim()) + value.shape)

    def _at(self, read: Read) -> Tensor:
        """tensor[index] by plain slices where each axis indexes its own dimension, else by gathering."""
        tensor = self.tensors[read.tensor]
        if not read.index:
            return tensor
        index = []
        for entry, extent in zip(read.index, tensor.shape, strict=False):
            value = self(entry)
            outside = not isinstance(entry, Axis) or self.extents[entry.name] > extent
            if isinstance(value, Tensor) and axes_of(entry) and outside:
                # a branch of `where` may read outside; its value is never used there
                value = value.to(torch.int64).clamp(0, max(extent - 1, 0))
            index.append(value)
        if not any(isinstance(value, Tensor) for value in index):
            found = tensor[tuple(int(value) for value in index if not isinstance(value, Tensor))]
            return found.reshape((1, 1, 1, 1, *found.shape)) if found.dim() else found
        device = tensor.device
        return tensor[tuple(v.to(device) if isinstance(v, Tensor) else _filled(v, device) for v in index)]


def whole(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, int], extents: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> Block:
    """The box of all positions of an attention."""
    return box(tensors, sizes, {axis.name: extents[axis.name] for axis in AXES}, dtype, device)


def box(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, int], extents: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> Block:
    """The box of all positions of some axes, one dimension each, in the order of `extents`."""
    positions = {}
    for place, (name, extent) in enumerate(extents.items()):
        shape = [1] * len(extents)
        shape[place] = extent
        positions[name] = torch.arange(extent, device=device).reshape(shape)
    return Block(tensors, sizes, extents, positions, dtype)


def integer(expr: Expr, sizes: Mapping[str, int]) -> int:
    """An expression of sizes and literals as a number (symbolic sizes stay symbolic).

    Raises: InvalidProgram if it depends on anything else."""
    if isinstance(expr, Const) and type(expr.value) is int:
        return expr.value
    if isinstance(expr, Size):
        return sizes[expr.name]
    if isinstance(expr, Apply):
        result = TORCH[expr.op](*(integer(arg, sizes) for arg in expr.args))
        assert not isinstance(result, Tensor)
        return result  # type: ignore[return-value]
    raise InvalidProgram("a size depends on a position or a tensor")

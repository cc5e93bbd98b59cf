"""States of every kind that has a lowering, and how a lowering is judged on them: shared by the tests of all lowerings."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from attncompiler.codegen.recurrence import Recurrence, recurrence_of
from attncompiler.ir import parse_program, verify
from attncompiler.ir.interpret_state import interpret_state
from attncompiler.ir.state import State
from tests.programs import DTYPES

# name: (decay, start, query's step, weigh, further reads)
STATES = {
    "plain": ("", "", "after q_idx", "", ""),
    "a decay a head": ("exp(-rate[h])", "", "after q_idx", "", ", rate: f32[4]"),
    "a decay a token": ("exp(g[b, h, kv_idx])", "", "after q_idx", "", ", g: f32[2, 4, {n}]"),
    "a decay a token, laid out by tokens": ("exp(g[b, kv_idx, h] * 0.5)", "", "after q_idx", "", ", g: {dtype}[2, {n}, 4]"),
    "before the own key": (
        "exp(g[b, h, kv_idx])", "s0[b, h, c, d]", "before q_idx", "", ", g: f32[2, 4, {n}], s0: f32[2, 4, {c}, {d}]",
    ),
    "started": ("exp(-rate[h])", "s0[b, h, c, d]", "after q_idx", "", ", rate: f32[4], s0: f32[2, 4, {c}, {d}]"),
    "normalised": ("", "", "after q_idx", "row[b, h, q_idx] + 1e-06", ""),
    "normalised and started": (
        "exp(g[b, h, kv_idx])", "s0[b, h, c, d], z0[b, h, c]", "after q_idx", "maximum(abs(row[b, h, q_idx]), 0.5)",
        ", g: f32[2, 4, {n}], s0: f32[2, 4, {c}, {d}], z0: f32[2, 4, {c}]",
    ),
    "all keys": ("", "", "after {n} - 1", "row[b, h, q_idx] + 1e-06", ""),
    "all keys, started": ("", "s0[b, h, c, d]", "after {n} - 1", "", ", s0: f32[2, 4, {c}, {d}]"),
    "all keys, decayed": (
        "exp(g[b, h, kv_idx])", "s0[b, h, c, d]", "after {n} - 1", "", ", g: f32[2, 4, {n}], s0: f32[2, 4, {c}, {d}]",
    ),
}  # fmt: skip
SIZES = [(1, 16, 16), (5, 16, 24), (33, 8, 40), (150, 32, 16), (300, 16, 16)]  # steps, features, channels


def state(name: str, n: int, c: int, d: int, dtype: str = "f32") -> State:
    """One of STATES at a size; two query heads share a key."""
    decay, start, step, weigh, reads = STATES[name]
    sizes = {"n": n, "c": c, "d": d, "dtype": dtype}
    clauses = [f"start {start}"] * bool(start) + [f"decay {decay}"] * bool(decay)
    text = "\n".join([
        "state",
        f"axes b=2, h=4, q_idx={n}, kv_idx={n}, c={c}, d={d}",
        f"read q: {dtype}[2, 4, {n}, {c}], k: {dtype}[2, 2, {n}, {c}], v: {dtype}[2, 2, {n}, {d}]" + reads.format(**sizes),
        *clauses,
        "write k[b, h // 2, kv_idx, c], v[b, h // 2, kv_idx, d]",
        f"query q[b, h, q_idx, c] * 0.25 {step.format(**sizes)}",
        *([f"weigh {weigh}"] * bool(weigh)),
    ])  # fmt: skip
    work = verify(parse_program(text)).phases[0].work
    assert isinstance(work, State)
    return work


def operands(program: State, strided: bool = False, device: str = "cpu") -> dict[str, Tensor]:
    """Random operands; rates and logarithms of a decay, features of keys and queries positive where they are divided by."""
    made = {}
    for decl in program.tensors:
        shape = [int(size.value) for size in decl.shape]  # type: ignore[attr-defined]
        made[decl.name] = torch.randn(shape)
        if decl.name == "rate":
            made[decl.name] = torch.tensor([0.0, 0.01, 0.2, 3.0])
        if decl.name == "g":
            made[decl.name] = -0.3 * made[decl.name].abs() - (made[decl.name] > 2.0) * 40.0
        if program.normalised and decl.name in ("q", "k", "z0"):
            made[decl.name] = made[decl.name].abs()
        made[decl.name] = made[decl.name].to(device, DTYPES[decl.dtype.value])
        if strided and len(shape) == 4:
            made[decl.name] = _with_gaps(made[decl.name])
    return made


def _with_gaps(x: Tensor) -> Tensor:
    """The same numbers with heads inside tokens and gaps between rows."""
    b, h, n, d = x.shape
    return x.new_empty(b, n, h, d + 3)[..., :d].transpose(1, 2).copy_(x)


def results(
    program: State, tensors: Mapping[str, Tensor], weights: Mapping[int, Tensor], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What the interpreter gives in a precision, and the gradients of sum(weights * results)."""
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    found = interpret_state(program, leaves, {}, dtype)
    total = sum((found[i] * weights[i].to(dtype)).sum() for i in range(len(found)))
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return found, dict(zip(leaves, gradients, strict=True))


def judge(lowering: ModuleType, program: State, strided: bool = False, slack: float = 1.0, device: str = "cpu") -> None:
    """Forward and gradients of a lowering: at most twice the error of the same formula in the operands' precision, and rounding."""
    parts = recurrence_of(program)
    tensors = operands(program, strided, device)
    exact_of = {name: tensor.double() for name, tensor in tensors.items()}
    shapes = [tuple(r.shape) for r in interpret_state(program, exact_of, {})]
    weights = {i: torch.randn(shape, device=device) for i, shape in enumerate(shapes)}
    weights[0] = weights[0].to(tensors["v"].dtype)
    exact, exact_gradients = results(program, exact_of, weights, torch.float64)
    working = tensors["v"].dtype
    eager, eager_gradients = results(program, tensors, weights, working)
    o, final, z, rows = lowering.forward(parts, tensors, {})
    for name, found, right, plain in zip(("o", "final", "z"), (o, final, z), exact, eager, strict=False):
        assert found.shape == right.shape
        check(name, found, right, plain, slack)
    gradients = lowering.backward(
        parts, tensors, {}, o, rows, weights[0], weights[1], weights.get(2), frozenset(parts.differentiable)
    )
    assert set(gradients) == set(tensors)
    for name, found in gradients.items():
        assert found.shape == tensors[name].shape and found.dtype == tensors[name].dtype
        check(f"the gradient of {name}", found, exact_gradients[name], eager_gradients[name], slack)


def check(name: str, found: Tensor, exact: Tensor, eager: Tensor, slack: float = 1.0) -> None:
    assert not found.isnan().any(), name
    scale = float(exact.detach().abs().max()) if exact.numel() else 0.0
    error, budget = ((x.detach().double() - exact.detach()).abs().max().item() if exact.numel() else 0.0 for x in (found, eager))
    limit = slack * 2 * budget + 8 * torch.finfo(found.dtype).eps * scale + 1e-12
    assert error <= limit, f"{name}: {error:.3g} of {scale:.3g}, allowed {limit:.3g}"


def recurrence(name: str, n: int, c: int, d: int, dtype: str = "f32") -> Recurrence:
    return recurrence_of(state(name, n, c, d, dtype))

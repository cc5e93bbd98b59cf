"""Programs of every clause, and how a lowering is judged on them: shared by the tests of all lowerings."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from attncompiler.ir import Attention, interpret, parse, verify

DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "bool": torch.bool, "i64": torch.int64, "i32": torch.int32,
}  # fmt: skip
DOT = "dot(q[b, h, q_idx], k[b, h // 2, kv_idx])"
CAUSAL = "kv_idx <= q_idx"

# name: (score, keep, weigh, adjust, further reads)
PROGRAMS = {
    "plain": (f"{DOT} * 0.25", "", "softmax", "", ""),
    "window": (f"{DOT} * 0.25", f"({CAUSAL}) & (q_idx - kv_idx < 7) else nan", "softmax", "", ""),
    "empty rows give 0": (f"{DOT} * 0.25", "(kv_idx >= 3) & (kv_idx < q_idx) else zero", "softmax", "", ""),
    "empty rows are uniform": (
        f"where(({CAUSAL}) & mask[b, kv_idx], {DOT} * 0.25, -3.4028234663852886e+38)",
        f"({CAUSAL}) & mask[b, kv_idx] else score", "softmax", "", ", mask: bool[2, {n}]",
    ),
    "a finite causal mask": (f"where({CAUSAL}, {DOT} * 0.25, -3.4028234663852886e+38)", f"{CAUSAL} else score", "softmax", "", ""),
    "documents": (
        f"{DOT} * 0.25", f"({CAUSAL}) & (document[q_idx] == document[kv_idx]) else nan", "softmax", "", ", document: i32[{both}]",
    ),
    "pair bias and slopes": (
        f"{DOT} * 0.25 + bias[h, q_idx, kv_idx] - slope[h] * 0.1 * (q_idx - kv_idx)", "", "softmax", "",
        ", bias: f32[4, {m}, {n}], slope: f32[4]",
    ),
    "relative positions": (f"{DOT} * 0.25 + table[h, q_idx - kv_idx + {{n}}]", "", "softmax", "", ", table: f32[4, {both}]"),
    "bias of each key": (f"{DOT} * 0.25 + bias[b, kv_idx]", "", "softmax", "", ", bias: f32[2, {n}]"),
    "temperature of each query": (f"{DOT} * 0.1 * scale[h, q_idx]", "", "softmax", "", ", scale: f32[4, {m}]"),
    "sinks": (f"{DOT} * 0.25", f"{CAUSAL} else nan", "softmax(sink[h], 0.0)", "", ", sink: f32[4]"),
    "dropout": (f"{DOT} * 0.25", "", "softmax", "where(uniform(seed[0]) >= 0.25, 1.3333333333333333, 0.0)", ", seed: i64[1]"),
    "softcap": (f"tanh({DOT} * 0.25 / 3.0) * 3.0", f"{CAUSAL} else nan", "softmax", "", ""),
    "a term of each query": (
        f"{DOT} * 0.25 + dot(q[b, h, q_idx], common[h])", f"{CAUSAL} else nan", "softmax", "", ", common: {dtype}[4, {d}]",
    ),
    "a read that is guarded": (
        f"where(kv_idx < 5, {DOT} * 0.25, {DOT} * 0.25 + late[kv_idx - 5])", "", "softmax", "", ", late: f32[{n}]",
    ),
}  # fmt: skip
SIZES = [(1, 1, 16, 16), (1, 130, 16, 16), (33, 70, 80, 48), (48, 33, 16, 24)]  # queries, keys, size of q and k, of v


def program(name: str, m: int, n: int, d: int, dv: int, dtype: str = "f32") -> Attention:
    """One of PROGRAMS at a size; two query heads share a key."""
    score, keep, weigh, adjust, reads = PROGRAMS[name]
    clauses = [f"keep {keep}"] * bool(keep) + [f"weigh {weigh}"] + [f"adjust {adjust}"] * bool(adjust)
    sizes = {"m": m, "n": n, "both": m + n, "d": d, "dtype": dtype}
    text = f"""attention
      axes b=2, h=4, q_idx={m}, kv_idx={n}
      read q: {dtype}[2, 4, {m}, {d}], k: {dtype}[2, 2, {n}, {d}], v: {dtype}[2, 2, {n}, {dv}]{reads.format(**sizes)}
      score {score.format(**sizes) if "{" in score else score}
    """
    return verify(parse(text + "\n".join([*clauses, "sum v[b, h // 2, kv_idx]"])))


def operands(p: Attention, device: str = "cpu", strided: bool = False) -> dict[str, Tensor]:
    """Random values; `strided` leaves gaps between channels."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for decl in p.tensors:
        shape = [int(size.value) for size in decl.shape]  # type: ignore[attr-defined]
        dtype = DTYPES[decl.dtype.value]
        if dtype is torch.bool:
            made[decl.name] = torch.rand(shape, generator=generator) > 0.4
        elif dtype is torch.int32:
            made[decl.name] = torch.randint(0, 4, shape, generator=generator, dtype=dtype).sort().values
        elif dtype is torch.int64:
            made[decl.name] = torch.randint(0, 2**40, shape, generator=generator)
        elif strided:
            made[decl.name] = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)[..., ::2]
        else:
            made[decl.name] = torch.randn(shape, generator=generator).to(dtype)
    if device == "cpu":
        return made
    return {name: _moved(t, device) for name, t in made.items()}


def _moved(tensor: Tensor, device: str) -> Tensor:
    """On another device with the same strides."""
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return there.copy_(tensor)


def _reference(p: Attention, made: dict[str, Tensor], grads: tuple[Tensor, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """O, lse and every gradient in plain torch at one precision."""
    leaves = {k: x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for k, x in made.items()}
    out = interpret(p, leaves, {}, dtype)
    finite = torch.where(torch.isfinite(out.lse), out.lse, 0.0)
    loss = (torch.nan_to_num(out.o) * grads[0].to(dtype)).sum() + (finite * grads[1].to(dtype)).sum()
    found = torch.autograd.grad(loss, [leaves[name] for name in p.differentiable])
    return {"o": out.o, "lse": out.lse, **dict(zip(p.differentiable, found, strict=True))}


def judge(lowering: ModuleType, p: Attention, device: str = "cpu", strided: bool = False) -> None:
    """Forward and backward against float64: at most twice the error of eager plus rounding; two runs bitwise equal."""
    judge_on(lowering, p, operands(p, device, strided))


def judge_on(lowering: ModuleType, p: Attention, made: dict[str, Tensor], runs: int = 2) -> None:
    """The same on given operands; `runs` of them must give the same bits."""
    precision = made["v"].dtype
    rows, dv = made["q"].shape[:3], made["v"].shape[-1]
    generator = torch.Generator().manual_seed(1)
    grads = tuple(torch.randn(shape, generator=generator).to(made["v"].device) for shape in ((*rows, dv), tuple(rows)))
    grad_o = grads[0].to(precision)
    results = []
    for _ in range(runs):
        o, lse, rcp = lowering.forward(p, made, {})
        found = lowering.backward(p, made, {}, o, lse, rcp, grad_o, grads[1], frozenset(p.differentiable))
        results.append({"o": o, "lse": lse, **found})
    exact, eager = (_reference(p, made, (grad_o, grads[1]), dtype) for dtype in (torch.float64, precision))
    top = torch.where(exact["lse"].abs() < 1e30, exact["lse"], 0.0).abs().amax()
    for name, value in exact.items():
        ours = results[0][name]
        again = results[-1][name]
        assert torch.equal(ours.nan_to_num(), again.nan_to_num()), f"{name} differs between two runs"
        assert ours.shape == value.shape
        kept = torch.isfinite(value)
        assert torch.equal(torch.isfinite(ours), kept), f"{name} is finite elsewhere"
        if not kept.any():
            continue
        error, allowed = ((x.double() - value)[kept].abs().max() for x in (ours, eager[name]))
        # a weight is recomputed from a score that may round otherwise than the forward's: that moves it by eps * |score|
        rounding = torch.finfo(ours.dtype).eps * (8 + top) * value[kept].abs().max() + 4e-6
        if error > 2 * allowed + rounding and value.numel() <= _FEW and name in made:
            allowed = torch.stack([allowed, *_errors_of_other_draws(p, made, name)]).max()
        assert error <= 2 * allowed + rounding, f"{name}: {error:.2e}, eager {allowed:.2e}"


_FEW = 16  # numbers: how far eager is off in so few, each a sum of thousands of rounded terms, is luck


def _errors_of_other_draws(p: Attention, made: dict[str, Tensor], name: str) -> list[Tensor]:
    """The largest error of one gradient in eager's precision, for gradients of O and lse drawn anew."""
    value, found = made["v"], []
    for seed in range(2, 6):
        generator = torch.Generator().manual_seed(seed)
        shapes = (*made["q"].shape[:3], value.shape[-1]), tuple(made["q"].shape[:3])
        of_o, of_lse = (torch.randn(shape, generator=generator).to(value.device) for shape in shapes)
        drawn = of_o.to(value.dtype), of_lse
        exact, eager = (_reference(p, made, drawn, dtype)[name] for dtype in (torch.float64, value.dtype))
        found.append((eager.double() - exact)[torch.isfinite(exact)].abs().max())
    return found

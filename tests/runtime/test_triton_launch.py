"""The kernels against the float64 interpreter: under TRITON_INTERPRET=1 in CI, on the device with `-m gpu`."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from attncompiler.ir import Attention, interpret, parse, verify
from attncompiler.runtime import triton_launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "bool": torch.bool, "i64": torch.int64}
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
    "pair bias and slopes": (
        f"{DOT} * 0.25 + bias[h, q_idx, kv_idx] - slope[h] * (q_idx - kv_idx)", "", "softmax", "",
        ", bias: f32[4, {m}, {n}], slope: f32[4]",
    ),
    "bias of each key": (f"{DOT} * 0.25 + bias[b, kv_idx]", "", "softmax", "", ", bias: f32[2, {n}]"),
    "temperature of each query": (f"{DOT} * 0.1 * scale[h, q_idx]", "", "softmax", "", ", scale: f32[4, {m}]"),
    "sinks": (f"{DOT} * 0.25", f"{CAUSAL} else nan", "softmax(sink[h], 0.0)", "", ", sink: f32[4]"),
    "dropout": (f"{DOT} * 0.25", "", "softmax", "where(uniform(seed[0]) >= 0.25, 1.3333333333333333, 0.0)", ", seed: i64[1]"),
    "softcap": (f"tanh({DOT} * 0.25 / 3.0) * 3.0", f"{CAUSAL} else nan", "softmax", "", ""),
}  # fmt: skip
SIZES = [(1, 1, 16, 16), (1, 130, 16, 16), (33, 70, 80, 48), (48, 33, 16, 24)]


def program(name: str, m: int, n: int, d: int, dv: int, dtype: str = "f32") -> Attention:
    score, keep, weigh, adjust, reads = PROGRAMS[name]
    clauses = [f"keep {keep}"] * bool(keep) + [f"weigh {weigh}"] + [f"adjust {adjust}"] * bool(adjust)
    text = f"""attention
      axes b=2, h=4, q_idx={m}, kv_idx={n}
      read q: {dtype}[2, 4, {m}, {d}], k: {dtype}[2, 2, {n}, {d}], v: {dtype}[2, 2, {n}, {dv}]{reads.format(m=m, n=n)}
      score {score}
    """
    return verify(parse(text + "\n".join([*clauses, "sum v[b, h // 2, kv_idx]"])))


def operands(p: Attention, device: str, strided: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {}
    for decl in p.tensors:
        shape = [int(size.value) for size in decl.shape]
        dtype = DTYPES[decl.dtype.value]
        if dtype is torch.bool:
            made[decl.name] = torch.rand(shape, device=device) > 0.4
        elif dtype is torch.int64:
            made[decl.name] = torch.randint(0, 2**40, shape, device=device)
        elif strided:
            made[decl.name] = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)[..., ::2]
        else:
            made[decl.name] = torch.randn(shape, device=device).to(dtype)
    return made


def reference(p: Attention, made: dict[str, Tensor], grads: tuple[Tensor, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """O, lse and every gradient in plain torch at one precision."""
    leaves = {k: x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for k, x in made.items()}
    out = interpret(p, leaves, {}, dtype)
    finite = torch.where(torch.isfinite(out.lse), out.lse, 0.0)
    loss = (torch.nan_to_num(out.o) * grads[0].to(dtype)).sum() + (finite * grads[1].to(dtype)).sum()
    found = torch.autograd.grad(loss, [leaves[name] for name in p.differentiable])
    return {"o": out.o, "lse": out.lse, **dict(zip(p.differentiable, found, strict=True))}


def check(p: Attention, device: str, strided: bool = False) -> None:
    """At most twice the error of eager plus rounding; two runs bitwise equal."""
    made = operands(p, device, strided)
    precision = made["v"].dtype
    grads = (
        torch.randn(2, 4, *made["q"].shape[2:3], made["v"].shape[-1], device=device),
        torch.randn(made["q"].shape[:3], device=device),
    )
    grad_o = grads[0].to(precision)
    runs = []
    for _ in range(2):
        o, lse, rcp = triton_launch.forward(p, made, {})
        found = triton_launch.backward(p, made, {}, o, lse, rcp, grad_o, grads[1], frozenset(p.differentiable))
        runs.append({"o": o, "lse": lse, **found})
    exact, eager = (reference(p, made, (grad_o, grads[1]), dtype) for dtype in (torch.float64, precision))
    finite_lse = torch.where(exact["lse"].abs() < 1e30, exact["lse"], 0.0).abs().amax()
    for name, value in exact.items():
        ours = runs[0][name]
        assert torch.equal(ours.nan_to_num(), runs[1][name].nan_to_num()), f"{name} differs between two runs"
        assert ours.shape == value.shape
        assert torch.equal(torch.isfinite(ours), torch.isfinite(value)), f"{name} is finite elsewhere"
        kept = torch.isfinite(value)
        error, allowed = (
            (x.double() - value)[kept].abs().max() if kept.any() else value.new_zeros(()) for x in (ours, eager[name])
        )
        largest = value[kept].abs().max() if kept.any() else 0.0
        # a weight is recomputed from a score that may round otherwise than the forward's: that moves it by eps * |score|
        rounding = torch.finfo(ours.dtype).eps * (8 + finite_lse) * largest
        assert error <= 2 * allowed + rounding + 4e-6, f"{name}: {error:.2e}, eager {allowed:.2e}"


@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_kernels_in_the_interpreter() -> None:
    """Triton decides when it is imported whether to interpret: the cases below run in a process of their own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", __file__]
    inner = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert inner.returncode == 0, inner.stdout[-3000:]


@pytest.mark.skipif(not INTERPRETED, reason="runs in the inner process of test_kernels_in_the_interpreter")
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_and_gradients(name: str, sizes: tuple[int, int, int, int]) -> None:
    check(program(name, *sizes), "cpu")


@pytest.mark.skipif(not INTERPRETED, reason="runs in the inner process of test_kernels_in_the_interpreter")
@pytest.mark.parametrize("dtype", ["f32", "f16"])  # the interpreter multiplies bfloat16 as the integers that it keeps them in
def test_strided_operands(dtype: str) -> None:
    check(program("window", 33, 70, 80, 48, dtype), "cpu", strided=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU here")
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_on_the_gpu(name: str, dtype: str) -> None:
    check(program(name, 257, 300, 80, 48, dtype), "cuda")

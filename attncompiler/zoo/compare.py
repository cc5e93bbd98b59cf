"""Both forms of a system, run: whether they agree with float64 as well as eager does, and how long they take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from attncompiler.state_region import StateUse
from attncompiler.zoo.programs import Call
from attncompiler.zoo.system import Example, System, bound

_REPEATS = 3
# What float64 eager attention holds at once for each pair: scores, their masked copy, weights and two gradients.
_COPIES = 5


@dataclass(frozen=True)
class Outcome:
    """One form: the first call, with compilation, and the median of those after it. `error` is the largest of the output and of
    each gradient, over the largest exact value there; `of_budget` the largest share of what is allowed: twice eager's error plus
    rounding. Both are None where there is no float64 to compare with."""

    form: str
    first_s: float
    forward_ms: float
    backward_ms: float
    error: float | None
    of_budget: float | None

    @property
    def agrees(self) -> bool:
        return self.of_budget is None or self.of_budget <= 1.0


def eager_bytes(calls: Sequence[Call | StateUse]) -> int:
    """What eager attention in float64 takes at most, forward and backward."""
    pairs = [call.extents[0] * call.extents[1] * call.extents[2] * call.keys for call in calls]
    return max(pairs, default=0) * torch.float64.itemsize * _COPIES


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that is free; of this machine, half of all."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def compare(
    system: System, example: Example, device: torch.device, dtype: torch.dtype, judged: bool = True, inner: str = "inductor"
) -> Iterator[Outcome]:
    """The plain form eager, the plain form compiled and the declared form, one after the other as they are done.

    Without `judged` the plain form is not run eagerly, and nothing is compared with float64."""
    inputs = example.drawn(dtype, device)
    plain = bound(system.plain, example.numbers, device)
    torch.compiler.reset()
    compiled = torch.compile(plain, backend="attncompiler", options={"inner": inner}, dynamic=False)
    forms: list[tuple[str, Callable[..., Any]]] = [
        ("plain, compiled", compiled), ("declared", bound(system.declared, example.numbers, device)),
    ]  # fmt: skip
    exact: list[Tensor] = []
    allowed: list[float] = []
    if judged:
        wide = tuple(t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs)
        exact = _results(plain, wide)
        forms.insert(0, ("plain, eager", plain))
    for form, call in forms:
        start = time.perf_counter()
        found = _results(call, inputs)
        _finish(device)
        first = time.perf_counter() - start
        errors = [float((ours.double() - right).abs().max()) for ours, right in zip(found, exact, strict=judged)]
        largest = [max(float(right.abs().max()), torch.finfo(dtype).tiny) for right in exact]
        if judged and not allowed:
            eps = torch.finfo(dtype).eps
            allowed = [2 * error + 8 * eps * most for error, most in zip(errors, largest, strict=True)]
        error = max((e / most for e, most in zip(errors, largest, strict=True)), default=None)
        share = max((e / most for e, most in zip(errors, allowed, strict=True)), default=None)
        yield Outcome(form, first, *_times(call, inputs, device), error, share)


def _leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in inputs if t.requires_grad]


def _results(form: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradient of each floating input."""
    out = form(*inputs)
    return [out.detach(), *torch.autograd.grad(out, _leaves(inputs), _upstream(out))]


def _upstream(out: Tensor) -> Tensor:
    """The same gradient for every precision, but for rounding."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)


def _times(form: Callable[..., Any], inputs: Sequence[Tensor], device: torch.device) -> tuple[float, float]:
    """Milliseconds of a forward and of a backward."""
    forwards, backwards = [], []
    for _ in range(_REPEATS):
        _finish(device)
        start = time.perf_counter()
        out = form(*inputs)
        _finish(device)
        middle = time.perf_counter()
        upstream = torch.ones_like(out)
        _finish(device)
        again = time.perf_counter()
        torch.autograd.grad(out, _leaves(inputs), upstream)
        _finish(device)
        forwards.append(middle - start)
        backwards.append(time.perf_counter() - again)
    return 1e3 * median(forwards), 1e3 * median(backwards)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

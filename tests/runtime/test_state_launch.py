"""The kernels of states against float64: in Triton's interpreter in CI, on the device with `-m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from attncompiler.codegen.recurrence import recurrence_of
from attncompiler.runtime import state_call, state_launch
from attncompiler.runtime.state_lowering import unsupported
from attncompiler.tuning.state_schedule import ChunkSchedule, StateSchedule
from tests.states import STATES, judge, operands, recurrence, state

WITH_KERNELS = [name for name in STATES if not unsupported(recurrence(name, 5, 16, 16))]
SIZES = [(1, 16, 16), (33, 8, 40), (45, 32, 16)]  # steps, features, channels
ON_DEVICE = [(1, 16, 16), (129, 64, 64), (1000, 128, 128), (700, 40, 200), (1500, 64, 128)]
DTYPES = ["bf16", "f16", "f32"]
SMALL = StateSchedule(ChunkSchedule(16, 16, 4, 1), ChunkSchedule(16, 16, 4, 1), "ieee")


@pytest.mark.interpreted
@pytest.mark.parametrize("name", WITH_KERNELS)
@pytest.mark.parametrize(("sizes", "cut"), [(SIZES[0], False), (SIZES[1], True), (SIZES[2], False)], ids=str)
def test_forward_and_gradients(name: str, sizes: tuple[int, int, int], cut: bool) -> None:
    with _small(32 if cut else 1 << 20):
        judge(state_launch, state(name, *sizes))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", ["f32", "f16"])  # the interpreter multiplies bfloat16 as the integers that it keeps them in
def test_strided_operands(dtype: str) -> None:
    judge(state_launch, state("started", 33, 24, 16, dtype), strided=True)


@contextmanager
def _small(segment: int) -> Iterator[None]:
    with (
        mock.patch.object(state_call, "choose_state_schedule", lambda *_: SMALL),
        mock.patch.object(state_call, "segment_length", lambda *_: segment),
        mock.patch.object(state_call, "_CALLS", {}),
    ):
        yield


@pytest.mark.interpreted
@pytest.mark.parametrize("cut", [False, True])
def test_a_gradient_is_the_same_alone(cut: bool) -> None:
    """Kernels make what is wanted only, and that with the same bits."""
    program = state("before the own key", 33, 8, 24)
    parts, made = recurrence_of(program), operands(program)
    above, last = torch.randn(2, 4, 33, 24), torch.randn(2, 1, 4, 8, 24)
    with _small(16 if cut else 1 << 20):
        o, _, _, rows = state_launch.forward(parts, made, {})

        def gradients(*wanted: str) -> dict[str, Tensor]:
            return state_launch.backward(parts, made, {}, o, rows, above, last, None, frozenset(wanted))

        whole = gradients("q", "k", "v", "s0")
        for name, right in whole.items():
            assert torch.equal(gradients(name)[name], right), name


@pytest.mark.interpreted
@pytest.mark.parametrize("decay", ["0.9", "exp(g[b, h, kv_idx] - 0.01)"])
def test_logarithms_that_are_evaluated_first(decay: str) -> None:
    with (
        mock.patch.dict(STATES, {"other": (decay, "", "after q_idx", "", ", g: f32[2, 4, {n}]" if "g" in decay else "")}),
        _small(16),
    ):
        judge(state_launch, state("other", 33, 8, 16))


def test_kernels_are_for_what_they_can_do() -> None:
    assert len(WITH_KERNELS) == 10
    assert "512 by 16" in unsupported(recurrence("plain", 5, 512, 16))
    assert "float32, bfloat16 or float16" in unsupported(recurrence("plain", 5, 16, 16, "f64"))


def _covering() -> list[tuple[str, tuple[int, int, int], str]]:
    """Every program in every type, and every size in every type; the sizes rotate."""
    every = len(ON_DEVICE)
    return [
        (name, ON_DEVICE[(place + 2 * of_type) % every], dtype)
        for place, name in enumerate(WITH_KERNELS)
        for of_type, dtype in enumerate(DTYPES)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "sizes", "dtype"), _covering(), ids=str)
def test_on_device(name: str, sizes: tuple[int, int, int], dtype: str) -> None:
    judge(state_launch, state(name, *sizes, dtype), strided=sizes[0] == 129, device="cuda")


@pytest.mark.gpu
def test_results_are_the_same_at_every_run() -> None:
    torch.manual_seed(0)
    program = state("a decay a token", 4096, 128, 128, "bf16")
    parts, made = recurrence_of(program), operands(program, device="cuda")
    runs = []
    for _ in range(3):
        o, final, _, rows = state_launch.forward(parts, made, {})
        gradients = state_launch.backward(parts, made, {}, o, rows, torch.ones_like(o), final, None, frozenset(made))
        runs.append([o, final, *gradients.values()])
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))

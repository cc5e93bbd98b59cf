"""The kernels against float64: in Triton's interpreter in CI, on the device with `-m gpu`."""

from __future__ import annotations

from unittest import mock

import pytest

from attncompiler.runtime import triton_launch
from tests.programs import PROGRAMS, SIZES, judge, program


@pytest.mark.interpreted
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_and_gradients(name: str, sizes: tuple[int, int, int, int]) -> None:
    judge(triton_launch, program(name, *sizes))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", ["f32", "f16"])  # the interpreter multiplies bfloat16 as the integers that it keeps them in
def test_strided_operands(dtype: str) -> None:
    judge(triton_launch, program("window", 33, 70, 80, 48, dtype), strided=True)


@pytest.mark.interpreted
def test_a_table_without_the_memory_for_a_buffer(caplog: pytest.LogCaptureFixture) -> None:
    with mock.patch.object(triton_launch, "room", lambda device: 0.0):
        judge(triton_launch, program("relative positions", 33, 70, 80, 48))
    assert "gradients of table are summed without a kernel" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("sizes", [(257, 300, 80, 48), (257, 300, 64, 64), (130, 200, 128, 128)], ids=str)
def test_on_the_gpu(sizes: tuple[int, int, int, int], name: str, strided: bool, dtype: str) -> None:
    judge(triton_launch, program(name, *sizes, dtype), "cuda", strided)

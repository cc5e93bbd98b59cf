"""The portable lowering of states against float64: every kind, one chunk and many, all dtypes."""

from __future__ import annotations

from unittest import mock

import pytest

from attncompiler.codegen import portable_state
from tests.states import SIZES, STATES, judge, state

SMALL = {"_CHUNK": 16, "_WHOLE": 0, "_ELEMENTS": 8 * 16 * 16 * 2}  # two chunks a slab


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_and_gradients(name: str, sizes: tuple[int, int, int]) -> None:
    with mock.patch.multiple(portable_state, **SMALL):
        judge(portable_state, state(name, *sizes))


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("dtype", ["f64", "bf16", "f32"])
def test_dtypes_and_strides(name: str, dtype: str) -> None:
    judge(portable_state, state(name, 150, 32, 16, dtype), strided=True)

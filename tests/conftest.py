"""What runs where: `gpu` tests need a device, `interpreted` ones Triton's interpreter; what is skipped is said at the end."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and (not torch.cuda.is_available() or INTERPRETED):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
        if item.get_closest_marker("interpreted") and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1: `make test` runs these in a second step"))


@pytest.fixture(autouse=True)
def _apart() -> Iterator[None]:
    """Each test with a compiler that remembers nothing, and with uninitialised memory full of NaN."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        yield
    torch.use_deterministic_algorithms(False)

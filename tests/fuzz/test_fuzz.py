"""Random programs in CI: a share of the campaign (`python -m tests.fuzz.campaign` runs any number)."""

from __future__ import annotations

import pytest

from tests.fuzz.campaign import judge
from tests.fuzz.programs import Program

ONCE_WRONG = (10230, 10350)  # weights set to 0 by a mask that was written as its negation


@pytest.mark.parametrize("seed", [*range(100), *ONCE_WRONG])
def test_random_program(seed: int) -> None:
    verdict = judge(Program(seed))
    assert not verdict.wrong, f"{verdict.program}\n{verdict.wrong}"


def test_most_programs_are_taken() -> None:
    taken = sum(judge(Program(seed), "eager", train=False).regions > 0 for seed in range(200, 230))
    assert taken >= 12

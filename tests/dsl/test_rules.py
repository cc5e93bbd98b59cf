"""A share of the campaign in CI (`python -m tests.dsl.campaign` runs any number), and what it once found wrong."""

from __future__ import annotations

import pytest

from tests.dsl.campaign import verdicts
from tests.dsl.rules import RULES

ONCE_WRONG = [("sampled", 5)]  # a single probability was taken for the own block's, and all blocks were kept


@pytest.mark.parametrize("rule", RULES)
def test_pairs(rule: str) -> None:
    wrong = [f"{case}: {problem}" for case, problem in verdicts("pairs", (rule,), range(8)) if problem]
    assert not wrong


def test_forward_and_gradients() -> None:
    wrong = [f"{case}: {problem}" for case, problem in verdicts("runs", RULES, range(3 * len(RULES))) if problem]
    assert not wrong


@pytest.mark.parametrize(("rule", "seed"), ONCE_WRONG)
def test_what_was_once_wrong(rule: str, seed: int) -> None:
    assert [problem for _, problem in verdicts("pairs", (rule,), range(seed, seed + 1))] == [""]


@pytest.mark.interpreted
@pytest.mark.parametrize("rule", ["segments", "sampled"])
def test_kernels(rule: str) -> None:
    wrong = [f"{case}: {problem}" for case, problem in verdicts("kernels", (rule,), range(2)) if problem]
    assert not wrong

"""A share of the campaign in CI (`python -m tests.dsl.campaign` runs any number), and what it once found wrong."""

from __future__ import annotations

import pytest

from tests.dsl.campaign import verdicts
from tests.dsl.rules import RULES

ONCE_WRONG = [
    ("pairs", "sampled", 5),  # a single probability was taken for that of the own block, and all blocks were kept
    ("kernels", "algebra", 10001614),  # boxes of a grid beside lengths: the plan was made on the device, as of runs of tokens
    ("kernels", "dilated", 8),  # a tile longer than the keys reaches positions of the same residue: its end was not tested
]


@pytest.mark.parametrize("rule", RULES)
def test_pairs(rule: str) -> None:
    wrong = [f"{case}: {problem}" for case, problem in verdicts("pairs", (rule,), range(8)) if problem]
    assert not wrong


def test_forward_and_gradients() -> None:
    wrong = [f"{case}: {problem}" for case, problem in verdicts("runs", RULES, range(2 * len(RULES))) if problem]
    assert not wrong


@pytest.mark.parametrize(
    ("what", "rule", "seed"),
    [pytest.param(*found, marks=[pytest.mark.interpreted] if found[0] == "kernels" else []) for found in ONCE_WRONG],
)
def test_what_was_once_wrong(what: str, rule: str, seed: int) -> None:
    assert [problem for _, problem in verdicts(what, (rule,), range(seed, seed + 1))] == [""]


@pytest.mark.interpreted
@pytest.mark.parametrize("rule", ["segments", "sampled"])
def test_kernels(rule: str) -> None:
    wrong = [f"{case}: {problem}" for case, problem in verdicts("kernels", (rule,), range(2)) if problem]
    assert not wrong

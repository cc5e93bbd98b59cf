"""Every system of the zoo: against its paper's mathematics, and its two forms against one another."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attncompiler
from attncompiler import masks
from attncompiler.errors import OptionError
from attncompiler.zoo import SYSTEMS, Example, Size, System, system_named
from attncompiler.zoo.compare import compare
from attncompiler.zoo.programs import Likeness, declared, likeness, recognised
from attncompiler.zoo.system import bound
from tests.zoo.references import CASES

EXAMPLES = [(name, seed) for name in SYSTEMS for seed in range(3)]


def results(form: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    out = form(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grad)]


@pytest.mark.parametrize(("name", "seed"), EXAMPLES)
def test_both_forms_are_what_the_paper_says(name: str, seed: int) -> None:
    """Forward and gradients, in float64."""
    system = SYSTEMS[name]
    example, reference = CASES[name](random.Random(f"{name} {seed}"))
    inputs = example.drawn(torch.float64, torch.device("cpu"), seed)
    expected = results(reference, inputs)
    for form in (system.plain, system.declared):
        for ours, right in zip(results(bound(form, example.numbers), inputs), expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


def programs(system: System, example: Example) -> Likeness:
    found = recognised(system.plain, example)
    assert not found.missed, found.missed
    calls = declared(system, example)
    assert calls and all(call.program.keep.predicate is not None for call in calls)
    return likeness(found.programs, [call.program for call in calls])


# Radial's block mask takes seconds to make at its realistic size.
SIZED = [(name, size) for name in SYSTEMS for size in Size if (name, size) != ("radial", Size.REALISTIC)]


@pytest.mark.parametrize(("name", "size"), SIZED)
def test_both_forms_end_in_one_program(name: str, size: Size) -> None:
    expected = Likeness.THROUGH_VIEWS if name == "halonet" else Likeness.SAME
    assert programs(SYSTEMS[name], SYSTEMS[name].example(size)) is expected


@pytest.mark.parametrize("name", SYSTEMS)
def test_forms_in_half_and_single_precision_stay_within_twice_eagers_error(name: str) -> None:
    system = SYSTEMS[name]
    for dtype in (torch.float32, torch.bfloat16):
        outcomes = list(compare(system, system.example(Size.SMALL), torch.device("cpu"), dtype, inner="aot_eager"))
        assert [outcome.form for outcome in outcomes] == ["plain, eager", "plain, compiled", "declared"]
        assert all(outcome.agrees for outcome in outcomes), outcomes


@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.mask is not None])
def test_the_mask_is_what_the_declared_form_keeps(name: str) -> None:
    """So is every count of it; and no query is left without a key, where masked_fill and the declared form would differ."""
    system = SYSTEMS[name]
    example = system.example(Size.SMALL)
    (call,) = declared(system, example)
    assert system.mask is not None
    mask = system.mask(*example.indices, **example.numbers)
    b, h, m, n = call.extents
    dense = mask.dense(b, h, m, n)
    assert bool(dense.any(-1).all())
    assert int(dense.sum()) * (b // dense.shape[0]) * (h // dense.shape[1]) == mask.kept_pairs(b, h, m, n) == call.kept_pairs()


def test_other_programs_are_told_apart() -> None:
    window, sinks = SYSTEMS["sliding-window"], SYSTEMS["attention-sinks"]
    example = window.example(Size.SMALL)
    calls = declared(sinks, Example(example.inputs, {**example.numbers, "sinks": 4}))
    found = recognised(window.plain, example)
    assert likeness(found.programs, [call.program for call in calls]) is Likeness.DIFFERENT


def test_blocks_drawn_in_the_kernel_are_a_draw_of_prflash() -> None:
    n, block, heads = 200, 16, 2
    mask = masks.sampled(7, 1 / (1 + torch.arange(13)), block)
    cells = masks.sampled(7, 1 / (1 + torch.arange(13)), 1).dense(1, heads, 13, 13)[0]
    q, k, v = (torch.randn(2, heads, n, 16) for _ in range(3))
    ours = attncompiler.attention(q, k, v, keep=masks.causal() & mask)
    torch.testing.assert_close(ours, SYSTEMS["prflash"].plain(q, k, v, cells, block))


def test_names() -> None:
    assert set(CASES) == set(SYSTEMS) and system_named("rat") is SYSTEMS["rat"]
    with pytest.raises(OptionError, match="the zoo has no 'bat'\n  do:  it has gna-1d"):
        system_named("bat")

"""Dynamic mask attention: plain, compiled and declared, against one another, forward and backward; no mask of all pairs is left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attncompiler
from attncompiler.errors import OptionError
from attncompiler.ir import parse_program, verify
from attncompiler.zoo import SELECTED, Size
from attncompiler.zoo.dma import dma_attend, dma_attend_by_sdpa, dma_bias
from attncompiler.zoo.programs import Likeness, declared, likeness, recognised
from attncompiler.zoo.system import bound


def results(form: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    out = form(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grad)]


@pytest.mark.parametrize("name", SELECTED)
def test_three_ways(name: str) -> None:
    system = SELECTED[name]
    example = system.example(Size.SMALL)
    inputs = example.drawn(torch.float64, torch.device("cpu"), 0)
    plain = bound(system.plain, example.numbers)
    expected = results(plain, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="attncompiler", options={"inner": "aot_eager"})
    for form in (compiled, bound(system.declared, example.numbers)):
        for ours, right in zip(results(form, inputs), expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SELECTED)
def test_the_attention_is_of_the_chosen_keys(name: str) -> None:
    system = SELECTED[name]
    example = system.example(Size.SMALL)
    found = attncompiler.explain(bound(system.plain, example.numbers), *example.drawn(torch.float32, torch.device("cpu"), 0))
    (region,) = found.regions
    verify(parse_program(region.ir))
    assert "top_k" in region.ir and "picked" in region.ir
    assert "the 60 keys of largest rank (of 500, 12 %)" in region.notes[0]
    assert ("tiles behind a query are skipped" in region.notes[0]) == (name != "dma-decode")
    assert region.density == (1.0 if name == "dma-rows" else 0.12)


@pytest.mark.parametrize("name", SELECTED)
def test_both_forms_end_in_one_program(name: str) -> None:
    system = SELECTED[name]
    example = system.example(Size.SMALL)
    found, calls = recognised(system.plain, example), declared(system, example)
    assert not found.missed and likeness(found.programs, [call.program for call in calls]) is not Likeness.DIFFERENT
    (call,) = calls
    assert call.keys == 500 and call.tiles()[0] < call.tiles()[1]


def test_by_sdpa() -> None:
    example = SELECTED["dma"].example(Size.SMALL)
    inputs = example.drawn(torch.float64, torch.device("cpu"), 3)

    def plain(q: Tensor, k: Tensor, v: Tensor, w_dt: Tensor, a: Tensor) -> Tensor:
        return dma_attend_by_sdpa(q, k, v, dma_bias(v, w_dt, a), 60)

    expected = results(plain, inputs)
    torch._dynamo.reset()
    for ours, right in zip(results(torch.compile(plain, backend="attncompiler"), inputs), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


def test_gradients_of_views() -> None:
    """Heads that lie after tokens, as projections give them: gradients have the layout that compiled code was told."""
    b, h, n, d = 2, 4, 150, 16
    shapes = ((b, n, h, d), (b, n, 2, d), (b, n, 2, d), (b, 2, n))
    inputs = tuple(torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)

    def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return dma_attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, 40)

    expected = results(plain, inputs)
    torch._dynamo.reset()
    for ours, right in zip(results(torch.compile(plain, backend="attncompiler"), inputs), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


def test_what_is_no_selection_is_refused() -> None:
    q = torch.zeros(1, 2, 8, 16)
    with pytest.raises(OptionError, match="select is 8"):
        attncompiler.attention(q, q, q, select=8)  # type: ignore[arg-type]

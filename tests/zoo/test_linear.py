"""The linear attentions of the zoo: against their papers' mathematics, in float64, and what their declared forms end in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attncompiler.codegen.lowerable import parse_recurrence
from attncompiler.codegen.recurrence import Decays, Past
from attncompiler.zoo import LINEAR, Size
from attncompiler.zoo.states import states_of
from attncompiler.zoo.system import bound


def _lightning(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """A step at a time: S = exp(-rate) S + k v^T, o = q^T S."""
    state, out = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype), []
    for i in range(q.shape[2]):
        state = state * torch.exp(-rate)[:, None, None] + k[:, :, i, :, None] * v[:, :, i, None, :]
        out.append(torch.einsum("bhc,bhcd->bhd", q[:, :, i], state))
    return torch.stack(out, 2)


def _results(form: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    out = form(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), [t for t in inputs if t.requires_grad])]


@pytest.mark.parametrize("name", LINEAR)
def test_both_forms_agree(name: str) -> None:
    system, example = LINEAR[name], LINEAR[name].example(Size.SMALL)
    inputs = tuple(tensor.double() for tensor in example.drawn(torch.float64, torch.device("cpu")))
    plain, declared = (_results(bound(form, example.numbers), inputs) for form in (system.plain, system.declared))
    for ours, right in zip(declared, plain, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)


def test_lightning_is_what_the_paper_says() -> None:
    example = LINEAR["lightning"].example(Size.SMALL)
    inputs = tuple(tensor.double() for tensor in example.drawn(torch.float64, torch.device("cpu")))
    found, right = _results(LINEAR["lightning"].declared, inputs), _results(_lightning, inputs)
    for ours, exact in zip(found, right, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


class _Watch(TorchDispatchMode):
    """Takes down the program of every state that runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.programs: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.attncompiler.state_forward.default:
            self.programs.append(args[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "decays", "past"),
    [
        ("lightning", Decays.BY_HEAD, Past.UP_TO_OWN),
        ("transnormer", Decays.BY_HEAD, Past.UP_TO_OWN),
        ("rala", Decays.NEVER, Past.ALL),
    ],
)
def test_the_declared_form_is_one_state(name: str, decays: Decays, past: Past) -> None:
    example = LINEAR[name].example(Size.SMALL)
    with torch.no_grad(), _Watch() as watch:
        bound(LINEAR[name].declared, example.numbers)(*example.drawn(torch.float32, torch.device("cpu")))
    (text,) = watch.programs
    assert (parse_recurrence(text).decays, parse_recurrence(text).past) == (decays, past)


def test_the_plain_form_is_recognised_where_it_is_slow_as_written() -> None:
    for name, taken in (("lightning", True), ("transnormer", True), ("rala", False)):
        found = states_of(LINEAR[name].plain, LINEAR[name].example(Size.REALISTIC))
        assert bool(found.uses) == taken
        assert any("linear in the tokens" in missed.reason for missed in found.missed) != taken

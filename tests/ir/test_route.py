"""Which heads a query uses: text, invariants, meaning, and MoH's and VHR's programs against their plain form."""

from __future__ import annotations

import math

import pytest
import torch

from attncompiler.errors import InvalidProgram, ParseError
from attncompiler.ir import interpret, parse, verify
from attncompiler.ir.text import to_line, to_text

HEAD = """attention  # model.py:7
  axes    b=2, h=4, q_idx=5, kv_idx=6
  read    q: f64[2, 4, 5, 8], k: f64[2, 4, 6, 8], v: f64[2, 4, 6, 3]{reads}
  score   dot(q[b, h, q_idx], k[b, h, kv_idx]) * 0.5
  keep    kv_idx < 4 else nan
  weigh   softmax
  sum     v[b, h, kv_idx]
  route   {route}
"""
QUERY = HEAD.format(reads=", gate: f64[2, 5, 4], on: bool[2, 5, 4]", route="gate[b, q_idx, h] where on[b, q_idx, h]")


def _operands() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {"q": torch.randn(2, 4, 5, 8), "k": torch.randn(2, 4, 6, 8), "v": torch.randn(2, 4, 6, 3), "gate": torch.randn(2, 5, 4)}
    return {name: tensor.double() for name, tensor in made.items()} | {"on": torch.rand(2, 5, 4) > 0.5}


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.mT * 0.5)[..., :4]
    return scores.softmax(-1) @ v[:, :, :4]


@pytest.mark.parametrize("route", ["gate[b, q_idx, h] where on[b, q_idx, h]", "gate[b, 0, h] where True", "1 where on[0, 0, h]"])
def test_text_parses_back(route: str) -> None:
    reads = ", gate: f64[2, 5, 4]" * ("gate" in route) + ", on: bool[2, 5, 4]" * ("on[" in route)
    p = verify(parse(HEAD.format(reads=reads, route=route)))
    assert to_text(p) == HEAD.format(reads=reads, route=route) and parse(to_line(p)) == p


BROKEN = {
    "a route that is no route": ("gate[b, q_idx, h]", ParseError),
    "a route for each key": ("gate[b, kv_idx, h] where on[b, q_idx, h]", InvalidProgram),
    "an activity that is a number": ("1 where gate[b, q_idx, h] + to_float(on[b, q_idx, h])", InvalidProgram),
    "a gain that is a truth": ("on[b, q_idx, h] where gate[b, q_idx, h] > 0.0", InvalidProgram),
    "a route by scores": ("gate[b, q_idx, h] where on[b, q_idx, h] & (dot(q[b, h, q_idx], k[b, h, 0]) > 0.0)", InvalidProgram),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_routes_are_refused(name: str) -> None:
    route, error = BROKEN[name]
    with pytest.raises(error, match="route"):
        verify(parse(HEAD.format(reads=", gate: f64[2, 5, 4], on: bool[2, 5, 4]", route=route)))


def test_gain_where_active() -> None:
    made = _operands()
    made["on"][1, 2] = False  # all heads of a token are off
    p = verify(parse(QUERY))
    found = interpret(p, made, {})
    gate, on = made["gate"].transpose(1, 2), made["on"].transpose(1, 2)
    torch.testing.assert_close(found.o, _plain(made["q"], made["k"], made["v"]) * (gate * on)[..., None])
    assert (found.o[1, :, 2] == 0).all() and (found.lse[1, :, 2] == -math.inf).all()
    assert torch.equal(found.lse.isinf(), ~on)
    assert "gate" in p.differentiable and "on" not in p.differentiable


def test_what_is_not_active_is_not_read() -> None:
    """NaN in the rows and gains of heads that are off reaches neither the output nor a gradient."""
    made = _operands()
    on = made["on"].transpose(1, 2)
    made["gate"][~made["on"]] = math.nan
    leaves = {name: tensor.requires_grad_() for name, tensor in made.items() if name != "on"}
    text = QUERY.replace("kv_idx < 4 else nan", "(kv_idx < 4) & on[b, q_idx, h] else nan")  # rows of heads that are off keep no key
    found = interpret(verify(parse(text)), {**leaves, "on": made["on"]}, {})
    found.o.sum().backward()
    assert found.o.isfinite().all()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in leaves.values())
    assert (leaves["q"].grad[~on] == 0).all() and (leaves["gate"].grad[~made["on"]] == 0).all()  # type: ignore[index]

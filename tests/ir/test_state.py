"""States: text, invariants, and every kind of recurrence against the loop that defines it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attncompiler.errors import InvalidProgram, ParseError
from attncompiler.ir import interpret_program, parse_program, program_line, program_text, verify

B, T, H, K, V = 2, 7, 3, 4, 5
READ = "q: f64[2, 7, 3, 4], k: f64[2, 7, 3, 4], v: f64[2, 7, 3, 5]"
AXES = "b=2, h=3, q_idx=7, kv_idx=7, c=4, d=5"
KEY, VALUE, QUERY = "k[b, kv_idx, h, c]", "v[b, kv_idx, h, d]", "q[b, q_idx, h, c]"
MORE = "g: f64[2, 7, 3], beta: f64[2, 7, 3], s0: f64[2, 3, 4, 5], z0: f64[2, 3, 4], first: bool[7], u: f64[3, 4], ends: i64[2]"
ALL = f"""state  # model.py:41
  axes    {AXES}, segment=2
  read    {READ}, {MORE}
  start   s0[b, h, c, d], z0[b, h, c]
  reset   first[kv_idx]
  decay   exp(g[b, kv_idx, h])
  correct -(beta[b, kv_idx, h] * {KEY}), {KEY} after decay
  write   {KEY}, beta[b, kv_idx, h] * {VALUE}
  query   {QUERY} * 0.5 before q_idx
  bonus   u[h, c]
  weigh   maximum(abs(row[b, h, q_idx]), 1.0) + 1e-06
  final   after ends[segment]
  return  y, states, z
"""


def test_text_parses_back() -> None:
    program = verify(parse_program(ALL))
    assert program_text(program) == ALL and parse_program(program_line(program)) == program
    assert [decl.name for decl in program.given.values()] == ["y", "states", "z"]
    assert [len(decl.shape) for decl in program.given.values()] == [4, 5, 4]


def _operands() -> dict[str, Tensor]:
    torch.manual_seed(1)
    made = {
        "q": (B, T, H, K),
        "k": (B, T, H, K),
        "v": (B, T, H, V),
        "beta": (B, T, H),
        "s0": (B, H, K, V),
        "z0": (B, H, K),
        "u": (H, K),
    }
    made |= {"a": (B, T, H, K), "r": (B, T, H, K)}
    found = {name: torch.randn(shape, dtype=torch.float64) for name, shape in made.items()}
    found |= {"head": -torch.rand(H), "g": -torch.rand(B, T, H), "w": -torch.rand(B, T, H, K), "e": -torch.rand(B, T, H, K, V)}
    return {name: tensor.double() for name, tensor in found.items()}


def _loop(
    x: dict[str, Tensor], decay: Tensor | None = None, left: Tensor | None = None, right: Tensor | None = None, **options: object
) -> Tensor:
    """O of the recurrence, a step at a time: S = decay S + left (right^T S) + k v^T; decay [B, T, H, 1|K, 1|V]."""
    state, out = x["s0"] if "start" in options else torch.zeros(B, H, K, V, dtype=torch.float64), []
    for t in range(T):
        k, v, q = x["k"][:, t], x["v"][:, t], x["q"][:, t]
        before = state
        state = state if decay is None else state * decay[:, t]
        seen = before if "undecayed" in options else state
        if left is not None and right is not None:
            state = state + left[:, t, :, :, None] * torch.einsum("bhk,bhkv->bhv", right[:, t], seen)[:, :, None]
        state = state + k[..., None] * v[:, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", q, before if "before" in options else state))
    return torch.stack(out, 2)


def _run(
    x: dict[str, Tensor], clauses: str = "", query: str = f"{QUERY} after q_idx", reads: str = "", axes: str = AXES
) -> dict[str, Tensor]:
    text = f"state\n  axes {axes}\n  read {READ}{reads}\n{clauses}\n  write {KEY}, {VALUE}\n  query {query}\n"
    return interpret_program(verify(parse_program(text)), x, {})


DECAYS = {
    "none": ("", "", lambda x: None),
    "of each head": ("exp(head[h])", ", head: f64[3]", lambda x: x["head"].exp().view(1, 1, H, 1, 1).expand(B, T, -1, -1, -1)),
    "of each token": ("exp(g[b, kv_idx, h])", ", g: f64[2, 7, 3]", lambda x: x["g"].exp()[..., None, None]),
    "of each feature": ("exp(w[b, kv_idx, h, c])", ", w: f64[2, 7, 3, 4]", lambda x: x["w"].exp()[..., None]),
    "of each element": ("exp(e[b, kv_idx, h, c, d])", ", e: f64[2, 7, 3, 4, 5]", lambda x: x["e"].exp()),
}


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("moment", ["after", "before"])
def test_decays(name: str, moment: str) -> None:
    decay, reads, factor = DECAYS[name]
    x = _operands()
    found = _run(x, f"decay {decay}" if decay else "", f"{QUERY} {moment} q_idx", reads)
    torch.testing.assert_close(found["o"], _loop(x, factor(x), **{moment: True}))


@pytest.mark.parametrize("moment", ["after", "before"])
def test_corrections(moment: str) -> None:
    """The gated delta rule corrects what has decayed, DPLR (RWKV-7) what has not."""
    x = _operands()
    clauses = f"decay exp(w[b, kv_idx, h, c])\n correct a[b, kv_idx, h, c], r[b, kv_idx, h, c] {moment} decay"
    found = _run(x, clauses, reads=", w: f64[2, 7, 3, 4], a: f64[2, 7, 3, 4], r: f64[2, 7, 3, 4]")
    options = {"undecayed": True} if moment == "before" else {}
    torch.testing.assert_close(found["o"], _loop(x, x["w"].exp()[..., None], x["a"], x["r"], **options))


def test_a_sequence_in_two_pieces() -> None:
    """The final state and z of one call are the start of the next: the pieces give what the whole gives."""
    x = {name: tensor.abs() for name, tensor in _operands().items()}
    weigh = "decay 0.9\n weigh row[b, h, q_idx] + 1e-06"
    whole = _run(x, weigh)
    first = _run({n: t[:, :4] for n, t in x.items() if n in "qkv"}, weigh, axes="b=2, h=3, q_idx=4, kv_idx=4, c=4, d=5")
    rest = {n: t[:, 4:] for n, t in x.items() if n in "qkv"} | {"s0": first["final"][:, 0], "z0": first["z"][:, 0]}
    start = f"start s0[b, h, c, d], z0[b, h, c]\n {weigh}"
    second = _run(rest, start, reads=", s0: f64[2, 3, 4, 5], z0: f64[2, 3, 4]", axes="b=2, h=3, q_idx=3, kv_idx=3, c=4, d=5")
    torch.testing.assert_close(torch.cat([first["o"], second["o"]], 2), whole["o"])
    torch.testing.assert_close(second["final"], whole["final"])
    torch.testing.assert_close(second["z"], whole["z"])


def test_segments_start_anew_and_end_in_states_of_their_own() -> None:
    x = _operands()
    x["begin"], x["of"] = torch.tensor([0, 3, 5, 7]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    x["starts"] = torch.randn(3, H, K, V, dtype=torch.float64)
    clauses = "start starts[of[kv_idx], h, c, d]\n reset begin[of[kv_idx]] == kv_idx\n final after begin[segment + 1] - 1"
    reads = ", starts: f64[3, 3, 4, 5], of: i64[7], begin: i64[4]"
    found = _run(x, clauses, f"{QUERY} before q_idx", reads, AXES + ", segment=3")
    for segment, (begin, end) in enumerate(((0, 3), (3, 5), (5, 7))):
        state = x["starts"][segment].expand(B, -1, -1, -1)
        for t in range(begin, end):
            torch.testing.assert_close(found["o"][:, :, t], torch.einsum("bhk,bhkv->bhv", x["q"][:, t], state))
            state = state + x["k"][:, t, ..., None] * x["v"][:, t, :, None]
        torch.testing.assert_close(found["final"][:, segment], state)


def test_steps_outside_are_the_nearest_and_no_keys_leave_the_start() -> None:
    x = _operands()
    whole = torch.einsum("bihk,bjhk,bjhv->bhiv", x["q"], x["k"], x["v"])
    torch.testing.assert_close(_run(x, query=f"{QUERY} after 99")["o"], whole)
    torch.testing.assert_close(_run(x, query=f"{QUERY} before 99")["o"], whole)
    start = torch.einsum("bihk,bhkv->bhiv", x["q"], x["s0"])
    for step in ("after -1", "before -5"):
        torch.testing.assert_close(_run(x, "start s0[b, h, c, d]", f"{QUERY} {step}", ", s0: f64[2, 3, 4, 5]")["o"], start)
    nothing = {name: tensor[:, :0] if name in "kv" else tensor for name, tensor in x.items()}
    axes = "b=2, h=3, q_idx=7, kv_idx=0, c=4, d=5"
    found = _run(nothing, "start s0[b, h, c, d]", f"{QUERY} after q_idx", ", s0: f64[2, 3, 4, 5]", axes)
    torch.testing.assert_close(found["o"], start)


def test_gradients_reach_every_operand() -> None:
    x = {name: tensor.requires_grad_() for name, tensor in _operands().items()}
    x |= {"first": torch.tensor([1, 0, 0, 1, 0, 0, 0]).bool(), "ends": torch.tensor([2, 6])}
    found = interpret_program(verify(parse_program(ALL)), x, {})
    (found["y"].sum() + found["states"].sum() + found["z"].sum()).backward()
    read = ("q", "k", "v", "g", "beta", "s0", "z0", "u")
    assert all(x[name].grad is not None and x[name].grad.isfinite().all() and x[name].grad.any() for name in read)


BROKEN = {
    "row as an operand": (f"write {KEY}, {VALUE} + 0.0 * row[b, h, 0]", "row"),
    "an operand that is not there": (f"write {KEY} * z[h], {VALUE}", "declared"),
    "a key of vectors": (f"write k[b, kv_idx, h], {VALUE}", "one integer for each dimension"),
    "a key for each channel of the value": (f"write {KEY} * d, {VALUE}", "key varies over"),
    "a value for each query": (f"write {KEY}, {VALUE} * q_idx", "value varies over"),
    "a query of a key": (f"query {QUERY} * kv_idx after q_idx", "query varies over"),
    "a step for each feature": (f"query {QUERY} after c", "the step of a query varies over"),
    "half a step": (f"query {QUERY} after 0.5", "steps of query and final are integers"),
    "a decay for each query": ("decay exp(to_float(-q_idx))", "decay varies over"),
    "a decay that is a truth": ("decay kv_idx < 3", "all else are numbers"),
    "a reset that is a number": ("reset 1", "reset is a predicate"),
    "a correction of values": (f"correct {KEY} * d, {KEY} after decay", "left side of a correction varies over"),
    "a normaliser for each key": ("weigh row[b, h, q_idx] + kv_idx", "weigh varies over"),
    "rows that decay by channel": ("decay exp(to_float(-d))\n  weigh row[b, h, q_idx] + 1.0", "decays alike"),
    "a final state for each head": ("final after h", "final varies over"),
    "a correction of no moment": (f"correct {KEY}, {KEY}", None),
    "a query of no moment": (f"query {QUERY}", None),
    "a write of one side": (f"write {KEY}", None),
    "a final before": ("final before 3", None),
    "an axis that is none": ("axes b=2, h=3, q_idx=7, kv_idx=7, c=4, e=5", None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_states_are_refused(name: str) -> None:
    clause, sentence = BROKEN[name]
    lines = {"axes": AXES, "read": READ, "write": f"{KEY}, {VALUE}", "query": f"{QUERY} after q_idx"}
    for line in clause.splitlines():
        word, _, body = line.strip().partition(" ")
        lines[word] = body
    text = "state\n" + "\n".join(f"  {word} {body}" for word, body in lines.items())
    with pytest.raises(InvalidProgram if sentence else ParseError, match=sentence):
        verify(parse_program(text))

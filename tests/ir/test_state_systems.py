"""Linear attentions as they were published, written as programs, against their definitions in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ir.running import rand, reads, run

B, H, N, D, E = 2, 3, 10, 4, 5


def _silu(tensor: str, *index: str) -> str:
    element = f"{tensor}[{', '.join(index)}]"
    return f"{element} * sigmoid({element})"


def test_transnormer_with_lightning_attention() -> None:
    """Decay of each head as an operand, SiLU features, LRPE that doubles them, a norm over all heads, a gate."""
    torch.manual_seed(0)
    q, k, v, u = rand(B, H, N, D), rand(B, H, N, D), rand(B, H, N, E), rand(B, N, H * E)
    rate, theta = torch.rand(H).double(), rand(H, D)
    feature = "where(c < 4, {0} * cos(theta[h, c] * {1}), {2} * sin(theta[h, c - 4] * {1}))"
    low, high = ("b", "h", "{0}", "c"), ("b", "h", "{0}", "c - 4")
    key, query = (
        feature.format(_silu(name, *(i.format(at) for i in low)), at, _silu(name, *(i.format(at) for i in high)))
        for name, at in (("k", "kv_idx"), ("q", "q_idx"))
    )
    text = f"""state
      axes  b={B}, h={H}, q_idx={N}, kv_idx={N}, c={2 * D}, d={E}
      read  {reads(rate=rate, k=k, v=v, q=q, theta=theta)}
      decay exp(-rate[h])
      write {key}, v[b, h, kv_idx, d]
      query {query} after q_idx
      return mixed
    tables
      axes  b={B}, i={N}, ch={H * E}, all={H * E}
      read  mixed: f64[{B}, {H}, {N}, {E}], {reads(u=u)}
      let   squares[b, i] = sum(mixed[b, all // {E}, i, all % {E}] ** 2, over=all)
      let   out[b, i, ch] = mixed[b, ch // {E}, i, ch % {E}] / (sqrt(squares[b, i] / {H * E}.0) + 1e-08) * u[b, i, ch]
      return out"""
    angle = theta[:, None] * torch.arange(N)[:, None]
    rotated = [torch.cat([F.silu(x) * angle.cos(), F.silu(x) * angle.sin()], -1) for x in (q, k)]
    distance = torch.arange(N)[:, None] - torch.arange(N)
    weights = (rotated[0] @ rotated[1].mT) * torch.exp(-rate[:, None, None] * distance) * (distance >= 0)
    o = (weights @ v).transpose(1, 2).reshape(B, N, H * E)
    norm = o.norm(dim=-1, keepdim=True) / (H * E) ** 0.5 + 1e-8
    torch.testing.assert_close(run(text, rate=rate, k=k, v=v, q=q, theta=theta, u=u)["out"], o / norm * u)


def test_rala() -> None:
    """Keys weighed by a softmax of what a mean of queries says, rotated in the numerator and not in the denominator."""
    torch.manual_seed(0)
    rows, columns = 2, 5
    q, k, v = rand(B, H, N, D), rand(B, H, N, D), rand(B, H, N, E)
    w = (1 / 10000 ** torch.linspace(0, 1, D // 4, dtype=torch.float64)).repeat_interleave(2)
    place = [torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)]
    angle = torch.cat([p[:, None] * w for p in place], -1)
    cos, sin = angle.cos(), angle.sin()

    def feature(element: str) -> str:
        return f"where({element} > 0.0, {element} + 1.0, exp({element}))"

    def rotated(name: str, at: str) -> str:
        x = f"{name}[b, h, {at}, " + "{0}]"
        turned = f"where(c % 2 == 0, -{x.format('c + 1')}, {x.format('c - 1')})"
        return f"{x.format('c')} * cos_of[{at}, c] + {turned} * sin_of[{at}, c]"

    text = f"""tables
      axes  b={B}, h={H}, i={N}, j={N}, c={D}
      read  {reads(q=q, k=k)}
      let   phi_q[b, h, i, c] = {feature("q[b, h, i, c]")}
      let   mean_q[b, h, c] = mean(phi_q[b, h, i, c], over=i)
      let   logit[b, h, j] = sum(mean_q[b, h, c] * ({feature("k[b, h, j, c]")}), over=c)
      let   alpha[b, h, j] = softmax(logit[b, h, j] * {D**-0.5}, over=j)
      let   phi_k[b, h, j, c] = ({feature("k[b, h, j, c]")}) * alpha[b, h, j] * {N}.0
      let   mean_k[b, h, c] = mean(phi_k[b, h, j, c], over=j)
      let   den[b, h, i] = sum(phi_q[b, h, i, c] * mean_k[b, h, c], over=c)
      return phi_q, phi_k, den
    state
      axes  b={B}, h={H}, q_idx={N}, kv_idx={N}, c={D}, d={E}
      read  {reads(phi_q=q, phi_k=k, cos_of=cos, sin_of=sin, v=v)}, den: f64[{B}, {H}, {N}]
      write {rotated("phi_k", "kv_idx")}, v[b, h, kv_idx, d]
      query {rotated("phi_q", "q_idx")} after {N - 1}
      weigh (den[b, h, q_idx] + 1e-06) * {N}.0
      return o"""

    def rotate(x: Tensor) -> Tensor:
        return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    fq, fk = F.elu(leaves[0]) + 1, F.elu(leaves[1]) + 1
    fk = fk * N * (fq.mean(2, keepdim=True) @ fk.mT * D**-0.5).softmax(-1).mT
    expected = rotate(fq) @ (rotate(fk).mT @ leaves[2] / N) / (fq @ fk.mean(2, keepdim=True).mT + 1e-6)
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    found = run(text, q=mine[0], k=mine[1], cos_of=cos, sin_of=sin, v=mine[2])["o"]
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    for mine_, theirs in zip(
        torch.autograd.grad(found, mine, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine_, theirs)


def _state(clauses: str, query: str, c: int = D, keys: int = N, **tensors: Tensor) -> Tensor:
    axes = f"b={B}, h={H}, q_idx={N}, kv_idx={keys}, c={c}, d={E}"
    return run(f"state\n axes {axes}\n read {reads(**tensors)}\n{clauses}\n query {query}\n return o", **tensors)["o"]


def test_gated_delta_rule_and_kda() -> None:
    """Decay first, then the correction of what has decayed; of each head and token, or of each channel."""
    torch.manual_seed(0)
    q, k, v, beta = rand(B, H, N, D), F.normalize(rand(B, H, N, D), dim=-1), rand(B, H, N, E), torch.rand(B, H, N).double()
    for gate, index in ((-torch.rand(B, H, N).double(), "b, h, kv_idx"), (-torch.rand(B, H, N, D).double(), "b, h, kv_idx, c")):
        clauses = f"""decay   exp(gate[{index}])
          correct -(beta[b, h, kv_idx] * k[b, h, kv_idx, c]), k[b, h, kv_idx, c] after decay
          write   k[b, h, kv_idx, c], beta[b, h, kv_idx] * v[b, h, kv_idx, d]"""
        found = _state(clauses, f"q[b, h, q_idx, c] * {D**-0.5} after q_idx", gate=gate, beta=beta, k=k, v=v, q=q)
        state, out = torch.zeros(B, H, D, E, dtype=torch.float64), []
        for t in range(N):
            state = state * (gate[:, :, t].exp()[..., None, None] if gate.dim() == 3 else gate[:, :, t].exp()[..., None])
            error = v[:, :, t] - (k[:, :, t, None] @ state)[:, :, 0]
            state = state + k[:, :, t, :, None] * (beta[:, :, t, None] * error)[:, :, None]
            out.append((q[:, :, t, None] * D**-0.5 @ state)[:, :, 0])
        torch.testing.assert_close(found, torch.stack(out, 2))


def test_rwkv6_reads_before_its_update_with_a_bonus() -> None:
    torch.manual_seed(0)
    q, k, v, w, u = rand(B, H, N, D), rand(B, H, N, D), rand(B, H, N, E), -torch.rand(B, H, N, D).double(), rand(H, D)
    clauses = "decay exp(w[b, h, kv_idx, c])\n write k[b, h, kv_idx, c], v[b, h, kv_idx, d]\n bonus u[h, c]"
    found = _state(clauses, "q[b, h, q_idx, c] before q_idx", w=w, k=k, v=v, q=q, u=u)
    total = w.cumsum(2)
    through = (total - w)[:, :, :, None] - total[:, :, None]  # decays after key j and before query i
    weights = torch.einsum("bhic,bhjc,bhijc->bhij", q, k, through.clamp(max=0).exp()).tril(-1)
    own = torch.einsum("bhic,hc,bhic->bhi", q, u, k)[..., None] * v
    torch.testing.assert_close(found, weights @ v + own)


def test_based_has_taylor_features_and_a_normaliser() -> None:
    torch.manual_seed(0)
    q, k, v = rand(B, H, N, D), rand(B, H, N, D), rand(B, H, N, E)

    def taylor(name: str, at: str) -> str:
        x = f"{name}[b, h, {at}, " + "{0}]"
        pairs = f"{x.format(f'(c - {D + 1}) // {D}')} * {x.format(f'(c - {D + 1}) % {D}')} * {2**-0.5}"
        return f"where(c < 1, 1.0, where(c < {D + 1}, {x.format('c - 1')}, {pairs}))"

    clauses = f"write {taylor('k', 'kv_idx')}, v[b, h, kv_idx, d]\n weigh row[b, h, q_idx] + 1e-06"
    found = _state(clauses, f"{taylor('q', 'q_idx')} after q_idx", 1 + D + D * D, k=k, v=v, q=q)
    scores = q @ k.mT
    weights = (1 + scores + scores**2 / 2).tril()
    torch.testing.assert_close(found, weights @ v / (weights.sum(-1, keepdim=True) + 1e-6))


def test_delta_product_takes_two_steps_a_token() -> None:
    torch.manual_seed(0)
    q, g = rand(B, H, N, D), -torch.rand(B, H, N).double()
    k, v, beta = F.normalize(rand(B, H, N, 2, D), dim=-1), rand(B, H, N, 2, E), torch.rand(B, H, N, 2).double()
    at = "b, h, kv_idx // 2, kv_idx % 2"
    clauses = f"""decay where(kv_idx % 2 == 0, exp(g[b, h, kv_idx // 2]), 1.0)
      correct -(beta[{at}] * k[{at}, c]), k[{at}, c] after decay
      write k[{at}, c], beta[{at}] * v[{at}, d]"""
    found = _state(clauses, "q[b, h, q_idx, c] after q_idx * 2 + 1", keys=2 * N, g=g, beta=beta, k=k, v=v, q=q)
    state, out = torch.zeros(B, H, D, E, dtype=torch.float64), []
    for t in range(N):
        state = state * g[:, :, t].exp()[..., None, None]
        for n in range(2):
            kn, bn = k[:, :, t, n, :, None], beta[:, :, t, n, None, None]
            state = state - bn * kn @ (kn.mT @ state) + bn * kn * v[:, :, t, n, None]
        out.append((q[:, :, t, None] @ state)[:, :, 0])
    torch.testing.assert_close(found, torch.stack(out, 2))


def test_gated_slots_are_two_states_with_a_softmax_between() -> None:
    torch.manual_seed(0)
    slots = 6
    q, k, v, s = rand(B, H, N, D), rand(B, H, N, D), rand(B, H, N, E), torch.rand(B, H, N, slots).double()
    axes = f"b={B}, h={H}, q_idx={N}, kv_idx={N}"
    text = f"""state
      axes   {axes}, c={D}, d={slots}
      read   {reads(s=s, k=k, q=q)}
      decay  1.0 - s[b, h, kv_idx, d]
      write  k[b, h, kv_idx, c], s[b, h, kv_idx, d]
      query  q[b, h, q_idx, c] after q_idx
      return logits
    tables
      axes   b={B}, h={H}, i={N}, slot={slots}
      read   logits: f64[{B}, {H}, {N}, {slots}]
      let    p[b, h, i, slot] = softmax(logits[b, h, i, slot], over=slot)
      return p
    state
      axes   {axes}, c={slots}, d={E}
      read   {reads(s=s)}, p: f64[{B}, {H}, {N}, {slots}], {reads(v=v)}
      decay  1.0 - s[b, h, kv_idx, c]
      write  s[b, h, kv_idx, c], v[b, h, kv_idx, d]
      query  p[b, h, q_idx, c] after q_idx
      return o"""
    keys, values, out = torch.zeros(B, H, slots, D, dtype=torch.float64), torch.zeros(B, H, slots, E, dtype=torch.float64), []
    for t in range(N):
        write, keep = s[:, :, t, :, None], 1 - s[:, :, t, :, None]
        keys, values = keep * keys + write * k[:, :, t, None], keep * values + write * v[:, :, t, None]
        p = (keys @ q[:, :, t, :, None]).softmax(2)
        out.append((p.mT @ values)[:, :, 0])
    torch.testing.assert_close(run(text, s=s, k=k, q=q, v=v)["o"], torch.stack(out, 2))


def test_mamba_decays_each_element() -> None:
    """S6, a state of channels by features with its own decay for each element, no product of matrices."""
    torch.manual_seed(0)
    x, dt, a, bs, cs = rand(B, N, E), torch.rand(B, N, E).double(), -torch.rand(E, D).double(), rand(B, N, D), rand(B, N, D)
    text = f"""state
      axes   b={B}, h=1, q_idx={N}, kv_idx={N}, c={D}, d={E}
      read   {reads(dt=dt, a=a, bs=bs, x=x, cs=cs)}
      decay  exp(dt[b, kv_idx, d] * a[d, c])
      write  bs[b, kv_idx, c], dt[b, kv_idx, d] * x[b, kv_idx, d]
      query  cs[b, q_idx, c] after q_idx"""
    state, out = torch.zeros(B, E, D, dtype=torch.float64), []
    for t in range(N):
        state = (dt[:, t, :, None] * a).exp() * state + (dt[:, t] * x[:, t])[..., None] * bs[:, t, None]
        out.append((state @ cs[:, t, :, None])[..., 0])
    torch.testing.assert_close(run(text, dt=dt, a=a, bs=bs, x=x, cs=cs)["o"][:, 0], torch.stack(out, 1))

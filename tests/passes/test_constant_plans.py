"""Plans of constants: made once for each constant, and never taken for another's."""

from __future__ import annotations

import torch
from torch import Tensor

import attncompiler
from attncompiler.ir import parse, verify
from attncompiler.ir.program import Attention
from attncompiler.passes.constant_plans import _MOST, ConstantPlans
from attncompiler.passes.plan import build_plan, is_fixed

N = 320


def masked(mask: str = "const(bool[320, 320])") -> Attention:
    return verify(
        parse(f"""attention
      axes b=1, h=2, q_idx={N}, kv_idx={N}
      read q: f32[1, 2, {N}, 16], k: f32[1, 2, {N}, 16], v: f32[1, 2, {N}, 16], mask: {mask}
      score dot(q[b, h, q_idx], k[b, h, kv_idx])
      keep mask[q_idx, kv_idx] else nan
      weigh softmax
      sum v[b, h, kv_idx]
    """)
    )


def blocky(seed: int) -> Tensor:
    """A mask of no rule with tiles to skip; every query keeps a key."""
    generator = torch.Generator().manual_seed(seed)
    near = torch.rand(N // 64, N // 64, generator=generator) < 0.3
    kept = near.repeat_interleave(64, 0).repeat_interleave(64, 1) & (torch.rand(N, N, generator=generator) < 0.9)
    return kept | torch.eye(N, dtype=torch.bool)


def test_a_plan_is_kept_for_each_constant() -> None:
    v = torch.empty(1, 2, N, 16)
    one, two = blocky(0), blocky(1)
    plans = [build_plan(masked(), {"v": v, "mask": mask}, {}, 64, 64) for mask in (one, two, one)]
    assert plans[0] is plans[2] and not torch.equal(plans[0].coverage, plans[1].coverage)
    assert not is_fixed(masked("bool[320, 320]"))
    read = [build_plan(masked("bool[320, 320]"), {"v": v, "mask": one}, {}, 64, 64) for _ in range(2)]
    assert read[0] is not read[1] and torch.equal(read[0].coverage, plans[0].coverage)


def test_plans_are_kept_with_their_memory() -> None:
    """A tensor that is gone leaves its address to none while a plan goes by it; so many are kept, and no more."""
    plans: ConstantPlans[float] = ConstantPlans()
    for i in range(3 * _MOST):
        held = torch.full((64,), float(i))
        assert plans.of("sum", [held], lambda held=held: float(held.sum())) == 64.0 * i
    assert len(plans._made) == _MOST


class Masked(torch.nn.Module):
    """Attention under a mask of 0 and -inf."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", torch.zeros(N, N).masked_fill(~kept, float("-inf")))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = (q @ k.mT * 0.25 + self.mask).softmax(-1) @ v
        return out


def compare(model: Masked, compiled: object) -> None:
    assert callable(compiled)
    q, k, v = (torch.randn(1, 2, N, 16, requires_grad=True) for _ in range(3))
    both = []
    for f in (model, compiled):
        o = f(q, k, v)
        both.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


def test_masks_of_no_rule_end_to_end() -> None:
    """Two modules share the program's text, not the plan; a mask that is changed is looked at anew."""
    torch.manual_seed(0)
    for seed in (2, 3):
        model = Masked(blocky(seed))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="attncompiler")
        compare(model, compiled)
        compare(model, compiled)
    model.mask.copy_(model.mask.roll(64, 1).fill_diagonal_(0))
    compare(model, compiled)


def test_explain_says_what_tiles_are_visited() -> None:
    model = Masked(blocky(4))
    q = torch.randn(1, 2, N, 16)
    (region,) = attncompiler.explain(model, q, q, q).regions
    assert region.mask == "mask2[q_idx, kv_idx]" and 0.2 < region.density < 0.8
    assert any("no rule explains the constant mask" in note for note in region.notes)

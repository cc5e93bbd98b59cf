"""The Hopper forward kernel of a program: the same holes as the portable Triton kernel, in Gluon."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from attncompiler.codegen.emission import Emission, parameters_of, vector_reads
from attncompiler.codegen.text import fill, signature
from attncompiler.codegen.triton_expr import HELPERS, pointer_name, triton
from attncompiler.ir.expr import Expr
from attncompiler.ir.program import Dtype, Empty
from attncompiler.templates import hopper_forward

REGISTERS = 168  # a thread's share of 64K over 12 warps; the groups that compute take what the loading warp gives back
_TANH = '''
@gluon.jit
def tanh(x):
    """From one exponential; exact at both ends."""
    return 1.0 - 2.0 / (1.0 + gl.exp(2.0 * x))
'''


def shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """How a tile of [1, 1, rows, channels] lies in shared memory: what its descriptor and its buffer agree on."""
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def hopper_forward_source(e: Emission) -> str:
    """The kernel, with its own helpers and imports."""
    q, k, v = (e.vectors[read] for read in vector_reads(e.program))
    names = e.names(False, frozenset({"q_idx"}))
    before = e.preload(names, frozenset({"b", "h", "q_idx"}), extra=True)
    masked, masked_scale = _scores(e, names.loaded, True)
    full, scale = _scores(e, names.loaded, False)
    extra = []
    for expr in e.program.weigh.extra:
        text = triton(expr, names).replace("[:, None]", "")
        extra += [
            f"extra = {e.base2(text)}",
            "m_new = tl.maximum(m_i, extra)",
            "alpha = _exp2(m_i - m_new)",
            "l_i = l_i * alpha + _exp2(extra - m_new)",
            "acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, OUTPUT)), 1)",
            "m_i = m_new",
        ]
    dtype = {Dtype.BF16: "gl.bfloat16", Dtype.F16: "gl.float16"}[e.program.value.dtype]
    parameters = parameters_of(e, "forward")
    passed = [name for name in parameters if not name.startswith(("Full", "Partial", "Order", "stride_o_", "BLOCK_"))]
    passed = [name for name in passed if name not in ("O", "Lse", *(pointer_name(x.name) for x in (q, k, v)))]
    tile = {
        name: fill(hopper_forward.TILE, scores=scores, scale=factor)
        for name, scores, factor in (("partial", masked, masked_scale), ("full", full, scale))
    }
    text = fill(
        hopper_forward.KERNEL,
        parameters=signature([name for name in parameters if not name.startswith(("BLOCK_", "stride_o_"))]),
        operands=", ".join(passed),
        before=before,
        masked_scores=masked,
        masked_scale=masked_scale,
        partial_tile=tile["partial"],
        full_tile=tile["full"],
        extra_scores="\n".join(extra),
        denominator="gl.where(l_i == 0.0, 1.0, l_i)" if e.program.keep.empty is Empty.ZERO else "l_i",
        plan_row=e.plan_row("q_tile", "tl.cdiv(M, BLOCK_M)"),
        Q=pointer_name(q.name),
        K=pointer_name(k.name),
        V=pointer_name(v.name),
        k_head="h" if k.group == 1 else f"h // {k.group}",
        v_head="h" if v.group == 1 else f"h // {v.group}",
        ln2=repr(math.log(2)),
    )
    schedule = e.schedule.forward
    literals = {
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "{stages}": schedule.num_stages,
        "{d}": q.size,
        "{dtype}": dtype,
    }
    for name, value in literals.items():
        text = text.replace(name, str(value))
    helpers = "".join(_TANH if name == "tanh" else HELPERS[name].replace("@triton.jit", "@gluon.jit") for name in sorted(e.helpers))
    text = helpers + text
    for name in e.helpers:  # the Triton kernels of the same file have theirs under the plain name
        text = re.sub(rf"\b{name}\(", f"gluon_{name}(", text)
    return hopper_forward.IMPORTS + "\n" + text.replace("tl.", "gl.")


def _scores(e: Emission, loaded: dict[Expr, str], masked: bool) -> tuple[str, str]:
    """Lines that make `scores` of a tile from its products, and what multiplies them into base-2 units."""
    names = e.names(False, frozenset({"q_idx", "kv_idx"}) if masked else frozenset({"q_idx"}))
    names.loaded = dict(loaded)
    score, scale = e.score(masked, names)
    mask = e.mask_lines(names) if masked else ""
    return "\n".join([*names.lines, f"scores = {score}", *([mask] if mask else [])]), scale

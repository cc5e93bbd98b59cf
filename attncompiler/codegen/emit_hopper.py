"""The Hopper forward kernel of a program: the same holes as the portable Triton kernel, in Gluon."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from attncompiler.codegen.emission import Emission, Vector, corner, halved, parameters_of, vector_reads
from attncompiler.codegen.positions import TilePositions
from attncompiler.codegen.text import fill, signature
from attncompiler.codegen.triton_expr import HELPERS, pointer_name, triton
from attncompiler.ir.expr import Q_IDX, Expr
from attncompiler.ir.program import Dtype, Empty
from attncompiler.templates import hopper_forward

KERNEL = "attention_forward"
_WORDS = 11  # numbers that tell a row, origins aside
REGISTERS = 168  # a thread's share of 64K over 12 warps; the groups that compute take what the loading warp gives back
_TANH = '''
@gluon.jit
def tanh(x):
    """1 - 2 / (1 + exp(2 x)), exact at both ends; the quotient to the last bit but one."""
    assembly: gl.constexpr = "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }"
    return 1.0 - 2.0 * gl.inline_asm_elementwise(assembly, "=r,r", [x * 2.8853900817779268], dtype=gl.float32, is_pure=True, pack=1)
'''


def shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """How a tile of [1, 1, rows, channels] lies in shared memory: what its descriptor and its buffer agree on."""
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def hopper_forward_source(e: Emission) -> str:
    """The kernel, with its own helpers and imports."""
    q, k, v = (e.vectors[read] for read in vector_reads(e.program))
    names = e.names(KERNEL, frozenset({"q_idx"}))
    before = e.preload(names, frozenset({"b", "h", "q_idx"}), extra=True)
    masked_reads, masked, masked_scale = _scores(e, names.loaded, True)
    reads, full, scale = _scores(e, names.loaded, False)
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
    tables = ("Full", "Partial", "Order", "NextRow", "Origins", "stride_o_", "BLOCK_")
    passed = [name for name in parameters if not name.startswith(tables)]
    passed = [name for name in passed if name not in ("O", "Lse", *(pointer_name(x.name) for x in (q, k, v)))]
    queries, moving = e.positions(KERNEL)
    key_positions = moving.lines("tile", "kv_start", "keys")
    key_positions = key_positions if moving.tiles else f"kv_start = tile * BLOCK_N\n{key_positions}"
    partial_tile = fill(hopper_forward.TILE, key_positions=key_positions, reads=masked_reads, scores=masked, scale=masked_scale)
    full_tile = fill(hopper_forward.TILE, key_positions=key_positions, reads=reads, scores=full, scale=scale)
    origins = [line.split(" = ")[0] for line in moving.origins.splitlines()]
    listed = "".join(f", {name}" for name in origins)
    text = fill(
        hopper_forward.KERNEL,
        parameters=signature(["B", *(name for name in parameters if not name.startswith(("BLOCK_", "stride_o_")))]),
        operands=", ".join(passed),
        before=before,
        masked_reads=masked_reads,
        masked_scores=masked,
        masked_scale=masked_scale,
        partial_tile=partial_tile,
        full_tile=full_tile,
        extra_scores="\n".join(extra),
        denominator="gl.where(l_i == 0.0, 1.0, l_i)" if e.program.keep.empty is Empty.ZERO else "l_i",
        plan_row=e.plan_row("rank", "q_tiles"),
        key_positions=key_positions,
        query_positions=queries.lines("q_tile", "q_tile * BLOCK_M", "(GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES)))"),
        query_corner=queries.corner("q_tile"),
        key_corner=moving.corner("tile"),
        origins=moving.origins,
        origin_names=listed,
        no_origins=", 0" * len(origins),
        origin_words="\n".join(f"{name} = _word(words, places, {place})" for place, name in enumerate(origins, _WORDS)),
        q_tiles=str(moving.tiles.row_tiles) if moving.tiles else "gl.cdiv(M, BLOCK_M)",
        words=str(_WORDS + len(origins)),
        Origins=", Origins" if origins else "",
        q_at=corner("h", 1, _of_group(queries, e.box(KERNEL, Q_IDX), "group")),
        o_at=corner("h", 1, _of_group(queries, e.box(KERNEL, Q_IDX), "GROUP")),
        k_at=corner(_head(k), k.group, moving.at("tile * BLOCK_N")),
        v_at=corner(_head(v), v.group, moving.at("tile * BLOCK_N")),
        q_box=_listed(e.descriptor_block(KERNEL, pointer_name(q.name))),
        k_box=_listed(e.descriptor_block(KERNEL, pointer_name(k.name))),
        Q=pointer_name(q.name),
        K=pointer_name(k.name),
        V=pointer_name(v.name),
        next_item="item = gl.atomic_add(NextRow, 1) + step" if e.takes_tickets else "item += step",
        next_row="NextRow" if e.takes_tickets else "None",
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


def _head(vector: Vector) -> str:
    return "h" if vector.group == 1 else f"h // {vector.group}"


def _of_group(queries: TilePositions, box: tuple[int, ...], group: str) -> tuple[str, ...]:
    """Where the 64 rows of one group begin: the groups have half of a tile each, in the order of its tokens."""
    at = list(queries.at("q_tile * BLOCK_M"))
    place = next(i for i, side in enumerate(box) if side > 1)
    at[place] += f" + {group} * {halved(box)[place]}"
    return tuple(at)


def _listed(block: tuple[int, ...] | None) -> str:
    assert block is not None
    return ", ".join(map(str, block))


def _scores(e: Emission, loaded: dict[Expr, str], masked: bool) -> tuple[str, str, str]:
    """Lines that read single elements, lines that make `scores` of a tile, and what multiplies these into base-2 units."""
    beyond = {"q_idx"} | ({"kv_idx"} if masked and not e.whole_key_tiles else set())
    names = e.names(KERNEL, frozenset(beyond))
    names.loaded = dict(loaded)
    names.tiles = {} if e.schedule.forward.tiles else {"kv_idx": ("kv_start", "keys")}
    score, scale = e.score(masked, names)
    mask = e.mask_lines(names, KERNEL) if masked else ""
    return "\n".join(names.lines), "\n".join([f"scores = {score}", *([mask] if mask else [])]), scale

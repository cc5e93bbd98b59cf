"""The Hopper forward kernel of a program: the same holes as the portable Triton kernel, in Gluon."""

from __future__ import annotations

import math

from attncompiler.codegen.emission import Emission, corner, parameters_of, vector_reads
from attncompiler.codegen.hopper import (
    element_type,
    every_tile,
    head_of,
    listed,
    of_group,
    passed_on,
    row_holes,
    with_literals,
)
from attncompiler.codegen.kept_scores import kept_scores
from attncompiler.codegen.text import fill, signature
from attncompiler.codegen.triton_expr import pointer_name, triton
from attncompiler.ir.expr import Q_IDX, Expr
from attncompiler.ir.program import Empty
from attncompiler.templates import hopper_forward

KERNEL = "attention_forward"
_LOAD = "slot, phase = _load_tile({K}, {V}, rings, barriers, sizes, (b, h, tile{origin_names}), slot, phase)"


def hopper_forward_source(e: Emission) -> str:
    """The kernel; its helpers are those of `hopper_source`."""
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
    parameters = parameters_of(e, "forward")
    queries, moving = e.positions(KERNEL)
    key_positions = moving.lines("tile", "kv_start", "keys")
    key_positions = key_positions if moving.tiles else f"kv_start = tile * BLOCK_N\n{key_positions}"
    row = row_holes(e, KERNEL, "q_tile")
    pointers = {name: pointer_name(vector.name) for name, vector in (("Q", q), ("K", k), ("V", v))}
    load = fill(_LOAD, **pointers, **row)
    text = fill(
        hopper_forward.KERNEL,
        parameters=signature(["B", *(name for name in parameters if not name.startswith(("BLOCK_", "stride_o_")))]),
        operands=", ".join(passed_on(e, KERNEL)),
        before=before,
        masked_reads=masked_reads,
        masked_scores=masked,
        masked_scale=masked_scale,
        partial_tile=fill(hopper_forward.TILE, key_positions=key_positions, reads=masked_reads, scores=masked, scale=masked_scale),
        full_tile=fill(hopper_forward.TILE, key_positions=key_positions, reads=reads, scores=full, scale=scale),
        every_tile=every_tile(load),
        extra_scores="\n".join(extra),
        denominator="gl.where(l_i == 0.0, 1.0, l_i)" if e.program.keep.empty is Empty.ZERO else "l_i",
        key_positions=key_positions,
        query_positions=queries.lines("q_tile", "q_tile * BLOCK_M", "(GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES)))"),
        query_corner=queries.corner("q_tile"),
        key_corner=moving.corner("tile"),
        q_tiles=str(moving.tiles.row_tiles) if moving.tiles else "gl.cdiv(M, BLOCK_M)",
        q_at=corner("h", 1, of_group(queries, "q_tile * BLOCK_M", e.box(KERNEL, Q_IDX), "group")),
        o_at=corner("h", 1, of_group(queries, "q_tile * BLOCK_M", e.box(KERNEL, Q_IDX), "GROUP")),
        k_at=corner(head_of(k), k.group, moving.at("tile * BLOCK_N")),
        v_at=corner(head_of(v), v.group, moving.at("tile * BLOCK_N")),
        q_box=listed(e.descriptor_block(KERNEL, pointers["Q"])),
        k_box=listed(e.descriptor_block(KERNEL, pointers["K"])),
        ln2=repr(math.log(2)),
        **pointers,
        **row,
    )
    schedule = e.schedule.forward
    return with_literals(
        text,
        {
            "BLOCK_M": schedule.block_m,
            "BLOCK_N": schedule.block_n,
            "{stages}": schedule.num_stages,
            "{d}": q.size,
            "{dtype}": element_type(e),
        },
    )


def _scores(e: Emission, loaded: dict[Expr, str], masked: bool) -> tuple[str, str, str]:
    """Lines that read single elements, lines that make `scores` of a tile, and what multiplies these into base-2 units."""
    beyond = {"q_idx"} | ({"kv_idx"} if masked and not e.whole_key_tiles(KERNEL) else set())
    names = e.names(KERNEL, frozenset(beyond))
    names.loaded = dict(loaded)
    names.tiles = {} if e.schedule.forward.tiles else {"kv_idx": ("kv_start", "keys")}
    score, scale = e.score(masked, names)
    mask = kept_scores(e, names, KERNEL) if masked else ""
    return "\n".join(names.lines), "\n".join([f"scores = {score}", *([mask] if mask else [])]), scale

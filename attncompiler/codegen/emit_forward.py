"""The forward kernel, for every target."""

from __future__ import annotations

from attncompiler.codegen.emission import (
    Emission,
    parameters_of,
    visit_ranges,
)
from attncompiler.codegen.kept_scores import kept_scores
from attncompiler.codegen.text import fill, signature
from attncompiler.codegen.triton_expr import Names, triton
from attncompiler.ir.expr import ONE
from attncompiler.templates import softmax_forward

KERNEL = "attention_forward"


def forward_source(e: Emission) -> str:
    names = e.names(KERNEL, frozenset({"q_idx"}))
    where, _ = e.positions(KERNEL)
    queries = e.load_all(e.lefts(), "q_idx", "BLOCK_M", where.at("q_tile * BLOCK_M"), True)
    before = e.preload(names, frozenset({"b", "h", "q_idx"}), extra=True)
    loops = "\n".join(_loop(e, names, masked) for masked in (False, True))
    extra = []
    for expr in e.program.weigh.extra:
        text = triton(expr, names).replace("[:, None]", "")
        extra += [f"extra = {e.base2(text)}", "m_new = tl.maximum(m_i, extra)",
                  'm_ref = tl.where(m_new == float("-inf"), 0.0, m_new)', "alpha = tl.exp2(m_i - m_ref)",
                  "l_i = l_i * alpha + tl.exp2(extra - m_ref)", "acc = acc * alpha[:, None]", "m_i = m_new"]  # fmt: skip
    finish = ["out = acc / l_i[:, None]"]
    if e.program.keep.zero_if_empty:
        finish = ["out = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]  # a row that keeps no key is 0"]
    finish.append(f"lse = {e.natural('m_i + tl.log2(l_i)')}")
    rcp = ""
    if e.program.has_rcp:
        rcp = (
            "# what rounding takes from lse, which may be too large to hold log(l_i), rcp gives back\n"
            f"rcp = tl.where(l_i == 0.0, 0.0, tl.exp2({e.base2('lse')} - m_i) / l_i)\n"
            "tl.store(Rcp + rows, rcp, mask=q_idx < M)"
        )
    return fill(
        softmax_forward.KERNEL,
        parameters=signature(parameters_of(e, "forward")),
        query_positions=where.lines("q_tile", "q_tile * BLOCK_M", "tl.arange(0, BLOCK_M)"),
        load_queries="\n".join(filter(None, [queries, before])),
        loops=loops,
        extra_scores="\n".join(extra),
        finish="\n".join(finish),
        store_rcp=rcp,
    ).replace("BLOCK_DV", str(e.value.block)).replace("DV)", f"{e.value.size})")  # fmt: skip


def _loop(e: Emission, outer: Names, masked: bool) -> str:
    names = e.names(KERNEL, frozenset({"q_idx", "kv_idx"}) if masked else frozenset({"q_idx"}))
    _, where = e.positions(KERNEL)
    names.loaded = dict(outer.loaded)
    score, scale = e.score(masked, names)
    mask = kept_scores(e, names, KERNEL) if masked else ""
    adjust, weights, value = "", "p", e.value.name
    before_adjust = len(names.lines)
    if e.program.adjust != ONE:
        factor = triton(e.program.adjust, names)
        adjust, weights = f"weights = p * {factor}", "weights"
    loads = "\n".join(names.lines[:before_adjust])
    adjust = "\n".join([*names.lines[before_adjust:], adjust]) if adjust else ""
    tile = fill(
        softmax_forward.TILE,
        key_positions=where.lines("kv_start // BLOCK_N", "kv_start", "tl.arange(0, BLOCK_N)"),
        load_keys=e.load_all(e.rights(), "kv_idx", "BLOCK_N", where.at("kv_start"), masked),
        score_lines="\n".join(filter(None, [e.products(False), loads])),
        score=score,
        scale=scale,
        apply_mask=mask,
        reference='m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: -inf minus -inf would be NaN'
        if masked
        else "m_ref = m_new",
        adjust=adjust,
        load_values=e.load(e.value, "kv_idx", "BLOCK_N", where.at("kv_start"), masked),
        add_values=e.dot(f"{weights}.to({value}.dtype)", value, "acc * alpha[:, None]"),
    )
    name = "Partial" if masked else "Full"
    row = e.plan_row("tl.program_id(0)", "tl.num_programs(0)")
    return visit_ranges(softmax_forward.LOOP_OVER_RANGES, name, tile, row, where)

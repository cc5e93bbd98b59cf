"""The backward kernels: delta, the gradients of the query side, and those of the key side."""

from __future__ import annotations

from collections.abc import Callable, Collection

from attncompiler.codegen.emission import (
    Emission,
    Vector,
    corner,
    element_gradients,
    parameters_of,
    side_of,
    tag,
    visit_ranges,
)
from attncompiler.codegen.kept_scores import kept_scores
from attncompiler.codegen.text import fill, signature
from attncompiler.codegen.triton_expr import Names, number, triton
from attncompiler.ir.derivative import derivative
from attncompiler.ir.expr import ONE, TRUE, Const, Dot, Read
from attncompiler.ir.program import Empty
from attncompiler.templates import softmax_backward, softmax_forward

DELTA, QUERIES, KEYS = "attention_delta", "attention_backward_queries", "attention_backward_keys"


def gradient_text(e: Emission, names: Names, wrt: Dot | Read, masked: bool) -> tuple[str, float]:
    """(tile of d loss / d wrt, constant factor still to be applied). The factor is that of full and of partial tiles: their sum is
    scaled by it once."""
    adjust = derivative(e.program.adjust, wrt)
    nothing = Const(0.0)
    kept, all_pairs = (derivative(score, wrt) for score in (e.kept_score, e.program.score))
    if adjust == nothing and isinstance(kept, Const) and kept == all_pairs:
        return "ds", float(kept.value)
    score = all_pairs if masked else kept
    parts = [f"ds * {triton(score, names)}"] if score != nothing else []
    parts += [f"p * dp * {triton(adjust, names)}"] if adjust != nothing else []
    return " + ".join(parts) if parts else "tl.zeros_like(ds)", 1.0


def _factor_lines(e: Emission, names: Names) -> tuple[list[str], str]:
    """(lines that make the factor of `adjust`, d loss / d weight before it is normalised)."""
    if e.program.adjust == ONE:
        return [], "dp"
    before = len(names.lines)
    factor = triton(e.program.adjust, names)
    lines = names.lines[before:]
    del names.lines[before:]
    return [*lines, f"factor = {factor}"], "dp * factor"


def _ds_lines(e: Emission, names: Names, transposed: bool) -> list[str]:
    lines, gradient = _factor_lines(e, names)
    return [*lines, f"ds = p * ({gradient} - delta{'[None, :]' if transposed else '[:, None]'})"]


def queries_source(e: Emission) -> str:
    wanted = e.layout.wanted
    lefts = [dot for dot in e.dots if dot.left.tensor in wanted]
    rows = [r for r in element_gradients(e.program, wanted) if side_of(r) == "q"]
    accumulators = [f"d{e.vectors[d.left].name} = tl.zeros([BLOCK_M, {e.vectors[d.left].block}], tl.float32)" for d in lefts]
    accumulators += [f"d_{tag(e, r)} = tl.zeros([BLOCK_M], tl.float32)" for r in rows]
    factors: dict[str, float] = {}
    where, _ = e.positions(QUERIES)
    names, load_queries = _query_tile(e, QUERIES)
    whole = {e.vectors[d.right] for d in lefts}
    loops = _over_keys(e, QUERIES, names, whole, lambda names, masked: _query_gradients(e, names, masked, lefts, rows, factors))
    store = [_store_vector(e, e.vectors[d.left], "q_idx", "M", factors) for d in dict.fromkeys(lefts)]
    store += [f"tl.store(Grad_{tag(e, r)} + rows, d_{tag(e, r)}, mask=q_idx < M)" for r in rows]
    return fill(
        softmax_backward.QUERIES,
        kernel=QUERIES,
        parameters=signature(parameters_of(e, "queries")),
        query_positions=where.lines("q_tile", "q_tile * BLOCK_M", "tl.arange(0, BLOCK_M)"),
        load_queries=load_queries,
        load_grad_o=_load_grad_o(e, where.at("q_tile * BLOCK_M"), False),
        load_rows=softmax_backward.LOAD_DELTA,
        load_rcp=_load_rcp(e),
        accumulators="\n".join(dict.fromkeys(accumulators)),
        loops=loops,
        store="\n".join(store),
    ).replace("BLOCK_DV", str(e.value.block))


def _query_tile(e: Emission, kernel: str) -> tuple[Names, str]:
    """The names of a kernel that has queries on rows, and the lines that load what does not change over its keys."""
    names = e.names(kernel, frozenset({"q_idx"}))
    where, _ = e.positions(kernel)
    queries = e.load_all(e.lefts(), "q_idx", "BLOCK_M", where.at("q_tile * BLOCK_M"), True)
    before = e.preload(names, frozenset({"b", "h", "q_idx"}))
    return names, "\n".join(filter(None, [queries, before]))


def _over_keys(e: Emission, kernel: str, outer: Names, whole: Collection[Vector], use: Callable[[Names, bool], list[str]]) -> str:
    """The loops over full and partial key tiles; `use(names, masked)` writes what is done with p, dp and the vectors `whole`."""
    return "\n".join(_queries_loop(e, kernel, outer, masked, whole, use) for masked in (False, True))


def _recomputed(e: Emission, kernel: str, outer: Names, masked: bool) -> tuple[Names, str, str, str, list[str]]:
    """The score of a tile once more: names of the loop, the score, what multiplies it, the mask's line, and the loads it needs."""
    names = e.names(kernel, frozenset({"q_idx", "kv_idx"}))
    names.loaded = dict(outer.loaded)
    score, scale = e.score(masked, names)
    mask = kept_scores(e, names, kernel) if masked else ""
    loads = list(names.lines)
    names.lines.clear()
    return names, score, scale, mask, loads


def _query_gradients(
    e: Emission, names: Names, masked: bool, lefts: list[Dot], rows: list[Read], factors: dict[str, float]
) -> list[str]:
    """What a tile of keys adds to the gradients of the query side. `factors` receives what is left to scale each vector's by."""
    lines = _ds_lines(e, names, False)
    for dot in lefts:
        text, factor = gradient_text(e, names, dot, masked)
        left, right = e.vectors[dot.left].name, e.vectors[dot.right].name
        if sum(other.left == dot.left for other in e.dots) > 1:  # each product has a factor of its own
            text, factor = scaled(text, factor), 1.0
        factors[left] = factor
        lines.append(f"d{left} = {e.dot(f'({text}).to({right}.dtype)', right, f'd{left}')}")
    for read in rows:
        text, factor = gradient_text(e, names, read, masked)
        lines.append(f"d_{tag(e, read)} += tl.sum({scaled(text, factor)}, 1)")
    return [*lines, *pair_gradients(e, names, masked)]


def pair_gradients(e: Emission, names: Names, masked: bool) -> list[str]:
    """What stores the gradients of elements that belong to one pair each."""
    lines = []
    for read in element_gradients(e.program, e.layout.wanted):
        if side_of(read) == "pair":
            text, factor = gradient_text(e, names, read, masked)
            lines.append("at_pairs = ((b.to(tl.int64) * H + h) * M + q_idx[:, None]) * N + kv_idx[None, :]")
            inside = "(q_idx[:, None] < M) & (kv_idx[None, :] < N)"
            lines.append(f"tl.store(Grad_{tag(e, read)} + at_pairs, {scaled(text, factor)}, mask={inside})")
    return lines


def _queries_loop(
    e: Emission, kernel: str, outer: Names, masked: bool, whole: Collection[Vector], use: Callable[[Names, bool], list[str]]
) -> str:
    names, score, scale, mask, loads = _recomputed(e, kernel, outer, masked)
    _, where = e.positions(kernel)
    lines = use(names, masked)
    tile = fill(
        softmax_backward.QUERIES_TILE,
        key_positions=where.lines("kv_start // BLOCK_N", "kv_start", "tl.arange(0, BLOCK_N)"),
        load_keys=e.load_all(e.rights(), "kv_idx", "BLOCK_N", where.at("kv_start"), masked, whole),
        score_lines="\n".join(filter(None, [e.products(False), *loads])),
        score=score,
        scale=scale,
        apply_mask=mask,
        rcp=" * rcp[:, None]" if e.program.has_rcp else "",
        load_values=e.load_all([e.value], "kv_idx", "BLOCK_N", where.at("kv_start"), masked),
        grad_weights=e.inner_products("do", e.value.name, e.value.size, False),
        gradients="\n".join([*names.lines, *lines]),
    )
    name = "Partial" if masked else "Full"
    row = e.plan_row("tl.program_id(0)", "tl.num_programs(0)")
    return visit_ranges(softmax_forward.LOOP_OVER_RANGES, name, tile, row, where)


def keys_source(e: Emission) -> str:
    wanted = e.layout.wanted
    rights = [dot for dot in e.dots if dot.right.tensor in wanted]
    columns = [r for r in element_gradients(e.program, wanted) if side_of(r) == "kv"]
    value = e.value
    _, where = e.positions(KEYS)
    keys = e.load_all(e.rights(), "kv_idx", "BLOCK_N", where.at("kv_tile * BLOCK_N"), True)
    names = e.names(KEYS, frozenset({"kv_idx", "q_idx"}))
    accumulators = [f"d{e.vectors[d.right].name} = tl.zeros([BLOCK_N, {e.vectors[d.right].block}], tl.float32)" for d in rights]
    accumulators += [f"d{value.name} = tl.zeros([BLOCK_N, {value.block}], tl.float32)"] if value.name in wanted else []
    head = [e.preload(names, frozenset({"b", "h", "kv_idx"}))]
    head += [f"d_{tag(e, r)} = tl.zeros([BLOCK_N], tl.float32)" for r in columns]
    factors: dict[str, float] = {value.name: 1.0}
    loops = "\n".join(_keys_loop(e, names, masked, rights, columns, factors) for masked in (False, True))
    store = [_store_vector(e, e.vectors[d.right], "kv_idx", "N", factors) for d in dict.fromkeys(rights)]
    store += [_store_vector(e, value, "kv_idx", "N", factors)] if value.name in wanted else []
    per_head = [
        f"tl.store(Grad_{tag(e, r)} + (b.to(tl.int64) * H + h) * N + kv_idx, d_{tag(e, r)}, mask=kv_idx < N)" for r in columns
    ]
    return fill(
        softmax_backward.KEYS,
        parameters=signature(parameters_of(e, "keys")),
        key_positions=where.lines("kv_tile", "kv_tile * BLOCK_N", "tl.arange(0, BLOCK_N)"),
        load_keys=keys,
        load_values=e.load_all([value], "kv_idx", "BLOCK_N", where.at("kv_tile * BLOCK_N"), True),
        accumulators="\n".join(dict.fromkeys(accumulators)),
        head_lines="\n".join(filter(None, head)),
        loops=loops,
        store_per_head="\n".join(per_head),
        store="\n".join(store),
    ).replace("BLOCK_DV", str(value.block)).replace("KV_HEADS", f"(H // {e.group})").replace("GROUP", str(e.group))  # fmt: skip


def _keys_loop(e: Emission, outer: Names, masked: bool, rights: list[Dot], columns: list[Read], factors: dict[str, float]) -> str:
    names, score, scale, mask, loads = _recomputed(e, KEYS, outer, masked)
    where, _ = e.positions(KEYS)
    value = e.value.name
    ds = _ds_lines(e, names, True)
    lines = []
    if value in e.layout.wanted:
        weights = "p" if e.program.adjust == ONE else "(p * factor)"
        lines.append(f"d{value} = {e.dot(f'{weights}.to(do.dtype)', 'do', f'd{value}')}")
    lines.append(f"dp = {e.inner_products('do', value, e.value.size, True)}")
    if e.program.adjust != ONE:
        lines = [*ds[:-1], *lines, ds[-1]]
    else:
        lines += ds
    for dot in rights:
        text, factor = gradient_text(e, names, dot, masked)
        left, right = e.vectors[dot.left].name, e.vectors[dot.right].name
        if sum(other.right == dot.right for other in e.dots) > 1:
            text, factor = scaled(text, factor), 1.0
        factors[right] = factor
        lines.append(f"d{right} = {e.dot(f'({text}).to({left}.dtype)', left, f'd{right}')}")
    for read in columns:
        text, factor = gradient_text(e, names, read, masked)
        lines.append(f"d_{tag(e, read)} += tl.sum({scaled(text, factor)}, 1)")
    tile = fill(
        softmax_backward.KEYS_TILE,
        query_positions=where.lines("q_start // BLOCK_M", "q_start", "tl.arange(0, BLOCK_M)"),
        load_queries=e.load_all(e.lefts(), "q_idx", "BLOCK_M", where.at("q_start"), True, {e.vectors[d.left] for d in rights}),
        load_rows=softmax_backward.LOAD_DELTA,
        load_rcp=_load_rcp(e),
        score_lines="\n".join(filter(None, [e.products(True), *loads])),
        score=score,
        scale=scale,
        apply_mask=mask,
        rcp=" * rcp[None, :]" if e.program.has_rcp else "",
        load_grad_o=_load_grad_o(e, where.at("q_start"), value in e.layout.wanted),
        gradients="\n".join([*names.lines, *lines]),
    )
    name = "Partial" if masked else "Full"
    row = e.plan_row("tl.program_id(0)", "tl.num_programs(0)")
    return visit_ranges(softmax_backward.LOOP_OVER_RANGES, name, tile, row, where)


def scaled(text: str, factor: float) -> str:
    """`text` times a constant."""
    return text if factor == 1.0 else f"({text}) * {number(factor)}"


def _load_grad_o(e: Emission, at: tuple[str, ...], whole: bool) -> str:
    """As `Emission.load` does for vectors."""
    value = e.value
    if e.schedule.descriptors:
        return f"do = DO.load([{corner('h', 1, at)}, 0]).reshape(BLOCK_M, {value.block})"
    addresses = "DO + b.to(tl.int64) * stride_do_b + h.to(tl.int64) * stride_do_h + q_idx.to(tl.int64)[:, None] * stride_do_m"
    if e.in_parts and not whole:
        return f"do_rows = {addresses}"
    return (
        f"do_channels = tl.arange(0, {value.block})\n"
        f"do_rows = {addresses}\n"
        f"inside = (q_idx[:, None] < M) & (do_channels[None, :] < {value.size})\n"
        "do = tl.load(do_rows + do_channels[None, :] * stride_do_d, mask=inside, other=0.0)"
    )


def _load_rcp(e: Emission) -> str:
    return "rcp = tl.load(Rcp + rows, mask=q_idx < M, other=1.0)" if e.program.has_rcp else ""


def _store_vector(e: Emission, vector: Vector, row: str, size: str, factors: dict[str, float]) -> str:
    name = vector.name
    head = "h" if size == "M" else "kv_head"
    value = scaled(f"d{name}", factors.get(name, 1.0))
    return (
        f"{name}_channels = tl.arange(0, {vector.block})\n"
        f"grad_rows = Grad_{name} + b.to(tl.int64) * stride_grad_{name}_b + {head} * stride_grad_{name}_h"
        f" + {row}.to(tl.int64)[:, None] * stride_grad_{name}_row\n"
        f"inside = ({row}[:, None] < {size}) & ({name}_channels[None, :] < {vector.size})\n"
        f"grad_at = grad_rows + {name}_channels[None, :] * stride_grad_{name}_channel\n"
        f"tl.store(grad_at, ({value}).to(Grad_{name}.dtype.element_ty), mask=inside)"
    )


def row_statistics(e: Emission) -> tuple[str, str]:
    """Lines that make `reference` of the rows of a tile of queries, and lines that turn rowsum(O * dO) into delta and store both."""
    lse = e.base2("tl.load(Lse + rows, mask=q_idx < M, other=0.0)")
    guard, zero = "", ""
    if e.program.keep.predicate != TRUE and e.program.keep.empty is not Empty.SCORE:
        guard = (
            "# no key is kept: no weight, and no gradient of any score\n"
            'reference = tl.where(reference == float("-inf"), float("inf"), reference)'
        )
        zero = 'delta = tl.where(reference == float("inf"), 0.0, delta)'
    reference = fill(softmax_backward.MAKE_REFERENCE, lse=lse, guard_empty=guard)
    subtract = "delta -= tl.load(DLse + rows, mask=q_idx < M, other=0.0)" if e.layout.has_grad_lse else ""
    return reference, fill(softmax_backward.STORE_DELTA, subtract_grad_lse=subtract, guard_empty=zero)


def delta_source(e: Emission) -> str:
    reference, store = row_statistics(e)
    parameters = signature(parameters_of(e, "delta"))
    if not e.schedule.delta_over_keys:
        unread = e.program.keep.empty is Empty.UNREAD
        pass_empty = 'inside = inside & (reference != float("inf"))[:, None]  # nothing wrote these rows' if unread else ""
        holes = {"make_reference": reference, "store_delta": store, "pass_empty": pass_empty}
        text = fill(softmax_backward.DELTA, parameters=parameters, **holes)
        return text.replace("BLOCK_DV", str(e.value.block)).replace("DV)", f"{e.value.size})")
    where, _ = e.positions(DELTA)
    names, load_queries = _query_tile(e, DELTA)
    return fill(
        softmax_backward.QUERIES,
        kernel=DELTA,
        parameters=parameters,
        query_positions=where.lines("q_tile", "q_tile * BLOCK_M", "tl.arange(0, BLOCK_M)"),
        load_queries=load_queries,
        load_grad_o=_load_grad_o(e, where.at("q_tile * BLOCK_M"), False),
        load_rows=reference,
        load_rcp=_load_rcp(e),
        accumulators="\n".join(f"{name} = tl.zeros([BLOCK_M], tl.float32)" for name in _delta_sums(e)),
        loops=_over_keys(e, DELTA, names, (), lambda names, masked: _delta_lines(e, names)),
        store="\n".join([*([] if e.program.weigh.extra else [softmax_backward.FINISH_MEAN]), store]),
    ).replace("BLOCK_DV", str(e.value.block))


def _delta_sums(e: Emission) -> tuple[str, ...]:
    """What the walk over keys sums; extra scores have a share of the weights, so that P * dP has no mean."""
    return ("delta",) if e.program.weigh.extra else ("delta", "weight", "pivot")


def _delta_lines(e: Emission, names: Names) -> list[str]:
    lines, gradient = _factor_lines(e, names)
    if e.program.weigh.extra:
        return [*lines, f"delta += tl.sum(p * ({gradient}), 1)"]
    return [*lines, f"gradient = {gradient}", softmax_backward.ADD_TO_MEAN.strip()]

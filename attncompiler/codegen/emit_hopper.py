"""The Hopper forward kernel of a program: the same holes as the portable Triton kernel, in Gluon."""

from __future__ import annotations

import math

from attncompiler.codegen.emission import PANEL, Emission, Vector, corner, halved, parameters_of, vector_reads
from attncompiler.codegen.hopper import (
    bring,
    brought,
    element_type,
    every_tile,
    head_of,
    listed,
    of_group,
    passed_on,
    read_brought,
    row_holes,
    where_masked,
    with_literals,
)
from attncompiler.codegen.kept_scores import kept_scores
from attncompiler.codegen.positions import TilePositions
from attncompiler.codegen.text import fill, signature
from attncompiler.codegen.triton_expr import pointer_name, triton
from attncompiler.ir.expr import KV_IDX, Q_IDX, Expr, Read
from attncompiler.templates import hopper_by_list, hopper_forward, hopper_rows

KERNEL = "attention_forward"
_OF_TWO_PASSES = "k_slot + k_phase * {stages}"  # where a group finds what has a place for each of two passes of the ring
# Keys of a tile with which a product of two operands in shared memory reads all of that memory's 128 bytes a cycle: queries are in
# registers then. With more keys a group has fewer registers free and gains nothing. Source: docs/performance.md.
_NARROW = 64
_LOAD = """
{ends_soon}
{after}
slot, phase = _load_tile({K}, {V}, rings, barriers, operands, (b, h, tile, masked, after{origin_names}), slot, phase)
"""
_LOAD_PAIR = """
{ends_soon}
{after}
waiting, slot, phase = _load_pair({K}, {V}, rings, barriers, operands, (b, h, tile, masked, after), waiting, slot, phase)
"""


def hopper_forward_source(e: Emission) -> str:
    """The kernel; its helpers are those of `hopper_source`."""
    q, k, v = (e.vectors[read] for read in vector_reads(e.program))
    names = e.names(KERNEL, frozenset({"q_idx"}))
    before = e.preload(names, frozenset({"b", "h", "q_idx"}), extra=True)
    read = brought(e, KV_IDX)
    reads, masked, full, scale = _scores(e, names.loaded, read)
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
    q_tiles = str(queries.tiles.row_tiles) if queries.tiles else "gl.cdiv(M, BLOCK_M)"
    row = row_holes(e, KERNEL, "q_tile", q_tiles)
    pointers = {name: pointer_name(vector.name) for name, vector in (("Q", q), ("K", k), ("V", v))}
    q_tile = halved(e.box(KERNEL, Q_IDX))
    ways = _queries_and_outputs(e, {**pointers, **row})
    operands = ", ".join(passed_on(e, KERNEL))
    loads = fill(
        hopper_forward.LOADS,
        every_tile=_loop_of_loads(e, {**pointers, **row}),
        query_corner=queries.corner("q_tile"),
        load_queries=ways["load_queries"],
        operands=operands,
        **pointers,
        **{**row, "first_words": row["first_words_of_a_warp"]},
    )
    schedule = e.schedule.forward
    width = schedule.block_n * (1 + schedule.pairs)
    of_tile, copies = _label_and_positions(e, moving), _copies(e, read, moving)
    text = fill(
        hopper_forward.KERNEL,
        load_tile=_load_tile(e, k, v, {**pointers, **row, "operands": operands}, copies),
        loads=f"{loads}\n{row['telling_warp']}",
        of_queries=".load(gl.DotOperandLayout(0, SCORES, 2))" if width <= _NARROW else "",
        row_readers=str(3 + (e.layout.by_list is not None)),
        **ways,
        parameters=signature(["B", *(name for name in parameters if not name.startswith("BLOCK_"))]),
        operands=operands,
        before=before,
        reads=reads,
        masked_scores=masked,
        scale=scale,
        every_tile=_every_tile(e, masked, full, {"reads": reads, "scale": scale, **of_tile}),
        **copies,
        extra_scores="\n".join(extra),
        denominator="gl.where(l_i == 0.0, 1.0, l_i)" if e.program.keep.zero_if_empty else "l_i",
        **of_tile,
        query_positions=queries.lines("q_tile", "q_tile * BLOCK_M", "(GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES)))"),
        q_box=listed((*((1, 1) if len(q_tile) < 3 else (1,)), *q_tile, q.size)),
        k_box=listed((1, 1, width, k.size) if schedule.pairs else e.descriptor_block(KERNEL, pointers["K"])),
        label_words="4" if schedule.pairs else "2",
        ln2=repr(math.log(2)),
        **pointers,
        **row,
    )
    return with_literals(
        text,
        {
            "BLOCK_M": schedule.block_m,
            "BLOCK_N": width,
            "{stages}": schedule.num_stages,
            "{messages}": row["messages"],
            "{d}": q.size,
            "{dtype}": element_type(e),
        },
    )


def _loop_of_loads(e: Emission, holes: dict[str, str]) -> str:
    """The loop of the loading warp over the tiles of a row."""
    if e.schedule.forward.pairs:
        return f"waiting = -1\n{every_tile(fill(_LOAD_PAIR, **holes))}"
    return every_tile(fill(_LOAD, **holes))


def _load_tile(e: Emission, k: Vector, v: Vector, holes: dict[str, str], copies: dict[str, str]) -> str:
    """The function that loads a tile of keys and one of values, or two of each as one."""
    schedule, (_, moving) = e.schedule.forward, e.positions(KERNEL)
    if schedule.pairs:
        return fill(
            hopper_forward.LOAD_PAIR,
            k_head=head_of(k),
            v_head=head_of(v),
            half=str(schedule.block_n),
            panel=str(min(PANEL, k.size)),
            whole_bytes=str(2 * schedule.block_n * k.size * 2),  # of two halves, two bytes a number
            **holes,
        )
    return fill(
        hopper_forward.LOAD_TILE,
        key_corner=moving.corner("tile"),
        k_at=corner(head_of(k), k.group, moving.at("tile * BLOCK_N")),
        v_at=corner(head_of(v), v.group, moving.at("tile * BLOCK_N")),
        **copies,
        **holes,
    )


def _label_and_positions(e: Emission, moving: TilePositions) -> dict[str, str]:
    """How a group reads what a tile is, and where its keys lie."""
    if e.schedule.forward.pairs:
        at = f"({_OF_TWO_PASSES}) * 2"
        positions = fill(hopper_forward.PAIR_POSITIONS, label_at=at, half=str(e.schedule.forward.block_n))
        return {"read_label": fill(hopper_rows.READ_LABEL, label_at=at), "key_positions": positions}
    positions = moving.lines("tile", "kv_start", "keys")
    return {
        "read_label": fill(hopper_rows.READ_LABEL, label_at=_OF_TWO_PASSES),
        "key_positions": positions if moving.tiles else f"kv_start = tile * BLOCK_N\n{positions}",
    }


def _every_tile(e: Emission, masked: str, full: str, holes: dict[str, str]) -> str:
    """The loop over the tiles of a row behind its first, or one for masked tiles and one for full ones."""
    if not e.schedule.forward.apart:
        tile = fill(hopper_forward.TILE, scores=where_masked(masked, full), **holes)
        return fill(hopper_forward.EVERY_TILE, tile=tile)
    tiles = {
        f"{kind}_tile": fill(hopper_forward.TILE, scores=scores, **holes) for kind, scores in (("masked", masked), ("full", full))
    }
    return fill(hopper_forward.EVERY_TILE_APART, **tiles)


def _copies(e: Emission, read: Read | None, keys: TilePositions) -> dict[str, str]:
    """How what the mask reads of each key comes with a tile of keys."""
    if read is None:
        return {"copied_positions": "", "copies": "", "brought_ring": "", "brought_passed": "None", "k_arrivals": "2"}
    return {
        "copied_positions": fill(
            hopper_rows.COPIED_POSITIONS,
            tokens="BLOCK_N",
            positions=keys.lines("tile", "tile * BLOCK_N", "gl.arange(0, BLOCK_N, SHARED)"),
        ),
        "copies": f"{bring(e, read, KV_IDX, 'slot + phase * {stages}')}\n{fill(hopper_rows.COPIED, ready='k_ready')}",
        "brought_ring": fill(hopper_rows.BRING_RING, places="2 * {stages}", tokens="BLOCK_N"),
        "brought_passed": "brought_ring",
        "k_arrivals": "34",  # the load, the label, and the copies of each thread
    }


def _queries_and_outputs(e: Emission, holes: dict[str, str]) -> dict[str, str]:
    """How queries come and outputs go: tile by tile through descriptors, or one by one as a list names them."""
    queries, _ = e.positions(KERNEL)
    q_at, o_at = (corner("h", 1, of_group(queries, "q_tile * BLOCK_M", e.box(KERNEL, Q_IDX), who)) for who in ("group", "GROUP"))
    by_list = e.layout.by_list
    if by_list is None:
        return {
            "load_queries": fill(hopper_forward.LOAD_QUERIES, q_at=q_at, **holes),
            "store": fill(hopper_forward.STORE, o_at=o_at),
            **dict.fromkeys(("by_list", "list_passed", "list_buffers", "taking_warp", "takes", "after_queries"), ""),
            "q_arrivals": "1",
            "workers": "4, 1, 1",
            "registers": "240, 24, 24",
        }
    outputs = (", gains" if by_list.gains else "") + (", Summed" if by_list.sums else "")
    of_gains = ", gains, Gain, stride_gain_b, stride_gain_h, stride_gain_m" if by_list.gains else ""
    output_strides = "stride_o_b, stride_o_h, stride_o_m"
    strides = ", ".join(f"stride_{e.lefts()[0].name}_{axis}" for axis in ("b", "h", "row"))
    lists = f"(Index, Count, listed{of_gains})"
    return {
        "load_queries": "",
        "store": fill(
            hopper_by_list.STORE,
            outputs=outputs,
            scale=hopper_by_list.SCALE if by_list.gains else "",
            store_sums=fill(hopper_by_list.STORE_SUMS, o_at=o_at) if by_list.sums else "",
        ),
        "by_list": ", by_list",
        "list_passed": f", (listed{outputs}, {output_strides})",
        "list_buffers": fill(hopper_by_list.BUFFERS, gains=hopper_by_list.GAINS if by_list.gains else ""),
        "taking_warp": fill(
            hopper_by_list.TAKING_WARP,
            first_words=holes["first_words_of_a_warp"],
            next_words=hopper_rows.NEXT_WORDS,
            gain_names=", gains, Gain, gain_b, gain_h, gain_m" if by_list.gains else "",
            take_gains=hopper_by_list.TAKE_GAINS if by_list.gains else "",
            Q=holes["Q"],
        ),
        "takes": f"(_takes, ({holes['Q']}, queries, messages, {lists}, (H, M), ({strides}))),",
        "after_queries": "fence_async_shared()  # what threads copied, products read",
        "q_arrivals": "33",  # the copies of each thread, and what else the warp leaves
        "workers": "4, 1, 1, 1",
        "registers": "232, 40, 40, 40",
    }


def _scores(e: Emission, loaded: dict[Expr, str], read: Read | None) -> tuple[str, str, str, str]:
    """Lines that read single elements, lines that make `scores` of a masked tile and of another, and what multiplies these into base-2
    units. What only the mask reads, masked tiles read, `read` from shared memory."""
    names = e.names(KERNEL, frozenset({"q_idx"} | (set() if e.whole_key_tiles(KERNEL) else {"kv_idx"})))
    names.loaded = dict(loaded)
    names.tiles = {} if e.schedule.forward.tiles or e.schedule.forward.pairs else {"kv_idx": ("kv_start", "keys")}
    full, scale = e.score(False, names)
    reads = list(names.lines)
    if read is not None:
        names.loaded[read] = "brought"
        names.lines.append(read_brought(_OF_TWO_PASSES))
    score, masked_scale = e.score(True, names)
    mask = kept_scores(e, names, KERNEL, "keys")
    if masked_scale != scale:
        full, score, scale = f"({full}){scale}", f"({score}){masked_scale}", ""
    masked = [*names.lines[len(reads) :], f"scores = {score}", *([mask] if mask else [])]
    return "\n".join(reads), "\n".join(masked), f"scores = {full}", scale

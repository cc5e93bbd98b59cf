"""What the emitters of Hopper kernels share (templates/hopper_rows.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from attncompiler.codegen.emission import Emission, Vector, halved, list_parameters, parameters_of
from attncompiler.codegen.positions import TilePositions
from attncompiler.codegen.text import fill
from attncompiler.codegen.tile_bounds import FlatNames
from attncompiler.codegen.triton_expr import HELPERS, TABLES, element_address, pointer_name
from attncompiler.ir.expr import Q_IDX, Axis, Const, Read, axes_of, reads_of
from attncompiler.ir.program import Dtype
from attncompiler.passes.grid import split_axis
from attncompiler.templates import hopper_rows

REGISTERS = 168  # a thread's share of 64K over 12 warps; the groups that compute take what the loading warp gives back
_ROW_WORDS, _RANGE_WORDS, _MESSAGE = 4, 7, 16  # numbers that tell a row, origins aside, and its ranges; places for them
_KEYS = "attention_backward_keys"
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


def hopper_source(e: Emission, kernels: list[str]) -> str:
    """The file's part in Gluon: imports and helpers, then the kernels, which were emitted with `e`."""
    moving = e.positions("attention_forward")[1]
    origins = origin_names(moving)
    rows = fill(
        hopper_rows.HELPERS,
        plan_row=e.plan_row("rank", "tiles"),
        origins=moving.origins,
        origin_names="".join(f", {name}" for name in origins),
        Origins=", Origins" if origins else "",
    )
    helpers = [_TANH if name == "tanh" else HELPERS[name].replace("@triton.jit", "@gluon.jit") for name in sorted(e.helpers)]
    text = "\n".join([rows, *helpers, *kernels])
    for name in e.helpers:  # the Triton kernels of the same file have theirs under the plain name
        text = re.sub(rf"\b{name}\(", f"gluon_{name}(", text)
    return hopper_rows.IMPORTS + "\n" + text.replace("tl.", "gl.")


def with_literals(text: str, literals: Mapping[str, object]) -> str:
    for name, value in literals.items():
        text = text.replace(name, str(value))
    return text


def element_type(e: Emission) -> str:
    return {Dtype.BF16: "gl.bfloat16", Dtype.F16: "gl.float16"}[e.program.value.dtype]


def origin_names(moving: TilePositions) -> list[str]:
    """Of the numbers that say where the boxes of a row begin."""
    return [line.split(" = ")[0] for line in moving.origins.splitlines()]


def row_holes(e: Emission, kernel: str, row_tile: str, row_tiles: str, members: int = 1) -> dict[str, str]:
    """How rows are told, and what is known of one. `row_tiles`: how many each head has; `members`: heads that share rows."""
    queries, keys = e.positions(kernel)
    origins = origin_names(queries if queries.moves else keys)
    row_words = _ROW_WORDS + len(origins)
    words = row_words + _RANGE_WORDS
    first_words = fill(hopper_rows.FIRST_WORDS, message=str(_MESSAGE))
    read_origins = [f"{name} = _word(words, places, {place})" for place, name in enumerate(origins, _ROW_WORDS)]
    told = {
        **_order(e, kernel),
        **_items(e, kernel),
        "side": side_name(kernel),
        "members": str(members),
        "held_heads": f"(H // {members})" if members > 1 else "H",
        "row_tiles": row_tiles,
        "words": str(words),
        "no_more": f"(-1{', -1' * (words - 1)})",
        "at_least_one": str(kernel == "attention_forward"),
        "sizes": f"(B, H, {'N' if kernel == _KEYS else 'M'})",
    }
    return {
        **told,
        "telling_warp": fill(hopper_rows.TELLS, **told),
        "message": str(_MESSAGE),
        "first_words": first_words,
        "first_words_of_a_warp": first_words.replace("[4]", "[1]"),
        "next_words": hopper_rows.NEXT_WORDS,
        "row_words": str(row_words),
        "row_heard": hopper_rows.ROW_HEARD,
        "read_ranges": fill(hopper_rows.READ_RANGES, ranges_at=str(row_words)),
        "after": hopper_rows.AFTER,
        "read_row": fill(hopper_rows.READ_ROW, row_tile=row_tile, origin_words="\n".join(read_origins)),
        "origin_names": "".join(f", {name}" for name in origins),
        "Origins": ", Origins" if origins else "",
    }


def _order(e: Emission, kernel: str) -> dict[str, str]:
    """Which row an item is, and how many there are."""
    if e.has_queue(kernel):
        place = "of_all = gl.load(queue + 1 + item)\nhead, rank = of_all // tiles, of_all % tiles"
        return {"place": place, "Queue": ", Queue", "queue": ", queue", "rows_to_take": "gl.load(queue)"}
    place = f"head, rank = _place(item, tiles, last // tiles, {e.heads_in_turn(kernel)})"
    return {"place": place, "Queue": "", "queue": "", "rows_to_take": "B * {held_heads} * tiles"}


def _items(e: Emission, kernel: str) -> dict[str, str]:
    """How a program comes by its rows: they are dealt out, or it takes tickets."""
    if not e.takes_tickets(kernel):
        return {
            "shares": "Shares + gl.program_id(0)",
            "first_item": "gl.load(shares)",
            "next_item": hopper_rows.NEXT_SHARE,
            "messages": "2",
            "heard_early": hopper_rows.ROW_HEARD,
            "ends_soon": "",
            "has_no_tile": "",
        }
    return {
        "shares": "NextRow + 1" if kernel == _KEYS else "NextRow",
        "first_item": "gl.program_id(0)",
        "next_item": hopper_rows.NEXT_TICKET,
        "messages": "1",
        "heard_early": "",
        "ends_soon": fill(hopper_rows.ENDS_SOON, row_heard=hopper_rows.ROW_HEARD),
        "has_no_tile": fill(hopper_rows.HAS_NO_TILE, row_heard=hopper_rows.ROW_HEARD),
    }


def side_name(kernel: str) -> str:
    return kernel.removeprefix("attention_").removeprefix("backward_")


def brought(e: Emission, axis: Axis) -> Read | None:
    """What the loading warp brings with a tile of tokens on `axis`, for masked tiles: the first number of each token that the mask
    alone reads."""
    program = e.program
    score = {read for expr in (program.score, e.kept_score) for read in reads_of(expr)}
    for read in reads_of(program.keep.predicate):
        plain = all(isinstance(entry, Axis | Const) for entry in read.index)
        alone = {axis.name} <= axes_of(read) <= {axis.name, "b", "h"}
        if plain and alone and program.decls[read.tensor].dtype is Dtype.I32 and read not in score:
            return read
    return None


def bring(e: Emission, read: Read, axis: Axis, place: str) -> str:
    """The copy of what is brought to a place of its ring; `axis` names the positions of the tile."""
    names = FlatNames(e.program, {}, bounds=frozenset())
    pointer, _ = element_address(read, names)
    return fill(hopper_rows.BRING, place=place, pointer=pointer, axis=axis.name, end="M" if axis == Q_IDX else "N")


def read_brought(place: str) -> str:
    """How a group reads it, where a tile has the tokens that move on columns."""
    return f"brought = brought_ring.index({place}).load(gl.SliceLayout(0, SCORES))[None, :]"


def where_masked(masked: str, kept: str) -> str:
    """Lines for masked tiles and lines for others."""
    return kept if masked == kept else fill(hopper_rows.WHERE_MASKED, masked=masked, kept=kept)


def every_tile(tile: str) -> str:
    """The loops over the tiles of a row."""
    return fill(hopper_rows.EVERY_TILE, tile=tile)


def passed_on(e: Emission, kernel: str) -> list[str]:
    """The parameters that the groups are handed: all but tables, tile sizes and the descriptors of what is loaded."""
    apart = {"Lse"} if kernel == "attention_forward" else set()
    if kernel == "attention_forward" and e.layout.by_list is not None:
        apart |= {"O", pointer_name(e.lefts()[0].name), *list_parameters(e)}
    section = side_name(kernel)
    return [
        name
        for name in parameters_of(e, section)
        if name not in TABLES and not name.startswith("BLOCK_") and name not in apart
        if name.startswith("Grad_") or e.descriptor_block(kernel, name) is None
    ]


def head_of(vector: Vector) -> str:
    return "h" if vector.group == 1 else f"h // {vector.group}"


def of_group(positions: TilePositions, start: str, box: tuple[int, ...], group: str) -> tuple[str, ...]:
    """Where the 64 rows of one group begin: the groups have half of a tile each, in the order of its tokens."""
    at = list(positions.at(start))
    place = split_axis(box)
    at[place] += f" + {group} * {halved(box)[place]}"
    return tuple(at)


def listed(block: tuple[int, ...] | None) -> str:
    assert block is not None
    return ", ".join(map(str, block))

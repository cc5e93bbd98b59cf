"""What groups read of a ring of tiles is in their registers before they say that its place is free, in the machine code for Hopper.

The barrier of a group waits for no load (templates/hopper_rows.py). Loads carry the number of a scoreboard, and instructions a mask of
those they wait for; both are bits of the encoding, as `nvdisasm -hex` prints it: 6 of the mask, then 3 each for reads and writes.
"""

from __future__ import annotations

import re

import pytest
import torch

from attncompiler import masks
from attncompiler.codegen.cross_compile import cross_compile
from attncompiler.codegen.emission import Layout
from attncompiler.dsl.attention import declare
from attncompiler.masks import Mask
from attncompiler.runtime.scheduling import schedule_of_layout
from attncompiler.tuning.target import TARGETS

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/", re.S)
_NONE = 7  # no scoreboard


def freed_too_soon(listing: str) -> list[str]:
    """Wide loads from shared memory, as those of tiles are, that nothing has waited for at a group's barrier behind which its first
    warp says that a place is free. One alone may be a message, of which one word has been needed."""
    found: list[str] = []
    under_way: dict[str, int] = {}  # and on which scoreboard
    at_barrier: list[str] = []
    for text, encoding in _INSTRUCTION.findall(listing):
        control = int(encoding, 16) >> 41
        mask, board = control >> 11 & 63, control >> 5 & 7
        under_way = {load: at for load, at in under_way.items() if not mask >> at & 1}
        if re.search(r"\bLDS\.128|\bLDSM", text) and board != _NONE:
            under_way[text] = board
        if "BAR.SYNC" in text:
            at_barrier = list(under_way)
        elif "SYNCS.ARRIVE" in text and len(at_barrier) > 1:
            found.append(f"{text}: {at_barrier}")
    return found


def test_the_encoding_is_read_right() -> None:
    """Two loads on scoreboard 2 that nothing waits for, a barrier, an arrival; and with an instruction between that waits."""

    def line(text: str, mask: int, board: int) -> str:
        control = (mask << 11 | _NONE << 8 | board << 5) << 41
        return f"        /*0100*/                   {text} ;   /* 0x0000000000000000 */\n      /* 0x{control:016x} */\n"

    loads = line("LDS.128 R4, [R2]", 0, 2) + line("LDS.128 R8, [R2+0x10]", 0, 2)
    free = line("BAR.SYNC.DEFER_BLOCKING 0x2, 0x80", 0, _NONE) + line("@!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ", 0, _NONE)
    assert len(freed_too_soon(loads + free)) == 1
    assert not freed_too_soon(loads + line("FADD R4, R4, R8", 1 << 2, _NONE) + free)
    assert len(freed_too_soon(loads + line("FADD R4, R4, R8", 1 << 3, _NONE) + free)) == 1


MASKS = {
    "full": masks.full,
    "causal": masks.causal,
    "window": lambda: masks.causal() & masks.window(300, 0),
    "disc": lambda: masks.disc((32, 32), 8),
    "documents": lambda: masks.causal() & masks.document(torch.arange(1024) // 100),
    "stripes": lambda: masks.strided(64, 4, 4, heads=4),
}


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_tiles_are_in_registers_before_their_place_is_free(name: str, d: int) -> None:
    mask: Mask = MASKS[name]()
    q, k, v = (torch.empty(1, 4, 1024, d, dtype=torch.bfloat16) for _ in range(3))
    declared = declare(q, k, v, keep=mask)
    program, target = declared.program, TARGETS["sm_90"]
    operands = dict(zip((tensor.name for tensor in program.tensors), (q, k, v, *declared.captured), strict=True))
    schedule = schedule_of_layout(program, {}, target, operands)
    assert schedule.warp_roles
    for kernel in cross_compile(program, schedule, Layout.of((1, 1, 1), frozenset("qkv")), target):
        listing = kernel.sass(encodings=True)
        assert listing.count("BAR.SYNC") > 10
        assert not freed_too_soon(listing), kernel.name


@pytest.mark.parametrize("members", [1, 8])
def test_messages_are_read_once(members: int) -> None:
    """A word that is read anew where it is used may be of the next row. In PTX: what lies in the 64 bytes of the message is read by the
    four wide loads behind each wait, and by nothing else."""
    q, k = (torch.empty(1, heads, 1024, 128, dtype=torch.bfloat16) for heads in (8, 8 // members))
    declared = declare(q, k, k, keep=masks.causal(), enable_gqa=True)
    program, target = declared.program, TARGETS["sm_90"]
    operands = dict(zip((tensor.name for tensor in program.tensors), (q, k, k), strict=True))
    schedule = schedule_of_layout(program, {}, target, operands)
    layout = Layout.of((1, members, members), frozenset("qkv"))
    (kernel,) = cross_compile(program, schedule, layout, target, ["attention_backward_keys"])
    read = [
        (int(width or 1), int(at))
        for width, at in re.findall(r"ld\.shared\.(?:v(\d)\.)?b32\s+[^\[]*\[global_smem\+(\d+)\]", kernel.assembly)
    ]
    begin = min(at for width, at in read if width == 4)
    of_message = [width for width, at in read if begin <= at < begin + 64]
    assert of_message.count(4) >= 2 * 4 and set(of_message) == {4}

"""Pictures of masks: what each panel is, and that SVG and PNG are the files they say they are."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image

from attncompiler import masks
from attncompiler.dsl.pictures import COLOURS
from attncompiler.errors import OptionError
from attncompiler.passes.plan import Coverage

CAUSAL = masks.causal()
BY_HEAD = masks.per_head([CAUSAL, masks.window(128), CAUSAL, masks.sink(128)])


def test_heads_that_differ_are_side_by_side() -> None:
    assert BY_HEAD.show(2, 4, 512, 512).splitlines()[:5] == [
        "heads 0, 2  head 1      head 3",
        "▒···        █▒··        █···",
        "█▒··        ▒█▒·        █···",
        "██▒·        ·▒█▒        █···",
        "███▒        ··▒█        █···",
    ]
    assert BY_HEAD.show(2, 4, 512, 512, head=3).splitlines()[:2] == ["head 3", "█···"]


def test_batches_that_differ_are_side_by_side() -> None:
    mask = masks.padding(torch.tensor([128, 512, 512]))
    assert mask.show(3, 2, 128, 512).splitlines()[:2] == ["batch 0      batches 1-2", "█···         ████"]
    assert mask.show(3, 2, 128, 512, batch=2, head=1).splitlines()[:2] == ["batch 2", "████"]


def test_a_mask_that_is_the_same_for_all_has_one_panel_without_a_title() -> None:
    assert CAUSAL.show(2, 4, 256, 256).splitlines() == ["▒·", "█▒", "· empty  ▒ partial  █ full  (tiles of 128 queries x 128 keys)"]


def test_many_panels_are_cut_short() -> None:
    mask = masks.per_head([masks.window(128 * i) for i in range(20)])
    assert "4 more are not shown" in mask.show(1, 20, 2560, 2560) and "4 more are not shown" in mask.svg(1, 20, 2560, 2560)


def test_large_plans_are_drawn_coarser() -> None:
    text = CAUSAL.show(1, 1, 1 << 18, 1 << 18).splitlines()
    assert len(text) == 33 and text[0] == "▒▒" + "·" * 62 and "a mark is 64 x 32 tiles" in text[-1]


def test_svg_draws_each_run_of_tiles() -> None:
    root = ElementTree.fromstring(BY_HEAD.svg(1, 4, 512, 512))
    name = "{http://www.w3.org/2000/svg}"
    panels = root.findall(f"{name}g")
    first = [(r.get("x"), r.get("y"), r.get("width"), r.get("fill")) for r in panels[0]][:3]
    assert first == [("0", "0", "1", COLOURS[Coverage.PARTIAL]), ("1", "0", "3", COLOURS[Coverage.EMPTY]),
                     ("0", "1", "1", COLOURS[Coverage.FULL])]  # fmt: skip
    assert [text.text for text in root.findall(f"{name}text")][:3] == ["heads 0, 2", "head 1", "head 3"] and len(panels) == 3


def test_png_shows_the_same_tiles() -> None:
    image = Image.open(io.BytesIO(BY_HEAD.png(1, 4, 512, 512)))
    assert image.format == "PNG" and image.width == 3 * 384 + 2 * 24 + 2 * 12
    corner = 12, 12 + 20

    def colour(panel: int, row: int, column: int) -> str:
        at = corner[0] + panel * (384 + 24) + 96 * column + 48, corner[1] + 96 * row + 48
        return "#" + bytes(image.getpixel(at)).hex()  # type: ignore[arg-type]

    assert [colour(0, 2, c) for c in range(4)] == [COLOURS[Coverage(kind)] for kind in (2, 2, 1, 0)]
    assert [colour(1, 3, c) for c in range(4)] == [COLOURS[Coverage(kind)] for kind in (0, 0, 1, 2)]
    small = Image.open(io.BytesIO(masks.blocks(128).png(1, 1, 128 * 1000, 128 * 1000)))
    assert small.size == (384 + 24, 384 + 24 + 40)


@pytest.mark.parametrize(
    ("which", "message"), [({"head": 4}, "no head 4 to draw\n  do:  give one from 0 to 3"), ({"batch": -1}, "no batch -1")]
)
def test_what_is_not_there_is_not_drawn(which: dict[str, int], message: str) -> None:
    for draw in (BY_HEAD.show, BY_HEAD.svg, BY_HEAD.png):
        with pytest.raises(OptionError, match=message):
            draw(1, 4, 64, 64, **which)  # type: ignore[operator]

"""One self-contained HTML page: for each region the program, the picture of its mask, and the generated source beside them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attncompiler.dsl.pictures import COLOURS, svg
from attncompiler.passes.plan import Coverage
from attncompiler.runtime.preview import Preview
from attncompiler.tuning.speed_of_light import boxes_text

if TYPE_CHECKING:
    from attncompiler.cli.inspect import Inspected

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2.2rem }
.region { display: grid; grid-template-columns: minmax(20rem, 2fr) 5fr; gap: 1.5rem; align-items: start }
pre { background: #f7f7f4; border: 1px solid #e2e2dc; border-radius: 6px; padding: .8rem; overflow: auto; font-size: 12.5px;
      max-height: 80vh }
.region > div > pre { white-space: pre-wrap }
.legend span { display: inline-block; width: .9em; height: .9em; margin: 0 .35em 0 1em; border: 1px solid #bbb;
               vertical-align: -1px }
svg { border: 1px solid #ccc; width: 100%; max-width: 24rem; height: auto }
"""


def page(name: str, regions: Sequence[Inspected]) -> str:
    """The page of a function's regions."""
    parts = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(name)}: attention kernels</title><style>{_STYLE}</style>",
             f"<h1>Attention in <code>{html.escape(name)}</code></h1>"]  # fmt: skip
    for number, region in enumerate(regions):
        line, text = html.escape(region.line), html.escape(region.text)
        picture = "" if region.preview is None else f"{svg(region.preview.draw(), alone=False)}{_legend(region.preview)}"
        source = html.escape(region.source) if region.source else f"no GPU kernel: {html.escape(region.reason)}"
        parts.append(
            f"<h2>Region {number}, {line}</h2><div class='region'><div><pre>{text}</pre>{picture}</div><pre>{source}</pre></div>"
        )
    return "\n".join(parts)


def _legend(preview: Preview) -> str:
    names = {Coverage.FULL: "full", Coverage.PARTIAL: "partial", Coverage.EMPTY: "empty (skipped)"}
    keys = "".join(f"<span style='background:{COLOURS[c]}'></span>{text}" for c, text in names.items())
    forward, light = preview.schedule.forward, preview.light
    size = f"{forward.block_m} queries by {forward.block_n} keys a tile"
    if light is not None and light.boxes and not preview.parts:  # parts are drawn as one, in runs of tokens
        size += f", boxes of {boxes_text(light.boxes)}, drawn box after box"
    return f"<p class='legend'>{keys}</p><p>{size}; {100 * preview.density:.3g} % visited</p>"

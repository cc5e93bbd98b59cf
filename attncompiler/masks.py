"""The masks: `from attncompiler import masks`; `masks.causal() & masks.window(1024)`."""

from attncompiler.dsl.grids import disc, grid, halo, radial
from attncompiler.dsl.masks import Mask, per_head, where
from attncompiler.dsl.sampled import sampled
from attncompiler.dsl.segments import segments
from attncompiler.dsl.sequences import blocks, causal, dilated, document, full, padding, prefix, regions, sink, strided, window

__all__ = [
    "Mask", "blocks", "causal", "dilated", "disc", "document", "full", "grid", "halo", "padding", "per_head", "prefix", "radial",
    "regions", "sampled", "segments", "sink", "strided", "where", "window",
]  # fmt: skip

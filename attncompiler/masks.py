"""The masks: `from attncompiler import masks`; `masks.causal() & masks.window(1024)`."""

from attncompiler.dsl.masks import (
    Mask,
    blocks,
    causal,
    dilated,
    disc,
    document,
    full,
    grid,
    padding,
    per_head,
    prefix,
    sink,
    strided,
    where,
    window,
)

__all__ = [
    "Mask", "blocks", "causal", "dilated", "disc", "document", "full", "grid", "padding", "per_head", "prefix", "sink", "strided",
    "where", "window",
]  # fmt: skip

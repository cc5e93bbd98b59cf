"""Published systems as a user would write them, one file each, with a declared twin."""

from __future__ import annotations

from collections.abc import Mapping

from attncompiler.errors import OptionError
from attncompiler.zoo import (
    attention_sinks,
    clear,
    davit,
    dma,
    fna,
    gna,
    halonet,
    lightning,
    moh,
    packed_documents,
    prefix_lm,
    prflash,
    radial,
    rala,
    rat,
    s2,
    sliding_window,
)
from attncompiler.zoo.system import Example, Size, System

__all__ = ["COMMANDED", "LINEAR", "SELECTED", "SYSTEMS", "Example", "Size", "System", "system_named"]

_FILES = (
    gna, fna, clear, radial, halonet, davit, rat, s2, sliding_window, attention_sinks, prefix_lm, packed_documents, prflash, moh,
)  # fmt: skip
SYSTEMS: Mapping[str, System] = {system.name: system for file in _FILES for system in file.SYSTEMS}
# keys chosen from the data: what chooses them is in the plain form's graph, and an operand of the declared one
SELECTED: Mapping[str, System] = {system.name: system for system in dma.SYSTEMS}
# linear attentions: their declared forms end in states (states.py)
LINEAR: Mapping[str, System] = {system.name: system for file in (lightning, rala) for system in file.SYSTEMS}


# what the commands know
COMMANDED: Mapping[str, System] = {**SYSTEMS, **SELECTED, **LINEAR}


def system_named(name: str) -> System:
    """Raises: OptionError for a name that is not there."""
    if name not in COMMANDED:
        raise OptionError(f"the zoo has no {name!r}", do=f"it has {', '.join(COMMANDED)}")
    return COMMANDED[name]

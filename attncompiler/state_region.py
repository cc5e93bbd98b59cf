"""A linear attention as `explain` shows it: its program, what was proved, and what a recurrence is worth."""

from __future__ import annotations

from attncompiler.explanation import Region
from attncompiler.ir.expr import Q_IDX
from attncompiler.ir.state import Moment
from attncompiler.passes.state_site import StateSite


def state_region(site: StateSite) -> Region:
    """The region of a site. Its density is 1: every key up to the query counts, and none is visited more than once."""
    return Region(
        family="state",
        ir=site.text,
        mask=_mask(site),
        density=1.0,
        template="chunks of a recurrence",
        source_location=site.program.origin.line,
        notes=(site.saves, *map(str, site.proof), *map(str, site.recovered)),
    )


def _mask(site: StateSite) -> str:
    query = site.program.query
    if query.step != Q_IDX:
        return "all pairs"
    return "kv_idx <= q_idx" if query.moment is Moment.AFTER else "kv_idx < q_idx"

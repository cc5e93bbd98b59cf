"""What `explain` says of keys that are chosen from the data."""

from __future__ import annotations

from dataclasses import dataclass

from attncompiler.ir.expr import TRUE, Const, Expr, axes_of
from attncompiler.ir.select import TopK
from attncompiler.ir.tables import Tables
from attncompiler.ir.text import expr_text
from attncompiler.passes.site import Site


@dataclass(frozen=True)
class ChosenKeys:
    """`w` of `keys` keys, for all queries or for `each`; `share`: how many of all keys the list holds, at most."""

    w: Expr
    keys: Expr
    each: bool
    causal: bool
    share: float

    def __str__(self) -> str:
        of = f"of {expr_text(self.keys)}"
        if isinstance(self.w, Const) and isinstance(self.keys, Const):
            of = f"{of}, {100 * self.w.value / self.keys.value:.2g} %"
        count = f"the {expr_text(self.w)} keys of largest rank ({of})"
        if self.each:
            what = f"each query keeps {count} that it sees; the list holds every key that some query keeps"
        else:
            what = f"all queries keep {count}; no other key is read"
        return f"{what}; the list is in order of position, and its tiles behind a query are skipped" if self.causal else what


def chosen_keys(site: Site) -> ChosenKeys | None:
    """What is selected before an attention; None where nothing is."""
    for phase in site.before:
        if not isinstance(phase.work, Tables):
            continue
        sizes = dict(phase.work.axes)
        for table in phase.work.tables:
            if isinstance(table.form, TopK):
                (key,) = table.form.over
                held, keys = site.program.axes.kv_idx, sizes[key]
                share = held.value / keys.value if isinstance(held, Const) and isinstance(keys, Const) else 1.0
                causal = "q_idx" in axes_of(site.program.keep.predicate)
                return ChosenKeys(table.form.k, keys, table.form.where != TRUE, causal, share)
    return None

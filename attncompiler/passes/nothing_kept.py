"""Masks that keep nothing: proved from the mask alone, before anything runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from torch import Tensor

from attncompiler.ir.expr import AXES, FALSE, Const, Expr, conj, conjuncts, reads_of
from attncompiler.ir.program import Attention, Empty
from attncompiler.passes.plan import count_kept, plan_predicate

_COARSE = 16  # tiles a side in which a mask is asked whether it keeps anything at all
_MOST_LOOKED_AT = 1 << 22  # pairs, for a warning


def nothing_kept(predicate: Expr, captured: Mapping[str, Tensor], shape: tuple[int, int, int, int]) -> bool:
    """True where a predicate over b, h, q_idx, kv_idx of these sizes is proved to hold nowhere; `captured` is on the CPU."""
    if predicate == FALSE or min(shape) == 0:
        return min(shape) > 0
    tiles = (max(-(-size // _COARSE), 1) for size in shape[2:])
    plan = plan_predicate(predicate, captured, shape, *tiles)
    if int(plan.visited.count.sum()) == 0:
        return True
    return int(plan.full.count.sum()) == 0 and math.prod(shape) <= _MOST_LOOKED_AT and count_kept(predicate, captured, shape) == 0


@functools.lru_cache(maxsize=512)
def nothing_kept_by_positions(predicate: Expr, shape: tuple[int, int, int, int]) -> bool:
    """The same of the parts of a predicate that read no tensor: what these leave nothing of is empty whatever tensors hold."""
    return nothing_kept(conj(*(part for part in conjuncts(predicate) if not reads_of(part))), {}, shape)


_GIVES = {
    Empty.ZERO: "the output is zero",
    Empty.NAN: "the output is NaN",
    Empty.SCORE: "the output is a mean over all keys",
    Empty.UNREAD: "the output is said to be read by nothing",
}


def warning_of_nothing(program: Attention) -> str:
    """What to say of a recognised attention whose mask keeps nothing; "" where that is not proved, or its sizes are not known."""
    sizes = [program.axes.size(axis) for axis in AXES]
    known = [int(size.value) for size in sizes if isinstance(size, Const)]
    if len(known) < len(AXES):
        return ""
    b, h, m, n = known
    if not nothing_kept_by_positions(program.keep.predicate, (b, h, m, n)):
        return ""
    return (
        f"the mask of the attention at {program.origin.line} keeps no key for any of {b} x {h} x {m} queries over {n} keys: "
        f"{_GIVES[program.keep.empty]}\n"
        "  do:  look at its parts with attncompiler.explain; parts that exclude one another are joined by |, not &"
    )

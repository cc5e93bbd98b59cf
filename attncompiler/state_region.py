"""Linear attention as `explain` shows it, recognised or called by name: its program, what was proved, what runs and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from attncompiler.codegen.emit_state import state_source
from attncompiler.codegen.lowerable import parse_recurrence
from attncompiler.codegen.recurrence import Past, Recurrence
from attncompiler.explanation import Region
from attncompiler.ir.evaluate import integer
from attncompiler.ir.phase_text import work_text
from attncompiler.ir.state import STATE_AXES
from attncompiler.passes.normalise import source_line
from attncompiler.passes.sizes import Extent
from attncompiler.passes.state_site import StateSite
from attncompiler.runtime.state_lowering import unsupported
from attncompiler.tuning.target import TARGETS

_MASKS = {Past.UP_TO_OWN: "kv_idx <= q_idx", Past.BEFORE_OWN: "kv_idx < q_idx", Past.ALL: "all pairs"}
_CHUNK = 64  # steps whose own pairs are computed as such


@dataclass(frozen=True)
class StateUse:
    """One call of the op of states: its program as text, the user's line "file.py:41", the run-time sizes in the order of
    `State.sizes`, and what is known of it beside."""

    text: str
    line: str
    sizes: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def recurrence(self) -> Recurrence:
        return parse_recurrence(self.text)

    @property
    def reason(self) -> str:
        """Why no kernel on a GPU computes it; "" where one does."""
        return unsupported(self.recurrence)

    @property
    def extents(self) -> tuple[int, ...]:
        """b, h, q_idx, kv_idx, c, d."""
        program = self.recurrence.program
        sizes = dict(zip(program.sizes, self.sizes, strict=True))
        return tuple(integer(program.axes.size(axis), sizes) for axis in STATE_AXES[:6])

    @property
    def keys(self) -> int:
        return self.extents[3]


def use_of_site(site: StateSite) -> StateUse:
    """A recognised linear attention, with its proof and what it assumes."""
    sizes = tuple(_hinted(site.sizes[name]) for name in site.program.sizes)
    return StateUse(site.line, site.program.origin.line, sizes, (site.saves, *map(str, site.proof), *map(str, site.recovered)))


def declared_uses(module: GraphModule) -> list[StateUse]:
    """The calls of the op in a graph."""
    ops = (torch.ops.attncompiler.state, torch.ops.attncompiler.state.default)
    calls = [node for node in module.graph.nodes if node.op == "call_function" and node.target in ops]
    return [StateUse(str(node.args[2]), source_line(node), tuple(map(_hinted, node.args[1]))) for node in calls]


def _hinted(size: Extent | Node) -> int:
    """A size; where it is symbolic, that of the inputs that were traced."""
    value: Extent = size.meta["example_value"] if isinstance(size, Node) else size
    return value if isinstance(value, int) else int(value.node.hint)


def region_of_state(use: StateUse) -> Region:
    """What becomes of a state. Its density is 1: no key is visited more than once, and none is skipped. Raises:
    UnsupportedProgram."""
    parts, reason = use.recurrence, use.reason
    return Region(
        family="state",
        ir=work_text(parts.program),
        mask=_MASKS[parts.past],
        density=1.0,
        template="portable" if reason else "chunks of a recurrence (Triton); portable without a GPU",
        source_location=use.line,
        kernels={} if reason else {"state": state_source(parts, TARGETS["sm_90"])},
        notes=(*use.notes, _work(use), *((f"no GPU kernel: {reason}",) if reason else ())),
    )


def _work(use: StateUse) -> str:
    """What a forward computes, in multiply-adds counted twice, beside what all pairs would take."""
    b, h, m, n, c, d = use.extents
    causal = use.recurrence.past is not Past.ALL
    linear = b * h * (2 * c * d * (m + n) + (2 * min(_CHUNK, n) * (c + d) * n if causal else 0))
    return (
        f"work of the forward: {linear / 1e9:.3g} GFLOP, linear in the tokens; all pairs: {2 * b * h * m * n * (c + d) / 1e9:.3g}"
    )

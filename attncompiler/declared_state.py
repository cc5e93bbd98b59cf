"""Linear attention that a graph calls by name, as `explain` shows it: its program and the kernels that a GPU would run."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from attncompiler.codegen.emit_state import state_source
from attncompiler.codegen.lowerable import parse_recurrence
from attncompiler.codegen.recurrence import Past
from attncompiler.explanation import Region
from attncompiler.ir.phase_text import work_text
from attncompiler.passes.normalise import source_line
from attncompiler.runtime.state_lowering import unsupported
from attncompiler.tuning.target import TARGETS

_MASKS = {Past.UP_TO_OWN: "kv_idx <= q_idx", Past.BEFORE_OWN: "kv_idx < q_idx", Past.ALL: "all pairs"}


def declared_states(module: GraphModule) -> list[Region]:
    """A region for each call of the op of states. Its density is 1: no key is visited more than once, and none is skipped."""
    ops = (torch.ops.attncompiler.state, torch.ops.attncompiler.state.default)
    calls = [node for node in module.graph.nodes if node.op == "call_function" and node.target in ops]
    return [region_of_state(str(node.args[2]), source_line(node)) for node in calls]


def region_of_state(text: str, line: str) -> Region:
    """What becomes of a state given as text, at a line "file.py:41". Raises: UnsupportedProgram."""
    parts = parse_recurrence(text)
    reason = unsupported(parts)
    return Region(
        family="state",
        ir=work_text(parts.program),
        mask=_MASKS[parts.past],
        density=1.0,
        template="portable" if reason else "chunks of a recurrence (Triton); portable without a GPU",
        source_location=line,
        kernels={} if reason else {"state": state_source(parts, TARGETS["sm_90"])},
        notes=(f"no GPU kernel: {reason}",) if reason else (),
    )

"""Program + schedule -> one readable Triton file: forward, delta and the two backward kernels. Fills holes, decides nothing."""

from __future__ import annotations

from attncompiler.codegen.emission import (
    Emission,
    Layout,
    backward_kernels,
    vector_reads,
)
from attncompiler.codegen.emit_backward import DELTA, KEYS, QUERIES, delta_source, keys_source, queries_source
from attncompiler.codegen.emit_forward import forward_source
from attncompiler.codegen.emit_hopper import hopper_forward_source
from attncompiler.codegen.emit_hopper_backward import hopper_backward_source
from attncompiler.codegen.hopper import hopper_source
from attncompiler.codegen.lowerable import lowerable
from attncompiler.codegen.triton_expr import HELPERS
from attncompiler.errors import UnsupportedProgram
from attncompiler.ir.expr import TRUE, ZERO, Kind, Read, axes_of, reads_of, walk
from attncompiler.ir.program import Attention, kind_of
from attncompiler.ir.text import expr_text, to_text
from attncompiler.tuning.schedule import Schedule


def emit(program: Attention, schedule: Schedule, layout: Layout) -> str:
    """The source of all kernels that `layout.wanted` needs. Raises: UnsupportedProgram, in the user's words."""
    _check(lowerable(program))
    e = Emission(program, schedule, layout)
    backward = backward_kernels(program, schedule, layout.wanted)
    kernels = [delta_source(e)] if DELTA in backward else []
    if schedule.warp_roles:
        kernels.append(_hopper_kernels(program, schedule, layout))
    else:
        kernels.insert(0, forward_source(e))
        kernels += [queries_source(e)] if QUERIES in backward else []
        kernels += [keys_source(e)] if KEYS in backward else []
    if e.in_parts:  # sums are as careful as eager code's: so must the weights be
        e.helpers.add("exp2")
        kernels = [kernel.replace("tl.exp2(", "exp2(") for kernel in kernels]
    helpers = [HELPERS[name] for name in sorted(e.helpers)]
    return _header(program) + "\nimport triton\nimport triton.language as tl\n" + "\n".join([*helpers, *kernels])


def _hopper_kernels(program: Attention, schedule: Schedule, layout: Layout) -> str:
    e = Emission(program, schedule, layout)
    kernels = [hopper_forward_source(e)]
    backward = backward_kernels(program, schedule, layout.wanted)
    kernels += [hopper_backward_source(e, kernel) for kernel in (KEYS, QUERIES) if kernel in backward]
    return hopper_source(e, kernels)


def _check(program: Attention) -> None:
    for read in (r for x in program.expressions for r in reads_of(x)):
        through = [n for entry in read.index for n in walk(entry) if isinstance(n, Read)]
        if through and (read.tensor in program.vectors or any("kv_idx" in axes_of(n) for n in through)):
            raise UnsupportedProgram(f"{read.tensor} is read at an index that is itself read", where=program.origin.line)
    reads = vector_reads(program)
    if len({read.tensor for read in reads}) < len(reads):
        raise UnsupportedProgram("one tensor is read as two different vectors", where=program.origin.line)
    if any(kind_of(x, program.decls) is Kind.INT and x == ZERO for x in program.weigh.extra):
        raise UnsupportedProgram("an extra score is an integer", where=program.origin.line)


def _header(program: Attention) -> str:
    keep = program.keep
    what = "all pairs" if keep.predicate == TRUE else expr_text(keep.predicate)
    lines = [f"Attention for {program.origin.line or 'a declared program'}. Visits the tiles that hold a pair with: {what}."]
    lines += ["", *to_text(program).rstrip().splitlines()]
    lines += ["", "O[m] = sum_n softmax(score)[m, n] * V[n];  Lse[m] = log of the sum of exp(score), natural."]
    return "\n".join(f"# {line}".rstrip() for line in lines) + "\n"

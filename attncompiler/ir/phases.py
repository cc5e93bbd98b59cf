"""Programs of several phases: a selection and then an attention, sums and then a sweep, two sweeps with a softmax between.

A phase is an attention, a state or tables, each a whole program by itself, and the names of what it gives:

    tables
      ...
      return  picked
    attention  # model.py:41
      axes    b=2, h=8, q_idx=4096, kv_idx=2048
      read    q: ..., k: ..., v: ..., picked: i64[2, 2, 2048]
      score   dot(q[b, h, q_idx], k[b, h // 4, picked[b, h // 4, kv_idx]]) * 0.125
      keep    (picked[b, h // 4, kv_idx] >= 0) & (picked[b, h // 4, kv_idx] <= q_idx) else zero
      ...

A later phase declares what an earlier one gives as it declares an operand. So every clause, and every pass and kernel that knows
one phase, is the same with phases around it; what lies between them is a tensor. The results of the last phase are the program's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from attncompiler.ir.expr import Q_IDX, B, H, reads_of
from attncompiler.ir.program import NOWHERE, Attention, Dtype, Origin, TensorDecl
from attncompiler.ir.state import SEGMENT, C, D, State
from attncompiler.ir.tables import Tables

Work = Attention | State | Tables


@dataclass(frozen=True)
class Phase:
    """What is computed, and the names under which later phases and the caller find it.

    An attention gives O and lse, a state O, its final states and z if it has a normaliser: as many of these as there are names.
    Tables give those that are named."""

    work: Work
    results: tuple[str, ...]

    @functools.cached_property
    def given(self) -> tuple[TensorDecl, ...]:
        """The results, with element types and sizes."""
        if isinstance(self.work, Tables):
            known = self.work.decls
            return tuple(known[name] for name in self.results if name in known)
        outputs = _of_attention(self.work) if isinstance(self.work, Attention) else _of_state(self.work)
        return tuple(replace(decl, name=name) for decl, name in zip(outputs, self.results, strict=False))


def default_results(work: Attention | State) -> tuple[str, ...]:
    """The names of results where a program does not say them."""
    if isinstance(work, Attention):
        return "o", "lse"
    return ("o", "final", "z") if work.normalised else ("o", "final")


def _of_attention(attention: Attention) -> tuple[TensorDecl, ...]:
    axes, value = attention.axes, attention.value
    rows = (axes.b, axes.h, axes.q_idx)
    statistics = Dtype.F64 if value.dtype is Dtype.F64 else Dtype.F32
    return TensorDecl("o", value.dtype, (*rows, value.shape[-1])), TensorDecl("lse", statistics, rows)


def _of_state(state: State) -> tuple[TensorDecl, ...]:
    first = [state.decls[read.tensor].dtype for read in reads_of(state.value)]
    b, h, m, c, d, segments = (state.axes.size(axis) for axis in (B, H, Q_IDX, C, D, SEGMENT))
    o = TensorDecl("o", first[0] if first else state.statistics, (b, h, m, d))
    final = TensorDecl("final", state.statistics, (b, segments, h, c, d))
    return (o, final, TensorDecl("z", state.statistics, (b, segments, h, c))) if state.normalised else (o, final)


@dataclass(frozen=True)
class Program:
    """Phases in order; a program of one attention is that attention."""

    phases: tuple[Phase, ...]

    @property
    def origin(self) -> Origin:
        """The line of the last phase, whose results are the program's."""
        return self.phases[-1].work.origin if self.phases else NOWHERE

    @functools.cached_property
    def given(self) -> Mapping[str, TensorDecl]:
        """Every named result."""
        return {decl.name: decl for phase in self.phases for decl in phase.given}

    @functools.cached_property
    def operands(self) -> Mapping[str, TensorDecl]:
        """The tensors that the caller brings, in order of first use."""
        read = (decl for phase in self.phases for decl in phase.work.tensors)
        return {decl.name: decl for decl in read if decl.name not in self.given}

    @functools.cached_property
    def sizes(self) -> tuple[str, ...]:
        """Names of the run-time integers, in order of first use."""
        return tuple(dict.fromkeys(name for phase in self.phases for name in phase.work.sizes))

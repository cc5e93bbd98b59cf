"""How a kernel is cut up: tile sizes, warps, pipeline depth and the way operands are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from attncompiler.ir.expr import Const
from attncompiler.ir.program import Attention, Dtype


@dataclass(frozen=True, slots=True)
class KernelSchedule:
    """One kernel: BLOCK_M queries by BLOCK_N keys a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """The three kernels of a program. `descriptors`: operands come through TMA tensor descriptors (Hopper and later)."""

    forward: KernelSchedule
    backward_queries: KernelSchedule
    backward_keys: KernelSchedule
    descriptors: bool


def head_size(program: Attention) -> int:
    """The longest vector of the program, padded to a power of two as tiles need it."""
    sizes = [program.decls[name].shape[-1] for name in program.vectors]
    longest = max(int(size.value) if isinstance(size, Const) else 512 for size in sizes)
    return max(16, 1 << (longest - 1).bit_length())


def choose_schedule(program: Attention, descriptors: bool, few_queries: bool = False) -> Schedule:
    """A good schedule without measuring, from head size and element width. Source: docs/performance.md."""
    wide = program.value.dtype in (Dtype.F32, Dtype.F64)
    d = head_size(program) * (2 if wide else 1)
    if few_queries:
        small = KernelSchedule(16, 64 if d <= 128 else 32, 4, 2)
        return Schedule(small, small, small, descriptors)
    if d <= 64:
        kernels = KernelSchedule(128, 64, 4, 3), KernelSchedule(64, 64, 4, 3), KernelSchedule(64, 64, 4, 3)
    elif d <= 128:
        kernels = KernelSchedule(128, 128, 8, 3), KernelSchedule(64, 64, 4, 2), KernelSchedule(64, 64, 4, 2)
    elif d <= 256:
        kernels = KernelSchedule(128, 64, 8, 2), KernelSchedule(64, 32, 8, 2), KernelSchedule(32, 64, 8, 2)
    else:
        kernels = KernelSchedule(64, 32, 8, 1), KernelSchedule(32, 32, 8, 1), KernelSchedule(32, 32, 8, 1)
    return Schedule(*kernels, descriptors)

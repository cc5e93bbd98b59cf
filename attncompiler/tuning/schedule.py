"""How a kernel is cut up: tile sizes, warps, pipeline depth and the way operands are loaded."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch

from attncompiler.ir.expr import ONE, Apply, Const, axes_of, dots_of, reads_of, walk
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Dtype, Empty
from attncompiler.passes.grid import PARTIAL, ROWS, GridTiles
from attncompiler.passes.plan import build_boxes, build_plan, tiles_for
from attncompiler.tuning.target import Target


@dataclass(frozen=True, slots=True)
class KernelSchedule:
    """One kernel: BLOCK_M queries by BLOCK_N keys a tile; `tiles` says how they lie in a grid, if they do. Of the forward
    with warp roles, `apart`: it has a loop for full tiles alone; `pairs`: two tiles of keys, which need not be neighbours, are computed as
    one of twice the width."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tiles: GridTiles = ROWS
    apart: bool = False
    pairs: bool = False


@dataclass(frozen=True, slots=True)
class Schedule:
    """The kernels of a program. `descriptors`: operands come through TMA tensor descriptors.

    `float32`: how products of float32 keep their precision: as Target has it, or "parts": exact, and summed in chains of at most
    32; one chain over all channels or keys would round more than the trees of eager code.
    `delta_over_keys`: delta is the sum over keys of the very P * dP that dS is made of, rather than rowsum(O * dO)."""

    forward: KernelSchedule
    backward_queries: KernelSchedule
    backward_keys: KernelSchedule
    descriptors: bool
    float32: str
    warp_roles: bool = False  # the kernels are those of templates/hopper_*.py, all but delta
    delta: KernelSchedule = KernelSchedule(64, 64, 4, 1)
    delta_over_keys: bool = False

    def of(self, kernel: str) -> KernelSchedule:
        """The schedule of a kernel by its name."""
        chosen: KernelSchedule = getattr(self, kernel.removeprefix("attention_"))
        return chosen

    def in_rows(self) -> Schedule:
        """The same with tiles that are runs of tokens."""
        kernels = {
            name: replace(getattr(self, name), tiles=ROWS) for name in ("forward", "backward_queries", "backward_keys", "delta")
        }
        return replace(self, **kernels)

    def follows_plan(self, kernel: str) -> bool:
        """True for kernels that visit the tiles of a plan: all but one that reads delta off O and dO, and nothing else."""
        return kernel != "attention_delta" or self.delta_over_keys


def head_size(program: Attention) -> int:
    """The longest vector of the program, padded to a power of two as tiles need it."""
    sizes = [program.decls[name].shape[-1] for name in program.vectors]
    longest = max(int(size.value) if isinstance(size, Const) else 512 for size in sizes)
    return max(16, 1 << (longest - 1).bit_length())


_CACHED = 24 << 20  # bytes: half of the second-level cache of an H100, whose halves each keep what both read


def heads_cached(program: Attention, tokens: float) -> int:
    """Of so many heads, one at least, the cache has what streams past their rows: two vectors of half precision for each of the `tokens`
    of a head. Simulated by benchmarks/row_order.py."""
    return max(1, int(_CACHED // (4 * head_size(program) * max(tokens, 1))))


def choose_schedule(program: Attention, target: Target, descriptors: bool = False, few_queries: bool = False) -> Schedule:
    """A good schedule without measuring, from head size, element width and target. Source: docs/performance.md."""
    d = head_size(program)
    wide = program.value.dtype in (Dtype.F32, Dtype.F64)
    kernels = _few_queries(d, wide) if few_queries else _float32(d) if wide else _half(d)
    element = 4 if wide else 2
    forward, queries, keys = (_fitting(kernel, d, element, target) for kernel in kernels)
    descriptors = descriptors and target.descriptors and not wide
    roles = descriptors and target.name == "sm_90" and suits_warp_roles(program)
    if few_queries:  # they wait for memory: there is time to sum as carefully as eager code does
        addressed = any(program.decls[name].dtype is Dtype.F32 for name in program.vectors)  # parts are loaded by address
        return Schedule(forward, queries, keys, descriptors and not addressed, "parts", delta=queries, delta_over_keys=True)
    if roles:
        return Schedule(*_warp_roles(), descriptors, target.float32, True)
    return Schedule(forward, queries, keys, descriptors, target.float32)


def for_mask(schedule: Schedule, program: Attention, sizes: Mapping[str, int]) -> Schedule:
    """The same with tiles as the program's mask wants them: boxes of a grid, narrow where wide ones would be cut through, full ones
    apart where there are many."""
    boxed = in_boxes(schedule, program, sizes)
    if not schedule.warp_roles or program.keep.empty is Empty.SCORE:
        return boxed
    if reads := reads_of(program.keep.predicate):  # lengths leave most tiles full; what is read for each token cuts rows short
        of_tokens = any(axes_of(read) & {"q_idx", "kv_idx"} for read in reads)
        many = extents_of(program, sizes)["kv_idx"] > _APART * boxed.forward.block_n
        return replace(boxed, forward=replace(boxed.forward, apart=many and not of_tokens))
    full, partial, rows = _tiles(boxed.forward, program, sizes)
    if partial > full:
        narrow = in_boxes(replace(schedule, forward=_NARROW), program, sizes)
        narrow_full, narrow_partial, _ = _tiles(narrow.forward, program, sizes)
        if _NARROW_FULL * narrow_full + _NARROW_PARTIAL * narrow_partial < _NARROW_WINS * (full + PARTIAL * partial):
            if not narrow.forward.tiles and narrow_full + narrow_partial > rows:  # a row of one tile is no pair
                return replace(narrow, forward=_PAIRS)
            boxed, full = narrow, narrow_full
    return replace(boxed, forward=replace(boxed.forward, apart=full > _APART * rows))


_NARROW, _PAIRS = KernelSchedule(128, 64, 4, 4), KernelSchedule(128, 64, 4, 2, pairs=True)
# Times of tiles in those of a full one of 128 keys, and what a guess must win by. Source: docs/performance.md.
_NARROW_FULL, _NARROW_PARTIAL, _NARROW_WINS = 0.6, 0.7, 0.92
# A second loop saves 65 cycles a full tile, and costs a row some 1300: its instructions are no longer in the cache. Source: the same.
_APART = 20


def _tiles(kernel: KernelSchedule, program: Attention, sizes: Mapping[str, int]) -> tuple[int, int, int]:
    """How many full and partial tiles a forward kernel visits in how many rows, where the mask reads no tensor."""
    device = torch.device("cpu")
    if kernel.tiles:
        plan = build_boxes(program, sizes, kernel.tiles, False, device)
    else:
        plan = build_plan(program, {program.sum.tensor: torch.empty(0)}, sizes, kernel.block_m, kernel.block_n)
    return int(plan.full.lengths.sum()), int(plan.partial.lengths.sum()), plan.full.count.numel()


def in_boxes(schedule: Schedule, program: Attention, sizes: Mapping[str, int]) -> Schedule:
    """The same with tiles that are boxes of the grid that the program's mask speaks of, where it speaks of one."""

    def boxed(kernel: KernelSchedule, by_keys: bool, halves: bool = False) -> KernelSchedule:
        return replace(kernel, tiles=tiles_for(program, sizes, kernel.block_m, kernel.block_n, by_keys, halves))

    halves = schedule.warp_roles  # the two groups of templates/hopper_backward.py
    backward = boxed(schedule.backward_queries, False, halves), boxed(schedule.backward_keys, True, halves)
    kernels = boxed(schedule.forward, False), *backward
    if not all(kernel.tiles for kernel in kernels):
        return schedule
    delta = boxed(schedule.delta, False) if schedule.delta_over_keys else schedule.delta
    return replace(schedule, forward=kernels[0], backward_queries=kernels[1], backward_keys=kernels[2], delta=delta)


_ROLE_OPERATORS = frozenset({
    "add", "sub", "mul", "div", "neg", "floordiv", "mod", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "where",
    "minimum", "maximum", "abs", "exp", "tanh", "to_float", "to_int", "to_bool",
})  # fmt: skip


@functools.lru_cache(maxsize=1)
def triton_is_checked() -> bool:
    """True for the version of Triton whose experimental and internal interfaces these kernels have been run with."""
    return version("triton").split(".")[:2] == ["3", "6"]


def suits_warp_roles(program: Attention) -> bool:
    """True for one product of half-precision vectors of 64 or 128 channels, without dropout and without a finite mask.

    Gluon is experimental: with a Triton that this kernel has not been checked with, the plain Triton kernel serves."""
    if not triton_is_checked():
        return False
    decls = [program.decls[name] for name in program.vectors]
    nodes = [node for e in (program.score, program.keep.predicate, *program.weigh.extra) for node in walk(e)]
    return (
        len(decls) == 3
        and len(dots_of(program.score)) == 1
        and {decl.shape[-1] for decl in decls} in ({Const(64)}, {Const(128)})
        and {decl.dtype for decl in decls} in ({Dtype.BF16}, {Dtype.F16})
        and program.adjust == ONE
        and not program.has_rcp
        and all(node.op in _ROLE_OPERATORS for node in nodes if isinstance(node, Apply))
    )


def _half(d: int) -> tuple[KernelSchedule, KernelSchedule, KernelSchedule]:
    K = KernelSchedule
    if d <= 64:
        return K(128, 64, 4, 3), K(64, 64, 4, 3), K(64, 64, 4, 3)
    if d <= 128:
        return K(128, 64, 4, 2), K(64, 64, 4, 2), K(64, 64, 4, 2)
    if d <= 256:
        return K(128, 64, 8, 2), K(64, 32, 8, 2), K(32, 64, 8, 2)
    return K(64, 32, 8, 1), K(32, 32, 8, 1), K(32, 32, 8, 1)


def _warp_roles() -> tuple[KernelSchedule, KernelSchedule, KernelSchedule]:
    """Two groups with 64 rows each. In the backward for keys what they hold has two places, which leaves room for three streamed tiles."""
    K = KernelSchedule
    return K(128, 128, 4, 2), K(128, 64, 4, 6), K(64, 128, 4, 3)


def _few_queries(d: int, wide: bool) -> tuple[KernelSchedule, KernelSchedule, KernelSchedule]:
    """Float32 is multiplied by threads, not by tensor cores: no more than 32 keys in a chain, and registers to accumulate in."""
    K = KernelSchedule
    if not wide:
        small = K(16, 64 if d <= 64 else 32 if d <= 256 else 16, 4, 2)
        return small, small, small
    small = K(16, 32, 4, 2) if d <= 256 else K(16, 16, 8, 2)
    keys = K(16, 32, 4, 2) if d <= 64 else K(16, 16, 4, 1) if d <= 128 else K(16, 16, 8, 2)
    return small, small, keys


def _float32(d: int) -> tuple[KernelSchedule, KernelSchedule, KernelSchedule]:
    """Three products for one, each with its operands split in registers: smaller tiles, or they spill (more so through TMA)."""
    K = KernelSchedule
    if d <= 64:
        return K(64, 32, 4, 2), K(64, 32, 4, 1), K(32, 16, 4, 1)
    if d <= 128:
        return K(32, 16, 4, 2), K(32, 16, 4, 1), K(32, 16, 4, 1)
    return K(16, 16, 4, 1), K(16, 16, 4, 1), K(16, 16, 4, 1)


def _fitting(kernel: KernelSchedule, d: int, element: int, target: Target) -> KernelSchedule:
    """The same kernel with fewer stages, then smaller tiles, until its operands fit the target's shared memory."""
    while _shared(kernel, d, element) > target.shared_memory:
        if kernel.num_stages > 1:
            kernel = replace(kernel, num_stages=kernel.num_stages - 1)
        elif kernel.block_n > 16:
            kernel = replace(kernel, block_n=kernel.block_n // 2)
        elif kernel.block_m > 16:
            kernel = replace(kernel, block_m=kernel.block_m // 2)
        else:
            break
    return kernel


def _shared(kernel: KernelSchedule, d: int, element: int) -> int:
    """Bytes of the tiles that wait in shared memory: two of the resident side, two of each stage, and the weights."""
    resident, streamed = max(kernel.block_m, kernel.block_n), min(kernel.block_m, kernel.block_n)
    return element * (2 * d * resident + 2 * d * streamed * kernel.num_stages + kernel.block_m * kernel.block_n)

"""Attention over a grid beside other tokens, part by part: each pair of runs of queries and keys is a program over slices of them.

So the grid is cut into boxes, which runs of tokens that hold a part of it and other tokens would not allow. Of a run of queries O and lse
are joined from those of its parts. The backward of each part takes the joined O and lse, with which its weights are those of the
whole: gradients are sums over parts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attncompiler.codegen.emission import vector_reads
from attncompiler.ir.expr import KV_IDX, ONE, Q_IDX, TRUE, Axis, Const, Dot, Expr, Read, axes_of, dots_of, transform
from attncompiler.ir.program import Attention, Empty, Keep, Route
from attncompiler.passes.grid import choose_tiles, rows_keep_some
from attncompiler.passes.grid_among_runs import GridAmongRuns, Run, grid_among_runs
from attncompiler.passes.plan import plan_boxes, plan_predicate
from attncompiler.passes.tile_counts import TileCounts
from attncompiler.runtime import row_kernels
from attncompiler.runtime.outputs import new_outputs
from attncompiler.tuning.schedule import head_size
from attncompiler.tuning.speed_of_light import predicted_ms
from attncompiler.tuning.target import TARGETS, Target

_TARGET = TARGETS["sm_90"]  # of whose forward it is asked what parts are worth
_TILE = 128
_WINS = 0.8  # of the time of the whole: what a guess must win by
_LAUNCH_MS = 0.02  # of a part and of what joins it, as the host and an empty device have it
_HEADS = 16  # of all batches, where they are known at run time

Forward = Callable[[Attention, Mapping[str, Tensor], Mapping[str, int], bool], tuple[Tensor, Tensor, Tensor]]
Backward = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """`program` over the slices `queries` and `keys` of the operands. `cuts`: the dimension of each that is sliced, and the slice."""

    queries: Run
    keys: Run
    program: Attention
    cuts: Mapping[str, tuple[int, Run]]

    def operands(self, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.narrow(place, *run) for name, tensor in operands.items() for place, run in (self.cuts[name],)}


@functools.lru_cache(maxsize=1024)
def parts_of(program: Attention) -> tuple[Part, ...]:
    """The parts of a program, those of the same queries one after another; () for one that runs as a whole."""
    queries, keys = program.axes.q_idx, program.axes.kv_idx
    if not (isinstance(queries, Const) and isinstance(keys, Const)) or not _parts_are_programs(program):
        return ()
    m, n = int(queries.value), int(keys.value)
    found = grid_among_runs(program.keep.predicate, m, n)
    if found is None or not _is_faster(program, found, m, n):
        return ()
    pairs = [(q, k, TRUE) for q, k in _joined(found)] + [(found.queries, found.keys, found.predicate)]
    seen = {q for q, _, kept in pairs if kept == TRUE}
    surely = found.queries in seen or program.keep.zero_if_empty or rows_keep_some(found.predicate, found.queries[1])
    if not surely or sum(length for _, length in {q for q, _, _ in pairs}) < m:
        return ()  # queries that keep nothing give what no part says
    empty = (
        Empty.ZERO if found.queries in seen else program.keep.empty
    )  # what keeps nothing of one part takes no share in the others
    return tuple(_part(program, q, k, Keep(kept, empty)) for q, k, kept in sorted(pairs, key=lambda pair: (pair[0], pair[1])))


def _is_faster(program: Attention, found: GridAmongRuns, m: int, n: int) -> bool:
    """True where the parts, one after another, and joining them are predicted to take less time than the whole."""
    tiles = choose_tiles(found.predicate, found.queries[1], _TILE, _TILE)
    if not tiles:
        return False
    d, numbers = head_size(program), [size.value for size in (program.axes.b, program.axes.h) if isinstance(size, Const)]
    heads = math.prod(map(int, numbers)) if len(numbers) == 2 else _HEADS

    def time(counts: TileCounts, queries: int, keys: int) -> float:
        return predicted_ms(counts.times(heads), (1, heads, queries, keys, d), _TARGET)

    whole = time(TileCounts.of(plan_predicate(program.keep.predicate, {}, (1, 1, m, n), _TILE, _TILE), 1, 1), m, n)
    parts = time(TileCounts.of(plan_boxes(found.predicate, found.queries[1], tiles), 1, 1), found.queries[1], found.keys[1])
    for (_, queries), (_, keys) in _joined(found):
        parts += time(TileCounts.of_all(queries, keys, _TILE, _TILE), queries, keys) + join_ms(heads, queries, d, _TARGET)
    return parts < _WINS * whole


def join_ms(heads: int, queries: int, d: int, target: Target) -> float:
    """What a part more of the same queries takes to start and to join: two outputs of half precision are read, one is written."""
    return 1e3 * 6 * heads * queries * d / target.bandwidth + _LAUNCH_MS


def _parts_are_programs(program: Attention) -> bool:
    """True where nothing but vectors and the mask tells positions apart, and lse alone joins parts."""

    def without_products(node: Expr) -> Expr | None:
        return ONE if isinstance(node, Dot) else None

    reads = vector_reads(program)
    return (
        program.route == Route()
        and not program.weigh.extra
        and program.adjust == ONE
        and not program.has_rcp
        and program.keep.empty is not Empty.SCORE
        and {read.tensor for read in reads} == set(program.decls)
        and len({read.tensor for read in reads}) == len(reads)
        and all(_place_of(read) is not None for read in reads)
        and len(dots_of(program.score)) == 1
        and not {"q_idx", "kv_idx"} & axes_of(transform(program.score, without_products))
    )


def _place_of(read: Read) -> tuple[Axis, int] | None:
    """The axis of tokens along which a vector operand lies, and its dimension."""
    found = [(entry, place) for place, entry in enumerate(read.index) if entry in (Q_IDX, KV_IDX)]
    others = {"q_idx", "kv_idx"} & {name for entry in read.index if entry not in (Q_IDX, KV_IDX) for name in axes_of(entry)}
    return found[0] if len(found) == 1 and not others else None


def _joined(found: GridAmongRuns) -> list[tuple[Run, Run]]:
    """The pairs of which all is kept, with runs of keys that follow one another as one."""
    joined: list[tuple[Run, Run]] = []
    for queries, keys in sorted(found.full):
        if joined and joined[-1][0] == queries and sum(joined[-1][1]) == keys[0]:
            joined[-1] = queries, (joined[-1][1][0], joined[-1][1][1] + keys[1])
        else:
            joined.append((queries, keys))
    return joined


def _part(program: Attention, queries: Run, keys: Run, keep: Keep) -> Part:
    cuts: dict[str, tuple[int, Run]] = {}
    for read in vector_reads(program):
        at = _place_of(read)
        assert at is not None
        cuts[read.tensor] = at[1], queries if at[0] == Q_IDX else keys
    tensors = tuple(
        replace(decl, shape=(*decl.shape[:place], Const(run[1]), *decl.shape[place + 1 :]))
        for decl in program.tensors
        for place, run in (cuts[decl.name],)
    )
    axes = replace(program.axes, q_idx=Const(queries[1]), kv_idx=Const(keys[1]))
    return Part(queries, keys, replace(program, axes=axes, tensors=tensors, keep=keep), cuts)


def forward(
    parts: tuple[Part, ...], run: Forward, program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int],
    heads_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """O, lse and rcp; `run` is the forward of a part."""
    o, lse, rcp = new_outputs(program, operands, sizes, heads_first)
    for queries in dict.fromkeys(part.queries for part in parts):
        found = [run(part.program, part.operands(operands), sizes, True)[:2] for part in parts if part.queries == queries]
        into = o.narrow(2, *queries), lse.narrow(2, *queries)
        if len(found) == 1:
            into[0].copy_(found[0][0])
            into[1].copy_(found[0][1])
        for other in found[1:]:
            _join_into(*into, found[0], other)
            found[0] = into[0], into[1].contiguous()
    return o, lse, rcp


def _join_into(o: Tensor, lse: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
    """O and lse of all keys from those of some and of the others. A query that keeps nothing of a part has lse -inf there, no weight."""
    if o.is_cuda:
        row_kernels.join_rows_into(o, lse, first, second)
        return
    joined = torch.logaddexp(first[1], second[1])
    weights = [torch.exp(rows - joined).masked_fill(rows == float("-inf"), 0.0)[..., None] for _, rows in (first, second)]
    o.copy_((first[0] * weights[0]).addcmul_(second[0], weights[1]))
    lse.copy_(joined)


def backward(
    parts: tuple[Part, ...], run: Backward, operands: Mapping[str, Tensor], sizes: Mapping[str, int],
    o: Tensor, lse: Tensor, rcp: Tensor, grad_o: Tensor, grad_lse: Tensor | None, wanted: frozenset[str],
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of the operands in `wanted`; `run` is the backward of a part. What several parts give is summed in float32."""
    found: dict[str, list[tuple[Run, Tensor]]] = {name: [] for name in wanted}
    for part in parts:
        of_queries = [tensor if tensor is None else tensor.narrow(2, *part.queries) for tensor in (o, lse, grad_o, grad_lse)]
        given_o, given_lse, given_grad, given_grad_lse = of_queries
        assert given_lse is not None
        given = part.operands(operands)
        made = run(part.program, given, sizes, given_o, given_lse.contiguous(), rcp, given_grad, given_grad_lse, wanted)
        for name in wanted:
            found[name].append((part.cuts[name][1], made[name]))
    places = {name: place for part in parts for name, (place, _) in part.cuts.items()}
    return {name: _summed(terms, operands[name], places[name]) for name, terms in found.items()}


def _summed(terms: list[tuple[Run, Tensor]], operand: Tensor, place: int) -> Tensor:
    """The gradient of an operand from those of runs along its dimension `place`."""
    total = torch.empty(operand.shape, dtype=operand.dtype, device=operand.device)
    cuts = sorted({0, operand.shape[place], *(end for (start, length), _ in terms for end in (start, start + length))})
    for start, end in itertools.pairwise(cuts):
        of_piece = [
            term.narrow(place, start - first, end - start) for (first, length), term in terms if first <= start < first + length
        ]
        _sum_into(total.narrow(place, start, end - start), of_piece, place)
    return total


def _sum_into(out: Tensor, terms: list[Tensor], place: int) -> None:
    if not terms:
        out.zero_()
    elif len(terms) == 1:
        out.copy_(terms[0])
    else:
        *others, last = terms
        first = others[0]
        if len(others) > 1:
            first = torch.empty(out.shape, dtype=torch.promote_types(out.dtype, torch.float32), device=out.device)
            _sum_into(first, others, place)
        _add_into(out, first, last, place)


def _add_into(out: Tensor, first: Tensor, second: Tensor, place: int) -> None:
    tensors = out, first, second
    if out.is_cuda and out.dim() <= 4 and all(tensor.stride(-1) == 1 for tensor in tensors):
        rows = (tensor.movedim(place, -2) for tensor in tensors)
        row_kernels.add_rows_into(*(x[(None,) * (4 - x.dim())] for x in rows))
        return
    wide = torch.promote_types(out.dtype, torch.float32)
    out.copy_(first.to(wide) + second)

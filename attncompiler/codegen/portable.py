"""The lowering for any device, in torch: blocks of queries over the key ranges of the plan. Time and memory follow the density."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.codegen.lowerable import lowerable
from attncompiler.codegen.vectors import VectorGradient, VectorView, add_elements, poison_empty_heads, vector_gradient, view_vectors
from attncompiler.ir.derivative import derivative
from attncompiler.ir.evaluate import Block, whole
from attncompiler.ir.expr import AXES, KV_IDX, ONE, Q_IDX, TRUE, Apply, Axis, Const, Dot, Expr, Read, axes_of, dots_of, reads_of
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Empty
from attncompiler.passes.plan import TilePlan, TileRanges, build_plan, score_where_kept

_BLOCK_Q, _BLOCK_KV = 128, 64
_LONG = 2048  # of more queries than this a block of one head holds twice as many: fewer calls
_WHOLE = 256  # up to this many queries and keys, one block holds everything
_ELEMENTS = 1 << 22  # scores in flight: they should stay in the cache of a core
_FEW_SPANS = 4  # a mask is evaluated on each of so many spans of columns; for more, once on all

_Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Tile:
    """Queries [q0, q1) of batches [b0, b1) against the keys in `ranges`, laid side by side. Only in the columns `partial` of these can a
    pair be outside `keep`."""

    b0: int
    b1: int
    h0: int
    h1: int
    q0: int
    q1: int
    ranges: _Spans
    partial: _Spans

    @property
    def masked(self) -> bool:
        return bool(self.partial)


class _Run:
    """One call: the program bound to its operands."""

    def __init__(self, program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        self.program, self.operands, self.sizes = lowerable(program), operands, sizes
        self.extents = extents_of(program, sizes)
        self.device = operands[program.sum.tensor].device
        doubles = any(t.dtype == torch.float64 for t in operands.values())
        self.dtype = torch.float64 if doubles else torch.float32
        self.everywhere = whole(operands, sizes, self.extents, self.dtype, self.device)
        self.dots = tuple(dict.fromkeys(dot for e in (program.score, program.adjust) for dot in dots_of(e)))
        self.left = {dot: self.view(dot.left, Q_IDX) for dot in self.dots}
        self.right = {dot: self.view(dot.right, KV_IDX) for dot in self.dots}
        self.value = self.view(program.sum, KV_IDX)
        self.kept_score = score_where_kept(program)

    def view(self, read: Read, row: Axis) -> VectorView:
        return view_vectors(read, self.operands[read.tensor], row, self.everywhere)

    def vectors(self) -> Iterator[tuple[Read, VectorView, Axis]]:
        """Every vector read of the program with its view and its row axis."""
        for dot in self.dots:
            yield dot.left, self.left[dot], Q_IDX
            yield dot.right, self.right[dot], KV_IDX
        yield self.program.sum, self.value, KV_IDX

    # ------------------------------------------------------------------------------------------------------ tiles

    def tiles(self) -> Iterator[_Tile]:
        """All tiles of the plan, in order."""
        b, h, m, n = (self.extents[axis.name] for axis in AXES)
        if min(b, h, m) == 0:
            return
        group = max(self.value.group, *(view.group for view in self.right.values()), 1)
        if m <= _WHOLE and n <= _WHOLE:
            partial: _Spans = ((0, n),) if self.program.keep.predicate != TRUE else ()
            for b0, b1, h0, h1 in self._batches(b, h, m, n, group):
                yield _Tile(b0, b1, h0, h1, 0, m, ((0, n),), partial)
            return
        one_by_one = "h" in axes_of(self.program.keep.predicate)  # heads with plans of their own
        block_q = 2 * _BLOCK_Q if one_by_one and m > _LONG else _BLOCK_Q
        plan = build_plan(self.program, self.operands, self.sizes, block_q, _BLOCK_KV)
        rows = _row_ranges(plan, n)
        for tile in range(plan.q_tiles):
            q0, q1 = tile * block_q, min((tile + 1) * block_q, m)
            for pb in range(plan.plan_b):
                for ph in range(plan.plan_h):
                    ranges, partial = rows[(pb * plan.plan_h + ph) * plan.q_tiles + tile]
                    keys = sum(stop - start for start, stop in ranges)
                    wide_b = (pb, pb + 1) if plan.plan_b > 1 else (0, b)
                    wide_h = (ph, ph + 1) if plan.plan_h > 1 else (0, h)
                    whole_group = group if plan.plan_h == 1 else 1
                    for b0, b1, h0, h1 in self._batches(wide_b[1] - wide_b[0], wide_h[1] - wide_h[0], q1 - q0, keys, whole_group):
                        yield _Tile(wide_b[0] + b0, wide_b[0] + b1, wide_h[0] + h0, wide_h[0] + h1, q0, q1, ranges, partial)

    @staticmethod
    def _batches(b: int, h: int, m: int, n: int, group: int) -> Iterator[tuple[int, int, int, int]]:
        """Cut batches and heads so that the scores in flight stay small; heads of one group stay together."""
        room = max(_ELEMENTS // max(m * n, 1), 1)
        if room >= h:
            step = max(room // h, 1)
            yield from ((b0, min(b0 + step, b), 0, h) for b0 in range(0, b, step))
            return
        step = max(room // group, 1) * group
        yield from ((b0, b0 + 1, h0, min(h0 + step, h)) for b0 in range(b) for h0 in range(0, h, step))

    # ------------------------------------------------------------------------------------------------------ pieces

    def block(self, tile: _Tile) -> Block:
        """The positions of a tile, for evaluating expressions on it."""
        spans = ((tile.b0, tile.b1), (tile.h0, tile.h1), (tile.q0, tile.q1))
        positions = {}
        for place, (axis, (start, stop)) in enumerate(zip(AXES[:3], spans, strict=True)):
            shape = [1, 1, 1, 1]
            shape[place] = stop - start
            positions[axis.name] = torch.arange(start, stop, device=self.device).reshape(shape)
        keys = [torch.arange(start, stop, device=self.device) for start, stop in tile.ranges]
        joined = keys[0] if len(keys) == 1 else torch.cat(keys) if keys else torch.arange(0, device=self.device)
        positions["kv_idx"] = joined.reshape(1, 1, 1, -1)
        return Block(self.operands, self.sizes, self.extents, positions, self.dtype)

    def queries(self, view: VectorView, tile: _Tile) -> Tensor:
        """[b, h, q, D] of a tile in the working precision; q is 1 where all queries share the vector."""
        part = _part(view, tile)
        return (part[:, :, tile.q0 : tile.q1] if part.shape[2] == self.extents["q_idx"] else part).to(self.dtype)

    def keys(self, view: VectorView, tile: _Tile) -> Tensor:
        """[b, h or its groups, keys, D] of a tile in the working precision; keys is 1 where all keys share the vector."""
        part = _part(view, tile)
        if part.shape[2] != self.extents["kv_idx"]:
            return part.to(self.dtype)
        pieces = [part[:, :, start:stop] for start, stop in tile.ranges]
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2) if pieces else part[:, :, :0]
        return joined.to(self.dtype)

    def scores(self, tile: _Tile, block: Block) -> Tensor:
        """The score of every pair of a tile, -inf outside `keep`: a fresh tensor [b, h, q, keys]."""
        expr = self.program.score if tile.masked else self.kept_score
        dot, scale = _scaled_dot(expr)
        shape = (tile.b1 - tile.b0, tile.h1 - tile.h0, tile.q1 - tile.q0, block.positions["kv_idx"].shape[3])
        if dot is not None:
            result = _product(self.queries(self.left[dot], tile) * scale, self.keys(self.right[dot], tile), self.right[dot].group)
            result = result if tuple(result.shape) == shape else result.expand(shape).clone()
        else:
            for each in dots_of(expr):
                block.memo[each] = _product(
                    self.queries(self.left[each], tile), self.keys(self.right[each], tile), self.right[each].group
                )
            result = block.tensor(expr).to(self.dtype)
            shared = any(result is value for value in block.memo.values()) or tuple(result.shape) != shape
            result = result.expand(shape).clone() if shared else result
        keep = self.program.keep
        if keep.empty is not Empty.SCORE and keep.predicate != TRUE:
            for start, stop in tile.partial:
                kept = self.columns(block, start, stop).tensor(keep.predicate)
                result[..., start:stop].masked_fill_(~kept, float("-inf"))
        return result

    def columns(self, block: Block, start: int, stop: int) -> Block:
        """Of the keys of a block those in a span of its columns."""
        keys = block.positions["kv_idx"]
        if stop - start == keys.shape[3]:
            return block
        positions = {**block.positions, "kv_idx": keys[..., start:stop]}
        return Block(self.operands, self.sizes, self.extents, positions, self.dtype)


def _part(view: VectorView, tile: _Tile) -> Tensor:
    """The batches and heads of a tile; of its groups, where heads share."""
    tensor = view.tensor
    if tensor.shape[0] > 1:
        tensor = tensor[tile.b0 : tile.b1]
    if tensor.shape[1] > 1:
        tensor = tensor[:, tile.h0 // view.group : -(-tile.h1 // view.group)]
    return tensor


def _row_ranges(plan: TilePlan, n: int) -> list[tuple[_Spans, _Spans]]:
    """For each row of the plan its key ranges in elements, and which columns of these, laid side by side, are of partial tiles."""
    visited, partial = (_tile_ranges(ranges) for ranges in (plan.visited, plan.partial))
    return [_in_elements(tiles, cut, plan.block_kv, n) for tiles, cut in zip(visited, partial, strict=True)]


def _tile_ranges(ranges: TileRanges) -> list[_Spans]:
    rows = zip(ranges.count.tolist(), ranges.begin.tolist(), ranges.end.tolist(), strict=True)
    return [tuple(zip(begin[:count], end[:count], strict=True)) for count, begin, end in rows]


def _in_elements(tiles: _Spans, cut: _Spans, block: int, n: int) -> tuple[_Spans, _Spans]:
    """Ranges of tiles, of which those in `cut` are partial, in elements and in columns."""
    ranges, columns, left = [], [], iter(cut)
    start, at = 0, next(left, None)
    for begin, end in tiles:
        while at is not None and at[0] < end:  # a run of partial tiles lies in one of visited ones
            first, last = ((min(tile * block, n) - begin * block) + start for tile in at)
            columns.append((first, last))
            at = next(left, None)
        ranges.append((begin * block, min(end * block, n)))
        start += ranges[-1][1] - ranges[-1][0]
    return tuple(ranges), _joined(columns, start)


def _joined(spans: list[tuple[int, int]], length: int) -> _Spans:
    """Spans that touch become one; all of `length` where they are many or hold most of it."""
    found: list[tuple[int, int]] = []
    for first, last in spans:
        if found and found[-1][1] == first:
            first = found.pop()[0]
        found.append((first, last))
    if len(found) > _FEW_SPANS or 2 * sum(last - first for first, last in found) > length:
        return ((0, length),)
    return tuple(found)


def _scaled_dot(expr: Expr) -> tuple[Dot | None, float]:
    """(dot, c) where the score is dot * c or dot / c; (None, 1) for anything else."""
    if isinstance(expr, Dot):
        return expr, 1.0
    if isinstance(expr, Apply) and expr.op in ("mul", "div") and isinstance(expr.args[0], Dot) and isinstance(expr.args[1], Const):
        factor = float(expr.args[1].value)
        return expr.args[0], factor if expr.op == "mul" else 1.0 / factor
    return None, 1.0


def _product(left: Tensor, right: Tensor, group: int) -> Tensor:
    """left [b, h, m, d] with right [b, h / group, n, d]: [b, h, m, n]; a group's queries share one product."""
    if group == 1 or right.shape[1] == left.shape[1]:
        return torch.matmul(left, right.transpose(2, 3))
    b, h, m, d = left.shape
    shared = right.shape[1]
    return torch.matmul(left.reshape(b, shared, h // shared * m, d), right.transpose(2, 3)).reshape(b, h, m, right.shape[2])


def _weighted(weights: Tensor, value: Tensor, group: int) -> Tensor:
    """weights [b, h, m, n] with value [b, h / group, n, d]: [b, h, m, d]."""
    if group == 1 or value.shape[1] == weights.shape[1]:
        return torch.matmul(weights, value)
    b, h, m, n = weights.shape
    shared = value.shape[1]
    return torch.matmul(weights.reshape(b, shared, h // shared * m, n), value).reshape(b, h, m, value.shape[3])


def _weighted_keys(weights: Tensor, rows: Tensor, group: int) -> Tensor:
    """weights^T [b, h, n, m] with rows [b, h, m, d]: [b, h, n, d], where `group` > 1 summed over it: [b, h / group, n, d].

    Fewer heads than a group are of one group: heads with plans of their own come one by one."""
    if group == 1:
        return torch.matmul(weights.transpose(2, 3), rows)
    b, h, m, n = weights.shape
    shared = max(h // group, 1)
    folded = weights.reshape(b, shared, h // shared * m, n)
    return torch.matmul(folded.transpose(2, 3), rows.reshape(b, shared, h // shared * m, rows.shape[3]))


# ----------------------------------------------------------------------------------------------------------- forward


def forward(
    program: Attention, operands: Mapping[str, Tensor], sizes: Mapping[str, int], heads_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """O, lse and rcp, as docs/design.md defines them."""
    run = _Run(program, operands, sizes)
    b, h, m, _ = (run.extents[axis.name] for axis in AXES)
    value = operands[program.sum.tensor]
    o = value.new_empty((b, h, m, value.shape[-1]) if heads_first else (b, m, h, value.shape[-1]))
    o = o if heads_first else o.transpose(1, 2)
    lse = value.new_empty((b, h, m), dtype=run.dtype)
    rcp = value.new_empty((b, h, m) if program.has_rcp else (0,), dtype=run.dtype)
    for tile in run.tiles():
        block = run.block(tile)
        scores = run.scores(tile, block)
        extra = [block.tensor(e).to(run.dtype) for e in program.weigh.extra]
        top = scores.amax(3, keepdim=True) if scores.shape[3] else scores.new_full((*scores.shape[:3], 1), float("-inf"))
        for e in extra:
            top = torch.maximum(top, e)
        shift = top.masked_fill(top == float("-inf"), 0.0)
        weights = scores.sub_(shift).exp_()
        total = weights.sum(3, keepdim=True)
        for e in extra:
            total = total + torch.exp(e - shift)
        if program.adjust != ONE:
            _bind_dots(run, tile, block)
            weights = weights * block.tensor(program.adjust)
        result = _weighted(weights, run.keys(run.value, tile), run.value.group).div_(total)
        if program.keep.zero_if_empty or run.extents["kv_idx"] == 0:  # over no keys at all any sum is zero
            result.masked_fill_(total == 0, 0.0)
        at = (slice(tile.b0, tile.b1), slice(tile.h0, tile.h1), slice(tile.q0, tile.q1))
        o[at] = result.to(o.dtype)
        row_lse = shift + total.log()
        lse[at] = row_lse.squeeze(3)
        if program.has_rcp:
            rcp[at] = (torch.exp(row_lse - shift) / total).masked_fill(total == 0, 0.0).squeeze(3)
    return o, lse, rcp


def _bind_dots(run: _Run, tile: _Tile, block: Block) -> None:
    for dot in run.dots:
        if dot not in block.memo:
            block.memo[dot] = _product(run.queries(run.left[dot], tile), run.keys(run.right[dot], tile), run.right[dot].group)


# ---------------------------------------------------------------------------------------------------------- backward


def backward(
    program: Attention,
    operands: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    o: Tensor,
    lse: Tensor,
    rcp: Tensor,
    grad_o: Tensor,
    grad_lse: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients of the operands in `wanted`; each tile recomputes its weights from lse."""
    run = _Run(program, operands, sizes)
    found = {name: torch.zeros(operands[name].shape, dtype=run.dtype, device=run.device) for name in wanted}
    vectors = {
        read: vector_gradient(read, view, found[read.tensor], row, run.everywhere)
        for read, view, row in run.vectors()
        if read.tensor in found
    }
    elements = [read for read in _element_reads(program) if read.tensor in found]
    slopes = _Slopes(run, vectors, elements)
    for tile in run.tiles():
        _backward_tile(run, slopes, tile, o, lse, rcp, grad_o, grad_lse, found, vectors)
    for gradient in vectors.values():
        gradient.scatter(run.everywhere)
    gradients = {name: grad.to(operands[name].dtype) for name, grad in found.items()}
    if program.sum.tensor in wanted:
        poison_empty_heads(program, run.everywhere, lse, gradients[program.sum.tensor])
    return gradients


class _Slopes:
    """The derivatives that a backward needs, of the score as a masked tile evaluates it and as a full one does."""

    def __init__(self, run: _Run, vectors: Mapping[Read, VectorGradient], elements: list[Read]) -> None:
        program = run.program
        moved: list[Dot | Read] = [d for d in run.dots if d.left in vectors or d.right in vectors]
        moved += elements
        self.score = {masked: _nonzero(score, moved) for masked, score in ((True, program.score), (False, run.kept_score))}
        self.adjust = _nonzero(program.adjust, moved)
        self.extra = [_nonzero(extra, moved) for extra in program.weigh.extra]


def _nonzero(expr: Expr, moved: list[Dot | Read]) -> dict[Dot | Read, Expr]:
    slopes = {each: derivative(expr, each) for each in moved}
    return {each: slope for each, slope in slopes.items() if slope != Const(0.0)}


def _backward_tile(
    run: _Run,
    slopes: _Slopes,
    tile: _Tile,
    o: Tensor,
    lse: Tensor,
    rcp: Tensor,
    grad_o: Tensor,
    grad_lse: Tensor | None,
    found: Mapping[str, Tensor],
    vectors: Mapping[Read, VectorGradient],
) -> None:
    program, block = run.program, run.block(tile)
    at = (slice(tile.b0, tile.b1), slice(tile.h0, tile.h1), slice(tile.q0, tile.q1))
    rows, grad = lse[at].unsqueeze(3), grad_o[at].to(run.dtype)
    empty = None
    if program.keep.predicate != TRUE and program.keep.empty is not Empty.SCORE and not program.weigh.extra:
        empty = rows == float("-inf")  # no key is kept: no weight, and no gradient of any score
        rows = rows.masked_fill(empty, 0.0)
    scale = rcp[at].unsqueeze(3) if program.has_rcp else None
    weights = run.scores(tile, block).sub_(rows).exp_()
    weights = weights if scale is None else weights.mul_(scale)
    delta = (grad * o[at].to(run.dtype)).sum(3, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[at].to(run.dtype).unsqueeze(3)
    if empty is not None:
        delta = delta.masked_fill(empty, 0.0)
    grad_weights = _product(grad, run.keys(run.value, tile), run.value.group)  # of the adjusted weights
    adjusted = weights
    if program.adjust != ONE:
        _bind_dots(run, tile, block)
        factor = block.tensor(program.adjust)
        adjusted = weights * factor
    if program.sum in vectors:
        target = vectors[program.sum]
        target.add(_weighted_keys(adjusted, grad, target.view.group), *_where(tile), tile.ranges)
    changes: dict[Dot | Read, Tensor] = {}
    if slopes.adjust:
        _accumulate(changes, slopes.adjust, weights * grad_weights, block)
    grad_score = grad_weights.mul_(factor) if program.adjust != ONE else grad_weights
    grad_score = grad_score.sub_(delta).mul_(weights)
    score_slopes = slopes.score[tile.masked]
    if len(score_slopes) > 0 and not all(isinstance(s, Const) for s in score_slopes.values()):
        _bind_dots(run, tile, block)
    _accumulate(changes, score_slopes, grad_score, block)
    for extra, extra_slopes in zip(program.weigh.extra, slopes.extra, strict=True):
        share = torch.exp(block.tensor(extra).to(run.dtype) - rows)
        _accumulate(changes, extra_slopes, -delta * (share if scale is None else share * scale), block)
    for moved, change in changes.items():
        if isinstance(moved, Dot):
            _add_dot(run, tile, moved, change, vectors)
        else:
            shape = (tile.b1 - tile.b0, tile.h1 - tile.h0, tile.q1 - tile.q0, change.shape[3])
            add_elements(moved, change.expand(shape), found[moved.tensor], block)


def _where(tile: _Tile) -> tuple[tuple[int, int], tuple[int, int]]:
    return (tile.b0, tile.b1), (tile.h0, tile.h1)


def _accumulate(changes: dict[Dot | Read, Tensor], slopes: Mapping[Dot | Read, Expr], grad: Tensor, block: Block) -> None:
    """changes[x] += grad * d expr / d x."""
    for moved, slope in slopes.items():
        if isinstance(slope, Const):
            change = grad if float(slope.value) == 1.0 else grad * float(slope.value)
        else:
            change = grad * block.tensor(slope).to(grad.dtype)
        changes[moved] = changes[moved] + change if moved in changes else change


def _add_dot(run: _Run, tile: _Tile, dot: Dot, grad: Tensor, vectors: Mapping[Read, VectorGradient]) -> None:
    left, right = vectors.get(dot.left), vectors.get(dot.right)
    queries, keys = run.queries(run.left[dot], tile), run.keys(run.right[dot], tile)
    rows: _Spans = ((tile.q0, tile.q1),)
    columns = tile.ranges
    if keys.shape[2] == 1 and grad.shape[3] != 1:  # one vector for all keys
        grad, columns = grad.sum(3, keepdim=True), ((0, 1),)
    if queries.shape[2] == 1 and grad.shape[2] != 1:
        grad, rows = grad.sum(2, keepdim=True), ((0, 1),)
    if left is not None:
        left.add(_weighted(grad, keys, run.right[dot].group), *_where(tile), rows)
    if right is not None:
        right.add(_weighted_keys(grad, queries, right.view.group), *_where(tile), columns)


def _element_reads(program: Attention) -> list[Read]:
    """Reads of single elements that can carry a gradient."""
    exprs = (program.score, program.adjust, *program.weigh.extra)
    reads = dict.fromkeys(read for e in exprs for read in reads_of(e))
    return [read for read in reads if read.tensor not in program.vectors and read.tensor in program.differentiable]

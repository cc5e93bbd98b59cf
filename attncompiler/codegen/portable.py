"""The lowering for any device, in torch: blocks of queries over the keys that the plan visits (portable_tiles.py). Time and memory follow
the density."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from attncompiler.codegen.lowerable import lowerable
from attncompiler.codegen.portable_tiles import Tile, tiles
from attncompiler.codegen.vectors import (
    Lines,
    VectorGradient,
    VectorView,
    add_elements,
    poison_empty_heads,
    vector_gradient,
    view_vectors,
)
from attncompiler.ir.derivative import derivative
from attncompiler.ir.evaluate import Block, whole
from attncompiler.ir.expr import AXES, KV_IDX, ONE, Q_IDX, TRUE, Apply, Axis, Const, Dot, Expr, Read, dots_of, reads_of
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention, Empty
from attncompiler.passes.plan import score_where_kept


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

    def tiles(self) -> Iterator[Tile]:
        """All tiles of the plan, in order."""
        group = max(self.value.group, *(view.group for view in self.right.values()), 1)
        return tiles(self.program, self.operands, self.sizes, self.extents, group)

    # ------------------------------------------------------------------------------------------------------ pieces

    def block(self, tile: Tile) -> Block:
        """The positions of a tile, for evaluating expressions on it."""
        spans = (Lines(tile.b0, tile.b1),), (Lines(tile.h0, tile.h1),), tile.rows, tile.ranges
        positions = {}
        for place, (axis, lines) in enumerate(zip(AXES, spans, strict=True)):
            joined = _taken(self.everywhere.positions[axis.name].reshape(1, 1, -1), lines)
            positions[axis.name] = joined.reshape([-1 if place == at else 1 for at in range(len(AXES))])
        return Block(self.operands, self.sizes, self.extents, positions, self.dtype)

    def queries(self, view: VectorView, tile: Tile) -> Tensor:
        """[b, h, q, D] of a tile in the working precision; q is 1 where all queries share the vector."""
        part = _part(view, tile)
        return (_taken(part, tile.rows) if part.shape[2] == self.extents["q_idx"] else part).to(self.dtype)

    def keys(self, view: VectorView, tile: Tile) -> Tensor:
        """[b, h or its groups, keys, D] of a tile in the working precision; keys is 1 where all keys share the vector."""
        part = _part(view, tile)
        return (_taken(part, tile.ranges) if part.shape[2] == self.extents["kv_idx"] else part).to(self.dtype)

    def scores(self, tile: Tile, block: Block) -> Tensor:
        """The score of every pair of a tile, -inf outside `keep`: a fresh tensor [b, h, q, keys]."""
        expr = self.program.score if tile.masked else self.kept_score
        dot, scale = _scaled_dot(expr)
        shape = (tile.b1 - tile.b0, tile.h1 - tile.h0, tile.height, block.positions["kv_idx"].shape[3])
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


def _part(view: VectorView, tile: Tile) -> Tensor:
    """The batches and heads of a tile; of its groups, where heads share."""
    tensor = view.tensor
    if tensor.shape[0] > 1:
        tensor = tensor[tile.b0 : tile.b1]
    if tensor.shape[1] > 1:
        tensor = tensor[:, tile.h0 // view.group : -(-tile.h1 // view.group)]
    return tensor


def _taken(tensor: Tensor, lines: Sequence[Lines]) -> Tensor:
    """Positions of the third dimension, side by side."""
    pieces = [each.of(tensor).flatten(2, 3) for each in lines]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2) if pieces else tensor[:, :, :0]


def _rows(tensor: Tensor, tile: Tile) -> Tensor:
    """Of [b, h, q_idx, ..] the rows of a tile."""
    return _taken(tensor[tile.b0 : tile.b1, tile.h0 : tile.h1], tile.rows)


def _put(tensor: Tensor, tile: Tile, found: Tensor) -> None:
    """Write them."""
    into, at = tensor[tile.b0 : tile.b1, tile.h0 : tile.h1], 0
    for lines in tile.rows:
        piece = found[:, :, at : at + lines.positions].to(tensor.dtype)
        lines.of(into).copy_(piece.unflatten(2, (lines.number, lines.stop - lines.start)))
        at += lines.positions


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
        _put(o, tile, result)
        row_lse = shift + total.log()
        _put(lse, tile, row_lse.squeeze(3))
        if program.has_rcp:
            _put(rcp, tile, (torch.exp(row_lse - shift) / total).masked_fill(total == 0, 0.0).squeeze(3))
    return o, lse, rcp


def _bind_dots(run: _Run, tile: Tile, block: Block) -> None:
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
    tile: Tile,
    o: Tensor,
    lse: Tensor,
    rcp: Tensor,
    grad_o: Tensor,
    grad_lse: Tensor | None,
    found: Mapping[str, Tensor],
    vectors: Mapping[Read, VectorGradient],
) -> None:
    program, block = run.program, run.block(tile)
    rows, grad = _rows(lse, tile).unsqueeze(3), _rows(grad_o, tile).to(run.dtype)
    empty = None
    if program.keep.predicate != TRUE and program.keep.empty is not Empty.SCORE and not program.weigh.extra:
        empty = rows == float("-inf")  # no key is kept: no weight, and no gradient of any score
        rows = rows.masked_fill(empty, 0.0)
    scale = _rows(rcp, tile).unsqueeze(3) if program.has_rcp else None
    weights = run.scores(tile, block).sub_(rows).exp_()
    weights = weights if scale is None else weights.mul_(scale)
    delta = (grad * _rows(o, tile).to(run.dtype)).sum(3, keepdim=True)
    if grad_lse is not None:
        delta = delta - _rows(grad_lse, tile).to(run.dtype).unsqueeze(3)
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
        target.add(_weighted_keys(adjusted, grad, target.view.group), *tile.batches_and_heads, tile.ranges)
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
            shape = (tile.b1 - tile.b0, tile.h1 - tile.h0, tile.height, change.shape[3])
            add_elements(moved, change.expand(shape), found[moved.tensor], block)


def _accumulate(changes: dict[Dot | Read, Tensor], slopes: Mapping[Dot | Read, Expr], grad: Tensor, block: Block) -> None:
    """changes[x] += grad * d expr / d x."""
    for moved, slope in slopes.items():
        if isinstance(slope, Const):
            change = grad if float(slope.value) == 1.0 else grad * float(slope.value)
        else:
            change = grad * block.tensor(slope).to(grad.dtype)
        changes[moved] = changes[moved] + change if moved in changes else change


def _add_dot(run: _Run, tile: Tile, dot: Dot, grad: Tensor, vectors: Mapping[Read, VectorGradient]) -> None:
    left, right = vectors.get(dot.left), vectors.get(dot.right)
    queries, keys = run.queries(run.left[dot], tile), run.keys(run.right[dot], tile)
    rows = tile.rows
    columns = tile.ranges
    if keys.shape[2] == 1 and grad.shape[3] != 1:  # one vector for all keys
        grad, columns = grad.sum(3, keepdim=True), (Lines(0, 1),)
    if queries.shape[2] == 1 and grad.shape[2] != 1:
        grad, rows = grad.sum(2, keepdim=True), (Lines(0, 1),)
    if left is not None:
        left.add(_weighted(grad, keys, run.right[dot].group), *tile.batches_and_heads, rows)
    if right is not None:
        right.add(_weighted_keys(grad, queries, right.view.group), *tile.batches_and_heads, columns)


def _element_reads(program: Attention) -> list[Read]:
    """Reads of single elements that can carry a gradient."""
    exprs = (program.score, program.adjust, *program.weigh.extra)
    reads = dict.fromkeys(read for e in exprs for read in reads_of(e))
    return [read for read in reads if read.tensor not in program.vectors and read.tensor in program.differentiable]

"""Which schedule runs a program whose operands lie in memory so and so: what calls run, and what `explain` and `inspect` show."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attncompiler.codegen.emission import program_dots, vector_reads
from attncompiler.codegen.vectors import VectorView, view_vectors
from attncompiler.ir.evaluate import Block, whole
from attncompiler.ir.expr import KV_IDX, Q_IDX, Axis, Read
from attncompiler.ir.interpreter import extents_of
from attncompiler.ir.program import Attention
from attncompiler.passes.grid import GridTiles
from attncompiler.runtime.launch import describable, in_grid
from attncompiler.tuning.schedule import Schedule, choose_schedule, for_mask
from attncompiler.tuning.target import Target

FEW_QUERIES = 16  # one tile of the smallest kernels


def row_axis(program: Attention, read: Read) -> Axis:
    """The axis that the vectors of a read go along."""
    return Q_IDX if any(read == dot.left for dot in program_dots(program)) else KV_IDX


def views_of(program: Attention, operands: Mapping[str, Tensor], block: Block) -> dict[Read, VectorView]:
    """The vectors of every read of a call; `block`: all its positions."""
    return {r: view_vectors(r, operands[r.tensor], row_axis(program, r), block) for r in vector_reads(program)}


def schedule_of(program: Attention, sizes: Mapping[str, int], target: Target, views: Mapping[Read, VectorView]) -> Schedule:
    """The schedule of a call. Few queries have kernels of their own; tiles are boxes where the mask is one of a grid; operands come
    by descriptors if these can show them, and the grid."""
    extents = extents_of(program, sizes)
    few = extents["q_idx"] <= FEW_QUERIES
    descriptors = target.descriptors and all(
        describable(view.tensor) and view.tensor.shape[2] == extents[row_axis(program, read).name] for read, view in views.items()
    )
    boxed = for_mask(choose_schedule(program, target, descriptors, few_queries=few), program, sizes)
    tiles = boxed.forward.tiles
    if descriptors and tiles and not _shows_grid(tiles, extents, views):
        return for_mask(choose_schedule(program, target, False, few_queries=few), program, sizes)
    return boxed


def _shows_grid(tiles: GridTiles, extents: Mapping[str, int], views: Mapping[Read, VectorView]) -> bool:
    """True where descriptors can load boxes of the grid. The output and its gradient have batches and heads apart."""
    if not tiles.is_dense or len(tiles.axes) < 2:
        return False
    if len(tiles.axes) == 3 and min(extents["b"], extents["h"]) > 1:
        return False
    lengths = tuple(axis.length for axis in tiles.axes)
    return all(len(in_grid(view.tensor.shape, view.tensor.stride(), lengths)[0]) <= 5 for view in views.values())


def schedule_of_layout(program: Attention, sizes: Mapping[str, int], target: Target, operands: Mapping[str, Tensor]) -> Schedule:
    """The schedule of a call whose operands are known by shape, strides and dtype alone: tensors on the meta device."""
    block = whole(operands, sizes, extents_of(program, sizes), torch.float32, torch.device("meta"))
    return schedule_of(program, sizes, target, views_of(program, operands, block))

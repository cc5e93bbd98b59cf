"""Plans of grids as pictures show them: on one lattice of boxes, numbered along the last axis first. Nothing runs these."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attncompiler.passes.grid import AxisBoxes, GridRule, GridTiles, along_axis
from attncompiler.passes.plan import Coverage, TilePlan
from attncompiler.passes.tile_counts import Sides


def lattice_plan(rule: GridRule, rows: Sides, columns: Sides) -> TilePlan:
    """The plan of a separable rule on a fixed lattice."""
    coverage = torch.full((1, 1), int(Coverage.FULL), dtype=torch.int8)
    for demand, length, row, column in zip(rule.along, rule.lengths, rows, columns, strict=True):
        boxes = along_axis(demand, length, row)
        assert boxes is not None
        along = _axis_coverage(boxes, length, column)
        coverage = torch.minimum(coverage[:, None, :, None], along[None, :, None, :]).flatten(2).flatten(0, 1)
    return TilePlan.of_coverage(math.prod(rows), math.prod(columns), coverage[None, None])


def _axis_coverage(boxes: AxisBoxes, length: int, column: int) -> Tensor:
    """int8 [tiles of queries, tiles of keys] of one axis; each residue class has tiles of its own."""
    begin, end, first, last = (x[..., None] for x in boxes.on_lattice(column))
    classes, rows = boxes.start.shape
    at = torch.arange(math.ceil(math.ceil(length / classes) / column))
    kind = ((begin <= at) & (at < end)).to(torch.int8) + ((first <= at) & (at < last)).to(torch.int8)
    found = torch.zeros(classes, rows, classes, len(at), dtype=torch.int8)
    for own in range(classes):
        found[own, :, own] = kind[own]
    return found.reshape(classes * rows, classes * len(at))


def placed(plan: TilePlan, tiles: GridTiles) -> TilePlan:
    """A plan in boxes that begin where the mask does, on the lattice of their shape: each tile is drawn where its middle lies."""
    numbers = torch.arange(plan.kv_tiles)
    cell = torch.zeros(plan.q_tiles, plan.kv_tiles, dtype=torch.int64)
    cells = 1
    for place, (axis, step) in enumerate(zip(tiles.axes, tiles.steps, strict=True)):
        origin = plan.origins[:, place, None].to(torch.int64)
        residue = origin % axis.dilation
        middle = (origin - residue) // axis.dilation + numbers // step % axis.reach * axis.columns + axis.columns // 2
        along = -(-axis.places // axis.columns)
        cell = (cell * axis.dilation + residue) * along + (middle // axis.columns).clamp(0, along - 1)
        cells *= axis.dilation * along
    drawn = torch.zeros(plan.q_tiles, cells, dtype=torch.int8).scatter_reduce_(1, cell, plan.coverage[0, 0], "amax")
    return replace(TilePlan.of_coverage(plan.block_q, plan.block_kv, drawn[None, None]), dense_tiles=plan.dense_tiles)

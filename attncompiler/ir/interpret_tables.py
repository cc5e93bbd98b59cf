"""The meaning of tables and selections: every equation evaluated densely, in float64, in plain differentiable torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from attncompiler.ir.evaluate import box, integer
from attncompiler.ir.expr import Axis, Expr
from attncompiler.ir.select import Argsort, Positions, TopK, TopSum
from attncompiler.ir.tables import Along, Each, Fold, Form, Reduce, Run, Table, Tables

_Over = Callable[[tuple[Axis, ...], Expr], Tensor]  # an expression over some axes, as a tensor of their extents


def interpret_tables(
    program: Tables, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Every table by its name. Memory grows with the product of all axes of an equation: for tests, not for use."""
    extents = {axis: integer(size, sizes) for axis, size in program.axes}
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    known = dict(tensors)
    made: dict[str, Tensor] = {}

    def over(axes: tuple[Axis, ...], expr: Expr) -> Tensor:
        found = {axis.name: extents[axis] for axis in axes}
        return box(known, sizes, found, dtype, device).tensor(expr).expand(tuple(found.values()))

    for table in program.tables:
        made[table.name] = known[table.name] = _equation(table, extents, over)
    return made


def _equation(table: Table, extents: Mapping[Axis, int], over: _Over) -> Tensor:
    form, rows = table.form, table.rows
    # the axes that the form runs along become one, the last
    inputs = [over((*rows, *form.over), expr).reshape(*(extents[axis] for axis in rows), -1) for expr in form.inputs]
    limits = [over(rows, expr).unsqueeze(-1) for expr in form.limits]
    places = 0 if form.into is None else extents[form.into]
    found = _value(form, inputs, limits, places)
    ends = form.over if form.keeps else () if form.into is None else (form.into,)
    found = found.reshape([extents[axis] for axis in (*rows, *ends)])
    return found.permute([(*rows, *ends).index(axis) for axis in table.axes])


def _value(form: Form, inputs: list[Tensor], limits: list[Tensor], places: int) -> Tensor:
    """What a form makes of inputs [rows, n]: [rows, n] if it keeps its axes, [rows, places] of a list, else [rows, 1]."""
    match form:
        case Each():
            return inputs[0]
        case Reduce():
            return _reduced(form.by, inputs[0], inputs[1])
        case Along(run=Run.CUMSUM):
            return inputs[0].masked_fill(~inputs[1], 0).cumsum(-1)
        case Along():
            none = ~inputs[1].any(-1, keepdim=True)  # a row without candidates holds no NaN that could reach a gradient
            x = _floating(inputs[0]).masked_fill(~inputs[1], -math.inf).masked_fill(none, 0.0)
            return x.softmax(-1).masked_fill(~inputs[1], 0.0)
        case TopK():
            return (_rank(_order(inputs[0], inputs[1], True)) < limits[0]) & inputs[1]
        case TopSum():
            order = _order(inputs[0], inputs[1], True)
            sums = inputs[0].masked_fill(~inputs[1], 0).gather(-1, order).cumsum(-1)
            before = torch.cat([torch.zeros_like(sums[..., :1]), sums], -1)[..., :-1].gather(-1, _rank(order))
            return ((before < limits[0]) | (_rank(order) < limits[1])) & inputs[1]
        case Argsort():
            return _list(_order(inputs[0], inputs[1], form.descending), inputs[1], places)
        case Positions():
            return _list(_order(inputs[0].to(torch.int64), inputs[0], False), inputs[0], places)
    raise NotImplementedError(type(form).__name__)


def _reduced(by: Fold, x: Tensor, where: Tensor) -> Tensor:
    count = where.sum(-1, keepdim=True)
    if by in (Fold.SUM, Fold.MEAN):
        total = x.masked_fill(~where, 0).sum(-1, keepdim=True)
        return total if by is Fold.SUM else _floating(total) / count
    if by is Fold.ANY:
        return (x & where).any(-1, keepdim=True)
    if by is Fold.ALL:
        return (x | ~where).all(-1, keepdim=True)
    low, high = (-math.inf, math.inf) if x.is_floating_point() else (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max)
    nothing = low if by is Fold.MAX else high
    if x.shape[-1] == 0:
        return x.new_full((*x.shape[:-1], 1), nothing)
    x = x.masked_fill(~where, nothing)
    return x.amax(-1, keepdim=True) if by is Fold.MAX else x.amin(-1, keepdim=True)


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.to(torch.float64)


def _order(x: Tensor, where: Tensor, descending: bool) -> Tensor:
    """Positions in order of x, NaN above all, ties by position, those outside `where` last."""
    order = torch.sort(x.detach(), dim=-1, descending=descending, stable=True).indices
    outside = (~where).gather(-1, order)
    return order.gather(-1, torch.sort(outside.to(torch.int8), dim=-1, stable=True).indices)


def _rank(order: Tensor) -> Tensor:
    """The place of each position in an order."""
    return torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))


def _list(order: Tensor, where: Tensor, places: int) -> Tensor:
    """The first candidates of an order, then -1."""
    filled = torch.arange(order.shape[-1], device=order.device) < where.sum(-1, keepdim=True)
    found = order.masked_fill(~filled, -1)[..., :places]
    return torch.nn.functional.pad(found, (0, places - found.shape[-1]), value=-1)

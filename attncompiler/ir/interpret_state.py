"""The meaning of a state: its steps one after another, in float64, in plain differentiable torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from attncompiler.ir.evaluate import box, integer
from attncompiler.ir.expr import KV_IDX, ONE, Q_IDX, ZERO, Axis, B, Expr, H
from attncompiler.ir.state import ROW, SEGMENT, STATE_AXES, C, D, Moment, State

_Over = Callable[..., Tensor]  # an expression over some axes, as a tensor of their extents


def interpret_state(
    program: State, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """O [b, h, q_idx, d], the final states [b, segment, h, c, d] and, with a normaliser, the final z [b, segment, h, c].

    Gradients flow through torch's own autograd. Every state is kept: for tests, not for use."""
    extents = {axis: integer(program.axes.size(axis), sizes) for axis in STATE_AXES}
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))

    def over(expr: Expr, *axes: Axis, known: Mapping[str, Tensor] = tensors, least: int = 0) -> Tensor:
        found = {axis.name: max(extents[axis], least) for axis in axes}
        value = box(known, sizes, found, dtype, device).tensor(expr)
        return value.expand(tuple(found.values()))

    keys = (B, H, KV_IDX)
    key, value = over(program.key, *keys, C).to(dtype), over(program.value, *keys, D).to(dtype)
    # z goes through the same steps beside S, as one more channel of values that are 1
    value = torch.cat([value, torch.ones_like(key[..., :1])], -1) if program.normalised else value
    entered, left = _steps(program, over, key, value, extents)
    query = over(program.query.value, B, H, Q_IDX, C).to(dtype)
    step = over(program.query.step, B, H, Q_IDX)
    o = torch.einsum("bhic,bhicd->bhid", query, _at(entered, left, program.query.moment, step))
    if program.bonus != ZERO and extents[KV_IDX]:
        there = (step >= 0) & (step < extents[KV_IDX])
        own = step.clamp(0, extents[KV_IDX] - 1).unsqueeze(-1)
        weight = key * over(program.bonus, *keys, C)
        weight = (query * weight.gather(2, own.expand_as(query))).sum(-1, keepdim=True)
        o = o + (weight * value.gather(2, own.expand(*own.shape[:3], value.shape[-1]))).masked_fill(~there.unsqueeze(-1), 0.0)
    channels = extents[D]
    if program.weigh != ONE:
        known = {**tensors, ROW.tensor: o[..., channels]} if program.normalised else tensors
        o = o[..., :channels] / over(program.weigh, B, H, Q_IDX, known=known).unsqueeze(-1)
    ends = over(program.final, B, SEGMENT).unsqueeze(1).expand(-1, extents[H], -1)
    final = _at(entered, left, Moment.AFTER, ends).transpose(1, 2)
    return (o, final[..., :channels], final[..., channels]) if program.normalised else (o, final)


def _steps(program: State, over: _Over, key: Tensor, value: Tensor, extents: Mapping[Axis, int]) -> tuple[Tensor, Tensor]:
    """S before and after the update of each step: [b, h, kv_idx + 1, c, d] each, at i S before step i and S after step i - 1."""
    keys = (B, H, KV_IDX)
    extended = value.shape[-1] - extents[D]

    def with_row(matrix: Tensor, row: Tensor) -> Tensor:
        return torch.cat([matrix, row.unsqueeze(-1)], -1) if extended else matrix

    decay, correct = over(program.decay, *keys, C, D), program.correct
    decay = with_row(decay, decay[..., 0]) if extended and extents[D] else decay
    left_of, right_of = over(correct.left, *keys, C), over(correct.right, *keys, C)
    reset = over(program.reset, *keys)[..., None, None]
    start = over(program.start.state, *keys, C, D, least=1).to(key.dtype)
    starts = with_row(start, over(program.start.row, *keys, C, least=1).to(key.dtype))
    state = starts[:, :, 0]
    entered, left = [], [state]
    # the gradient of one step's slice is a tensor of all steps; that of `unbind` is made once
    steps = (x.to(key.dtype).unbind(2) for x in (key.unsqueeze(-1), value.unsqueeze(-2), decay, left_of.unsqueeze(-1), right_of))
    for begins, first, k, v, keeps, adds, reads in zip(reset.unbind(2), starts.unbind(2), *steps, strict=False):
        state = torch.where(begins, first, state)
        entered.append(state)
        decayed = state * keeps
        corrected = decayed if correct.moment is Moment.AFTER else state
        pulled = torch.einsum("bhc,bhcd->bhd", reads, corrected)
        state = decayed + adds * pulled[:, :, None] + k * v
        left.append(state)
    return torch.stack([*entered, state], 2), torch.stack(left, 2)


def _at(entered: Tensor, left: Tensor, moment: Moment, step: Tensor) -> Tensor:
    """The states [b, h, n, c, d] that are read at `step` [b, h, n]; steps outside are the nearest."""
    states, place = (entered, step) if moment is Moment.BEFORE else (left, step + 1)
    place = place.clamp(0, states.shape[2] - 1)[..., None, None]
    return states.gather(2, place.expand(*place.shape[:3], *states.shape[3:]))

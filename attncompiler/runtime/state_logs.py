"""The gradient of the logarithms of a decay, from what its kernels leave: sums over steps between borders where it is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attncompiler.codegen.recurrence import Decays, Past
from attncompiler.runtime.state_call import StateCall


class Borders(NamedTuple):
    """States where segments begin and the last [b, h, c, d], gradients where they end and that of the first; None: 0."""

    final: Tensor
    of_start: Tensor
    states: Tensor | None
    gradients: Tensor | None


def gradient_of_logs(call: StateCall, seen: Tensor, written: Tensor, borders: Borders) -> Tensor:
    """The gradient of logarithms, [b, h, kv_idx] or, per head, [b, h, 1]; `seen`, `written` [slices, b * h, kv_idx].

    That of step t is <dS, S> at any step before it, plus what steps wrote and less what queries saw from there to t; or at any step
    after it, the other way round (portable_state.py, of_logs). At the borders of segments <dS, S> is known. The nearer border
    counts more, as is best where errors add up at random."""
    steps = call.segment if call.cut else call.n
    padding = call.segments * steps - call.n
    seen, written = (
        torch.nn.functional.pad(x.double().sum(0), (0, padding)).view(-1, call.segments, steps) for x in (seen, written)
    )
    entering = _products(call, borders, first=True)
    if call.recurrence.past is Past.BEFORE_OWN:  # the own query reads the state before its step
        entering = entering - seen[..., :1]
        seen = torch.cat([seen[..., 1:], torch.zeros_like(seen[..., :1])], -1)
    later = (seen - written).flip(-1).cumsum(-1).flip(-1)
    leaving = _products(call, borders, first=False)
    place = torch.arange(steps, device=call.device) / max(steps, 1)
    total = (1.0 - place) * (entering + later - later[..., :1]) + place * (leaving + later)
    logs = total.view(call.b, call.h, -1)[..., : call.n]
    if call.recurrence.decays is Decays.BY_HEAD:
        logs = logs.sum(-1, keepdim=True)
    return logs.to(torch.float32)


def _products(call: StateCall, borders: Borders, first: bool) -> Tensor:
    """<dS, S> [b * h, segments, 1] where segments begin (`first`), or end."""
    shape = call.b * call.h, call.segments, call.c, call.d
    known = borders.states if first else borders.gradients
    if known is None:
        return torch.zeros((*shape[:2], 1), dtype=torch.float64, device=call.device)
    states, gradients = (None if x is None else x.view(shape) for x in (borders.states, borders.gradients))
    outer = (borders.of_start if first else borders.final).view(shape[0], 1, *shape[2:])
    if first:
        beside = torch.cat([outer, *([] if gradients is None else [gradients[:, :-1]])], 1)
    else:
        beside = torch.cat([*([] if states is None else [states[:, 1:]]), outer], 1)
    return (known.view(shape) * beside).sum((-2, -1), dtype=torch.float64).unsqueeze(-1)

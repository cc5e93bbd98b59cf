"""The lowering of recurrences on a GPU: run the emitted kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attncompiler.codegen.bound_state import Bound, StateGradients
from attncompiler.codegen.recurrence import Decays, Recurrence, undivided
from attncompiler.codegen.state_layout import KEYS, QUERIES, VALUES, Role
from attncompiler.ir.expr import ONE, reads_of
from attncompiler.runtime.state_call import READS, StateCall, state_call
from attncompiler.runtime.state_logs import Borders, gradient_of_logs


def forward(
    recurrence: Recurrence, operands: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O, the final states, z and the rows, as portable_state.forward gives them."""
    dtype = operands[recurrence.value.tensor].dtype
    if recurrence.weigh == ONE:
        o, final = _forward(recurrence, operands, sizes, dtype)
        return o, final, final.new_empty(0), final.new_empty(0)
    above, *normaliser = undivided(recurrence)
    o, final = _forward(above, operands, sizes, torch.float32)
    z, rows = final.new_empty(0), final.new_empty(0)
    for part in normaliser:
        wide, states = _forward(part, _with_ones(operands, o, dtype), sizes, torch.float32)
        rows, z = wide.squeeze(-1).contiguous(), states.squeeze(-1)
    o = Bound(recurrence, operands, sizes).divided(o, rows, 0, o.shape[2])
    return o.to(dtype), final, z, rows


def backward(
    recurrence: Recurrence,
    operands: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    o: Tensor,
    rows: Tensor,
    grad_o: Tensor,
    grad_final: Tensor | None,
    grad_z: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients of the operands in `wanted`."""
    if recurrence.weigh == ONE:
        return _backward(recurrence, operands, sizes, grad_o, grad_final, wanted)
    above, *normaliser = undivided(recurrence)
    bound = Bound(recurrence, operands, sizes)
    total = bound.totals(frozenset(read.tensor for read in reads_of(recurrence.weigh)) & wanted)
    grad, grad_rows = bound.before_division(o, rows, grad_o, total)
    found = [total, _backward(above, operands, sizes, grad, grad_final, wanted & above.differentiable)]
    for part in normaliser:
        whole, of_z = grad_rows.unsqueeze(-1), None if grad_z is None else grad_z.unsqueeze(-1)
        given = _with_ones(operands, o, o.dtype)
        found.append(_backward(part, given, sizes, whole, of_z, wanted & part.differentiable))
    summed: dict[str, Tensor] = {}
    for gradients in found:
        for name, gradient in gradients.items():
            summed[name] = summed[name] + gradient if name in summed else gradient
    return {name: gradient.to(operands[name].dtype) for name, gradient in summed.items()}


def _with_ones(operands: Mapping[str, Tensor], like: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return {**operands, "ones": torch.ones(1, dtype=dtype, device=like.device)}


def _forward(
    recurrence: Recurrence, operands: Mapping[str, Tensor], sizes: Mapping[str, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """O, in `dtype`, and the final states."""
    call = state_call(recurrence, operands, sizes)
    o = torch.empty((call.b, call.m, call.h, call.d), dtype=dtype, device=call.device).transpose(1, 2)
    final = call.empty(call.b, 1, call.h, call.c, call.d)
    tensors = {**call.pointers(operands), "O": o, "Final": final, **_states(call, operands, sizes)}
    call.run(call.emission.forward, tensors, {"O": o})
    return o, final


def _states(call: StateCall, operands: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The states of segments, and what goes into the first: a sequence that is not cut is walked from there."""
    found = {"States": call.states()} if call.cut else {}
    if call.recurrence.start:
        start = Bound(call.recurrence, operands, sizes).start().contiguous()
        found["Start" if call.cut else "States"] = start
    if call.cut and call.recurrence.decays is Decays.BY_TOKEN:
        found["Totals"] = call.totals()
    return found


def _backward(
    recurrence: Recurrence,
    operands: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    grad_o: Tensor,
    grad_final: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    of_decay = bool({read.tensor for read in reads_of(recurrence.log_decay)} & wanted)
    of_start = any(read.tensor in wanted for read in recurrence.start)
    reads = {QUERIES: recurrence.query, VALUES: recurrence.value, KEYS: recurrence.key}
    needed = [role for role, read in reads.items() if read.tensor in wanted or of_decay or (of_start and role is VALUES)]
    above = grad_o.to(operands[recurrence.value.tensor].dtype)
    call = state_call(recurrence, operands, sizes, (above,), grad_final is not None, of_decay, tuple(needed))
    places = {role: _place(call, role, operands, wanted) for role in needed}
    results = {role: found[0] for role, found in places.items()}
    tensors = {**call.pointers(operands), "DO": above, **_states(call, operands, sizes)}
    tensors |= {role.out: tensor for role, tensor in results.items()}
    tensors |= {role.last: call.empty(call.b, call.h, call.c, call.d) for role in (QUERIES, VALUES)}
    if call.cut:
        tensors["StateGradients"] = call.states()
    if grad_final is not None:
        tensors["FinalGradient" if call.cut else "StateGradients"] = grad_final.to(torch.float32).contiguous()
    if of_decay:
        slices = ((role, call.emission.across(role.kernel)) for role in (QUERIES, KEYS))
        tensors |= {role.seen: call.empty(count, call.b * call.h, call.n) for role, count in slices}
    call.run(call.emission.backward, tensors, {"DO": above, **{role.out: tensor for role, tensor in results.items()}})
    whole = {reads[role].tensor: found[1] for role, found in places.items() if found[1] is not None}
    logs = call.empty(0)
    if of_decay:
        borders = Borders(tensors["Final"], tensors["StartGradient"], tensors.get("States"), tensors.get("StateGradients"))
        logs = gradient_of_logs(call, tensors["Seen"], tensors["Written"], borders)
    return _finished(call, operands, sizes, wanted, whole, results, tensors["StartGradient"], logs)


def _place(call: StateCall, role: Role, operands: Mapping[str, Tensor], wanted: frozenset[str]) -> tuple[Tensor, Tensor | None]:
    """[b, h, steps, channels] for a result; and the gradient of its operand, where that is what it is written to."""
    parts = call.recurrence
    name = {QUERIES: parts.query, VALUES: parts.value, KEYS: parts.key}[role].tensor
    view = call.places[role]
    if view is None or name not in wanted:
        return call.empty(*(call.extents[axis.name] for axis in READS[role])), None
    whole = torch.empty(operands[name].shape, dtype=operands[name].dtype, device=call.device)
    return view.of(whole), whole


def _finished(
    call: StateCall, operands: Mapping[str, Tensor], sizes: Mapping[str, int], wanted: frozenset[str],
    whole: Mapping[str, Tensor], results: Mapping[Role, Tensor], of_start: Tensor, logs: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradient of every wanted operand: what is not whole yet is summed from the results."""
    rest = wanted - whole.keys()
    if not rest:
        return dict(whole)
    bound = Bound(call.recurrence, operands, sizes)
    into, none = bound.totals(rest), call.empty(0)
    q, k, v = (results.get(role, none) for role in (QUERIES, KEYS, VALUES))
    bound.add(StateGradients(q, k, v, logs, of_start, none), into)
    return {**whole, **{name: total.to(operands[name].dtype) for name, total in into.items()}}

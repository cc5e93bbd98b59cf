"""The lowering of recurrences for any device, in torch: chunks, each the quadratic form of its own keys beside the state.

A sequence of at most one chunk is the quadratic form alone. Several chunks make a slab, whose products are batched: for one slab
there are few and large ones, and what they need stays in the cache. The state is carried from slab to slab, so that memory beside
the operands and results does not grow with the length, but for the states at slab borders that a backward starts from.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attncompiler.codegen.bound_state import Bound, Grouped, StateGradients
from attncompiler.codegen.recurrence import Decays, Past, Recurrence

_CHUNK = 128
_WHOLE = 256  # up to this many steps the quadratic form alone costs less
_ELEMENTS = 1 << 20  # scores in flight: they should stay in the cache


def forward(
    recurrence: Recurrence, operands: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O [b, h, q_idx, d], in memory [b, q_idx, h, d]; the final states [b, 1, h, c, d] and z [b, 1, h, c], and the rows
    [b, h, q_idx] that a backward divides by; the last two of shape [0] without a normaliser."""
    return _Walk(Bound(recurrence, operands, sizes)).forward()


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
    """The gradient of every operand in `wanted`. Missing gradients of final states are 0."""
    return _Walk(Bound(recurrence, operands, sizes)).backward(o, rows, grad_o, grad_final, grad_z, wanted)


@dataclass(frozen=True)
class _Slab:
    """Steps [start, stop), in whole chunks."""

    start: int
    stop: int
    chunk: int

    @property
    def chunks(self) -> int:
        return (self.stop - self.start) // self.chunk


@dataclass(frozen=True)
class _Factors:
    """What decays within the chunks of a slab: exp of differences of cumulated logarithms, none above 0 for decays up to 1. Each
    broadcasts to [b * h, chunks, .., ..]."""

    within: Tensor  # [.., query, key]: from a key to a query that sees it, else 0
    entered: Tensor  # [.., query, 1]: from the chunk's entry to a query
    left: Tensor  # [.., key, 1]: from a key to the chunk's end
    whole: Tensor  # [.., 1, 1]: over the whole chunk


_LEAST = {torch.float32: -80.0, torch.float64: -700.0}


def _exp(log: Tensor) -> Tensor:
    """exp, and 0 for what would come near the subnormal numbers: a CPU multiplies by these a hundred times more slowly."""
    return log.masked_fill(log < _LEAST[log.dtype], float("-inf")).exp_()


class _Walk:
    """One call. Values carry a channel of ones where there is a normaliser, so that its rows and z take the same steps."""

    def __init__(self, bound: Bound) -> None:
        self.bound, self.parts = bound, bound.recurrence
        self.b, self.h, self.n = (bound.extents[name] for name in ("b", "h", "kv_idx"))
        self.c, self.d = bound.extents["c"], bound.extents["d"]
        self.width = self.d + self.parts.normalised
        start = bound.start()
        start = torch.cat([start, bound.start_row().unsqueeze(-1)], -1) if self.parts.normalised else start
        self.first = start.reshape(self.b * self.h, self.c, self.width)

    def slabs(self) -> Iterator[_Slab]:
        if self.n == 0:
            return
        chunk = self.n if self.n <= _WHOLE else _CHUNK
        step = max(_ELEMENTS // max(self.b * self.h * chunk * chunk, 1), 1) * chunk
        full = self.n // chunk * chunk
        yield from (_Slab(start, min(start + step, full), chunk) for start in range(0, full, step))
        if full < self.n:
            yield _Slab(full, self.n, self.n - full)

    # ------------------------------------------------------------------------------------------------------ pieces

    def chunks(self, vectors: Tensor, slab: _Slab) -> Tensor:
        """[b * h, chunks, chunk, channels] of [b, h, length, channels], in the working precision."""
        part = vectors[:, :, slab.start : slab.stop].to(self.bound.dtype)
        return part.reshape(self.b * self.h, slab.chunks, slab.chunk, vectors.shape[-1])

    def heads(self, vectors: Grouped, slab: _Slab) -> Tensor:
        part = Grouped(vectors.tensor[:, :, slab.start : slab.stop], vectors.group).heads(self.h)
        return self.chunks(part, _Slab(0, slab.stop - slab.start, slab.chunk))

    def queries(self, slab: _Slab) -> Tensor:
        return self.heads(self.bound.query, slab) * self.parts.scale

    def values(self, slab: _Slab) -> Tensor:
        values = self.heads(self.bound.value, slab)
        return torch.cat([values, torch.ones_like(values[..., :1])], -1) if self.parts.normalised else values

    def factors(self, slab: _Slab) -> _Factors:
        place = torch.arange(slab.chunk, device=self.bound.device)
        strict = int(self.parts.past is Past.BEFORE_OWN)
        sees = place[:, None] > place if strict else place[:, None] >= place
        if self.parts.decays is Decays.NEVER:
            one = torch.ones(1, 1, 1, 1, dtype=self.bound.dtype, device=self.bound.device)
            return _Factors(sees.to(self.bound.dtype)[None, None], one, one, one)
        if self.parts.decays is Decays.BY_HEAD:
            log = self.bound.log_decay.reshape(-1, 1, 1)
            within = log.unsqueeze(-1) * (place[:, None] - place - strict).clamp_(min=0)
            seen, left = log * (place + 1 - strict), log * (slab.chunk - 1 - place)
            end = log * slab.chunk
        else:
            log = self.bound.log_decay[:, :, slab.start : slab.stop].reshape(-1, slab.chunks, slab.chunk).double()
            total = log.cumsum(-1)
            before = total - log if strict else total
            within = self.difference(before.unsqueeze(-1), total.unsqueeze(-2))
            seen, left, end = (x.to(self.bound.dtype) for x in (before, total[..., -1:] - total, total[..., -1:]))
        within = _exp(within.masked_fill_(~sees, float("-inf")))
        return _Factors(within, _exp(seen).unsqueeze(-1), _exp(left).unsqueeze(-1), _exp(end).unsqueeze(-1))

    def difference(self, later: Tensor, earlier: Tensor) -> Tensor:
        """later - earlier of cumulated logarithms in float64. In float32 the coarse parts, whose difference is exact, and then the
        rest: after one strong decay a sum in float32 would have no digits left for the weak ones that follow."""
        if self.bound.dtype is torch.float64:
            return later - earlier
        coarse = [(x * 256).round_().div_(256) for x in (later, earlier)]
        fine = [(x - y).float() for x, y in zip((later, earlier), coarse, strict=True)]
        return (coarse[0].float() - coarse[1].float()).add_(fine[0]).sub_(fine[1])

    @staticmethod
    def scan(entering: Tensor, whole: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """The states entering each chunk [b * h, chunks, c, d], and the one that leaves the last."""
        states = torch.empty_like(added)
        whole = whole.expand(added.shape[0], added.shape[1], 1, 1)
        for place in range(added.shape[1]):
            states[:, place] = entering
            entering = torch.addcmul(added[:, place], entering, whole[:, place])
        return states, entering

    # ----------------------------------------------------------------------------------------------------- forward

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bound, m = self.bound, self.bound.extents["q_idx"]
        value = bound.operands[self.parts.value.tensor]
        o = value.new_empty(self.b, m, self.h, self.d).transpose(1, 2)
        rows = torch.empty((self.b, self.h, m) if self.parts.normalised else (0,), dtype=bound.dtype, device=bound.device)
        state = self.first
        for slab in self.slabs():
            key, values, factors = self.heads(bound.key, slab), self.values(slab), self.factors(slab)
            states, state = self.scan(state, factors.whole, (key * factors.left).mT @ values)
            if self.parts.past is not Past.ALL:
                query = self.queries(slab)
                found = ((query @ key.mT).mul_(factors.within) @ values).add_((query * factors.entered) @ states)
                self.put(found, o, rows, slab.start, slab.stop)
        if self.parts.past is Past.ALL:
            for start, stop in self.query_spans():
                query = self.queries(_Slab(start, stop, stop - start))
                self.put(query @ state.unsqueeze(1), o, rows, start, stop)
        state = state.reshape(self.b, 1, self.h, self.c, self.width)
        if not self.parts.normalised:
            return o, state.clone() if self.n == 0 else state, rows.new_empty(0), rows
        return o, state[..., : self.d].contiguous(), state[..., self.d].contiguous(), rows

    def query_spans(self) -> Iterator[tuple[int, int]]:
        """Queries in pieces, where they do not go with the keys."""
        m = self.bound.extents["q_idx"]
        step = max(_ELEMENTS // max(self.b * self.h * max(self.c, self.width), 1), 1)
        return ((start, min(start + step, m)) for start in range(0, m, step))

    def put(self, found: Tensor, o: Tensor, rows: Tensor, start: int, stop: int) -> None:
        """What queries [start, stop) read of the state, divided by the normaliser and written."""
        found = found.reshape(self.b, self.h, stop - start, self.width)
        if self.parts.normalised:
            rows[:, :, start:stop] = found[..., self.d]
        o[:, :, start:stop] = self.bound.divided(found[..., : self.d], rows, start, stop)

    # ---------------------------------------------------------------------------------------------------- backward

    def backward(
        self, o: Tensor, rows: Tensor, grad_o: Tensor, grad_final: Tensor | None, grad_z: Tensor | None, wanted: frozenset[str]
    ) -> dict[str, Tensor]:
        bound, parts = self.bound, self.parts
        into = bound.totals(wanted)
        grad, grad_rows = bound.before_division(o, rows, grad_o, into)
        if parts.normalised:
            grad = torch.cat([grad, grad_rows.unsqueeze(-1)], -1)
        slabs = list(self.slabs())
        entering, final = self.at_borders(slabs)
        leaving = self.of_final(grad_final, grad_z)
        empty = functools.partial(torch.zeros, dtype=bound.dtype, device=bound.device)
        found = StateGradients(
            query=empty(self.b, self.h, bound.extents["q_idx"], self.c),
            key=empty(self.b, self.h, self.n, self.c),
            value=empty(self.b, self.h, self.n, self.d),
            log_decay=empty(self.b, self.h, self.n),
            start=self.first,
            start_row=self.first,
        )
        if parts.past is Past.ALL:
            for start, stop in self.query_spans():
                span = _Slab(start, stop, stop - start)
                above, query = self.chunks(grad, span), self.queries(span)
                found.query[:, :, start:stop] = ((above @ final.mT.unsqueeze(1)) * parts.scale).reshape(self.b, self.h, -1, self.c)
                leaving = leaving + (query.mT @ above).sum(1)
        for slab, state in zip(reversed(slabs), reversed(entering), strict=True):
            leaving = self.slab_backward(slab, state, leaving, grad, found)
        leaving = leaving.reshape(self.b, self.h, self.c, self.width)
        logs = found.log_decay if parts.decays is Decays.BY_TOKEN else found.log_decay.sum(-1, keepdim=True)
        bound.add(found._replace(log_decay=logs, start=leaving[..., : self.d], start_row=leaving[..., -1]), into)
        return {name: total.to(bound.operands[name].dtype) for name, total in into.items()}

    def at_borders(self, slabs: list[_Slab]) -> tuple[list[Tensor], Tensor]:
        """The state that enters each slab, and the final one."""
        state, entering = self.first, []
        for slab in slabs:
            entering.append(state)
            factors = self.factors(slab)
            added = (self.heads(self.bound.key, slab) * factors.left).mT @ self.values(slab)
            _, state = self.scan(state, factors.whole, added)
        return entering, state

    def of_final(self, grad_final: Tensor | None, grad_z: Tensor | None) -> Tensor:
        """The gradient of the state that leaves the last step, [b * h, c, width]."""
        total = torch.zeros(self.b, self.h, self.c, self.width, dtype=self.bound.dtype, device=self.bound.device)
        if grad_final is not None:
            total[..., : self.d] += grad_final.squeeze(1)
        if grad_z is not None and self.parts.normalised:
            total[..., self.d] += grad_z.squeeze(1)
        return total.reshape(self.b * self.h, self.c, self.width)

    def slab_backward(self, slab: _Slab, entering: Tensor, leaving: Tensor, grad: Tensor, found: StateGradients) -> Tensor:
        """Writes the gradients of a slab; `leaving` is that of the state that leaves it. Gives that of the state that enters."""
        causal, span = self.parts.past is not Past.ALL, slice(slab.start, slab.stop)
        key, values, factors = self.heads(self.bound.key, slab), self.values(slab), self.factors(slab)
        states, _ = self.scan(entering, factors.whole, (key * factors.left).mT @ values)
        query, above = (self.queries(slab), self.chunks(grad, slab)) if causal else (key, values)
        added = (query * factors.entered).mT @ above if causal else torch.zeros_like(states)
        after, arriving = self.scan(leaving, factors.whole.flip(1), added.flip(1))
        after = after.flip(1)  # of the state that leaves each chunk
        of_key, of_values = (values @ after.mT).mul_(factors.left), (key @ after).mul_(factors.left)
        decayed = self.parts.decays is not Decays.NEVER
        seen = pairs_of_keys = torch.zeros_like(key[..., 0])
        written = (key * of_key).sum(-1) if decayed else seen
        if causal:
            scores, pairs = (above @ values.mT).mul_(factors.within), query @ key.mT
            of_query = (above @ states.mT).mul_(factors.entered)
            if decayed:
                apart = (scores * pairs).tril_(-2 if self.parts.past is Past.BEFORE_OWN else -1)  # those with a decay between them
                seen, pairs_of_keys = (query * of_query).sum(-1) + apart.sum(-1), apart.sum(-2)
            of_query.add_(scores @ key)
            of_key.add_(scores.mT @ query)
            of_values.add_(pairs.mul_(factors.within).mT @ above)
            found.query[:, :, span] = (of_query * self.parts.scale).reshape(self.b, self.h, -1, self.c)
        found.key[:, :, span] = of_key.reshape(self.b, self.h, -1, self.c)
        found.value[:, :, span] = of_values[..., : self.d].reshape(self.b, self.h, -1, self.d)
        if decayed:
            through = (after * states * factors.whole).sum((-2, -1))
            logs = self.of_logs(through, seen, pairs_of_keys, written)
            found.log_decay[:, :, span] = logs.reshape(self.b, self.h, -1)
        return arriving

    def of_logs(self, through: Tensor, seen: Tensor, pairs_of_keys: Tensor, written: Tensor) -> Tensor:
        """The gradient of each step's logarithm, [b * h, chunks, chunk]: what flows from keys before it to queries from it on.

        From the entering state to the leaving one, `through` the chunk; from the entering state or a key to query i, `seen`; from
        key j to a later query, `pairs_of_keys`, or to the leaving state, `written`. What key and query of one step give each other
        is in none of them: it would cancel to rounding."""
        own = torch.zeros_like(seen[..., :1])
        seen = torch.cat([seen[..., 1:], own], -1) if self.parts.past is Past.BEFORE_OWN else seen
        later = (seen.double() - pairs_of_keys).flip(-1).cumsum(-1).flip(-1)
        earlier = torch.cat([own, written[..., :-1]], -1).double().cumsum(-1)
        return (through.unsqueeze(-1) + later + earlier).to(through.dtype)
